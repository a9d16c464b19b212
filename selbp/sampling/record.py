"""Writing what a step saw of its samples into a table: plain torch, which is the specification, and the native call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from selbp import _native
from selbp.sampling.draw import Columns

EPSILON, MASS, NORM, NORM_SQ = range(4)  # the entries of a table's averages
FEW = 0.05  # wrong labels up to this share are left to the plain loss: a model's own errors look like as many
QUANTILE = 2.326  # of the normal distribution, at 99 %
LEAST_EPSILON = 1e-3  # where it is not 0 outright: expectation-maximisation would stay at 0 for ever


@dataclass(frozen=True)
class Averages:
    """What is known from rows that were drawn uniformly, the last ``window`` of them counting most."""

    state: Tensor  # (4,) float64: eps, rows that entered (up to window), mean g, mean g^2
    transition: Tensor | None  # (C, C) float64
    counts: Tensor | None  # (C, C) float64: mean posterior of each true label, by given label
    window: int


@dataclass(frozen=True)
class Fresh:
    """Rows of a minibatch, as a forward saw them."""

    ids: Tensor  # (batch,) int64
    uniform: int  # so many of the minibatch's first places were drawn uniformly
    place: Tensor | None  # (rows,) int64, each row's place in the minibatch; None: as they come
    live: Tensor | None  # (rows,) bool; None: all
    target: Tensor  # (rows,) int64

    def samples(self) -> Tensor:
        """(rows,) their numbers."""
        return self.ids if self.place is None else self.ids[self.place]

    def drawn_uniformly(self) -> Tensor:
        """(rows,) bool."""
        place = torch.arange(len(self.target), device=self.ids.device) if self.place is None else self.place
        return place < self.uniform


def lower_bound(share: float, rows: float) -> float:
    """Of a share that was seen in ``rows`` rows, at 99 % (Wilson 1927); 0 without a row."""
    if rows <= 0.0:
        return 0.0
    share, spread = min(max(share, 0.0), 1.0), QUANTILE**2 / rows
    half = (spread * share * (1.0 - share) + spread**2 / 4.0) ** 0.5
    return max(0.0, (share + spread / 2.0 - half) / (1.0 + spread))


def responsibility(probability: Tensor, epsilon: Tensor, classes: int) -> Tensor:
    """R = (1 - eps) p / ((1 - eps) p + eps / C) of (n,) probabilities; 1 where both are 0."""
    right = (1.0 - epsilon) * probability
    total = right + epsilon / classes
    return torch.where(total > 0, right / total, torch.where(torch.isnan(total), torch.nan, 1.0))


def specified(table: Columns, averages: Averages, fresh: Fresh, logits: Tensor, time: int) -> int:
    """See :func:`record`: the same in plain torch. On a GPU nothing is read back, and no label is compared."""
    ids, target, classes = fresh.samples(), fresh.target, logits.shape[1]
    counted = (target >= 0) & (target < classes)
    counted = counted if fresh.live is None else counted & fresh.live
    if ids.device.type == "cpu":
        known = table.label[ids].long()
        differ = (counted & (known >= 0) & (known != target)).nonzero()
        if len(differ):
            return int(differ[0])
    y = target.clamp(0, classes - 1)[:, None]
    every = torch.softmax(logits.double(), 1)
    p = every.gather(1, y)[:, 0]
    if averages.transition is None:
        right = responsibility(p, averages.state[EPSILON], classes)
        posterior = None
    else:
        joint = every * averages.transition.T[y[:, 0]]
        total = joint.sum(1, keepdim=True)
        posterior = torch.where(total > 0, joint / total, 0.0)
        right = torch.where(total[:, 0] > 0, posterior.gather(1, y)[:, 0], 1.0)
    counted = counted & (p >= 0)
    rival = logits.scatter(1, y, -torch.inf).argmax(1)

    place = torch.where(counted, ids, len(table.seen) - 1)
    for column, value in zip(table, (p, right, target, rival, torch.full_like(target, time)), strict=True):
        column.scatter_(0, place, value.to(column.dtype))
    remember(averages, counted & fresh.drawn_uniformly(), right, right * (1.0 - p), posterior, target)
    return -1


def remember(
    averages: Averages, which: Tensor, right: Tensor, norm: Tensor, posterior: Tensor | None, target: Tensor | None
) -> None:
    """Let the rows ``which`` (n,) bool enter the averages: ``right`` (n,) responsibilities, ``norm`` (n,) g.

    ``posterior`` (n, C), of the true label, and ``target`` (n,) where there is a transition.
    """
    state, count = averages.state, which.sum().double()
    mass = (state[MASS] + count).clamp(max=float(averages.window))
    share = torch.where(count > 0, (count / mass.clamp(min=1.0)).clamp(max=1.0), 0.0)

    def mean(x: Tensor) -> Tensor:
        return torch.where(which, x.double(), 0.0).sum() / count.clamp(min=1)

    now = torch.stack([mean(1.0 - right), mass, mean(norm), mean(norm.double().square())])
    new = torch.lerp(state, now, share)
    pace = (count / averages.window).clamp(max=1.0)
    epsilon = torch.lerp(state[EPSILON], now[EPSILON], pace).clamp(min=LEAST_EPSILON)
    new[MASS], new[EPSILON] = mass, torch.where((state[EPSILON] > 0) & (count > 0), epsilon, state[EPSILON])
    state.copy_(new)
    if averages.counts is None or posterior is None or target is None:
        return
    keep = 1.0 - 1.0 / averages.window
    after = which.flip(0).cumsum(0).flip(0) - which.long()  # counted rows that enter later
    weight = torch.where(which, keep ** after.double(), 0.0) / averages.window
    entering = torch.where(which[:, None], posterior, 0.0) * weight[:, None]
    columns = torch.zeros_like(averages.counts).index_add_(0, target.clamp(min=0), entering).T
    averages.counts.mul_(keep**count).add_(columns)


def record(table: Columns, averages: Averages, fresh: Fresh, logits: Tensor, time: int) -> int:
    """Write the probability that ``logits`` (rows, C) float32 give each row's label, and what follows, to the table.

    Rows that are not live, whose target is no class or whose probability is not a number leave the table as it is.
    Those that were drawn uniformly enter the averages.

    Returns:
        -1, or the first row whose target is not the label that the table has of its sample: nothing is written then.
    """
    if logits.device.type != "cpu":
        return specified(table, averages, fresh, logits, time)
    logits = logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
    rows, classes = logits.shape
    # The kernel reads memory: a rule may return indices with strides.
    target, ids = fresh.target.contiguous(), fresh.ids.contiguous()
    place = None if fresh.place is None else fresh.place.contiguous()
    live = None if fresh.live is None else fresh.live.contiguous()
    transition, counts, scratch = averages.transition, averages.counts, None
    if transition is not None:
        scratch = torch.empty(classes, dtype=torch.float64, device="cpu")
    return _native.record(
        rows,
        classes,
        logits.stride(0),
        logits.data_ptr(),
        target.data_ptr(),
        ids.data_ptr(),
        0 if place is None else place.data_ptr(),
        0 if live is None else live.data_ptr(),
        fresh.uniform,
        time,
        table.addresses(),
        averages.state.data_ptr(),
        0 if transition is None else transition.data_ptr(),
        0 if counts is None else counts.data_ptr(),
        float(averages.window),
        0 if scratch is None else scratch.data_ptr(),
    )
