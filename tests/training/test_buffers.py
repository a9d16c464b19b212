"""How buffers are followed and put back: right, few launches for all of them, and no copy of what stays."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import selbp
from selbp.common import buffers as buffers_module
from selbp.common.buffers import Buffers, Written, buffers_put_back


class Launches(TorchDispatchMode):
    """Operators that would launch a kernel: those that return no view and allocate no memory only."""

    FREE = ("empty", "detach", "view", "split", "unbind", "alias")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(name in str(function) for name in self.FREE):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class OwnNorm(nn.BatchNorm1d):
    """A norm layer that torch does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(super().forward(x))


def model(layers: int = 53, kind: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    return nn.Sequential(*(kind(5) for _ in range(layers)))


def values(net: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in net.buffers()]


def same(net: nn.Module, before: list[Tensor]) -> bool:
    return all(map(torch.equal, net.buffers(), before))


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, OwnNorm])
def test_all_running_statistics_take_three_launches_at_most(kind: type[nn.Module]) -> None:
    net = model(kind=kind)
    buffers = Buffers(net)
    for replays in (True, False):
        with Launches() as seen:
            written = Written(buffers, replays=replays)
        assert len(seen.names) <= 3, seen.names
        net(torch.randn(4, 5))
        with Launches() as seen:
            written.end()
        assert not seen.names
        with Launches() as seen:
            replayed = written.replayed()
            replayed.__enter__()
        assert len(seen.names) <= 3, seen.names
        replayed.__exit__(None, None, None)
        with Launches() as seen:
            written.undo()
        assert len(seen.names) <= 3, seen.names


@pytest.mark.parametrize("change", ["train", "eval", "dtype", "fewer", "deepcopy", "pickle"])
def test_the_statistics_come_back(change: str) -> None:
    net = model(3)
    buffers = Buffers(net)
    net(torch.randn(4, 5))
    with buffers.followed():
        pass
    if change == "eval":
        net[1].eval()
    if change == "dtype":
        net.double()
    if change == "fewer":
        net[0].running_mean, net[0].running_var = torch.zeros(2), torch.ones(2)
    if change in ("deepcopy", "pickle"):
        buffers = copy.deepcopy(buffers) if change == "deepcopy" else pickle.loads(pickle.dumps(buffers))
        net = buffers.model
    before, own = values(net), [*net.buffers()]
    with pytest.raises(ArithmeticError), buffers.followed(replays=False):
        for layer in net:
            if layer.training:
                for buffer in layer.buffers():
                    buffer.add_(1)
        raise ArithmeticError
    assert same(net, before)
    assert all(a is b for a, b in zip(own, net.buffers(), strict=True))


def test_a_replay_swaps_what_layers_write_to() -> None:
    net = model()
    buffers, own = Buffers(net), [*net.buffers()]
    for _ in range(2):
        before = values(net)
        with buffers.followed() as written:
            net(torch.randn(4, 5))
            after = values(net)
            for _ in range(2):  # as of each micro-batch
                with written.replayed():
                    assert same(net, before)
                    net(torch.randn(4, 5))
                    assert not torch.equal(before[0], net[0].running_mean)
                    storages = {x.untyped_storage().data_ptr() for x in net.buffers()}
                    assert len(storages) == len(own)  # a module may resize its buffer
                assert all(a is b for a, b in zip(own, net.buffers(), strict=True)) and same(net, after)


def test_what_stays_is_copied_in_the_first_step_with_a_second_forward_only() -> None:
    net = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5))
    net.register_buffer("mask", torch.ones(4))
    net.register_buffer("table", torch.ones(2**17))
    buffers = Buffers(net)

    def copied(replays: bool) -> int:
        with buffers.followed(replays=replays) as written:
            net(torch.randn(4, 5))
        return len(written._values._tensors)

    assert [copied(replays) for replays in (False, False, True, True, False)] == [3, 3, 5, 3, 3]
    buffers = copy.deepcopy(pickle.loads(pickle.dumps(buffers)))
    net = buffers.model
    assert copied(True) == 3
    net.eval()
    assert [copied(replays) for replays in (False, True, True)] == [
        0,
        2,
        0,
    ]  # another mode; the norm's are not looked at


def test_what_a_step_holds_after_it_is_what_changed() -> None:
    net = nn.Sequential(nn.BatchNorm1d(5))
    net.register_buffer("table", torch.ones(2**17))
    with Buffers(net).followed() as written:
        net(torch.randn(4, 5))
        written.end()
        assert sum(copy.numel() for _, copy in written._values._copies) == 11


@pytest.mark.parametrize("several", [False, True])
def test_buffers_of_every_kind_come_back(several: bool) -> None:
    net = nn.Module()
    kinds = {
        "half": torch.rand(3).half(),
        "complex": torch.rand(2, 3, dtype=torch.complex64),
        "bool": torch.rand(4) > 0.5,
        "transposed": torch.rand(3, 2).T,
        "empty": torch.rand(0, 3),
        "matrix": torch.rand(2, 3),
        "large": torch.rand(2**17),
    }
    for name, x in kinds.items():
        net.register_buffer(f"a_{name}", x)
        if several:  # of a kind are copied at once
            net.register_buffer(f"b_{name}", x.clone())
    before = [x.clone() for x in net.buffers()]
    with buffers_put_back(net):
        for x in net.buffers():
            x.zero_()
    for x, was in zip(net.buffers(), before, strict=True):
        assert torch.equal(x, was)


class Growing(nn.Module):
    """As observers of channels: a buffer is empty until the first minibatch says how many there are."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.zeros(0, dtype=torch.float64))
        self.register_buffer("beside", torch.ones(6, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = x * self.beside
        if self.largest.numel() == 0:
            self.largest.resize_(x.shape[1]).fill_(-1.0)
        self.largest.copy_(torch.maximum(self.largest, x.detach().amax(0)))
        return out


@pytest.mark.parametrize("scoring", ["same", "eval"])
def test_a_buffer_that_grows_writes_over_no_other(scoring: str) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(8, 6, dtype=torch.float64), torch.randint(0, 3, (8,))
    net = nn.Sequential(Growing(), nn.Linear(6, 3)).double()
    alone = copy.deepcopy(net)
    step = selbp.SelectiveBackprop(net, selector=selbp.TopLoss(), keep=0.5, backward="recompute", scoring=scoring)
    step(x, y).backward()
    rows = x if scoring == "same" else x[step.report.selection.indices]
    alone(rows)
    assert torch.equal(net[0].largest, alone[0].largest) and torch.equal(net[0].beside, torch.ones(6))


NORMS: dict[str, Any] = {
    "cumulative": lambda: nn.BatchNorm1d(8, momentum=None),
    "of the minibatch": lambda: nn.BatchNorm1d(8, track_running_stats=False),
    "instance": lambda: nn.Sequential(
        nn.Unflatten(1, (2, 4)), nn.InstanceNorm1d(2, track_running_stats=True), nn.Flatten()
    ),
    "own": lambda: OwnNorm(8),
    "frozen in part": lambda: nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8).eval()),
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"selector": selbp.Full(), "keep": 1.0},
    "unscored": {"selector": selbp.Random()},
    "rows": {"backward": "rows"},
    "recompute": {"backward": "recompute"},
    "scored in evaluation mode": {"backward": "recompute", "scoring": "eval"},
    "micro-batches": {"micro_batch": 4},
    "cut": {"selector": selbp.GradientMatching(), "cut": "2", "backward": "rows"},
    "recomputed cut": {"selector": selbp.GradientMatching(), "cut": "2", "backward": "recompute"},
}


def built(*layers: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), *layers, nn.Linear(8, 8), nn.Linear(8, 3))


def step_of(net: nn.Module, **options: Any) -> selbp.SelectiveBackprop:
    return selbp.SelectiveBackprop(net, **{"selector": selbp.TopLoss(), "keep": 0.5, **options})


@pytest.mark.parametrize("kind", ["rows", "recompute", "micro-batches", "cut", "recomputed cut"])
@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_are_those_of_one_forward(name: str, kind: str) -> None:
    net, plain = built(NORMS[name]()), built(NORMS[name]())
    step, generator = step_of(net, **KINDS[kind]), torch.Generator().manual_seed(1)
    for _ in range(3):
        x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
        step.backward(x, y)
        for rows in x.split(4) if kind == "micro-batches" else [x]:
            plain(rows)
    assert same(net, values(plain))


class Counter(nn.Module):
    """Counts its calls in place, and binds what it saw last anew."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.last = x.detach().mean()
        return x


@pytest.mark.parametrize("kind", KINDS)
def test_where_a_step_raises_all_buffers_come_back(kind: str) -> None:
    raises = False

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if raises and not (kind == "scored in evaluation mode" and not torch.is_grad_enabled()):
            raise ArithmeticError
        return nn.functional.cross_entropy(output, target, reduction="none")

    net = built(nn.Sequential(nn.BatchNorm1d(8), OwnNorm(8), Counter()))
    step, x, y = step_of(net, loss=loss, **KINDS[kind]), torch.randn(8, 6), torch.randint(0, 3, (8,))
    step.backward(x, y)
    before, own, raises = values(net), [*net.buffers()], True
    with pytest.raises(ArithmeticError):
        step.backward(x, y)
    assert same(net, before) and all(a is b for a, b in zip(net.buffers(), own, strict=True))
    raises = False
    step.backward(x, y)
    assert not same(net, before)


class Centre(nn.Module):
    """Makes its buffer of the first minibatch that it trains on, as a codebook is."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        if way == "none":
            self.register_buffer("centre", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and getattr(self, "centre", None) is None:
            if self.way == "none":
                self.centre = x.detach().mean(0)
            else:
                self.register_buffer("centre", x.detach().mean(0))
        return x - self.centre if hasattr(self, "centre") and self.centre is not None else x


@pytest.mark.parametrize("way", ["none", "absent"])
def test_a_look_ahead_leaves_no_buffer_that_it_has_made(way: str) -> None:
    """``backward="auto"`` runs eight rows first: the buffer would be their mean."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), Centre(way), nn.ReLU(), nn.Linear(16, 3))
    x, y = torch.randn(64, 4), torch.randint(0, 3, (64,))
    selbp.SelectiveBackprop(net, selector=selbp.TopLoss(), keep=0.25)(x, y).backward()
    assert torch.equal(net[1].centre, net[0](x).detach().mean(0))


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_the_look_at_a_cut_is_no_call(backward: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 16), Calls(), nn.ReLU(), nn.Linear(16, 3))
    step = selbp.SelectiveBackprop(net, selector=selbp.GradientMatching(), keep=0.25, cut="2", backward=backward)
    for _ in range(2):
        step(torch.randn(16, 4), torch.randint(0, 3, (16,))).backward()
    assert net[1].calls == 2


X, Y = torch.randn(16, 8, generator=torch.Generator().manual_seed(1)), torch.arange(16) % 3


def around(*parts: nn.Module, **options: Any) -> tuple[nn.Sequential, selbp.SelectiveBackprop]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), *parts, nn.Linear(8, 3))
    return net, selbp.SelectiveBackprop(net, selector=selbp.TopLoss(), keep=0.25, **options)


@pytest.mark.parametrize("backward", ["rows", "recompute", "auto"])
def test_a_norm_whose_buffers_have_no_memory_yet_sees_all_rows_once(backward: Any) -> None:
    net, step = around(nn.LazyBatchNorm1d(), backward=backward)
    step(X, Y)
    norm = nn.BatchNorm1d(8)
    norm(net[0](X))
    assert net[1].num_batches_tracked == 1 and torch.allclose(net[1].running_mean, norm.running_mean)


class HiddenWrite(nn.Module):
    """Writes in evaluation mode, where no version shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            self.count.data.add_(1)
        return x


def test_what_is_undone_each_step_is_known_to_change() -> None:
    net, step = around(HiddenWrite(), scoring="eval", backward="recompute")
    for _ in range(4):
        step(X, Y).backward()
        assert net[1].count == 0


class OfFewRows(nn.Module):
    """Writes in the forward of the chosen rows alone, and can fail there."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < len(X):
            self.count += 1
            if self.fails:
                raise RuntimeError("in the second forward")
        return x


def test_what_a_second_forward_alone_writes_comes_back_after_an_error_in_it() -> None:
    net, step = around(OfFewRows(), backward="recompute")
    for _ in range(4):
        step(X, Y).backward()
    before = net[1].count.clone()
    net[1].fails = True
    with pytest.raises(RuntimeError, match="in the second forward"):
        step(X, Y)
    assert net[1].count == before


class Resets(nn.Module):
    """A codebook that every third forward in training writes to."""

    def __init__(self, hidden: bool) -> None:
        super().__init__()
        self.hidden = hidden
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("code", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            if self.calls % 3 == 0:
                (self.code.data if self.hidden else self.code).copy_(self.code + x.detach().mean(0))
        return x + self.code.clone()


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("at", range(1, 6))
def test_a_resumed_step_copies_the_buffers_that_the_run_before_it_would_have(hidden: bool, at: int) -> None:
    """Which buffers are known to change decides from what a second forward starts."""

    def train(stop: int | None) -> list[Tensor]:
        net, step = around(Resets(hidden), backward="recompute")
        for turn in range(8):
            if turn == stop:
                saved = copy.deepcopy((net.state_dict(), step.state_dict()))
                net, step = around(Resets(hidden), backward="recompute")
                net.load_state_dict(saved[0])
                step.load_state_dict(saved[1])
            net.zero_grad()
            step(X + turn, Y).backward()
            with torch.no_grad():
                for p in net.parameters():
                    p -= 0.1 * p.grad
        return [*net.state_dict().values()]

    assert all(map(torch.equal, train(None), train(at)))


def test_a_step_that_is_wound_back_forgets_what_it_saw_later() -> None:
    net, step = around(Resets(False), backward="recompute")
    start = copy.deepcopy((net.state_dict(), step.state_dict()))
    runs = []
    for _ in range(2):
        net.load_state_dict(start[0])
        step.load_state_dict(start[1])
        for turn in range(4):
            step(X + turn, Y).backward()
        runs.append([*values(net), net[0].weight.grad])
        net.zero_grad(set_to_none=True)
    assert all(map(torch.equal, *runs))


class Kept(nn.Module):
    """Batch norm that torch's checkpoint runs once more in the backward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(self.norm, x, use_reentrant=False)


def test_one_backward_of_two_steps_on_a_model_leaves_its_buffers() -> None:
    net, first = around(Kept(), backward="recompute")
    second = selbp.SelectiveBackprop(net, selector=selbp.TopLoss(), keep=0.25, backward="recompute")
    loss = first(X, Y) + second(X + 1, Y)
    before = values(net)
    loss.backward()
    assert same(net, before) and not buffers_module._KEPT


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("backward", ["recompute", "auto"])
def test_a_buffer_of_several_lengths(backward: Any) -> None:
    part = nn.Identity()
    part.register_buffer("lists", torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]))
    net, step = around(part, backward=backward)
    for _ in range(2):
        step(X, Y).backward()
    assert [len(x) for x in net[1].lists.unbind()] == [2, 3]


@pytest.mark.parametrize(
    "wrong", [None, 3, [3], [[0, "code", True]], [[0, "code", 1, "stays"]], [[0, "code", True, "?"]]]
)
def test_a_state_of_other_buffers_is_refused(wrong: Any) -> None:
    _, step = around(Resets(False))
    step(X, Y)
    state = step.state_dict()
    assert state["buffers"]
    with pytest.raises(ValueError, match="the state's buffers must be lists"):
        step.load_state_dict({**state, "buffers": wrong})
    assert step.state_dict()["buffers"] == state["buffers"]
