"""``Full()`` is the ordinary step to rounding: every loss, every kind of batch, scored or not."""

import pytest
import torch
from support.training_kit import TokenModel, assert_same, gradients, mlp, samples
from torch import nn
from torch.nn import functional as F

import selbp


class EveryRow(selbp.Full):
    """Full, but chosen after a scoring forward that reads everything."""

    needs = "gradients"


SELECTORS = [selbp.Full(), EveryRow()]


def check(model, inputs, target, ordinary, selector, **options):
    """The step's gradient and reported loss against those of the loss function ``ordinary``."""
    step = selbp.SelectiveBackprop(model, selector=selector, keep=1.0, **options)
    got = gradients(model, step(inputs, target))
    loss = ordinary(model)
    assert_same(got, gradients(model, loss))
    assert step.report.loss == pytest.approx(loss.item(), rel=1e-5)
    return step.report


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ignore_index": 2},
        {"label_smoothing": 0.1},
        {"class_weight": torch.tensor([1.0, 0.2, 3.0, 0.0, 0.7])},
        {"class_weight": torch.tensor([1.0, 0.2, 3.0, 0.5, 0.7]), "label_smoothing": 0.2, "ignore_index": 0},
    ],
    ids=str,
)
def test_cross_entropy(selector, options):
    x, y = samples()
    torch_options = {**options, "weight": options.get("class_weight")}
    torch_options.pop("class_weight", None)
    report = check(mlp(), x, y, lambda m: F.cross_entropy(m(x), y, **torch_options), selector, **options)
    assert 0.0 <= report.accuracy <= 1.0


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("loss", ["cross_entropy", "causal_lm"])
def test_token_outputs_with_ignored_tokens(selector, loss):
    ids = torch.randint(0, 11, (6, 9))
    target = ids.clone()
    target[0, 4:] = -100
    target[3] = -100

    def ordinary(model):
        z, y = (model(ids), target) if loss == "cross_entropy" else (model(ids)[:, :-1], target[:, 1:])
        return F.cross_entropy(z.flatten(0, 1), y.flatten())

    check(TokenModel(), ids, target, ordinary, selector, loss=loss)
    check(TokenModel(), {"input_ids": ids}, target, ordinary, selector, loss=loss)
    check(TokenModel(), {"input_ids": ids, "labels": target}, None, ordinary, selector, loss=loss)


@pytest.mark.parametrize("selector", SELECTORS)
def test_regression_and_multilabel(selector):
    x, target = torch.randn(10, 12), torch.rand(10, 5)
    check(mlp(), x, target, lambda m: F.mse_loss(m(x), target), selector, loss="mse")
    labels = target.round()
    check(mlp(), x, labels, lambda m: F.binary_cross_entropy_with_logits(m(x), labels), selector, loss="bce")
    check(mlp(), x, labels.long(), lambda m: F.binary_cross_entropy_with_logits(m(x), labels), selector, loss="bce")


@pytest.mark.parametrize("selector", SELECTORS)
def test_callable_loss_and_squeezed_output(selector):
    x, target = torch.randn(10, 12), torch.randn(10)
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))

    def huber(output, target):
        return F.huber_loss(output, target, reduction="none")

    check(model, x, target, lambda m: F.huber_loss(m(x), target), selector, loss=huber)
    check(model, x, target, lambda m: F.huber_loss(m(x), target), selector, loss=nn.HuberLoss(reduction="none"))


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_model_that_transforms_its_logits(selector):
    x, y = samples()
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 5), nn.LogSoftmax(1))
    check(model, x, y, lambda m: F.nll_loss(m(x), y), selector, loss=lambda o, t: F.nll_loss(o, t, reduction="none"))
    check(model, x, y, lambda m: F.cross_entropy(m(x), y), selector)


@pytest.mark.parametrize("selector", SELECTORS)
def test_several_inputs(selector):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.head = nn.Linear(12, 7), nn.Linear(7, 5)

        def forward(self, a, b, scale=1.0):
            return {"logits": self.head((self.left(a) + self.left(b)) * scale)}

    (a, y), (b, _) = samples(), samples()
    check(Sum(), (a, b), y, lambda m: F.cross_entropy(m(a, b)["logits"], y), selector)
    batch = {"a": a, "b": b, "scale": 0.5}
    check(Sum(), batch, y, lambda m: F.cross_entropy(m(a, b, 0.5)["logits"], y), selector)


def test_steps_outside_the_schedule_are_ordinary():
    x, y = samples()
    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, schedule=selbp.Schedule(1, 5, 2))
    ks = []
    for _ in range(7):
        got = gradients(model, step(x, y))
        ks.append(step.report.k)
        if step.report.k == len(x):
            assert_same(got, gradients(model, F.cross_entropy(model(x), y)))
            assert not step.report.selected
    assert ks == [24, 6, 24, 6, 24, 24, 24]


@pytest.mark.parametrize("cut", [None, "1"])
def test_steps_between_choices_may_draw_at_random_and_score_nothing(cut):
    x, y = samples()
    model = mlp()
    forwards = []
    model.register_forward_hook(lambda _, args, __: forwards.append(len(args[0])))
    step = selbp.SelectiveBackprop(
        model,
        selector=selbp.GradientMatching(),
        keep=0.25,
        backward="recompute",
        cut=cut,
        schedule=selbp.Schedule(1, 6, 2, between="random"),
        generator=torch.Generator().manual_seed(3),
    )
    twin = selbp.SelectiveBackprop(
        model, selector=selbp.Random(), keep=0.25, generator=torch.Generator().manual_seed(3)
    )
    seen = []
    for _ in range(8):
        forwards.clear()
        got = gradients(model, step(x, y))
        report = step.report
        seen.append((report.k, report.selected, max(forwards)))
        if report.k == 6 and not report.selected:  # exactly a step of Random, of the same generator
            assert not report.scored and forwards == [6]
            assert_same(got, gradients(model, twin(x, y)))
            assert torch.equal(report.selection.indices, twin.report.selection.indices)
    full, chosen, drawn = (24, False, 24), (6, True, 24), (6, False, 6)
    assert seen == [full, chosen, drawn, chosen, drawn, chosen, full, full]
