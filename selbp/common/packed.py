"""Packed batches: one row that holds several sequences, end to end. Each becomes a sample, padded to the longest.

The model then sees the sequences one a row, with a mask: its loss and gradients are those of the packed row, where the
model kept the sequences apart. What packing saves, the padding costs again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # the label of padding
TOKENS = ("input_ids", "inputs_embeds", "position_ids", "attention_mask", "token_type_ids")  # (1, T, ...)
BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens")  # (n + 1,), from 0 to T
NOTED = ("seq_idx", "max_length_q", "max_length_k")  # said by the bounds as well


def signs_of(inputs: Any) -> list[str]:
    """The names by which a dict batch says that a row holds several sequences."""
    if not isinstance(inputs, Mapping):
        return []
    names = [str(name) for name in inputs if str(name).startswith(("cu_seq", "seq_idx", "max_length_q"))]
    position = inputs.get("position_ids")
    if not names and isinstance(position, Tensor) and position.dim() == 2 and len(position) == 1:
        names = ["position_ids"] if int((position == 0).sum()) > 1 else []
    return names


def unpacked(inputs: Any, target: Any) -> tuple[Any, Any]:
    """Inputs and target with a row for each sequence where ``inputs`` are one packed row, else both as they are.

    The bounds are those of ``cu_seq_lens_q`` or ``cu_seqlens``; where there are none, each position 0 begins a
    sequence, which is read: a GPU waits. Raises ValueError that names what cannot be taken apart.
    """
    if not isinstance(target, Tensor) or target.dim() != 2 or len(target) != 1 or not (names := signs_of(inputs)):
        return inputs, target
    length = target.shape[1]
    for name, value in inputs.items():
        shape = tuple(value.shape) if isinstance(value, Tensor) else None
        per_token = name in TOKENS and shape is not None and shape[:2] == (1, length)
        if name == "attention_mask":
            per_token = per_token and len(shape or ()) == 2
        if value is not None and not per_token and name not in BOUNDS + NOTED:
            got = type(value).__name__ if shape is None else f"a tensor {shape}"
            raise ValueError(_refusal(names, f"{name!r} is {got}, which is not one entry a token"))
    bounds = _bounds(inputs, length, names)
    starts, ends = bounds[:-1].long(), bounds[1:].long()
    longest = inputs.get("max_length_q")
    longest = int(longest) if isinstance(longest, int) else int((ends - starts).max())
    place = starts[:, None] + torch.arange(longest, device=starts.device)
    inside, place = place < ends[:, None], torch.minimum(place, ends[:, None] - 1)
    rows = {name: value[0][place] for name, value in inputs.items() if name in TOKENS and value is not None}
    mask = rows.get("attention_mask")
    rows["attention_mask"] = inside.long() if mask is None else torch.where(inside, mask, 0)
    return rows, torch.where(inside, target[0][place], IGNORED)


def _bounds(inputs: Mapping[str, Any], length: int, names: list[str]) -> Tensor:
    """(n + 1,) where the sequences begin, and where the last one ends."""
    given = [inputs[name] for name in BOUNDS if inputs.get(name) is not None]
    if not given:
        position = inputs.get("position_ids")
        if not isinstance(position, Tensor):
            raise ValueError(_refusal(names, f"neither {', '.join(BOUNDS)} nor position_ids tell where one ends"))
        starts = (position[0] == 0).nonzero()[:, 0]
        given = [torch.cat([starts, starts.new_tensor([length])])]
    bounds: Tensor = given[0]
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or len(bounds) < 2 or bounds.is_floating_point():
        raise ValueError(_refusal(names, "the bounds are not a tensor (n + 1,) of integers"))
    if bounds.device.type == "cpu":  # asking a GPU would wait for it
        steps = bounds.diff()
        if int(bounds[0]) != 0 or int(bounds[-1]) != length or int(steps.min()) < 1:
            raise ValueError(_refusal(names, f"the bounds are {bounds.tolist()}, not increasing from 0 to {length}"))
        if any(not torch.equal(bounds.cpu(), other.cpu()) for other in given[1:]):
            raise ValueError(_refusal(names, "queries and keys have different bounds"))
    return bounds.to(inputs["input_ids"].device) if isinstance(inputs.get("input_ids"), Tensor) else bounds


def _refusal(names: list[str], why: str) -> str:
    return f"{packed_message(names)}: {why}"


def packed_message(names: list[str]) -> str:
    """What is said of a packed batch that cannot be taken apart."""
    return (
        f"the batch is packed ({', '.join(names)}): one row holds several sequences, and they cannot be taken apart. "
        "Pad instead (packing=False, padding_free=False), so that a row is a sequence"
    )
