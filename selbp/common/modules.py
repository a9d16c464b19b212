"""Which module of a model an argument means."""

from __future__ import annotations

from torch import nn
from torch.jit import RecursiveScriptModule, ScriptModule  # type: ignore[attr-defined]

from selbp.common.distributed import unwrap


def find_place(argument: str, model: nn.Module, place: nn.Module | str) -> tuple[str, nn.Module]:
    """The name and the module of ``model`` that ``place`` is, or names. Raises TypeError or ValueError."""
    names = {name: module for name, module in unwrap(model).named_modules() if name}
    if isinstance(place, str):
        module = {**dict(model.named_modules()), **names}.get(place)  # a wrapper such as DDP has its own names
        if not place or module is None:
            raise ValueError(f"{argument}={place!r} names no module of the model; it has {', '.join(names)}")
        name = place
    else:
        found = [name for name, module in names.items() if module is place]
        if not found:
            raise ValueError(
                f"{argument} must be a module of the model, or its name, got another {type(place).__name__}"
            )
        name, module = found[0], place
    check_hookable(argument, model, module)
    return name, module


def check_hookable(argument: str, model: nn.Module, module: nn.Module) -> None:
    """Raise TypeError for a ``module`` of ``model`` that TorchScript runs: it calls no hooks there.

    A traced module calls those of its outermost module.
    """
    if not isinstance(module, ScriptModule):
        return
    outer = (m for m in model.modules() if m is not module and isinstance(m, ScriptModule))
    if isinstance(module, RecursiveScriptModule) or any(module is inner for m in outer for inner in m.modules()):
        raise TypeError(
            f"{argument} must be a module that runs in Python: this one is a part of TorchScript, which calls no "
            "hooks. Leave it out of torch.jit.script and torch.jit.trace, or use a rule that reads losses alone, such "
            "as TopLoss"
        )
