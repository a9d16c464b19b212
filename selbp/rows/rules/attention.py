"""Rules of the fused attention kernels.

With dropout a kernel computes its mask again, from a random offset and the sample's *position in the batch*. A batch of
k rows would get other masks, so calls with dropout densify. Attention without a fused kernel (on a CPU with dropout)
runs as products and softmax, and needs no rule of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from selbp.rows.gradient import RowGradient
from selbp.rows.registry import RULES, bind, overloads, require
from selbp.rows.rules.per_sample import kernel

_CPU = "_scaled_dot_product_flash_attention_for_cpu_backward"
kernel(
    _CPU, (0, 1, 2, 3, 4, 5), "rrr", lambda g, args: g._layout.dim == 0 and args[6] == 0, text="No dropout.", once=(5,)
)

kernel(
    "_scaled_dot_product_flash_attention_backward",
    (0, 1, 2, 3, 4, 5),
    "rrr",
    lambda g, args: g._layout.dim == 0 and args[10] == 0 and args[6] is None and args[7] is None,
    text="No dropout, no ragged sequences.",
)


def _take_mask(position: int) -> Any:
    """Take the chosen rows of the mask, the argument at ``position``."""

    def adjust(gradient: RowGradient, args: list[Any]) -> None:
        args[position] = mask_rows(gradient, args[position])

    return adjust


def mask_rows(gradient: RowGradient, mask: Tensor | None) -> Tensor | None:
    """Return the chosen rows of a mask that has one row per sample; any other mask as it is."""
    if mask is None or mask.dim() < gradient.dim() or mask.shape[0] == 1:
        return mask
    return gradient._layout.take(mask, 0)


kernel(
    "_scaled_dot_product_efficient_attention_backward",
    (0, 1, 2, 3, 5, 6),
    "rrrr",
    lambda g, args: g._layout.dim == 0 and args[9] == 0 and not args[10][3],
    text="No dropout, no gradient of the mask.",
    adjust=_take_mask(4),
)
kernel(
    "_scaled_dot_product_cudnn_attention_backward",
    (0, 1, 2, 3, 4, 5),
    "rrr",
    lambda g, args: g._layout.dim == 0 and args[13] == 0 and args[9] is None,
    text="No dropout, no ragged sequences.",
    adjust=_take_mask(8),
)

_without_mask = {overload: RULES[overload] for overload in overloads(_CPU)}


def flash_cpu(func: Any, gradient: Any, *args: Any, attn_mask: Any = None, **kwargs: Any) -> Any:
    """No dropout."""
    if attn_mask is not None:
        require(isinstance(gradient, RowGradient) and not isinstance(attn_mask, RowGradient), "the mask is a gradient")
        attn_mask = mask_rows(gradient, attn_mask)
    return _without_mask[func](func, gradient, *args, attn_mask=attn_mask, **kwargs)


for _overload in _without_mask:
    bind(_overload, flash_cpu)
