"""What steps take, measured: medians of seconds, and the most bytes of tensors that are alive at once.

The bytes are exact and the same on every machine, but do not show what a kernel allocates and frees within itself.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from selbp.common.buffers import buffers_put_back
from selbp.common.distributed import parallel_in
from selbp.common.figures import median
from selbp.common.guards import random_state_put_back
from selbp.rows.gradient import Wrapper
from selbp.selectors import Full, Selector
from selbp.training.diagnosis import Measured
from selbp.training.interaction import SamplesInteractError
from selbp.training.options import OF_BATCH, OF_CRITERION
from selbp.training.step import SelectiveBackprop

WARM = 2  # first steps of each kind, which allocate and decide
OF_A_FULL_STEP = ("loss", "head", "aux_weight", *OF_CRITERION, *OF_BATCH)
NOT_MEASURED = ("backward", "schedule", "auto_advance", "table", "micro_batch", "scope", "target")


class LiveBytes(TorchDispatchMode):
    """Adds up the storages that operators made while it was on; ``peak`` is the most that were alive at once.

    It follows a row gradient's operators into their rules, where the k-row copies are made.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and look at what is alive then."""
        for value in pytree.tree_leaves((args, kwargs)):
            self._note(value, made=False)
        wrapper = next((kind for kind in types if issubclass(kind, Wrapper)), None)
        if wrapper is None:
            out = func(*args, **(kwargs or {}))
        else:
            with self:
                out = wrapper.__torch_dispatch__(func, types, args, kwargs)
        for value in pytree.tree_leaves(out):
            self._note(value, made=True)
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self._alive.values()))
        return out

    def _note(self, value: Any, made: bool) -> None:
        if isinstance(value, Tensor) and not isinstance(value, Wrapper):
            storage = value.untyped_storage()
            if storage._cdata not in self._alive:  # a storage that an operator was given is not one that it made
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes() if made else 0


def live_peak(call: Callable[[], object]) -> int:
    """Bytes of tensors alive at once during ``call``, beyond those that were before."""
    with LiveBytes() as seen:
        call()
    return seen.peak


def measure(
    model: nn.Module, batch: tuple[Any, Any], rule: Selector, keep: float | int, steps: int, options: Mapping[str, Any]
) -> Measured:
    """Run ``steps`` full steps and ``steps`` of each kind that ``options`` allow, in turn. No optimizer steps.

    Gradients, buffers, random state, the rule and its generator are left as they are.

    Raises:
        TypeError, ValueError: for an option that no kind of step takes, or that needs more than single steps, and for
            a wrapper with ``static_graph=True``.
    """
    if wrong := [name for name in NOT_MEASURED if name in options]:
        raise ValueError(f"{wrong[0]} does nothing in the single steps that are measured: leave it out")
    parallel = parallel_in(model)
    if parallel is not None and parallel.static_graph:
        raise ValueError(
            "selector= times single steps, which DistributedDataParallel with static_graph=True takes for the first of "
            "the training: measure the model before it is wrapped"
        )
    kinds = _kinds(model, rule, keep, options)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    wanted = [p for p in model.parameters() if p.requires_grad]
    seconds: dict[str, list[float]] = {name: [] for name in kinds}

    def run(step: Any) -> None:
        torch.autograd.grad(step(*batch), wanted, allow_unused=True)

    with torch.enable_grad(), _untouched(model, device, options.get("generator")):
        for turn in range(WARM + steps):
            for name, step in list(kinds.items()):
                began = now(device)
                try:
                    run(step)
                except SamplesInteractError:  # the first step by recomputing tells
                    if len(kinds) == 2:  # no other way is left
                        raise
                    del kinds[name], seconds[name]
                    continue
                if turn >= WARM:
                    seconds[name].append(now(device) - began)
        memory = {name: live_peak(partial(run, step)) for name, step in kinds.items()}
    medians = {name: median(values) for name, values in seconds.items()}
    clock = "the processor's time" if device.type == "cpu" else "the clock's time"
    return Measured(repr(rule), medians, memory, steps, clock)


def _kinds(model: nn.Module, rule: Selector, keep: float | int, options: Mapping[str, Any]) -> dict[str, Any]:
    """A full step, and the steps of ``rule`` by their way."""
    plain = {name: options[name] for name in OF_A_FULL_STEP if name in options}
    kinds = {"full": SelectiveBackprop(model, selector=Full(), keep=1.0, **plain)}
    refused: list[Exception] = []
    for way in ("recompute",) if rule.needs == "nothing" and options.get("cut") is None else ("rows", "recompute"):
        fitting = {**options, "backward": way}
        if way != "rows":
            fitting.pop("batchnorm", None)
        try:
            made: Any = SelectiveBackprop(model, selector=copy.deepcopy(rule), keep=keep, **fitting)
        except (TypeError, ValueError) as error:
            refused.append(error)
            continue
        made._pace.done = True  # a look at the price is what this is
        kinds[way] = made
    if len(kinds) == 1:
        raise refused[0]
    return kinds


def now(device: torch.device) -> float:
    """Seconds of this process on a CPU, else of the clock once the device has done its work."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize() if hasattr(torch, "accelerator") else torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def _untouched(model: nn.Module, device: torch.device, generator: torch.Generator | None) -> Iterator[None]:
    """Buffers and random state are put back."""
    state = None if generator is None else generator.get_state()
    alone: AbstractContextManager[Any] = nullcontext()
    if (parallel := parallel_in(model)) is not None:  # whose reducer must not see forwards without a backward
        alone = parallel.no_sync()
    with buffers_put_back(model), random_state_put_back(device), alone:
        try:
            yield
        finally:
            if generator is not None and state is not None:
                generator.set_state(state)
