"""The cut: the identity in the forward, a selection in the backward.

Put anywhere in a model, it receives the gradient of all n samples from above, chooses k of them there, and hands the
part of the model below a gradient that has only those rows, each scaled by n times its weight. Above the cut gradients
are exact and full-batch; below, the backward costs k / n. The loop, the loss and the trainer do not change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from selbp.ops.types import BatchStatistics, Selection, real_dtype
from selbp.selectors import GradientMatching, ReducibleLoss, Selector, TopLoss
from selbp.selectors.checks import check_choice, check_generator, shown
from selbp.training.backward.rows.layout import BatchNormPolicy, RowSet
from selbp.training.backward.rows.refuse import refuse_backward, refuse_forward
from selbp.training.backward.rows.select import enter
from selbp.training.backward.rows.tensor import RowGradient, densify
from selbp.training.budget import check_keep, kept_rows, random_error
from selbp.training.cut_proxies import FlatProxies, Proxy, proxies_at_cut, statistics_at_cut
from selbp.training.guards import without_autocast
from selbp.training.in_place import Kept, hookable
from selbp.training.proxies import HeadProxies
from selbp.training.report import WeightFigures
from selbp.training.scoring import DIAGNOSTIC_BYTES
from selbp.training.state import ChoiceState, pack, unpack

EXTRA_STATE = "_extra_state"  # torch's name of the entry


@dataclass
class CutReport(WeightFigures):
    """What a cut chose in its last backward; the properties synchronise with the device when read."""

    n: int  # samples whose gradients arrived
    k: int  # rows that went on
    selection: Selection  # indices among the minibatch's samples; weights as in sum_j w_j g_j ~ (1 / n) sum_i g_i
    dense: Counter[str] = field(default_factory=Counter)  # operators below the cut that ran on n rows
    _local: Selection | None = field(default=None, repr=False)
    _stats: BatchStatistics | None = field(default=None, repr=False)
    _proxies: FlatProxies | HeadProxies | None = field(default=None, repr=False)

    @cached_property
    def relative_residual(self) -> float | None:
        """||mean - sum w g|| / ||mean|| of the gradients at the cut; None where the rule looked at none."""
        if self._proxies is None or self._local is None:
            return None
        return float(self._proxies.matching_residual(self._local))

    @cached_property
    def gain(self) -> float | None:
        """Expected squared error of k rows drawn at random, over that of the chosen ones: above 1 the rule helps."""
        if self.relative_residual is None or self._stats is None or self._proxies is None:
            return None
        squares = float((self._stats.residual_sq * self._stats.feature_sq).double().sum())
        target_sq = float(self._proxies.mean_gradient().target_sq)
        expected = random_error(self.n, self.n, self.k, squares, target_sq)
        error = self.relative_residual**2 * target_sq
        return expected / error if error > 0 else float("inf") if expected else None


class Cut:
    """One cut's settings, and the choice that its hook makes in the backward."""

    def __init__(
        self,
        keep: float | int,
        selector: Selector,
        *,
        generator: torch.Generator | None,
        losses: Callable[[], Tensor] | None,
        proxy: Proxy,
        batchnorm: BatchNormPolicy,
    ) -> None:
        if isinstance(selector, type) or not isinstance(selector, Selector):
            raise TypeError(f"selector must be an instance of a selector such as selbp.Random(), got {selector!r}")
        check_generator(generator)
        if losses is not None and not callable(losses):
            raise TypeError(f"losses must be a function that returns (n,) losses, or None, got {shown(losses)}")
        reads_losses = selector.needs == "loss" or isinstance(selector, (TopLoss, ReducibleLoss))
        if reads_losses and losses is None:
            raise ValueError(
                f"{selector!r} reads per-sample losses, which a cut does not see: use a rule that reads gradients, or "
                "pass losses=, a function that returns the (n,) losses of the forward being differentiated"
            )
        if isinstance(selector, ReducibleLoss):
            raise ValueError(f"{selector!r} reads a tensor per sample, which a cut is not given")
        check_choice("proxy", proxy, ("pooled", "flat", "positions"))
        check_choice("batchnorm", batchnorm, ("exact", "subset"))
        self.keep, self.selector, self.generator = check_keep(keep), selector, generator
        self.losses, self.proxy, self.batchnorm = losses, proxy, batchnorm
        self.last: CutReport | None = None

    def attach(
        self, hidden: Tensor, features: Tensor | None, made: Callable[[CutReport], None] | None = None
    ) -> Tensor:
        """Hook the choice to the gradient of ``hidden``, which is returned; ``made`` hears of the choice.

        A view is returned as an alias that is none, see :func:`hookable`.
        """
        n = hidden.shape[0] if hidden.dim() else 0
        if not torch.is_grad_enabled() or not hidden.requires_grad:
            return hidden
        if hidden.dim() == 0:
            raise ValueError("hidden must be (n, ...), got a scalar: place the cut before the loss is averaged")
        if features is not None and (features.dim() == 0 or features.shape[0] != n):
            raise ValueError(f"features must have hidden's {n} samples in dim 0, got {tuple(features.shape)}")
        if kept_rows(self.keep, n) >= n:
            return hidden
        refuse_forward([hidden])
        # The value, not `hidden`: a closure over that would be a cycle through its own hook that nothing collects.
        activation = Kept(hidden if features is None else features)

        def hook(delta: Tensor | None) -> Tensor | None:
            refuse_backward()
            if delta is None:  # what read `hidden` has no gradient for it
                return None
            chosen = self.choose(delta, activation.take())
            if made is not None and self.last is not None and chosen is not None:
                made(self.last)
            return chosen

        out = hookable(hidden)
        out.register_hook(hook)
        return out

    @torch.no_grad()
    def choose(self, delta: Tensor, activation: Tensor) -> Tensor | None:
        """The row-sparse gradient that goes on below; None leaves ``delta`` as it came."""
        outer, n = None, delta.shape[0]
        if isinstance(delta, RowGradient) and delta._layout is delta._rows.layout(0):
            outer = delta._rows  # a cut above: choose among its rows, the others are zero
            delta, activation = delta._data, outer.slices.take(activation, outer.layout(0), 0)
        else:
            delta = densify(delta)
        m, k = delta.shape[0], kept_rows(self.keep, n)
        if k >= m:
            return None
        if delta.device.type == "cpu" and not delta.abs().amax().isfinite():
            return None  # a scaled loss overflowed: GradScaler must see it
        indices, rows, report = self.pick(delta, activation, k)
        if outer is not None:
            indices = outer.on(delta.device)[indices]
            report.n, report.selection = n, Selection(indices, report.selection.weights * (m / n))
        self.last = report
        kept = RowSet(indices, n, batchnorm=self.batchnorm, dense=report.dense)
        return enter(kept, rows)

    def pick(self, delta: Tensor, activation: Tensor, k: int) -> tuple[Tensor, Tensor, CutReport]:
        """Choose k of the n rows of ``delta``: (k,) indices, the (k, ...) rows that go on, and the report.

        Where ``delta`` is not finite all k rows are NaN: asking would wait for the device, and GradScaler sees it.
        """
        n = delta.shape[0]
        greatest = delta.abs().amax() if delta.numel() else delta.new_zeros(())
        finite = greatest.isfinite()
        with without_autocast(delta.device):
            selection, stats, proxies = self._select(torch.where(finite, delta, 0), activation, k, greatest)
        indices = selection.indices
        weights = selection.weights.to(delta.dtype).view(-1, *[1] * (delta.dim() - 1))
        rows = torch.where(weights != 0, delta.index_select(0, indices) * (n * weights), 0)
        rows = torch.where(finite, rows, torch.nan)
        return indices, rows, CutReport(n, k, selection, Counter(), selection, stats, proxies)

    def _select(
        self, delta: Tensor, activation: Tensor, k: int, greatest: Tensor
    ) -> tuple[Selection, BatchStatistics, FlatProxies | HeadProxies | None]:
        m = delta.shape[0]
        needs = self.selector.needs
        if needs == "nothing":
            stats = BatchStatistics.unscored(
                torch.ones(m, dtype=torch.bool, device=delta.device), real_dtype(delta.dtype)
            )
            return self.selector.select(stats, k, generator=self.generator), stats, None
        proxies = proxies_at_cut(delta, activation, self.proxy, greatest)
        loss = None if self.losses is None else self.losses()
        if loss is not None and loss.shape != (m,):
            raise ValueError(f"losses() must return ({m},) losses, got {tuple(loss.shape)}")
        stats = statistics_at_cut(proxies, loss, needs == "gradients")
        selection = self.selector.select(stats, k, proxies=proxies, generator=self.generator)
        if proxies.complete:
            proxies.release()
        small = sum(x.numel() * x.element_size() for x in (delta, activation)) <= DIAGNOSTIC_BYTES
        return selection, stats, proxies if proxies.complete or small else None


def selective_backward(
    hidden: Tensor,
    keep: float | int,
    selector: Selector | None = None,
    *,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
    losses: Callable[[], Tensor] | None = None,
    proxy: Proxy = "pooled",
    batchnorm: BatchNormPolicy = "exact",
) -> Tensor:
    """``hidden``; in the backward only k chosen rows of its gradient go on. See :class:`SelectiveBackward`.

    Go on with what is returned: ``hidden`` itself, or where that is a view an alias in the same memory. Also active in
    evaluation mode (a function does not know the mode), unless gradients are off.
    """
    if torch.compiler.is_compiling():
        from selbp.training import untraced

        options = dict(generator=generator, losses=losses, proxy=proxy, batchnorm=batchnorm)
        return untraced.selective_backward(hidden, keep, selector, features=features, **options)
    rule = GradientMatching() if selector is None else selector
    cut = Cut(keep, rule, generator=generator, losses=losses, proxy=proxy, batchnorm=batchnorm)
    _check_tensors(hidden, features)
    return cut.attach(hidden, features)


def _check_tensors(hidden: object, features: object) -> None:
    """Raise TypeError unless both are tensors, the latter or None."""
    for name, value in (("hidden", hidden), ("features", features)):
        if not isinstance(value, Tensor) and (value is not None or name == "hidden"):
            raise TypeError(f"{name} must be a Tensor (n, ...), got {shown(value)}")


class SelectiveBackward(nn.Module):
    """The identity, whose backward lets k chosen rows of the gradient into the layers below it.

    ::

        model = nn.Sequential(trunk, selbp.SelectiveBackward(keep=0.25), head)   # nothing else changes

    The gradient that arrives is that of all n samples, delta_i = dL / d hidden_i for any scalar loss L. The rule
    chooses k rows and weights w with sum_j w_j g_j ~ (1 / n) sum_i g_i, and row j goes on scaled by n w_j: the layers
    above get their exact full-batch gradients, those below an estimate (unbiased with :class:`selbp.Random`) at k / n
    of the cost. In evaluation mode, without gradients, and where k = n, it is exactly the identity. Several cuts nest:
    a lower one chooses among the rows of the one above it. A gradient that is not finite goes on as it is, for
    GradScaler to see (on a GPU as NaN in the chosen rows).

    Where the rule has a memory, or ``generator`` is given, the model's ``state_dict`` holds them as ``_extra_state``, a
    uint8 tensor, so that a resumed run goes on bit for bit. A checkpoint without that entry loads as well. It is one
    process's state: ranks whose generators differ each save their own.

    Args:
        keep: a share in (0, 1] (float, k = max(1, round(keep n))) or a number of samples (int of at least 1).
        selector: a rule that needs nothing or gradients, :class:`selbp.GradientMatching` by default.
        generator: where draws come from, on the device of the gradient; torch's global one for None.
        losses: for rules that read losses: returns the (n,) losses of the forward being differentiated.
        proxy: what the rule sees of samples that have several positions: ``"pooled"`` sums over them, ``"flat"``
            compares position by position, ``"positions"`` is exact for a linear layer below, and the dearest.
        batchnorm: for BatchNorm below the cut, as in :func:`selbp.select`.

    Raises:
        TypeError, ValueError: at construction, for a rule that could not work here.
    """

    def __init__(
        self,
        keep: float | int,
        selector: Selector | None = None,
        *,
        generator: torch.Generator | None = None,
        losses: Callable[[], Tensor] | None = None,
        proxy: Proxy = "pooled",
        batchnorm: BatchNormPolicy = "exact",
    ) -> None:
        super().__init__()
        rule = GradientMatching() if selector is None else selector
        self._cut = Cut(keep, rule, generator=generator, losses=losses, proxy=proxy, batchnorm=batchnorm)
        self._choice = ChoiceState(rule, generator)

    def get_extra_state(self) -> Tensor:
        """The rule's memory and the generator's state, packed in a uint8 tensor (bytes,)."""
        return pack(self._choice.state_dict())

    def set_extra_state(self, state: Any) -> None:
        """Take over :meth:`get_extra_state`. Raises ValueError, and changes nothing, where it does not fit."""
        self._choice.load_state_dict(unpack(state))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._choice.remembers:
            destination.pop(prefix + EXTRA_STATE, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key = prefix + EXTRA_STATE
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        except ValueError as error:
            error_msgs.append(f"{key} does not fit this cut: {error}")  # torch raises, as for a shape that differs
        if key in missing_keys:  # saved before the cut was there, or when it had nothing to save
            missing_keys.remove(key)

    @property
    def keep(self) -> float | int:
        """Share or number of rows that go on."""
        return self._cut.keep

    @property
    def selector(self) -> Selector:
        """The rule."""
        return self._cut.selector

    @property
    def generator(self) -> torch.Generator | None:
        """Where draws come from."""
        return self._cut.generator

    @property
    def report(self) -> CutReport:
        """What the last backward chose. Raises RuntimeError before the first one."""
        if self._cut.last is None:
            raise RuntimeError("there is no report before the first backward through this cut")
        return self._cut.last

    def forward(self, hidden: Tensor, features: Tensor | None = None) -> Tensor:
        """``hidden`` (n, ...), unchanged. ``features`` (n, ...) is the input of the layer below, where it is known."""
        if not self.training:
            return hidden
        _check_tensors(hidden, features)
        if torch.compiler.is_compiling():
            from selbp.training import untraced

            return untraced.attach(self._cut, hidden, features)
        return self._cut.attach(hidden, features)

    def extra_repr(self) -> str:
        """Settings for ``print(model)``."""
        return f"keep={self.keep}, selector={self.selector!r}"
