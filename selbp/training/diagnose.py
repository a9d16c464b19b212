"""``diagnose``: which operators of a model's backward run on k rows, which do not and why, and what that saves.

It runs one forward and one backward on a few samples of the batch. FLOPs come from torch's own formulas (matrix
products, convolutions, attention). They are linear in the samples, so a few samples stand for all. The recommendation
follows from the modelled time (``cost_model.py``), which counts bytes and calls as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from selbp._checks import check_choice, shown
from selbp.common.batch import Batch
from selbp.common.keep import check_keep, kept_rows
from selbp.rows import BatchNormPolicy, select
from selbp.rows.engine import nodes_of
from selbp.rows.gradient import Wrapper
from selbp.rows.observe import Observer, observing
from selbp.training.cost_model import OWN, Rates, Work, modelled
from selbp.training.head import find_head
from selbp.training.linear_loss import NAME as LINEAR
from selbp.training.linear_loss import LinearCausalLM
from selbp.training.losses import CrossEntropy, criterion_of, of_some

SAMPLES = 8  # enough to tell the samples' dim from other dims, few enough to cost little


@dataclass
class Operator:
    """All calls of one operator in the backward."""

    name: str
    runs: str  # "rows": on k rows; "dense": scattered back to n; "plain": met no row gradient (below a dense one)
    why: str  # the reason, for "dense"
    calls: int = 0
    flops: float = 0.0  # on all n rows
    seconds: float = 0.0  # modelled, on all n rows, without the time per call


@dataclass
class Diagnosis:
    """What :func:`selbp.diagnose` found. ``print`` it for a table.

    Attributes
    ----------
    n : int
        Samples of the minibatch.
    k : int
        Rows that would run backward.
    operators : list
        Each operator of the backward: its name, whether it runs on rows and if not why, calls, FLOPs.
    forward_flops : float
        Of n rows.
    row_flops : float
        Of the backward's operators that can run on k rows; for n rows, too.
    dense_flops : float
        Of those that run on n.
    saved_bytes : int
        Activations that a forward with a graph keeps, for n rows.
    seconds : dict
        Modelled time of a step by strategy, on a CPU such as this.
    recommendation : {"rows", "recompute"}
        The strategy with the lower modelled time.

    Examples
    --------
    >>> import torch, selbp
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> found = selbp.diagnose(model, (torch.randn(16, 4), torch.randint(0, 3, (16,))))
    >>> found.dense  # every operator has a rule
    {}
    """

    n: int
    k: int
    operators: list[Operator]
    forward_flops: float
    row_flops: float
    dense_flops: float
    saved_bytes: int
    seconds: dict[str, float]
    recommendation: Literal["rows", "recompute"] = field(init=False)

    def __post_init__(self) -> None:
        self.recommendation = "rows" if self.seconds["rows"] < self.seconds["recompute"] else "recompute"

    @property
    def cost(self) -> dict[str, float]:
        """FLOPs of a step by strategy, as a share of the full step. ``"bound"`` runs every operator on k rows."""
        f, forward, backward = self.k / self.n, self.forward_flops, self.row_flops + self.dense_flops
        full = max(forward + backward, 1.0)
        return {
            "full": 1.0,
            "recompute": (forward + f * (forward + backward)) / full,
            "rows": (forward + f * self.row_flops + self.dense_flops) / full,
            "bound": (forward + f * backward) / full,
        }

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of saved activations at the peak, by strategy."""
        return {"full": self.saved_bytes, "recompute": self.saved_bytes * self.k // self.n, "rows": self.saved_bytes}

    @property
    def flop_ratio(self) -> float:
        """FLOPs of a step on rows over those of a full step."""
        return self.cost["rows"]

    @property
    def dense(self) -> dict[str, int]:
        """How often each operator was scattered back to n rows, by name."""
        return {operator.name: operator.calls for operator in self.operators if operator.runs == "dense"}

    def __str__(self) -> str:
        lines = [f"{'operator':52s} {'runs':6s} {'calls':>5s} {'GFLOP':>9s}  why"]
        for op in sorted(self.operators, key=lambda op: (op.runs != "dense", op.runs != "plain", -op.flops)):
            lines.append(f"{op.name:52s} {op.runs:6s} {op.calls:5d} {op.flops / 1e9:9.3f}  {op.why}".rstrip())
        lines.append(f"\nk = {self.k} of n = {self.n} rows; modelled cost and saved activations of a step:")
        for name, cost in self.cost.items():
            rest = ""
            if name in self.seconds:
                rest = f", {1e3 * self.seconds[name]:8.2f} ms, {self.memory[name] / 2**20:9.1f} MiB"
            lines.append(f"  {name:10s} {cost:6.3f} of the full step's FLOPs ({1 / max(cost, 1e-9):.2f}x){rest}")
        lines.append(f'recommended: backward="{self.recommendation}"')
        return "\n".join(lines)


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
        self._own = {p.untyped_storage().data_ptr() for p in parameters}
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


def _total_work(operators: Iterable[Operator]) -> Work:
    chosen = list(operators)
    return Work(sum(operator.seconds for operator in chosen), sum(operator.calls for operator in chosen))


def analyse(
    forward: Callable[[], Tensor], parameters: Iterable[Tensor], samples: int, n: int, k: int, **options: Any
) -> Diagnosis:
    """Run ``forward`` and its backward once on ``samples`` samples, and scale the result to n samples.

    ``forward`` returns the (samples,) losses. Gradients are not accumulated into ``parameters``. ``options`` are those
    of :func:`selbp.select`.
    """
    storages: dict[int, int] = {}
    wanted = [p for p in parameters if p.requires_grad]
    own = {p.untyped_storage().data_ptr() for p in wanted}

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


def _refuse_sharded(model: nn.Module) -> None:
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


def analyse_batch(model: nn.Module, batch: Batch, k: int, losses: Callable[[Any], Tensor], **options: Any) -> Diagnosis:
    """Run :func:`analyse` on the first samples of ``batch``. Restores buffers and random state."""
    inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    _refuse_sharded(inner)
    some = torch.arange(min(batch.n, SAMPLES), device=batch.device)
    few = batch.rows(some, torch.ones_like(some, dtype=torch.bool))
    saved = [(buffer, buffer.clone()) for buffer in inner.buffers()]
    try:
        with torch.random.fork_rng([batch.device] if batch.device.type == "cuda" else []):
            run = functools.partial(_run, losses, few, inner)
            return analyse(run, inner.parameters(), few.n, batch.n, k, **options)
    finally:
        with torch.no_grad():
            for buffer, value in saved:
                buffer.copy_(value)


def _run(losses: Callable[[Any], Tensor], few: Batch, model: nn.Module) -> Tensor:
    return losses((few, few.feed(model)))


def diagnose(
    model: nn.Module,
    batch: Any,
    keep: float | int = 0.25,
    *,
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
    batchnorm: BatchNormPolicy = "exact",
    class_dim: Literal[1, -1] | None = None,
) -> Diagnosis:
    """Report what a backward through chosen rows would save in ``model``.

    The model runs forward and backward once, on at most 8 samples. Gradients of its parameters, its buffers and the
    random state are left as they are.

    Parameters
    ----------
    model : nn.Module
        In the mode (training or evaluation) in which it will be trained.
    batch : (inputs, target) or dict
        A minibatch, as for :class:`selbp.SelectiveBackprop`. A dict has its target under ``"labels"``.
    keep : float or int
        Share in (0, 1] or number of rows.
    loss, class_dim
        As for :class:`selbp.SelectiveBackprop`.
    batchnorm : {"exact", "subset"}
        As in :func:`selbp.select`.

    Returns
    -------
    Diagnosis
        ``print`` it for a table.

    Raises
    ------
    TypeError, ValueError
        For a batch or an option that does not fit.
    NotImplementedError
        For a sharded model, reentrant checkpointing, and everything that :func:`selbp.select` refuses.
    RuntimeError
        If the model or the loss fails on the few samples.

    See Also
    --------
    selbp.select : the backward that is looked at.
    selbp.SelectiveBackprop : ``backward="auto"`` follows the recommendation.

    Examples
    --------
    >>> import torch, selbp
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> batch = torch.ones(16, 8), torch.zeros(16, dtype=torch.int64)
    >>> diagnosis = selbp.diagnose(model, batch, keep=0.25)
    >>> diagnosis.k, diagnosis.dense  # every operator of the backward runs on 4 rows
    (4, {})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    if not isinstance(batch, (Tensor, tuple, list, Mapping)):
        raise TypeError(f'batch must be (inputs, target), or a dict with "labels", got {shown(batch)}')
    check_choice("batchnorm", batchnorm, ("exact", "subset"))
    kept = check_keep(keep)
    inputs, target = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    minibatch = Batch.of(inputs, target, {})
    criterion = criterion_of(loss, class_weight=None, ignore_index=-100, label_smoothing=0.0, class_dim=class_dim)
    headless: AbstractContextManager[None] = nullcontext()
    if isinstance(criterion, CrossEntropy) and loss == LINEAR:
        criterion = linear = LinearCausalLM(criterion, model, find_head(model, None))
        headless = linear.headless()

    def losses(pair: Any) -> Tensor:
        few, output = pair
        return criterion.losses(output, few.target, few.n)

    try:
        with headless, of_some(min(minibatch.n, SAMPLES), minibatch.n):
            return analyse_batch(model, minibatch, kept_rows(kept, minibatch.n), losses, batchnorm=batchnorm)
    except (NotImplementedError, TypeError, ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuntimeError(
            f"selbp.diagnose runs the model forward and backward on the first {min(minibatch.n, SAMPLES)} of the "
            f"batch's {minibatch.n} samples, and there met {type(error).__name__}: {error}"
        ) from error
