"""What every selection rule offers, and the checks they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from selbp.ops.types import BatchStatistics, Selection
from selbp.selectors.proxies import GradientProxies

Needs = Literal["nothing", "loss", "statistics", "gradients"]


@runtime_checkable
class Selector(Protocol):
    """A rule that chooses k rows of a minibatch of n, and their weights.

    ``needs`` says what the rule reads, so that nothing else is computed: ``"nothing"`` (chosen before the forward,
    which then runs k rows only), ``"loss"``, ``"statistics"`` (losses and gradient norms) or ``"gradients"`` (the
    ``proxies`` as well).
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

        ``stats.loss`` is each sample's own loss as torch's ``reduction="none"`` gives it, summed over the tokens of a
        sequence: it means the same in every minibatch. ``stats.residual_sq`` and the ``proxies`` are of the losses
        scaled so that their mean over the n rows is torch's ``reduction="mean"``, the one whose gradient is matched.
        Every draw comes from ``generator`` (on the statistics' device), else from torch's global one. ``extras``
        holds what the caller knows about each sample, (n,) each. Raises ValueError unless 1 <= k <= n.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on as if it had not stopped; empty for a rule without memory."""
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
        got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state of {type(selector).__name__} must have the entries {sorted(names)}, got {got}")


def check_call(stats: BatchStatistics, k: int, generator: torch.Generator | None = None) -> int:
    """Check what every ``select`` is given, and return n."""
    n = stats.valid.shape[0]
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        raise TypeError(f"k must be an int, got {k!r}")
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, n = {n}], got {k}")
    if generator is not None and generator.device.type != stats.valid.device.type:
        raise ValueError(
            f"generator must be on the statistics' device {stats.valid.device}, got one on {generator.device}"
        )
    return n


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_number(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """Raise TypeError or ValueError unless ``value`` is a finite number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (low <= value <= high and value < float("inf")):  # also false for nan
        raise ValueError(f"{name} must be finite and lie in [{low}, {high}], got {value}")


def require_proxies(selector: object, proxies: GradientProxies | None) -> GradientProxies:
    """The proxies, or a ValueError that says who reads them."""
    if proxies is None:
        raise ValueError(f"{selector!r} reads the per-sample gradients: proxies must be given, got None")
    return proxies
