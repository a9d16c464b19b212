"""A minibatch's journey through a step: how often it comes back to a package of selbp that it has left."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import selbp

ROOT = Path(selbp.__file__).parent


class Journey(TorchDispatchMode):
    """Notes the package whose code asks for each operator: the innermost frame inside selbp."""

    def __init__(self) -> None:
        super().__init__()
        self.stays: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame = sys._getframe(1)
        while frame is not None and ROOT not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is not None:
            package = Path(frame.f_code.co_filename).relative_to(ROOT).parts[0]
            if self.stays[-1:] != [package]:
                self.stays.append(package)
        return function(*args, **(kwargs or {}))

    def returns(self) -> int:
        return len(self.stays) - len(set(self.stays))


@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("rule", [selbp.TopLoss, selbp.GradNormImportance, selbp.GradientMatching])
def test_a_minibatch_comes_back_at_most_ten_times(rule: Any, backward: Any) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
    step = selbp.SelectiveBackprop(model, selector=rule(), keep=0.25, backward=backward)
    inputs, target = torch.randn(64, 32), torch.randint(0, 10, (64,))
    step(inputs, target).backward()  # what is found out once is no part of the journey
    with Journey() as journey:
        step(inputs, target)
    assert {"training", "ops", "common"} <= set(journey.stays)
    assert journey.returns() <= 10, " > ".join(journey.stays)
