"""Selective steps in a loop that Hugging Face's ``Accelerator`` prepares.

::

    accelerator = Accelerator(gradient_accumulation_steps=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = AcceleratedStep(accelerator, model, selector=selbp.GradientMatching(), keep=0.25)
    for inputs, target in loader:
        with accelerator.accumulate(model):
            accelerator.backward(step(inputs, target))
            optimizer.step(); optimizer.zero_grad()
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from selbp._checks import shown
from selbp.integrations.ranks import gathered, own
from selbp.training.per_call import PerCall
from selbp.training.pooled import Scale, backward_of
from selbp.training.step import SelectiveBackprop
from selbp.types import Selection


class AcceleratedStep(SelectiveBackprop):
    """A :class:`selbp.SelectiveBackprop` that counts optimizer steps, and is saved, as the accelerator does.

    Parameters
    ----------
    accelerator : accelerate.Accelerator
        Its ``sync_gradients`` tells which calls end an optimizer step. The step registers itself for checkpointing:
        ``save_state`` and ``load_state`` take it along, every process with a state of its own.
    model : nn.Module
        What ``accelerator.prepare`` returned.
    **options
        As for :class:`selbp.SelectiveBackprop`.

    Notes
    -----
    ``accelerator.backward`` divides by the number of accumulated minibatches, and gradients are averaged over the
    processes. With ``normalizer``, which counts the targets of all of them in all processes, the loss is scaled so that
    the optimizer is given the gradient of their mean. :meth:`backward` calls ``accelerator.backward`` itself.

    Examples
    --------
    >>> step = AcceleratedStep(accelerator, model, selector=selbp.TopLoss(), keep=0.25)  # doctest: +SKIP
    >>> accelerator.backward(step(inputs, target))  # doctest: +SKIP
    """

    def __init__(self, accelerator: Any, model: nn.Module, **options: Any) -> None:
        if not hasattr(accelerator, "sync_gradients") or not hasattr(accelerator, "register_for_checkpointing"):
            raise TypeError(f"accelerator must be an accelerate.Accelerator, got {shown(accelerator)}")
        if options.get("micro_batch") is not None and getattr(accelerator, "distributed_type", "") == "DEEPSPEED":
            raise ValueError("micro_batch= has several backwards a step, and DeepSpeed takes a step after each")
        if "auto_advance" in options:
            raise TypeError("auto_advance is not for this step: it counts the accelerator's optimizer steps")
        super().__init__(model, auto_advance=False, **options)
        self.accelerator = accelerator
        accelerator.register_for_checkpointing(self)

    def __call__(
        self,
        inputs: Any,
        target: Any = None,
        *,
        normalizer: float | Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        selection: Selection | None = None,
        **per_sample: Tensor,
    ) -> Tensor:
        """One minibatch: returns the scalar for ``accelerator.backward``. See :class:`selbp.SelectiveBackprop`."""
        loss = super().__call__(
            inputs,
            target,
            normalizer=normalizer,
            num_items_in_batch=num_items_in_batch,
            selection=selection,
            **per_sample,
        )
        self._advance_with(selection)
        factor = self._factor(normalizer, num_items_in_batch)
        return loss if factor == 1 else loss * factor

    def backward(
        self,
        inputs: Any,
        target: Any = None,
        *,
        scale: Scale = 1.0,
        normalizer: float | Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        selection: Selection | None = None,
        **per_sample: Tensor,
    ) -> Tensor:
        """One minibatch and ``accelerator.backward``, as ``micro_batch`` needs it. Returns the mean loss, detached.

        See :meth:`selbp.SelectiveBackprop.backward`. What the accelerator multiplies losses by needs no ``scale``.
        """
        factor = self._factor(normalizer, num_items_in_batch)
        run = backward_of(scale, lambda loss: self.accelerator.backward(loss * factor))
        call = PerCall.of(normalizer, num_items_in_batch, selection)
        mean = self._with_backward(inputs, target, call, per_sample, run)
        self._advance_with(selection)
        return mean

    def _advance_with(self, selection: Selection | None) -> None:
        """Advance where the accelerator takes an optimizer step; a second pass, whose rows are given, is none."""
        if self.accelerator.sync_gradients and selection is None:
            self.advance()

    def _factor(self, *normalizers: float | Tensor | None) -> int | float:
        """What undoes the accelerator's mean over minibatches, and that over processes, where a normalizer counts."""
        if all(normalizer is None for normalizer in normalizers):
            return 1
        ranks = 1 if self._ranks is None else self._ranks.size  # one choice for all ranks has that factor already
        return self.accelerator.gradient_accumulation_steps * self.accelerator.num_processes / ranks

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, as the main one saves them: to be called by all of them at once."""
        return gathered(super().state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over this process's part of a :meth:`state_dict`. Raises ValueError where it does not fit."""
        super().load_state_dict(own(state))
