"""A checkpointed block's second run computes the network of its first one, whatever is drawn inside, or is refused."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import numpy
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import selbp

F64 = torch.float64
N = 8
INDICES = {
    "some": [6, 2],
    "twice": [5, 0, 5],
    "one": [3],
    "permuted": [3, 0, 7, 1, 6, 2, 5, 4],
    "bootstrap": [3, 0, 0, 1, 6, 2, 6, 4],
    "more than n": [*range(N), 1, 1],
    "none": [],
}


class Computes(nn.Module):
    """A linear layer before and after the function under test."""

    def __init__(self, function: Callable[[Tensor], Tensor], width: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.function(self.first(x).tanh()))
        return out


class Sees(nn.Module):
    """Adds a table that all samples share, of as many rows as there are samples."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.linspace(-1, 1, N * 4).view(N, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.places, 0.4)


def steps_first(x: Tensor) -> Tensor:
    return F.dropout(x.transpose(0, 1).contiguous(), 0.4).transpose(0, 1)


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.3, batch_first=True)
    layer.self_attn.dropout = 0.0
    return layer


# The shape of a sample, and what runs on n of them. A size of N among the others must not be taken for the samples'.
DROPOUTS: dict[str, tuple[tuple[int, ...], Callable[[], Callable[[Tensor], Tensor]]]] = {
    "dropout": ((5, 4), lambda: nn.Dropout(0.4)),
    "of N steps": ((N, 4), lambda: nn.Dropout(0.4)),
    "everything": ((4,), lambda: nn.Dropout(1.0)),
    "in place": ((5, 4), lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.4, inplace=True))),
    "torch.dropout": ((5, 4), lambda: lambda x: torch.dropout(x, 0.4, train=True)),
    "by name": ((5, 4), lambda: lambda x: F.dropout(input=x, p=0.4, training=True)),
    "two": ((5, 4), lambda: nn.Sequential(nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.2))),
    "1d": ((5, 4), lambda: nn.Dropout1d(0.4)),
    "1d of a vector": ((4,), lambda: nn.Dropout1d(0.4)),
    "2d": ((3, 2, 4), lambda: nn.Dropout2d(0.4)),
    "3d": ((3, 2, 2, 4), lambda: nn.Dropout3d(0.4)),
    "3d of an image": ((3, 2, 4), lambda: nn.Dropout3d(0.4)),
    "feature_dropout": ((5, 4), lambda: lambda x: torch.feature_dropout(x, 0.4, True)),
    "steps first": ((5, 4), lambda: steps_first),
    "N steps first": ((N, 4), lambda: steps_first),
    "of a shared table": ((N, 4), Sees),
    "transformer": ((5, 4), encoder),
    "inner": ((5, 4), lambda: Inner()),
}


class Inner(nn.Module):
    """A checkpointed block inside another, between two dropouts of the outer one."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Computes(nn.Dropout(0.4))
        self.wrapped = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.2)
        x = selbp.checkpoint(self.block, x) if self.wrapped else self.block(x)
        return F.dropout(x, 0.3)


def block_of(name: str, n: int = N) -> tuple[Computes, Tensor]:
    shape, make = DROPOUTS[name]
    torch.manual_seed(0)
    return Computes(make()).to(F64), torch.randn(n, *shape, dtype=F64)


def losses_of(block: nn.Module, x: Tensor, wrapped: bool) -> Tensor:
    torch.manual_seed(7)
    out = selbp.checkpoint(block, x) if wrapped else block(x)
    return out.square().flatten(1).sum(1)


@pytest.mark.parametrize("name", DROPOUTS)
def test_the_masks_are_those_of_the_block_without_a_checkpoint(name: str) -> None:
    block, x = block_of(name)
    x.requires_grad_()
    leaves = [x, *block.parameters()]
    for which, indices in INDICES.items():
        index, weights = torch.tensor(indices, dtype=torch.int64), torch.linspace(1, 2, len(indices), dtype=F64)
        if name == "inner":
            block.function.wrapped = False  # type: ignore[union-attr]
        plain = losses_of(block, x, wrapped=False)
        if name == "inner":
            block.function.wrapped = True  # type: ignore[union-attr]
        kept = losses_of(block, x, wrapped=True)
        torch.testing.assert_close(kept, plain, rtol=1e-12, atol=1e-14)
        want = torch.autograd.grad((plain[index] * weights).sum(), leaves)
        got = torch.autograd.grad((selbp.select(kept, index) * weights).sum(), leaves)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a.to_dense(), b, rtol=1e-11, atol=1e-13, msg=lambda m, w=which: f"{w}: {m}")


@pytest.mark.parametrize("n", [1, N])
def test_no_row_that_counts_gives_zeros(n: int) -> None:
    block, x = block_of("dropout", n)
    kept = losses_of(block, x * torch.nan, wrapped=True)
    chosen = selbp.select(kept, torch.arange(n), any_valid=torch.tensor(False))
    for gradient in torch.autograd.grad((chosen * 0).nan_to_num(), list(block.parameters()), torch.zeros(n, dtype=F64)):
        assert not gradient.any()


def test_checkpoints_in_a_checkpoint_keep_their_own_masks() -> None:
    """Three deep: the innermost draws in the first run of the outermost alone."""

    class Holds(nn.Module):
        def __init__(self, block: nn.Module) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(selbp.checkpoint(self.block, x), 0.1).tanh()

    torch.manual_seed(0)
    block = Holds(Holds(Computes(nn.Dropout(0.4)))).to(F64)
    x, index = torch.randn(N, 4, dtype=F64), torch.tensor([6, 2])
    gradients = []
    for wrapped in (True, False):  # without the outermost checkpoint the others keep the masks of n rows
        block.zero_grad()
        selbp.select(losses_of(block, x, wrapped), index).sum().backward()
        gradients.append([p.grad.clone() for p in block.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


class Attention(nn.Module):
    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(x, x, x, need_weights=self.need_weights)[0]
        return out


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.layer = kind(4, 4, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)[0]
        return out


def with_a_generator(x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**32)
    return x + torch.randn(x.shape, generator=generator, dtype=x.dtype)


OTHERS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "attention": lambda: Attention(False),
    "attention with weights": lambda: Attention(True),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
    "scaled_dot_product_attention": lambda: lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.3),
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "alpha": lambda: nn.AlphaDropout(0.3),
    "feature alpha": lambda: nn.FeatureAlphaDropout(0.3),
    "before a mask": lambda: nn.Sequential(nn.AlphaDropout(0.3), nn.Dropout(0.2)),
    "rrelu": lambda: nn.RReLU(),
    "gumbel": lambda: lambda x: F.gumbel_softmax(x, dim=-1),
    "rand": lambda: lambda x: x + torch.rand_like(x),
    "stochastic depth": lambda: lambda x: x * torch.bernoulli(torch.full((N, 1, 1), 0.5, dtype=x.dtype)),
    "in place": lambda: lambda x: x + torch.empty_like(x).normal_(),
    "a generator": lambda: with_a_generator,
    "in place, a generator": lambda: lambda x: x + torch.empty_like(x).normal_(generator=torch.Generator()),
    "python": lambda: lambda x: x * random.random(),
    "numpy": lambda: lambda x: x * float(numpy.random.rand()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_draws_are_refused_in_the_forward(name: str) -> None:
    torch.manual_seed(0)
    block = Computes(OTHERS[name]()).to(F64)
    x = torch.randn(N, 5, 4, dtype=F64)
    with pytest.raises(NotImplementedError, match=r"is not|are not a dropout mask.*torch\.utils\.checkpoint"):
        selbp.checkpoint(block, x)
    with torch.no_grad():
        if name not in ("lstm", "gru"):  # cuDNN's draws move no generator: these are found by type, before they run
            selbp.checkpoint(block, x)
    if isinstance(block.function, nn.Module):
        block.eval()
        selbp.checkpoint(block, x)


def test_a_single_recurrent_layer_has_no_dropout_to_draw() -> None:
    layer = nn.LSTM(4, 4, 1, batch_first=True)
    layer.dropout = 0.3
    selbp.checkpoint(Computes(lambda x: layer(x)[0]), torch.randn(N, 5, 4))


def test_a_mask_in_which_no_dim_is_the_samples_is_refused() -> None:
    block = Computes(lambda x: F.dropout(x.flatten(0, 1), 0.5).unflatten(0, (N, 5)))
    with pytest.raises(NotImplementedError, match="without a dim of the 8 samples"):
        selbp.checkpoint(block, torch.randn(N, 5, 4))


def test_a_block_that_calls_dropout_otherwise_the_second_time_is_an_error() -> None:
    block, x = block_of("dropout")
    kept = losses_of(block, x, wrapped=True)
    block.eval()
    with pytest.raises(RuntimeError, match="0 calls instead of 1"):
        selbp.select(kept, torch.tensor([1])).sum().backward()
    block.train()
    kept = losses_of(block, x, wrapped=True)
    block.function = nn.Sequential(nn.Dropout(0.4), nn.Dropout(0.4))
    with pytest.raises(RuntimeError, match="more calls instead of 1"):
        selbp.select(kept, torch.tensor([1])).sum().backward()
    kept = losses_of(block, x, wrapped=True)
    block.function = nn.Sequential(nn.Dropout(0.4), nn.Dropout1d(0.4))
    with pytest.raises(RuntimeError, match=r"a mask \(1, 5, 1\) instead of \(8, 5, 4\)"):
        selbp.select(kept, torch.tensor([1])).sum().backward()


def test_a_checkpoint_of_torch_inside_is_an_error() -> None:
    """It runs its block a third time, where no mask can be replayed."""
    inner = Computes(nn.Dropout(0.4))
    block = Computes(lambda x: torch.utils.checkpoint.checkpoint(inner, x, use_reentrant=False))
    kept = losses_of(block, torch.randn(N, 4), wrapped=True)
    with pytest.raises(torch.utils.checkpoint.CheckpointError):
        selbp.select(kept, torch.tensor([1, 2])).sum().backward()


def test_compiled_code_leaves_a_checkpoint_to_python() -> None:
    block, x = block_of("dropout")
    compiled = torch.compile(lambda x: selbp.checkpoint(block, x) * 1.0, backend="eager")
    gradients = []
    for forward in (block, compiled):
        torch.manual_seed(7)
        losses = forward(x).square().flatten(1).sum(1)
        gradients.append(torch.autograd.grad(selbp.select(losses, torch.tensor([5, 2])).sum(), block.parameters()))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


class Adds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4).to(F64)

    def forward(self, x: Tensor, other: Tensor, scale: Tensor) -> Tensor:
        out: Tensor = self.layer((x + other).tanh()) * scale
        return out


@pytest.mark.parametrize("n", [7, 8])
@pytest.mark.parametrize("own", [False, True], ids=["shared", "of each sample"])
@pytest.mark.parametrize("which", ["one", "some", "permuted"])
def test_an_input_is_shared_if_it_is_named(n: int, own: bool, which: str) -> None:
    """Of eight positions, with seven samples and with eight."""
    torch.manual_seed(0)
    block, x = Adds(), torch.randn(n, 8, 4, dtype=F64, requires_grad=True)
    other = torch.randn(*([n] if own else []), 8, 4, dtype=F64, requires_grad=True)
    scale = torch.tensor(0.5, dtype=F64, requires_grad=True)
    index = torch.tensor([i for i in INDICES[which] if i < n])
    leaves = [x, other, scale, *block.parameters()]

    def losses(wrapped: bool) -> Tensor:
        out = selbp.checkpoint(block, x, other, scale, shared=() if own else [1]) if wrapped else block(x, other, scale)
        return out.square().flatten(1).sum(1)

    want = torch.autograd.grad(losses(False)[index].sum(), leaves)
    got = torch.autograd.grad(selbp.select(losses(True), index).sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.to_dense(), b, rtol=1e-11, atol=1e-13)


def test_what_is_shared_is_not_guessed() -> None:
    x, other, scale = torch.randn(N, 4), torch.randn(3, 4), torch.tensor(1.0)
    with pytest.raises(ValueError, match=r"inputs\[1\] must have the n = 8 samples.*\(3, 4\).*shared=\(1,\)"):
        selbp.checkpoint(Adds(), x, other, scale)
    for shared, message in (([0], "inputs.0. has the samples"), ([3], r"\[1, 3\)"), ([-1], r"\[1, 3\)")):
        with pytest.raises(ValueError, match=message):
            selbp.checkpoint(Adds(), x, x, scale, shared=shared)
    for shared in ("other", 1, ["other"], [1.5], None):
        with pytest.raises(TypeError, match="shared must be positions among the inputs"):
            selbp.checkpoint(Adds(), x, x, scale, shared=shared)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"inputs\[0\] must be \(n, \.\.\.\)"):
        selbp.checkpoint(nn.Tanh(), scale)


DRAWS: dict[str, Callable[[], object]] = {
    "python": random.random,
    "numpy": numpy.random.rand,
    "torch": lambda: torch.rand(()),
}


def beside(block: Computes, name: str, runs: Callable[[int], bool]) -> list[int]:
    """Have a thread draw within those runs of ``block``; returns a list that grows with each run."""
    made: list[int] = []

    def draw(*_: object) -> None:
        if runs(len(made)):
            thread = threading.Thread(target=DRAWS[name])
            thread.start(), thread.join()
        made.append(len(made))

    block.last.register_forward_hook(draw)
    return made


@pytest.mark.parametrize("which", [(0,), (0, 1, 2), (1,), (0, 2, 3)], ids=str)
@pytest.mark.parametrize("name", DRAWS)
def test_a_run_during_which_a_thread_draws_is_made_again(name: str, which: tuple[int, ...]) -> None:
    """With the same masks, and whether it is the forward's or the backward's."""
    block, x = block_of("two")
    index = torch.tensor([6, 2])
    want = torch.autograd.grad(losses_of(block, x, wrapped=False)[index].sum(), list(block.parameters()))
    made = beside(block, name, lambda run: run in which)
    got = torch.autograd.grad(selbp.select(losses_of(block, x, wrapped=True), index).sum(), list(block.parameters()))
    assert len(made) == 2 + len(which)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", DRAWS)
def test_draws_in_every_run_are_refused_and_threads_are_named(name: str) -> None:
    block, x = block_of("two")
    beside(block, name, lambda run: True)
    with pytest.raises(NotImplementedError, match="not a dropout mask.*another thread drew"):
        losses_of(block, x, wrapped=True)
    block, x = block_of("two")
    beside(block, name, lambda run: run > 0)
    losses = losses_of(block, x, wrapped=True)
    with pytest.raises(NotImplementedError, match="not a dropout mask.*another thread drew"):
        selbp.select(losses, torch.tensor([6, 2])).sum().backward()


class Counting(nn.Module):
    """Computes, and counts its runs in a buffer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("runs", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.runs += 1
        out: torch.Tensor = self.block(x)
        return out


def test_a_run_that_writes_to_a_buffer_is_not_made_again() -> None:
    """It would write once more."""
    block, x = block_of("two")
    beside(block, "python", lambda run: run == 0)
    counting = Counting(block)
    with pytest.raises(NotImplementedError, match="or in one that wrote to a buffer"):
        selbp.checkpoint(counting, x)
    assert counting.runs == 1
    selbp.checkpoint(counting, x)
    assert counting.runs == 2


def test_a_block_that_draws_in_its_second_run_alone_is_refused() -> None:
    """As where its mode is changed before the backward."""
    block = Computes(Attention(False)).to(F64).eval()
    losses = losses_of(block, torch.randn(N, 5, 4, dtype=F64), wrapped=True)
    block.train()
    with pytest.raises(NotImplementedError, match="not a dropout mask"):
        selbp.select(losses, torch.tensor([6, 2])).sum().backward()
