"""Launches of a step on the CUDA code path, counted where there is no GPU: ``python -m benchmarks.launches_gpu``.

A step runs on fake CUDA tensors, which have shapes and no values: nothing on that path may depend on a value, so the
launches are those of a real step. Every operator of selbp runs its CUDA implementation; a Triton kernel and a call of
the CUDA core count as one launch each, and so does each operator of torch that computes something (``LAUNCHES`` has
those that are known to take more; views, allocations and no-op conversions take none). What is counted is therefore a
model of launches: ``scripts/gpu_check.py --only selection`` measures them by the profiler where there is a GPU.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from selbp.training.stopwatch import AHEAD, Stopwatch

# Operators that launch more than one kernel, or none though they are no views.
LAUNCHES = {
    "aten.where.ScalarOther": 2,
    "aten.where.ScalarSelf": 2,
    "aten.where.Scalar": 3,
    "aten.sort.stable": 2,
    "aten.sort.default": 2,
    "aten.argsort.stable": 2,
    "aten.linalg_qr.default": 12,
    "aten._lazy_clone.default": 0,
    "aten.empty_like.default": 0,
    "aten.new_empty.default": 0,
    "aten.empty.memory_format": 0,
    "aten.lift_fresh.default": 0,
    "aten.empty_strided.default": 0,
    "aten.new_empty_strided.default": 0,
    "aten._unsafe_view.default": 0,
    "aten.detach.default": 0,
    "aten.alias.default": 0,
}


class Counting(TorchDispatchMode):
    """Counts launches by name; the operators of selbp run what is registered for CUDA."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "selbp":
            with self:
                return function._op_dk(torch._C.DispatchKey.CUDA, *args, **kwargs)
        result = function(*args, **kwargs)
        self._add(str(function), function, args, result)
        return result

    def _add(self, name: str, function: Any, args: Any, result: Any) -> None:
        outputs = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        on_gpu = any(x.is_meta for x in outputs)
        inputs = [x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        if not (on_gpu or any(x.is_meta for x in inputs)) or function.is_view:
            return
        if all(x.numel() == 0 for x in outputs) and outputs:
            return
        if count := LAUNCHES.get(name, 1):
            self.found[name] += count

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.found.values())


@contextlib.contextmanager
def pretended_gpu(counting: Counting) -> Iterator[None]:
    """What asks for the device is answered as by an H100; kernels are counted in place of being launched."""
    from triton.runtime.jit import JITFunction

    from selbp.ops import _cuda_solver
    from selbp.triton_kernels import configs

    def launched(self: Any, *args: Any, grid: Any, warmup: Any, **kwargs: Any) -> None:
        counting.found[f"triton {self.__name__}"] += 1

    class Core(types.ModuleType):
        def __getattr__(self, name: str) -> Callable[..., int]:
            if name.startswith("__"):
                raise AttributeError(name)

            def call(*args: Any) -> int:
                if not name.endswith(("_workspace", "probe")):
                    counting.found[f"cuda {name}"] += 1
                return 0

            return call

    properties = types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=227 << 10, name="H100"
    )
    core = Core("core")
    stream = types.SimpleNamespace(cuda_stream=0)
    changes = [
        (JITFunction, "run", launched),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "current_stream", lambda device=None: stream),
        (torch.cuda, "is_current_stream_capturing", lambda: True),  # no events are recorded then
        (_cuda_solver, "cuda_core", lambda: (core, "")),
        (torch, "is_autocast_enabled", lambda device=None: False),
        (torch, "get_autocast_dtype", lambda device: torch.bfloat16),
        (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        (torch.cuda, "device_of", lambda tensor: contextlib.nullcontext()),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in changes:
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        cached = (configs.architecture, configs.processors)
        for function in cached:
            function.cache_clear()
            stack.callback(function.cache_clear)
        yield


def step_launches(
    rule: Any, n: int = 128, k: int = 32, n_classes: int = 10, width: int = 64
) -> dict[str, Counter[str]]:
    """Launches of each lap of a step of a two-layer network: scoring, choice, and the chosen rows' forward."""
    import selbp

    counting, laps = Counting(), {}

    def lap(self: Any, name: str) -> None:
        if name == AHEAD:  # the forward is a part of scoring
            return
        laps[name] = Counter(counting.found)
        counting.found.clear()

    layers = nn.Linear(width, width, device="meta"), nn.ReLU(), nn.Linear(width, n_classes, device="meta")
    step = selbp.SelectiveBackprop(nn.Sequential(*layers), selector=rule, keep=k, backward="recompute")
    step._comparison._done = True  # the first step's look at whether samples interact reads values
    batch = torch.empty(n, width, device="meta"), torch.empty(n, dtype=torch.int64, device="meta")
    with pretended_gpu(counting), mock.patch.object(Stopwatch, "lap", lap), counting:
        for _ in range(2):  # the second is not the first, in which constants are made
            step(*batch)
    return laps


RULES = (
    "Random",
    "TopLoss",
    "LossRank",
    "LossPercentile",
    "GradNormImportance",
    "GradientMatching",
    "DivBS",
    "CubeSampling",
)


def main() -> None:
    """Print the table, and with ``--names`` what each launch is."""
    import selbp

    print("rule | " + " | ".join(("score", "select", "forward")))
    for name in RULES:
        laps = step_launches(getattr(selbp, name)())
        print(f"{name} | " + " | ".join(str(sum(found.values())) for found in laps.values()), flush=True)
        if "--names" in sys.argv:
            for lap, found in laps.items():
                print(f"  {lap}: {dict(found)}", flush=True)


if __name__ == "__main__":
    main()
