"""The table: what is written, what is estimated, what is refused, and that nothing spoils it."""

import csv
import io
import math

import pytest
import torch
from support.sampling_kit import known_table

from selbp.sampling import Draw, ScoreTable
from selbp.sampling.noise import anchored_transition, estimate_epsilon, estimate_transition, undone
from selbp.sampling.record import Fresh, record, responsibility, specified

zeros = torch.zeros(3, dtype=torch.int64)


def planted(n=20_000, classes=5, transition=None, seed=0):
    """Probabilities of a model that is sure of the true label to a varying degree, and labels through a transition."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randint(0, classes, (n,), generator=generator)
    logits = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(n), true] += 4 + 3 * torch.randn(n, generator=generator, dtype=torch.float64)
    every = torch.softmax(logits, 1)
    true = torch.multinomial(every, 1, generator=generator)[:, 0]  # so that the probabilities are right
    given = torch.multinomial(transition[true], 1, generator=generator)[:, 0]
    return every, true, given, logits


def symmetric(epsilon, classes=5):
    return (1 - epsilon) * torch.eye(classes, dtype=torch.float64) + epsilon / classes


@pytest.mark.parametrize("epsilon", [0.05, 0.25, 0.5])
def test_expectation_maximisation_recovers_epsilon(epsilon):
    every, _, given, _ = planted(transition=symmetric(epsilon))
    p = every.gather(1, given[:, None])[:, 0]
    # A sample's Fisher information about eps is that of its likelihood's slope, 1 / C - p.
    slope = (0.2 - p) / ((1 - epsilon) * p + epsilon / 5)
    error = float(slope.square().sum()) ** -0.5
    assert abs(float(estimate_epsilon(p, 5)) - epsilon) < 4.5 * error
    assert abs(float(estimate_epsilon(p, 4)) - epsilon) > 4.5 * error  # the test sees a wrong number of classes


def test_expectation_maximisation_recovers_a_transition():
    transition = symmetric(0.0)
    transition[1] = torch.tensor([0.0, 0.7, 0.3, 0.0, 0.0])
    transition[4] = torch.tensor([0.4, 0.0, 0.0, 0.0, 0.6])
    every, _, given, _ = planted(n=40_000, transition=transition)
    found, _ = estimate_transition(every, given)
    # 8000 samples of each true class, most of which the model is sure of: a standard error of about 0.006.
    assert (found - transition).abs().max() < 0.03


def directed():
    """Three classes of five are given as another one: two of them as each other."""
    transition = symmetric(0.0)
    transition[0, :2] = torch.tensor([0.75, 0.25])
    transition[1, :2] = torch.tensor([0.3, 0.7])
    transition[4] = torch.tensor([0.0, 0.0, 0.2, 0.0, 0.8])
    return transition


def test_the_surest_samples_tell_a_transition_that_the_model_has_learned():
    every, _, given, _ = planted(n=40_000, transition=directed())
    logits = (every @ directed()).log()  # as a model that fits the given labels has them
    found = anchored_transition(logits, given)
    # 800 anchors a class: a standard error of .016.
    assert found is not None and (found - directed()).abs().max() < 4.5 * 0.016 + 0.01
    assert (undone(logits, directed()).softmax(1) - every).abs().max() < 1e-4
    fitted, _ = estimate_transition(logits.softmax(1), given)
    assert (fitted - directed()).abs().max() > 0.1  # what expectation-maximisation makes of it


@pytest.mark.parametrize("epsilon", [0.0, 0.4])
def test_the_surest_samples_tell_nothing_where_no_class_is_taken_for_another(epsilon):
    every, _, given, _ = planted(n=40_000, transition=symmetric(epsilon))
    assert anchored_transition((every @ symmetric(epsilon)).log(), given) is None
    few = slice(0, 400)  # of which there are 8 for each class
    every, _, given, _ = planted(n=400, transition=directed())
    assert anchored_transition((every @ directed()).log()[few], given[few]) is None


@pytest.mark.parametrize("classes", [2, 5])
def test_what_a_weak_model_is_surest_of_is_no_noise(classes):
    generator = torch.Generator().manual_seed(0)
    logits = 0.2 * torch.randn(20_000, classes, generator=generator, dtype=torch.float64)
    best = torch.randint(0, classes, (20_000,), generator=generator)
    logits[torch.arange(20_000), best] += 1.8
    logits[torch.arange(20_000), (best + 1) % classes] += 0.6
    given = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert logits.softmax(1).max(1).values.topk(2000).values.mean() < 0.9  # it is wrong of its surest too
    assert anchored_transition(logits, given) is None


def test_a_transition_that_was_read_off_stays_is_saved_and_leaves_the_loss_alone():
    table, other = (ScoreTable(20, 5, noise="auto") for _ in range(2))
    assert table.noise == "symmetric" and table.transition is None
    table._believe(directed(), torch.arange(20) % 5)
    assert table.noise == "class" and table.shown_epsilon == 0.0
    table.record(Draw(torch.arange(20), 20), torch.arange(20) % 5, logits=torch.randn(20, 5))
    assert table.noise_share > 0 and (table.transition == directed()).all()
    other.load_state_dict(table.state_dict())
    assert other.noise == "class" and torch.equal(other.transition, table.transition)
    fixed = ScoreTable(20, 5)
    with pytest.raises(ValueError, match="noise is 'class'"):
        fixed.load_state_dict(table.state_dict())
    other.load_state_dict(fixed.state_dict())
    assert other.noise == "symmetric" and other.transition is None


@pytest.mark.parametrize("noise", ["symmetric", "class", "none"])
def test_a_filled_table_tells_noise_headroom_and_suspects(noise):
    every, true, given, logits = planted(n=5000, transition=symmetric(0.25))
    table = ScoreTable(5000, 5, noise=noise)
    table.fill(torch.arange(5000), logits, given)
    table.estimate(logits, given)
    table.fill(torch.arange(5000), logits, given)  # by the transition that was found
    table.measure()
    wrong = true != given
    g = table.score.double()
    assert table.headroom == pytest.approx(float(g.square().mean() / g.mean() ** 2), rel=1e-5)
    if noise == "none":
        assert table.noise_share == 0.0 and (table.responsibility == 1).all()
        return
    assert table.noise_share == pytest.approx(float(wrong.double().mean()), abs=0.03)
    found = table.suspects(500)
    # The estimate is calibrated: of 500 suspects as many are wrong as their probabilities say.
    expected = found.probability.double()
    error = float((expected * (1 - expected)).sum().sqrt()) + 1.0
    assert abs(float(wrong[found.ids].sum()) - float(expected.sum())) < 4.5 * error
    assert (found.given == given[found.ids]).all() and (found.probable != found.given).all()
    assert (found.probability.diff() <= 0).all()


CASES = {
    "plain": {},
    "uniform": {"uniform": 5},
    "places": {"uniform": 7, "place": True},
    "dead rows": {"uniform": 12, "live": True},
    "ignored": {"uniform": 12, "ignored": True},
    "broken": {"uniform": 12, "broken": True},
    "everything": {"uniform": 9, "place": True, "live": True, "ignored": True, "broken": True},
}


@pytest.mark.parametrize("noise", ["symmetric", "class", "none"])
@pytest.mark.parametrize("case", CASES)
def test_native_writes_what_is_specified(case, noise):
    options = CASES[case]
    tables = [known_table(30, noise=noise) for _ in range(2)]
    for time in range(1, 6):
        ids = torch.randperm(30)[:12]
        place = torch.randperm(12)[:9] if options.get("place") else None
        rows = 12 if place is None else 9
        samples = ids if place is None else ids[place]
        target = tables[0].label[samples].long()
        logits = 3 * torch.randn(rows, 4)
        live = torch.rand(rows) < 0.7 if options.get("live") else None
        if options.get("ignored"):
            target[0] = -100
        if options.get("broken"):
            logits[1, 2], logits[2, 0], logits[3] = torch.nan, torch.inf, -torch.inf
        fresh = Fresh(ids, options.get("uniform", 0), place, live, target)
        for write, table in zip((record, specified), tables, strict=True):
            assert write(table._columns, table._averages, fresh, logits, time) == -1
    one, other = (table.state_dict() for table in tables)
    for name, value in one.items():
        if isinstance(value, torch.Tensor):
            # float32 columns of float64 sums: one rounding apart at most; the averages are float64 throughout
            torch.testing.assert_close(value, other[name], rtol=3e-7, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("classes", [4, None])
def test_a_broken_row_spoils_nothing(bad, classes):
    table = ScoreTable(8, classes)
    draw = Draw(torch.arange(4), 4)
    values = torch.randn(4, 4) if classes else torch.rand(4)
    values[2] = bad
    target = torch.tensor([0, 1, 2, 3])
    table.record(draw, target, **({"logits": values} if classes else {"losses": values}))
    assert table.seen.tolist() == [1, 1, -1, 1, -1, -1, -1, -1]
    assert math.isfinite(table.headroom) and math.isfinite(table.noise_share)
    assert torch.isfinite(table.probability[[0, 1, 3]]).all() and table.probability[2].isnan()


def test_what_is_written_is_the_softmax():
    table = ScoreTable(10, 3)
    logits, target = torch.randn(4, 3), torch.tensor([0, 2, 1, 1])
    table.record(Draw(torch.tensor([7, 1, 3, 9]), 0), target, logits=logits)
    p = torch.softmax(logits, 1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(table.probability[[7, 1, 3, 9]], p)
    torch.testing.assert_close(table.responsibility[[7, 1, 3, 9]], responsibility(p, table.epsilon, 3).float())
    rival = logits.scatter(1, target[:, None], -torch.inf).argmax(1)
    assert table.rival[[7, 1, 3, 9]].tolist() == rival.tolist()
    assert table.coverage == 0.4


def test_only_uniform_rows_enter_the_averages():
    table = known_table(40)
    before = table._averages.state.clone()
    table.record(Draw(torch.arange(6), 0), table.label[:6].long(), logits=torch.randn(6, 4))
    assert torch.equal(table._averages.state, before)
    table.record(Draw(torch.arange(6), 2), table.label[:6].long(), logits=torch.randn(6, 4))
    g = table.score[:2].double()
    assert table.headroom == pytest.approx(float(g.square().mean() / g.mean() ** 2), rel=1e-6)


def test_epsilon_follows_uniform_rows_without_a_proxy():
    every, _, given, logits = planted(n=20_000, transition=symmetric(0.25))
    table = ScoreTable(20_000, 5, window=512)
    for part in torch.arange(20_000).split(100):
        table.record(Draw(part, 100), given[part], logits=logits[part])
    assert table.noise_share == pytest.approx(0.2, abs=0.04)  # the last 512 rows: a standard error of about 0.02


def test_a_label_of_another_sample_is_refused_and_nothing_written():
    table = known_table(20)
    before = table.state_dict()
    target = table.label[:5].long()
    target[3] = (target[3] + 1) % 4
    with pytest.raises(ValueError, match=r"row 3 is not the label \d that the table has of sample 3"):
        table.record(Draw(torch.arange(5), 5), target, logits=torch.randn(5, 4))
    after = table.state_dict()
    for name, value in before.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value.nan_to_num(), after[name].nan_to_num())
    table.forget(torch.tensor([3]))
    table.record(Draw(torch.arange(5), 5), target, logits=torch.randn(5, 4))


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_balance_shares_the_odds_among_classes(balance):
    table = ScoreTable(300, 3, balance=balance)
    target = torch.tensor([0] * 200 + [1] * 90 + [2] * 10)
    table.fill(
        torch.arange(300),
        torch.randn(300, 3) + 3 * torch.nn.functional.one_hot(target, 3) * (target != 2)[:, None],
        target,
    )
    from selbp.sampling.draw import Odds, odds_of

    factor = table.class_factor(Odds(0.5, 0.0))
    odds = odds_of(table._columns, torch.arange(300), Odds(0.5, 0.0), factor)
    totals = torch.zeros(3, dtype=torch.float64).index_add_(0, target, odds)
    want = torch.tensor([200.0, 90.0, 10.0], dtype=torch.float64) ** (1 - balance)
    torch.testing.assert_close(totals / totals.sum(), want / want.sum(), rtol=1e-6, atol=0)


def test_a_file_for_people(tmp_path):
    table = known_table(5)
    table.forget(torch.tensor([2]))
    table.to_csv(tmp_path / "table.csv")
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [line["id"] for line in lines] == list("01234")
    assert lines[2]["probability"] == lines[2]["label"] == lines[2]["probable_label"] == ""
    assert float(lines[1]["probability"]) == pytest.approx(float(table.probability[1]), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"noise": "class"}, {"noise": "none"}, {"classes": None}], ids=str)
def test_a_state_is_exact(options):
    options = {"classes": 4, **options}
    table = ScoreTable(20, **options)
    draw, target = Draw(torch.arange(9), 9), torch.randint(0, 4, (9,))
    seen = {"logits": torch.randn(9, 4)} if options["classes"] else {"losses": torch.rand(9)}
    table.record(draw, target, **seen)
    table.irreducible, table.price = torch.rand(20), 1.25
    file = io.BytesIO()
    torch.save(table.state_dict(), file)
    file.seek(0)
    other = ScoreTable(20, **options)
    other.load_state_dict(torch.load(file, weights_only=True))
    for x in (table, other):
        x.record(draw, target, **seen)
    for name, value in table.state_dict().items():
        got = other.state_dict()[name]
        assert torch.equal(value.nan_to_num(), got.nan_to_num()) if isinstance(value, torch.Tensor) else value == got


def test_a_state_without_a_price_is_taken():
    table = known_table(20)
    state = table.state_dict()
    del state["price"]
    table.price = 2.0
    table.load_state_dict(state)
    assert table.price is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s.pop("seen"), "must have the entries"),
        (lambda s: s.update(classes=5), "classes is 5, the table's 4"),
        (lambda s: s.update(noise="none"), "noise is 'none'"),
        (lambda s: s.update(probability=torch.zeros(3)), "probability must be a Tensor float32 .20,."),
        (lambda s: s.update(label=torch.zeros(20)), "label must be a Tensor int32"),
        (lambda s: s.update(time=-1), "time must be at least 0"),
        (lambda s: s.update(price=-1.0), "price must be finite and at least 0"),
    ],
    ids=["entry", "classes", "noise", "shape", "dtype", "time", "price"],
)
def test_a_state_that_does_not_fit_changes_nothing(change, says):
    table = known_table(20)
    state = table.state_dict()
    change(state)
    before = table.probability.clone()
    with pytest.raises(ValueError, match=says):
        table.load_state_dict(state)
    assert torch.equal(table.probability, before)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"samples": 0}, ValueError, "samples must be at least 1"),
        ({"samples": 2.5}, TypeError, "samples must be an int"),
        ({"samples": 5, "classes": 1}, ValueError, "classes must be at least 2"),
        ({"samples": 5, "classes": 3, "noise": "uniform"}, ValueError, "noise must be one of"),
        ({"samples": 5, "noise": "class"}, ValueError, 'noise="class" needs classes='),
        ({"samples": 5, "balance": 0.5}, ValueError, "balance needs classes="),
        ({"samples": 5, "classes": 3, "balance": 2}, ValueError, "balance must be finite and lie in"),
        ({"samples": 5, "classes": 3, "window": 0}, ValueError, "window must be at least 1"),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_wrong_tables_are_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        ScoreTable(**arguments)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda t: t.record(Draw(torch.arange(3), 0), torch.zeros(3).long()), "records logits"),
        (lambda t: t.record(Draw(torch.arange(3), 0), zeros, logits=torch.zeros(3, 5)), "must be .n, C. = .3, 4."),
        (lambda t: t.fill(torch.arange(3), torch.zeros(2, 4), torch.zeros(3).long()), "logits must be"),
        (lambda t: t.fill(torch.arange(3) + 90, torch.zeros(3, 4), zeros), r"ids must lie in \[0, 20\), got 90 to 92"),
        (lambda t: t.next(3), "No sampler of the step's table"),
        (lambda t: t.next(3, torch.arange(2)), r"ids must be \(n,\) = \(3,\)"),
        (lambda t: t.suspects(0), "n must be at least 1"),
        (lambda t: ScoreTable(4, 2).estimate(), "holds no score yet"),
    ],
    ids=["no logits", "classes", "rows", "range", "no sampler", "ids", "suspects", "empty"],
)
def test_wrong_calls_are_refused(call, says):
    with pytest.raises((ValueError, RuntimeError), match=says):
        call(known_table(20))


def test_what_another_device_sends_is_written_when_it_has_arrived(monkeypatch):
    """The queue of what is on its way, with an event of our own: a model on a GPU and a table on the CPU."""
    from selbp.sampling import written as module

    class Event:
        arrived = waited = False

        def query(self):
            return self.arrived

        def synchronize(self):
            self.waited = True

    events = []

    def sent(seen, device):
        events.append(Event())
        return events[-1], seen

    monkeypatch.setattr(module, "_sent", sent)
    table, here = ScoreTable(6, 3), torch.device("cpu")
    table.device = torch.device("meta")  # any other than the logits'
    for i in range(3):
        table.record(Draw(torch.tensor([i]), 0), torch.tensor([1]), logits=torch.randn(1, 3))
    table.device = here
    assert table.coverage == 0
    events[0].arrived = True
    table.refresh()
    assert table.seen[:3].tolist() == [1, -1, -1]
    assert table.state_dict()["seen"][:3].tolist() == [1, 2, 3]
    assert events[1].waited and events[2].waited


@pytest.mark.parametrize("what", ["ids", "place", "live", "target", "logits"])
def test_native_reads_rows_with_strides(what):
    """A rule may return any view as its indices; the kernel must not take it for contiguous memory."""
    kept = dict(
        ids=torch.tensor([7, 1, 4, 9, 2, 8, 0, 3]),
        place=torch.tensor([6, 0, 3, 5]),
        live=torch.tensor([True, False, True, True]),
        target=torch.tensor([2, 0, 1, 2]),
        logits=torch.randn(4, 3),
    )
    wide = torch.zeros(len(kept[what]), 3, *kept[what].shape[1:], dtype=kept[what].dtype)
    wide[:, 1] = kept[what]
    strided = {**kept, what: wide[:, 1]}
    assert torch.equal(strided[what], kept[what]) and not strided[what].is_contiguous()
    states = []
    for given, write in ((kept, record), (strided, record), (strided, specified)):
        table = ScoreTable(10, 3)
        fresh = Fresh(given["ids"], 4, given["place"], given["live"], given["target"])
        assert write(table._columns, table._averages, fresh, given["logits"], 5) == -1
        states.append(table)
    for table in states[1:]:
        assert torch.equal(table.seen, states[0].seen) and torch.equal(table.label, states[0].label)
        torch.testing.assert_close(table.probability, states[0].probability, rtol=1e-6, atol=1e-7, equal_nan=True)


class _Event:
    """Of a transfer that has not arrived."""

    def query(self):
        return False

    def synchronize(self):
        pass


@pytest.mark.parametrize("call", ["forget", "fill"])
def test_what_is_on_its_way_is_written_before_what_comes_later(monkeypatch, call):
    """A model on a GPU has sent a row; then its label is corrected."""
    from selbp.sampling import written as module

    monkeypatch.setattr(module, "_sent", lambda seen, device: (_Event(), seen))
    table, here = ScoreTable(6, 3), torch.device("cpu")
    table.device = torch.device("meta")  # any other than the logits'
    table.record(Draw(torch.tensor([2]), 0), torch.tensor([1]), logits=torch.randn(1, 3))
    table.device = here
    if call == "forget":
        table.forget(torch.tensor([2]))
        assert table.state_dict()["label"][2] == table.state_dict()["seen"][2] == -1
    else:
        table.fill(torch.tensor([2]), torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([1]))
        assert table.state_dict()["seen"][2] == 0 and float(table.probability[2]) < 0.01


def test_a_file_for_people_has_whole_numbers(tmp_path):
    table = ScoreTable(3, 2000)
    table._columns.seen[:2] = torch.tensor([1_234_567, 0])
    table._columns.label[0], table._columns.probability[0] = 1999, 1 / 3
    table.to_csv(tmp_path / "table.csv")
    lines = list(csv.DictReader((tmp_path / "table.csv").open()))
    assert [line["seen"] for line in lines] == ["1234567", "0", "-1"]
    assert (lines[0]["label"], lines[0]["probability"], lines[1]["label"]) == ("1999", "0.333333", "")
