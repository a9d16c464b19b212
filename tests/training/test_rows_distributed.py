"""Two processes over gloo: DDP's reducer meets ordinary gradients, whatever each rank has chosen; what FSDP does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from two_processes import in_two_processes

import selbp


class Model(nn.Module):
    def __init__(self, unused: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.GELU())
        self.head = nn.Linear(8, 3)
        self.extra = nn.Linear(8, 3) if unused else None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(x))
        return out


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def check_ddp(rank: int, unused: bool) -> None:
    torch.manual_seed(0)
    model = Model(unused).double()
    ddp = DistributedDataParallel(model, find_unused_parameters=unused)
    x, y = torch.randn(2, 6, 2, 6, 6, dtype=torch.float64), torch.randint(3, (2, 6))
    chosen = [torch.tensor([4, 1]), torch.tensor([0, 5, 3])]  # k differs between the ranks

    def losses(network: nn.Module, sign: float, who: int) -> Tensor:
        return F.cross_entropy(network(sign * x[who]), y[who], reduction="none")

    with ddp.no_sync():
        selbp.select(losses(ddp, -1.0, rank), chosen[rank].flip(0)).sum().backward()
    selbp.select(losses(ddp, 1.0, rank), chosen[rank]).sum().backward()
    got = gradients(model)
    model.zero_grad()
    for who in range(2):
        for sign in (-1.0, 1.0):
            (losses(model, sign, who)[chosen[who]].sum() / 2).backward()
    for a, b in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def check_cut(rank: int) -> None:
    torch.manual_seed(0)
    model = Model().double()
    cuts = [selbp.BackwardCut(2, selbp.Random(), generator=torch.Generator().manual_seed(who)) for who in (0, 1)]
    again = [selbp.BackwardCut(2, selbp.Random(), generator=torch.Generator().manual_seed(who)) for who in (0, 1)]
    x, y = torch.randn(2, 6, 2, 6, 6, dtype=torch.float64), torch.randint(3, (2, 6))
    hook = model.body[3].register_forward_hook(lambda module, args, output: cuts[rank](output))
    ddp = DistributedDataParallel(model)
    F.cross_entropy(ddp(x[rank]), y[rank]).backward()
    hook.remove()
    got = gradients(model)
    model.zero_grad()
    for who in range(2):  # each rank's own selection, averaged
        hook = model.body[3].register_forward_hook(lambda module, args, output, who=who: again[who](output))
        (F.cross_entropy(model(x[who]), y[who]) / 2).backward()
        hook.remove()
    for a, b in zip(got, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def sharded(blocks: bool) -> tuple[nn.Module, nn.Module]:
    """A model under FSDP2, as a whole or block by block, and the same one that is not."""
    from torch.distributed.fsdp import fully_shard

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 3)]
        models.append(nn.Sequential(*layers).double())
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in models[0][1:] if blocks else ():
        fully_shard(block, mesh=mesh)
    fully_shard(models[0], mesh=mesh)
    return models[0], models[1]


def check_sharded_as_a_whole(rank: int) -> None:
    """No mark in the graph says so, and the gradients are exact, step after step, with other rows on every rank."""
    model, plain = sharded(blocks=False)
    for step in range(3):
        torch.manual_seed(step)
        x, y = torch.randn(2, 6, 4, dtype=torch.float64), torch.randint(3, (2, 6))
        chosen = [torch.tensor([4, 1]), torch.tensor([0, 5, 3])]
        model.zero_grad()
        plain.zero_grad()
        selbp.select(F.cross_entropy(model(x[rank]), y[rank], reduction="none"), chosen[rank]).sum().backward()
        for who in range(2):
            (F.cross_entropy(plain(x[who]), y[who], reduction="none")[chosen[who]].sum() / 2).backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad.full_tensor(), b.grad, rtol=1e-11, atol=1e-13)


def check_sharded_by_blocks() -> None:
    """Refused where the graph at hand is sharded, and only there."""
    model, plain = sharded(blocks=True)
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    with pytest.raises(NotImplementedError, match="FSDP"):
        selbp.select(F.cross_entropy(model(x), y, reduction="none"), torch.tensor([1, 2]))
    selbp.select(F.cross_entropy(plain(x), y, reduction="none"), torch.tensor([1, 2])).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())


def check_auto_of_a_sharded_model(rank: int) -> None:
    model, _ = sharded(blocks=True)
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
    with pytest.raises(NotImplementedError, match="sharded"):
        selbp.diagnose(model, (x, y))
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25)
    for _ in range(2):
        step(x, y).backward()
    assert step.report.backward == "recompute" and "sharded" in step.report.backward_reason
    assert all(p.grad is not None for p in model.parameters())


def check_all(rank: int) -> None:
    check_ddp(rank, unused=False)
    check_ddp(rank, unused=True)
    check_cut(rank)


def check_sharded(rank: int) -> None:
    check_sharded_as_a_whole(rank)
    check_sharded_by_blocks()
    check_auto_of_a_sharded_model(rank)


def test_two_processes() -> None:
    in_two_processes(check_all)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="FSDP2 on the CPU, which torch 2.7 brought"
)
def test_two_processes_of_a_sharded_model() -> None:
    in_two_processes(check_sharded)
