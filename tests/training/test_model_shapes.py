"""Models as they come: compiled, wrapped, with outputs in a structure, images in channels-last."""

from typing import NamedTuple

import pytest
import torch
from support.training_kit import TokenModel, assert_same, gradients, mlp, samples
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from selbp.common.batch import take_rows


def chosen_by_hand(model, x, y, selection):
    indices, w = selection
    return (F.cross_entropy(model(x[indices]), y[indices], reduction="none") * w).sum()


@pytest.mark.parametrize("selector", [selbp.Random(), selbp.TopLoss(), selbp.GradientMatching()])
def test_compiled_models(selector):
    x, y = samples()
    model = mlp()
    compiled = torch.compile(model, backend="aot_eager")
    step = selbp.SelectiveBackprop(compiled, selector=selector, keep=0.25)
    for _ in range(2):
        got = gradients(model, step(x, y))
        assert_same(got, gradients(model, chosen_by_hand(model, x, y, step.report.selection)))
    if selector.needs != "nothing":
        eager = selbp.SelectiveBackprop(model, selector=selector, keep=0.25)
        eager(x, y)
        assert step.report.selection.indices.tolist() == eager.report.selection.indices.tolist()
        torch.testing.assert_close(step.report.selection.weights, eager.report.selection.weights)


def test_a_compiled_head_keeps_its_own_gradient():
    for model in (torch.compile(mlp(), backend="eager"), nn.Sequential(nn.Linear(12, 12), torch.compile(mlp()))):
        with pytest.raises(ValueError, match="outside torch.compile"):
            selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, head_gradient="full")
    x, y = samples()
    model = nn.Sequential(torch.compile(nn.Linear(12, 12), backend="eager"), nn.Tanh(), nn.Linear(12, 5))
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, head_gradient="full", head="2")
    head = gradients(model, step(x, y))["2.weight"]
    torch.testing.assert_close(head, gradients(model, F.cross_entropy(model(x), y))["2.weight"])


class Output(NamedTuple):
    logits: Tensor
    hidden: Tensor


class Structured(nn.Module):
    """Returns its logits as its ``kind`` says, as the libraries of models do."""

    def __init__(self, kind):
        super().__init__()
        self.body, self.kind = mlp(), kind

    def forward(self, x, labels=None, flag=True):
        assert labels is None and flag
        z = self.body(x)
        return {"dict": {"logits": z}, "named": Output(z, x), "tuple": (z, x)}[self.kind]


@pytest.mark.parametrize("kind", ["dict", "named"])
def test_logits_in_a_structure(kind):
    x, y = samples()
    model = Structured(kind)
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25)
    got = gradients(model, step({"x": x, "labels": y, "flag": True}))
    assert_same(got, gradients(model, chosen_by_hand(model.body, x, y, step.report.selection)))


def test_another_structure_needs_a_callable():
    x, y = samples()
    model = Structured("tuple")
    with pytest.raises(TypeError, match="something with .logits, got tuple; pass a callable"):
        selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25)(x, y)

    def loss(output, target):
        return F.cross_entropy(output[0], target, reduction="none")

    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, loss=loss)
    got = gradients(model, step(x, y))
    assert_same(got, gradients(model, chosen_by_hand(model.body, x, y, step.report.selection)))


def test_a_head_that_does_not_run_once_or_does_not_matter():
    class Twice(nn.Module):
        def __init__(self, calls):
            super().__init__()
            self.trunk, self.head, self.calls = nn.Linear(12, 5), nn.Linear(12, 5), calls

        def forward(self, x):
            return sum((self.head(x) for _ in range(self.calls)), self.trunk(x))

    class Aside(Twice):
        def forward(self, x):
            self.head(x)
            return self.trunk(x)

    for model, message in (
        (Twice(2), "ran 2 times.*candidates: 'trunk', 'head'"),
        (Twice(0), "ran 0 times.*candidates: 'trunk', 'head'"),
        (Aside(1), "does not depend on the head.*candidates: 'trunk', 'head'"),
    ):
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, head="head")
        with pytest.raises(RuntimeError, match=message):
            step(*samples())
        for backward in ("recompute", "rows"):  # a rule that reads losses needs no head
            x, y = samples()
            step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, backward=backward)
            got = gradients(model, step(x, y))
            assert_same(got, gradients(model, chosen_by_hand(model, x, y, step.report.selection)))


def test_a_head_that_was_replaced_after_the_step_was_built():
    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25)
    model[2] = nn.Linear(model[2].in_features, model[2].out_features)
    with pytest.raises(RuntimeError, match="ran 0 times.*build the step after its layers are replaced"):
        step(*samples())


def test_a_frozen_trunk_and_parameters_without_gradient():
    x, y = samples()
    for head_gradient in ("subset", "full"):
        model = mlp()
        model[0].requires_grad_(False)
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, head_gradient=head_gradient)
        assert set(gradients(model, step(x, y))) == {"2.weight", "2.bias"}


def test_rows_keep_their_memory_format():
    x = torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last)
    indices = torch.tensor([5, 0, 0])
    assert torch.equal(take_rows(x, indices), x[indices])
    assert take_rows(x, indices).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(take_rows(x.transpose(1, 3), indices), x.transpose(1, 3)[indices])


def test_logits_that_the_model_caps_afterwards():
    class Capped(TokenModel):
        def forward(self, input_ids):
            return 2.0 * torch.tanh(super().forward(input_ids) / 2.0)

    ids = torch.randint(0, 11, (6, 9))
    model = Capped()
    step = selbp.SelectiveBackprop(
        model, selector=selbp.GradientMatching(), keep=0.5, loss="causal_lm", head_gradient="full"
    )
    got = gradients(model, step(ids, ids))
    want = gradients(model, F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    assert_same({k: got[k] for k in got if "head" in k}, {k: want[k] for k in want if "head" in k})
