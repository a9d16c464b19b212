"""Runs whose samples are drawn by a table of scores, before anything of them is read.

An arm asks for it among its options: ``full@keep=48,sampling=scored,pool=256``. A step then reads as many samples as
the arm keeps, and every one of them trains; with ``sampling=rho`` it reads ``pool`` samples, and the rule keeps some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from selbp import AutoSelect, NoiseAwareCrossEntropy, SelectiveBackprop
from selbp.sampling import ScoredBatchSampler, ScoreTable, TableSampler, fit_proxy, info_batch, rho_loss
from selbp.sampling.table import NoiseModel
from selbp_study.config import RunConfig
from selbp_study.data import Split
from selbp_study.samples import BatchOrder

WAYS = ("scored", "uniform", "auto", "info-batch", "rho")


@dataclass(frozen=True)
class Sampling:
    """How an arm draws its samples. The defaults are the whole: proxy, history, responsibility, noise-aware loss."""

    sampling: str  # by the table's odds, uniformly, as a controller decides, or as a paper says
    pool: int = 256  # samples that a batch is drawn from
    power: float = 0.5  # of the hardness
    floor: float = 0.1  # added to all odds, relative to their mean
    proxy: bool = True  # whether a small network fills the table before the training; its seconds are charged
    passes: int | None = None  # over the data, of that network; None: as many as it takes to see noise
    history: bool = True  # whether the rows that train write their scores back
    responsibility: bool = True  # whether a label may be believed to be wrong
    aware: bool = True  # whether the loss is the noise-aware one
    noise: NoiseModel = "auto"  # or "symmetric", "class"

    @classmethod
    def split(cls, options: Mapping[str, Any]) -> tuple[Sampling | None, dict[str, Any]]:
        """What of an arm's ``options`` is about sampling, and the rest, which is the step's. Raises ValueError."""
        names = {field.name for field in fields(cls)}
        own = {name: value for name, value in options.items() if name in names}
        rest = {name: value for name, value in options.items() if name not in names}
        if not own:
            return None, rest
        if own.get("sampling") not in WAYS:
            raise ValueError(f"sampling must be one of {', '.join(WAYS)}, got {own.get('sampling')!r}")
        return cls(**own), rest


class SampledOrder:
    """The samples of each step, drawn by a table; stands where :class:`selbp_study.samples.BatchOrder` does.

    Unlike there, what a step reads depends on the steps before it: steps are asked for one after the other, and the
    state is a part of the run's. ``clock`` times the proxy, which the run is charged for.
    """

    charged = True  # a draw is a part of the step

    def __init__(
        self, options: Sampling, config: RunConfig, split: Split, n_classes: int, clock: Callable[[], float]
    ) -> None:
        classes = n_classes if split.labels.dim() == 1 else None
        self.options, self.config, self.split = options, config, split
        believed = classes is None or not options.responsibility
        self.table = ScoreTable(len(split), classes, noise="none" if believed else options.noise)
        self.step_options: dict[str, Any] = {"keep": 1.0}
        self.proxy_seconds = 0.0
        proxy = None
        if options.proxy and classes is not None:
            # A process's first optimizer imports hundreds of modules of torch, which is no part of the proxy's price.
            torch.optim.SGD([torch.zeros(1, requires_grad=True)])
            started = clock()
            data = torch.utils.data.TensorDataset(*split.batch(torch.arange(len(split))))
            proxy = fit_proxy(
                data, self.table, passes=options.passes, seed=config.seed, halves=options.sampling == "rho"
            )
            self.proxy_seconds = clock() - started
        self.sampler = self._sampler(proxy)
        if options.history:
            self.step_options["table"] = self.table
        if options.aware and not believed:
            self.step_options["loss"] = NoiseAwareCrossEntropy(self.table)
        self._batches: Any = iter(())

    def _sampler(self, proxy: Any) -> TableSampler:
        rows, seed = self.config.kept(), self.config.seed
        pool = max(rows, min(self.options.pool, len(self.split)))
        self.pool = rows if self.options.sampling in ("info-batch", "uniform") else pool  # samples to choose among
        if self.options.sampling == "info-batch":
            epochs = max(1, -(-self.config.steps * rows // len(self.split)))
            return info_batch(self.table, rows, epochs=epochs, seed=seed)
        if self.options.sampling == "rho":
            if proxy is None:
                raise ValueError("sampling=rho needs a proxy and one class a sample, which a text has not")
            sampler, arguments = rho_loss(self.table, proxy, rows, pool, seed=seed)
            self.step_options["keep"] = arguments["keep"]
            return sampler
        sampler = ScoredBatchSampler(
            self.table, rows, pool, power=self.options.power, floor=self.options.floor, seed=seed
        )
        sampler.use(scored=self.options.sampling == "scored")
        return sampler

    def steps_by(self, step: SelectiveBackprop) -> Callable[..., Tensor]:
        """What is called with each minibatch: ``step``, or the controller around it.

        Both of its candidates run as many rows, so that one costs what the other does: a price by the clock would make
        the run another one each time.
        """
        if self.options.sampling != "auto":
            return step
        assert isinstance(self.sampler, ScoredBatchSampler)
        self.controller = AutoSelect(step, self.sampler, prices={"random": 1.0, "drawn": 1.0})
        return self.controller

    def indices(self, step: int) -> Tensor:
        """(k,) int64 sample numbers of the next step."""
        del step  # the sampler counts
        drawn = next(self._batches, None)
        if drawn is None:
            self._batches = iter(self.sampler)
            next(self._batches)
        drawn = self.table.issued.draws[-1].ids  # as the loader's list has them
        if not self.options.history:
            self.sampler.skip()
        return drawn

    def elsewhere(self, step: int) -> Tensor:
        """As many samples as a step reads, without a draw."""
        generator = torch.Generator().manual_seed(step)
        return torch.randint(len(self.split), (getattr(self.sampler, "k", 1),), generator=generator)

    def figures(self) -> dict[str, float | None]:
        """Headroom, noise share and coverage, for a line of the log; None for what is not known yet."""
        found = {name: float(getattr(self.table, name)) for name in ("headroom", "noise_share", "coverage")}
        return {name: value if value == value else None for name, value in found.items()}

    def state(self) -> dict[str, Any]:
        """What the next draw depends on."""
        state = {"table": self.table.state_dict(), "sampler": self.sampler.state_dict(), "seconds": self.proxy_seconds}
        return state | ({"controller": self.controller.state_dict()} if self.options.sampling == "auto" else {})

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The inverse of :meth:`state`. Raises ValueError for another run's."""
        self.table.load_state_dict(state["table"])
        self.sampler.load_state_dict(state["sampler"])
        self.proxy_seconds = float(state["seconds"])
        if self.options.sampling == "auto":
            self.controller.load_state_dict(state["controller"])
        self._batches = iter(self.sampler)


def order_of(
    options: Sampling | None, config: RunConfig, split: Split, n_classes: int, clock: Callable[[], float]
) -> BatchOrder | SampledOrder:
    """Whole minibatches in a random order, or samples drawn by a table."""
    if options is None:
        return BatchOrder(len(split), config.batch_size, config.seed)
    return SampledOrder(options, config, split, n_classes, clock)
