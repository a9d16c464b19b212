"""The CPU's side of ``sketch``: the residuals of a tile of classes at a time, multiplied by P at once."""

from __future__ import annotations

import torch
from torch import Tensor

from selbp._checks import accumulate_dtype
from selbp.ops import _gemm
from selbp.ops._logit_pass import (
    LogitPass,
    ResidualClasses,
    ResidualRows,
    head_tiles,
    in_place,
    residual_tile,
    weight_sum,
)
from selbp.ops._loss_options import LossOptions

Head = tuple[Tensor, Tensor, Tensor | None]  # features (n, T, d), weight (C, d), bias (C,)


def sketch(head: Head, target: Tensor, projections: tuple[Tensor, Tensor], options: LossOptions) -> Tensor:
    features, weight, bias = head
    n, length, d = features.shape
    tokens, accumulate = n * length, accumulate_dtype(features.dtype)
    h, y = features.reshape(tokens, d), target.reshape(tokens).contiguous()
    left, right = (projection.to(accumulate) for projection in projections)
    logit_pass = LogitPass(weight.shape[0], features.dtype, y, h, bias is not None, options)
    logit_pass.p_rest = torch.empty(tokens, dtype=accumulate, device="cpu")
    project = _project_twice if options.label_smoothing else _project_once
    projected = project(logit_pass, (h, weight, bias), left, options)
    valid = logit_pass.outputs[5]
    wide = torch.where(valid[:, None], h, 0.0).to(accumulate)
    mapped = _gemm.linear(wide, right[:d].t(), right[d] if bias is not None else None)
    live = torch.where(valid[:, None], projected, 0.0).view(n, length, left.shape[1])
    return torch.bmm(live.transpose(1, 2), mapped.view(n, length, right.shape[1]))


def _project_once(logit_pass: LogitPass, head: Head, left: Tensor, options: LossOptions) -> Tensor:
    """P^T r of every row in the pass that finds its statistics: attention's running sums, without the target.

    With O = sum_{c != y} e^(z_c - m) D_c P_c it is w_y ((p_rest / s) O - p_rest D_y P_y), in the terms of
    csrc/statistics/cpu.hpp.
    """
    n, accumulate, n_classes = len(head[0]), left.dtype, logit_pass.n_classes
    sums = torch.zeros(n, left.shape[1], dtype=accumulate, device="cpu")
    logit_pass.carry()
    state, p_rest = logit_pass.state, logit_pass.p_rest
    assert state is not None and p_rest is not None
    greatest = state[:, 0]
    nothing = torch.zeros(n, dtype=accumulate, device="cpu")  # the target's entry: it comes last
    unweighted = logit_pass.options._replace(class_weight=None)
    for part, c, z in head_tiles(*head):
        before = greatest[part].clone() if c else None
        logit_pass.add(z, part.start, c)
        m = greatest[part]
        if before is not None:
            sums[part] *= torch.where(before == m, 1.0, (before - m).exp()).to(accumulate)[:, None]
        rows = ResidualRows(logit_pass.target[part], m.to(accumulate).contiguous(), nothing[part])
        classes = ResidualClasses(c, n_classes, float(n_classes))
        e = residual_tile(in_place(z, accumulate), z, rows, classes, unweighted)
        sums[part] += _gemm.linear(e, left[c : c + z.shape[1]].t())
    y = torch.where(logit_pass.target == options.ignore_index, 0, logit_pass.target)
    mass = p_rest if options.class_weight is None else p_rest * options.class_weight[y].to(accumulate)
    s, slope = state[:, 1], state[:, 8]
    own = left.index_select(0, y).mul_((mass * slope).to(accumulate)[:, None])
    return sums.mul_(torch.where(s > 0, mass / s, 0.0).to(accumulate)[:, None]).sub_(own)


def _project_twice(logit_pass: LogitPass, head: Head, left: Tensor, options: LossOptions) -> Tensor:
    """The same with label smoothing, whose residuals are small differences: formed from the finished statistics."""
    logit_pass.add_head(*head)
    lse, p_rest = logit_pass.outputs[1], logit_pass.p_rest
    assert p_rest is not None
    sums = torch.zeros(len(head[0]), left.shape[1], dtype=left.dtype, device="cpu")
    total = weight_sum(options, logit_pass.n_classes)
    for part, c, z in head_tiles(*head):
        rows = ResidualRows(logit_pass.target[part], lse[part], p_rest[part])
        classes = ResidualClasses(c, logit_pass.n_classes, total)
        r = residual_tile(in_place(z, left.dtype), z, rows, classes, logit_pass.options)
        sums[part] += _gemm.linear(r, left[c : c + z.shape[1]].t())
    return sums
