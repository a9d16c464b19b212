"""Two processes over gloo: DDP's reducer meets ordinary gradients, whatever each rank has chosen; what FSDP does."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import in_two_processes
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import selbp
from selbp.training import sharded as sharding
from selbp.training.analysis import analyse_batch


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


def sharded(blocks: bool, **options: Any) -> tuple[nn.Module, nn.Module]:
    """A model under FSDP2, as a whole or block by block, and the same one that is not."""
    from torch.distributed.fsdp import fully_shard

    models = []
    for _ in range(2):
        torch.manual_seed(0)
        layers = [nn.Linear(4, 8), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 3)]
        models.append(nn.Sequential(*layers).double())
    mesh = dist.init_device_mesh("cpu", (2,))
    for block in models[0][1:] if blocks else ():
        fully_shard(block, mesh=mesh, **options)
    fully_shard(models[0], mesh=mesh, **options)
    return models[0], models[1]


def check_sharded_as_a_whole(rank: int) -> None:
    """The gradients are exact, step after step, with other rows on every rank."""
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


def whole(gradient: Tensor) -> Tensor:
    """A gradient that may be sharded."""
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def check_steps(rank: int, model: nn.Module, plain: nn.Module, kind: str, same: bool) -> None:
    """Three steps of ``model`` against the plain one's; ``same``: every rank has the same samples."""
    options: dict[str, Any] = {"backward": "rows"} if kind == "rows" else {"cut": "1", "backward": "rows"}
    steps = [
        selbp.SelectiveBackprop(network, selector=selbp.GradientMatching(), keep=0.25, **options)
        for network in (model, plain)
    ]
    for number in range(3):
        torch.manual_seed(10 * number + (0 if same else rank))
        x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
        model.zero_grad()
        plain.zero_grad()
        for step in steps:
            step(x, y).backward()
        found, expected = (step.report.cut if kind == "cut" else step.report for step in steps)
        assert found.selection.indices.tolist() == expected.selection.indices.tolist()
        for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
            dist.all_reduce(b.grad)
            torch.testing.assert_close(whole(a.grad), b.grad / 2, rtol=1e-10, atol=1e-13, msg=f"{kind} {name}")


def check_sharded_by_blocks(rank: int) -> None:
    """Exact too, though there every block leaves its mark in the graph."""
    for kind in ("rows", "cut"):
        for reshard in (True, False):
            model, plain = sharded(blocks=True, reshard_after_forward=reshard)
            check_steps(rank, model, plain, kind, same=False)


def check_tensor_parallel(rank: int) -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = x + self.down(F.gelu(self.up(x)))
            return found

    for kind in ("rows", "cut"):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            models.append(nn.Sequential(nn.Linear(4, 8), Block(), nn.Linear(8, 3)).double())
        mesh = dist.init_device_mesh("cpu", (2,))
        plan = {"1.up": ColwiseParallel(), "1.down": RowwiseParallel()}
        check_steps(rank, parallelize_module(models[0], mesh, plan), models[1], kind, same=True)


def check_flat_parameters(rank: int) -> None:
    """FSDP1, whose head has no weight (C, d) of its own outside of its forward."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    for original in (True, False):
        networks = []
        for _ in range(2):
            torch.manual_seed(0)
            networks.append(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double())
        networks[0] = FullyShardedDataParallel(
            networks[0],
            auto_wrap_policy=ModuleWrapPolicy({nn.Linear}),
            use_orig_params=original,
            device_id=torch.device("cpu"),
        )
        for number in range(2):
            torch.manual_seed(10 * number + rank)
            x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(3, (16,))
            for network in networks:
                optimizer = torch.optim.SGD(network.parameters(), 1.0)
                step = selbp.SelectiveBackprop(network, selector=selbp.TopLoss(), keep=0.25, backward="rows")
                step(x, y).backward()
                if network is networks[1]:
                    for parameter in network.parameters():
                        dist.all_reduce(parameter.grad)
                        parameter.grad /= 2
                optimizer.step(), optimizer.zero_grad()
        with FullyShardedDataParallel.summon_full_params(networks[0]):
            flat = [torch.cat([p.flatten() for p in network.parameters()]) for network in networks]
            torch.testing.assert_close(*flat, rtol=1e-10, atol=1e-13)


def check_a_loss_that_is_distributed() -> None:
    from torch.distributed.tensor import DTensor, Replicate

    losses = DTensor.from_local(torch.rand(8, requires_grad=True), dist.init_device_mesh("cpu", (2,)), [Replicate()])
    with pytest.raises(NotImplementedError, match="DTensor losses"):
        selbp.select(losses, torch.tensor([1, 2]))


def same_on_both(said: str) -> bool:
    every: list[Any] = [None, None]
    dist.all_gather_object(every, said)
    return every[0] == every[1]


def check_auto_of_a_sharded_model(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks ahead on all ranks at once, which then go one way, and the gradients are exact."""
    model, plain = sharded(blocks=True)
    x, y = torch.randn(2, 16, 4, dtype=torch.float64), torch.randint(3, (2, 16))
    with pytest.raises(NotImplementedError, match="sharded"):
        selbp.diagnose(model, (x[rank], y[rank]))
    for p in model.parameters():  # accumulated before the first step
        p.grad = torch.ones_like(p)
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25)
    own = selbp.SelectiveBackprop(plain, selector=selbp.TopLoss(), keep=0.25, backward="rows")
    for turn in range(3):
        step(x[rank], y[rank]).backward()
        for who in range(2):
            (own(x[who], y[who]) / 2).backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(whole(a.grad), b.grad + (turn == 0), rtol=1e-12, atol=1e-14)
        model.zero_grad(), plain.zero_grad()
    assert step.report.backward == "rows" and same_on_both(step.report.backward_reason)
    assert re.match(r"FLOPs 0\.\d\d on rows, 0\.\d\d by recomputing", step.report.backward_reason)

    kept, _ = sharded(blocks=True)
    waiting = selbp.SelectiveBackprop(kept, selector=selbp.TopLoss(), keep=0.25)
    kept.set_requires_gradient_sync(False)
    waiting(x[rank], y[rank]).backward()
    assert waiting.report.backward == "recompute" and waiting._strategy.undecided
    kept.set_requires_gradient_sync(True)
    waiting(x[rank], y[rank]).backward()
    assert waiting.report.backward == "rows"

    alone, _ = sharded(blocks=False)  # one rank finds otherwise, or fails
    for fault in (lambda found: replace(found, row_flops=0.0, dense_flops=found.row_flops), lambda found: 1 / 0):
        with monkeypatch.context() as patch:
            if rank == 1:
                patch.setattr(sharding, "analyse_batch", lambda *a, f=fault, **o: f(analyse_batch(*a, **o)))
            differing = selbp.SelectiveBackprop(alone, selector=selbp.TopLoss(), keep=0.25)
            differing(x[rank], y[rank]).backward()
            assert differing.report.backward == "recompute"

    from torch.distributed.fsdp import fully_shard

    coupled = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).double()
    fully_shard(coupled, mesh=dist.init_device_mesh("cpu", (2,)))
    dense = selbp.SelectiveBackprop(coupled, selector=selbp.TopLoss(), keep=0.25)
    dense(x[rank], y[rank]).backward()
    assert dense.report.backward == "recompute" and "native_batch_norm" in dense.report.backward_reason

    hooked, _ = sharded(blocks=True)
    for p in hooked.parameters():
        p.register_post_accumulate_grad_hook(lambda p: None)
    hooking = selbp.SelectiveBackprop(hooked, selector=selbp.TopLoss(), keep=0.25)
    hooking(x[rank], y[rank]).backward()
    assert hooking.report.backward == "recompute" and "hook" in hooking.report.backward_reason


def check_all(rank: int) -> None:
    check_ddp(rank, unused=False)
    check_ddp(rank, unused=True)
    check_cut(rank)


def check_sharded(rank: int) -> None:
    check_sharded_as_a_whole(rank)
    check_sharded_by_blocks(rank)
    check_tensor_parallel(rank)
    check_flat_parameters(rank)
    check_a_loss_that_is_distributed()
    with pytest.MonkeyPatch.context() as monkeypatch:
        check_auto_of_a_sharded_model(rank, monkeypatch)


def test_two_processes() -> None:
    in_two_processes(check_all)


@pytest.mark.slow
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7), reason="FSDP2 on the CPU, which torch 2.7 brought"
)
def test_two_processes_of_a_sharded_model() -> None:
    in_two_processes(check_sharded)
