"""``micro_batch=``: a pool of any size, a few samples at a time, and the same gradients as all at once."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace

import pytest
import torch
from support.training_kit import TokenModel, assert_same, assert_same_state, mlp, samples
from torch import nn
from torch.nn import functional as F

import selbp
from selbp.sampling import ScoreTable
from selbp.training.measured import live_peak

EXACT = 1e-12
N = 50


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_near(got: dict, want: dict) -> None:
    """Equal states to rounding, with the same draws ahead."""
    assert torch.equal(got.pop("generator"), want["generator"])
    for name, value in want.pop("selector").items():
        torch.testing.assert_close(got["selector"][name], value, rtol=EXACT, atol=0, equal_nan=True)
    got.pop("selector")
    assert got == {name: value for name, value in want.items() if name != "generator"}


def plain() -> tuple[nn.Module, tuple[object, ...]]:
    x, y = samples(N)
    x[7, 2], y[5] = math.nan, -100  # neither may spoil the others
    return mlp().double(), (x.double(), y)


class Listening(nn.Module):
    """A model of strings, through their lengths, in an output with logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp().double()

    def forward(self, words: list[str], x: torch.Tensor) -> SimpleNamespace:
        lengths = torch.tensor([len(word) for word in words], dtype=x.dtype)
        return SimpleNamespace(logits=self.body(x + lengths[:, None]))


def listed() -> tuple[nn.Module, tuple[object, ...]]:
    x, y = samples(N)
    return Listening(), ({"words": ["a" * (i % 5) for i in range(N)], "x": x.double(), "labels": y},)


def tokens() -> tuple[nn.Module, tuple[object, ...]]:
    ids = torch.randint(0, 11, (N, 6))
    labels = ids.clone()
    labels[torch.arange(6) >= torch.randint(2, 7, (N, 1))] = -100  # ragged: no two micro-batches have equal counts
    labels[9] = -100
    return TokenModel().double(), ({"input_ids": ids, "labels": labels},)


CASES = {
    "plain": (plain, {}),
    "class weights": (plain, {"class_weight": torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0], dtype=torch.float64)}),
    "full head": (plain, {"head_gradient": "full"}),
    "evaluation mode": (plain, {"scoring": "eval"}),
    "strings in a dict": (listed, {}),
    "tokens": (tokens, {"loss": "causal_lm"}),
    "tokens without logits": (tokens, {"loss": "linear_causal_lm"}),
    "sketched tokens": (tokens, {"loss": "causal_lm", "proxy": "sketch"}),
}
RULES = {
    "top loss": selbp.TopLoss,
    "loss percentile": selbp.LossPercentile,
    "refitted norms": lambda: selbp.TopGradNorm(weights="refit"),
    "matching": selbp.GradientMatching,
    "random": selbp.Random,
    "full": selbp.Full,
}


def train(case: str, rule: str, micro_batch: int | None, turns: int = 1, **more: object) -> tuple[list, list, dict]:
    """Gradients and reports of some steps, and the state after them."""
    torch.manual_seed(11)
    make, options = CASES[case]
    model, data = make()
    generator = torch.Generator().manual_seed(3)
    step = selbp.SelectiveBackprop(
        model,
        selector=RULES[rule](),
        keep=0.3,
        backward="recompute",
        generator=generator,
        micro_batch=micro_batch,
        **options,
        **more,
    )
    found, reports = [], []
    for _ in range(turns):
        loss = step.backward(*data)
        assert not loss.requires_grad and float(loss) == step.report.loss
        found.append(gradients(model))
        reports.append(step.report)
    return found, reports, step.state_dict()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("case", CASES)
def test_the_gradients_are_those_of_all_at_once(case: str, rule: str) -> None:
    want, reports, state = train(case, rule, None)
    for size in (7, 64) if rule != "top loss" else (1, 7, N - 1, N):
        got, others, other_state = train(case, rule, size)
        assert_same(got[0], want[0], rtol=EXACT)
        assert torch.equal(others[0].selection.indices, reports[0].selection.indices)
        assert_near(other_state, dict(state))
        for name, value in reports[0].as_dict().items():
            other = others[0].as_dict()[name]
            if isinstance(value, float):
                assert other == pytest.approx(value, rel=1e-9, abs=1e-12), name
            elif name not in ("seconds", "backward_reason"):
                assert other == value, name


@pytest.mark.parametrize("between", ["full", "random"])
def test_the_schedule_and_the_draws_are_those_of_all_at_once(between: str) -> None:
    schedule = selbp.Schedule(start=1, every=2, between=between)
    want, reports, state = train("tokens", "loss percentile", None, 4, schedule=schedule)
    got, others, other_state = train("tokens", "loss percentile", 8, 4, schedule=schedule)
    for a, b, one, other in zip(got, want, reports, others, strict=True):
        assert_same(a, b, rtol=EXACT)
        assert (one.selected, one.scored, one.k, one.step) == (other.selected, other.scored, other.k, other.step)
        assert other.loss == pytest.approx(one.loss, rel=1e-12) and other.accuracy == one.accuracy
    assert_near(other_state, state)


def test_steps_are_counted_as_always() -> None:
    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.3, micro_batch=8, auto_advance=False)
    for turn in range(4):
        step.backward(*samples(), scale=0.5)
        if turn % 2:
            step.advance()
    assert step.optimizer_step == 2


@pytest.mark.parametrize("rule", [selbp.TopLoss(), selbp.GradientMatching()], ids=["losses", "gradients"])
def test_one_micro_batch_is_in_memory_at_a_time(rule: selbp.Selector) -> None:
    """The rest is n^2 products for a rule that matches, and what the model's weights take."""
    torch.manual_seed(0)
    wide = [nn.Linear(32, 256), *(layer for _ in range(3) for layer in (nn.Tanh(), nn.Linear(256, 256)))]
    model = nn.Sequential(*wide, nn.Tanh(), nn.Linear(256, 8), nn.Tanh(), nn.Linear(8, 5))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    n, size = 512, 32
    x, y = torch.randn(n, 32), torch.randint(0, 5, (n,))

    def peak(rows: int, selector: selbp.Selector, micro_batch: int | None) -> int:
        step = selbp.SelectiveBackprop(
            model, selector=selector, keep=0.125, backward="recompute", micro_batch=micro_batch
        )
        step.backward(x[:rows], y[:rows])  # what is kept from step to step
        return live_peak(lambda: step.backward(x[:rows], y[:rows]))

    plain_step, pooled = peak(size, selbp.Full(), None), peak(n, rule, size)
    products = 4 * n * n if rule.needs == "gradients" else 0  # float32
    assert pooled < 1.1 * plain_step + products + 200 * n
    assert peak(n, selbp.Full(), size) < 1.1 * plain_step + 200 * n < 0.2 * peak(n, selbp.Full(), None)


def test_a_scaler_and_autocast() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(), samples(64)
    found = []
    for size in (None, 8):
        step = selbp.SelectiveBackprop(
            model, selector=selbp.TopLoss(), keep=0.5, micro_batch=size, backward="recompute"
        )
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=64.0), torch.optim.SGD(model.parameters(), lr=1.0)
        seen: list[bool] = []
        handle = model[0].weight.register_hook(lambda _, seen=seen: seen.append(torch.is_autocast_enabled("cpu")))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            step.backward(x, y, scale=scaler.scale)
        handle.remove()
        assert seen and not any(seen)  # a backward runs in the types of its forward
        scaled = model[0].weight.grad.clone()
        scaler.unscale_(optimizer)
        torch.testing.assert_close(scaled, 64 * model[0].weight.grad)
        found.append(gradients(model))
    assert_same(found[1], found[0], rtol=4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize(
    "scale", [0.25, torch.tensor(0.25), lambda loss: loss / 4], ids=["number", "tensor", "function"]
)
def test_gradients_are_scaled_and_added_to_what_is_there(scale: object) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), samples(64)
    x = x.double()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5, micro_batch=8)
    step.backward(x, y)
    once = gradients(model)
    model[0].weight.square().sum().backward()
    other = gradients(model)
    model[0].weight.square().sum().backward()
    step.backward(x, y, scale=scale)
    got = gradients(model)
    want = {name: 0.25 * once[name] + other.get(name, 0.0) for name in once}
    assert_same(got, want, rtol=EXACT)


def test_a_normalizer_makes_micro_batches_of_pools_add_up() -> None:
    torch.manual_seed(4)
    model, (batch,) = tokens()
    count = (batch["labels"][:, 1:] != -100).sum()
    found = []
    for parts in ([slice(0, N)], [slice(0, 20), slice(20, N)]):
        step = selbp.SelectiveBackprop(model, selector=selbp.Full(), keep=1.0, loss="causal_lm", micro_batch=6)
        for part in parts:
            step.backward({name: x[part] for name, x in batch.items()}, normalizer=count)
        found.append(gradients(model))
    assert_same(found[1], found[0], rtol=EXACT)


def test_a_second_pass_on_the_same_rows() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), samples(64)
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.5, micro_batch=8)
    step.backward(x.double(), y)
    first = gradients(model)
    step.backward(x.double(), y, selection=step.report.selection)
    assert_same(gradients(model), first, rtol=EXACT)
    assert step.optimizer_step == 1


def test_a_table_of_losses_wants_no_logits() -> None:
    """Of an output in which there are none."""

    def distance(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return (output["place"] - target).square().sum(1)

    class Places(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"place": self.body(x)}

    for rule in (selbp.TopLoss(), selbp.Random()):
        table = ScoreTable(40)
        step = selbp.SelectiveBackprop(Places(), selector=rule, keep=0.5, micro_batch=8, table=table, loss=distance)
        step.backward(samples(40)[0], torch.randn(40, 5), ids=torch.arange(40))
        assert table.coverage > 0


@pytest.mark.parametrize("rule", [selbp.TopLoss(), selbp.Random()], ids=["scored", "unscored"])
@pytest.mark.parametrize("classes", [5, None], ids=["classes", "losses"])
def test_a_table_is_written_as_by_one_forward(rule: selbp.Selector, classes: int | None) -> None:
    columns = []
    for size in (None, 8):
        torch.manual_seed(0)
        model, (x, y) = mlp(), samples(40)
        table = ScoreTable(40, classes)
        generator = torch.Generator().manual_seed(0)
        step = selbp.SelectiveBackprop(
            model, selector=rule, keep=0.5, micro_batch=size, table=table, backward="recompute", generator=generator
        )
        for _ in range(3):
            step.backward(x, y, ids=torch.arange(40))
        columns.append(table.state_dict())
    for name, value in columns[0].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(columns[1][name], value, equal_nan=True)


class Balanced(nn.Module):
    """Returns a further loss beside its logits, a mean over its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp().double()

    def forward(self, x: torch.Tensor) -> SimpleNamespace:
        logits = self.body(x)
        return SimpleNamespace(logits=logits, aux_loss=logits.square().mean())


@pytest.mark.parametrize("rule", [selbp.TopLoss(), selbp.Random()], ids=["scored", "unscored"])
def test_an_auxiliary_loss_counts_once(rule: selbp.Selector) -> None:
    found = []
    for size in (None, 7):
        torch.manual_seed(0)
        model, (x, y) = Balanced(), samples(40)
        generator = torch.Generator().manual_seed(0)
        step = selbp.SelectiveBackprop(
            model, selector=rule, keep=0.5, micro_batch=size, backward="recompute", generator=generator
        )
        step.backward(x.double(), y, normalizer=100)
        found.append(gradients(model))
    assert_same(found[1], found[0], rtol=EXACT)


@pytest.mark.parametrize(("scoring", "updates"), [("same", 5), ("eval", 3)])
def test_batch_norm_follows_one_of_the_passes(scoring: str, updates: int) -> None:
    model, (x, y) = nn.Sequential(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 5)), samples(40)
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5, micro_batch=8, scoring=scoring)
    step.backward(x, y)
    assert model[1].num_batches_tracked == updates  # 40 rows that scored, or 20 that trained


def test_without_micro_batches_it_is_the_call_and_its_backward() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp(), samples()
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, backward="rows")
    step(x, y).backward()
    want = gradients(model)
    assert float(step.backward(x, y)) == step.report.loss
    assert_same(gradients(model), want, rtol=0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"backward": "rows"}, 'micro_batch= is for backward="recompute"'),
        ({"batchnorm": "subset"}, 'micro_batch= is for backward="recompute"'),
        ({"cut": "0"}, "micro_batch= goes without cut="),
        ({"micro_batch": 0}, "micro_batch must be at least 1"),
        ({"micro_batch": 2.5}, "micro_batch must be an int (samples)"),
        ({"micro_batch": True}, "micro_batch must be an int (samples)"),
    ],
    ids=["rows", "subset", "cut", "zero", "fraction", "flag"],
)
def test_what_cannot_work_is_refused_at_construction(options: dict, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(says)):
        selbp.SelectiveBackprop(mlp(), selector=selbp.TopLoss(), keep=0.5, **{"micro_batch": 4, **options})


def test_the_call_names_the_other_method() -> None:
    step = selbp.SelectiveBackprop(mlp(), selector=selbp.TopLoss(), keep=0.5, micro_batch=4)
    with pytest.raises(RuntimeError, match=r"call step.backward\(inputs, target\)"):
        step(*samples())
    with pytest.raises(TypeError, match="scale must be a number"):
        step.backward(*samples(), scale="2")
    assert step.optimizer_step == 0


def test_samples_that_interact_are_refused() -> None:
    def contrastive(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output @ output.T, torch.arange(len(output)), reduction="none")

    model = mlp()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5, loss=contrastive, micro_batch=8)
    with pytest.raises(ValueError, match="samples interact"):
        step.backward(*samples())
    assert model[0].weight.grad is None


def test_an_error_leaves_the_step_as_it_was() -> None:
    model = mlp()
    rule = selbp.LossPercentile()
    step = selbp.SelectiveBackprop(
        model, selector=rule, keep=0.5, micro_batch=8, generator=torch.Generator().manual_seed(0)
    )
    before = step.state_dict()

    def fail(loss: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        step.backward(*samples(), scale=fail)
    assert_same_state(step.state_dict(), before)
