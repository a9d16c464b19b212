"""The report's figures against the same computed one by one; reading them is the only synchronisation."""

import json
import weakref

import pytest
import torch
from support.training_kit import TokenModel, gradients, mlp, samples
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import selbp
from selbp.common.keep import random_error
from selbp.common.proxies import HeadProxies
from selbp.training.schedule import rows_at_cost, step_cost

RULES = [
    selbp.Full(),
    selbp.Random(),
    selbp.TopLoss(),
    selbp.TopGradNorm(),
    selbp.GradNormImportance(),
    selbp.LossPercentile(),
    selbp.LossRank(),
    selbp.GradientMatching(),
    selbp.DivBS(),
    selbp.TopLoss(weights="refit"),
]


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: values read back and shapes that depend on them."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim")

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if name in self.waits or boolean:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("scoring", ["same", "eval"])
@pytest.mark.parametrize("head_gradient", ["subset", "full"])
@pytest.mark.parametrize("selector", RULES, ids=lambda s: type(s).__name__)
def test_a_step_never_waits_for_the_device(selector, scoring, head_gradient, monkeypatch):
    """By meta data alone: no value of a tensor is read, in the step or in its backward, until the report is."""
    monkeypatch.setattr("selbp.training.scoring.may_ask", lambda device: False)  # as elsewhere than on a CPU
    x, y = samples()
    step = selbp.SelectiveBackprop(mlp(), selector=selector, keep=0.25, scoring=scoring, head_gradient=head_gradient)
    step(x, y)  # the first one compares two forwards, once
    with HostReads() as reads:
        step(x, y).backward()
    assert reads.seen == []
    with reads:
        step.report.loss  # noqa: B018
    assert reads.seen


@pytest.mark.parametrize("loss", ["mse", "causal_lm", "callable"])
@pytest.mark.parametrize("selector", [selbp.Random(), selbp.TopLoss(), selbp.GradientMatching()])
def test_nor_do_other_losses(loss, selector):
    if loss == "causal_lm":
        model, x = TokenModel(), torch.randint(0, 11, (6, 9))
        y = x
    else:
        model, x, y = mlp(), torch.randn(24, 12), torch.randn(24, 5)
    option = (lambda o, t: (o - t).abs().sum(1)) if loss == "callable" else loss
    step = selbp.SelectiveBackprop(model, selector=selector, keep=0.25, loss=option)
    step(x, y)  # the first one compares two forwards, once
    with HostReads() as reads:
        step(x, y).backward()
    assert reads.seen == []


def head_gradients(model, x, y):
    """(n, P) gradient of each sample's loss with respect to the head."""
    head = list(model[2].parameters())
    losses = F.cross_entropy(model(x), y, reduction="none")
    rows = [torch.autograd.grad(loss, head, retain_graph=True) for loss in losses]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()


@pytest.mark.parametrize("selector", RULES[2:], ids=lambda s: type(s).__name__)
def test_figures(selector):
    x, y = samples()
    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selector, keep=0.25, backward="recompute")
    step(x, y)
    report = step.report
    indices, w = report.selection
    assert report.loss == pytest.approx(F.cross_entropy(model(x), y).item(), rel=1e-5)
    assert report.accuracy == (model(x).argmax(1) == y).double().mean().item()
    assert (report.n, report.k, report.step, report.selected, report.scored) == (24, 6, 0, True, True)
    assert report.weight_sum == pytest.approx(w.sum().item()) and report.weight_max == w.max().item()
    assert report.effective_sample_size == pytest.approx((w.sum() ** 2 / (w**2).sum()).item())
    g = head_gradients(model, x, y)
    mean = g.mean(0)
    error = (mean - (g[indices] * w[:, None]).sum(0)).norm()
    assert report.relative_residual == pytest.approx((error / mean.norm()).item(), abs=3e-4)

    def expected(k):
        spread = g.square().sum(1).mean() - mean.square().sum()
        return (24 - k) / (k * 23) * spread

    assert report.gain == pytest.approx((expected(6) / error**2).item(), rel=1e-2)
    # 1 + 3/4 forwards pay for 14 rows of a rule that scores nothing
    assert report.gain_at_cost == pytest.approx((expected(14) / error**2).item(), rel=1e-2)
    assert report.gain_at_cost < report.gain
    json.dumps(report.as_dict(), allow_nan=False)


def test_the_expected_error_of_random_rows_is_that_of_many_draws():
    torch.manual_seed(1)
    g = torch.randn(20, 30).double() + 0.3
    n, k, valid = 25, 5, 20  # five rows have no gradient
    mean = g.sum(0) / n
    draws = torch.rand(40_000, valid).argsort(1)[:, :k]
    errors = (mean - valid / (n * k) * g[draws].sum(1)).square().sum(1)
    expected = random_error(n, valid, k, g.square().sum().item(), mean.square().sum().item())
    assert abs(errors.mean().item() - expected) < 4 * errors.std().item() / 200
    assert random_error(n, valid, 20, 1.0, 0.1) == 0.0


def test_costs():
    assert step_cost(128, 128, scored=False, backward="recompute") == 3.0
    assert step_cost(128, 32, scored=True, backward="recompute") == 1.75
    assert step_cost(128, 32, scored=True, backward="rows") == 1.5
    assert rows_at_cost(128, 0.75) == 32 and rows_at_cost(128, 3.5) == 128 and rows_at_cost(128, 1e-9) == 1


@pytest.mark.parametrize("selector", [selbp.Random(), selbp.Full()])
def test_unscored_steps_report_on_their_own_rows(selector):
    x, y = samples()
    y[:4] = -100
    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selector, keep=0.25, backward="recompute")
    step(x, y)
    report = step.report
    indices = report.selection.indices[report.selection.weights != 0]
    z = model(x[indices])
    assert report.loss == pytest.approx(F.cross_entropy(z, y[indices]).item(), rel=1e-5)
    assert report.accuracy == pytest.approx((z.argmax(1) == y[indices]).float().mean().item())
    assert not report.scored and report.gain is None and report.relative_residual is None
    assert report.k == len(report.selection.indices)


def test_losses_without_classes_have_no_accuracy():
    x, y = torch.randn(24, 12), torch.randn(24, 5)
    for selector in (selbp.Random(), selbp.GradientMatching()):
        step = selbp.SelectiveBackprop(mlp(), selector=selector, keep=0.25, loss="mse")
        step(x, y)
        assert step.report.accuracy is None
        assert (step.report.gain is None) == isinstance(selector, selbp.Random)


def test_token_figures():
    ids = torch.randint(0, 11, (8, 9))
    model = TokenModel()
    for rule in (selbp.TopGradNorm(), selbp.GradientMatching()):
        step = selbp.SelectiveBackprop(model, selector=rule, keep=0.5, loss="causal_lm")
        step(ids, ids)
        z = model(ids)[:, :-1]
        assert step.report.accuracy == pytest.approx((z.argmax(2) == ids[:, 1:]).float().mean().item())
        got, want = (
            gradients(model, step(ids, ids)),
            gradients(model, F.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten())),
        )
        head = [name for name in want if name.startswith("head")]
        difference = sum((got[name] - want[name]).square().sum() for name in head) ** 0.5
        norm = sum(want[name].square().sum() for name in head) ** 0.5
        assert step.report.relative_residual == pytest.approx((difference / norm).item(), abs=5e-4)


def test_phases_are_timed():
    x, y = samples()
    step = selbp.SelectiveBackprop(mlp(), selector=selbp.GradientMatching(), keep=0.25, backward="recompute")
    loss = step(x, y)
    assert list(step.report.seconds) == ["score", "select", "forward"]
    loss.backward()
    seconds = step.report.seconds
    assert list(seconds) == ["score", "select", "forward", "backward"] and all(s > 0 for s in seconds.values())
    assert step.report.backward == "recompute" and step.report.backward_reason == "asked for"


@pytest.mark.parametrize(
    "options",
    [
        *({"backward": way} for way in ("auto", "rows", "recompute")),
        *({"backward": way, "schedule": selbp.Schedule(start=1)} for way in ("auto", "rows", "recompute")),
        *({"backward": way, "micro_batch": 8} for way in ("auto", "recompute")),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_step_that_scores_nothing_says_so(options):
    rule = selbp.TopLoss() if "schedule" in options else selbp.Random()
    step = selbp.SelectiveBackprop(mlp(), selector=rule, keep=0.25, **options)
    step.backward(*samples())
    assert step.report.backward == "recompute" and "nothing is scored" in step.report.backward_reason
    if "schedule" in options:
        step.backward(*samples())
        assert "nothing is scored" not in step.report.backward_reason


def test_large_factors_do_not_outlive_the_choice(monkeypatch):
    monkeypatch.setattr("selbp.training.scored.DIAGNOSTIC_BYTES", 1)
    x, y = samples()
    step = selbp.SelectiveBackprop(mlp(), selector=selbp.TopLoss(), keep=0.25)
    step(x, y)
    assert step.report.gain is None and step.report.relative_residual is None
    step = selbp.SelectiveBackprop(mlp(), selector=selbp.GradientMatching(weights="mean"), keep=0.25)
    step(x, y)
    assert step.report.gain > 0  # from the Gram matrix and the mean gradient, which were computed anyway
    with pytest.raises(RuntimeError, match="released"):
        step.report._proxies.token_features  # noqa: B018


@pytest.mark.parametrize("positions", [1, 3])
def test_released_proxies_hold_no_factor(positions):
    proxies = HeadProxies(
        lambda: torch.randn(4, positions, 5), lambda: torch.randn(4, positions, 6), positions=positions
    )
    read = [proxies.token_residual, proxies.token_features, proxies.residual, proxies.features]
    alive = [weakref.ref(x) for x in read]
    proxies.gram()
    proxies.mean_gradient()
    proxies.release()
    del read
    assert all(x() is None for x in alive)
    with pytest.raises(RuntimeError, match="released"):
        proxies.features  # noqa: B018


def test_no_report_before_a_step():
    step = selbp.SelectiveBackprop(nn.Linear(2, 2), selector=selbp.Random(), keep=1)
    with pytest.raises(RuntimeError, match="before the first step"):
        step.report  # noqa: B018
