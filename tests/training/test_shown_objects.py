"""``repr`` of what a user holds: one line with what it does."""

import torch
from support.sampling_kit import data, model
from torch import nn

import selbp

X, Y = torch.randn(16, 6), torch.randint(0, 4, (16,))


def test_a_step_says_its_rule_its_keep_its_backward_and_its_steps():
    step = selbp.SelectiveBackprop(model(), selector=selbp.LossRank(), keep=0.25)
    says = "SelectiveBackprop(Sequential, selector=LossRank(weights='mean'), keep=0.25, backward={}, optimizer_step={})"
    assert repr(step) == says.format("'auto'", 0)
    step(X, Y).backward()
    assert repr(step) == says.format(repr(step.report.backward), 1)


def test_a_step_shows_the_model_inside_a_wrapper_and_its_cut():
    class Mine(nn.Linear):
        """Anybody's."""

    step = selbp.SelectiveBackprop(torch.compile(Mine(6, 4)), selector=selbp.Random(), keep=4, backward="recompute")
    assert repr(step).startswith("SelectiveBackprop(Mine, selector=Random(") and "backward='recompute'" in repr(step)
    step = selbp.SelectiveBackprop(model(), selector=selbp.GradientMatching(), keep=4, cut="1", backward="auto")
    assert "keep=4, cut='1', backward='rows', optimizer_step=0)" in repr(step)


def test_controller_and_sampler_say_what_is_in_use():
    auto = selbp.auto_select(model(), data(), classes=4, k=8, pool=40, proxy=False, noise="none")
    for x, y in torch.utils.data.DataLoader(data(), batch_sampler=auto.sampler):
        auto(x, y).backward()
        break
    assert repr(auto) == "AutoSelect(current='random' of ['random', 'drawn'], steps=1)"
    table = "ScoreTable(200, classes=4, noise='none', balance=None)"
    assert repr(auto.sampler) == f"ScoredBatchSampler({table}, k=8, pool=40, epoch=0, consumed=1)"
