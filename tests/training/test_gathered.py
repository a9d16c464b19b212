"""What micro-batches and ranks put together: factors of ragged samples, and what the caller knows of each sample."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from support.processes import in_two_processes
from support.training_kit import assert_same
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import selbp
from selbp.common.exchange import Ranks

EXACT = 1e-12
N, CLASSES = 12, 3
RULES: dict[str, dict[str, Any]] = {
    "losses": {"selector": selbp.TopLoss()},
    "statistics": {"selector": selbp.TopGradNorm()},
    "refitted": {"selector": selbp.TopGradNorm(weights="refit")},
    "gradients": {"selector": selbp.GradientMatching()},
    "balanced": {"selector": selbp.CubeSampling()},
    "full head": {"selector": selbp.TopLoss(), "head_gradient": "full"},
}


class Padding(nn.Module):
    """Pads its samples (T, 6) to the longest of those that it is given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, samples: Any) -> dict[str, torch.Tensor]:
        mask = nn.utils.rnn.pad_sequence([x.new_ones(len(x)) for x in samples], batch_first=True)
        x = nn.utils.rnn.pad_sequence(list(samples), batch_first=True)
        return {"logits": self.head(torch.tanh(self.body(x))), "mask": mask}


def loss_of(output: Any, target: torch.Tensor) -> torch.Tensor:
    z, mask = output["logits"], output["mask"]
    every = F.cross_entropy(z.flatten(0, 1), target[:, None].expand(mask.shape).flatten(), reduction="none")
    return (every.view(mask.shape) * mask).sum(1) / mask.sum(1)


def ragged(turn: int) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Samples of 1 to 8 entries, the longest last: parts of the minibatch are padded to other lengths."""
    generator = torch.Generator().manual_seed(turn)
    samples = [torch.randn(1 + (2 * i) // 3, 6, generator=generator).double() for i in range(N)]
    return samples, torch.randint(0, CLASSES, (N,), generator=generator)


def trained(rule: str, part: slice | None = None, turns: int = 2, **options: Any) -> tuple[list[Any], list[Any]]:
    model: nn.Module = Padding().double()
    wrapped = model if part is None else DistributedDataParallel(model)
    options = {**RULES[rule], "keep": 0.5, "loss": loss_of, "generator": torch.Generator().manual_seed(3), **options}
    step = selbp.SelectiveBackprop(wrapped, **options)
    found, reports = [], []
    for turn in range(turns):
        samples, y = ragged(turn)
        step.backward((samples[part or slice(None)],), y[part or slice(None)])
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
        reports.append(step.report)
    return found, reports


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [1, 5, 12])
def test_micro_batches_of_ragged_samples(rule: str, size: int) -> None:
    (got, reports), (want, others) = trained(rule, micro_batch=size), trained(rule, backward="recompute")
    for a, b, report, other in zip(got, want, reports, others, strict=True):
        assert_same(a, b, rtol=EXACT)
        assert torch.equal(report.selection.indices, other.selection.indices)
        assert (report.gain is None) == (other.gain is None)
        if report.gain is not None:
            assert report.gain == pytest.approx(other.gain, rel=1e-9)


@pytest.mark.parametrize("positions", [0, 5, 8])
def test_a_report_has_the_factors_of_all_samples_or_of_none(positions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 4 * N * positions * (8 + CLASSES)  # with 5, only the parts of short samples fit
    monkeypatch.setattr("selbp.training.scored.DIAGNOSTIC_BYTES", limit)
    (_, reports), (_, others) = trained("statistics", micro_batch=5), trained("statistics", backward="recompute")
    for report, other in zip(reports, others, strict=True):
        assert (report.gain is None) == (other.gain is None) == (positions < 8)


def check_ragged(rank: int) -> None:
    rows = Ranks.rows
    for rule in RULES:
        for options in ({}, {"micro_batch": 4}):
            gathered: list[int] = []

            def spy(ranks: Ranks, x: torch.Tensor, counts: Any, gathered: list[int] = gathered) -> torch.Tensor:
                gathered.append(x.dim())
                return rows(ranks, x, counts)

            with mock.patch.object(Ranks, "rows", spy):
                part = slice(0, 7) if rank == 0 else slice(7, N)
                got, reports = trained(rule, part, scope="global", **options)
            reads = RULES[rule]["selector"].needs == "gradients" or "head_gradient" in RULES[rule]
            assert (max(gathered) == 3) == reads, f"{rule}: factors that nothing reads are gathered"
            want, others = trained(rule, backward="recompute")
            for a, b, report, other in zip(got, want, reports, others, strict=True):
                assert_same(a, b, rtol=EXACT)
                assert torch.equal(report.selection.indices, other.selection.indices), rule


class Told(selbp.BaseSelector):
    """Remembers what it was told of each sample."""

    needs = "loss"

    def select(self, stats: Any, k: int, *, proxies: Any = None, extras: Any = None, generator: Any = None) -> Any:
        self.extras = dict(extras)
        return super().select(stats, k, proxies=proxies, extras={}, generator=generator)

    def choose(self, rows: Any, k: int) -> Any:
        return rows.pick(rows.stats.loss, k)


def check_what_the_caller_knows(rank: int) -> None:
    known = {
        "serial": torch.tensor([2**53 + 1, -(2**62) - 3, 2**63 - 1, 5, 6, 7]),
        "small": torch.tensor([1, -2, 127, 0, 5, 6], dtype=torch.int8),
        "odd": torch.tensor([True, False, True, False, False, True]),
        "exact": torch.full((6,), 1 / 3, dtype=torch.float64),
        "single": torch.full((6,), 1 / 3),
    }
    rule, rows = Told(), slice(0, 4) if rank == 0 else slice(4, 6)
    model = DistributedDataParallel(nn.Linear(4, 3))
    step = selbp.SelectiveBackprop(model, selector=rule, keep=0.5, scope="global")
    names = sorted(known, reverse=bool(rank))  # in another order on each rank
    step(torch.randn(6, 4)[rows], torch.zeros(6).long()[rows], **{name: known[name][rows] for name in names}).backward()
    for name, value in known.items():
        got = rule.extras[name]
        assert got.dtype == value.dtype and torch.equal(got, value), name


def check(rank: int) -> None:
    check_ragged(rank)
    check_what_the_caller_knows(rank)


def test_two_processes() -> None:
    in_two_processes(check)
