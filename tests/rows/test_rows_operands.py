"""Operands and selections of unusual kinds: sparse, oneDNN and nested tensors, one sample, no sample, repeated ones."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.rows_cases import ACTIVATIONS, F64, POINTWISE, REDUCTIONS
from support.rows_cases_layers import IMAGES, SEQUENCES
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from selbp.rows import RowSet
from selbp.rows.exposed import densify

N = 6
REPEATED = torch.tensor([3, 0, 3, 5, 3])
WEIGHTS = torch.tensor([1.0, -2.0, -3.0, 0.5, 1.5], dtype=F64)  # |a + b| is not |a| + |b|


def compare(
    losses: Callable[[], Tensor], index: Tensor, inputs: list[Tensor], tolerance: float = 1e-11, **options: Any
) -> Counter[str]:
    """Gradients of chosen losses against those of indexed ones."""
    weights = WEIGHTS[: len(index)].to(inputs[0].dtype)
    want = torch.autograd.grad((losses()[index] * weights).sum(), inputs)
    dense: Counter[str] = Counter()
    chosen = selbp.select(losses(), index, densified=dense, **options)
    got = torch.autograd.grad((chosen * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        a = densify(a)
        assert not a.isnan().any()
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    return dense


class Through(torch.autograd.Function):
    """The identity, whose backward is any function of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.function = function
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.function(g), None


NONLINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": lambda g: g.abs(),
    "sign": lambda g: g.sign(),
    "sgn": lambda g: g.sgn() + g,
    "square": lambda g: g * g,
    "square in place": lambda g: g.clone().mul_(g),
    "pow": lambda g: g**2,
    "cube": lambda g: g * g * g,
    "product of two": lambda g: (g * 2).tanh() * g.view(N, 2, 2).flatten(1),
    "addcmul": lambda g: torch.addcmul(g, g, g),
    "gram of features": lambda g: g @ (g.t() @ g),
    "gram of samples": lambda g: (g @ g.t()) @ g,
    "batched outer": lambda g: (g[:, :, None] @ g[:, None, :]).sum(2),
    "einsum": lambda g: torch.einsum("bi,bi,bj->bj", g, g, g),
    "dot": lambda g: g * torch.dot(g[:, 0], g[:, 1]),
    "clipped by row": lambda g: g * (1 / (g.norm(dim=1, keepdim=True) + 1)).clamp(max=0.4),
    "relu": lambda g: g.relu(),
    "where": lambda g: torch.where(g > 0, g, 0.0),
    "masked": lambda g: g.masked_fill(g < 0, 0.0),
    "not zero": lambda g: (g != 0).double(),
    "to bool": lambda g: g.bool().double(),
    "to int": lambda g: g.long().double(),
    "sorted": lambda g: g.sort(1)[0],
    "cumprod": lambda g: g.cumprod(1),
    "zero becomes one": lambda g: g.exp() + g.cos(),
    "sigmoid": lambda g: g.sigmoid() * g,
    "quantised": lambda g: (g * 4).round() / 4,
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_repeated_rows_meet_what_is_not_linear_as_one_gradient(name: str) -> None:
    torch.manual_seed(0)
    x, below, above = torch.randn(N, 5, dtype=F64), nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def losses() -> Tensor:
        return above(Through.apply(below(x).tanh(), NONLINEAR[name])).square().sum(1)

    compare(losses, REPEATED, list(below.parameters()))
    compare(losses, torch.tensor([2, 2]), list(below.parameters()))


def test_logcumsumexp_of_repeated_rows() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(N, 5, dtype=F64), torch.randn(5, dtype=F64, requires_grad=True)
    compare(lambda: (x * w).logcumsumexp(1).sin().sum(1), REPEATED, [w])


@pytest.mark.parametrize("indices", [[3, 0, 3, 5, 3], [4, 1, 0], [2, 2], [1]], ids=str)
def test_merged_rows_keep_their_sums_in_one_slot(indices: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a device whose indices nobody looks at, and on a CPU."""
    index = torch.tensor(indices)
    gradient = torch.linspace(1, 2, len(indices) * 4, dtype=F64).view(-1, 4)
    want = torch.zeros(N, 4, dtype=F64).index_add(0, index, gradient)
    for looked_at in (True, False):
        if not looked_at:
            monkeypatch.setattr(RowSet, "_distinct", lambda self: False)
        merged = RowSet(index, N).merge_duplicates(gradient)
        assert torch.equal(torch.zeros(N, 4, dtype=F64).index_add(0, index, merged), want)
        assert int((merged != 0).any(1).sum()) == len(set(indices))
        if len(set(indices)) == len(indices):
            assert torch.equal(merged, gradient)


def test_no_rows_of_a_batch_of_nan() -> None:
    """The row that stands for none is the first, which may hold anything."""
    x = torch.full((N, 5), float("nan"), dtype=F64)
    net = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 3)).double()
    selbp.select(
        F.cross_entropy(net(x), torch.zeros(N, dtype=torch.int64), reduction="none"), REPEATED[:0]
    ).sum().backward()
    assert all(not p.grad.any() for p in net.parameters())


ONE = {
    **{name: ((8,), function) for group in (ACTIVATIONS, POINTWISE, REDUCTIONS) for name, function in group.items()},
    **{name: ((4, 8, 8), function) for name, function in IMAGES.items()},
    **{name: ((5, 8), function) for name, function in SEQUENCES.items()},
}
OF_SIX = {"cdist", "fold", "grid_sample", "affine_grid", "windows", "shifted_windows", "patches", "height_first"}
OF_SIX |= {"attention_qkv", "class_token", "masked_mean", "grouped_heads", "per_step_loss", "sdpa_mask_by_sample"}
OF_SIX |= {"as_strided_windows", "conv_spectral_norm"}  # the latter moves on in every forward


@pytest.mark.parametrize("name", sorted(ONE.keys() - OF_SIX))
def test_one_sample(name: str) -> None:
    """A samples' dim of size 1 looks like one to broadcast."""
    shape, function = ONE[name]
    torch.manual_seed(0)
    leaf = torch.randn(shape, dtype=F64, requires_grad=True)
    x = torch.randn(1, *shape, dtype=F64)
    parameters = list(function.to(F64).parameters()) if isinstance(function, nn.Module) else []

    def losses() -> Tensor:
        torch.manual_seed(1)
        return function((x * leaf).sin()).reshape(1, -1).square().sum(1)

    inputs = [leaf, *parameters]
    assert not compare(losses, torch.tensor([0, 0]), inputs)  # an ordinary gradient
    for index in ([0], [0, 0, 0], []):  # rows, as where only a device knows whether one counts
        compare(losses, torch.tensor(index, dtype=torch.int64), inputs, any_valid=torch.tensor(bool(index)))


SPARSE: dict[str, Callable[[Tensor], Tensor]] = {
    "coo": lambda a: a.to_sparse(),
    "coo uncoalesced": lambda a: torch.sparse_coo_tensor(a.nonzero().t(), a[a != 0], a.shape, is_coalesced=False),
    "csr": lambda a: a.to_sparse_csr(),
    "csc": lambda a: a.to_sparse_csc(),
    "bsr": lambda a: a.to_sparse_bsr((2, 2)),
    "bsc": lambda a: a.to_sparse_bsc((2, 2)),
}
PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "input": lambda s, a, x, w: torch.sparse.mm(s, w),
    "adjacency": lambda s, a, x, w: torch.sparse.mm(a, x @ w),
    "adjacency by @": lambda s, a, x, w: a @ (x @ w),
    "adjacency twice": lambda s, a, x, w: a @ torch.tanh(a @ (x @ w)),
    "right factor": lambda s, a, x, w: ((x @ w).t() @ a).t(),
    "mask": lambda s, a, x, w: (s * (x @ w @ w.t())).to_dense() @ w,
}


def _trains(body: Callable[[], Tensor], w: Tensor) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.autograd.grad(body().sum(), w)
        except (RuntimeError, NotImplementedError) as error:
            return str(error).splitlines()[0][:80]
    return None


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("layout", SPARSE)
def test_sparse_operands(layout: str, product: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(N, 8, dtype=F64) * (torch.rand(N, 8) < 0.4)
    a = (torch.rand(N, N) < 0.5).to(F64)
    w, head = torch.randn(8, 7, dtype=F64, requires_grad=True), torch.randn(7, 5, dtype=F64)
    sparse_x, sparse_a = SPARSE[layout](x), SPARSE[layout](a)

    def losses() -> Tensor:
        return (PRODUCTS[product](sparse_x, sparse_a, x, w).tanh() @ head).square().sum(1)

    why = _trains(losses, w)
    if why is not None:
        pytest.skip(f"torch itself does not train it: {why}")
    compare(losses, torch.tensor([2, 0, 5]), [w])


def test_onednn_operands() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    torch.manual_seed(0)
    x, below, above = torch.randn(N, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def losses() -> Tensor:
        hidden = torch.relu(below(x).to_mkldnn()).to_dense()
        return above(hidden).square().sum(1)

    compare(losses, torch.tensor([2, 0, 5]), list(below.parameters()), 1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided], ids=["jagged", "nested"])
@pytest.mark.parametrize("what", ["padded", "linear", "loss by sample"])
def test_nested_operands(layout: torch.layout, what: str) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(length, 8, dtype=F64) for length in (3, 1, 4, 2, 5, 2)]
    first, second = nn.Linear(8, 6).double(), nn.Linear(6, 3).double()

    def losses() -> Tensor:
        nested = torch.nested.nested_tensor(parts, layout=layout)
        hidden = first(nested)
        if what == "linear":
            hidden = second(torch.relu(hidden))
        if what == "loss by sample":
            return torch.stack([part.square().sum() for part in hidden.unbind()])
        padded = torch.nested.to_padded_tensor(hidden, 0.0)
        if what == "padded":
            padded = second(padded)
        return padded.square().sum((1, 2))

    modules = [first] if what == "loss by sample" else [first, second]
    parameters = [p for module in modules for p in module.parameters()]
    why = _trains(losses, parameters[0])
    if why is not None:
        pytest.skip(f"torch itself does not train it: {why}")
    compare(losses, torch.tensor([2, 0, 5]), parameters)


def _lazy(z: Tensor, bits: str) -> Tensor:
    """Real or complex, with the bits of a conjugate or a negative view."""
    out = {"conj": lambda: z.conj(), "neg": lambda: z.conj().imag, "neg of complex": lambda: torch._neg_view(z)}[bits]()
    assert out.is_conj() or out.is_neg()
    return out


@pytest.mark.parametrize("bits", ["conj", "neg", "neg of complex"])
def test_rows_of_lazy_views_are_those_of_their_values(bits: str) -> None:
    """Two guises of one storage, of which one has the bit: a checkpoint's input and a cut's activation are such."""
    torch.manual_seed(0)
    z, index = torch.randn(N, 4, dtype=torch.complex128), torch.tensor([4, 1])
    rows = RowSet(index, N)
    for tensor in (_lazy(z, bits), z, _lazy(z, bits), _lazy(z.t().contiguous().t(), bits)):
        assert torch.equal(rows.layout(0).take(tensor), tensor.clone()[index])


@pytest.mark.parametrize("bits", ["conj", "neg", "neg of complex"])
def test_a_lazy_gradient_enters_as_its_values(bits: str) -> None:
    torch.manual_seed(0)
    z, w = torch.randn(N, 4, dtype=torch.complex128), torch.randn(4, dtype=torch.complex128, requires_grad=True)
    seen: list[bool] = []

    def run(choose: Callable[[Tensor], Tensor]) -> Tensor:
        def hook(g: Tensor) -> Tensor:
            out = _lazy(g if g.is_complex() else torch.complex(g, g * 2), bits)
            seen.append(out.is_conj() or out.is_neg())
            return out

        hidden = (z * w).sin()
        chosen = choose(hidden.real * 2 if bits == "neg" else hidden)
        chosen.register_hook(hook)
        return torch.autograd.grad((chosen.abs() ** 2).sum(), w)[0]

    index = torch.tensor([4, 1])
    got, want = run(lambda h: selbp.select(h, index)), run(lambda h: h[index])
    assert all(seen)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
