"""``sketch``: a small random projection of each sequence's head gradient, whose inner products are unbiased.

A sequence's gradient is G_i = sum_t r_t [h_t, 1]^T, a C x (d + 1) matrix that is never formed. With independent
random matrices P (C, p) and Q (d + 1, q), E[P P^T] = I and E[Q Q^T] = I, its sketch is

    S_i = P^T G_i Q = sum_t (P^T r_t) (Q^T [h_t, 1])^T,   p x q numbers,

so that E <S_i, S_j> = <G_i, G_j>, for i = j too, and for Gaussian entries (those of random signs vary less)

    Var <S_i, S_j> <= ((1 + 2/p)(1 + 2/q) - 1) ||G_i||^2 ||G_j||^2:

given Q, with A = G Q, E_P <P^T A_i, P^T A_j>^2 <= <A_i, A_j>^2 + (2/p) ||A_i||^2 ||A_j||^2, and the same again over Q.
P^T r_t = P^T softmax(z_t) - P[y_t] has the shape of attention with keys W and values P: the exponentials are formed a
tile of classes at a time and multiplied at once, p/d of extra work on top of the logits' GEMM. This is the pass that
finds the statistics, 2 n T C (d + p) flops; only the CPU takes a second one, 2 n T C (2 d + p), with label smoothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from selbp import _native, reference
from selbp.ops import _gemm, _triton
from selbp.ops._checks import (
    FLOATING,
    accumulate_dtype,
    autocast_enabled,
    check_dtype,
    check_floating,
    check_optional_tensor,
    check_same_device,
    check_shape,
    check_tensor,
    integer,
)
from selbp.ops._library import define
from selbp.ops._loss import (
    TYPE_CODE,
    address,
    autocast_head,
    check_head,
    check_loss,
    contiguous_rows,
    loss_options,
    raise_bad_target,
    weight_sum,
)
from selbp.ops._threads import native_threads
from selbp.ops.statistics import StatisticsPass, fold_head, tile_shape


def sketch_projections(
    n_classes: int,
    width: int,  # d, or d + 1 with a bias
    dimensions: tuple[int, int] = (64, 64),
    *,
    kind: Literal["sign", "gaussian"] = "sign",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Draw random matrices P (C, p) and Q (width, q) of mean 0 and variance 1/p and 1/q, the same on every device.

    Parameters
    ----------
    n_classes : int
        Rows of P.
    width : int
        Rows of Q: the features, and one more where the head has a bias.
    dimensions : tuple of int
        (p, q).
    kind : {"sign", "gaussian"}
        ``"sign"``: entries plus or minus 1/sqrt(p).
    seed : int
        Of the CPU generator that draws both.
    dtype : torch.dtype
        Of both.
    device : torch.device or str
        Where they are wanted.

    Returns
    -------
    tuple of Tensor
        (P, Q).

    Raises
    ------
    TypeError
        A size or the seed is not an int, or ``dtype`` is no floating type.
    ValueError
        ``kind`` is not one of the two, or a size is negative or a dimension below 1.

    Examples
    --------
    >>> import selbp
    >>> p, q = selbp.ops.sketch_projections(100, 17, (8, 4))
    >>> p.shape, q.shape
    (torch.Size([100, 8]), torch.Size([17, 4]))
    """
    if kind not in ("sign", "gaussian"):
        raise ValueError(f"kind must be sign or gaussian, got {kind!r}")
    if not isinstance(dimensions, Sequence) or len(dimensions) != 2:
        raise ValueError(f"dimensions must be two positive integers (p, q), got {dimensions!r}")
    p, q = integer("dimensions[0]", dimensions[0]), integer("dimensions[1]", dimensions[1])
    n_classes, width = integer("n_classes", n_classes), integer("width", width)
    if min(p, q) < 1:
        raise ValueError(f"dimensions must be two positive integers (p, q), got {dimensions}")
    for name, value in (("n_classes", n_classes), ("width", width)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    generator = torch.Generator().manual_seed(integer("seed", seed))

    def draw(rows: int, columns: int) -> Tensor:
        if kind == "gaussian":
            entries = torch.randn(rows, columns, generator=generator)
        else:
            entries = torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.float32).mul_(2).sub_(1)
        return (entries / columns**0.5).to(device=device, dtype=dtype)

    return draw(n_classes, p), draw(width, q)


def sketch(
    features: Tensor,  # (n, T, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n, T)
    projections: tuple[Tensor, Tensor],  # (C, p) and (d, q), or (d + 1, q) with a bias
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    """Sketch of the head gradient of each sequence's summed token losses; inner products are unbiased.

    Parameters
    ----------
    features : Tensor
        (n, T, d) inputs of the head, float32, float64, bfloat16 or float16.
    weight : Tensor
        (C, d) of the dtype of ``features``.
    bias : Tensor or None
        (C,).
    target : Tensor
        (n, T) int64 class indices, or ``ignore_index`` for tokens that do not count.
    projections : tuple of Tensor
        P (C, p) and Q, from :func:`sketch_projections`; the same for all sequences compared.
    class_weight : Tensor or None
        (C,) weights of the classes, as torch's ``weight``.
    ignore_index : int
        Tokens with this target contribute nothing.
    label_smoothing : float
        In [0, 1], as torch's.
    softcap : float
        As in :func:`cross_entropy_statistics`.

    Returns
    -------
    Tensor
        (n, p, q), float64 for float64 inputs, else float32, accumulated so. Tokens that are not ``valid`` (see
        :class:`selbp.BatchStatistics`) contribute nothing. For projections of random signs or Gaussians
        ``Var <S_i, S_j> <= ((1 + 2/p)(1 + 2/q) - 1) ||G_i||^2 ||G_j||^2``.

    Raises
    ------
    TypeError
        An argument has the wrong type, or the dtypes differ.
    ValueError
        A shape, device or option is wrong, or (CPU) a target lies outside [0, C).

    Examples
    --------
    >>> import torch, selbp
    >>> features, weight = torch.randn(6, 5, 16), torch.randn(100, 16)
    >>> target = torch.randint(0, 100, (6, 5))
    >>> projections = selbp.ops.sketch_projections(100, 16, (8, 4))
    >>> selbp.ops.sketch(features, weight, None, target, projections).shape
    torch.Size([6, 8, 4])
    """
    for name, tensor in (("features", features), ("weight", weight), ("target", target)):
        check_tensor(name, tensor)
    check_optional_tensor("bias", bias)
    check_optional_tensor("class_weight", class_weight)
    if not isinstance(projections, Sequence) or len(projections) != 2:
        raise TypeError(f"projections must be a pair of Tensors, got {type(projections).__name__}")
    left, right = projections
    check_tensor("projections[0]", left)
    check_tensor("projections[1]", right)
    options = loss_options(ignore_index, label_smoothing, softcap)
    return _sketch(features, weight, bias, target, left, right, class_weight, *options)


def _check(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, left: Tensor, right: Tensor,
    class_weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float,
) -> None:  # fmt: skip
    check_floating("features", features)
    check_shape("features", features, "(n, T, d)", (None, None, None))
    n, length, d = features.shape
    check_dtype("target", target, torch.int64)
    check_shape("target", target, f"(n, T) = {(n, length)} as features", (n, length))
    flat = features.new_empty(()).expand(n * length, d)  # of the shape alone: reshaping might copy
    y = target.new_empty(()).expand(n * length)
    check_same_device("target", target, "features", features)
    check_head(flat, weight, bias)
    check_loss("features", flat, weight.shape[0], y, class_weight, label_smoothing, softcap)
    width = d + (bias is not None)
    for name, projection, rows in (("projections[0]", left, weight.shape[0]), ("projections[1]", right, width)):
        check_floating(name, projection)
        check_shape(name, projection, f"of {rows} rows", (rows, None))
        check_same_device(name, projection, "features", features)


def sketch_gram(sketches: Tensor) -> Tensor:
    """Inner products of sketches: an unbiased estimate of the sequences' Gram matrix.

    Parameters
    ----------
    sketches : Tensor
        (n, p, q), from :func:`sketch`.

    Returns
    -------
    Tensor
        (n, n), symmetric positive semidefinite, as :func:`selbp.ops.match` wants it; float64 for float64, else float32.

    Raises
    ------
    TypeError
        ``sketches`` is not a floating tensor.
    ValueError
        ``sketches`` is not (n, p, q).

    Examples
    --------
    >>> import torch, selbp
    >>> selbp.ops.sketch_gram(torch.ones(2, 3, 4))
    tensor([[12., 12.],
            [12., 12.]])
    """
    check_tensor("sketches", sketches)
    check_floating("sketches", sketches)
    check_shape("sketches", sketches, "(n, p, q)", (None, None, None))
    flat = sketches.detach().flatten(1).to(accumulate_dtype(sketches.dtype))
    if autocast_enabled(flat):
        with torch.autocast(flat.device.type, enabled=False):
            return flat @ flat.t()
    return flat @ flat.t()


def _cpu(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, left: Tensor, right: Tensor,
    class_weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float,
) -> Tensor:  # fmt: skip
    n, length, d = features.shape
    tokens, n_classes, accumulate = n * length, weight.shape[0], accumulate_dtype(features.dtype)
    h, y = features.reshape(tokens, d), target.reshape(tokens).contiguous()
    left, right = left.to(accumulate), right.to(accumulate)
    one = StatisticsPass(
        n_classes, features.dtype, y, h, bias is not None, class_weight, ignore_index, label_smoothing, softcap
    )
    one.others = torch.empty(tokens, dtype=accumulate)
    projected = (_project_twice if label_smoothing else _project_once)(one, h, weight, bias, left, class_weight)
    valid = one.outputs[5]
    wide = torch.where(valid[:, None], h, 0.0).to(accumulate)
    mapped = _gemm.linear(wide, right[:d].t(), right[d] if bias is not None else None)
    live = torch.where(valid[:, None], projected, 0.0).view(n, length, left.shape[1])
    return torch.bmm(live.transpose(1, 2), mapped.view(n, length, right.shape[1]))


def _project_once(
    one: StatisticsPass, h: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, class_weight: Tensor | None
) -> Tensor:
    """P^T r of every row in the pass that finds its statistics: attention's running sums, without the target.

    With O = sum_{c != y} e^(z_c - m) D_c P_c it is w_y ((q / s) O - q D_y P_y); the terms: csrc/statistics/cpu.hpp.
    """
    accumulate = left.dtype
    sums = torch.zeros(len(h), left.shape[1], dtype=accumulate)
    one.carry()
    assert one.state is not None and one.others is not None
    greatest = one.state[:, 0]
    nothing = torch.zeros(len(h), dtype=accumulate)  # the target's entry: it comes last
    for part, c, z in _tiles(h, weight, bias):
        before = greatest[part].clone() if c else None
        one.add(z, part.start, c)
        m = greatest[part]
        if before is not None:
            sums[part] *= torch.where(before == m, 1.0, (before - m).exp()).to(accumulate)[:, None]
        e = _residual_tile(one, z, part, c, m.to(accumulate).contiguous(), nothing, None, 0.0)
        sums[part] += _gemm.linear(e, left[c : c + z.shape[1]].t())
    y = torch.where(one.target == one.ignore_index, 0, one.target)
    mass = one.others if class_weight is None else one.others * class_weight[y].to(accumulate)
    s, slope = one.state[:, 1], one.state[:, 8]
    own = left.index_select(0, y).mul_((mass * slope).to(accumulate)[:, None])
    return sums.mul_(torch.where(s > 0, mass / s, 0.0).to(accumulate)[:, None]).sub_(own)


def _project_twice(
    one: StatisticsPass, h: Tensor, weight: Tensor, bias: Tensor | None, left: Tensor, class_weight: Tensor | None
) -> Tensor:
    """The same with label smoothing, whose residuals are small differences: formed from the finished statistics."""
    fold_head(one, h, weight, bias)
    assert one.others is not None
    sums = torch.zeros(len(h), left.shape[1], dtype=left.dtype)
    total = weight_sum(class_weight, one.n_classes, one.label_smoothing)
    for part, c, z in _tiles(h, weight, bias):
        r = _residual_tile(one, z, part, c, one.outputs[1][part], one.others, one.weight, one.label_smoothing, total)
        sums[part] += _gemm.linear(r, left[c : c + z.shape[1]].t())
    return sums


def _tiles(h: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, int, Tensor]]:
    """The logits of a head tile by tile: (rows, first class, logits), each row's classes in order."""
    rows, columns = tile_shape(len(h), len(weight), h.dtype)
    for c in range(0, len(weight), columns):
        part, part_bias = weight[c : c + columns], None if bias is None else bias[c : c + columns]
        for row in range(0, len(h), rows):
            z = contiguous_rows(_gemm.linear(h[row : row + rows], part, part_bias))
            yield slice(row, row + len(z)), c, z


def _residual_tile(
    one: StatisticsPass, z: Tensor, part: slice, c: int, lse: Tensor, others: Tensor, class_weight: Tensor | None,
    label_smoothing: float, total: float = 0.0,
) -> Tensor:  # fmt: skip
    """The residuals of a tile, in its own memory where it has their dtype; ``lse`` (rows of part,), others (n,)."""
    r = z if z.dtype == others.dtype else torch.empty(z.shape, dtype=others.dtype)
    bad = _native.residual(
        r.data_ptr(), z.data_ptr(), TYPE_CODE[z.dtype], z.stride(0), z.shape[0], z.shape[1], c, one.n_classes,
        total, lse.data_ptr(), others.data_ptr() + part.start * others.element_size(), 0,
        one.target.data_ptr() + 8 * part.start, address(class_weight), one.ignore_index, label_smoothing, one.softcap,
        native_threads(z.numel()),
    )  # fmt: skip
    if bad >= 0:
        raise_bad_target(one.target, part.start + bad, one.n_classes, one.ignore_index)
    return r


def _fake(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, left: Tensor, right: Tensor,
    class_weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float,
) -> Tensor:  # fmt: skip
    shape = features.shape[0], left.shape[1], right.shape[1]
    return features.new_empty(shape, dtype=accumulate_dtype(features.dtype))


def _cuda(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, left: Tensor, right: Tensor,
    class_weight: Tensor | None, ignore_index: int, label_smoothing: float, softcap: float,
) -> Tensor:  # fmt: skip
    fused = _triton.kernels("cross_entropy", features)
    if fused is not None:
        return fused.sketch(
            features, weight, bias, target, left, right, class_weight, ignore_index, label_smoothing, softcap
        )
    dtype = accumulate_dtype(features.dtype)
    return reference.sketch(
        features.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), target, left.to(dtype),
        right.to(dtype), class_weight=class_weight, ignore_index=ignore_index, label_smoothing=label_smoothing,
        softcap=softcap,
    )  # fmt: skip


_sketch = define(
    "sketch(Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor left, Tensor right, "
    "Tensor? class_weight, SymInt ignore_index, float label_smoothing, float softcap) -> Tensor",
    check=_check, fake=_fake, cpu=_cpu, cuda=_cuda, autocast=autocast_head,
)  # fmt: skip
