"""How a random program ends: per-sample losses of its last value, and of others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from support.random_models.context import Context

LOSSES = {
    "cross_entropy": lambda x, y, t: F.cross_entropy(x, y, reduction="none"),
    "cross_entropy_smoothed": lambda x, y, t: F.cross_entropy(x, y, reduction="none", label_smoothing=0.1),
    "cross_entropy_ignored": lambda x, y, t: F.cross_entropy(x, y, reduction="none", ignore_index=1),
    "cross_entropy_soft": lambda x, y, t: F.cross_entropy(x, t.softmax(1), reduction="none"),
    "nll": lambda x, y, t: F.nll_loss(x.log_softmax(1), y, reduction="none"),
    "gathered": lambda x, y, t: -x.log_softmax(1).gather(1, y[:, None]).squeeze(1),
    "mse": lambda x, y, t: F.mse_loss(x, t, reduction="none").mean(1),
    "l1": lambda x, y, t: F.l1_loss(x, t, reduction="none").sum(1),
    "huber": lambda x, y, t: F.huber_loss(x, t, reduction="none").sum(1),
    "smooth_l1": lambda x, y, t: F.smooth_l1_loss(x, t, reduction="none").mean(-1),
    "bce": lambda x, y, t: F.binary_cross_entropy(x.sigmoid(), t.sigmoid(), reduction="none").sum(1),
    "bce_logits": lambda x, y, t: F.binary_cross_entropy_with_logits(x, t.sigmoid(), reduction="none").mean(1),
    "kl": lambda x, y, t: F.kl_div(x.log_softmax(1), t.softmax(1), reduction="none").sum(1),
    "gaussian_nll": lambda x, y, t: F.gaussian_nll_loss(x, t, x * x + 1, reduction="none").sum(1),
    "poisson_nll": lambda x, y, t: F.poisson_nll_loss(x * 0.3, t.abs(), reduction="none").sum(1),
    "soft_margin": lambda x, y, t: F.soft_margin_loss(x, t.sign(), reduction="none").sum(1),
    "hinge": lambda x, y, t: F.hinge_embedding_loss(x, t.sign(), reduction="none").sum(1),
    "multi_margin": lambda x, y, t: F.multi_margin_loss(x, y, reduction="none"),
    "multilabel_margin": lambda x, y, t: F.multilabel_soft_margin_loss(x, (t > 0).double(), reduction="none"),
    "multilabel": lambda x, y, t: F.multilabel_margin_loss(x, y[:, None].expand(-1, 4).clone(), reduction="none"),
    "triplet": lambda x, y, t: F.triplet_margin_loss(x, t, x.flip(1) + 0.1, reduction="none"),
    "margin_ranking": lambda x, y, t: F.margin_ranking_loss(x[:, 0], x[:, 1], t[:, 0].sign(), reduction="none"),
    "cosine": lambda x, y, t: F.cosine_embedding_loss(x, t, t[:, 0].sign(), reduction="none"),
    "squares": lambda x, y, t: x.pow(2).sum(1),
    "margin": lambda x, y, t: x[:, 0] - x.logsumexp(1),
    "wide": lambda x, y, t: (x - t) ** 2,
}
COUPLED = {
    "contrastive": lambda x, y, t: F.cross_entropy(x @ t.t(), torch.arange(len(x)), reduction="none"),
    "clip": lambda x, y, t: F.cross_entropy((x @ x.t()) * 0.5, torch.arange(len(x)), reduction="none"),
    "centered": lambda x, y, t: (x - x.mean(0)).pow(2).sum(1),
}


def _one(c: Context, x: Tensor) -> Tensor:
    """(n,) or (n, 4) losses of any value."""
    y, t = c.ints(4, c.n), c.const(c.n, 4)
    if c.chance(0.1):
        c.store.mixes = True
        return COUPLED[c.pick("loss", COUPLED)](c.fit(x, 4), y, t)
    if c.chance(0.15) and x.dim() > 2 and x.shape[-1] > 1:  # a loss for every position
        classes = x.movedim(-1, 1)
        at = c.ints(classes.shape[1], c.n, *classes.shape[2:])
        c.notes.append("loss=positions")
        losses = F.cross_entropy(classes, at, reduction="none").flatten(1)
        return losses.mean(1) if c.chance(0.5) else losses
    if c.chance(0.04):
        c.notes.append("loss=ctc")
        scores = c.fit(x, 4, 3).transpose(0, 1).log_softmax(-1)
        full = torch.full((c.n,), 4)
        return F.ctc_loss(scores, c.ints(2, c.n, 2) + 1, full, torch.full((c.n,), 2), reduction="none")
    return LOSSES[c.pick("loss", LOSSES)](c.fit(x, 4), y, t)


def losses(c: Context, x: Tensor) -> Any:
    """A tensor of losses, or several in a dict."""
    first = _one(c, x)
    if c.chance(0.2):
        return {"first": first, "second": _one(c, c.saved[c.rng.randrange(len(c.saved))]), "count": 3}
    return first
