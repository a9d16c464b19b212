"""What a ``transformers.Trainer`` of any release divides and multiplies its loss by."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from selbp.training.step import SelectiveBackprop


def is_scaled(trainer: Any, count: Any) -> bool:
    """Whether the trainer takes the loss for one that counts in the whole accumulated batch, as it is."""
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
    if scaled is not None:
        return bool(scaled)
    if (trainer.model_accepts_loss_kwargs and count is not None) or trainer.compute_loss_func is not None:
        return True
    # Older ones divide what they log, and not what they run the backward of.
    return tuple(int(part) for part in version("transformers").split(".")[:2]) < (4, 47)


def accumulated(trainer: Any) -> int:
    """How many minibatches the optimizer step at hand accumulates."""
    own = getattr(trainer, "current_gradient_accumulation_steps", None)
    return int(own or trainer.args.gradient_accumulation_steps)


def over_processes(trainer: Any, step: SelectiveBackprop, count: Any) -> tuple[Any, float]:
    """What the sum of the losses is divided by, and the loss's factor: gradients are averaged over processes.

    ``count`` is of all processes with ``average_tokens_across_devices``, else of this one. With ``scope="global"`` the
    loss is of the samples of all ranks, and has their number as a factor already.
    """
    ranks = step._ranks
    size = 1 if ranks is None else ranks.size
    if not trainer.args.average_tokens_across_devices:
        return count if ranks is None else size * ranks.mean([float(count)])[0], 1.0
    splits = trainer.get_tp_size() if hasattr(trainer, "get_tp_size") else 1
    return count, trainer.accelerator.num_processes // splits / size
