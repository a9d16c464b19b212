"""Cross-entropy against class probabilities: what mixup, CutMix and distillation have as a target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selbp.common.outputs import check_classes_of


def is_soft(target: Any) -> bool:
    """Whether ``target`` holds class probabilities: floating, with a dim of classes."""
    return isinstance(target, Tensor) and target.is_floating_point() and target.dim() >= 2


def classes_last(x: Tensor, class_dim: int | None) -> Tensor:
    """(n, T, C) of (n, C), (n, ..., C) or (n, C, ...). ValueError where the classes' dim must be told, or has one."""
    if x.dim() > 2 and class_dim is None:
        raise ValueError(
            f"class probabilities {tuple(x.shape)} may have their classes in dim 1, as torch has them, or in the last "
            "dim: pass class_dim=1 or class_dim=-1"
        )
    moved = x.movedim(1, -1) if x.dim() > 2 and class_dim == 1 else x
    if moved.shape[-1] == 1:  # what comes of a regression with the default loss: nothing would train
        raise ValueError(
            f"a floating target {tuple(x.shape)} is taken for probabilities of one class, whose cross-entropy is 0 "
            'whatever the model gives: pass loss="mse" for a number, or "bce" for yes and no'
        )
    return moved.reshape(len(x), -1, moved.shape[-1])


def _check(logits: Tensor, target: Tensor) -> None:
    if logits.shape != target.shape:
        raise ValueError(
            f"target of class probabilities must have the shape of the logits, {tuple(logits.shape)}, got "
            f"{tuple(target.shape)}"
        )


def soft_losses(
    logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float, class_dim: int | None
) -> Tensor:
    """(n,) losses, summed over a sample's positions, as ``torch.nn.functional.cross_entropy`` gives them."""
    _check(logits, target)
    z = classes_last(logits, class_dim)
    check_classes_of(z)
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    wanted = classes_last(target, class_dim).to(z.dtype)
    weight = None if weight is None else weight.to(z.dtype)
    entries = F.cross_entropy(
        z.flatten(0, 1), wanted.flatten(0, 1), weight, reduction="none", label_smoothing=smoothing
    )
    return entries.view(z.shape[:2]).sum(1)


def soft_mass(target: Tensor, class_dim: int | None) -> tuple[Tensor, Tensor]:
    """(n,) positions of each sample, which torch's mean counts whatever their class weights, and (n,) True."""
    positions = classes_last(target, class_dim).shape[1]
    mass = torch.full((len(target),), float(positions), dtype=torch.float32, device=target.device)
    return mass, torch.ones_like(mass, dtype=torch.bool)


def soft_hits(logits: Tensor, target: Tensor, live: Tensor, class_dim: int | None) -> tuple[Tensor, Tensor]:
    """() positions whose greatest logit is the most probable class, and () all, of ``live`` samples."""
    _check(logits, target)
    z, wanted = classes_last(logits, class_dim), classes_last(target, class_dim)
    hit = (z.argmax(-1) == wanted.argmax(-1)) & live[:, None]
    return hit.sum(), live.sum() * z.shape[1]
