"""The peak memory of a step by strategy, each in a process of its own: ``python -m benchmarks.tools.rows_memory``."""

from __future__ import annotations

import functools
import subprocess
import sys

import torch
from torch import Tensor, nn

import selbp
from benchmarks.bench_rows import full_step, on_rows, second_forward
from selbp.training.measured import live_peak
from selbp_study.memory import resident_peak
from selbp_study.row_models import TIMED


class _Kept(nn.Module):
    """A block under ``selbp.checkpoint``."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return selbp.checkpoint(self.block, x)


STRATEGIES = {"full": full_step, "recompute": second_forward, "rows": on_rows, "rows, checkpoint": on_rows}


def peaks(name: str, strategy: str, share: float, n: int | None = None) -> tuple[int, int]:
    """Bytes of tensors alive at once in a step, and by which the resident set of this process rises in three steps."""
    task = TIMED[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = task.build()
    if "checkpoint" in strategy:
        model.blocks = nn.Sequential(*map(_Kept, model.blocks))
    x, y = task.batch(n or task.n)
    call = functools.partial(STRATEGIES[strategy], task, model)
    call(*task.batch(8), torch.arange(2))  # loads the code, which is not a step's memory
    step = functools.partial(call, x, y, torch.randperm(len(x))[: max(1, round(share * len(x)))])
    resident = resident_peak(step)
    model.zero_grad(set_to_none=True)
    return live_peak(step), resident


def table(share: float = 0.25) -> str:
    """Peak MiB above the model's own, alive / resident, by strategy, each in a process of its own."""
    lines = ["| model | " + " | ".join(STRATEGIES) + " |", "|---|" + "--:|" * len(STRATEGIES)]
    for name in TIMED:
        cells = []
        for strategy in STRATEGIES:
            if "checkpoint" in strategy and name not in ("ViT", "GPT"):
                cells.append("-")
                continue
            command = [sys.executable, "-m", "benchmarks.tools.rows_memory", name, strategy, str(share)]
            found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout.split()
            cells.append(" / ".join(f"{int(size) / 2**20:.0f}" for size in found))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table() if len(sys.argv) < 2 else " ".join(map(str, peaks(sys.argv[1], sys.argv[2], float(sys.argv[3])))))
