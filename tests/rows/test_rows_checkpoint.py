"""Block checkpointing that recomputes only the chosen rows, with the masks of the first forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn import functional as F

import selbp

F64 = torch.float64
N = 8


class Blocks(nn.Module):
    def __init__(self, dropout: float, wrapped: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, 8))
            for _ in range(3)
        )
        self.head = nn.Linear(8, 4)
        self.wrapped = wrapped

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + (selbp.checkpoint(block, x) if self.wrapped else block(x))
        out: Tensor = self.head(x.mean(1))
        return out


def gradients(index: list[int] | None, *, wrapped: bool, dropout: float = 0.0) -> list[Tensor]:
    torch.manual_seed(0)
    model = Blocks(dropout, wrapped).to(F64)
    x, y = torch.randn(N, 5, 6, dtype=F64), torch.randint(4, (N,))
    losses = F.cross_entropy(model(x), y, reduction="none")
    total = losses if index is None else selbp.select(losses, torch.tensor(index))
    total.sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("index", [[1, 4, 6], [5, 0, 5], [3], list(range(N)), None])
def test_gradients_are_those_without_it(index: list[int] | None) -> None:
    for a, b in zip(gradients(index, wrapped=True), gradients(index, wrapped=False), strict=True):
        assert type(a) is Tensor
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_only_the_chosen_rows_are_recomputed() -> None:
    seen: list[int] = []
    torch.manual_seed(0)
    model = Blocks(0.0, True)
    for block in model.blocks:
        block[1].register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    losses = F.cross_entropy(model(torch.randn(N, 5, 6)), torch.randint(4, (N,)), reduction="none")
    selbp.select(losses, torch.tensor([2, 7])).sum().backward()
    assert seen == [N] * 3 + [2] * 3


def test_dropout_masks_are_replayed() -> None:
    """Finite differences of the very forward that ran: its masks are fixed by replaying them through a seed."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.ReLU(), nn.Dropout1d(0.3), nn.Linear(16, 4)).to(F64)
    x = torch.randn(N, 3, 4, dtype=F64)
    index = torch.tensor([6, 2])

    def losses() -> Tensor:
        torch.manual_seed(7)
        return selbp.checkpoint(block, x).square().flatten(1).sum(1)

    selbp.select(losses(), index).sum().backward()
    weight = block[0].weight
    for place in [(0, 0), (5, 2), (15, 3)]:
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                weight[place] += sign * 1e-6
                with torch.enable_grad():
                    ends.append(losses()[index].sum().item())
                weight[place] -= sign * 1e-6
        assert weight.grad[place].item() == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-5, abs=1e-7)


def test_autocast_is_that_of_the_forward() -> None:
    torch.manual_seed(0)
    model = Blocks(0.0, True)
    x, y = torch.randn(N, 5, 6), torch.randint(4, (N,))

    def run(wrapped: bool) -> Tensor:
        model.wrapped = wrapped
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses = F.cross_entropy(model(x), y, reduction="none")
        selbp.select(losses, torch.tensor([1, 2, 3])).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    torch.testing.assert_close(run(True), run(False), rtol=0.02, atol=1e-3)


def test_a_checkpointed_trunk_below_a_cut() -> None:
    torch.manual_seed(0)
    model = Blocks(0.0, True).to(F64)
    x = torch.randn(N, 5, 6, dtype=F64)
    cut = selbp.BackwardCut(2)
    model.blocks[2].register_forward_hook(lambda module, args, output: cut(output) if output.requires_grad else None)
    model(x).square().mean().backward()
    assert not model.blocks[0][1].weight.grad.isnan().any()


def test_what_cannot_be_recomputed_is_refused() -> None:
    x = torch.randn(N, 4, requires_grad=True)
    with pytest.raises(ValueError, match="BatchNorm"):
        selbp.checkpoint(nn.BatchNorm1d(4), x)
    selbp.checkpoint(nn.BatchNorm1d(4).eval(), x)

    class Two(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    with pytest.raises(TypeError, match="Tensor"):
        selbp.checkpoint(Two(), x)


class PerSample(nn.Module):
    """A parameter that looks like a batch, so that its gradient is one of rows."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.linspace(-1, 1, 8 * 16, dtype=F64).view(8, 16))
        self.layer = nn.Linear(16, 16).double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer((x + self.own).tanh())
        return out


@pytest.mark.parametrize("nested", [False, True], ids=["one inside the other", "one after the other"])
def test_reentrant_checkpoints_hand_rows_on(nested: bool) -> None:
    """Each runs a backward within the backward, whose own leaves keep rows; every other leaf gets a plain gradient."""
    torch.manual_seed(0)
    first, second, head = PerSample(), PerSample(), nn.Linear(16, 5).double()
    x, y = torch.randn(8, 16, dtype=F64, requires_grad=True), torch.randint(5, (8,))

    def run(module: Callable[..., Tensor], x: Tensor) -> Tensor:
        out: Tensor = torch.utils.checkpoint.checkpoint(module, x, use_reentrant=True)
        return out

    def forward() -> Tensor:
        if nested:
            return run(lambda h: second(run(first, h * 2)), x)
        return run(second, run(first, x).sin())

    def gradients(choose: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [x, *first.parameters(), *second.parameters(), *head.parameters()]
        for leaf in leaves:
            leaf.grad = None
        choose(F.cross_entropy(head(forward()), y, reduction="none")).sum().backward()
        assert all(type(leaf.grad) is Tensor for leaf in leaves)
        return [leaf.grad for leaf in leaves]

    dense: Counter[str] = Counter()
    got = gradients(lambda values: selbp.select(values, torch.tensor([1, 4, 6]), densified=dense))
    for a, b in zip(got, gradients(lambda values: values[torch.tensor([1, 4, 6])]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert dense.total() == 3  # the gradients of x and of the two parameters of one row a sample


def test_autocast_keeps_no_weight_of_the_forward_without_a_graph() -> None:
    """Up to about torch 2.10 a later use of the layer would get that weight, and lose its gradient."""
    torch.manual_seed(0)
    layer, x = nn.Linear(8, 8), torch.randn(N, 8)

    def run(wrapped: bool) -> Tensor:
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            h = selbp.checkpoint(layer, x) if wrapped else layer(x)
            loss = layer(torch.tanh(h)).float().square().sum()
        loss.backward()
        return layer.weight.grad.clone()

    torch.testing.assert_close(run(True), run(False), rtol=0.02, atol=0.02)
    kept: list[bool] = []
    layer.register_forward_hook(lambda *_: kept.append(torch.is_autocast_cache_enabled()))
    run(True)
    assert kept == [False, True, True]  # the block, the layer again, and the block in the backward


class Subtracts(nn.Module):
    """Edits the second of two inputs."""

    def forward(self, x: Tensor, mean: Tensor) -> Tensor:
        return x.tanh() * mean.sub_(1.0)


EDITS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "leaky relu": (0, lambda: nn.Sequential(nn.LeakyReLU(0.1, inplace=True), nn.Linear(4, 4))),
    "relu": (0, lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))),
    "dropout": (0, lambda: nn.Sequential(nn.Dropout(0.4, inplace=True), nn.Linear(4, 4))),
    "a view": (0, lambda: nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True))),
    "the second input": (1, Subtracts),
}


@pytest.mark.parametrize("below", [False, True], ids=["data", "a layer's output"])
@pytest.mark.parametrize("name", EDITS)
def test_a_block_that_edits_its_input_in_place_is_refused(name: str, below: bool) -> None:
    """Its second run would edit it again."""
    which, make = EDITS[name]
    torch.manual_seed(0)
    block, layer = make(), nn.Linear(4, 4)
    inputs = [layer(torch.randn(N, 4)) if below else torch.randn(N, 4) for _ in range(1 + which)]
    with pytest.raises(ValueError, match=rf"inputs\[{which}\] must not be edited in place.*inplace=False"):
        selbp.checkpoint(block, *inputs)
    with torch.no_grad():
        selbp.checkpoint(block, *inputs)  # no second run
