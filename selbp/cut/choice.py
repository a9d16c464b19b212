"""``Cut``: the settings of a cut, and the choice that its hook makes in the backward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from selbp._checks import check_choice, check_generator, shown
from selbp.common.guards import without_autocast
from selbp.common.in_place import Kept, hookable
from selbp.common.keep import check_keep, kept_rows
from selbp.common.proxies import DIAGNOSTIC_BYTES, HeadProxies
from selbp.cut.proxies import FlatProxies, Proxy, proxies_at_cut, statistics_at_cut
from selbp.cut.report import CutReport
from selbp.rows.exposed import densify
from selbp.rows.gradient import RowGradient
from selbp.rows.layout import BatchNormPolicy, RowSet
from selbp.rows.observe import Observer, current_observers
from selbp.rows.select import as_row_gradient
from selbp.rows.unsupported import refuse_backward, refuse_forward, transformed
from selbp.selectors import Full, GradientMatching, ReducibleLoss, Selector, TopLoss
from selbp.selectors.base import check_selection
from selbp.types import BatchStatistics, Selection, real_dtype


class Cut:
    """The settings of one cut, and the choice that its hook makes in the backward.

    The arguments are those of :class:`selbp.BackwardCut`, which documents them.
    """

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
        self, hidden: Tensor, features: Tensor | None, on_choice: Callable[[CutReport], None] | None = None
    ) -> Tensor:
        """Hook the choice to the gradient of ``hidden`` and return ``hidden``.

        If ``hidden`` is a view, return an alias in the same memory that is not a view, see :func:`hookable`. When the
        backward has chosen, ``on_choice`` is called with the report.
        """
        n = hidden.shape[0] if hidden.dim() else 0
        if not torch.is_grad_enabled() or not hidden.requires_grad:
            return hidden
        if hidden.dim() == 0:
            raise ValueError("hidden must be (n, ...), got a scalar: place the cut before the loss is averaged")
        if features is not None and (features.dim() == 0 or features.shape[0] != n):
            raise ValueError(f"features must have hidden's {n} samples in dim 0, got {tuple(features.shape)}")
        if kept_rows(self.keep, n) >= n:
            return self._watched(hidden, on_choice)
        refuse_forward([hidden])
        # The hook must not hold `hidden`: the cycle through the tensor's own hook would never be collected.
        activation = Kept(hidden if features is None else features)
        observers = current_observers()  # read here: the backward may run in another thread

        def hook(delta: Tensor | None) -> Tensor | None:
            refuse_backward()
            if delta is None:  # the operators that read `hidden` have no gradient for it
                return None
            chosen = self.choose(delta, activation.take(), observers)
            if on_choice is not None and self.last is not None:
                on_choice(self.last)
            return chosen

        out = hookable(hidden)
        out.register_hook(hook)
        return out

    def _watched(self, hidden: Tensor, on_choice: Callable[[CutReport], None] | None) -> Tensor:
        """Return ``hidden`` as it is. The backward reports all rows, and changes nothing."""
        if transformed(hidden):  # torch.func cannot transform hookable()'s alias of a view
            return hidden

        def hook(delta: Tensor | None) -> None:
            if delta is not None:
                self.last = _everything(delta.shape[0], _outer(delta), delta)
                if on_choice is not None:
                    on_choice(self.last)

        out = hookable(hidden)
        out.register_hook(hook)
        return out

    @torch.no_grad()
    def choose(self, delta: Tensor, activation: Tensor, observers: tuple[Observer, ...]) -> Tensor | None:
        """Return the row-sparse gradient for the layers below, or None to leave ``delta`` unchanged."""
        outer, n = _outer(delta), delta.shape[0]
        if isinstance(delta, RowGradient) and outer is not None:
            delta, activation = delta._data, outer.slices.take(activation, outer.layout(0), 0)
        else:
            delta = densify(delta)
        m, k = delta.shape[0], kept_rows(self.keep, n)
        # A scaled loss that overflowed must reach GradScaler.
        if k >= m or (delta.device.type == "cpu" and not delta.abs().amax().isfinite()):
            self.last = _everything(n, outer, delta)
            return None
        indices, rows, report = self.pick(delta, activation, k)
        if outer is not None:
            indices = outer.on(delta.device)[indices]
            report.n, report.selection = n, Selection(indices, report.selection.weights * (m / n))
        self.last = report
        kept = RowSet(indices, n, batchnorm=self.batchnorm, densified=report.dense, observers=observers)
        return as_row_gradient(kept, rows)

    def pick(self, delta: Tensor, activation: Tensor, k: int) -> tuple[Tensor, Tensor, CutReport]:
        """Choose k of the n rows of ``delta``. Return the (k,) indices, the (k, ...) weighted rows, and the report.

        If ``delta`` is not finite, all k rows are NaN, so that GradScaler sees it without a synchronisation.
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
        """Return the rule's selection, the statistics it read, and the proxies if the report may keep them."""
        m = delta.shape[0]
        needs = self.selector.needs
        if needs == "nothing":
            stats = BatchStatistics.unscored(
                torch.ones(m, dtype=torch.bool, device=delta.device), real_dtype(delta.dtype)
            )
            found = self.selector.select(stats, k, generator=self.generator)
            return check_selection(self.selector, found, None if isinstance(self.selector, Full) else k, m), stats, None
        proxies = proxies_at_cut(delta, activation, self.proxy, greatest)
        loss = None if self.losses is None else self.losses()
        if loss is not None and loss.shape != (m,):
            raise ValueError(f"losses() must return ({m},) losses, got {tuple(loss.shape)}")
        stats = statistics_at_cut(proxies, loss, needs == "gradients")
        found = self.selector.select(stats, k, proxies=proxies, generator=self.generator)
        selection = check_selection(self.selector, found, k, m)
        if proxies.complete:
            proxies.release()
        small = sum(x.numel() * x.element_size() for x in (delta, activation)) <= DIAGNOSTIC_BYTES
        return selection, stats, proxies if proxies.complete or small else None


def _outer(delta: Tensor) -> RowSet | None:
    """Return the rows of a cut above: a choice is among these, because the others are zero."""
    mine = isinstance(delta, RowGradient) and delta._layout is delta._rows.layout(0)
    return delta._rows if isinstance(delta, RowGradient) and mine else None


def _everything(n: int, outer: RowSet | None, delta: Tensor) -> CutReport:
    """Return the report of a backward that passes on every row that arrived."""
    rows = torch.arange(n, device=delta.device) if outer is None else outer.on(delta.device)
    weights = torch.full(rows.shape, 1.0 / n, dtype=real_dtype(delta.dtype), device=delta.device)
    return CutReport(n, len(rows), Selection(rows, weights))


def cut_here(
    hidden: Tensor, features: Tensor | None, keep: float | int, selector: Selector | None, **options: Any
) -> Tensor:
    """Return ``hidden`` with a cut of its own. ``options`` are those of :class:`Cut`."""
    cut = Cut(keep, GradientMatching() if selector is None else selector, **options)
    check_tensors(hidden, features)
    return cut.attach(hidden, features)


def check_tensors(hidden: object, features: object) -> None:
    """Raise TypeError unless ``hidden`` is a tensor, and ``features`` a tensor or None."""
    for name, value in (("hidden", hidden), ("features", features)):
        if not isinstance(value, Tensor) and (value is not None or name == "hidden"):
            raise TypeError(f"{name} must be a Tensor (n, ...), got {shown(value)}")


def cut_output(
    function: Callable[[Tensor, Tensor | None], Tensor],
    name: str,
    module: nn.Module,
    given: tuple[Any, ...],
    output: Any,
) -> Any:
    """``output`` of the module ``name``, which was ``given`` some, its first tensor replaced by ``function``'s.

    ``function(tensor, features)`` gets the module's input if that is a linear layer, because it gives the layer's
    per-sample gradients exactly; else None.
    """
    if isinstance(output, Tensor):
        return function(output, given[0] if isinstance(module, nn.Linear) and len(given) == 1 else None)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        values = [function(output[0], None), *output[1:]]
        return type(output)(*values) if hasattr(output, "_fields") else type(output)(values)
    raise TypeError(
        f"the module at the cut {name!r} must return a Tensor or a tuple that starts with one, got {shown(output)}"
    )
