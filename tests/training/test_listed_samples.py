"""Lists, tuples and arrays with one entry a sample are taken row by row, as tensors are; constants stay."""

import collections
import dataclasses

import numpy as np
import pytest
import torch
from support.training_kit import assert_same, gradients
from torch import nn

import selbp

N = 12
X = torch.randn(N, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
Y = torch.arange(N) % 4
VALUES = [0.3 * i - 1.0 for i in range(N)]  # one number a sample, which every kind of entry below stands for


@dataclasses.dataclass
class Marks:
    of: object
    unit: str = "m"


def ragged(i):
    return torch.full((1 + i % 3, 2), VALUES[i], dtype=torch.float64)


KINDS = {
    "strings": [str(v) for v in VALUES],
    "tuple of strings": tuple(str(v) for v in VALUES),
    "floats": VALUES,
    "numpy floats": [np.float64(v) for v in VALUES],
    "array": np.array(VALUES),
    "array of strings": np.array([str(v) for v in VALUES]),
    "deque": collections.deque(VALUES),
    "ragged tensors": [ragged(i) for i in range(N)],
    "tuple of ragged tensors": tuple(ragged(i) for i in range(N)),
    "scalars": [torch.tensor(v, dtype=torch.float64) for v in VALUES],
    "dicts": [{"boxes": ragged(i), "size": (3, 4)} for i in range(N)],
    "lists": [[v] * (i % 3 + 1) for i, v in enumerate(VALUES)],
    "dict of strings": {"names": [str(v) for v in VALUES]},
    "dataclass": Marks([str(v) for v in VALUES]),
    "dataclass of a tensor": Marks(torch.tensor(VALUES, dtype=torch.float64)),
    "named tuple": collections.namedtuple("Named", "names unit")([str(v) for v in VALUES], "m"),  # noqa: PYI024
    "structure": ([str(v) for v in VALUES], torch.tensor(VALUES, dtype=torch.float64)),
}


def number(entry):
    """The number that an entry stands for."""
    if isinstance(entry, dict):
        return number(entry["boxes"])
    if isinstance(entry, (list, torch.Tensor)):
        return number(entry[0]) if len(entry.shape if isinstance(entry, torch.Tensor) else "1") else float(entry)
    return float(entry)


class Model(nn.Module):
    """Adds each sample's number, times a parameter, to its features; there must be as many numbers as rows."""

    def __init__(self):
        super().__init__()
        self.scale, self.body, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 6), nn.Linear(6, 4)
        self.seen = []

    def forward(self, x, marks, constant=None):
        self.seen.append(constant)
        for name in ("of", "names"):
            marks = marks if isinstance(marks, torch.Tensor) else getattr(marks, name, marks)  # tensors had names too
        marks = marks["names"] if isinstance(marks, dict) else marks
        marks = marks[0] if isinstance(marks, tuple) and isinstance(marks[0], list) else marks
        assert len(marks) == len(x)
        added = torch.tensor([number(mark) for mark in marks], dtype=x.dtype)[:, None]
        return self.head(torch.tanh(self.body(x + added * self.scale)))


def model():
    torch.manual_seed(1)
    return Model().double()


def expected(network, marks, selection, valid=N):
    losses = nn.functional.cross_entropy(network(X, marks), Y, reduction="none") * (N / valid)
    return (losses[selection.indices] * selection.weights).sum()


STEPS = {
    "rows": {"backward": "rows", "selector": selbp.TopLoss()},
    "recompute": {"backward": "recompute", "selector": selbp.TopLoss()},
    "matching": {"backward": "recompute", "selector": selbp.GradientMatching()},
    "random": {"selector": selbp.Random()},
    "auto": {"selector": selbp.TopLoss()},
}


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_entries_are_taken(kind, how):
    network, marks = model(), KINDS[kind]
    step = selbp.SelectiveBackprop(network, keep=3, **STEPS[how])
    for inputs in ({"x": X, "marks": marks}, (X, marks)):
        got = gradients(network, step(inputs, Y))
        assert step.report.n == N
        assert_same(got, gradients(network, expected(network, marks, step.report.selection)), rtol=1e-9)


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize(
    "constant",
    [[1, 2, 3], (32, 32), "a mode", None, 3.5, np.arange(3), ["a", "b"], torch.Size([N, 6] * 6), {"p": (1, 2)}, {1, 2}],
    ids=["list", "tuple", "string", "none", "number", "array", "strings", "size", "dict", "set"],
)
def test_constants_stay_as_they_are(constant, how):
    network = model()
    step = selbp.SelectiveBackprop(network, keep=3, **STEPS[how])
    step({"x": X, "marks": VALUES, "constant": constant}, Y).backward()
    for seen in network.seen:
        assert type(seen) is type(constant)
        np.testing.assert_equal(seen, constant)


@pytest.mark.parametrize("how", STEPS)
def test_a_target_of_listed_samples(how):
    def loss(output, target):
        wanted = torch.tensor([int(entry["label"]) for entry in target])
        return nn.functional.cross_entropy(output, wanted, reduction="none")

    network, target = model(), [{"label": int(y), "boxes": ragged(i)} for i, y in enumerate(Y)]
    step = selbp.SelectiveBackprop(network, keep=3, loss=loss, **STEPS[how])
    got = gradients(network, step((X, VALUES), target))
    assert_same(got, gradients(network, expected(network, VALUES, step.report.selection)), rtol=1e-9)


class Images(nn.Module):
    """Pools each image of a list."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, images, targets=None):
        assert targets is None or len(targets) == len(images)
        return self.head(torch.stack([image.mean((1, 2)) for image in images]))


@pytest.mark.parametrize("how", STEPS)
@pytest.mark.parametrize("kind", [list, tuple], ids=["list", "tuple"])
def test_images_of_any_size_without_a_tensor_beside_them(how, kind):
    torch.manual_seed(1)
    network, images = Images().double(), kind(torch.randn(3, 4 + i, 5, dtype=torch.float64) for i in range(N))
    targets = kind({"label": int(y), "boxes": torch.rand(i % 3, 4)} for i, y in enumerate(Y))

    def loss(output, target):
        return nn.functional.cross_entropy(output, torch.tensor([entry["label"] for entry in target]), reduction="none")

    step = selbp.SelectiveBackprop(network, keep=3, loss=loss, **STEPS[how])
    got = gradients(network, step((images, targets), targets))
    losses, chosen = loss(network(images), targets), step.report.selection
    assert step.report.n == N
    assert_same(got, gradients(network, (losses[chosen.indices] * chosen.weights).sum()), rtol=1e-9)


@pytest.mark.parametrize("how", [*STEPS, "full", "cut"])
@pytest.mark.parametrize("kind", ["floats", "array", "numpy floats", "scalars", "ragged tensors", "dicts", "lists"])
def test_an_entry_that_is_not_finite_spoils_no_other(kind, how):
    network, marks = model(), KINDS[kind]
    marks = marks.copy()
    nan = float("nan")
    if kind == "dicts":
        marks[2] = {"boxes": torch.full((2, 2), nan, dtype=torch.float64), "size": (3, 4)}
    elif kind == "lists":
        marks[2] = [nan, 1.0]
    else:
        marks[2] = marks[2] * nan
    options = {"cut": "body", "selector": selbp.GradientMatching()} if how == "cut" else {"selector": selbp.Full()}
    step = selbp.SelectiveBackprop(network, keep=N, **STEPS.get(how, options))  # a slot for every sample: one is spare
    got = gradients(network, step((X, marks), Y))
    want = expected(network, KINDS[kind], step.report.selection, N - 1)
    assert_same(got, gradients(network, want), rtol=2e-7)  # n / valid is taken in float32
    assert all(g.isfinite().all() for g in got.values())


def opaque():
    class Graph:
        def __init__(self):
            self.nodes = torch.zeros(N, 2)

    return Graph()


class Sized:
    def __len__(self):
        return N


AMBIGUOUS = {
    "list of n tensors of n rows": [torch.zeros(N, 2) for _ in range(N)],
    "list of n lists of n strings": [["a"] * N for _ in range(N)],
    "tuple of n dicts of n rows": tuple({"a": torch.zeros(N)} for _ in range(N)),
    "tuple of n numbers": (1.0,) * N,
}


@pytest.mark.parametrize("value", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
@pytest.mark.parametrize("how", STEPS)
def test_what_may_be_read_in_two_ways_is_refused(value, how):
    step = selbp.SelectiveBackprop(model(), keep=3, **STEPS[how])
    with pytest.raises(ValueError, match="it may be one"):
        step((X, VALUES, value), Y)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (opaque(), "a Graph, from which the chosen samples cannot be taken"),
        (Sized(), "a Sized, from which"),
        (set(range(N)), "a set, from which"),
        (nn.utils.rnn.pack_sequence([torch.zeros(2), torch.zeros(1)]), "a PackedSequence, whose rows are time steps"),
        (lambda: torch.nested.nested_tensor([torch.zeros(2)] * N, layout=torch.jagged), "a nested tensor"),
        (torch.eye(N).to_sparse(), "layout torch.sparse_coo"),
        (torch.sparse_csr_tensor(torch.arange(N + 1), torch.arange(N), torch.ones(N)), "layout torch.sparse_csr"),
    ],
    ids=["object", "sized", "set", "packed", "nested", "sparse", "csr"],
)
def test_what_cannot_be_taken_is_refused(value, message):
    if callable(value):  # what takes seconds to make, made when it is wanted
        value = value()
    step = selbp.SelectiveBackprop(model(), keep=3, selector=selbp.TopLoss())
    with pytest.raises(TypeError, match=message):
        step((X, VALUES, value), Y)
    assert step.optimizer_step == 0


def test_a_tuple_of_tensors_is_structure_even_where_there_are_as_many_samples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(3, 4)

        def forward(self, pair):
            assert len(pair) == 2
            return self.head(pair[0] + pair[1])

    step = selbp.SelectiveBackprop(Two(), keep=1, selector=selbp.TopLoss(), backward="recompute")
    assert step(((torch.zeros(2, 3), torch.ones(2, 3)),), torch.tensor([0, 1])).isfinite()


@pytest.mark.parametrize(
    ("packed", "named"),
    [
        ({"cu_seq_lens_q": torch.arange(5)}, "cu_seq_lens_q"),
        ({"cu_seqlens": torch.arange(5)}, "cu_seqlens"),
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}, "position_ids"),
    ],
    ids=["cu_seq_lens", "cu_seqlens", "position_ids"],
)
def test_a_packed_batch_is_named(packed, named):
    batch = {"input_ids": torch.zeros(1, 6, dtype=torch.int64), **packed, "lengths": torch.arange(3)}
    step = selbp.SelectiveBackprop(model(), keep=3, selector=selbp.TopLoss(), loss="causal_lm")
    message = rf"the batch is packed \({named}\): one row holds several.*Pad instead.*'lengths'"
    with pytest.raises(ValueError, match=message):
        step(batch, torch.zeros(1, 6, dtype=torch.int64))
