"""The head: the model's last linear layer. Found, checked, and watched through hooks; the model is not edited."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from selbp._torch import version_of
from selbp.common.distributed import unwrap
from selbp.common.hooks import COMPILED, is_compiled, watched
from selbp.common.in_place import Kept, edge_of, hookable, source
from selbp.common.modules import check_hookable
from selbp.training.head_kinds import (
    derived_weights,
    is_adapter,
    is_pointwise,
    layer_of,
    raw_parameter_after,
    through_adapter,
    weight_shape,
    widths,
)


def listed_candidates(model: nn.Module) -> str:
    """The linear layers of ``model`` by name, for an error that asks for ``head=``."""
    names = [name for name, module in unwrap(model).named_modules() if isinstance(module, nn.Linear)]
    return f"candidates: {', '.join(map(repr, names))}" if names else "the model has no nn.Linear"


def find_head(model: nn.Module, head: nn.Module | str | None) -> nn.Module:
    """Return the head: ``head``, a module or its name. For None, the last layer that has parameters, if it is linear.

    ``nn.Linear`` and 1x1 convolutions are linear, also with a parametrized weight. Of a linear layer inside an adapter
    such as LoRA's, the adapter is the head. Raises ValueError that lists the candidates if the head is ambiguous,
    absent, or not of this model.
    """
    inner = unwrap(model)
    names = dict(inner.named_modules())
    candidates = [name for name, module in names.items() if isinstance(module, nn.Linear)]
    listed = listed_candidates(model)
    if isinstance(head, str):
        try:
            found = names[head] if head in names else model.get_submodule(head)
        except AttributeError:
            raise ValueError(f"head {head!r} is not a module of the model; {listed}") from None
    elif isinstance(head, nn.Module):
        if all(head is not module for module in names.values()):
            raise ValueError(f"head must be a module of the model, got another {type(head).__name__}; {listed}")
        found = head
    elif head is not None:
        raise TypeError(f"head must be a module, its name or None, got {type(head).__name__}")
    else:
        candidates = [name for name in candidates if layer_of(names, name) == name]
        owners = (name for name, module in names.items() if next(module.parameters(recurse=False), None) is not None)
        last = [layer_of(names, name) for name in owners]
        if last and is_pointwise(names[last[-1]]):
            candidates = [name for name, module in names.items() if is_pointwise(module)]
        if not candidates or last[-1] != candidates[-1]:
            raise ValueError(f"head is ambiguous: pass head=, the last linear layer; {listed}")
        if (rival := _beside(names, candidates)) is not None:
            raise ValueError(
                f"head is ambiguous, {rival!r} and {candidates[-1]!r} look like two heads side by side: "
                f"pass head=, the one whose output the loss reads; {listed}"
            )
        chosen = through_adapter(names, candidates[-1])
        if (raw := raw_parameter_after(names, chosen)) is not None:
            raise ValueError(
                f"head is ambiguous: the parameter {raw!r} of the model may be what the output of {chosen!r} is "
                f"multiplied with. A head is a layer: pass head={chosen!r} if the loss reads its output, else use "
                f"cut={chosen!r} or a rule that reads losses"
            )
        found = names[chosen]
    check_hookable("head", model, found)
    shape = weight_shape(found)
    if shape is None or (len(shape) != 2 and not is_pointwise(found)):
        raise ValueError(f"head must be a linear layer with a weight (C, d), got {type(found).__name__}; {listed}")
    return found


def _beside(names: dict[str, nn.Module], candidates: list[str]) -> str | None:
    """Return the name of the linear layer before the last one if it looks like a second head, else None.

    It does if both have the same parent and the same input width, and its output cannot be the last layer's input.
    """
    if len(candidates) < 2:
        return None
    before, last = (names[name] for name in candidates[-2:])
    parents = [name.rpartition(".")[0] for name in candidates[-2:]]
    same_place = parents[0] == parents[1] and not isinstance(names[parents[0]], nn.Sequential)
    reads_alike = widths(before)[0] == widths(last)[0] != widths(before)[1]
    return candidates[-2] if same_place and reads_alike else None


def find_clear_head(model: nn.Module) -> nn.Module | None:
    """Return the head if it can be found, else None: a rule that reads only losses runs without, and reports less."""
    try:
        return find_head(model, None)
    except ValueError:
        return None


def check_full_gradient(model: nn.Module, head: nn.Module) -> None:
    """Raise ValueError unless the head's gradient can be replaced: its own, trainable, not shared, not compiled."""
    if is_adapter(head):
        raise ValueError(f'head_gradient="full" needs a plain linear head, but {type(head).__name__} is an adapter')
    if derived := derived_weights(head):
        raise ValueError(
            f'head_gradient="full" needs a head whose weight and bias are parameters of its own, but {derived} of '
            f"{type(head).__name__} come from others, as with weight normalisation, spectral normalisation or pruning: "
            'take that off the head, or pass head_gradient="subset"'
        )
    mine = {id(p) for p in head.parameters(recurse=False)}
    owners = [name for name, p in unwrap(model).named_parameters(remove_duplicate=False) if id(p) in mine]
    if len(owners) > len(mine):
        raise ValueError(f'head_gradient="full" needs a head of its own, but its parameters are tied: {owners}')
    if any(not p.requires_grad for p in head.parameters(recurse=False)):
        raise ValueError('head_gradient="full" needs a trainable head, but it has frozen parameters')
    for module in model.modules():
        compiled = hasattr(module, "_orig_mod") or module._compiled_call_impl is not None
        if compiled and any(part is head for part in module.modules()):
            raise ValueError(
                'head_gradient="full" needs a head outside torch.compile, whose code has its gradient built in'
            )


@dataclass
class Captured:
    """What the head saw in one forward: its input (n, ..., d), detached, and its output (n, ..., C)."""

    head: nn.Module | None = None
    features: Kept | None = None
    logits: Tensor | None = None  # as the model goes on with them
    edge: GradientEdge | None = None  # where their gradient is read, as the head gave them
    calls: int = 0
    _version: int = 0

    def check(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Features and logits. Raises RuntimeError that lists ``model``'s candidates unless the head ran once."""
        if self.calls != 1 or self.features is None or self.logits is None:
            cause = ""
            if self.calls == 0 and all(module is not self.head for module in model.modules()):
                cause = "; the model has not this head any more: build the step after its layers are replaced"
            elif self.calls == 0 and is_compiled(model):
                cause = COMPILED
            raise RuntimeError(
                f"the head must run exactly once in a forward, it ran {self.calls} times: pass head=, the last linear "
                f"layer; {listed_candidates(model)}{cause}"
            )
        return self.features.take(), self.logits

    @property
    def edited(self) -> bool:
        """Whether the model wrote into the head's output after the head."""
        return self.logits is not None and version_of(self.logits) != self._version

    def take(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor, leaf: bool) -> Tensor:
        """Remember one run of the head; returns the output that the model goes on with."""
        self.calls += 1
        self.features = Kept(args[0] if args else next(iter(kwargs.values())))
        self.logits = source(output) if leaf else hookable(output)
        self.edge, self._version = edge_of(self.logits), version_of(self.logits)
        return self.logits


@contextmanager
def capture(head: nn.Module | None, *, leaf: bool = False, optional: bool = False) -> Iterator[Captured]:
    """Watch ``head`` in the forward inside.

    ``leaf`` cuts its output off from the layers below and records what the model does to it afterwards, so that the
    gradient with respect to the logits can be taken in a forward that records nothing else. To be used inside
    ``no_grad``, whose end restores the grad mode. ``optional``: compiled code is left whole, and not watched.
    """
    captured = Captured(head)
    if head is None:
        yield captured
        return

    def watcher(args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        logits = captured.take(args, kwargs, output, leaf)
        if leaf:
            torch.set_grad_enabled(True)
        return logits

    with watched(head, watcher, optional=optional):
        yield captured
