"""Rows whose label is ignored run as they came: batch norm looks at them in every kind of step."""

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from support.training_kit import assert_same, gradients
from torch import nn
from torch.nn import functional as F

import selbp
from selbp.training import interaction

EXACT = 1e-11  # of float64, through a few layers
N = 12


@dataclass(frozen=True)
class EveryRow(selbp.Full):
    """Full, but chosen after a forward that scores."""

    needs: ClassVar[str] = "gradients"


class Centred(nn.Module):
    """Couples the samples, and is no normalisation that anybody knows of."""

    def forward(self, x):
        return x - x.mean(0)


class Balanced(nn.Module):
    """A loss of its own beside the logits."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return {"logits": self.head(h), "aux_loss": h.square().mean()}


MODELS = {
    "batch norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)),
    "two, of images": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3),
    ),
}  # fmt: skip
ALL = selbp.Selection(torch.arange(N), torch.ones(N, dtype=torch.float64) / N)

# What keeps all rows with equal weights: options of the step, and of the call.
KINDS = {
    "unscored": ({"selector": selbp.Full()}, {}),
    "unscored, drawn": ({"selector": selbp.Random()}, {}),
    "outside the schedule": ({"selector": selbp.TopLoss(), "schedule": selbp.Schedule(start=9)}, {}),
    "between choices": ({"selector": selbp.TopLoss(), "schedule": selbp.Schedule(0, None, 2, "random")}, {}),
    "recomputed": ({"selector": EveryRow(), "backward": "recompute"}, {}),
    "recomputed, spare slots": ({"selector": selbp.TopLoss(weights="batch"), "backward": "recompute"}, {}),
    "scored in evaluation mode": ({"selector": EveryRow(), "scoring": "eval"}, {}),
    "rows": ({"selector": EveryRow(), "backward": "rows"}, {}),
    "rows, spare slots": ({"selector": selbp.TopLoss(weights="batch"), "backward": "rows"}, {}),
    "full head, recomputed": ({"selector": selbp.Full(), "head_gradient": "full", "backward": "recompute"}, {}),
    "full head, rows": ({"selector": selbp.Full(), "head_gradient": "full", "backward": "rows"}, {}),
    "cut": ({"selector": selbp.Random(), "cut": "0"}, {}),
    "cut, recomputed": ({"selector": selbp.Random(), "cut": "0", "backward": "recompute"}, {}),
    "one micro-batch": ({"selector": selbp.Full(), "micro_batch": N}, {}),
    "one micro-batch, drawn": ({"selector": selbp.Random(), "micro_batch": N}, {}),
    "one micro-batch, scored": ({"selector": EveryRow(), "micro_batch": N}, {}),
    "one process of all": ({"selector": EveryRow(), "scope": "global"}, {}),
    "given": ({"selector": selbp.TopLoss()}, {"selection": ALL}),
}


def minibatch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 6, generator=generator, dtype=torch.float64) + 3.0  # far from the zeros of a blank row
    y = torch.randint(0, 3, (N,), generator=generator)
    y[[0, 2, 3, 7, 11]] = -100
    return x, y


def buffers(model):
    return {name: buffer.double() for name, buffer in model.named_buffers()}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize(("options", "given"), KINDS.values(), ids=KINDS.keys())
def test_a_step_that_keeps_all_rows_is_the_ordinary_one(options, given, make):
    torch.manual_seed(0)
    model, (x, y) = make().double(), minibatch()
    plain = copy.deepcopy(model)
    step = selbp.SelectiveBackprop(model, keep=1.0, generator=torch.Generator().manual_seed(4), **options)
    for _ in range(2):
        want = gradients(plain, F.cross_entropy(plain(x), y))
        model.zero_grad()
        if "micro_batch" in options:
            step.backward(x, y, **given)
        else:
            step(x, y, **given).backward()
        assert_same({name: p.grad for name, p in model.named_parameters()}, want, rtol=EXACT)
        assert_same(buffers(model), buffers(plain), rtol=EXACT)


@pytest.mark.parametrize("kind", ["unscored", "unscored, drawn", "scored in evaluation mode", "cut", "one micro-batch"])
def test_the_running_statistics_of_instance_norm(kind):
    """It normalises each sample by itself, and keeps the mean over the rows that it is given."""
    torch.manual_seed(0)
    model, (x, y) = nn.InstanceNorm1d(2, track_running_stats=True), minibatch()
    model = nn.Sequential(nn.Unflatten(1, (2, 3)), model, nn.Flatten(), nn.Linear(6, 8), nn.Linear(8, 3)).double()
    plain = copy.deepcopy(model)
    options = {**KINDS[kind][0], "cut": "3"} if kind == "cut" else KINDS[kind][0]
    selbp.SelectiveBackprop(model, keep=1.0, **options).backward(x, y)
    plain(x)
    assert_same(buffers(model), buffers(plain), rtol=EXACT)


@pytest.mark.parametrize("selector", [selbp.Full(), selbp.Random()])
def test_so_is_a_step_before_the_forward_of_a_model_that_couples_samples(selector):
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(6, 8), Centred(), nn.Tanh(), nn.Linear(8, 3)).double(), minibatch()
    got = gradients(model, selbp.SelectiveBackprop(model, selector=selector, keep=1.0)(x, y))
    assert_same(got, gradients(model, F.cross_entropy(model(x), y)), rtol=EXACT)


def test_so_is_one_after_a_forward_that_scored():
    """Where all rows are kept, no forward of a part of them tells that the samples are coupled."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(6, 8), Centred(), nn.Tanh(), nn.Linear(8, 3)).double(), minibatch()
    step = selbp.SelectiveBackprop(model, selector=EveryRow(), keep=1.0, backward="recompute")
    assert_same(gradients(model, step(x, y)), gradients(model, F.cross_entropy(model(x), y)), rtol=EXACT)


@dataclass(frozen=True)
class FirstRows(EveryRow):
    """The first k rows, those without a label too."""

    def choose(self, rows, k):
        return selbp.Selection(torch.arange(k), rows.stats.valid[:k].double() / rows.n)


@pytest.mark.parametrize("model", ["batch norm", "two, of images", "own loss"])
@pytest.mark.parametrize("options", [{}, {"scoring": "eval"}, {"micro_batch": N}], ids=str)
def test_a_part_of_the_rows_is_as_a_forward_of_that_part(model, options):
    torch.manual_seed(0)
    model, (x, y) = (Balanced() if model == "own loss" else MODELS[model]()).double(), minibatch()
    plain = copy.deepcopy(model)
    step = selbp.SelectiveBackprop(model, selector=FirstRows(), keep=0.5, backward="recompute", **options)
    model.zero_grad()
    step.backward(x, y)
    output = plain(x[: N // 2])
    logits, own = (output["logits"], output["aux_loss"]) if isinstance(output, dict) else (output, 0.0)
    mean = F.cross_entropy(logits, y[: N // 2], reduction="sum") / (y != -100).sum()
    assert_same({name: p.grad for name, p in model.named_parameters()}, gradients(plain, mean + own), rtol=EXACT)


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_above_a_cut_and_in_the_running_statistics_too(backward):
    torch.manual_seed(0)
    model, (x, y) = MODELS["batch norm"]().double(), minibatch()
    plain = copy.deepcopy(model)
    want = gradients(plain, F.cross_entropy(plain(x), y))
    step = selbp.SelectiveBackprop(model, selector=selbp.Random(), keep=0.25, cut="1", backward=backward)
    got = gradients(model, step(x, y))
    for name in ("3.weight", "3.bias"):
        assert_same({name: got[name]}, {name: want[name]}, rtol=EXACT)
    assert_same(buffers(model), buffers(plain), rtol=EXACT)


@pytest.mark.parametrize("selector", [selbp.Full(), EveryRow()])
@pytest.mark.parametrize("options", [{}, {"backward": "recompute"}, {"micro_batch": N}], ids=str)
def test_a_row_that_is_not_finite_still_leaves_no_trace(selector, options):
    """Labelled or not; with batch norm a forward that scores is spoilt, so this is without."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), minibatch()
    x[0, 1], x[1, 2] = torch.nan, torch.nan  # one without a label, one with
    kept = [i for i in range(N) if i > 1]
    step = selbp.SelectiveBackprop(model, selector=selector, keep=1.0, **options)
    model.zero_grad()
    step.backward(x, y)
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same(got, gradients(model, F.cross_entropy(model(x[kept]), y[kept])), rtol=EXACT)


@pytest.mark.parametrize("options", [{"backward": "recompute"}, {"scoring": "eval"}, {"micro_batch": N}], ids=str)
def test_nor_does_one_that_the_forward_breaks(options):
    class Root(nn.Module):
        def forward(self, x):
            return x.sqrt()

    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(Root(), nn.Linear(6, 3)).double(), minibatch()
    x, kept = x.abs(), [i for i in range(N) if i != 1]
    x[1, 2] = -1.0  # finite, and NaN after the first layer
    step = selbp.SelectiveBackprop(model, selector=EveryRow(), keep=1.0, **options)
    model.zero_grad()
    step.backward(x, y)
    got = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert_same(got, gradients(model, F.cross_entropy(model(x[kept]), y[kept])), rtol=EXACT)


def test_before_the_forward_batch_norm_sees_no_row_that_is_not_finite():
    torch.manual_seed(0)
    model, (x, y) = MODELS["batch norm"]().double(), minibatch()
    x[0, 1], x[1, 2] = torch.nan, torch.inf
    blank = x.clone()
    blank[:2] = 0.0
    labels = y.clone()
    labels[:2] = -100
    got = gradients(model, selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0)(x, y))
    assert_same(got, gradients(model, F.cross_entropy(model(blank), labels)), rtol=EXACT)


def test_all_rows_are_kept_in_order():
    x, y = minibatch()
    model = MODELS["batch norm"]().double()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(weights="batch"), keep=1.0)
    step(x, y).backward()
    indices, weights = step.report.selection
    assert torch.equal(indices, torch.arange(N))
    assert torch.equal(weights, (y != -100).double() / N)


@pytest.mark.parametrize("selector", [selbp.TopLoss(weights="batch"), selbp.GradientMatching()])
@pytest.mark.parametrize("options", [{"backward": "rows"}, {"backward": "recompute"}, {"micro_batch": N}], ids=str)
def test_but_for_those_that_are_broken_and_cannot_be_blanked(options, selector):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    ids, y = torch.arange(N) % 8, minibatch()[1]
    ids[1] = 8
    with torch.no_grad():
        model[0].weight[8] = torch.nan
    step = selbp.SelectiveBackprop(model, selector=selector, keep=1.0, **options)
    step.backward(ids, y)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    indices, weights = step.report.selection
    assert indices.tolist() == [int(indices[1]) if i == 1 else i for i in range(N)]
    assert weights[1] == 0 and (ids[indices] < 8).all()


class Attends(nn.Module):
    """Every sample reads all others."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.head(h + torch.softmax(h @ h.T, 1) @ h)


def test_samples_that_interact_are_found_among_rows_without_a_label():
    """The comparison runs the forward of all rows again: other data than the first time would excuse any difference."""
    torch.manual_seed(0)
    model, (x, y) = Attends().double(), minibatch()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, backward="recompute")
    with pytest.raises(interaction.SamplesInteractError):
        step(x, y)


@pytest.mark.parametrize(("backward", "keep"), [("rows", 0.5), ("rows", 1), ("recompute", 0.5)])
@pytest.mark.parametrize("spoilt", [False, True], ids=["finite", "NaN"])
def test_batch_norm_follows_the_minibatch_once_where_no_row_may_count(spoilt, backward, keep):
    torch.manual_seed(0)
    model, (x, _) = MODELS["batch norm"]().double(), minibatch()
    if spoilt:
        x[:] = torch.nan
    plain = copy.deepcopy(model)
    plain(x)
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=keep, backward=backward)
    got = gradients(model, step(x, torch.full((N,), -100)))
    assert len(got) == 6 and all((g == 0).all() for g in got.values())
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), buffer, rtol=EXACT, atol=0, equal_nan=True)


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_the_models_own_loss_of_rows_without_a_label(backward):
    torch.manual_seed(0)
    model, (x, y) = Balanced().double(), minibatch()
    step = selbp.SelectiveBackprop(model, selector=EveryRow(), keep=1.0, backward=backward)
    for target in (y, torch.full_like(y, -100)):
        output = model(x)
        labelled = F.cross_entropy(output["logits"], target, reduction="sum") / (target != -100).sum().clamp(min=1)
        want = gradients(model, labelled + output["aux_loss"])
        assert_same(gradients(model, step(x, target)), want, rtol=EXACT)
