"""The state of a table of scores: what a checkpoint keeps of it, and how a table takes it over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from selbp._checks import check_entries, check_int, check_number, reading, shown
from selbp.sampling.draw import Columns

if TYPE_CHECKING:
    from selbp.sampling.table import ScoreTable


def saved(table: ScoreTable) -> dict[str, Any]:
    """Everything that ``table`` has learned, on the CPU."""
    state: dict[str, Any] = {
        "classes": table.classes or 0,
        "noise": table.noise,
        "time": table._time,
        "prior": table._prior,
        "price": table.price,
    }
    for name, column in zip(Columns._fields, table._columns, strict=True):
        state[name] = column[:-1].detach().cpu().clone()
    for name in ("state", "transition", "counts"):
        value = getattr(table._averages, name)
        state[name] = None if value is None else value.cpu().clone()
    state["irreducible"] = None if table.irreducible is None else table.irreducible.cpu().clone()
    return state


def restore(table: ScoreTable, mine: dict[str, Any], state: Mapping[str, Any]) -> None:
    """Have ``table``, whose own state is ``mine``, take over ``state``. ValueError, and no change, where it misfits."""
    if isinstance(state, Mapping):
        state = {"price": None, **state}  # states were saved without it
    check_entries("state of a ScoreTable", state, mine)
    switches = table.adaptive and state["noise"] in ("symmetric", "class") and state["noise"] != table.noise
    if switches:
        square = torch.zeros(table._require_classes(), table._require_classes(), dtype=torch.float64, device="cpu")
        entry = square if state["noise"] == "class" else None
        mine |= {"noise": state["noise"], "transition": entry, "counts": entry}
    for name in ("classes", "noise"):
        if state[name] != mine[name]:
            raise ValueError(f"the state's {name} is {shown(state[name])}, the table's {shown(mine[name])}")
    with reading("state of a ScoreTable"):
        check_int("the state's time", state["time"], 0)
        check_number("the state's prior", state["prior"], 0.0, 1.0)
        if state["price"] is not None:
            check_number("the state's price", state["price"], 0.0)
    for name, own in mine.items():
        value = state[name]
        if name == "price":
            continue
        if name == "irreducible":
            own = table.probability.cpu() if value is not None else None
        if (own is None) != (value is None) or (isinstance(own, Tensor) and not _same_kind(own, value)):
            raise ValueError(f"the state's {name} must be {shown(own)}, got {shown(value)}")
    if switches:
        table._become(state["noise"])
    for name, column in zip(Columns._fields, table._columns, strict=True):
        column[:-1].copy_(state[name])
    for name in ("state", "transition", "counts"):
        if state[name] is not None:
            getattr(table._averages, name).copy_(state[name])
    irreducible = state["irreducible"]
    table.irreducible = None if irreducible is None else irreducible.to(table.device, copy=True)
    table._time, table._prior, table.price = int(state["time"]), float(state["prior"]), state["price"]


def _same_kind(own: Tensor, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == own.shape and value.dtype == own.dtype
