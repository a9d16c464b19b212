"""Gradient matching: which rows, with which weights, add up to the mean gradient.

One engine serves :mod:`selbp.ops.nnls` too: with k = n the greedy nonnegative pursuit *is* the active-set method of
Lawson & Hanson. ``selbp.reference.match`` is the specification; here stand the checks, the schema and the backends.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from selbp import _native
from selbp._checks import (
    accumulate_dtype,
    check_flag,
    check_optional_tensor,
    check_tensor,
    symbolic_float,
    symbolic_int,
)
from selbp.ops import _host_solve
from selbp.ops._backends import capturing, native_threads
from selbp.ops._cuda_solver import solver, warn_of_host
from selbp.ops._factors import autocast_factors
from selbp.ops._match_checks import RULES, check_match
from selbp.ops._register import define
from selbp.reference.sampling import fill_spare
from selbp.types import Matching

__all__ = ["RULES", "match"]

_GRAIN = 1 << 17  # multiply-adds that are worth waking a thread for: about 20 us

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake(gram: Tensor, inner: Tensor, target_sq: Tensor, k: int, *options: object) -> _Outputs:
    return _empty(inner, accumulate_dtype(gram.dtype), k)


def _empty(inner: Tensor, dtype: torch.dtype, k: int) -> _Outputs:
    batch = inner.shape[:-1]
    return (
        inner.new_empty((*batch, k), dtype=torch.int64),
        inner.new_empty((*batch, k), dtype=dtype),
        inner.new_empty(batch, dtype=torch.int32),
        inner.new_empty(batch, dtype=dtype),
        inner.new_empty(batch, dtype=torch.uint8),
    )


_Buffers = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]


@functools.lru_cache(maxsize=16)
def _like(batch: tuple[int, ...], k: int, dtype: torch.dtype) -> _Outputs:
    """Patterns for ``empty_like``, which costs half of an allocation that parses sizes and a type."""
    return _empty(torch.empty((*batch, 0), dtype=dtype, device="cpu"), dtype, k)


def _ready(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype and x.is_contiguous() else x.to(dtype).contiguous()


def _buffers(gram: Tensor, inner: Tensor, target_sq: Tensor, k: int, valid: Tensor | None) -> _Buffers:
    """What a native backend is handed: contiguous inputs of the type it computes in, and outputs to fill."""
    dtype = accumulate_dtype(gram.dtype)
    gram, inner, target_sq = _ready(gram, dtype), _ready(inner, dtype), _ready(target_sq, dtype)
    if valid is not None:
        valid = valid.expand(inner.shape).contiguous()
    if inner.device.type != "cpu":
        return gram, inner, target_sq, valid, *_empty(inner, dtype, k)
    a, b, c, d, e = _like(tuple(inner.shape[:-1]), k, dtype)
    empty = torch.empty_like
    return gram, inner, target_sq, valid, empty(a), empty(b), empty(c), empty(d), empty(e)


def _addresses(buffers: _Buffers) -> tuple[int, int, int, int, int, int, int, int, int]:
    a, b, c, d, e, f, g, h, i = (0 if x is None else x.data_ptr() for x in buffers)
    return a, b, c, d, e, f, g, h, i


def _cpu(
    gram: Tensor,
    inner: Tensor,
    target_sq: Tensor,
    k: int,
    rule: str,
    ridge: float,
    nonnegative: bool,
    valid: Tensor | None,
    tolerance: float,
    fill: bool = False,
) -> _Outputs:
    buffers = _buffers(gram, inner, target_sq, k, valid)
    outputs, n, problems, is_double = buffers[4:], inner.shape[-1], target_sq.numel(), gram.dtype == torch.float64
    if problems:
        threads = min(problems, native_threads(problems * n * min(n, k) ** 2, grain=_GRAIN))
        problem = (is_double, problems, n, k, RULES.index(rule), nonnegative, ridge, tolerance)
        _native.match(_addresses(buffers), *problem, threads, fill=fill)
    return outputs


def _cuda(
    gram: Tensor,
    inner: Tensor,
    target_sq: Tensor,
    k: int,
    rule: str,
    ridge: float,
    nonnegative: bool,
    valid: Tensor | None,
    tolerance: float,
    fill: bool = False,
) -> _Outputs:
    n, device, is_double = inner.shape[-1], inner.device.index, gram.dtype == torch.float64
    core, missing = solver(device, n, k, is_double)
    if core is None:
        if capturing(inner.device):
            raise RuntimeError(f"matching cannot be captured in a CUDA graph: it is solved on the host, for {missing}")
        warn_of_host(missing)
        found = _on_host(gram, inner, target_sq, k, rule, ridge, nonnegative, valid, tolerance, pin=True)
        return found if not fill or valid is None else (fill_spare(found[0], found[0] >= 0, valid)[0], *found[1:])
    buffers, problems = _buffers(gram, inner, target_sq, k, valid), target_sq.numel()
    if problems:
        with torch.cuda.device(device):
            workspace = torch.empty(
                core.match_workspace(problems, is_double, n, k, device), dtype=torch.uint8, device=inner.device
            )
            core.match(
                _addresses(buffers),
                is_double,
                problems,
                n,
                k,
                RULES.index(rule),
                nonnegative,
                ridge,
                tolerance,
                fill,
                workspace.data_ptr(),
                device,
                torch.cuda.current_stream(device).cuda_stream,
            )
    return buffers[4:]


def match_filled(
    gram: Tensor, inner: Tensor, target_sq: Tensor, valid: Tensor, k: int, rule: str, ridge: float, nonnegative: bool
) -> tuple[Tensor, Tensor]:
    """Indices and weights (k,) of one problem on a GPU; spare slots are filled as by :func:`.fill_spare`."""
    indices, weights, *_ = _cuda(gram, inner, target_sq, k, rule, ridge, nonnegative, valid, 0.0, fill=True)
    return indices, weights


def _on_host(
    gram: Tensor,
    inner: Tensor,
    target_sq: Tensor,
    k: int,
    rule: str,
    ridge: float,
    nonnegative: bool,
    valid: Tensor | None,
    tolerance: float,
    *,
    pin: bool,
) -> _Outputs:
    """Solved on the host, by one copy there and one back: a solver of small torch operators would wait for each."""
    dtype = accumulate_dtype(gram.dtype)
    mask = () if valid is None else (valid,)
    there = _host_solve.to_host((gram, inner, target_sq, *mask), dtype, pin=pin)
    found = _cpu(there[0], there[1], there[2], k, rule, ridge, nonnegative, there[3] != 0 if mask else None, tolerance)
    buffer, outputs = _host_solve.room(found, pin=pin)
    for output, tensor in zip(outputs, found, strict=True):
        output.copy_(tensor)
    a, b, c, d, e = _host_solve.views(buffer.to(inner.device, non_blocking=True), found)
    return a, b, c, d, e


_match = define(
    "match(Tensor gram, Tensor inner, Tensor target_sq, SymInt k, str rule, float ridge, bool nonnegative, "
    "Tensor? valid, float tolerance) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=check_match,
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
    autocast=autocast_factors,
)


def match(
    gram: Tensor,  # (..., n, n)
    inner: Tensor,  # (..., n)
    target_sq: Tensor,  # (...)
    k: int,
    *,
    rule: str = "ols",
    ridge: float = 1e-3,
    nonnegative: bool = True,
    valid: Tensor | None = None,  # (n,) or (..., n) bool
    tolerance: float = 0.0,
) -> Matching:
    """Choose at most k of n rows, and weights, that minimise ``||mean - sum w_j g_j||^2 + lam ||w||^2`` greedily.

    The same row is never chosen twice. A problem with a number in it that is not finite chooses nothing (status
    ``INVALID``, residual NaN) and leaves the others of its batch alone.

    Parameters
    ----------
    gram : Tensor
        (..., n, n) inner products of the rows, ``g_i . g_j``; see :func:`selbp.ops.gradient_gram`. Any leading batch
        dimensions; float64 computes and returns float64, any other type float32.
    inner : Tensor
        (..., n) their inner products with the target, ``g_i . mean``; see :func:`selbp.ops.mean_gradient`.
    target_sq : Tensor
        (...) squared norm of the target.
    k : int
        How many rows at most; may exceed n.
    rule : {"ols", "normalized", "raw"}
        What a row is chosen by. ``"ols"``: the exact decrease of the objective (orthogonal least squares, Chen,
        Billings & Luo 1989). ``"normalized"``: its correlation with what is left, per unit of its norm (orthogonal
        matching pursuit, Pati et al. 1993). ``"raw"``: the correlation itself (GradMatch, Killamsetty et al. 2021).
    ridge : float
        ``lam = ridge * mean(diag gram)`` over the valid rows: free of scale. At 0 the weights may explode.
    nonnegative : bool
        Weights > 0, by Lawson & Hanson's (1974) removals; else of either sign.
    valid : Tensor or None
        (n,) or (..., n) bool: rows that may be chosen; the values of the others are not read. None: all.
    tolerance : float
        Stop once the objective is below ``tolerance^2 target_sq``.

    Returns
    -------
    Matching
        ``residual`` is the quadratic form of the inputs: from a float32 Gram it means nothing below 3e-4.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, for a wrong type, shape or range.

    See Also
    --------
    selbp.GradientMatching : the rule that chooses so.
    selbp.ops.nnls : the same solver without a limit on the rows.
    selbp.ops.matching_residual : certifies the residual in float64.

    Examples
    --------
    >>> import torch, selbp
    >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]])
    >>> target = torch.tensor([1.0, 1.0])
    >>> found = selbp.ops.match(rows @ rows.T, rows @ target, target.dot(target), k=1, ridge=0.0)
    >>> found.indices, found.weights
    (tensor([2]), tensor([1.4286]))
    """
    check_tensor("gram", gram)
    check_tensor("inner", inner)
    check_tensor("target_sq", target_sq)
    check_optional_tensor("valid", valid)
    if not isinstance(rule, str):
        raise TypeError(f"rule must be one of {', '.join(map(repr, RULES))}, got {rule!r}")
    found = _match(
        gram,
        inner,
        target_sq,
        symbolic_int("k", k),
        rule,
        symbolic_float("ridge", ridge),
        check_flag("nonnegative", nonnegative),
        valid,
        symbolic_float("tolerance", tolerance),
    )
    return Matching(*found)
