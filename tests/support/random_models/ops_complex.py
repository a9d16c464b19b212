"""Steps through complex numbers: into them, one to three operators there, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from support.random_models.context import Context, step

C128 = torch.complex128

INTO = {
    "view_as_complex": lambda x: torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()),
    "complex": lambda x: torch.complex(x, x.flip(-1)),
    "polar": lambda x: torch.polar(x.abs() + 0.1, x),
    "rfft": lambda x: torch.fft.rfft(x, dim=-1),
    "fft": lambda x: torch.fft.fft(x, dim=-1, norm="ortho"),
    "times_number": lambda x: x * (0.5 + 1j),
    "to": lambda x: x.to(C128),
    "conj_view": lambda x: torch.complex(x, x.sin()).conj(),
    "exp": lambda x: torch.exp(1j * x),
    "fft2": lambda x: torch.fft.fft2(x, dim=(-2, -1), norm="ortho") if x.dim() > 2 else torch.fft.fft(x, norm="ortho"),
    "hfft": lambda x: torch.fft.ihfft(x),
}
BACK = {
    "view_as_real": lambda z: torch.view_as_real(z.resolve_conj()).flatten(-2),
    "real_view": lambda z: torch.view_as_real(z.conj().resolve_conj()).flatten(-2),
    "real": lambda z: z.real * 2,
    "imag": lambda z: z.imag * 2,
    "conj_imag": lambda z: z.conj().imag.sin(),
    "neg_view": lambda z: torch._neg_view(z.conj().imag) + z.real,
    "abs": lambda z: z.abs(),
    "angle": lambda z: (z.tanh() * 0.3 + 2).angle() * 4,
    "energy": lambda z: (z * z.conj()).real,
    "stack": lambda z: torch.stack([z.real, z.imag], -1).flatten(-2),
    "irfft": lambda z: torch.fft.irfft(z, n=4, dim=-1),
    "ifft_real": lambda z: torch.fft.ifft(z, norm="ortho").real,
    "log_abs": lambda z: (z.abs() + 1).log(),
    "norm": lambda z: torch.linalg.vector_norm(z, dim=-1, keepdim=True) + z.real,
    "hfft": lambda z: torch.fft.hfft(z, n=4, norm="ortho"),
}
AMONG = {
    "conj": lambda z: z.conj(),
    "conj_times": lambda z: z.conj() * z * 0.5,
    "conj_physical": lambda z: z.conj_physical().sin() * 0.3,
    "resolve": lambda z: z.conj().resolve_conj() + z * 0.5,
    "exp": lambda z: (z * 0.3j).exp(),
    "tanh": lambda z: (z * 0.3).tanh(),
    "sigmoid": lambda z: (z * 0.3).sigmoid(),
    "square": lambda z: z * z * 0.3,
    "pow": lambda z: (z * 0.3) ** 3,
    "reciprocal": lambda z: (z * z.conj() + 1).reciprocal(),
    "divide": lambda z: z / (z.abs() + 1),
    "divide_conj": lambda z: z.conj() / (z.tanh() * 0.3 + 3),
    "scale": lambda z: (1j * z - z / 2) * 0.7,
    "negative": lambda z: -z.conj(),
    "flip": lambda z: z.flip(-1) + 1j,
    "roll": lambda z: z.roll(1, -1) * z.conj() * 0.4,
    "fft": lambda z: torch.fft.fft(z, dim=-1, norm="ortho"),
    "ifft_conj": lambda z: torch.fft.ifft(z.conj(), dim=-1, norm="ortho").conj(),
    "sum_last": lambda z: z.sum(-1, keepdim=True) + z,
    "mean_last": lambda z: z - z.mean(-1, keepdim=True).conj(),
    "cumsum": lambda z: z.cumsum(-1) * 0.4,
    "prod": lambda z: z.prod(-1, keepdim=True) + z,
    "swap_parts": lambda z: torch.complex(z.imag, z.real),
    "rebuild": lambda z: torch.view_as_complex(torch.view_as_real(z.resolve_conj()) * 0.7),
    "cat": lambda z: torch.cat([z, z.conj()], -1),
    "stack_conj": lambda z: torch.stack([z.conj(), z], -1).sum(-1) + z,
    "where": lambda z: torch.where(z.real > 0, z, z.conj()),
    "masked_fill": lambda z: z.masked_fill(z.imag > 0.5, 0.5j),
    "sgn": lambda z: (z + 0.1).sgn() * z,
    "addcmul": lambda z: torch.addcmul(z, z.conj(), z, value=0.2),
    "lerp": lambda z: torch.lerp(z, z.conj(), 0.3),
    "outer": lambda z: (z.unsqueeze(-1) * z.unsqueeze(-2).conj()).sum(-1) * 0.3,
    "adjoint": lambda z: (z.unsqueeze(-1) @ z.unsqueeze(-1).mH).sum(-1) * 0.3,
    "view_conj": lambda z: z.conj().unsqueeze(-1).expand(*z.shape, 2).sum(-1),
    "in_place_real": lambda z: _real_in_place(z),
    "in_place_conj": lambda z: (z * 1).conj().mul_(0.5 + 1j).add_(z),
    "index": lambda z: z[..., [0, 0]] + z[..., -1:],
    "select_conj": lambda z: z.conj()[..., 0].unsqueeze(-1) * z,
    "sqrt": lambda z: (z.tanh() * 0.3 + 2).sqrt(),
    "log": lambda z: (z.tanh() * 0.3 + 2).log(),
    "real_only": lambda z: z.real * (1 - 0.5j),
}


def _real_in_place(z: Tensor) -> Tensor:
    out = z * 1
    out.real.mul_(0.5)
    out.imag[..., :1] = z.real[..., :1]
    return out


def _with_parameter(c: Context, z: Tensor) -> Tensor:
    d = z.shape[-1]
    how = c.pick("parameter", ["mul", "linear", "conj_linear", "einsum", "real_part", "scalar", "bias_conj", "adjoint"])
    if how == "mul":
        return z * c.param(d, dtype=C128)
    if how == "linear":
        return torch.nn.functional.linear(z, c.param(3, d, dtype=C128), c.param(3, dtype=C128))
    if how == "conj_linear":
        return z.conj() @ c.param(d, 3, dtype=C128).conj()
    if how == "einsum":
        return torch.einsum("...d,de->...e", z, c.param(d, 2, dtype=C128).conj())
    if how == "real_part":
        return z * c.param(d)
    if how == "scalar":
        return z * c.param(dtype=C128)
    if how == "bias_conj":
        return z.conj() + c.param(d, dtype=C128).conj()
    return z @ c.param(3, d, dtype=C128).mH


def _region(c: Context, x: Tensor, front: bool = True) -> Tensor:
    into = c.pick("into", INTO)
    c.store.mixes |= into == "fft2" and not front
    z = INTO[into](x)
    for _ in range(c.pick("steps", [1, 2, 3])):
        z = _with_parameter(c, z) if c.chance(0.3) else AMONG[c.pick("of", AMONG)](z)
    return BACK[c.pick("back", BACK)](z)


@step("vector")
def complex_vector(c: Context, x: Tensor) -> Tensor:
    return _region(c, x)


@step("sequence")
def complex_sequence(c: Context, x: Tensor) -> Tensor:
    return _region(c, x)


@step("sequence")
def complex_steps_first(c: Context, x: Tensor) -> Tensor:
    return _region(c, x.transpose(0, 1), front=False).transpose(0, 1)


@step("sequence")
def complex_products(c: Context, x: Tensor) -> Tensor:
    """Attention of complex queries, a spectral convolution, and their like."""
    z = torch.complex(x, c.earlier(x))
    how = c.pick("how", ["attention", "spectral", "bmm", "einsum", "mm_left", "vdot"])
    if how == "attention":
        return torch.view_as_real((z @ z.mH).abs().softmax(-1).to(C128) @ z).flatten(2)
    if how == "spectral":
        f = torch.fft.rfft(x, dim=1) * c.param(x.shape[1] // 2 + 1, x.shape[2], dtype=C128)
        return torch.fft.irfft(f, n=x.shape[1], dim=1)
    if how == "bmm":
        return torch.bmm(z.conj(), z.transpose(1, 2)).imag * 0.4 + torch.bmm(z, z.mH).real * 0.2
    if how == "einsum":
        return torch.einsum("btd,bsd->bts", z, z.conj()).real * 0.4
    if how == "mm_left":
        return (c.param(2, x.shape[1], dtype=C128) @ z).imag
    return torch.linalg.vecdot(z, z.sin(), dim=-1).real


@step("vector", mixes=True)
def complex_batch(c: Context, x: Tensor) -> Tensor:
    z = torch.complex(x, x.roll(1, -1))
    how = c.pick("how", ["gram", "mean", "fft", "adjoint", "dot"])
    if how == "gram":
        return (z @ z.mH).real * 0.2
    if how == "mean":
        return (z * z.mean(0).conj()).imag
    if how == "fft":
        return torch.fft.fft(z, dim=0, norm="ortho").real
    if how == "adjoint":
        return (z @ (z.mH @ z)).imag * 0.1
    return x * torch.vdot(z[:, 0], z[:, 1]).abs() * 0.2


def _written(face: Any) -> Any:
    """A hook that writes through ``face`` of a copy of the gradient."""

    def hook(gradient: Tensor) -> Tensor:
        out = gradient.clone()
        face(out).mul_(2.0)
        return out

    return hook


FACES: dict[str, Any] = {
    "conj": lambda g: g.conj().mul_(1j),
    "conj_part": lambda g: g.conj()[:, :1].mul_(1j),
    "imag": lambda g: g.imag,
    "adjoint": lambda g: g.mH.mul_(1j),
    "as_real": lambda g: torch.view_as_real(g)[..., 0],
}


@step("vector", mixes=True)
def complex_hook(c: Context, x: Tensor) -> Tensor:
    """The gradient of a complex tensor, written to in place through its views."""
    z = torch.complex(x, x.sin()) * (1 + 0.5j)
    face = FACES[c.pick("face", FACES)]
    if z.requires_grad:
        z.register_hook(_written(face))
    return torch.view_as_real(z * z).flatten(1) * 0.5
