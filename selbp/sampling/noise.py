"""Losses for labels of which a share is wrong, and the share's estimate by expectation-maximisation.

The given label is modelled as a draw from a mixture. With probability 1 - eps it is the true label, which has the
probability p under the model; else it is any of the C classes. Its likelihood is (1 - eps) p + eps / C. More generally,
with T[y', y] = P(given y | true y'), it is sum_y' T[y', y] p_y' (the forward correction of Patrini et al. 2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from selbp._checks import check_int, check_number, shown
from selbp.common.outputs import check_classes_of, logits_in
from selbp.sampling.record import lower_bound

ROUNDS = 200  # of expectation-maximisation
SETTLED = 1e-5  # a change of eps or of an entry of T that ends it
PRIOR = 1.0  # pseudo-counts on the diagonal of T
SUREST = 0.1  # share of the samples taken for a class that counts as its surest
LEAST = 50  # fewer surest samples than this tell nothing
CLEAR = 0.1  # share labelled as one other class that counts; clean data stays below it
REST = 0.05  # most that may be labelled as anything else: a weak network's surest have labels of many classes


@runtime_checkable
class KnowsNoise(Protocol):
    """What a :class:`~selbp.sampling.ScoreTable` tells a loss."""

    @property
    def epsilon(self) -> Tensor:
        """() float64."""
        ...

    @property
    def transition(self) -> Tensor | None:
        """(C, C) float64; None where labels are wrong in no particular direction, so that epsilon is enough."""
        ...


def noise_aware(loss: Tensor, epsilon: Tensor | float, classes: int) -> Tensor:
    """Cross-entropies (n,) turned into ``-log((1 - eps) exp(-loss) + eps / classes)``; differentiable.

    The gradient is that of ``loss`` times ``r = (1 - eps) p / ((1 - eps) p + eps / C)``, the probability that the label
    is right. Only the losses are read, so this goes with heads that never store their logits::

        losses = selbp.sampling.noise_aware(selbp.ops.linear_cross_entropy(h, w, b, y), 0.2, len(w))

    Parameters
    ----------
    loss : Tensor
        Each sample's cross-entropy -log p: (n,) or any other shape, floating.
    epsilon : Tensor or float
        A number in [0, 1) or a tensor () on the CPU or on the loss's device, whose value is not read back.
    classes : int
        C, at least 2.

    Returns
    -------
    Tensor
        The shape and dtype of ``loss``. A NaN stays with its sample.

    Raises
    ------
    TypeError
        ``loss`` is no floating tensor, or ``epsilon`` or ``classes`` no number.
    ValueError
        A number out of range, or an ``epsilon`` of another shape than ().

    See Also
    --------
    selbp.NoiseAwareCrossEntropy : the same as a ``loss=`` of a step.

    Examples
    --------
    >>> noise_aware(torch.tensor([0.0, 100.0]), 0.2, 10)
    tensor([0.1985, 3.9120])
    """
    if not isinstance(loss, Tensor) or not loss.is_floating_point():
        raise TypeError(f"loss must be a floating tensor of cross-entropies, got {shown(loss)}")
    classes = check_int("classes", classes, 2)
    if isinstance(epsilon, Tensor):
        if epsilon.shape != ():
            raise ValueError(f"epsilon must be a number or a tensor (), got {shown(epsilon)}")
        epsilon = epsilon.double()
    else:
        epsilon = _check_epsilon(epsilon)
        return _of_number(loss, epsilon, classes) if epsilon > 0.0 else loss * 1.0
    right, other = torch.log1p(-epsilon).to(loss.dtype), torch.log(epsilon / classes).to(loss.dtype)
    return -torch.logaddexp(right - loss, other)


def _of_number(loss: Tensor, epsilon: float, classes: int) -> Tensor:
    """:func:`noise_aware` in three operators: with b = log(eps / C), ``-b - softplus(log(1 - eps) - b - loss)``."""
    other = math.log(epsilon / classes)
    # Beyond 50 the softplus is its argument in either precision, and no exponential overflows.
    return -other - F.softplus(math.log1p(-epsilon) - other - loss, threshold=50.0)


def _check_epsilon(epsilon: object) -> float:
    value = check_number("epsilon", epsilon, 0.0, 1.0)
    if value == 1.0:
        raise ValueError("epsilon must be below 1: else no label says anything, got 1")
    return value


def estimate_epsilon(probability: Tensor, classes: int, start: Tensor | float = 0.1) -> Tensor:
    """() float64 eps of greatest likelihood for the given labels' probabilities (n,), by expectation-maximisation."""
    p = probability.double()
    epsilon = torch.as_tensor(start, dtype=torch.float64, device=p.device).clamp(0.01, 0.9)
    for _ in range(ROUNDS):
        other = epsilon / classes
        found = (other / ((1.0 - epsilon) * p + other)).mean()
        moved, epsilon = (found - epsilon).abs(), found
        if p.device.type == "cpu" and float(moved) < SETTLED:
            break
    return epsilon.clamp(0.0, 0.99)


def estimate_transition(probability: Tensor, given: Tensor) -> tuple[Tensor, Tensor]:
    """T (C, C) float64 of greatest likelihood, and the mean posterior of each true label and given label (C, C).

    ``probability`` (n, C), the model's; ``given`` (n,) int64. Each round gives every sample its posterior of the true
    label, ``T[y', y] p_y'`` normalised, and T becomes the share of each given label among each true one's.
    """
    p = probability.double()
    classes = p.shape[1]
    transition = torch.full((classes, classes), 0.2 / classes, dtype=torch.float64, device=p.device)
    transition += 0.8 * torch.eye(classes, dtype=torch.float64, device=p.device)
    for _ in range(ROUNDS):
        joint = p * transition.T[given]
        joint = joint / joint.sum(1, keepdim=True).clamp(min=1e-300)
        counts = torch.zeros_like(transition).index_add_(0, given, joint).T  # a row for each true label
        found = normalised(counts)
        moved, transition = (found - transition).abs().max(), found
        if p.device.type == "cpu" and float(moved) < SETTLED:
            break
    return transition, counts / max(len(p), 1)


def anchored_transition(logits: Tensor, given: Tensor) -> Tensor | None:
    """T (C, C) float64 as the surest samples of each class are labelled; None where all have their class's label.

    A network that fits the given labels gives the wrong ones their share too, and expectation-maximisation on its
    probabilities finds nothing. But the samples that look most like a class are of that class, and their given labels
    are a row of T (the anchor points of Patrini et al. 2017). Entries off the diagonal count where their lower 99 %
    bound is above :data:`CLEAR`, where the class keeps most of its labels, and where the labels of no third class are
    among them. A network that knows little has labels of many classes there; noise in one direction has one. With two
    classes the cases cannot be told apart. ``logits`` (n, C); ``given`` (n,) int64.
    """
    n, classes = logits.shape
    if classes == 2:
        return None
    sure, taken = torch.softmax(logits, 1).max(1)
    order = sure.argsort(descending=True, stable=True)
    order = order[taken[order].argsort(stable=True)]  # class by class, the surest first
    sizes = torch.bincount(taken, minlength=classes)
    if SUREST * int(sizes.max()) < LEAST:
        return None
    place = torch.arange(n, device=order.device) - (sizes.cumsum(0) - sizes)[taken[order]]
    anchors = order[place < SUREST * sizes[taken[order]]]
    rows = taken[anchors] * classes + given[anchors]
    counts = torch.bincount(rows, minlength=classes * classes).view(classes, classes).double().cpu()
    known = counts.sum(1, keepdim=True)
    shares = counts / known.clamp(min=1.0)
    turned = torch.zeros_like(shares)
    for true, other in ((shares > CLEAR) & (known >= LEAST)).nonzero().tolist():
        if true != other and lower_bound(float(shares[true, other]), float(known[true])) > CLEAR:
            turned[true, other] = shares[true, other]
    kept, given_away = shares.diag(), turned.sum(1)
    clear = (given_away > 0.0) & (kept > 0.5) & (kept + given_away >= 1.0 - REST)
    if not bool(clear.any()):
        return None
    turned = torch.where(clear[:, None], turned, 0.0)
    return (torch.diag(1.0 - turned.sum(1)) + turned).to(logits.device)


def undone(logits: Tensor, transition: Tensor) -> Tensor:
    """(n, C) logits of the true label, from those of the given one: their probabilities times T's inverse."""
    true = torch.softmax(logits.double(), 1) @ torch.linalg.inv(transition)
    return true.clamp(min=1e-6).log().to(logits.dtype)


def normalised(counts: Tensor, prior: float = PRIOR) -> Tensor:
    """The counts (C, C) with ``prior`` more on the diagonal, each row scaled to sum to 1."""
    counts = counts + prior * torch.eye(len(counts), dtype=counts.dtype, device=counts.device)
    return counts / counts.sum(1, keepdim=True)


class NoiseAwareCrossEntropy:
    """Cross-entropy for labels of which a share is wrong: ``-log((1 - eps) p + eps / C)`` for each sample.

    Pass it as ``loss=`` of :class:`selbp.SelectiveBackprop`. The gradient is cross-entropy's times the responsibility
    r, so that a sample whose label the model holds for wrong pulls little; at eps = 0 it is cross-entropy. It is that
    too while a table has not shown that more than a few labels are wrong: see ``ScoreTable.shown_epsilon``.

    Parameters
    ----------
    noise : ScoreTable, float or Tensor
        A :class:`selbp.sampling.ScoreTable`, whose estimate is read at each call; a number eps in [0, 1); or a tensor:
        () eps, or (C, C) the transition ``T[y', y] = P(given y | true y')``, for ``-log sum_y' T[y', y] p_y'``.

    Raises
    ------
    TypeError, ValueError
        At construction for anything else; at the call for logits that are not (n, C), C > 1, floating or a target that
        is not (n,) int64.

    See Also
    --------
    selbp.sampling.noise_aware : the same for losses that are there.

    Examples
    --------
    >>> loss = NoiseAwareCrossEntropy(0.2)
    >>> loss(torch.tensor([[8.0, 0.0]]), torch.tensor([1]))
    tensor([2.2999])
    """

    def __init__(self, noise: KnowsNoise | Tensor | float) -> None:
        self._read: Callable[[], tuple[Tensor | float, Tensor | None]]
        self.reads_table = not isinstance(noise, Tensor) and isinstance(noise, KnowsNoise)  # at each call
        if isinstance(noise, Tensor):
            if not noise.is_floating_point() or noise.dim() not in (0, 2) or (noise.dim() and noise.shape[0] < 2):
                raise ValueError(f"noise must be eps () or a transition (C, C), floating, got {shown(noise)}")
            if noise.dim() == 2:
                _check_transition(noise)
            else:
                _check_epsilon(float(noise))
            fixed = (noise, None) if noise.dim() == 0 else (0.0, noise)
            self._read = lambda: fixed
        elif isinstance(noise, KnowsNoise):
            table = noise
            self._read = lambda: _shown(table)
        else:
            epsilon = _check_epsilon(noise)
            self._read = lambda: (epsilon, None)
        self.__name__ = type(self).__name__

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        """(n,) losses of logits ``output`` (n, C), or something that has them, and classes ``target`` (n,) int64."""
        logits = logits_in(output)
        if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() != 2:
            raise ValueError(f"logits must be (n, C), floating, got {shown(logits)}")
        if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != logits.shape[:1]:
            raise ValueError(f"target must be (n,) = ({len(logits)},) int64 classes, got {shown(target)}")
        check_classes_of(logits)
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        epsilon, transition = self._read()
        classes = logits.shape[1]
        if transition is None:
            losses = F.cross_entropy(logits, target, reduction="none")
            return losses if isinstance(epsilon, float) and epsilon == 0.0 else noise_aware(losses, epsilon, classes)
        if len(transition) != classes:
            raise ValueError(f"the transition is of {len(transition)} classes, the logits of {classes}")
        log_given = transition.to(logits).log().T.index_select(0, target)
        return -torch.logsumexp(log_given + F.log_softmax(logits, 1), 1)


def _shown(noise: KnowsNoise) -> tuple[Tensor | float, Tensor | None]:
    """Eps and transition that a loss reckons with: a table's once they are shown, anything else's as they are."""
    epsilon = getattr(noise, "shown_epsilon", None)
    if epsilon is None:
        return noise.epsilon, noise.transition
    return epsilon, None if isinstance(epsilon, float) and epsilon == 0.0 else noise.transition


def _check_transition(transition: Tensor) -> None:
    if transition.shape[0] != transition.shape[1]:
        raise ValueError(f"a transition must be (C, C), got {tuple(transition.shape)}")
    rows = transition.double().sum(1)
    if not bool((torch.isfinite(transition) & (transition >= 0)).all()) or float((rows - 1.0).abs().max()) > 1e-4:
        raise ValueError("a transition's entries must be at least 0, and each row must sum to 1")
