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

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from selbp import reference
from selbp._checks import (
    FLOATING,
    accumulate_dtype,
    autocast_enabled,
    check_choice,
    check_dtype,
    check_floating,
    check_optional_tensor,
    check_same_device,
    check_shape,
    check_tensor,
    symbolic_int,
)
from selbp.ops import _backends, _sketch_cpu
from selbp.ops._loss_options import LossOptions, autocast_head, check_head, check_loss
from selbp.ops._register import define
from selbp.ops._sketch_cpu import Head


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

    See Also
    --------
    selbp.ops.sketch : projects by them.

    Examples
    --------
    >>> import selbp
    >>> p, q = selbp.ops.sketch_projections(100, 17, (8, 4))
    >>> p.shape, q.shape
    (torch.Size([100, 8]), torch.Size([17, 4]))
    """
    check_choice("kind", kind, ("sign", "gaussian"))
    if not isinstance(dimensions, Sequence) or len(dimensions) != 2:
        raise ValueError(f"dimensions must be two positive integers (p, q), got {dimensions!r}")
    p, q = symbolic_int("dimensions[0]", dimensions[0]), symbolic_int("dimensions[1]", dimensions[1])
    n_classes, width = symbolic_int("n_classes", n_classes), symbolic_int("width", width)
    if min(p, q) < 1:
        raise ValueError(f"dimensions must be two positive integers (p, q), got {dimensions}")
    for name, value in (("n_classes", n_classes), ("width", width)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    if dtype not in FLOATING:
        raise TypeError(f"dtype must be float32, float64, bfloat16 or float16, got {dtype}")
    generator = torch.Generator().manual_seed(symbolic_int("seed", seed))

    def draw(rows: int, columns: int) -> Tensor:
        if kind == "gaussian":
            entries = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
        else:
            signs = torch.randint(0, 2, (rows, columns), generator=generator, dtype=torch.float32, device="cpu")
            entries = signs.mul_(2).sub_(1)
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

    See Also
    --------
    selbp.ops.sketch_projections : draws the two matrices.
    selbp.ops.sketch_gram : the inner products of sketches.

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
    options = LossOptions.of(class_weight, ignore_index, label_smoothing, softcap)
    if not isinstance(projections, Sequence) or len(projections) != 2:
        raise TypeError(f"projections must be a pair of Tensors, got {type(projections).__name__}")
    left, right = projections
    check_tensor("projections[0]", left)
    check_tensor("projections[1]", right)
    return _sketch(features, weight, bias, target, left, right, *options)


def _pack(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, left: Tensor, right: Tensor, *options: Any
) -> tuple[Any, ...]:
    return (features, weight, bias), target, (left, right), LossOptions(*options)


def _check(head: Head, target: Tensor, projections: tuple[Tensor, Tensor], options: LossOptions) -> None:
    features, weight, bias = head
    check_floating("features", features)
    check_shape("features", features, "(n, T, d)", (None, None, None))
    n, length, d = features.shape
    check_dtype("target", target, torch.int64)
    check_shape("target", target, f"(n, T) = {(n, length)} as features", (n, length))
    flat = features.new_empty(()).expand(n * length, d)  # of the shape alone: reshaping might copy
    y = target.new_empty(()).expand(n * length)
    check_same_device("target", target, "features", features)
    check_head(flat, weight, bias)
    check_loss("features", flat, weight.shape[0], y, options)
    width = d if bias is None else d + 1  # torch 2.6 prints no symbolic size to which a bool was added
    for side, (projection, rows) in enumerate(zip(projections, (weight.shape[0], width), strict=True)):
        name = f"projections[{side}]"
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

    See Also
    --------
    selbp.ops.sketch : makes the sketches.
    selbp.ops.gradient_gram : the exact inner products.

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


def _fake(head: Head, target: Tensor, projections: tuple[Tensor, Tensor], options: LossOptions) -> Tensor:
    features, (left, right) = head[0], projections
    shape = features.shape[0], left.shape[1], right.shape[1]
    return features.new_empty(shape, dtype=accumulate_dtype(features.dtype))


def _cuda(head: Head, target: Tensor, projections: tuple[Tensor, Tensor], options: LossOptions) -> Tensor:
    fused = _backends.kernels(head[0])
    if fused is not None:
        return fused.sketch(*head, target, *projections, options)
    dtype = accumulate_dtype(head[0].dtype)
    features, weight, bias = (None if x is None else x.to(dtype) for x in head)
    left, right = (projection.to(dtype) for projection in projections)
    assert features is not None and weight is not None
    return reference.sketch(features, weight, bias, target, left, right, **options._asdict())


_sketch = define(
    "sketch(Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor left, Tensor right, "
    "Tensor? class_weight, SymInt ignore_index, float label_smoothing, float softcap) -> Tensor",
    check=_check,
    fake=_fake,
    cpu=_sketch_cpu.sketch,
    cuda=_cuda,
    pack=_pack,
    autocast=autocast_head,
)
