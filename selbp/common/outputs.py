"""What a model returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def logits_in(output: Any) -> Any:
    """The ``logits`` of an output that is a dict or an object with some, else the output itself."""
    return output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)


def check_classes_of(logits: Tensor) -> None:
    """Raise ValueError unless ``logits`` (..., C) have several classes: with one, cross-entropy is always 0."""
    if logits.shape[-1] == 1:
        raise ValueError(
            f"logits must have one output for each class, at least 2, got {tuple(logits.shape)}: give the model two "
            'outputs, or pass loss="bce", and no classes='
        )


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a Tensor, or an object or dict that has ``logits``. Raises TypeError."""
    logits = logits_in(output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model must return a Tensor or something with .logits, got {type(output).__name__}; "
            "pass a callable loss (output, target) -> (n,) for anything else"
        )
    return logits
