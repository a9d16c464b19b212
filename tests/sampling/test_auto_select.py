"""The controller on a clock of its own, and the proxy."""

import pytest
import torch
from support.sampling_kit import data, known_table

from selbp.sampling import AutoSelect, Candidate, ScoredBatchSampler, ScoreTable, fit_proxy, info_batch
from selbp.sampling import auto as module


class FakeStep:
    report = "report"

    def __init__(self, table):
        self.table = table

    def __call__(self, inputs, target=None):
        self.table.issued.done(self.table.issued.draws[0])
        return torch.zeros(())


def run(monkeypatch, headrooms, prices, **options):
    """The candidate in use at the end of each stretch of 50 steps with the headroom given."""
    table, clock = known_table(4000), [0.0]
    sampler = ScoredBatchSampler(table, k=4, pool=8)
    auto = AutoSelect(FakeStep(table), sampler, every=10, trial=4, **options)
    monkeypatch.setattr(module.time, "process_time", lambda: clock[0])
    used, batches = [], iter(sampler)
    for headroom in headrooms:
        table._averages.state[2:] = torch.tensor([1.0, headroom])
        for _ in range(50):
            next(batches)
            name = table.issued.draws[0].tag
            auto(None)
            clock[0] += prices[name]
        used.append(auto.current)
    return used, auto


def test_it_chooses_while_headroom_exceeds_the_price_and_stays_where_it_may(monkeypatch):
    used, auto = run(monkeypatch, [1.0, 3.0, 1.25, 1.15, 1.25, 1.4], {"random": 1.0, "drawn": 1.2})
    assert used == ["random", "drawn", "drawn", "random", "random", "drawn"]  # 1.25: the one in use stays
    assert auto.prices == pytest.approx({"random": 1.0, "drawn": 1.2})
    assert "drawn pays: headroom 3.00" in " ".join(d.why for d in auto.log)
    assert "drawn no longer pays" in " ".join(d.why for d in auto.log)


def test_its_state_continues(monkeypatch):
    used, auto = run(monkeypatch, [3.0], {"random": 1.0, "drawn": 1.2})
    other = AutoSelect(auto.step, auto.sampler, every=10, trial=4)
    other.load_state_dict(auto.state_dict())
    assert other.current == "drawn" and other.log == auto.log and other.prices == auto.prices
    with pytest.raises(ValueError, match="must have the entries"):
        other.load_state_dict({})


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    "batch",
    [lambda x: (x, x), lambda x: ({"x": x, "labels": x}, None), lambda x: ((x, 3), None), lambda x: (["a", x], None)],
    ids=["target", "dict", "tuple", "list"],
)
@pytest.mark.parametrize("kind", [torch.Tensor, OnGpu], ids=["cpu", "gpu"])
def test_steps_on_a_gpu_are_timed_by_the_clock(monkeypatch, batch, kind):
    """They run beside the process, whose own time says nothing of them."""
    read = []
    for clock in ("process_time", "perf_counter"):
        monkeypatch.setattr(module.time, clock, lambda clock=clock: read.append(clock) or 0.0)
    table = known_table(64)
    sampler = ScoredBatchSampler(table, k=4, pool=16)
    auto = AutoSelect(FakeStep(table), sampler)
    next(iter(sampler))
    auto(*batch(torch.zeros(4).as_subclass(kind)))
    assert read == ["perf_counter" if kind is OnGpu else "process_time"]


def test_a_candidate_with_another_table_is_refused():
    table = known_table(100)
    sampler = ScoredBatchSampler(table, k=4, pool=8)
    with pytest.raises(ValueError, match="the step of 'twin' must have table="):
        AutoSelect(FakeStep(table), sampler, others={"twin": Candidate(FakeStep(known_table(100)))})


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "halves"])
@pytest.mark.parametrize("noise", ["symmetric", "class"])
def test_a_proxy_learns_ranks_and_finds_the_planted_labels(noise, halves):
    samples = data(6000, features=8, classes=4)
    y = samples.tensors[1]
    wrong = torch.rand(6000) < 0.2
    given = torch.where(wrong, (y + torch.randint(1, 4, (6000,))) % 4, y)
    state = torch.get_rng_state()
    table = ScoreTable(6000, 4, noise=noise)
    proxy = fit_proxy(torch.utils.data.TensorDataset(samples.tensors[0], given), table, passes=8, halves=halves)
    assert torch.equal(torch.get_rng_state(), state)
    share = float(wrong.double().mean())
    assert table.noise_share == pytest.approx(share, abs=0.04)
    found = table.suspects(int(wrong.sum()))
    assert float(wrong[found.ids].double().mean()) > 0.8 > 4 * share - 0.1
    assert proxy.losses.shape == (6000,) and table.coverage == 0 and table.headroom > 1.5


@pytest.mark.parametrize("direction", [True, False], ids=["directed", "any class"])
def test_a_proxy_finds_out_whether_labels_are_wrong_in_one_direction(direction):
    samples = data(20_000, features=8, classes=4)
    y = samples.tensors[1]
    wrong = (torch.rand(20_000) < 0.3) & ((y == 1) | (not direction))
    given = torch.where(wrong, (y + (1 if direction else torch.randint(1, 4, (20_000,)))) % 4, y)
    table = ScoreTable(20_000, 4, noise="auto")
    fit_proxy(torch.utils.data.TensorDataset(samples.tensors[0], given), table)
    assert table.noise == ("class" if direction else "symmetric")
    assert table.noise_share == pytest.approx(float(wrong.double().mean()), abs=0.06)
    assert float(table.responsibility[wrong].mean()) + 0.4 < float(table.responsibility[~wrong].mean())


@pytest.mark.parametrize("inputs", ["images", "texts", "tokens", "lists of tokens", "dicts", "padded dicts"])
def test_a_proxy_reads_images_texts_and_tokens(inputs):
    y = torch.arange(60) % 2
    made = {
        "images": lambda i: torch.full((3, 20, 20), float(i % 2)),
        "texts": lambda i: "good film" if i % 2 else "bad film",
        "tokens": lambda i: torch.tensor([5, 6, 7 + i % 2]),
        "lists of tokens": lambda i: [5, 6, 7 + i % 2][i % 3 // 2 :],
        "dicts": lambda i: {"input_ids": [5, 6, 7 + i % 2], "token_type_ids": [i, i, i], "labels": int(y[i])},
        # What the mask hides would tell the classes apart.
        "padded dicts": lambda i: {"input_ids": [7 + i % 2, i, i], "attention_mask": [1, 0, 0], "label": y[i]},
    }[inputs]
    table = ScoreTable(60, 2)
    items = [made(i) if "dicts" in inputs else (made(i), int(y[i])) for i in range(60)]
    assert fit_proxy(items, table, passes=30).accuracy == 1.0
    if inputs == "padded dicts":
        assert len(set(table.probability[y == 0].tolist())) == 1


def test_a_proxy_reads_a_last_sample_on_its_own(monkeypatch):
    monkeypatch.setattr("selbp.sampling.reading.FIRST", 59)  # samples that are read at a time
    items = [(torch.full((2,), float(i % 2)), torch.tensor(i % 2)) for i in range(60)]
    assert fit_proxy(items, ScoreTable(60, 2), passes=30).accuracy == 1.0


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ({"x": torch.zeros(2)}, "dicts with labels or label, got one with x"),
        ({"x": torch.zeros(2), "y": 1, "label": 0}, "input_ids, pixel_values or one entry beside the label"),
        ({"input_ids": [1], "pixel_values": [1], "label": 0}, "got one with input_ids, pixel_values, label"),
        (torch.zeros(2), "must give .input, label., or a dict"),
    ],
    ids=["no label", "two inputs", "two of the known", "no pair"],
)
def test_what_a_proxy_cannot_read_is_named(item, says):
    with pytest.raises(TypeError, match=says):
        fit_proxy([item] * 60, ScoreTable(60, 2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"dataset": data(50)}, "the table's 60 samples, got 50"),
        ({"table": ScoreTable(60)}, "needs a table with classes="),
        ({"table": ScoreTable(60, 3)}, r"labels must lie in \[0, 3\)"),
        ({"features": torch.zeros(5, 2)}, "features must be .N, d. with N = 60"),
        ({"features": "pixels"}, 'features must be "auto"'),
        ({"passes": 0}, "passes must be at least 1"),
        ({"steps": 0}, "steps must be at least 1"),
    ],
    ids=["length", "classes", "labels", "matrix", "name", "passes", "steps"],
)
def test_wrong_proxies_are_refused(change, says):
    arguments = {"dataset": data(60), "table": ScoreTable(60, 4), **change}
    with pytest.raises(ValueError, match=says):
        fit_proxy(**arguments)


@pytest.mark.parametrize(
    ("steps", "passes"), [(None, 9), (2000, 9), (1000, 4), (400, 1)], ids=["unknown", "long", "short", "shortest"]
)
def test_a_proxy_of_few_samples_makes_at_most_a_twentieth_of_the_steps(steps, passes):
    samples = data(1500)
    made = fit_proxy(samples, ScoreTable(1500, 4), steps=steps)
    assert made.passes == passes
    assert steps is None or (made.passes - 1) * 1500 / 128 <= steps / 20


def test_a_proxy_without_time_leaves_the_table_as_it_was():
    table = ScoreTable(1500, 4)
    made = fit_proxy(data(1500), table, seconds=0.0)
    assert made.passes == 0 and bool(table.probability.isnan().all()) and float(table.epsilon) == pytest.approx(0.1)


def test_info_batch_leaves_easy_samples_out_and_counts_the_others_for_them():
    table = known_table(400, noise="none")
    sampler = info_batch(table, 50, epochs=4, ratio=0.5, anneal=0.75)
    loss = -table.probability.double().log()
    easy = loss < loss.mean()
    kept, weights = [], []
    for _ in range(4):
        list(sampler)
        plan = sampler._plan
        kept.append(set(plan["order"].tolist()))
        weights.append(torch.zeros(400, dtype=torch.float64).scatter(0, plan["order"], plan["weight"]))
    hard = set((~easy).nonzero()[:, 0].tolist())
    assert all(hard <= k for k in kept) and len(kept[3]) == 400 and (weights[3] == 1).all()
    total, count = weights[0].sum(), int(easy.sum())
    assert abs(total - 400) < 4.5 * count**0.5  # E = 400; each easy one is 0 or 2
    assert len(kept[0]) < 400


@pytest.mark.parametrize("trial", [1, 32, 33, 70])
def test_a_trial_of_any_length_ends(monkeypatch, trial):
    table, clock = known_table(40_000), [0.0]
    sampler = ScoredBatchSampler(table, k=4, pool=8)
    auto = AutoSelect(FakeStep(table), sampler, every=10, trial=trial)
    monkeypatch.setattr(module.time, "process_time", lambda: clock[0])
    table._averages.state[2:] = torch.tensor([1.0, 3.0])
    batches = iter(sampler)
    for step in range(2 * trial + 30):
        if step == trial:  # a resumed run measures as long
            state, auto = auto.state_dict(), AutoSelect(FakeStep(table), sampler, every=10, trial=trial)
            auto.load_state_dict(state)
        next(batches)
        name = table.issued.draws[0].tag
        auto(None)
        clock[0] += {"random": 1.0, "drawn": 1.2}[name]
    assert auto.current == "drawn" and auto.prices == pytest.approx({"random": 1.0, "drawn": 1.2})
