"""What the operators of a model's backward cost, and which of them run on k rows: counted in one run of a few samples.

FLOPs come from torch's own formulas (matrix products, convolutions, attention). They are linear in the samples, so a
few samples stand for all. The recommendation follows from the modelled time (``cost_model.py``), which counts bytes and
calls as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from selbp.common.batch import Batch
from selbp.common.buffers import buffers_put_back
from selbp.common.distributed import without_parallel
from selbp.common.guards import random_state_put_back
from selbp.rows.engine import nodes_of
from selbp.rows.gradient import Wrapper
from selbp.rows.observe import Observer, observing
from selbp.rows.select import select
from selbp.training.cost_model import OWN, Rates, Work, modelled
from selbp.training.diagnosis import Diagnosis, Operator

SAMPLES = 8  # enough to tell the samples' dim from other dims, few enough to cost little


class _Flops(TorchDispatchMode, Observer):
    """Add up the operators that run inside. A RowGradient counts with its outer shape: the cost of all n rows.

    ``scale`` is n over the number of samples that run. Only bytes of activations count. Tensors that are as large for
    one sample as for n (parameters, and gradients of their shapes) are left out, and so are views.
    """

    def __init__(self, scale: float, parameters: list[Tensor]) -> None:
        from torch.utils.flop_counter import flop_registry  # imports triton, which importing selbp must not

        super().__init__()
        self._formulas: dict[Any, Any] = {**flop_registry, **OWN}
        self._scale, self._threads = scale, torch.get_num_threads()
        self._own = _storages(parameters)
        self._shapes = {tuple(p.shape) for p in parameters}
        self.total, self.work, self.operators = 0.0, Work(), dict[tuple[str, str, str], Operator]()
        self._reasons: list[str | None] = []  # of the operator that is running, from the row gradient's dispatch
        self._recomputed: list[float] = []  # n / k of the checkpoints that are being recomputed, innermost last

    def ran(self, func: Any, args: Any, result: Any, reason: str | None) -> None:
        """Record on how many rows the running operator ran."""
        self._reasons.append(reason)

    def recompute_begins(self, n: int, k: int) -> None:
        """Record that plain tensors hold k rows of n."""
        self._recomputed.append(n / k)

    def recompute_ends(self) -> None:
        """Record that plain tensors hold all rows again."""
        self._recomputed.pop()

    def _bytes(self, values: Iterable[Any]) -> int:
        total = 0
        for value in values:
            if isinstance(value, (list, tuple)):
                total += self._bytes(value)
            elif isinstance(value, Wrapper):
                total += value.numel() * value.itemsize
            elif hasattr(value, "placements"):  # a part of a sharded parameter
                continue
            elif isinstance(value, Tensor) and tuple(value.shape) not in self._shapes:
                total += 0 if value.untyped_storage().data_ptr() in self._own else value.numel() * value.itemsize
        return total

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._reasons.clear()
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        flops = float(formula(*args, **(kwargs or {}), out_val=out)) if formula is not None else 0.0
        scale, runs, why = self._scale, "plain", ""
        if self._recomputed:
            scale, runs = scale * self._recomputed[-1], "rows"
        flops *= scale
        self.total += flops
        if self._reasons:
            why = next((reason for reason in self._reasons if reason is not None), "")
            runs = "dense" if why else "rows"
        key = (str(func), runs, why)
        operator = self.operators.setdefault(key, Operator(*key))
        operator.calls += 1
        operator.flops += flops
        moved = 0.0 if func.is_view else scale * self._bytes((*args, out))
        operator.seconds += self.work.add(flops, moved, "convolution" in operator.name, self._threads)
        return out


def _storages(parameters: Iterable[Tensor]) -> set[int]:
    """The addresses of parameters that are whole."""
    return {p.untyped_storage().data_ptr() for p in parameters if not hasattr(p, "placements")}


def _total_work(operators: Iterable[Operator]) -> Work:
    chosen = list(operators)
    return Work(sum(operator.seconds for operator in chosen), sum(operator.calls for operator in chosen))


def analyse(
    forward: Callable[[], Tensor],
    parameters: Iterable[Tensor],
    samples: int,
    n: int,
    k: int,
    *,
    sharded: bool = False,
    **options: Any,
) -> Diagnosis:
    """Run ``forward`` and its backward once on ``samples`` samples, and scale the result to n samples.

    ``forward`` returns the (samples,) losses. Gradients are not accumulated into ``parameters``. ``options`` are those
    of :func:`selbp.select`. ``sharded`` says that the parameters are. Then ``backward()`` runs, since ``autograd.grad``
    cannot return the gradient of a gathered parameter.
    """
    storages: dict[int, int] = {}
    wanted = [p for p in parameters if p.requires_grad]
    own = _storages(wanted)

    def saved(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    scale = n / samples
    flops, backward = _Flops(scale, wanted), _Flops(scale, wanted)
    with observing(backward):  # the forward too: the model may make selections of its own, in cuts
        with torch.enable_grad(), flops, torch.autograd.graph.saved_tensors_hooks(saved, _same):
            losses = forward()
        _refuse_reentrant(losses)
        chosen = select(losses, torch.arange((samples + 1) // 2, device=losses.device), **options).sum()
    with backward:
        if sharded:
            chosen.backward()
        else:
            torch.autograd.grad(chosen, wanted, allow_unused=True)
    operators = list(backward.operators.values())
    rows = [operator for operator in operators if operator.runs == "rows"]
    dense = [operator for operator in operators if operator.runs != "rows"]
    saved_bytes = int(sum(storages.values()) * scale)
    return Diagnosis(
        n,
        k,
        operators,
        flops.total,
        sum(operator.flops for operator in rows),
        sum(operator.flops for operator in dense),
        saved_bytes,
        modelled(flops.work, _total_work(rows), _total_work(dense), saved_bytes, k / n, Rates.here()),
    )


def _refuse_reentrant(losses: Tensor) -> None:
    """Raise NotImplementedError if a part of the backward is not in the graph and so cannot be looked at."""
    if any(type(node).__name__ == "CheckpointFunctionBackward" for node in nodes_of([losses])):
        raise NotImplementedError(
            "selbp: the backward of torch.utils.checkpoint(..., use_reentrant=True) cannot be looked at ahead; "
            "checkpoint with use_reentrant=False, or by selbp.checkpoint"
        )


def refuse_sharded(model: nn.Module) -> None:
    """Raise NotImplementedError for a sharded model: a forward on few samples would leave its sharding mid-step."""
    kinds = {type(p).__name__ for p in model.parameters()}
    kinds |= {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    kinds &= {"DTensor", "FlatParameter", "FSDPModule", "FullyShardedDataParallel"}
    if kinds:
        raise NotImplementedError(
            f"selbp: the model is sharded ({', '.join(sorted(kinds))}), and is not run ahead on a few samples; look at "
            "the model before it is sharded"
        )


def _same(tensor: Tensor) -> Tensor:
    return tensor


def analyse_batch(
    model: nn.Module,
    batch: Batch,
    k: int,
    losses: Callable[[Any], Tensor],
    *,
    sharded: bool = False,
    **options: Any,
) -> Diagnosis:
    """Run :func:`analyse` on the first samples of ``batch``. Restores buffers and random state."""
    inner = without_parallel(model)
    if not sharded:
        refuse_sharded(inner)
    some = torch.arange(min(batch.n, SAMPLES), device=batch.device)
    few = batch.rows(some, torch.ones_like(some, dtype=torch.bool))
    with buffers_put_back(inner), random_state_put_back(batch.device):
        run = functools.partial(_run, losses, few, inner)
        return analyse(run, inner.parameters(), few.n, batch.n, k, sharded=sharded, **options)


def _run(losses: Callable[[Any], Tensor], few: Batch, model: nn.Module) -> Tensor:
    return losses((few, few.feed(model)))
