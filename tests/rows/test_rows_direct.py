"""Operators called on a row gradient itself, as hooks and custom functions do: the same as on the dense gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.rows_cases import F64, N
from test_rows_ops import CASES, compare
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from selbp.rows import RULES, RowGradient, RowSet
from selbp.rows.exposed import densify
from selbp.rows.observe import Observer, observing
from selbp.rows.wrap import wrap

aten = torch.ops.aten
DATA = torch.linspace(-2, 3, 3 * 4 * 5, dtype=F64).view(3, 4, 5)
INDEX = torch.tensor([1, 2, 5])
OTHER = torch.linspace(1, 2, N * 4 * 5, dtype=F64).view(N, 4, 5)

OUT_OF_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "mean": lambda g: g.mean(),
    "mean_dim": lambda g: g.mean(1),
    "mean_samples": lambda g: g.mean(0, keepdim=True),
    "sum": lambda g: g.sum(),
    "sub": lambda g: g - g * 2,
    "add_alpha": lambda g: torch.add(g, g, alpha=3),
    "addcmul": lambda g: torch.addcmul(g, g, OTHER),
    "masked_fill_tensor": lambda g: g.masked_fill(OTHER > 1.5, torch.tensor(0.0, dtype=F64)),
    "split": lambda g: g.split(2, 1)[1],
    "split_sizes": lambda g: g.split([1, 3], 1)[1],
    "unbind": lambda g: g.unbind(2)[3],
    "squeeze_all": lambda g: g[:, :1].squeeze(),
    "squeeze_dims": lambda g: g[:, :1].squeeze((1, 2)),
    "sgn": lambda g: g.sgn(),
    "sign": lambda g: g.sign(),
    "abs": lambda g: g.abs(),
    "triu": lambda g: g.triu(),
    "index_select": lambda g: g.index_select(1, torch.tensor([3, 0])),
    "to_float": lambda g: g.float(),
    "zeros_like": lambda g: torch.zeros_like(g),
    "ones_like": lambda g: torch.ones_like(g),
    "full_like": lambda g: torch.full_like(g, 3.0),
    "empty_like": lambda g: torch.empty_like(g).fill_(2),
    "new_empty": lambda g: g.new_empty(3, 2).fill_(2),
    "new_ones": lambda g: g.new_ones(2, 3),
    "new_full": lambda g: g.new_full((2,), 4.0),
    "new_zeros": lambda g: g.new_zeros(2, 3) + 1,
    "alias": lambda g: aten.alias(g),
    "dot": lambda g: torch.dot(g[:, 0, 0], OTHER[:, 0, 0]),
    "vdot": lambda g: torch.vdot(OTHER[:, 0, 0], g[:, 0, 0]),
    "mv_samples": lambda g: OTHER[:, :, 0].t() @ g[:, 0, 0],
    "mv": lambda g: g[:, :, 0] @ OTHER[0, :, 0],
    "conj": lambda g: torch.view_as_complex(g[:, :, :2].contiguous()).conj().resolve_conj().real,
    "conj_physical": lambda g: aten._conj_physical(torch.view_as_complex(torch.stack([g, g * 2], 3))).imag,
    "irfft": lambda g: torch.fft.irfft(torch.view_as_complex(torch.stack([g, g], 3)), dim=2),
    "irfft_samples": lambda g: torch.fft.irfft(torch.view_as_complex(torch.stack([g, g], 3)), dim=0),
    "conj_saved": lambda g: torch.complex(g, g)[:, 0].mT @ torch.complex(OTHER, -OTHER)[:, 1].conj(),
    "negative_view": lambda g: torch._neg_view(g) * 2,
    "negative_saved": lambda g: g[:, 0].mT @ torch.complex(OTHER, OTHER)[:, 1].conj().imag,
    "detach": lambda g: g.detach(),
    "data": lambda g: g.data,
    "as_strided_zeros": lambda g: g.new_zeros(N * 20).as_strided((N, 4, 5), (20, 1, 4)).copy_(g),
    "slice_of_zeros": lambda g: g.new_zeros(N, 4, 9)[:, :, 2:7].copy_(g),
    "select_of_zeros": lambda g: g.new_zeros(N, 3, 4, 5)[:, 1].copy_(g),
    "zeros_then_view": lambda g: _written(g, lambda z: z[:, :, 1:6]),
    "zeros_then_strides": lambda g: _written(g, lambda z: z.as_strided((N, 4, 5), (36, 9, 1))),
    "copied_zeros": lambda g: g.new_zeros(N, 4, 5).copy_(g),
    "index_add": lambda g: OTHER[:2].index_add(0, torch.arange(N) % 2, g),
    "index_put": lambda g: aten._unsafe_index_put(torch.zeros(9, 4, 5, dtype=F64), [torch.arange(N)], g, True),
    "divide": lambda g: g / 3,
    "exponential": lambda g: g.exp(),
    "norm": lambda g: g.norm(),
    "clamp": lambda g: g.clamp(-1, 1),
    "comparison": lambda g: (g > 0).double(),
    "isfinite": lambda g: g.isfinite().all().double(),
    "matmul_of_two": lambda g: g[:, 0] @ g[:, 1].t(),
    "contracted": lambda g: g[:, 0].t() @ g[:, 1],
    "sort_samples": lambda g: g.sort(0)[0],
    "item": lambda g: torch.tensor(g[1, 1, 1].item()),
    "stack_list": lambda g: torch.stack([g, g], 0).flatten(0, 1),
    "foreach": lambda g: torch._foreach_mul([g, g * 2], 3.0)[1],
}


def _written(g: Tensor, face: Callable[[Tensor], Tensor]) -> Tensor:
    """Zeros with ``g`` written into a part, and that part read again, and another."""
    zeros = g.new_zeros(N, 4, 9)
    part, other = face(zeros), zeros[:, :, 5:7]
    part.copy_(g)
    return torch.cat([zeros, part, other], 2)


IN_PLACE: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda g: g.mul_(OTHER),
    "mul_scalar": lambda g: g.mul_(2.0),
    "mul_scalar_overload": lambda g: aten.mul_.Scalar(g, 3),
    "div_": lambda g: g.div_(OTHER),
    "div_scalar_overload": lambda g: aten.div_.Scalar(g, 3),
    "add_": lambda g: g.add_(g * 2),
    "sub_": lambda g: g.sub_(g * 3),
    "neg_": lambda g: g.neg_(),
    "masked_fill_": lambda g: g.masked_fill_(OTHER > 1.5, 0.0),
    "masked_fill_tensor_": lambda g: g.masked_fill_(OTHER > 1.5, torch.tensor(0.0, dtype=F64)),
    "add_dense_": lambda g: g.add_(OTHER),
    "fill_": lambda g: g.fill_(1.5),
    "zero_": lambda g: g.zero_(),
    "clamp_": lambda g: g.clamp_(-1, 1),
    "copy_": lambda g: g.copy_(g * 2),
    "copy_dense_": lambda g: g.copy_(OTHER),
    "copy_other_layout_": lambda g: g.copy_((g * 2).sum(2, keepdim=True)),
    "index_put_": lambda g: g.index_put_([torch.tensor([0, 1])], torch.tensor(2.0, dtype=F64)),
    "index_fill_": lambda g: g.index_fill_(0, torch.tensor([0, 1]), 3.0),
    "setitem": lambda g: g.__setitem__((slice(None), 1), 4.0),
    "setitem_mask": lambda g: g.__setitem__(OTHER > 1.5, 0.0),
    "detached_": lambda g: g.detach().mul_(2),
    "data_": lambda g: g.data.mul_(2),
    "abs_": lambda g: g.abs_(),
    "apply_": lambda g: g.apply_(lambda value: value + 1),
    "map_": lambda g: g.map_(OTHER, lambda a, b: a + b),
    "numpy_": lambda g: g.numpy().__imul__(3),
    "pointer_": lambda g: _by_pointer(g),
    "as_strided_": lambda g: g.as_strided((2, 3), g.stride()[:2]).fill_(7.0),
    "foreach_": lambda g: torch._foreach_mul_([g], 3.0),
}


def _by_pointer(g: Tensor) -> None:
    import ctypes

    if g.is_contiguous():
        memory = (ctypes.c_double * g.numel()).from_address(g.data_ptr())
        memory[7] = 5.0
    else:
        g.mul_(1)


def pair() -> tuple[RowGradient, Tensor]:
    """A row gradient and the tensor that it stands for."""
    gradient = wrap(DATA.clone(), RowSet(INDEX, N).layout(0))
    return gradient, torch.zeros(N, 4, 5, dtype=F64).index_add(0, INDEX, DATA)


@pytest.mark.parametrize("name", OUT_OF_PLACE)
def test_out_of_place(name: str) -> None:
    gradient, dense = pair()
    got, want = densify(OUT_OF_PLACE[name](gradient)), OUT_OF_PLACE[name](dense)
    assert type(got) is Tensor
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(densify(gradient), dense, rtol=0, atol=0)


@pytest.mark.parametrize("view", ["itself", "rows", "column", "transposed", "through a split"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_is_seen_by_every_view(name: str, view: str) -> None:
    def run(g: Tensor) -> list[Tensor]:
        others = [g, g.transpose(1, 2), g[:, 1]]
        target = {
            "itself": lambda: g,
            "rows": lambda: g.view(N * 4, 5).view(N, 4, 5),
            "column": lambda: g[:, :, :],
            "transposed": lambda: g.transpose(1, 2).transpose(1, 2),
            "through a split": lambda: g.view(2, 3, 4, 5).view(N, 4, 5),
        }[view]()
        IN_PLACE[name](target)
        return [densify(x).clone() for x in (*others, target)]

    gradient, dense = pair()
    for got, want in zip(run(gradient), run(dense), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


VOLUMES: dict[str, nn.Module | Callable[[Tensor], Tensor]] = {
    "max_pool3d": nn.MaxPool3d(2),
    "avg_pool3d": nn.AvgPool3d(2),
    "adaptive_avg_pool3d": nn.AdaptiveAvgPool3d(3),
    "adaptive_max_pool3d": nn.AdaptiveMaxPool3d(2),
    "grid_sampler_3d": lambda x: F.grid_sample(x, torch.linspace(-1, 1, N * 24, dtype=F64).view(N, 2, 2, 2, 3)),
    "reflection_pad1d": lambda x: F.pad(x.flatten(2), (2, 1), mode="reflect"),
    "reflection_pad3d": nn.ReflectionPad3d(1),
    "replication_pad1d": lambda x: F.pad(x.flatten(2), (2, 1), mode="replicate"),
    "replication_pad3d": nn.ReplicationPad3d(1),
    "upsample_nearest1d": lambda x: F.interpolate(x.flatten(2), scale_factor=2),
    "upsample_nearest3d": nn.Upsample(scale_factor=2),
    "upsample_trilinear3d": nn.Upsample(scale_factor=2, mode="trilinear"),
    "upsample_exact1d": lambda x: F.interpolate(x.flatten(2), scale_factor=2, mode="nearest-exact"),
    "upsample_exact3d": nn.Upsample(scale_factor=2, mode="nearest-exact"),
    "upsample_bicubic_aa": lambda x: F.interpolate(x.flatten(3), size=(3, 7), mode="bicubic", antialias=True),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_layers_of_other_dimensions(name: str) -> None:
    x = torch.randn(N, 2, 4, 4, 4, dtype=F64)
    leaf = torch.randn(2, 4, 4, 4, dtype=F64, requires_grad=True)

    def losses() -> Tensor:
        return VOLUMES[name]((x * leaf).sin()).flatten(1).square().sum(1)

    (want,) = torch.autograd.grad(losses()[INDEX].sum(), leaf)
    rows = selbp.select(losses(), INDEX)
    (got,) = torch.autograd.grad(rows.sum(), leaf)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert not rows.grad_fn.rows.dense


# Kernels that exist on a GPU only, or in float32 only (tested with the fused LSTM), or in another mode of dispatch.
ELSEWHERE = {
    *("_scaled_dot_product_cudnn_attention_backward", "_scaled_dot_product_efficient_attention_backward"),
    *("_scaled_dot_product_flash_attention_backward", "cudnn_batch_norm_backward", "miopen_batch_norm_backward"),
    *("_masked_scale", "native_dropout_backward", "mkldnn_rnn_layer_backward", "_fused_rms_norm_backward"),
}


@pytest.fixture
def ran() -> Iterator[set[Any]]:
    """The operators that ran by a rule."""
    seen: set[Any] = set()

    class Seen(Observer):
        def ran(self, func: Any, args: Any, result: Any, reason: str | None) -> None:
            if reason is None:
                seen.add(func)

    with observing(Seen()):
        yield seen


def test_every_rule_is_exercised(ran: set[Any]) -> None:
    for name in CASES:
        compare(name, [0, 2, 5])
    for function in (*OUT_OF_PLACE.values(), *IN_PLACE.values()):
        function(pair()[0])
    for name in VOLUMES:
        test_layers_of_other_dimensions(name)
    names = {func._overloadpacket.__name__ for func in RULES if func not in ran}
    assert names <= ELSEWHERE, names - ELSEWHERE
