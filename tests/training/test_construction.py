"""Everything that could not work later is refused at construction, and says what to do."""

import functools

import numpy as np
import pytest
import torch
from support.training_kit import TokenModel, mlp, samples
from torch import nn
from torch.nn import functional as F

import selbp
from selbp.common.keep import kept_rows


def build(model=None, selector=None, keep=0.5, **options):
    return selbp.SelectiveBackprop(
        mlp() if model is None else model, selector=selector or selbp.TopLoss(), keep=keep, **options
    )


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_keep_out_of_range(keep):
    with pytest.raises(ValueError, match=r"float in \(0, 1\].*int of at least 1"):
        build(keep=keep)


@pytest.mark.parametrize("keep", [True, False, None, "0.5", torch.tensor(0.5)])
def test_keep_of_another_type(keep):
    with pytest.raises(TypeError, match=r"keep must be a float in \(0, 1\]"):
        build(keep=keep)


@pytest.mark.parametrize(
    ("keep", "n", "k"),
    [
        (0.25, 128, 32),
        (0.001, 10, 1),
        (1.0, 7, 7),
        (1, 7, 1),
        (5, 3, 3),
        (0.5, 1, 1),
        (0.3, 10, 3),
        (10**9, 4, 4),
        (np.int64(3), 8, 3),
        (np.float32(0.25), 8, 2),
    ],
)
def test_kept_rows(keep, n, k):
    assert kept_rows(keep, n) == k
    x, y = samples(n)
    step = build(keep=keep)
    assert torch.isfinite(step(x, y))
    assert step.report.k == k


def refused_id(value):
    """An argument's name and its value's type; no text of an object: that may hold its address."""
    if isinstance(value, dict):
        return " ".join(
            f"{name}={v if isinstance(v, (str, int, float)) else type(v).__name__}" for name, v in value.items()
        )
    return value.__name__ if isinstance(value, type) else value


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (TypeError, {"selector": selbp.TopLoss}, "instance of a selector"),
        (TypeError, {"selector": "top"}, "instance of a selector"),
        (TypeError, {"model": str.upper}, "torch.nn.Module"),
        (ValueError, {"backward": "fast"}, "one of 'auto', 'rows', 'recompute'"),
        (ValueError, {"backward": ["rows"]}, "one of 'auto', 'rows', 'recompute'"),
        (ValueError, {"scoring": "train"}, "'same' or 'eval'"),
        (ValueError, {"head_gradient": "exact"}, "'subset' or 'full'"),
        (ValueError, {"target": "all"}, "'local' or 'global'"),
        (ValueError, {"target": "global"}, "rules that match gradients"),
        (TypeError, {"schedule": (0, 1)}, "selbp.Schedule"),
        (TypeError, {"generator": 0}, "torch.Generator"),
        (ValueError, {"loss": "hinge"}, "cross_entropy.*callable"),
        (ValueError, {"loss": F.cross_entropy}, 'reduction="none"'),
        (ValueError, {"loss": nn.CrossEntropyLoss()}, 'reduction="none"'),
        (ValueError, {"loss": functools.partial(F.mse_loss, reduction="sum")}, 'reduction="none"'),
        (ValueError, {"loss": "mse", "label_smoothing": 0.1}, "cross_entropy"),
        (ValueError, {"skip_mass": 0.1}, 'skip_mass is for loss="linear_causal_lm", .* got 0.1'),
        (ValueError, {"skip_mass": 1.5}, r"skip_mass .*\[0, 1\].* 1.5"),
        (TypeError, {"skip_mass": "a lot"}, "skip_mass"),
        (ValueError, {"label_smoothing": 1.5}, r"\[0, 1\]"),
        (TypeError, {"label_smoothing": "a lot"}, "label_smoothing"),
        (TypeError, {"ignore_index": None}, "ignore_index"),
        (ValueError, {"class_weight": [1.0]}, "class_weight"),
        (TypeError, {"class_weight": torch.ones(5, dtype=torch.int64)}, "class_weight must be floating"),
        (ValueError, {"class_weight": torch.tensor([1.0, float("nan")])}, "class_weight must be finite"),
        (ValueError, {"class_weight": torch.tensor([1.0, -1.0])}, "nowhere negative"),
        (ValueError, {"head": "fc"}, "candidates: '0', '2'"),
        (TypeError, {"head": 2}, "module, its name or None"),
        (ValueError, {"head": nn.Linear(2, 2)}, "a module of the model"),
        (ValueError, {"head": "1"}, r"weight \(C, d\)"),
    ],
    ids=refused_id,
)
def test_refused(error, options, message):
    with pytest.raises(error, match=message):
        build(**options)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.coarse, self.fine = nn.Linear(12, 8), nn.Linear(8, 3), nn.Linear(8, 5)

    def forward(self, x):
        hidden = self.trunk(x).relu()
        return self.fine(hidden) + self.coarse(hidden).sum(1, keepdim=True)


def test_two_heads_side_by_side_are_refused_until_one_is_named():
    with pytest.raises(ValueError, match="'coarse' and 'fine' look like two heads"):
        build(TwoHeads(), selector=selbp.GradientMatching())
    model = TwoHeads()
    step = build(model, selector=selbp.GradientMatching(), head="fine")
    assert step.head is model.fine and torch.isfinite(step(*samples()))


@pytest.mark.parametrize("model", [mlp, TwoHeads])
def test_class_weights_of_another_number_are_refused_in_the_first_step(model):
    x, y = samples()
    step = build(model(), class_weight=torch.ones(4))
    with pytest.raises(ValueError, match="class_weight must have one entry for each of the 5 classes"):
        step(x, y)
    assert step.optimizer_step == 0


def test_a_partial_with_reduction_none_is_taken():
    x, y = samples()
    model = mlp()
    loss = build(model, loss=functools.partial(F.cross_entropy, reduction="none"))(x, y)
    assert torch.equal(loss, build(model)(x, y))


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        selbp.SelectiveBackprop(mlp(), selbp.TopLoss(), 0.5)


def test_a_callable_that_reduces_is_refused_when_it_runs():
    step = build(loss=lambda output, target: F.cross_entropy(output, target))
    with pytest.raises(ValueError, match='must return one loss per sample.*reduction="none"'):
        step(*samples())


def test_the_head_is_found_where_it_is_clear():
    model = mlp()
    assert build(model, selector=selbp.GradientMatching()).head is model[2]
    assert build(torch.compile(model, backend="eager"), selector=selbp.GradientMatching()).head is model[2]
    assert build(model, head="0").head is model[0]
    tokens = TokenModel()
    assert build(tokens, selector=selbp.TopGradNorm()).head is tokens.head


def test_an_ambiguous_head_is_an_error_only_where_it_is_needed():
    model = nn.ModuleDict({"head": nn.Linear(12, 5), "trunk": nn.Conv1d(1, 1, 3)})
    with pytest.raises(ValueError, match="head is ambiguous: pass head=.*candidates: 'head'"):
        build(model, selector=selbp.GradientMatching())
    assert build(model, selector=selbp.TopLoss()).head is None
    assert build(model, selector=selbp.GradientMatching(), head="head").head is model["head"]
    with pytest.raises(ValueError, match="no nn.Linear"):
        build(nn.Conv1d(1, 1, 3), selector=selbp.TopGradNorm())


def test_full_head_gradient_needs_a_head_of_its_own():
    model = TokenModel()
    model.head.weight = model.embed.weight
    with pytest.raises(ValueError, match="tied.*embed.weight"):
        build(model, head_gradient="full")
    frozen = mlp()
    frozen[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        build(frozen, head_gradient="full")


@pytest.mark.parametrize("arguments", [(-1,), (3, 2), (0, None, 0), (True,), (0.5,), (0, 1.0)])
def test_schedule_refuses(arguments):
    with pytest.raises((TypeError, ValueError), match="start|end|every"):
        selbp.Schedule(*arguments)
    with pytest.raises(ValueError, match="between must be one of"):
        selbp.Schedule(between="none")


@pytest.mark.parametrize(
    ("inputs", "target", "extras", "message"),
    [
        (torch.zeros(0, 12), torch.zeros(0, dtype=torch.long), {}, "at least one sample"),
        (torch.zeros(4, 12), torch.zeros(3, dtype=torch.long), {}, "n = 4 rows"),
        (torch.zeros(4, 12), None, {}, "target is missing"),
        (torch.zeros(4, 12), torch.zeros(4), {}, "int64 class indices"),
        (torch.zeros(4, 12), torch.zeros(4, 2, dtype=torch.long), {}, r"\(n, T, C\)"),
        (torch.zeros(4, 12), torch.zeros(4, dtype=torch.long), {"hardness": torch.zeros(3)}, "hardness must be"),
        (torch.zeros(4, 12), torch.zeros(4, dtype=torch.long), {"hardness": 1.0}, "hardness must be"),
        (3, torch.zeros(4, dtype=torch.long), {}, "Tensor, a tuple or a dict"),
        ({}, torch.zeros(4, dtype=torch.long), {}, "no tensor"),
    ],
)
def test_bad_batches(inputs, target, extras, message):
    with pytest.raises((TypeError, ValueError), match=message):
        build()(inputs, target, **extras)


def test_elementwise_losses_do_not_broadcast():
    with pytest.raises(ValueError, match=r"output's shape \(4, 5\), got \(4,\)"):
        build(loss="mse")(torch.zeros(4, 12), torch.zeros(4))


def test_per_sample_tensors_reach_the_selector():
    x, y = samples()
    irreducible = torch.zeros(24)
    irreducible[5] = -100.0
    step = build(selector=selbp.ReducibleLoss(), keep=1)
    step(x, y, irreducible_loss=irreducible)
    assert step.report.selection.indices.tolist() == [5]
