"""How a proxy reads a data set: bounded chunks, workers and a bar, none of which changes what is read."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.sampling_kit import data
from torch import nn

import selbp
from selbp.integrations.sampled import Sampled
from selbp.sampling import ScoreTable, fit_proxy, reading

N = 90


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def size(i: int) -> int:
    return 100 if i < N - 1 else 20  # one of another size, at the very end


INPUTS: dict[str, Any] = {
    "images": lambda i: draw(3, 20, 24, seed=i),
    "images of two sizes": lambda i: draw(1, size(i), size(i), seed=i),
    "arrays of two sizes": lambda i: draw(size(i), size(i), seed=i).numpy(),
    "images of many sizes": lambda i: draw(30 + i % 3, 40, seed=i),
    "bytes of two sizes": lambda i: draw(size(i), size(i), seed=i).mul(255).to(torch.uint8),
    "vectors": lambda i: draw(7, seed=i),
    "vectors of two lengths": lambda i: draw(size(i), seed=i).round(decimals=1),
    "numbers": lambda i: draw(1, seed=i)[0],
    "texts": lambda i: "a b c d e"[: 1 + i % 9],
    "tokens of several lengths": lambda i: torch.arange(2 + (i > N // 2) * i % 5),
    "lists of tokens": lambda i: list(range(1 + i % 4)),
    "dicts": lambda i: {"pixel_values": draw(1, size(i), 50, seed=i), "label": i % 3, "name": str(i)},
    "padded dicts": lambda i: {"input_ids": [1, 2, i % 3], "attention_mask": [1, 1, i % 2], "labels": i % 3},
}


def samples(kind: str) -> list[Any]:
    made = [INPUTS[kind](i) for i in range(N)]
    return made if isinstance(made[0], dict) else [(x, i % 3) for i, x in enumerate(made)]


def losses(dataset: Any, **options: Any) -> torch.Tensor:
    return fit_proxy(dataset, ScoreTable(N, 3), passes=1, **options).losses


def flat(inputs: Any) -> torch.Tensor:
    """A function of the inputs, as a tensor or as a list."""
    return torch.stack([torch.as_tensor(x, dtype=torch.float32).flatten()[:10] for x in inputs])


@pytest.mark.parametrize("kind", INPUTS)
def test_it_does_not_depend_on_the_chunks(kind, monkeypatch):
    dataset = samples(kind)
    found = losses(dataset)
    assert torch.isfinite(found).all() and len(found.unique()) > 3
    for first, most, most_bytes in ((1, 1, 1 << 20), (N, N, 1 << 30), (N - 1, N, 1 << 30), (3, 7, 1 << 12)):
        for name, value in (("FIRST", first), ("MOST", most), ("BYTES", most_bytes)):
            monkeypatch.setattr(reading, name, value)
        assert torch.equal(losses(dataset), found)


@pytest.mark.parametrize("kind", ["images", "images of two sizes", "texts", "tokens of several lengths", "dicts"])
def test_workers_read_the_same(kind):
    dataset, state = samples(kind), torch.get_rng_state()
    assert torch.equal(losses(dataset, workers=2), losses(dataset))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["images", "images of two sizes", "dicts"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_function_or_a_matrix_tells_the_features(kind, workers):
    dataset = samples(kind)
    inputs = [item["pixel_values"] if isinstance(item, dict) else item[0] for item in dataset]
    matrix = flat(inputs)

    def function(given: Any) -> torch.Tensor:
        return flat([x["pixel_values"] if isinstance(x, dict) else x for x in given])

    want = losses(torch.utils.data.TensorDataset(matrix, torch.arange(N) % 3))
    assert torch.equal(losses(dataset, features=function, workers=workers), want)  # which no worker could be sent
    assert torch.equal(losses(dataset, features=matrix, workers=workers), want)


LABELS: dict[str, Any] = {
    "tensor": torch.tensor,
    "array": np.array,
    "array of bytes": lambda y: np.array(y, dtype=np.uint8),
    "number": np.int64,
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("named", [False, True], ids=["pairs", "dicts"])
def test_a_label_is_whatever_a_loader_takes(kind, named):
    plain = samples("dicts" if named else "vectors")
    made = [{**x, "label": LABELS[kind](x["label"])} if named else (x[0], LABELS[kind](x[1])) for x in plain]
    assert len(torch.utils.data.default_collate([x["label"] if named else x[1] for x in made])) == N
    assert torch.equal(losses(made), losses(plain))


@pytest.mark.parametrize("wrong", [[1], np.array(0.5), np.array(True)], ids=["row", "float", "bool"])
def test_labels_that_are_no_classes_are_refused(wrong):
    with pytest.raises(ValueError, match="a proxy needs one class a sample"):
        losses([(x, wrong) for x, _ in samples("vectors")])


class Counted(torch.utils.data.Dataset):
    """Items of 4000 bytes; notes how many were asked for at a time."""

    def __init__(self, n: int) -> None:
        self.n, self.asked = n, list[int]()

    def __len__(self) -> int:
        return self.n

    def __getitems__(self, numbers: list[int]) -> list[Any]:
        self.asked.append(len(numbers))
        return [(torch.full((1000,), float(i)), i % 3) for i in numbers]

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])[0]


def test_chunks_grow_while_they_are_small(monkeypatch):
    monkeypatch.setattr(reading, "BYTES", 4000 * 50)
    dataset = Counted(200)
    fit_proxy(dataset, ScoreTable(200, 3), passes=1)
    assert dataset.asked == [8, 16, 32, 50, 50, 44]
    monkeypatch.setattr(reading, "BYTES", 1 << 30)
    monkeypatch.setattr(reading, "MOST", 60)
    dataset = Counted(200)
    fit_proxy(dataset, ScoreTable(200, 3), features=torch.zeros(200, 2), passes=1)
    assert dataset.asked == [8, 16, 32, 60, 60, 24]
    monkeypatch.setattr(reading, "BYTES", 1)  # less than one takes
    dataset = Counted(20)
    fit_proxy(dataset, ScoreTable(20, 3), passes=1)
    assert dataset.asked == [8, *[1] * 12]


class Image:
    """What of a PIL image is read."""

    def getbands(self) -> tuple[str, ...]:
        return "R", "G", "B"

    size = (20, 30)


@pytest.mark.parametrize(
    ("inputs", "size"),
    [
        (torch.zeros(3, 5), 60),
        (np.zeros((2, 2)), 32),
        ("four", 4),
        ({"x": torch.zeros(2), "y": [torch.zeros(3), b"ab"]}, 22),
        ([1, 2], 64),
        ([[1], [2, 3]], 96),
        ([], 0),
        ([Image()], 1800),
        (3.5, 32),
    ],
    ids=["tensor", "array", "text", "dict", "numbers", "lists", "nothing", "image", "number"],
)
def test_what_inputs_take_is_known(inputs, size):
    assert reading._bytes(inputs) == size


def test_features_of_two_lengths_are_named():
    items = [(torch.zeros(1 + 2 * (i > 60), 20, 20), i % 3) for i in range(N)]
    with pytest.raises(ValueError, match="one length d for all samples, got 243 and 256: give images as many channels"):
        losses(items)
    with pytest.raises(ValueError, match="one length d for all samples, got 8 and 16"):
        losses(items, features=lambda inputs: torch.zeros(len(inputs), min(16, len(inputs))))


def test_an_error_in_a_worker_has_its_cause():
    with pytest.raises(TypeError, match="dicts with labels or label, got one with x"):
        losses([{"x": torch.zeros(2)}] * N, workers=1)


@pytest.mark.parametrize(("workers", "error"), [(-1, ValueError), (1.5, TypeError), ("2", TypeError)], ids=str)
def test_wrong_workers_are_refused(workers, error):
    with pytest.raises(error, match="workers must be"):
        losses(samples("vectors"), workers=workers)


def test_everything_in_one_call_hands_them_on():
    dataset = data(N, classes=3)
    found = [
        selbp.auto_select(nn.Linear(6, 3), dataset, classes=3, k=4, pool=8, workers=w).sampler.table for w in (0, 2)
    ]
    assert torch.equal(*(table.probability for table in found))
    sampled = Sampled({"classes": 3, "pool": 8, "workers": 1}, 4, None)
    sampled.loader(dataset, dataset)
    assert torch.equal(sampled.table.probability, found[0].probability)


class Bar:
    """Stands in for tqdm's."""

    made: list[Bar] = []  # noqa: RUF012

    def __init__(self, **options: Any) -> None:
        self.options, self.shown, self.closed = options, options["initial"], False
        self.made.append(self)

    def update(self, n: int) -> None:
        self.shown += n

    def close(self) -> None:
        self.closed = True


def test_a_bar_shows_a_reading_that_takes_long(monkeypatch):
    tqdm = ModuleType("tqdm")
    tqdm.tqdm = Bar  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tqdm", tqdm)
    monkeypatch.setattr(Bar, "made", [])
    monkeypatch.setattr(reading, "PATIENCE", 1e9)
    losses(samples("vectors"))
    assert not Bar.made
    monkeypatch.setattr(reading, "PATIENCE", 0.0)
    losses(samples("vectors"))
    (bar,) = Bar.made
    assert (bar.shown, bar.options["total"], bar.closed) == (N, N, True)
    assert bar.options["disable"] is None  # no terminal: no bar
    with pytest.raises(ValueError, match="a tensor"):
        losses(samples("vectors"), features=lambda inputs: inputs if len(inputs) == 8 else None)
    assert Bar.made[-1].closed and Bar.made[-1].shown < N


def test_no_bar_without_tqdm_or_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(reading, "PATIENCE", 0.0)
    losses(samples("vectors"))
    monkeypatch.setitem(sys.modules, "tqdm", None)  # an import raises
    losses(samples("vectors"))
    assert capsys.readouterr() == ("", "")
