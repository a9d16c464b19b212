"""Gradient accumulation under bfloat16 autocast, with a schedule: three full optimizer steps, then chosen rows.

Run as ``python examples/06_accumulation_and_amp.py``.
"""

from __future__ import annotations

import torch
from torch import nn

import selbp

MINIBATCHES, ROWS = 4, 32


def main() -> None:
    """Six optimizer steps of four minibatches each, interrupted and resumed in the middle."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    centers = torch.randn(4, 16)

    def new_step() -> selbp.SelectiveBackprop:
        return selbp.SelectiveBackprop(
            model,
            selector=selbp.LossPercentile(),  # remembers the last losses
            keep=0.25,
            schedule=selbp.Schedule(start=3),  # counts optimizer steps
            auto_advance=False,  # a call is one minibatch, not one optimizer step
            generator=torch.Generator().manual_seed(1),
        )

    step = new_step()
    for i in range(6):
        if i == 4:  # as after a restart: a new object takes over memory, draws and counts
            state = step.state_dict()
            step = new_step()
            step.load_state_dict(state)
        rows = 0
        for _ in range(MINIBATCHES):
            target = torch.randint(0, 4, (ROWS,))
            inputs = centers[target] + torch.randn(ROWS, 16)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = step(inputs, target)
            (loss / MINIBATCHES).backward()
            rows += step.report.k
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step.advance()
        kind = "chosen" if step.report.selected else "all"
        print(f"optimizer step {i}: {rows} rows ({kind}), loss {step.report.loss:.3f}")


if __name__ == "__main__":
    main()
