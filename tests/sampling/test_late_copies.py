"""A copy from a GPU to the host that does not wait: what the host reads of it must have landed."""

import types

import pytest
import torch
from support.sampling_kit import known_table

from selbp.sampling import ScoredBatchSampler, ScoreTable
from selbp.training import scores


class OnGpu(torch.Tensor):
    """Stands for a CUDA tensor. What ``to("cpu", non_blocking=True)`` returns is filled when the stream gets there."""

    pending = []

    @property
    def device(self):
        return torch.device("cuda:0")

    def to(self, *args, non_blocking=False, **kwargs):
        real = self.as_subclass(torch.Tensor).to(*args, **kwargs)
        if not non_blocking:
            return real.clone()
        landed = torch.zeros_like(real)
        self.pending.append((landed, real))
        return landed


@pytest.fixture
def gpu():
    """Moves a tensor to the stand-in; ``gpu.arrive()`` lets the stream get there."""

    def arrive():
        for landed, real in OnGpu.pending:
            landed.copy_(real)
        OnGpu.pending.clear()

    OnGpu.pending.clear()
    return types.SimpleNamespace(move=lambda x: x.clone().as_subclass(OnGpu), arrive=arrive)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_a_draw_is_known_by_numbers_on_a_gpu(gpu, dtype):
    table = known_table(64)
    sampler = ScoredBatchSampler(table, 8, 32, seed=0, weights="unbiased")
    for _, batch in zip(range(3), sampler, strict=False):
        wanted = table.issued.front(len(batch))
        draw = table.next(len(batch), gpu.move(torch.as_tensor(batch, dtype=dtype)))
        assert draw is wanted and draw.weights is not None
        table.issued.done(draw)
        assert table.issued.front(8, torch.arange(8)) is None
        gpu.arrive()


def test_samples_by_numbers_on_a_gpu_are_those_that_are_forgotten(gpu):
    table = ScoreTable(8, classes=2)
    table.fill(torch.arange(8), torch.randn(8, 2), torch.zeros(8, dtype=torch.int64))
    table.forget(gpu.move(torch.tensor([5, 6])))
    assert torch.isnan(table.probability).nonzero()[:, 0].tolist() == [5, 6]


def test_a_model_on_the_cpu_reads_what_a_table_on_a_gpu_knows(gpu):
    table = ScoreTable(8, classes=2)
    table.irreducible = gpu.move(torch.arange(8.0) + 1)
    draw = table.next(3, torch.tensor([7, 0, 3]))
    batch = scores.Batch.of(torch.randn(3, 4), torch.zeros(3, dtype=torch.int64), {})
    extras = scores.with_irreducible(batch, table, draw).extras
    assert extras[scores.IRREDUCIBLE].tolist() == [8.0, 1.0, 4.0]
