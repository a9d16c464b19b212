"""The passes over logits that the native core runs: one folds them into statistics, one turns them into residuals.

The logits of a head come a tile of rows x classes at a time: the BLAS writes the tile, the native kernel reads it, and
the tile's memory is used again. Nothing of size n x C exists.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from selbp import _native
from selbp._checks import accumulate_dtype
from selbp.ops import _gemm, _skipped_tiles
from selbp.ops._backends import native_threads
from selbp.ops._loss_options import LossOptions, raise_bad_target

TYPE_CODE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}  # csrc/statistics/cpu.hpp

_TILE_BYTES = 4 << 20  # of logits: large enough for the GEMM's full rate, small enough to stay in the last-level cache
_TILE_ROWS = 1024

_SMALL_HEAD = 1 << 19  # multiply-adds up to which a float32 head's own kernel beats a BLAS call
_PACKED_ROWS = 16  # rows that repay packing the weights for it

Statistics = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the fields of BatchStatistics, in order


def address(tensor: Tensor | None) -> int:
    """Where the data begin; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def contiguous_rows(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or a copy where its last dimension is not contiguous."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1 else tensor.contiguous()


def native_options(options: LossOptions, dtype: torch.dtype) -> LossOptions:
    """The options with class weights in the dtype that the kernels compute in, contiguous."""
    class_weight = options.class_weight
    if class_weight is None:
        return options
    return options._replace(class_weight=class_weight.to(dtype).contiguous())


def weight_sum(options: LossOptions, n_classes: int) -> float:
    """Sum of the class weights, which only label smoothing reads; ``n_classes`` where there are none."""
    if options.class_weight is None or not options.label_smoothing:
        return float(n_classes)
    return float(options.class_weight.sum(dtype=torch.float64))


def empty_statistics(like: Tensor, n: int, dtype: torch.dtype) -> Statistics:
    """The fields of BatchStatistics of n rows on the device of ``like``, not filled."""
    # One kind of operator: after a forward, the first call of each kind costs as much as many of the next ones.
    loss, lse, residual_sq, feature_sq = (like.new_empty(n, dtype=dtype) for _ in range(4))
    return loss, lse, residual_sq, feature_sq, like.new_empty(n, dtype=torch.bool), like.new_empty(n, dtype=torch.bool)


class LogitPass:
    """One pass over the classes: the outputs, the state carried between tiles, and the native calls that fill them."""

    def __init__(
        self,
        n_classes: int,
        dtype: torch.dtype,  # of the logits
        target: Tensor,  # (n,)
        features: Tensor | None,  # (n, d)
        bias: bool,
        options: LossOptions,
    ):
        n, accumulate = target.shape[0], accumulate_dtype(dtype)
        self.n_classes, self.code = n_classes, TYPE_CODE[dtype]
        self.target, self.options = target.contiguous(), native_options(options, accumulate)
        self.features, self.bias = features if features is None else contiguous_rows(features), bias
        self.outputs = empty_statistics(target, n, accumulate)
        self.state: Tensor | None = None
        self.p_rest: Tensor | None = None  # (n,) 1 - p_y, where wanted
        self.logits: Tensor | None = None  # (n, C), where wanted
        self.sums: Tensor | None = None  # (tiles, n, 2) of _skipped_tiles.py, where wanted
        self._dtype = dtype

    def carry(self) -> None:
        """Keep each row's state between tiles."""
        self.state = torch.empty(self.target.shape[0], _native.STATISTICS_STATE, dtype=torch.float64, device="cpu")

    def keep_logits(self, n_classes: int) -> Tensor:
        """Memory that :meth:`add_head` is to leave the logits in."""
        self.logits = torch.empty(self.target.shape[0], n_classes, dtype=self._dtype, device="cpu")
        return self.logits

    def keep_sums(self, tiles: int) -> Tensor:
        """Memory that :meth:`add_head` is to leave each row's maximum and sum in, as they are after each tile."""
        self.sums = torch.empty(tiles, self.target.shape[0], 2, dtype=torch.float64, device="cpu")
        return self.sums

    def add_head(self, features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        """Run the whole pass over the logits of a head, a tile at a time."""
        (n, d), n_classes = features.shape, weight.shape[0]
        small = n * d * n_classes <= _SMALL_HEAD and n >= _PACKED_ROWS and features.dtype == torch.float32
        small = small and self.logits is None and self.sums is None
        if small and not self.options.label_smoothing and not self.options.softcap:
            self._add_small_head(weight, bias)
            return
        rows, columns = tile_shape(n, n_classes, features.dtype)
        if n <= rows and n_classes <= columns and self.sums is None:
            logits = _gemm.linear(features, weight, bias)
            if self.logits is not None:
                self.logits.copy_(logits)
            self.add(logits)
            return
        self.carry()
        step = n_classes if self.sums is None else _skipped_tiles.COLUMNS
        for part, first_class, logits in head_tiles(features, weight, bias, 64 if self.sums is None else step):
            if self.logits is not None:
                self.logits[part, first_class : first_class + logits.shape[1]] = logits
            for c in range(0, logits.shape[1], step):
                self.add(logits[:, c : c + step], part.start, first_class + c)
                if self.sums is not None and self.state is not None:
                    self.sums[(first_class + c) // step, part] = self.state[part, :2]  # RowState's m and s

    def add(self, logits: Tensor, row: int = 0, first_class: int = 0) -> None:
        """Fold in the logits of rows [row, row + len) and classes [first_class, ...); the last tile finishes."""
        rows, columns = logits.shape
        if not rows:
            return
        f = self.features  # of width 0 it has no address, which would say that there is none: any address serves
        class_weight, ignore_index, label_smoothing, softcap = self.options
        loss, lse, residual_sq, feature_sq, correct, valid = self.outputs
        item = loss.element_size() * row
        bad = _native.statistics(
            logits.data_ptr(),
            self.code,
            logits.stride(0),
            rows,
            columns,
            first_class,
            self.n_classes,
            0 if f is None else (f.data_ptr() or self.target.data_ptr()) + row * f.stride(0) * f.element_size(),
            0 if f is None else TYPE_CODE[f.dtype],
            0 if f is None else f.stride(0),
            0 if f is None else f.shape[1],
            self.bias,
            self.target.data_ptr() + 8 * row,
            address(class_weight),
            ignore_index,
            label_smoothing,
            softcap,
            0 if self.state is None else self.state.data_ptr() + 8 * _native.STATISTICS_STATE * row,
            loss.data_ptr() + item,
            lse.data_ptr() + item,
            residual_sq.data_ptr() + item,
            feature_sq.data_ptr() + item,
            0 if self.p_rest is None else self.p_rest.data_ptr() + item,
            correct.data_ptr() + row,
            valid.data_ptr() + row,
            native_threads(rows * columns),
        )
        if bad >= 0:
            raise_bad_target(self.target, row + bad, self.n_classes, ignore_index)

    def _add_small_head(self, weight: Tensor, bias: Tensor | None) -> None:
        """The whole pass over a small float32 head in one native call, logits and all."""
        f, y = self.features, self.target
        assert f is not None
        weight, bias = contiguous_rows(weight), None if bias is None else bias.contiguous()
        class_weight, ignore_index, _, _ = self.options
        loss, lse, residual_sq, feature_sq, correct, valid = self.outputs
        bad = _native.head_statistics(
            f.data_ptr(),
            f.stride(0),
            f.shape[0],
            f.shape[1],
            weight.data_ptr(),
            weight.stride(0),
            self.n_classes,
            address(bias),
            y.data_ptr(),
            address(class_weight),
            ignore_index,
            loss.data_ptr(),
            lse.data_ptr(),
            residual_sq.data_ptr(),
            feature_sq.data_ptr(),
            address(self.p_rest),
            correct.data_ptr(),
            valid.data_ptr(),
        )
        if bad >= 0:
            raise_bad_target(y, bad, self.n_classes, ignore_index)


def tile_shape(n: int, n_classes: int, dtype: torch.dtype, multiple: int = 64) -> tuple[int, int]:
    """Rows and classes of a logits tile that holds about ``_TILE_BYTES``."""
    rows = max(1, min(n, _TILE_ROWS))
    columns = _TILE_BYTES // max(4, dtype.itemsize) // rows
    return rows, min(n_classes, max(multiple, columns - columns % multiple))


def head_tiles(
    features: Tensor, weight: Tensor, bias: Tensor | None, multiple: int = 64
) -> Iterator[tuple[slice, int, Tensor]]:
    """The logits of a head tile by tile: (rows, first class, logits), each row's classes in order.

    All tiles but the last have a ``multiple`` of classes.
    """
    rows, columns = tile_shape(len(features), len(weight), features.dtype, multiple)
    for c in range(0, len(weight), columns):
        part, part_bias = weight[c : c + columns], None if bias is None else bias[c : c + columns]
        for row in range(0, len(features), rows):
            z = contiguous_rows(_gemm.linear(features[row : row + rows], part, part_bias))
            yield slice(row, row + len(z)), c, z


class ResidualRows(NamedTuple):
    """What the residuals of a tile read of each of its rows; contiguous, in the dtype that the kernel computes in."""

    target: Tensor  # (rows,) int64
    lse: Tensor  # (rows,)
    p_rest: Tensor | None = None  # (rows,) 1 - p_y; None where the tile holds all classes
    scale: Tensor | None = None  # (rows,) factor of each row; None for 1


class ResidualClasses(NamedTuple):
    """Which classes a tile holds, of how many, and what their weights add up to."""

    first: int
    total: int
    weight_sum: float


def in_place(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for the residuals of ``logits``: its own where it has their ``dtype``."""
    return logits if logits.dtype == dtype else torch.empty(logits.shape, dtype=dtype, device="cpu")


def residual_tile(
    out: Tensor,  # (rows, columns), contiguous; may be ``logits``
    logits: Tensor,  # (rows, columns), contiguous rows
    rows: ResidualRows,
    classes: ResidualClasses,
    options: LossOptions,  # of :func:`native_options`
) -> Tensor:
    """Write the gradients of the rows' losses with respect to a tile of their logits into ``out``, and return it."""
    class_weight, ignore_index, label_smoothing, softcap = options
    first, total, weights = classes
    n_rows, columns = logits.shape
    bad = _native.residual(
        out.data_ptr(),
        logits.data_ptr(),
        TYPE_CODE[logits.dtype],
        logits.stride(0),
        n_rows,
        columns,
        first,
        total,
        weights,
        rows.lse.data_ptr(),
        address(rows.p_rest),
        address(rows.scale),
        rows.target.data_ptr(),
        address(class_weight),
        ignore_index,
        label_smoothing,
        softcap,
        native_threads(logits.numel()),
    )
    if bad >= 0:
        raise_bad_target(rows.target, bad, total, ignore_index)
    return out
