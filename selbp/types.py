"""What the operators return: plain tuples of tensors with names, shapes and units."""

from __future__ import annotations

import enum
from typing import NamedTuple

import torch
from torch import Tensor


class BatchStatistics(NamedTuple):
    """Per-sample statistics of a minibatch of n samples: the by-product of its forward pass.

    The floating fields are float64 for float64 inputs, else float32. A row that is not ``valid`` may never be
    selected. The training step hands selectors the loss unscaled, comparable between minibatches, and ``residual_sq``
    times s^2, where s makes the mean of s times the loss torch's ``reduction="mean"`` under class weights and ignored
    rows.

    Attributes
    ----------
    loss : Tensor
        (n,) cross-entropy of each row, as ``reduction="none"`` defines it; 0 where the target is ignored.
    lse : Tensor
        (n,) log-sum-exp of the row's logits.
    residual_sq : Tensor
        (n,) squared norm of the gradient of the row's loss with respect to its logits.
    feature_sq : Tensor
        (n,) squared norm of the head's input, + 1 for the bias; 1 where features were not given.
    correct : Tensor
        (n,) bool: no other class has a greater logit than the target.
    valid : Tensor
        (n,) bool: the target is not ignored and everything above is finite.

    See Also
    --------
    selbp.ops.cross_entropy_statistics : the statistics of logits.
    selbp.ops.linear_cross_entropy_statistics : those of a head's input and weight.

    Examples
    --------
    >>> import torch, selbp
    >>> stats = selbp.BatchStatistics.unscored(torch.ones(3, dtype=torch.bool))
    >>> stats.loss
    tensor([nan, nan, nan])
    """

    loss: Tensor  # (n,) cross-entropy of each row, as reduction="none" defines it; 0 where the target is ignored
    lse: Tensor  # (n,) log-sum-exp of the row's logits
    residual_sq: Tensor  # (n,) squared norm of the gradient of the row's loss with respect to its logits
    feature_sq: Tensor  # (n,) squared norm of the head's input, + 1 for the bias; 1 where features were not given
    correct: Tensor  # (n,) bool: no other class has a greater logit than the target
    valid: Tensor  # (n,) bool: the target is not ignored and everything above is finite

    @property
    def gradient_norm(self) -> Tensor:
        """(n,) norm of each sample's last-layer gradient, ``sqrt(residual_sq * feature_sq)``."""
        return gradient_norm(self)

    @classmethod
    def unscored(cls, valid: Tensor, dtype: torch.dtype = torch.float32) -> BatchStatistics:
        """Statistics of a batch that no forward has seen: everything but ``valid`` is NaN (or False).

        ``dtype`` is float64 where the losses will be: weights have the losses' dtype.
        """
        unknown = torch.full(valid.shape, torch.nan, dtype=dtype, device=valid.device)
        return cls(unknown, unknown, unknown, unknown, torch.zeros_like(valid), valid)


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """What weights and sums are kept in for losses or gradients of ``dtype``: float64 where that is as wide."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def widest(device: torch.device) -> torch.dtype:
    """The type of sums that no rounding may touch: float64, float32 on a device that has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def gradient_norm(stats: BatchStatistics) -> Tensor:
    """:attr:`BatchStatistics.gradient_norm` for compiled code: torch before 2.11 traces no NamedTuple's property."""
    return (stats.residual_sq * stats.feature_sq).sqrt()


class MeanGradient(NamedTuple):
    """The minibatch's mean last-layer gradient M and each sample's inner product with it.

    Attributes
    ----------
    inner : Tensor
        (n,) g_i . M.
    target_sq : Tensor
        () squared norm of M, accumulated in float64.
    head_weight : Tensor
        (C, d) the exact mean gradient of the head's weight.
    head_bias : Tensor or None
        (C,) and of its bias, where it has one.

    See Also
    --------
    selbp.ops.mean_gradient : returns one.

    Examples
    --------
    >>> import torch, selbp
    >>> selbp.ops.mean_gradient(torch.ones(4, 2), torch.ones(4, 3)).head_bias
    tensor([1., 1.])
    """

    inner: Tensor  # (n,) g_i . M
    target_sq: Tensor  # () squared norm of M, accumulated in float64
    head_weight: Tensor  # (C, d) the exact mean gradient of the head's weight
    head_bias: Tensor | None  # (C,) and of its bias, where it has one


class MatchStatus(enum.IntEnum):
    """Why the matching solver stopped.

    ``FULL``: k rows were chosen. ``OPTIMAL``: no further row can lower the objective (the KKT conditions hold).
    ``TOLERANCE``: the relative residual fell below the tolerance. ``INVALID``: an input of this problem was not finite,
    nothing was chosen. ``ITERATIONS``: the iteration limit was reached; the selection is feasible, not optimal.

    See Also
    --------
    selbp.ops.Matching : has one for each problem.

    Examples
    --------
    >>> import torch, selbp
    >>> found = selbp.ops.match(torch.eye(3), torch.tensor([1.0, 0.0, 0.0]), torch.tensor(1.0), k=2)
    >>> selbp.ops.MatchStatus(int(found.status)).name  # only one row correlates with the target
    'OPTIMAL'
    """

    FULL = 0  # k rows were chosen
    OPTIMAL = 1  # no further row can lower the objective (the KKT conditions hold)
    TOLERANCE = 2  # the relative residual fell below the tolerance
    INVALID = 3  # an input of this problem was not finite: nothing was chosen
    ITERATIONS = 4  # the iteration limit was reached; the selection is feasible, not optimal


class Matching(NamedTuple):
    """What :func:`selbp.ops.match` chose, for any leading batch dimensions ``...``.

    Attributes
    ----------
    indices : Tensor
        (..., k) int64 in order of choice, unique, padded with -1.
    weights : Tensor
        (..., k) padded with 0; nonnegative unless asked otherwise.
    count : Tensor
        (...) int32, how many entries are real.
    residual : Tensor
        (...) ``||mean - sum w g|| / ||mean||``, from the float64 quadratic form of the inputs.
    status : Tensor
        (...) uint8, a :class:`selbp.ops.MatchStatus`.

    See Also
    --------
    selbp.ops.match : returns one.
    selbp.ops.matching_residual : certifies its residual in float64.

    Examples
    --------
    >>> import torch, selbp
    >>> found = selbp.ops.match(torch.eye(3), torch.tensor([1.0, 0.0, 0.0]), torch.tensor(1.0), k=2, ridge=0.0)
    >>> found.indices, found.weights, found.count
    (tensor([ 0, -1]), tensor([1., 0.]), tensor(1, dtype=torch.int32))
    """

    indices: Tensor  # (..., k) int64 in order of choice, unique, padded with -1
    weights: Tensor  # (..., k) padded with 0; nonnegative unless asked otherwise
    count: Tensor  # type: ignore[assignment]  # (...) int32, how many entries are real
    residual: Tensor  # (...) ||mean - sum w g|| / ||mean||, from the float64 quadratic form of the inputs
    status: Tensor  # (...) uint8, a MatchStatus


class Selection(NamedTuple):
    """The chosen rows of a minibatch; the step's loss is ``sum_j weights[j] * loss[indices[j]]``.

    Always exactly k rows and no -1: where fewer valid rows exist, spare slots repeat a valid row (else row 0) with
    weight 0, and a row of weight 0 is masked out of the loss, never multiplied.

    Attributes
    ----------
    indices : Tensor
        (k,) int64.
    weights : Tensor
        (k,) floating.

    See Also
    --------
    selbp.Selector : returns one.
    selbp.StepReport : keeps the one that a step trained on.

    Examples
    --------
    >>> import torch, selbp
    >>> chosen = selbp.Selection(torch.tensor([3, 0]), torch.tensor([0.5, 0.5]))
    >>> float((chosen.weights * torch.tensor([1.0, 2.0, 3.0, 5.0])[chosen.indices]).sum())
    3.0
    """

    indices: Tensor  # (k,) int64
    weights: Tensor  # (k,) floating
