"""Changes of the training part: the right share, the right direction, the test part as it was, the same each time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from selbp_study.data import CHANGES, DataError, load, resolve
from selbp_study.data.changes import CONFUSED, apply, nearest_classes
from selbp_study.findings import title_of


@pytest.fixture(scope="module")
def digits():
    return load("digits")


@pytest.mark.parametrize("change", ["noise=0.4", "class-noise=0.2", "long-tail=10", "duplicates=0.3"])
def test_a_name_is_its_data_set_each_time(digits, change):
    made, again = resolve(f"digits+{change}"), resolve(f"digits+{change}")
    assert made.name == f"digits+{change}" and made.fingerprint == again.fingerprint != digits.fingerprint
    assert torch.equal(made.test.inputs, digits.test.inputs) and torch.equal(made.test.labels, digits.test.labels)
    held_out = resolve(f"{made.name}-held-out")
    assert held_out.name == made.name + "-held-out" and len(held_out.train) + len(held_out.test) == len(made.train)
    assert title_of((made.name, "mlp", 128, 0.25)).startswith("digits with ")


def test_changes_follow_one_another(digits):
    made = resolve("digits+long-tail=10+noise=0.2")
    thinned = resolve("digits+long-tail=10")
    assert len(made.train) == len(thinned.train) < len(digits.train)
    wrong = (made.train.labels != thinned.train.labels).float().mean()
    assert abs(float(wrong) - 0.2) < 1 / len(made.train)


@pytest.mark.parametrize(
    ("change", "fingerprint"),
    [
        ("noise=0.4", "d94a00b7157b5949"),
        ("class-noise=0.2", "60b045d94bab500d"),
        ("long-tail=10", "3406cdbcfb8af98f"),
        ("duplicates=0.3", "cdebadfd4ee8001e"),
    ],
)
def test_one_change_is_the_data_that_was_published(change, fingerprint):
    assert resolve(f"digits+{change}").fingerprint == fingerprint


@pytest.mark.parametrize("first", ["noise=0.2", "duplicates=0.3", "noise=0.1"])
@pytest.mark.parametrize("second", ["duplicates=0.3", "duplicates=0.1", "noise=0.2"])
def test_a_change_falls_on_other_samples_than_the_one_before(digits, first, second):
    """As many of those that the first one changed are changed again as of the others."""
    n = len(digits.train)
    truth = torch.arange(n) % 10
    marked = replace(digits, train=replace(digits.train, inputs=torch.arange(n).view(n, 1, 1), labels=truth))
    once = apply(marked, first)
    twice = apply(once, second)

    def changed(before, after):
        other = (before.train.inputs != after.train.inputs).flatten(1).any(1)
        return other | (before.train.labels != after.train.labels)

    early, late = changed(marked, once), changed(once, twice)
    share, rate = early.double().mean(), late.double().mean()
    both, spread = float((early & late).sum()), float((n * share * rate * (1 - share) * (1 - rate)).sqrt())
    assert abs(both - n * float(share * rate)) < 4 * spread  # hypergeometric, four standard deviations


def test_class_noise_goes_to_the_class_most_alike(digits):
    made = resolve("digits+class-noise=0.25")
    before, after = digits.train.labels, made.train.labels
    alike, distance = nearest_classes(digits.train.inputs, before, 10)
    changed = before != after
    confused = before[changed].unique()
    assert torch.equal(confused, distance.argsort(stable=True)[:CONFUSED].sort().values)
    assert torch.equal(after[changed], alike[before[changed]])
    for label in confused.tolist():
        own = before == label
        assert abs(int(changed[own].sum()) - 0.25 * int(own.sum())) <= 0.5


def test_nearest_classes_by_hand():
    inputs = torch.tensor([[0.0], [2.0], [9.0], [11.0], [4.0]])
    alike, distance = nearest_classes(inputs, torch.tensor([0, 0, 1, 1, 2]), 3)
    assert alike.tolist() == [2, 2, 0] and distance.tolist() == [3.0, 6.0, 3.0]


def test_long_tail_has_its_profile(digits):
    made = resolve("digits+long-tail=50")
    before = torch.bincount(digits.train.labels, minlength=10).double()
    after = torch.bincount(made.train.labels, minlength=10).double()
    expected = before * 50.0 ** (-torch.arange(10, dtype=torch.float64) / 9)
    assert float((after - expected).abs().max()) <= 0.5 and after[0] == before[0]


def test_duplicates_copy_inputs_and_labels(digits):
    made = resolve("digits+duplicates=0.3")
    same = (made.train.inputs == digits.train.inputs).flatten(1).all(1)
    n = len(digits.train)
    assert len(made.train) == n and int((~same).sum()) <= round(0.3 * n)
    originals = {bytes(x.numpy()): int(y) for x, y in zip(digits.train.inputs, digits.train.labels, strict=True)}
    assert all(originals[bytes(x.numpy())] == int(y) for x, y in zip(made.train.inputs, made.train.labels, strict=True))
    assert int((~same).sum()) >= round(0.3 * n) - 5  # a copy of itself, or of an equal image


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("digits+blur=1", "no change 'blur' of a data set; there are noise, class-noise, long-tail, duplicates"),
        ("digits+noise=2", r"digits\+noise=2: share must be a number in \(0, 1\), got 2.0"),
        ("digits+noise=many", r"digits\+noise=many: could not convert"),
        ("digits+long-tail=0.5", "ratio must be a number above 1"),
        ("digits+duplicates=nan", r"share must be a number in \(0, 1\), got nan"),
    ],
    ids=["name", "share", "text", "ratio", "nan"],
)
def test_a_wrong_name_says_what_is_wrong(text, said):
    with pytest.raises(DataError, match=said):
        resolve(text)


def test_every_change_is_tried_here():
    assert set(CHANGES) == {"noise", "class-noise", "long-tail", "duplicates"}
