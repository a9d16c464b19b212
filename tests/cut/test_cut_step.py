"""``SelectiveBackprop(cut=...)`` and ``backward="auto"``."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selbp
from selbp_study.row_models import SMALL, mlp, vectors


def model_and_batch() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 5))
    return model, torch.randn(16, 6), torch.randint(5, (16,))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("by_name", [True, False])
def test_the_step_places_a_cut(by_name: bool) -> None:
    model, x, y = model_and_batch()
    step = selbp.SelectiveBackprop(
        model, selector=selbp.GradientMatching(), keep=0.25, cut="2" if by_name else model[2]
    )
    loss = step(x, y)
    with pytest.raises(RuntimeError, match="backward"):
        _ = step.report.gain
    assert step.report.loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    loss.backward()
    got = gradients(model)
    F.cross_entropy(model(x), y).backward()
    full = gradients(model)
    below = model[:2](x)  # the input of the layer at the cut, which its gradients are products of
    F.cross_entropy(model[3:](selbp.backward_cut(model[2](below), 0.25, features=below)), y).backward()
    want = gradients(model)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)
    for a, c in zip(got[4:], full[4:], strict=True):
        torch.testing.assert_close(a, c)
    assert not torch.allclose(got[0], full[0])
    report = step.report
    assert (report.n, report.k, report.backward) == (16, 4, "rows")
    assert 0 < report.relative_residual < 1 and report.gain > 1 and report.weight_sum > 0
    assert report.as_dict()["backward_reason"] == "the cut at 2"


def test_keep_all_and_steps_outside_the_schedule_are_full() -> None:
    model, x, y = model_and_batch()
    F.cross_entropy(model(x), y).backward()
    full = gradients(model)
    for options in ({"keep": 1.0}, {"keep": 0.25, "schedule": selbp.Schedule(start=1)}):
        step = selbp.SelectiveBackprop(model, selector=selbp.Random(), cut="2", **options)
        step(x, y).backward()
        for a, b in zip(gradients(model), full, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_a_minibatch_of_no_more_rows_than_are_kept_is_reported_too(backward: str) -> None:
    """The last one of an epoch, after which a loop logs the report."""
    model, x, y = model_and_batch()
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=8, cut="2", backward=backward)
    for n in (16, 8, 5, 16):
        model.zero_grad()
        step(x[:n], y[:n]).backward()
        figures = step.report.as_dict()
        assert (figures["n"], figures["k"], figures["backward"]) == (n, min(8, n), backward)
        if n <= 8:
            got = gradients(model)
            F.cross_entropy(model(x[:n]), y[:n]).backward()
            for a, b in zip(got, gradients(model), strict=True):
                torch.testing.assert_close(a, b)
            assert figures["weight_sum"] == pytest.approx(1.0) and figures["effective_sample_size"] == pytest.approx(n)
    (step(x, y) * float("inf")).backward()
    assert step.report.as_dict()["n"] == 16


@pytest.mark.parametrize(
    "options", [{"cut": "nowhere"}, {"cut": nn.Linear(2, 2)}, {"cut": "2", "head_gradient": "full"}]
)
def test_what_cannot_be_cut(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="cut"):
        selbp.SelectiveBackprop(model_and_batch()[0], selector=selbp.Random(), keep=0.5, **options)


def test_losses_are_not_seen_at_a_cut() -> None:
    with pytest.raises(ValueError, match="losses"):
        selbp.SelectiveBackprop(model_and_batch()[0], selector=selbp.TopLoss(), keep=0.5, cut="2")


@pytest.mark.parametrize(("name", "backward"), [("large", "rows"), ("MLP", "recompute"), ("ResNet-BN", "recompute")])
def test_auto_follows_the_diagnosis(name: str, backward: str) -> None:
    torch.manual_seed(0)
    model = mlp() if name == "large" else SMALL[name].build()
    x, y = vectors(256) if name == "large" else SMALL[name].batch(16)
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25)
    for _ in range(2):
        step(x, y).backward()
        assert step.report.backward == backward
        assert "modelled time" in step.report.backward_reason


def test_a_resumed_run_goes_on_with_what_auto_decided() -> None:
    model, x, y = model_and_batch()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5)
    assert step.state_dict()["backward"] is None
    step(x, y).backward()
    assert step.report.backward == step.state_dict()["backward"] == "recompute"
    other = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5)
    other.load_state_dict({**step.state_dict(), "backward": "rows"})  # as if another machine had decided
    other(x, y).backward()
    assert other.report.backward == "rows" and "resumed" in other.report.backward_reason
    assert other.state_dict()["backward"] == "rows"
    with pytest.raises(ValueError, match="backward"):
        other.load_state_dict({**step.state_dict(), "backward": "faster"})


def test_auto_recomputes_where_the_forward_that_scores_does_not_train() -> None:
    model, x, y = model_and_batch()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, scoring="eval")
    step(x, y).backward()
    assert step.report.backward == "recompute"
