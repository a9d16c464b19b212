"""Runs whose samples are drawn by a table of scores, before anything of them is read.

An arm asks for it among its options: ``full@keep=48,sampling=scored,pool=256``. The arm's keep is then the number of
samples that a step reads, and every one of them trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from selbp import NoiseAwareCrossEntropy
from selbp.sampling import ScoredBatchSampler, ScoreTable, fit_proxy
from selbp_study.data import Split
from selbp_study.samples import Order


@dataclass(frozen=True)
class Sampling:
    """How an arm draws its samples. The defaults are the whole: proxy, history, responsibility, noise-aware loss."""

    sampling: Literal["scored", "uniform"]  # by the table's odds, or uniformly
    pool: int = 256  # samples that a batch is drawn from
    power: float = 0.5  # of the hardness
    floor: float = 0.1  # added to all odds, relative to their mean
    proxy: bool = True  # whether a small network fills the table before the training; its seconds are charged
    history: bool = True  # whether the rows that train write their scores back
    responsibility: bool = True  # whether a label may be believed to be wrong
    aware: bool = True  # whether the loss is the noise-aware one
    noise: Literal["symmetric", "class"] = "symmetric"

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Sampling | None, dict[str, Any]]:
        """What of an arm's ``options`` is about sampling, and the rest, which is the step's. Raises ValueError."""
        names = {field.name for field in fields(cls)}
        own = {name: value for name, value in options.items() if name in names}
        rest = {name: value for name, value in options.items() if name not in names}
        if not own:
            return None, rest
        if own.get("sampling") not in ("scored", "uniform"):
            raise ValueError(f"sampling must be scored or uniform, got {own.get('sampling')!r}")
        return cls(**own), rest


class SampledOrder:
    """The samples of each step, drawn by a table; stands where :class:`selbp_study.samples.Order` does.

    Unlike there, what a step reads depends on the steps before it: steps are asked for one after the other, and the
    state is a part of the run's.
    """

    def __init__(
        self, options: Sampling, split: Split, n_classes: int, rows: int, seed: int, clock: Callable[[], float]
    ) -> None:
        if split.labels.dim() != 1:
            raise ValueError("sampling=scored needs one label a sample")
        self.options, self.split, self.clock = options, split, clock
        self.table = ScoreTable(len(split), n_classes, noise=options.noise if options.responsibility else "none")
        self.sampler = ScoredBatchSampler(
            self.table, rows, max(rows, min(options.pool, len(split))), power=options.power, floor=options.floor,
            seed=seed,
        )  # fmt: skip
        self.sampler.use(scored=options.sampling == "scored")
        self.seed = seed
        self.proxy_seconds = 0.0
        self._batches: Any = iter(())

    def prepare(self) -> None:
        """Fill the table, where the arm does; its time is in ``proxy_seconds``."""
        if self.options.proxy:
            started = self.clock()
            every = torch.arange(len(self.split))
            data = torch.utils.data.TensorDataset(*self.split.batch(every))
            fit_proxy(data, self.table, seed=self.seed)
            self.proxy_seconds = self.clock() - started

    def step_options(self) -> dict[str, Any]:
        """What the training step is given: every sample that is read trains."""
        options: dict[str, Any] = {"keep": 1.0}
        if self.options.history:
            options["table"] = self.table
        if self.options.aware:
            options["loss"] = NoiseAwareCrossEntropy(self.table)
        return options

    def indices(self, step: int) -> Tensor:
        """(k,) int64 sample numbers of the next step."""
        del step  # the sampler counts
        drawn = next(self._batches, None)
        if drawn is None:
            self._batches = iter(self.sampler)
            drawn = next(self._batches)
        if not self.options.history:
            self.sampler.skip()
        return torch.as_tensor(drawn)

    def state(self) -> dict[str, Any]:
        """What the next draw depends on."""
        return {
            "table": self.table.state_dict(), "sampler": self.sampler.state_dict(), "seconds": self.proxy_seconds,
        }  # fmt: skip

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`. Raises ValueError for another run's."""
        self.table.load_state_dict(state["table"])
        self.sampler.load_state_dict(state["sampler"])
        self.proxy_seconds = float(state["seconds"])
        self._batches = iter(self.sampler)


def order_of(
    options: Sampling | None, split: Split, n_classes: int, rows: int, batch_size: int, seed: int,
    clock: Callable[[], float],
) -> Order | SampledOrder:  # fmt: skip
    """Whole minibatches in a random order, or samples drawn by a table."""
    if options is None:
        return Order(len(split), batch_size, seed)
    return SampledOrder(options, split, n_classes, rows, seed, clock)
