"""``cross_entropy_statistics`` and its linear form: what the forward pass knows about each sample, nearly for free.

One pass over a row of logits gives its loss, log-sum-exp, the squared norm of the loss's gradient and whether the
target leads. The linear form never stores the logits: the BLAS writes a tile of rows x classes, a native kernel
(csrc/statistics) folds it into nine numbers a row, and the tile is reused.
"""

from __future__ import annotations

import torch
from torch import Tensor

from selbp import _native, reference
from selbp.ops import _gemm, _triton
from selbp.ops._checks import (
    accumulate_dtype,
    check_floating,
    check_optional_tensor,
    check_same_device,
    check_shape,
    check_tensor,
    flag,
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
    native_class_weight,
    raise_bad_target,
)
from selbp.ops._threads import native_threads
from selbp.types import BatchStatistics

_TILE_BYTES = 4 << 20  # of logits: large enough for the GEMM's full rate, small enough to stay in the last-level cache
_TILE_ROWS = 1024

_SMALL_HEAD = 1 << 19  # multiply-adds up to which a float32 head's own kernel beats a BLAS call
_PACKED_ROWS = 16  # rows that repay packing the weights for it

_Tensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def cross_entropy_statistics(
    logits: Tensor,  # (n, C)
    target: Tensor,  # (n,)
    features: Tensor | None = None,  # (n, d)
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    bias: bool = True,
) -> BatchStatistics:
    """Loss, gradient norms and correctness of each of n rows of logits.

    Parameters
    ----------
    logits : Tensor
        (n, C), float32, float64, bfloat16 or float16; copied once if its last dimension is not contiguous.
    target : Tensor
        (n,) int64 class indices, or ``ignore_index``.
    features : Tensor or None
        (n, d) input of the head that made the logits; without it ``feature_sq`` is 1.
    class_weight : Tensor or None
        (C,) weights of the classes, as torch's ``weight``.
    ignore_index : int
        Rows with this target have loss 0, norm 0, and are not valid.
    label_smoothing : float
        In [0, 1], as torch's.
    softcap : float
        Where positive, the loss is that of ``softcap * tanh(logits / softcap)``.
    bias : bool
        Whether the head has a bias, whose input 1 then counts in ``feature_sq``.

    Returns
    -------
    BatchStatistics
        float64 for float64 logits, else float32, accumulated in float32 or better. The target's logit is held apart, so
        confident rows keep their relative accuracy (1 - p_y down to 1e-9 and beyond, where torch's own float32 loss
        returns 0). Losses are those of torch's ``reduction="none"``. A row with a NaN, with an infinite logit or with
        an infinite loss is flagged by ``valid`` and spoils no other; -inf on a class that the loss does not weigh is a
        legal mask.

    Raises
    ------
    TypeError
        An argument has the wrong type or dtype.
    ValueError
        A shape, device or option is wrong, or (CPU) a target lies outside [0, C).

    Examples
    --------
    >>> import torch, selbp
    >>> logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
    >>> target = torch.tensor([0, 1])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, target)
    >>> stats.loss
    tensor([0.2395, 3.0949])
    >>> stats.correct
    tensor([ True, False])
    """
    check_tensor("logits", logits)
    check_tensor("target", target)
    check_optional_tensor("features", features)
    check_optional_tensor("class_weight", class_weight)
    options = loss_options(ignore_index, label_smoothing, softcap)
    return BatchStatistics(
        *_cross_entropy_statistics(logits, target, features, class_weight, *options, flag("bias", bias))
    )


def linear_cross_entropy_statistics(
    features: Tensor,  # (n, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n,)
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
) -> BatchStatistics:
    """:func:`cross_entropy_statistics` of ``features @ weight.T + bias``, which is never stored.

    Holds one tile of logits of a few MiB, whatever C. Under bfloat16 or float16 the tile has that dtype, as an eager
    linear layer's output would.

    Parameters
    ----------
    features : Tensor
        (n, d), float32, float64, bfloat16 or float16.
    weight : Tensor
        (C, d) of the dtype of ``features``.
    bias : Tensor or None
        (C,) of that dtype.
    target : Tensor
        (n,) int64 class indices, or ``ignore_index``.
    class_weight, ignore_index, label_smoothing, softcap
        As in :func:`cross_entropy_statistics`.

    Returns
    -------
    BatchStatistics
        ``feature_sq`` includes the bias's 1 where there is a bias.

    Raises
    ------
    TypeError
        An argument has the wrong type, or the dtypes differ.
    ValueError
        A shape, device or option is wrong, or (CPU) a target lies outside [0, C).

    Examples
    --------
    >>> import torch, selbp
    >>> features, weight, target = torch.ones(2, 4), torch.zeros(3, 4), torch.tensor([0, 1])
    >>> selbp.ops.linear_cross_entropy_statistics(features, weight, None, target).loss  # log 3
    tensor([1.0986, 1.0986])
    """
    check_tensor("features", features)
    check_tensor("weight", weight)
    check_optional_tensor("bias", bias)
    check_tensor("target", target)
    check_optional_tensor("class_weight", class_weight)
    options = loss_options(ignore_index, label_smoothing, softcap)
    return BatchStatistics(*_linear_cross_entropy_statistics(features, weight, bias, target, class_weight, *options))


def _check(
    logits: Tensor, target: Tensor, features: Tensor | None, class_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float, bias: bool,
) -> None:  # fmt: skip
    check_floating("logits", logits)
    check_shape("logits", logits, "(n, C)", (None, None))
    check_loss("logits", logits, logits.shape[1], target, class_weight, label_smoothing, softcap)
    if features is not None:
        check_floating("features", features)
        check_shape("features", features, f"(n, d) with n = {logits.shape[0]} as logits", (logits.shape[0], None))
        check_same_device("features", features, "logits", logits)


def _linear_check(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float,
) -> None:  # fmt: skip
    check_head(features, weight, bias)
    check_loss("features", features, weight.shape[0], target, class_weight, label_smoothing, softcap)


def _outputs(like: Tensor, n: int, dtype: torch.dtype) -> _Tensors:
    empty = torch.empty_like
    number, flag = like.new_empty(n, dtype=dtype), like.new_empty(n, dtype=torch.bool)
    return number, empty(number), empty(number), empty(number), flag, empty(flag)


class StatisticsPass:
    """One pass over the classes: the outputs, the carried state and the native calls that fill them."""

    def __init__(
        self,
        n_classes: int,
        dtype: torch.dtype,  # of the logits
        target: Tensor,
        features: Tensor | None,
        bias: bool,
        class_weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        softcap: float,
    ):
        n, accumulate = target.shape[0], accumulate_dtype(dtype)
        self.n_classes, self.code, self.ignore_index = n_classes, TYPE_CODE[dtype], ignore_index
        self.target, self.weight = target.contiguous(), native_class_weight(class_weight, accumulate)
        self.features, self.bias = features if features is None else contiguous_rows(features), bias
        self.label_smoothing, self.softcap = label_smoothing, softcap
        self.outputs = _outputs(target, n, accumulate)
        self.state: Tensor | None = None
        self.others: Tensor | None = None  # (n,) 1 - p_y, where wanted

    def carry(self) -> None:
        """Keep each row's state between tiles."""
        self.state = torch.empty(self.target.shape[0], _native.STATISTICS_STATE, dtype=torch.float64)

    def add_small_head(self, weight: Tensor, bias: Tensor | None) -> None:
        """The whole pass over a small float32 head in one native call, logits and all."""
        f, y = self.features, self.target
        assert f is not None
        weight, bias = contiguous_rows(weight), None if bias is None else bias.contiguous()
        loss, lse, residual_sq, feature_sq, correct, valid = self.outputs
        bad = _native.head_statistics(
            f.data_ptr(), f.stride(0), f.shape[0], f.shape[1], weight.data_ptr(), weight.stride(0), self.n_classes,
            address(bias), y.data_ptr(), address(self.weight), self.ignore_index, loss.data_ptr(), lse.data_ptr(),
            residual_sq.data_ptr(), feature_sq.data_ptr(), address(self.others), correct.data_ptr(), valid.data_ptr(),
        )  # fmt: skip
        if bad >= 0:
            raise_bad_target(y, bad, self.n_classes, self.ignore_index)

    def add(self, logits: Tensor, row: int = 0, first_class: int = 0) -> None:
        """Fold in the logits of rows [row, row + len) and classes [first_class, ...); the last tile finishes."""
        rows, columns = logits.shape
        if not rows:
            return
        f = self.features  # of width 0 it has no address, which would say that there is none: any address serves
        loss, lse, residual_sq, feature_sq, correct, valid = self.outputs
        item = loss.element_size() * row
        bad = _native.statistics(
            logits.data_ptr(), self.code, logits.stride(0), rows, columns, first_class, self.n_classes,
            0 if f is None else (f.data_ptr() or self.target.data_ptr()) + row * f.stride(0) * f.element_size(),
            0 if f is None else TYPE_CODE[f.dtype], 0 if f is None else f.stride(0), 0 if f is None else f.shape[1],
            self.bias, self.target.data_ptr() + 8 * row, address(self.weight), self.ignore_index,
            self.label_smoothing, self.softcap,
            0 if self.state is None else self.state.data_ptr() + 8 * _native.STATISTICS_STATE * row,
            loss.data_ptr() + item, lse.data_ptr() + item, residual_sq.data_ptr() + item, feature_sq.data_ptr() + item,
            0 if self.others is None else self.others.data_ptr() + item,
            correct.data_ptr() + row, valid.data_ptr() + row, native_threads(rows * columns),
        )  # fmt: skip
        if bad >= 0:
            raise_bad_target(self.target, row + bad, self.n_classes, self.ignore_index)


def tile_shape(n: int, n_classes: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows and classes of a logits tile that holds about ``_TILE_BYTES``."""
    rows = max(1, min(n, _TILE_ROWS))
    columns = _TILE_BYTES // max(4, dtype.itemsize) // rows
    return rows, min(n_classes, max(64, columns - columns % 64))


def _cpu(
    logits: Tensor, target: Tensor, features: Tensor | None, class_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float, bias: bool,
) -> _Tensors:  # fmt: skip
    one = StatisticsPass(
        logits.shape[1], logits.dtype, target, features, bias, class_weight, ignore_index, label_smoothing, softcap
    )
    one.add(contiguous_rows(logits))
    return one.outputs


def _linear_cpu(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float,
) -> _Tensors:  # fmt: skip
    one = StatisticsPass(
        weight.shape[0], features.dtype, target, features, bias is not None, class_weight, ignore_index,
        label_smoothing, softcap,
    )  # fmt: skip
    fold_head(one, features, weight, bias)
    return one.outputs


def fold_head(one: StatisticsPass, features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Run ``one`` over the logits of a head, a tile at a time."""
    (n, d), n_classes = features.shape, weight.shape[0]
    small = n * d * n_classes <= _SMALL_HEAD and n >= _PACKED_ROWS and features.dtype == torch.float32
    if small and not one.label_smoothing and not one.softcap:
        one.add_small_head(weight, bias)
        return
    rows, columns = tile_shape(n, n_classes, features.dtype)
    if n <= rows and n_classes <= columns:
        one.add(_gemm.linear(features, weight, bias))
        return
    one.carry()
    for c in range(0, n_classes, columns):
        part, part_bias = weight[c : c + columns], None if bias is None else bias[c : c + columns]
        for row in range(0, n, rows):
            one.add(_gemm.linear(features[row : row + rows], part, part_bias), row, c)


def _fake(
    logits: Tensor, target: Tensor, features: Tensor | None, class_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float, bias: bool,
) -> _Tensors:  # fmt: skip
    return _outputs(logits, logits.shape[0], accumulate_dtype(logits.dtype))


def _linear_fake(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float,
) -> _Tensors:  # fmt: skip
    return _outputs(features, features.shape[0], accumulate_dtype(features.dtype))


def _cuda(
    logits: Tensor, target: Tensor, features: Tensor | None, class_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float, bias: bool,
) -> _Tensors:  # fmt: skip
    fused = _triton.kernels("cross_entropy", logits, features)
    if fused is not None:
        return fused.cross_entropy_statistics(
            logits, target, features, class_weight, ignore_index, label_smoothing, softcap, bias
        )
    dtype = accumulate_dtype(logits.dtype)
    return reference.cross_entropy_statistics(
        logits.to(dtype), target, None if features is None else features.to(dtype), class_weight=class_weight,
        ignore_index=ignore_index, label_smoothing=label_smoothing, softcap=softcap, bias=bias,
    )  # fmt: skip


def _linear_cuda(
    features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weight: Tensor | None,
    ignore_index: int, label_smoothing: float, softcap: float,
) -> _Tensors:  # fmt: skip
    fused = _triton.kernels("cross_entropy", features)
    if fused is not None:
        return fused.linear_cross_entropy_statistics(
            features, weight, bias, target, class_weight, ignore_index, label_smoothing, softcap
        )
    logits = torch.nn.functional.linear(features, weight, bias)
    return _cuda(logits, target, features, class_weight, ignore_index, label_smoothing, softcap, bias is not None)


_OUTPUTS = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"  # the fields of BatchStatistics, in order

_cross_entropy_statistics = define(
    "cross_entropy_statistics(Tensor logits, Tensor target, Tensor? features, Tensor? class_weight, "
    f"SymInt ignore_index, float label_smoothing, float softcap, bool bias) -> {_OUTPUTS}",
    check=_check, fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
_linear_cross_entropy_statistics = define(
    "linear_cross_entropy_statistics(Tensor features, Tensor weight, Tensor? bias, Tensor target, "
    f"Tensor? class_weight, SymInt ignore_index, float label_smoothing, float softcap) -> {_OUTPUTS}",
    check=_linear_check, fake=_linear_fake, cpu=_linear_cpu, cuda=_linear_cuda, autocast=autocast_head,
)  # fmt: skip
