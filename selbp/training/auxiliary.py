"""The auxiliary loss that a model returns beside its logits, such as the load balancing of a mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from selbp._checks import check_number
from selbp.common.distributed import unwrap

NAME = "aux_loss"
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_weight")  # what models call the weight of it


class Auxiliary:
    """Reads ``output.aux_loss``, and weighs it as the model does in its own loss.

    The weight is the model's ``router_aux_loss_coef`` (its own or its config's) where it has one, else 1.
    """

    def __init__(self, model: nn.Module, weight: float | None, taken: bool) -> None:
        if weight is not None:
            weight = check_number("aux_weight", weight, 0.0)
        self._weight = _coefficient(unwrap(model)) if weight is None else weight
        self._taken = taken and self._weight != 0

    def of(self, output: Any) -> Tensor | None:
        """() the weighted auxiliary loss, None where there is none. Raises ValueError where it is no scalar."""
        if not self._taken or type(output) is Tensor:
            return None
        found = output.get(NAME) if isinstance(output, Mapping) else getattr(output, NAME, None)
        if not isinstance(found, Tensor):
            return None
        if found.numel() != 1 or not found.is_floating_point():
            raise ValueError(
                f"the model's {NAME} must be a floating scalar, got {found.dtype} {tuple(found.shape)}: pass "
                "aux_weight=0 to leave it out, or a callable loss that takes it in"
            )
        return found.reshape(()) * self._weight


def add(loss: Tensor, auxiliary: Tensor | None, share: Tensor | None) -> Tensor:
    """``loss`` with the auxiliary one, both times the minibatch's ``share`` of an accumulated batch."""
    if auxiliary is not None:
        loss = loss + auxiliary.to(loss.dtype)
    return loss if share is None else loss * share.to(loss.dtype)


def _coefficient(model: nn.Module) -> float:
    holders = [model, *(module for module in model.modules() if hasattr(module, "config"))]
    for holder in holders:
        config = getattr(holder, "config", None)
        for name in COEFFICIENTS:
            for place in (holder, config, getattr(config, "text_config", None)):
                value = getattr(place, name, None)
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    return float(value)
    return 1.0
