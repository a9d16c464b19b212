"""A rule of a user's own: what ``selbp.BaseSelector`` checks and remembers for it, alone, compiled, and in a step."""

import pytest
import torch
from support.selection_cases import EVERY_RULE, Batch
from torch import nn

import selbp


class Middle(selbp.BaseSelector):
    """The k losses nearest to ``center``."""

    needs = "loss"

    def __init__(self, center=0.5, weights="mean"):
        self.center, self.weights = center, weights
        self._calls = 0

    def choose(self, rows, k):
        return rows.pick(-(rows.stats.loss - self.center).abs(), k, weights=self.weights)


class Nearest(selbp.BaseSelector):
    needs = "gradients"

    def choose(self, rows, k):
        assert not torch.is_grad_enabled()
        return rows.pick(rows.gradients.mean_gradient().inner, k)


class Drawn(selbp.BaseSelector):
    needs = "loss"

    def choose(self, rows, k):
        return rows.pick(rows.extra("difficulty"), k, by="odds", weights="unbiased")


OWN = [Middle(), Nearest(), Drawn()]
IDS = [type(rule).__name__ for rule in OWN]


def extras_of(batch):
    return {"difficulty": batch.loss.nan_to_num(0.0)}


@pytest.mark.parametrize("rule", EVERY_RULE, ids=repr)
def test_the_librarys_own_rules_are_of_this_class(rule):
    assert isinstance(rule, selbp.BaseSelector) and isinstance(rule, selbp.Selector)


@pytest.mark.parametrize("rule", OWN, ids=IDS)
def test_it_chooses_k_valid_rows_and_repeats_one_at_weight_0_where_there_are_fewer(rule):
    batch = Batch(n=24, valid=[i % 3 != 0 for i in range(24)])
    for k in (1, 5, 16, 24):
        chosen = rule.select(
            batch.stats, k, proxies=batch.proxies, extras=extras_of(batch), generator=torch.Generator().manual_seed(0)
        )
        assert chosen.indices.shape == chosen.weights.shape == (k,) and chosen.weights.dtype == batch.loss.dtype
        assert (chosen.weights != 0).sum() == min(k, 16)
        assert batch.valid[chosen.indices[chosen.weights != 0]].all()


@pytest.mark.parametrize("rule", OWN, ids=IDS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, r"k must lie in \[1, n = 24\], got 0"),
        ({"k": 25}, r"k must lie in \[1, n = 24\], got 25"),
        ({"k": 2.0}, "k must be an int"),
        ({"stats": None}, "stats must be a BatchStatistics"),
        ({"generator": 3}, "generator must be a torch.Generator"),
    ],
    ids=["none", "too-many", "a-float", "no-stats", "no-generator"],
)
def test_wrong_calls_are_refused_for_it(rule, change, message):
    batch = Batch(n=24)
    call = {"stats": batch.stats, "k": 4, "proxies": batch.proxies, "extras": extras_of(batch), **change}
    with pytest.raises((TypeError, ValueError), match=message):
        rule.select(call.pop("stats"), call.pop("k"), **call)


def test_what_a_rule_needs_may_be_more_than_it_reads():
    class Watching(selbp.Random):
        needs = "gradients"

        def select(self, stats, k, *, proxies=None, extras=None, generator=None):
            return super().select(stats, k, generator=generator)

    assert Watching().select(Batch(n=8).stats, 2).indices.shape == (2,)


def test_gradients_are_asked_for_where_it_reads_them():
    batch = Batch(n=24)
    with pytest.raises(ValueError, match=r"Nearest\(\) reads the per-sample gradients"):
        Nearest().select(batch.stats, 4)
    with pytest.raises(ValueError, match="proxies must be of the n = 24 samples of stats, got 8"):
        Nearest().select(batch.stats, 4, proxies=Batch(n=8).proxies)


@pytest.mark.parametrize(
    ("extras", "message"),
    [
        (None, "extras must hold 'difficulty', one entry per sample, got none"),
        ({"other": torch.ones(24)}, "extras must hold 'difficulty', one entry per sample, got 'other'"),
        ([1.0], "extras must be a dict"),
        ({"difficulty": [1.0] * 24}, "difficulty must be a Tensor, got list"),
        ({"difficulty": torch.ones(24, 1)}, r"difficulty must be \(n,\) = \(24,\), got \(24, 1\)"),
    ],
    ids=["none", "another", "a-list", "no-tensor", "another-shape"],
)
def test_what_the_caller_must_know_is_asked_for(extras, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Drawn().select(Batch(n=24).stats, 4, extras=extras)


def test_the_weights_of_a_draw_are_unbiased():
    """E[sum_j w_j v_j] = (1/n) sum_i v_i over 4000 draws, within 4.5 of their own standard errors."""
    batch, generator = Batch(n=16), torch.Generator().manual_seed(0)
    value = torch.arange(16.0, dtype=torch.float64)
    found = []
    for _ in range(4000):
        indices, weights = Drawn().select(batch.stats, 4, extras=extras_of(batch), generator=generator)
        found.append((weights * value[indices]).sum())
    found = torch.stack(found)
    assert abs(found.mean() - value.mean()) < 4.5 * found.std() / 4000**0.5


def test_the_repr_is_the_call():
    assert repr(Middle(0.25, weights="batch")) == "Middle(center=0.25, weights='batch')"
    assert repr(Nearest()) == "Nearest()"


def test_its_state_is_empty_and_of_no_other_rule():
    rule = Middle()
    assert rule.state_dict() == {}
    rule.load_state_dict({})
    with pytest.raises(ValueError, match="state of Middle must have the entries"):
        rule.load_state_dict({"losses": torch.zeros(3)})


def test_a_rule_that_lacks_a_part_says_which():
    class Mute(selbp.BaseSelector):
        def choose(self, rows, k):
            return rows.pick(rows.stats.loss, k)

    class Idle(selbp.BaseSelector):
        needs = "loss"

    with pytest.raises(TypeError, match="Mute must say what it reads: needs"):
        selbp.SelectiveBackprop(nn.Linear(4, 3), selector=Mute(), keep=0.5)
    with pytest.raises(NotImplementedError, match="Idle must define choose"):
        Idle().select(Batch(n=8).stats, 2)


REMEMBER = (selbp.LossPercentile, selbp.GradNormImportance)  # a compiled step would not see their memory change
COMPILED = [pytest.param(rule, marks=pytest.mark.slow) for rule in EVERY_RULE if not isinstance(rule, REMEMBER)]


@pytest.mark.parametrize("rule", [*OWN, *COMPILED], ids=repr)
def test_it_compiles_as_one_graph(rule):
    batch = Batch(n=24, dtype=torch.float32)
    extras = {"irreducible_loss": batch.irreducible, **extras_of(batch)}

    def choose(stats, residual, features):
        return rule.select(stats, 6, proxies=selbp.GradientProxies(residual, features), extras=extras)

    arguments = batch.stats, batch.residual, batch.features
    torch.manual_seed(3)
    expected = choose(*arguments)
    torch._dynamo.reset()
    torch.manual_seed(3)
    got = torch.compile(choose, fullgraph=True, backend="aot_eager")(*arguments)
    assert torch.equal(got.indices, expected.indices)
    torch.testing.assert_close(got.weights, expected.weights)


@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("rule", OWN, ids=IDS)
def test_it_runs_in_a_step(rule, backward):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    step = selbp.SelectiveBackprop(model, selector=rule, keep=4, backward=backward)
    x, y = torch.randn(12, 6, dtype=torch.float64), torch.randint(0, 3, (12,))
    step(x, y, difficulty=torch.rand(12)).backward()
    indices, weights = step.report.selection
    losses = nn.functional.cross_entropy(model(x), y, reduction="none")
    expected = torch.autograd.grad((losses[indices] * weights).sum(), model[0].weight)[0]
    torch.testing.assert_close(model[0].weight.grad, expected)
