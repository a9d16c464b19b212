"""Where the classes are in logits of several dims: the target's shape tells, and where it cannot, nobody guesses."""

import pytest
import torch
from support.training_kit import assert_same, gradients
from torch import nn

import selbp

N = 8


class Grid(nn.Module):
    """(n, 6) to logits with ``classes`` last or in dim 1, over positions of shape ``places``."""

    def __init__(self, classes, places, last):
        super().__init__()
        self.places, self.classes, self.last = places, classes, last
        count = torch.Size(places).numel()
        self.body, self.head = nn.Linear(6, count * 4), nn.Linear(4, classes)

    def forward(self, x):
        logits = self.head(torch.tanh(self.body(x)).view(len(x), *self.places, 4))
        return logits if self.last else logits.movedim(-1, 1)


class MixedHead(nn.Module):
    """Logits (n, C, L) that come from a linear layer over the positions: its output's last dim is no class."""

    def __init__(self, classes, length):
        super().__init__()
        self.classes, self.body, self.head = classes, nn.Linear(6, classes * 3), nn.Linear(3, length)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)).view(len(x), self.classes, 3))


def network(classes, places, last):
    torch.manual_seed(1)
    return Grid(classes, places, last).double()


def minibatch(classes, places):
    draws = torch.Generator().manual_seed(2)
    target = torch.randint(0, classes, (N, *places), generator=draws)
    target[1, 0] = target[3] = -100
    return torch.randn(N, 6, generator=draws, dtype=torch.float64), target


def by_hand(model, batch, selection, last, **options):
    logits = model(batch[0])
    logits = logits.movedim(-1, 1) if last else logits
    losses = nn.functional.cross_entropy(logits, batch[1], reduction="none", **options).flatten(1).sum(1)
    mass = batch[1] != -100
    if "weight" in options:
        mass = torch.where(mass, options["weight"][batch[1].clamp(min=0)], 0)
    return (losses * (N / mass.sum()))[selection.indices] @ selection.weights.to(losses)


SHAPES = {
    "C > L": (5, (3,)),
    "C < L": (3, (5,)),
    "image": (5, (3, 4)),
    "image, C = H": (3, (3, 4)),
    "image, C = W": (4, (3, 4)),
    "image, H = W": (5, (3, 3)),
    "volume": (3, (3, 3, 2)),
}
STEPS = {
    "rows": {"backward": "rows", "selector": selbp.TopLoss()},
    "recompute": {"backward": "recompute", "selector": selbp.TopLoss()},
    "matching": {"backward": "recompute", "selector": selbp.GradientMatching(), "head": "head"},
    "matching rows": {"backward": "rows", "selector": selbp.GradientMatching(), "head": "head"},
    "random": {"selector": selbp.Random()},
}


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("last", [True, False], ids=["last", "dim 1"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_targets_shape_tells(shape, last, how):
    classes, places = SHAPES[shape]
    model, batch = network(classes, places, last), minibatch(classes, places)
    weight = torch.rand(classes, dtype=torch.float64) + 0.5
    step = selbp.SelectiveBackprop(model, keep=3, class_weight=weight, label_smoothing=0.1, **STEPS[how])
    got = gradients(model, step(*batch))
    options = {"weight": weight, "label_smoothing": 0.1}
    want = gradients(model, by_hand(model, batch, step.report.selection, last, **options))
    assert_same(got, want, rtol=1e-12)
    predicted = model(batch[0]).argmax(-1 if last else 1)
    rows = slice(None) if step.report.scored else step.report.selection.indices
    known = (batch[1] != -100)[rows]
    assert step.report.accuracy == pytest.approx(float((predicted == batch[1])[rows][known].double().mean()))


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("places", [(4,), (4, 4)], ids=["L = C", "H = W = C"])
@pytest.mark.parametrize("last", [True, False], ids=["last", "dim 1"])
def test_where_both_fit_it_is_asked_for(last, places, how):
    model, batch = network(4, places, last), minibatch(4, places)
    step = selbp.SelectiveBackprop(model, keep=3, **STEPS[how])
    with pytest.raises(ValueError, match=r"fit target .*pass class_dim=1 or class_dim=-1"):
        step(*batch)
    assert step.optimizer_step == 0
    step = selbp.SelectiveBackprop(model, keep=3, class_dim=-1 if last else 1, **STEPS[how])
    got = gradients(model, step(*batch))
    assert_same(got, gradients(model, by_hand(model, batch, step.report.selection, last)), rtol=3e-7)


@pytest.mark.parametrize("last", [True, False], ids=["last", "dim 1"])
def test_an_earlier_minibatch_tells(last):
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(6, 4)

        def forward(self, x):
            return self.head(x) if last else self.head(x).transpose(1, 2)

    model = Tagger()
    step = selbp.SelectiveBackprop(model, keep=3, selector=selbp.TopLoss())
    for length in (3, 4):
        x, y = torch.randn(N, length, 6), torch.randint(0, 4, (N, length))
        got = gradients(model, step(x, y))
        assert_same(got, gradients(model, by_hand(model, (x, y), step.report.selection, last)))


@pytest.mark.parametrize("last", [True, False], ids=["last", "dim 1"])
def test_a_resumed_step_knows_what_an_earlier_minibatch_told(last):
    def begun():
        return selbp.SelectiveBackprop(network(4, (3,), last), keep=3, selector=selbp.TopLoss())

    step = begun()
    assert step.state_dict()["classes_last"] is None
    step(*minibatch(4, (3,)))
    state = step.state_dict()
    model, batch = network(4, (4,), last), minibatch(4, (4,))
    resumed = selbp.SelectiveBackprop(model, keep=3, selector=selbp.TopLoss())
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    got = gradients(model, resumed(*batch))
    assert_same(got, gradients(model, by_hand(model, batch, resumed.report.selection, last)), rtol=3e-7)
    del state["classes_last"]  # as states were
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"pass class_dim=1 or class_dim=-1"):
        resumed(*batch)


@pytest.mark.parametrize("how", STEPS)
def test_a_linear_layer_over_the_positions(how):
    torch.manual_seed(1)
    model, batch = MixedHead(4, 3).double(), minibatch(4, (3,))
    step = selbp.SelectiveBackprop(model, keep=3, **STEPS[how])
    got = gradients(model, step(*batch))
    assert_same(got, gradients(model, by_hand(model, batch, step.report.selection, False)), rtol=3e-7)


class Viewed(nn.Module):
    """Logits (n, L, C) as a view of a linear layer's (n, L C)."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3 * 5)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))).view(len(x), 3, 5)


RESHAPED = {  # the model, its classes, their places, and whether the classes are the last dim
    "a view": (Viewed, 5, (3,), True),
    "pixel shuffle": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 20, 1), nn.PixelShuffle(2)),
        *(5, (4, 4), False),
    ),
    "over the positions": (
        lambda: nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Unflatten(1, (4, 3)), nn.Linear(3, 3)),
        *(4, (3,), False),
    ),
}


@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("rule", [selbp.TopLoss, selbp.GradientMatching], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", RESHAPED)
def test_class_weights_where_the_heads_output_is_reshaped_to_the_classes(name, rule, backward):
    make, classes, places, last = RESHAPED[name]
    torch.manual_seed(1)
    model, batch = make().double(), minibatch(classes, places)
    weight = torch.rand(classes, dtype=torch.float64) + 0.5
    step = selbp.SelectiveBackprop(model, keep=3, selector=rule(), backward=backward, class_weight=weight)
    got = gradients(model, step(*batch))
    assert_same(got, gradients(model, by_hand(model, batch, step.report.selection, last, weight=weight)), rtol=3e-7)
    step = selbp.SelectiveBackprop(model, keep=3, selector=rule(), backward=backward, class_weight=torch.ones(2))
    with pytest.raises(ValueError, match=f"class_weight must have one entry for each of the {classes} classes"):
        step(*batch)
    assert step.optimizer_step == 0


def test_matching_sees_the_same_gradients_either_way():
    chosen = []
    for last in (True, False):
        model, batch = network(5, (3,), last), minibatch(5, (3,))
        step = selbp.SelectiveBackprop(model, keep=3, head="head", selector=selbp.GradientMatching())
        step(*batch)
        chosen.append((step.report.selection, step.report.relative_residual))
    assert torch.equal(chosen[0][0].indices, chosen[1][0].indices)
    torch.testing.assert_close(chosen[0][0].weights, chosen[1][0].weights, rtol=1e-6, atol=0)
    assert chosen[0][1] == pytest.approx(chosen[1][1], rel=1e-6)


def test_causal_language_models_have_the_classes_last():
    class Characters(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(6, 4), nn.Linear(4, 6)

        def forward(self, ids):
            return self.head(self.embed(ids))

    model, ids = Characters(), torch.randint(0, 6, (N, 6))
    step = selbp.SelectiveBackprop(model, keep=N, selector=selbp.Full(), loss="causal_lm")
    want = nn.functional.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(step(ids, ids), want)


def test_diagnose_takes_it():
    model, batch = network(4, (4,), False), minibatch(4, (4,))
    with pytest.raises(ValueError, match="pass class_dim=1"):
        selbp.diagnose(model, batch)
    assert selbp.diagnose(model, batch, class_dim=1).n == N
