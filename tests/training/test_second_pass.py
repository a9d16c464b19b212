"""``selection=``: a second pass on given rows belongs to the optimizer step of the call before, as SAM's does."""

import pytest
import torch
from support.training_kit import assert_same, gradients, mlp, samples

import selbp

EXACT = 1e-11
SCHEDULES = {
    "every step": selbp.Schedule(),
    "every second": selbp.Schedule(every=2),
    "the last one": selbp.Schedule(end=1),
    "from the third on": selbp.Schedule(start=2),
    "rows at random between": selbp.Schedule(every=2, between="random"),
}


def double():
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), samples()
    return model, x.double(), y


def run(step, x, y, **options):
    """The gradients of a call and its backward, in micro-batches or not."""
    step.model.zero_grad()
    step.backward(x, y, **options)
    return {name: p.grad.clone() for name, p in step.model.named_parameters()}


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
@pytest.mark.parametrize(
    "options",
    [{"backward": "rows"}, {"backward": "recompute"}, {"micro_batch": 5}, {"scope": "global"}],
    ids=str,
)
@pytest.mark.parametrize("counts", ["by itself", "by hand"])
def test_it_has_the_number_and_the_head_of_the_first_pass(schedule, options, counts):
    model, x, y = double()
    step = selbp.SelectiveBackprop(
        model,
        selector=selbp.GradientMatching(),
        keep=0.25,
        head_gradient="full",
        schedule=schedule,
        auto_advance=counts == "by itself",
        **options,
    )
    for turn in range(4):
        first, report = run(step, x, y), step.report
        for _ in range(2):
            again = run(step, x, y, selection=report.selection)
            assert_same(again, first, rtol=EXACT)
            assert (step.report.step, step.report.selected) == (report.step, report.selected)
        assert report.step == turn and report.selected == schedule.selects(turn)
        if counts == "by hand":
            step.advance()
        assert step.optimizer_step == turn + 1


def test_after_an_advance_it_is_still_of_the_call_before():
    """A wrapper may count before the optimizer has stepped, as the one for Accelerate does."""
    model, x, y = double()
    step = selbp.SelectiveBackprop(
        model, selector=selbp.TopLoss(), keep=0.25, auto_advance=False, schedule=selbp.Schedule(every=2)
    )
    for turn in range(3):
        step(x, y).backward()
        selection = step.report.selection
        step.advance()
        step(x, y, selection=selection).backward()
        assert step.report.step == turn and step.report.selected == (turn != 1)


def test_a_resumed_step_numbers_it_as_the_one_that_was_saved():
    model, x, y = double()
    made = [selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25) for _ in range(2)]
    for _ in range(3):
        made[0](x, y).backward()
    selection = made[0].report.selection
    made[1].load_state_dict(made[0].state_dict())
    for step in made:
        step(x, y, selection=selection).backward()
        assert step.report.step == 2
        step(x, y).backward()
        assert step.report.step == 3


def test_all_rows_are_scored_for_a_full_head_alone():
    model, x, y = double()
    for head_gradient in ("subset", "full"):
        step = selbp.SelectiveBackprop(
            model, selector=selbp.TopLoss(), keep=0.25, head_gradient=head_gradient, backward="recompute"
        )
        gradients(model, step(x, y))
        gradients(model, step(x, y, selection=step.report.selection))
        assert step.report.scored == (head_gradient == "full")
