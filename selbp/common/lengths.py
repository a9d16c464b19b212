"""Token sequences of different lengths on different ranks: the shorter ones are padded, where the batch says how.

An attention mask says how. So does a loss of next tokens: no token sees a later one, so padding at the end changes
nothing. Labels are padded with the index that the loss ignores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from selbp.common.batch import Batch
from selbp.common.packed import TOKENS

LAST_LOGITS = ("logits_to_keep", "num_logits_to_keep")  # they count logits from the end, where padding goes


@dataclass(frozen=True)
class Lengths:
    """How the batches of a step are padded.

    ``ignore_index`` is the label that the loss leaves out, None for a loss that has none. ``causal``: no token is seen
    by those before it.
    """

    ignore_index: int | None = None
    causal: bool = False

    def of(self, batch: Batch) -> tuple[int, list[Tensor]]:
        """The sequences' length T and the tensors (n, T, ...) that have it; 0 where nothing says how to pad them."""
        found = self._tokens(batch)
        given = {*batch.held, *(batch.inputs if isinstance(batch.inputs, Mapping) else ())}
        if not found or given.intersection(LAST_LOGITS):
            return 0, []
        length = found[0].shape[1]
        target = batch.target
        if isinstance(target, Tensor) and target.dim() == 1:
            return length, found
        fits = isinstance(target, Tensor) and target.shape == (batch.n, length) and target.dtype == torch.int64
        return (length, [*found, target]) if fits and self.ignore_index is not None else (0, [])

    def padded(self, batch: Batch, length: int) -> Batch:
        """``batch`` with sequences of ``length``."""
        own, tensors = self.of(batch)
        if own == length or not tensors:
            return batch
        sequences = {id(x) for x in tensors}

        def pad(name: str, x: Any) -> Any:
            return _longer(x, length, 0, name == "position_ids") if id(x) in sequences else x

        inputs = batch.inputs
        if isinstance(inputs, Mapping):
            inputs = {name: pad(name, x) for name, x in inputs.items()}
        else:
            inputs = pad("input_ids", inputs)
        target = batch.target
        if id(target) in sequences:
            assert self.ignore_index is not None
            target = _longer(target, length, self.ignore_index)
        return replace(batch, inputs=inputs, target=target)

    def _tokens(self, batch: Batch) -> list[Tensor]:
        """The inputs that are sequences of tokens, the one that says how to pad them first."""
        inputs = batch.inputs
        if isinstance(inputs, Tensor):
            return [inputs] if self.causal and inputs.dim() == 2 and not inputs.is_floating_point() else []
        if not isinstance(inputs, Mapping):
            return []
        mask = inputs.get("attention_mask")
        if mask is None and self.causal:
            mask = inputs.get("input_ids", inputs.get("inputs_embeds"))
        elif mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            mask = None  # one of pairs of tokens, whose padding is not known
        if not isinstance(mask, Tensor) or mask.dim() < 2:
            return []
        named = (inputs[name] for name in TOKENS if name in inputs)
        others = [x for x in named if isinstance(x, Tensor) and x is not mask and x.shape[:2] == mask.shape[:2]]
        return [mask, *others]


def _longer(x: Tensor, length: int, value: int, repeated: bool = False) -> Tensor:
    """(n, length, ...) ``x`` (n, T, ...) with ``value`` after it, or its last entry."""
    shape = (len(x), length - x.shape[1], *x.shape[2:])
    after = x[:, -1:].expand(shape) if repeated else x.new_full(shape, value)
    return torch.cat([x, after], 1)
