"""Every operator case: the gradient of chosen losses is the one autograd computes from all of them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.rows_cases import ACTIVATIONS, F64, POINTWISE, PRODUCTS, REDUCTIONS, SHAPES, Function, N
from support.rows_cases_complex import COMPLEX
from support.rows_cases_layers import COUPLED, IMAGES, LOSSES, SEQUENCES
from torch import Tensor, nn

import selbp
from selbp.rows import RowGradient

VECTOR, IMAGE, SEQUENCE = (8,), (4, 8, 8), (5, 8)
CASES: dict[str, tuple[tuple[int, ...], Function]] = {}
for shape, group in (
    *((VECTOR, group) for group in (ACTIVATIONS, POINTWISE, REDUCTIONS, SHAPES, PRODUCTS, LOSSES, COUPLED, COMPLEX)),
    (IMAGE, IMAGES),
    (SEQUENCE, SEQUENCES),
):
    assert not CASES.keys() & group.keys()
    CASES.update({name: (shape, function) for name, function in group.items()})

INDICES = {
    "three": [0, 2, 5],
    "unsorted": [4, 1],
    "twice": [3, 0, 3],
    "one": [2],
    "all": list(range(N)),
    "permuted": [2, 0, *reversed(range(3, N)), 1],  # k = n: the sizes show no rule that is wrong
    "bootstrap": [2, 0, 0, *range(2, N - 2), 2],
    "none": [],
}
TOLERANCE = 1e-10


def setup(name: str) -> tuple[Tensor, Tensor, list[Tensor], Function]:
    shape, function = CASES[name]
    generator = torch.Generator().manual_seed(0)
    leaf = torch.randn(shape, dtype=F64, generator=generator).requires_grad_()
    x = torch.randn(N, *shape, dtype=F64, generator=generator)
    parameters = [leaf]
    if isinstance(function, nn.Module):
        parameters += function.to(F64).parameters()
    return leaf, x, parameters, function


def losses(name: str, leaf: Tensor, x: Tensor, function: Function) -> Tensor:
    """The sine stands between the leaf and the operator: what reaches it must still be right."""
    torch.manual_seed(1)
    out = function((x * leaf).sin() * 1.5)
    return out if name in LOSSES else out.reshape(N, -1).abs().pow(2).sum(1)


def compare(name: str, indices: list[int]) -> Counter[str]:
    leaf, x, parameters, function = setup(name)
    state = (
        {key: value.clone() for key, value in function.state_dict().items()} if hasattr(function, "state_dict") else {}
    )
    index = torch.tensor(indices, dtype=torch.int64)
    weights = torch.linspace(1, 2, len(indices), dtype=F64)  # rows that are confused would show
    expected = torch.autograd.grad(
        (losses(name, leaf, x, function)[index] * weights).sum(), parameters, allow_unused=True
    )
    if state:
        function.load_state_dict(state)
    dense: Counter[str] = Counter()
    chosen = selbp.select(losses(name, leaf, x, function), index, densified=dense)
    actual = torch.autograd.grad((chosen * weights).sum(), parameters, allow_unused=True)
    for got, want in zip(actual, expected, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert type(got) is Tensor and got.shape == want.shape
            assert not got.isnan().any()
            assert float((got - want).norm()) <= TOLERANCE * (1 + float(want.norm()))
    return dense


# Operators that have no row-sparse form in a case; everything else must run on k rows.
DENSIFY: dict[str, set[str]] = {
    "logcumsumexp": {"aten.gt.Scalar", "aten.log.default", "aten.lt.Scalar"},
    "select_scatter": {"aten.add.Tensor", "aten.select_scatter.default"},
    "slice_scatter": {"aten.add.Tensor", "aten.slice_scatter.default"},
    "part_of_the_samples": {"aten.as_strided.default"},
    "one_sample_assigned": {"aten.as_strided.default"},
    "fft_samples": {"aten._fft_c2c.default"},
    "stft": {"aten.index_add_.default"},
    "bilinear": {"aten._trilinear.default"},
    "batch_norm": {"aten.native_batch_norm_backward.default"},
    "batch_mean": {"aten.add.Tensor"},
    "batch_softmax": {"aten._softmax_backward_data.default"},
    "total": {"aten.add.Tensor"},
    "contrastive": {"aten.add.Tensor"},
    "roll_samples": {"aten.roll.default"},
    "sort_samples": {"aten.scatter.src"},
    "cumsum_samples": {"aten.flip.default"},
    "flip_samples": {"aten.flip.default"},
    "half_the_samples": {"aten.slice.Tensor"},
    "one_sample": {"aten.add.Tensor"},
    "split_samples": {"aten.view.default"},
    "frequency_embedding": {"aten.embedding_dense_backward.default"},
    "unfold_samples": {"aten.col2im.default"},
    "fold_samples": {"aten.im2col.default"},
    "pixel_shuffle_samples": {"aten.pixel_unshuffle.default"},
    "pixel_unshuffle_samples": {"aten.pixel_shuffle.default"},
    "all_true_mask": {"aten.index_put.default"},
    "masked_select": {"aten.masked_scatter_backward.default"},
}
if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 12):
    DENSIFY["cumprod"] = {"aten.where.self"}
else:
    # These backwards write into `zeros(sizes)`: no argument is a gradient, so the zeros are no row gradient either.
    # From torch 2.12 on they write into `gradient.new_zeros(sizes)`.
    DENSIFY |= {name: {"aten.scatter.src"} for name in ("topk", "sort")}
    DENSIFY |= {name: {"aten.scatter.src", "aten.add.Tensor"} for name in ("max", "median")}


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 150


@pytest.mark.parametrize("name", CASES)
def test_gradient_is_exact_and_sparse(name: str) -> None:
    dense = compare(name, INDICES["three"])
    assert set(dense) == DENSIFY.get(name, set())


@pytest.mark.parametrize("name", CASES)
def test_any_selection_is_exact(name: str) -> None:
    for which, indices in INDICES.items():
        if which != "three":
            compare(name, indices)


def test_row_gradients_are_what_is_under_test() -> None:
    seen: list[type] = []
    x = torch.randn(N, 8, dtype=F64, requires_grad=True)
    hidden = x * 2
    hidden.register_hook(lambda gradient: seen.append(type(gradient)))
    selbp.select(hidden.sum(1), torch.tensor([1, 2])).sum().backward()
    assert seen == [RowGradient]
    assert type(x.grad) is Tensor


LSTMS = {
    "plain": {"batch_first": True},
    "steps_first": {},
    "two_layers": {"num_layers": 2, "batch_first": True},
    "bidirectional": {"bidirectional": True, "batch_first": True},
    "dropout": {"num_layers": 2, "dropout": 0.3},
    "no_bias": {"bias": False},
}


@pytest.mark.parametrize("what", ["output", "state", "cell", "everything"])
@pytest.mark.parametrize("name", LSTMS)
def test_the_fused_lstm_of_single_precision(name: str, what: str) -> None:
    """float32 on a CPU takes oneDNN's layer, float64 does not."""
    torch.manual_seed(0)
    module = nn.LSTM(8, 7, **LSTMS[name])
    x = torch.randn(N, 5, 8, requires_grad=True)
    index = torch.tensor([4, 1, 1])

    def values() -> Tensor:
        torch.manual_seed(1)
        first = LSTMS[name].get("batch_first", False)
        out, (state, cell) = module(x if first else x.transpose(0, 1))
        out = out if first else out.transpose(0, 1)
        parts = {"output": [out], "state": [state.transpose(0, 1)], "cell": [cell.transpose(0, 1)]}
        chosen = parts[what] if what in parts else [part for group in parts.values() for part in group]
        return sum(part.reshape(N, -1).pow(2).sum(1) for part in chosen)

    inputs = [x, *module.parameters()]
    want = torch.autograd.grad(values()[index].sum(), inputs)
    dense: Counter[str] = Counter()
    got = torch.autograd.grad(selbp.select(values(), index, densified=dense).sum(), inputs)
    assert not dense
    for a, b in zip(got, want, strict=True):
        a = a.to_dense() if isinstance(a, RowGradient) else a
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
