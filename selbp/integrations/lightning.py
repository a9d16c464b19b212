"""Selective steps in a Lightning module: a callback that counts, saves and logs them.

::

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = ...
            self.step = selbp.SelectiveBackprop(self.model, selector=selbp.TopLoss(), keep=0.25)

        def training_step(self, batch, index):
            return self.step(*batch)

    lightning.Trainer(callbacks=[SelectiveCallback()]).fit(Module(), loader)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:  # the package's older name
    from pytorch_lightning import Callback  # type: ignore[import-not-found, no-redef, assignment, unused-ignore]

from selbp.common.state import load_all
from selbp.cut.insert import InsertedCut
from selbp.cut.module import BackwardCut
from selbp.integrations.ranks import gathered, own
from selbp.integrations.window import Window
from selbp.sampling import AutoSelect
from selbp.training.step import SelectiveBackprop


class SelectiveCallback(Callback):
    """Counts the optimizer steps of a module's selective steps, saves their state in its checkpoints, and logs.

    It finds every :class:`selbp.SelectiveBackprop`, every :class:`selbp.AutoSelect` with its sampler and its table, and
    every cut of :func:`selbp.insert_cut`, that is an attribute of the module. The state of a
    :class:`selbp.BackwardCut` is in the module's own.

    Parameters
    ----------
    log : bool
        Log the figures of :class:`~selbp.integrations.window.Window` every ``log_every_n_steps``.
    prefix : str
        What the logged names begin with; the attribute's name follows where there are several.

    Notes
    -----
    Calls of a step no longer count by themselves: optimizer steps do. Of a batch in which several were taken, as by
    several optimizers, a step counts as many as it had calls, and at least one if it has run since the last one. Each
    process has a state of its own in the checkpoint; to go on, there must be as many processes. The figures of a step
    that did not run are not logged again; the trainer itself repeats what it was told last, until the epoch ends.

    Examples
    --------
    >>> lightning.Trainer(callbacks=[SelectiveCallback()]).fit(module, loader)  # doctest: +SKIP
    """

    def __init__(self, *, log: bool = True, prefix: str = "selective/") -> None:
        super().__init__()
        self._log, self._prefix = log, prefix
        self._parts: dict[str, Any] = {}
        self._names: dict[str, str] = {}  # of the parts, by every name that a checkpoint may have
        self._windows: dict[str, Window] = {}
        self._seen: dict[str, Any] = {}  # each step's last report that its window has
        self._calls: dict[str, int] = {}  # of each step, before this batch
        self._ran: set[str] = set()  # steps that were called since the last optimizer step
        self._taken = 0  # steps of all of the trainer's optimizers, before this batch
        self._saved: Mapping[str, Any] | None = None  # of a checkpoint, until the module is known

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Find the steps of the module, and give them a checkpoint's state."""
        self._parts, self._names = _found(pl_module)
        steps = [name for name, part in self._parts.items() if isinstance(part, SelectiveBackprop)]
        cuts = any(isinstance(part, BackwardCut) for part in pl_module.modules())
        if not self._parts and not cuts:
            raise ValueError(
                f"{type(pl_module).__name__} has no attribute that is a selbp.SelectiveBackprop, a "
                "selbp.AutoSelect or a cut of selbp.insert_cut: build it in the module's __init__"
            )
        self._windows = {name: Window() for name in steps}
        self._seen = {name: self._parts[name]._report for name in steps}
        for name in steps:
            self._parts[name]._auto_advance = False
        self._restore()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from here: the trainer may be a new one, and the steps may have run before."""
        self._taken, self._ran = trainer.global_step, set()
        self._calls = {name: self._parts[name]._calls for name in self._windows}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count the optimizer steps that were taken; log the figures of the steps that ran, where the trainer logs."""
        self._count(trainer.global_step)
        if not self._log:
            return
        due = trainer.global_step % max(1, trainer.log_every_n_steps) == 0
        for name, window in self._windows.items():
            report = self._parts[name]._report
            if report is not self._seen[name]:  # else the step did not run in this batch
                self._seen[name] = report
                window.add(report)
            figures = window.figures() if due else {}
            if figures:
                prefix = self._prefix + (f"{name}/" if len(self._windows) > 1 else "")
                pl_module.log_dict({prefix + key: value for key, value in figures.items()})

    def _count(self, taken: int) -> None:
        """Let each step count the optimizer steps of this batch: ``taken`` are those of all optimizers so far."""
        here, self._taken = taken - self._taken, taken
        for name in self._windows:
            step = self._parts[name]
            calls, self._calls[name] = step._calls - self._calls[name], step._calls
            if calls:
                self._ran.add(name)
            # Of several optimizers that follow one call, each counts in ``taken``.
            for _ in range(min(here, max(1, calls)) if name in self._ran else 0):
                step.advance()
        if here:
            self._ran.clear()

    def state_dict(self) -> dict[str, Any]:
        """The states of all processes, as the main one saves them."""
        return gathered({name: part.state_dict() for name, part in self._parts.items()})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a :meth:`state_dict`, now or when the module is known."""
        self._saved = state_dict
        if self._parts:
            self._restore()

    def _restore(self) -> None:
        if self._saved is None:
            return
        saved, self._saved = {self._names.get(name, name): x for name, x in own(self._saved).items()}, None
        load_all("the checkpoint's steps of the module", self._parts, saved)


def _found(module: Any) -> tuple[dict[str, Any], dict[str, str]]:
    """Attributes of a module that have a state which its own ``state_dict`` has not, and the names by their other ones.

    What several attributes hold is found once. Its other names are those attributes', and what it had in checkpoints
    that went by places.
    """
    held = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    found: list[tuple[str, str, Any]] = []  # name, other name, part
    for name, value in held.items():
        if isinstance(value, AutoSelect):
            own_parts = _parts_of(value).items()
            found += [(f"{name}.{part}", f"{name}.{place}", x) for place, (part, x) in enumerate(own_parts)]
    found += [(name, name, x) for name, x in held.items() if isinstance(x, (SelectiveBackprop, InsertedCut))]
    names: dict[int, str] = {}
    for name, _, part in found:
        names.setdefault(id(part), name)
    parts = {name: part for name, _, part in found if names[id(part)] == name}
    return parts, {known: names[id(part)] for name, other, part in found for known in (name, other)}


def _parts_of(auto: AutoSelect) -> dict[str, Any]:
    """A controller and what it controls, by name."""
    parts = {"step": auto.step}
    for name, candidate in auto.candidates.items():
        if all(candidate.step is not step for step in parts.values()):
            parts[f"step.{name}"] = candidate.step
    return {**parts, "table": auto.table, "sampler": auto.sampler, "controller": auto}
