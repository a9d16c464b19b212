"""The op-by-op cases of complex numbers: conjugate and negative views are saved, and reach the gradient itself."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from support.rows_cases import Function, N, Own


def _z(x: Tensor) -> Tensor:
    """(N, 4) complex."""
    return torch.view_as_complex(x.view(N, 4, 2))


def _w(p: Tensor) -> Tensor:
    """(4, 3) complex parameters of (4, 3, 2) real ones."""
    return torch.view_as_complex(p.sin())


def _attend(x: Tensor) -> Tensor:
    q = _z(x).view(N, 2, 2)
    return (q @ q.mH).abs().softmax(-1).to(q.dtype) @ q


COMPLEX: dict[str, Function] = {
    "complex_linear": Own(lambda x, p: _z(x) @ _w(p), 4, 3, 2),
    "complex_linear_conj": Own(lambda x, p: _z(x).conj() @ _w(p).conj(), 4, 3, 2),
    "complex_addmm": Own(lambda x, p: torch.addmm(_w(p)[0], _z(x), _w(p)), 4, 3, 2),
    "complex_einsum": Own(lambda x, p: torch.einsum("bi,ij,bi->bj", _z(x).conj(), _w(p), _z(x)), 4, 3, 2),
    "complex_bmm": lambda x: _z(x).view(N, 2, 2) @ _z(x).view(N, 2, 2).mH,
    "complex_outer": lambda x: _z(x)[:, :, None] * _z(x).conj()[:, None, :],
    "complex_mv": Own(lambda x, p: _z(x) @ _w(p)[:, 0], 4, 3, 2),
    "complex_conv": Own(lambda x, p: F.conv1d(_z(x)[:, None], _w(p).t()[:, None, :2]), 4, 3, 2),
    "complex_attention": _attend,
    "complex_gate": lambda x: _z(x) * _z(x).abs().sigmoid(),
    "complex_guises": lambda x: _z(x) * _z(x).conj() * (_z(x) * 2).sin() + _z(x).conj() * _z(x).exp(),
    "complex_saved_twice": lambda x: _twice(_z(x) * (1 + 1j)),
    "complex_physical": lambda x: _z(x).conj_physical() * _z(x),
    "complex_resolved": lambda x: _z(x).conj().resolve_conj() * _z(x).conj(),
    "complex_division": lambda x: _z(x).conj() / (_z(x) * _z(x).conj() + 2),
    "complex_reciprocal": lambda x: (_z(x) + 2).reciprocal() + (_z(x) ** 3).tanh(),
    "complex_parts": lambda x: _z(x).real * _z(x).imag,
    "complex_negative_view": lambda x: _z(x).conj().imag * x[:, :4],
    "complex_negative_saved": lambda x: _negative(_z(x) * 1j),
    "complex_polar": lambda x: torch.polar(x[:, :4].exp(), x[:, 4:]),
    "complex_angle": lambda x: _z(x).angle() * _z(x).abs(),
    "complex_sgn": lambda x: _z(x).sgn() * x[:, :4],
    "complex_norm": lambda x: _z(x) / _z(x).norm(dim=1, keepdim=True),
    "complex_mean": lambda x: _z(x) - _z(x).mean(1, keepdim=True),
    "complex_prod": lambda x: _z(x).prod(1, keepdim=True) * _z(x),
    "complex_where": lambda x: torch.where(_z(x).real > 0, _z(x), _z(x).conj()),
    "complex_real_factor": lambda x: _z(x) * x[:, :4],
    "complex_as_real": lambda x: torch.view_as_real(_z(x).conj() * 2).flatten(1),
    "complex_cumsum": lambda x: _z(x).cumsum(1).conj() * _z(x),
    "complex_steps_first": lambda x: (_z(x).view(N, 2, 2).transpose(0, 1).conj() * 2j).transpose(0, 1).mH * 3,
    "fft": lambda x: torch.fft.fft(_z(x).conj(), dim=1) * _z(x),
    "ifft": lambda x: torch.fft.ifft(x, dim=1),
    "rfft_times_conj": lambda x: torch.fft.rfft(x, dim=-1) * torch.fft.rfft(x, dim=-1).conj(),
    "irfft": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=-1) ** 2, dim=-1),
    "fft2": lambda x: torch.fft.rfft2(x.view(N, 2, 4)),
    "fft_samples": lambda x: torch.fft.fft(x, dim=0),
    "stft": lambda x: torch.stft(x, 4, 2, window=torch.ones(4, dtype=x.dtype), return_complex=True),
    "rotary_complex": lambda x: _z(x) * torch.polar(torch.ones(4), torch.arange(4.0)).to(torch.cdouble),
}


def _twice(z: Tensor) -> Tensor:
    """One storage, saved as it is and as its conjugate."""
    return (z.conj() * z.abs()).sum(1, keepdim=True) * z + z.conj() * z.conj().real


def _negative(z: Tensor) -> Tensor:
    """A tensor with the negative bit is what a product saves."""
    part = z.conj().imag
    assert part.is_neg()
    return part * part.exp() * z.imag
