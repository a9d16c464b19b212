"""A minibatch as a step receives it: tensors, tuples or dicts whose tensors all have n rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def map_tensors(tree: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """``tree`` with ``function`` applied to every tensor that has rows; everything else is passed through."""
    if isinstance(tree, Tensor):
        return function(tree) if tree.dim() else tree
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, function) for value in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(value, function) for value in tree)
    return tree


def take_rows(x: Tensor, indices: Tensor) -> Tensor:
    """Rows ``indices`` of ``x`` in its own memory format (``index_select`` would turn channels-last into NCHW)."""
    return x.index_select(0, indices) if x.is_contiguous() else x[indices]


@dataclass(frozen=True)
class Batch:
    """``n`` samples: what the model is called with, the target, and what the caller knows of each sample."""

    inputs: Any
    target: Any
    extras: Mapping[str, Tensor]
    n: int
    device: torch.device

    @classmethod
    def of(cls, inputs: Any, target: Any, extras: Mapping[str, Any]) -> Batch:
        """Check a step's arguments. In a dict without a ``target``, ``"labels"`` is the target.

        Raises TypeError or ValueError that names what is wrong, before anything has run.
        """
        if not isinstance(inputs, (Tensor, tuple, list, Mapping)):
            raise TypeError(f"inputs must be a Tensor, a tuple or a dict of tensors, got {type(inputs).__name__}")
        if target is None and isinstance(inputs, Mapping):
            inputs = dict(inputs)
            target = inputs.pop("labels", None)
        if target is None:
            raise ValueError('target is missing: pass step(inputs, target), or a dict batch with "labels"')
        tensors: list[Tensor] = []

        def collect(x: Tensor) -> Tensor:
            tensors.append(x)
            return x

        map_tensors(inputs, collect)
        if not tensors:
            raise ValueError("inputs hold no tensor with a batch dimension")
        n, device = tensors[0].shape[0], tensors[0].device
        if n == 0:
            raise ValueError("inputs must have at least one sample, got a batch of 0")
        map_tensors(target, collect)
        for x in tensors:
            if x.shape[0] != n:
                raise ValueError(f"every tensor of the batch must have n = {n} rows, got one of {tuple(x.shape)}")
        for name, value in extras.items():
            if not isinstance(value, Tensor) or value.shape != (n,):
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(f"{name} must be a tensor (n,) = ({n},), one entry per sample, got {got}")
        return cls(inputs, target, extras, n, device)

    def rows(self, indices: Tensor | None, live: Tensor) -> Batch:
        """The samples ``indices`` (all, in order, for None); where not ``live``, floating entries become 0.

        A dead slot may hold a sample with NaN, and no weight of 0 keeps NaN out of a sum over rows.
        """

        def alive(x: Tensor) -> Tensor:
            x = x if indices is None else take_rows(x, indices)
            return torch.where(live.view(-1, *[1] * (x.dim() - 1)), x, 0) if x.is_floating_point() else x

        return Batch(map_tensors(self.inputs, alive), map_tensors(self.target, alive), {}, len(live), self.device)

    def take(self, indices: Tensor) -> Batch:
        """The samples ``indices`` (k,), without what the caller knows of each."""

        def rows(x: Tensor) -> Tensor:
            return take_rows(x, indices)

        return Batch(map_tensors(self.inputs, rows), map_tensors(self.target, rows), {}, len(indices), self.device)

    def finite(self) -> Tensor:
        """(n,) bool: every floating entry of the sample's inputs and target is finite."""
        result = torch.ones(self.n, dtype=torch.bool, device=self.device)

        def check(x: Tensor) -> Tensor:
            nonlocal result
            if x.is_floating_point() and x.numel():
                largest = torch.linalg.vector_norm(x.detach().reshape(self.n, -1), torch.inf, dim=1)
                result = result & torch.isfinite(largest)
            return x

        map_tensors((self.inputs, self.target), check)
        return result

    def feed(self, model: nn.Module) -> Any:
        """Call the model: ``model(x)``, ``model(*tuple)`` or ``model(**dict)``."""
        if isinstance(self.inputs, Tensor):
            return model(self.inputs)
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        return model(*self.inputs)
