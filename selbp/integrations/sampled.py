"""Batches drawn by a table of scores, in a trainer that makes its own loader and its own step."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from selbp._checks import shown
from selbp.common.exchange import Ranks
from selbp.common.state import load_all
from selbp.sampling import AutoSelect, ScoreTable
from selbp.training.automatic import auto_select, begin_alike, sampler_and_options
from selbp.training.step import SelectiveBackprop

DRAWN = {  # what auto_select draws by, and its defaults
    name: parameter.default
    for name, parameter in inspect.signature(auto_select).parameters.items()
    if name in inspect.signature(sampler_and_options).parameters and name != "dataset"
}
CONTROLLED = set(inspect.signature(AutoSelect).parameters) - {"step", "sampler", "others"}


class _StepToCome:
    """Stands in for the step, which a trainer builds after the first batches are drawn."""

    def __init__(self, table: ScoreTable) -> None:
        self.table = table
        self.made: SelectiveBackprop | None = None

    @property
    def _ranks(self) -> Ranks | None:
        return None if self.made is None else self.made._ranks

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        assert self.made is not None
        return self.made(*args, **kwargs)


class Sampled:
    """Table, sampler and controller of one training, made when the loader is.

    ``options`` are those of :func:`selbp.auto_select` and :class:`selbp.AutoSelect`, without the step's own. ``rows``
    is k where they do not give it, ``steps`` how many steps are planned. Raises TypeError for any other option.
    """

    def __init__(self, options: Any, rows: int, steps: int | None) -> None:
        unknown = sorted(set(options) - set(DRAWN) - CONTROLLED) if isinstance(options, Mapping) else None
        if unknown is None or unknown:
            known = ", ".join(sorted({*DRAWN, *CONTROLLED}))
            got = shown(options) if unknown is None else ", ".join(map(str, unknown))
            raise TypeError(f"sampling must be a dict with some of {known}, got {got}")
        given = {name: options[name] for name in DRAWN if name in options}
        self._drawn = {**DRAWN, "k": rows, "steps": steps, **given}
        self._controlled = {name: options[name] for name in CONTROLLED & set(options)}
        self._used = True  # by a training, or there is none yet
        self.step_options: dict[str, Any] = {}

    def loader(self, dataset: Any, read: Any, **how: Any) -> DataLoader[Any]:
        """A loader of ``read``, which is ``dataset`` as the model takes it. The proxy sees ``dataset``.

        Each training begins with a table of its own.
        """
        if self._used:
            sampler, self.step_options = sampler_and_options(dataset, **self._drawn)
            self._step, self._used = _StepToCome(sampler.table), False
            self.controller = AutoSelect(self._step, sampler, **self._controlled)
        # Without a generator of its own, each pass over the loader takes a number from torch's, and a training that is
        # resumed in the middle of an epoch makes one pass more. The loader draws on the default device.
        own = torch.Generator(torch.get_default_device()).manual_seed(torch.initial_seed())
        return DataLoader(read, batch_sampler=self.controller.sampler, generator=own, **how)

    @property
    def table(self) -> ScoreTable:
        """The table of the loader that was made last."""
        return self._step.table

    def control(self, step: SelectiveBackprop) -> AutoSelect:
        """Run ``step`` from now on, by the controller that is returned."""
        begin_alike(step, self.table)
        self._step.made, self._used = step, True
        return self.controller

    def _parts(self) -> dict[str, Any]:
        sampler = self.controller.sampler
        return {"table": sampler.table, "sampler": sampler, "controller": self.controller}

    def state_dict(self) -> dict[str, Any]:
        """The table's, the sampler's and the controller's."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`, before the loader is read.

        Raises ValueError, and changes nothing, where it does not fit.
        """
        load_all("state of the sampling", self._parts(), state)
