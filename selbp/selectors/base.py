"""What every selection rule offers, and the checks they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from selbp._checks import check_generator, check_int, shown
from selbp.selectors.proxies import GradientProxies
from selbp.types import BatchStatistics, Selection

Needs = Literal["nothing", "loss", "statistics", "gradients"]


@runtime_checkable
class Selector(Protocol):
    """A rule that chooses k rows of a minibatch of n, and their weights: what a rule of your own must offer.

    Attributes
    ----------
    needs : {"nothing", "loss", "statistics", "gradients"}
        What the rule reads, so that nothing else is computed. ``"nothing"``: chosen before the forward, which then
        runs k rows only. ``"statistics"``: losses and gradient norms. ``"gradients"``: the ``proxies`` as well.

    Examples
    --------
    >>> import selbp
    >>> isinstance(selbp.TopLoss(), selbp.Selector), selbp.TopLoss().needs
    (True, 'loss')
    """

    @property
    def needs(self) -> Needs:
        """What :meth:`select` reads."""
        ...

    def select(
        self,
        stats: BatchStatistics,
        k: int,
        *,
        proxies: GradientProxies | None = None,
        extras: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Selection:
        """Choose k of the ``len(stats.valid)`` rows, without synchronising with the device.

        Parameters
        ----------
        stats : BatchStatistics
            ``stats.loss`` is each sample's own loss as torch's ``reduction="none"`` gives it, summed over the tokens of
            a sequence: it means the same in every minibatch. ``stats.residual_sq`` and the ``proxies`` are of the
            losses scaled so that their mean over the n rows is torch's ``reduction="mean"``, whose gradient is matched.
        k : int
            How many rows.
        proxies : GradientProxies or None
            The per-sample gradients, where ``needs`` is ``"gradients"``.
        extras : mapping or None
            What the caller knows about each sample: tensors (n,) by name.
        generator : torch.Generator or None
            Where every draw comes from, on the statistics' device; torch's global one for None.

        Returns
        -------
        Selection
            Exactly k rows and their weights.

        Raises
        ------
        ValueError
            Unless 1 <= k <= n.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if it had not stopped; empty for a rule without memory."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Raises ValueError, and changes nothing, where it does not fit."""
        ...


class Stateless:
    """A rule without memory: its state is empty."""

    def state_dict(self) -> dict[str, Any]:
        """An empty dict."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept an empty state. Raises ValueError for any other, which belongs to another rule."""
        check_state(self, state, ())


def check_state(selector: object, state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise ValueError unless ``state`` has exactly the entries ``names``."""
    if not isinstance(state, Mapping) or set(state) != set(names):
        got = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state of {type(selector).__name__} must have the entries {sorted(names)}, got {got}")


def check_call(stats: BatchStatistics, k: int, generator: torch.Generator | None = None) -> int:
    """Check what every ``select`` is given, and return n."""
    return check_select(stats, k, generator)[0]


def check_select(stats: BatchStatistics, k: int, generator: torch.Generator | None = None) -> tuple[int, int]:
    """Check what every ``select`` is given, and return n and k."""
    if not isinstance(stats, BatchStatistics):
        raise TypeError(f"stats must be a BatchStatistics, got {shown(stats)}")
    valid = stats.valid
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.dim() != 1:
        raise ValueError(f"stats.valid must be a bool tensor (n,), got {shown(valid)}")
    for name, value in zip(BatchStatistics._fields, stats, strict=True):
        if not isinstance(value, Tensor) or value.shape != valid.shape:
            raise ValueError(f"stats.{name} must be a tensor (n,) = {tuple(valid.shape)}, got {shown(value)}")
    n = valid.shape[0]
    if not isinstance(k, torch.SymInt):
        k = check_int("k", k)
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, n = {n}], got {k}")
    check_generator(generator, valid.device)
    return n, k


def require_proxies(selector: object, proxies: GradientProxies | None, n: int | None = None) -> GradientProxies:
    """The proxies, of n samples where n is given, or an error that says who reads them."""
    if proxies is None:
        raise ValueError(f"{selector!r} reads the per-sample gradients: proxies must be given, got None")
    if not isinstance(proxies, GradientProxies):
        raise TypeError(f"proxies must be a selbp.GradientProxies, got {shown(proxies)}")
    if n is not None and len(proxies.gram()) != n:
        raise ValueError(f"proxies must be of the n = {n} samples of stats, got {len(proxies.gram())}")
    return proxies
