"""``Diagnosis``: what was found of a model, as a table and as one line."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple


@dataclass
class Operator:
    """All calls of one operator in the backward."""

    name: str
    runs: str  # "rows": on k rows; "dense": scattered back to n; "plain": met no row gradient (below a dense one)
    why: str  # the reason, for "dense"
    calls: int = 0
    flops: float = 0.0  # on all n rows
    seconds: float = 0.0  # modelled, on all n rows, without the time per call


class Measured(NamedTuple):
    """Steps of a rule beside full steps, by the kind of step: ``"full"``, ``"rows"``, ``"recompute"``."""

    rule: str
    seconds: dict[str, float]  # medians
    memory: dict[str, int]  # bytes
    steps: int  # of each kind
    clock: str  # whose seconds


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
        Modelled time of a step by strategy, and of its forward, on a CPU such as this. Empty on another device, where
        none was measured to model it by.
    measured : tuple or None
        Of a rule that was given: ``rule``, ``seconds`` and ``memory`` (bytes) of ``"full"``, ``"rows"`` and
        ``"recompute"`` steps, the number of ``steps``, and whose ``clock``.
    recommendation : {"rows", "recompute"}
        The strategy with the lower time, measured or else modelled; ``"recompute"`` where neither is known.

    See Also
    --------
    selbp.diagnose : returns one.

    Examples
    --------
    >>> import torch, selbp
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> found = selbp.diagnose(model, (torch.randn(16, 4), torch.randint(0, 3, (16,))))
    >>> found.dense  # every operator has a rule
    {}
    >>> found.summary.partition(":")[0]  # what is recommended for a network as small as this
    'the full step'
    """

    n: int
    k: int
    operators: list[Operator]
    forward_flops: float
    row_flops: float
    dense_flops: float
    saved_bytes: int
    seconds: dict[str, float]
    measured: Measured | None = None
    recommendation: Literal["rows", "recompute"] = field(init=False)

    def __post_init__(self) -> None:
        seconds = self.seconds if self.measured is None else self.measured.seconds
        rows, recompute = (seconds.get(name, math.inf) for name in ("rows", "recompute"))
        self.recommendation = "rows" if rows < recompute else "recompute"

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

    @property
    def summary(self) -> str:
        """One line: the recommended step, its time and memory over those of a full step, and how they are known."""
        way, found = self.recommendation, self.measured
        rows = f"on {self.k} of {self.n} rows"
        if found is None and not self.seconds:
            return (
                f'a rule that reads losses, {rows} with backward="{way}": {self.cost[way]:.2f} of a full step\'s FLOPs '
                "(counted in a forward and backward of a few samples). Time is modelled on a CPU only: selector= "
                "measures it here"
            )
        if found is None:
            rule, seconds, memory = "a rule that reads losses", self.seconds, self.memory
            how = (
                "modelled: FLOPs, bytes and calls, counted in a forward and backward of a few samples; memory: saved "
                "activations"
            )
        else:
            rule, seconds, memory = found.rule, found.seconds, found.memory
            how = f"measured: medians of {found.steps} steps of each, {found.clock}; memory: most bytes alive at once"
        time, space = seconds[way] / max(seconds["full"], 1e-12), memory[way] / max(memory["full"], 1)
        cost = f"{time:.2f} of a full step's time and {space:.2f} of its memory ({how})"
        if time < 1:
            return f'{rule}, {rows} with backward="{way}": {cost}'
        return f'the full step: {rule}, {rows}, takes at best, with backward="{way}", {cost}'

    def __str__(self) -> str:
        lines = [f"{'operator':52s} {'runs':6s} {'calls':>5s} {'GFLOP':>9s}  why"]
        for op in sorted(self.operators, key=lambda op: (op.runs != "dense", op.runs != "plain", -op.flops)):
            lines.append(f"{op.name:52s} {op.runs:6s} {op.calls:5d} {op.flops / 1e9:9.3f}  {op.why}".rstrip())
        lines.append(f"\nk = {self.k} of n = {self.n} rows; modelled cost and saved activations of a step:")
        for name, cost in self.cost.items():
            rest = f", {1e3 * self.seconds[name]:8.2f} ms" if name in self.seconds else ""
            if name in self.memory:
                rest += f", {self.memory[name] / 2**20:9.1f} MiB"
            lines.append(f"  {name:10s} {cost:6.3f} of the full step's FLOPs ({1 / max(cost, 1e-9):.2f}x){rest}")
        lines.append(f"recommended: {self.summary}")
        return "\n".join(lines)
