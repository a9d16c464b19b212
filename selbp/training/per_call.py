"""The options of one call of a step: another normalizer of the loss, and rows that were chosen before."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal

import torch
from torch import Tensor

from selbp._checks import shown
from selbp.training.scored import Scored
from selbp.types import BatchStatistics, Selection, widest


@dataclass(frozen=True)
class Given:
    """A rule that returns the selection it was given, and reads nothing of the minibatch."""

    selection: Selection
    needs: Literal["nothing"] = "nothing"

    def select(self, stats: BatchStatistics, k: int, **unused: Any) -> Selection:
        """The selection."""
        return self.selection


@dataclass(frozen=True)
class PerCall:
    """The checked options of one call."""

    normalizer: float | Tensor | None = None
    given: Given | None = None

    @classmethod
    def of(cls, normalizer: Any, num_items_in_batch: Any, selection: Any) -> PerCall:
        """Raises TypeError or ValueError that names the option."""
        if normalizer is None and num_items_in_batch is None and selection is None:
            return NOTHING
        if normalizer is not None and num_items_in_batch is not None:
            raise ValueError("normalizer and num_items_in_batch are two names of one option: pass one")
        name, value = "normalizer", normalizer
        if num_items_in_batch is not None:
            name, value = "num_items_in_batch", num_items_in_batch
        return cls(_number(name, value), None if selection is None else Given(_selection(selection)))

    def check(self, n: int, device: torch.device) -> None:
        """Raise ValueError where the given selection does not fit a minibatch of ``n`` samples on ``device``."""
        if self.given is None:
            return
        indices = self.given.selection.indices
        if indices.device != device or self.given.selection.weights.device != device:
            raise ValueError(f"selection must be on the batch's device {device}, got {indices.device}")
        if device.type == "cpu" and not bool(((indices >= 0) & (indices < n)).all()):  # elsewhere asking would wait
            raise ValueError(f"selection must name rows of the {n} samples, got {shown(indices)}")

    def share(self, scored: Scored, n: int) -> Tensor | None:
        """() what the minibatch's mean loss counts in the accumulated one: its own mass over ``normalizer``.

        None where no normalizer was given. 0 where the minibatch has no target, or the normalizer is 0.
        """
        if self.normalizer is None:
            return None
        scale = scored.scale.to(widest(scored.scale.device))
        mass = torch.where(scale > 0, n / scale, 0.0)
        whole = torch.as_tensor(self.normalizer, dtype=mass.dtype, device=mass.device)
        return torch.where(whole > 0, mass / whole, 0.0)


NOTHING = PerCall()


def _number(name: str, value: Any) -> float | Tensor | None:
    if value is None:
        return None
    meaning = "a number greater than or equal to 0 (targets that count in the accumulated batch)"
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex() or value.dtype == torch.bool:
            raise ValueError(f"{name} must be {meaning}, got a tensor {value.dtype} {tuple(value.shape)}")
        return value.detach().reshape(())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be {meaning}, got {shown(value)}")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name} must be {meaning}, got {shown(value)}")
    return number


def _selection(value: Any) -> Selection:
    meaning = "a selbp.Selection, such as step.report.selection"
    if not isinstance(value, Selection):
        raise TypeError(f"selection must be {meaning}, got {shown(value)}")
    indices, weights = value
    if not isinstance(indices, Tensor) or not isinstance(weights, Tensor):
        raise TypeError(f"selection must be {meaning}: it holds {shown(indices)} and {shown(weights)}")
    if indices.dim() != 1 or indices.shape != weights.shape or indices.dtype != torch.int64 or not len(indices):
        raise ValueError(
            f"selection must have indices (k,) int64 and weights (k,), k of at least 1, got {indices.dtype} "
            f"{tuple(indices.shape)} and {weights.dtype} {tuple(weights.shape)}"
        )
    if not weights.is_floating_point():
        raise TypeError(f"selection's weights must be floating, got {weights.dtype}")
    return Selection(indices.detach(), weights.detach())
