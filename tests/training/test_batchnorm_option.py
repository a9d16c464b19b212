"""``batchnorm=`` of the step reaches rows, the cut, and what ``"auto"`` decides by."""

import copy

import pytest
import torch
from support.training_kit import assert_same, gradients
from torch import nn

import selbp


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 36, 5),
    ).double()


def minibatch():
    return torch.randn(16, 3, 8, 8, dtype=torch.float64), torch.randint(0, 5, (16,))


def by_hand(model, batch, selection, batchnorm):
    losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return (selbp.select(losses, selection.indices, batchnorm=batchnorm) * selection.weights).sum()


def differ(a, b):
    return any(not torch.allclose(a[name], b[name], rtol=1e-6) for name in a)


@pytest.mark.parametrize("batchnorm", ["exact", "subset"])
@pytest.mark.parametrize("backward", ["rows", "auto"])
def test_rows_follow_it(backward, batchnorm):
    model, batch = network(), minibatch()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=4, backward=backward, batchnorm=batchnorm)
    if backward == "auto":
        step.load_state_dict({**step.state_dict(), "backward": "rows"})
    other = copy.deepcopy(model)
    got = gradients(model, step(*batch))
    selection = step.report.selection
    assert_same(got, gradients(other, by_hand(other, batch, selection, batchnorm)), rtol=1e-9)
    wrong = "exact" if batchnorm == "subset" else "subset"
    assert differ(got, gradients(other, by_hand(other, batch, selection, wrong)))


@pytest.mark.parametrize("batchnorm", ["exact", "subset"])
def test_the_cut_follows_it(batchnorm):
    model, batch = network(), minibatch()
    options = {"selector": selbp.GradientMatching(), "keep": 4, "batchnorm": batchnorm}
    step = selbp.SelectiveBackprop(model, cut="5", **options)
    below, above = copy.deepcopy(model[:6]), copy.deepcopy(model[6:])
    by_module = nn.Sequential(*below, selbp.BackwardCut(**options), *above)
    got = list(gradients(model, step(*batch)).values())
    want = list(gradients(by_module, nn.functional.cross_entropy(by_module(batch[0]), batch[1])).values())
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)
    assert bool(step.report.cut.dense) == (batchnorm == "exact")


def test_auto_decides_by_what_it_would_run(monkeypatch):
    seen = []
    from selbp.training import analysis, strategies

    def watch(model, batch, k, losses, **options):
        seen.append(options.get("batchnorm"))
        return analyse(model, batch, k, losses, **options)

    analyse = analysis.analyse_batch
    monkeypatch.setattr(strategies, "analyse_batch", watch)
    reasons = {}
    for batchnorm in ("exact", "subset"):
        step = selbp.SelectiveBackprop(network(), selector=selbp.TopLoss(), keep=4, batchnorm=batchnorm)
        step(*minibatch()).backward()
        reasons[batchnorm] = step.report.backward_reason
    assert seen == ["exact", "subset"]
    assert "not on rows" in reasons["exact"] and "not on rows" not in reasons["subset"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batchnorm": "fast"}, "batchnorm must be 'exact' or 'subset', got 'fast'"),
        ({"batchnorm": "subset", "backward": "recompute"}, 'backward="recompute" has none'),
        ({"batchnorm": "subset", "backward": "recompute", "cut": "5"}, 'backward="recompute" has none'),
        ({"batchnorm": "subset", "scoring_precision": "bfloat16"}, 'backward="recompute" has none'),
    ],
    ids=["unknown", "recompute", "cut recompute", "scoring precision"],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        selbp.SelectiveBackprop(network(), selector=selbp.GradientMatching(), keep=4, **options)
