"""A step's place in the training: optimizer steps counted, the last report, and what a resumed run needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from selbp.common.batch import Batch
from selbp.common.distributed import check_not_bypassed, unwrap
from selbp.common.exchange import Ranks
from selbp.common.state import CHOICE_ENTRIES, ChoiceState, check_counts
from selbp.ops._backends import capturing
from selbp.sampling.table import ScoreTable
from selbp.training.interaction import SamplesInteractError
from selbp.training.kinds import StepKinds
from selbp.training.losses import CrossEntropy
from selbp.training.options import StepOptions
from selbp.training.pace import Pace
from selbp.training.per_call import PerCall
from selbp.training.pooled import Backward
from selbp.training.report import StepReport
from selbp.training.scores import with_irreducible


class CountedStep(StepKinds):
    """Runs a minibatch and counts it, keeps the last report, and has a state to save."""

    def __init__(self, model: nn.Module, options: StepOptions) -> None:
        self._places = options.places()
        super().__init__(model, options)
        self._choice = ChoiceState(self.selector, self.generator)
        self._auto_advance = options.auto_advance
        self._synchronised = False  # whether the gradients are known to reach the other ranks
        self._unequal = False  # whether the sampler weighted the rows of the last call that chose
        self._report: StepReport | None = None
        self._calls = 0  # whose rows were not given, of this object
        self._pace = Pace(self.selector, self.keep)

    def _counted(
        self, inputs: Any, target: Any, call: PerCall, per_sample: dict[str, Tensor], backward: Backward | None
    ) -> Tensor:
        """Run one minibatch and count it; whatever is raised, the step is left as it was."""
        table, ids = self._table, None
        if table is not None:
            ids = per_sample.pop("ids", None)
        batch = Batch.of(inputs, target, per_sample, self._places)
        if self._pooled is None:
            call.check(batch.n, batch.device)
        if call.given is not None and self._full_head and self._unequal:
            raise ValueError(
                "selection= with head_gradient='full' needs the mean of all rows, and the sampler's weights='unbiased' "
                "for them are known in the call before only: pass weights='mean' to the sampler, or "
                "head_gradient='subset'"
            )
        # A second pass, whose rows are given, is of a batch that has been counted.
        draw = None if table is None or call.given is not None else table.next(batch.n, ids)
        if table is not None and draw is not None:
            batch = with_irreducible(batch, table, draw)
        self._synchronised = self._synchronised or check_not_bypassed(self.model)
        if self._pace.due and not capturing(batch.device):
            self._pace.measure(self.model, batch, self._mean_loss)
        # In a capture nothing runs that could be put back, and a generator's state must not be read.
        restore = _nothing if capturing(batch.device) else self._choice.snapshot()
        try:
            try:
                loss, report = self._run(batch, call, draw, backward)
            except SamplesInteractError:
                if not self._strategy.auto or self._scoring != "same":
                    raise
                restore()
                self._strategy.settle("rows", "samples interact: a second forward of some would train another loss")
                loss, report = self._run(batch, call, draw, backward)
        except BaseException:
            restore()
            raise
        self._report = report
        if table is not None and draw is not None:
            table.issued.done(draw)
            report.table = table
        if call.given is None:
            self._unequal = draw is not None and draw.weights is not None
            self._count()
        if not self._pace.done:  # last: where a warning is an error, the step is counted
            self._pace.add(report)
        return loss

    def _count(self) -> None:
        """Count a call, one whose rows are not given."""
        self._calls += 1
        self._last = self._step
        self._step += self._auto_advance

    @property
    def report(self) -> StepReport:
        """The last step's figures. Raises RuntimeError before the first one."""
        if self._report is None:
            raise RuntimeError("there is no report before the first step")
        return self._report

    @property
    def table(self) -> ScoreTable | None:
        """The table of scores that the step writes to."""
        return self._table

    @property
    def _ranks(self) -> Ranks | None:
        """The processes among whose samples one choice is made; None without ``scope="global"``."""
        return None if self._pooled is None else self._pooled._ranks

    @property
    def optimizer_step(self) -> int:
        """How many optimizer steps have been counted."""
        return self._step

    def advance(self) -> None:
        """Count one optimizer step: call it after ``optimizer.step()`` when gradients are accumulated.

        From the first call on, calls of the step no longer count by themselves; those before it were one step.
        """
        self._step = 1 if self._auto_advance else self._step + 1
        self._auto_advance = False

    def __repr__(self) -> str:
        model, way = type(unwrap(self.model)).__name__, "auto" if self._strategy.undecided else self._strategy.name
        how = f"backward={way!r}" if self._cut is None else f"cut={self._cut.name!r}, backward={self._cut.strategy!r}"
        options = f"selector={self.selector!r}, keep={self.keep}, {how}, optimizer_step={self._step}"
        return f"{type(self).__name__}({model}, {options})"

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to continue bit for bit, beside model and optimizer.

        Without a ``generator`` of its own, draws come from torch's global one, whose state is the caller's to save.
        """
        counts = {"optimizer_step": self._step, "auto_advance": self._auto_advance, "backward": self._strategy.decision}
        last = self._criterion.told if isinstance(self._criterion, CrossEntropy) else None
        return {**counts, "classes_last": last, "buffers": self._buffers.state(), **self._choice.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Raises ValueError, and changes nothing, where it does not fit."""
        count, auto, backward, last, buffers = check_counts(state)
        self._choice.load_state_dict({name: state[name] for name in CHOICE_ENTRIES})
        self._step, self._auto_advance = count, auto
        self._last = max(count - auto, 0)
        self._strategy.restore(backward)
        self._buffers.load(buffers)
        if isinstance(self._criterion, CrossEntropy):
            self._criterion.tell(last)


def _nothing() -> None:
    """There is nothing to put back."""
