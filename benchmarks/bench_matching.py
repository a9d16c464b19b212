"""The matching solver against scikit-learn, SPAMS, CORDS and SciPy on Gram matrices of real gradients.

``python -m benchmarks matching`` times; ``python -m benchmarks.bench_matching`` prints what single cases cannot show:
the scaling of batches, the cost of a whole selection beside a forward pass, and the modelled latency on a GPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import stream
from benchmarks.gradients import STAGES, MatchingProblem, matching_problem
from benchmarks.harness import Case, Unavailable, suite
from benchmarks.peers import matching as peers
from selbp import ops, reference
from selbp_study.models import SmallCNN


def _with(
    peer: Callable[..., object] | Unavailable, call: Callable[..., object]
) -> Callable[..., object] | Unavailable:
    return peer if isinstance(peer, Unavailable) else partial(call, peer)


# -------------------------------------------------------------------------------------------- one matching problem


def _single(source: str, stage: str, n: int, device: torch.device) -> tuple[MatchingProblem, dict[str, object]]:
    problem = MatchingProblem(*(x.float().to(device) for x in matching_problem(source, stage, n)))
    return problem, {name: x.cpu().numpy() for name, x in problem._asdict().items()}


def residual(call: Callable[[], Any], results: list[Any], inputs: tuple[Any, ...]) -> Mapping[str, float]:
    """|target - sum w g| / |target| in float64, of our Matching or of dense weights."""
    p, found = inputs[0], results[-1]
    gram, inner, target_sq = p.gram.double(), p.inner.double(), p.target_sq.double()
    if isinstance(found, ops.Matching):
        weights = torch.zeros_like(inner).index_add_(0, found.indices.clamp(min=0), found.weights.double())
    else:
        weights = torch.as_tensor(found, dtype=torch.float64, device=inner.device)
    square = (target_sq - 2.0 * weights @ inner + weights @ gram @ weights).clamp(min=0.0)
    return {"residual": float((square / target_sq).sqrt())}


READING = "reading that many bytes of a tableau alone"


def _pursuit(n: int, k: int, source: str, stage: str, quick: bool = False) -> Case:
    tableau, nbytes = 4 * (n + k) * k, 2 * n * k * k + 4 * k**3 // 3
    limits = {"CORDS OrthogonalMP_REG_Parallel_V1": 1 / 250, READING: 1 / (0.6 if n <= 512 else 0.85)}
    if (source, stage) != ("clusters", "late"):  # where scikit-learn stops early, for "linear dependence"
        limits["scikit-learn orthogonal_mp_gram"] = 1 / 18
    memory = torch.ones(tableau // 4)

    def read(*_: object) -> None:
        stream.read(memory, round(nbytes / tableau), torch.get_num_threads())

    return Case(
        f"nonnegative OLS n={n} k={k} {source}, {stage}",
        partial(_single, source, stage, n),
        {
            "ours": lambda p, _: ops.match(p.gram, p.inner, p.target_sq, k),
            "scikit-learn orthogonal_mp_gram": _with(
                peers.scikit_learn(), lambda solve, _, a: solve(a["gram"], a["inner"], k)
            ),
            "SPAMS omp": _with(peers.spams(), lambda solve, _, a: solve(a["factor"], a["target"], k)),
            "CORDS OrthogonalMP_REG_Parallel_V1": _with(
                peers.cords() if n < 2048 or stage == "early" else Unavailable("left out: four seconds a call"),
                lambda solve, p, _: solve(p.factor, p.target, k),
            ),
            READING: read,
        },
        flops=2.0 * n * k * k,
        nbytes=nbytes,
        formula="row t of k reads the t rows before it: 2 n k^2 + 4 k^3 / 3 bytes (lookahead reads fewer)",
        working_set=tableau,
        limits=limits if n > 128 else {},  # there the call itself, not the solve, is most of ours
        quick=quick,
        rounds=5,
        quality=residual,
    )


# ------------------------------------------------------------------------------------------------------------ NNLS


EQUAL = 1e-9  # relative: the objective that ours may exceed SciPy's by


def _nnls_inputs(source: str, stage: str, n: int, device: torch.device) -> tuple[MatchingProblem, dict[str, object]]:
    """The factor and target as SciPy gets them, and for ours the inner products of exactly those."""
    whole = matching_problem(source, stage, n, external=True)
    a, y = whole.factor, whole.target
    problem = MatchingProblem(*(x.to(device) for x in (a.T @ a, a.T @ y, y @ y, a, y)))
    return problem, {name: x.cpu().numpy() for name, x in problem._asdict().items()}


def equal_objective(_: Callable[[], Any], results: list[Any], inputs: tuple[Any, ...]) -> Mapping[str, float]:
    """|A x - y| / |y|; of ours, AssertionError unless x >= 0 and its square is SciPy's, or less."""
    problem, arrays = inputs

    def square(x: Any) -> float:
        weights = torch.as_tensor(x, dtype=torch.float64, device=problem.factor.device)
        return float((problem.factor @ weights - problem.target).square().sum() / problem.target_sq)

    reached = square(results[-1])
    if isinstance(results[-1], Tensor):
        solve = peers.scipy_nnls()
        least = math.nan if isinstance(solve, Unavailable) else square(solve(arrays["factor"], arrays["target"]))
        assert results[-1].min() >= 0.0 and not reached > least * (1.0 + EQUAL), (reached, least)
    return {"residual": math.sqrt(reached)}


def _nnls(n: int, source: str, stage: str, quick: bool = False) -> Case:
    return Case(
        f"NNLS n={n} {source}, {stage}, target of another batch, float64",
        partial(_nnls_inputs, source, stage, n),
        {
            "ours": lambda p, _: ops.nnls_gram(p.gram, p.inner),
            "SciPy nnls": _with(peers.scipy_nnls(), lambda solve, _, a: solve(a["factor"], a["target"])),
        },
        limits={"SciPy nnls": 1 / 8},
        quick=quick,
        rounds=5,
        quality=equal_objective,
    )


# --------------------------------------------------------------------------------------------------------- batches


def _batch_inputs(batch: int, n: int, device: torch.device) -> tuple[list[Tensor], list[tuple[object, object]]]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(batch, n, n, generator=generator, dtype=torch.float64) + 0.3
    target = rows.mean(1) + 0.3 * torch.randn(batch, n, generator=generator, dtype=torch.float64)
    gram, inner = rows @ rows.mT, (rows @ target[..., None])[..., 0]
    ours = [x.float().to(device) for x in (gram, inner, target.square().sum(1))]
    return ours, [(a.T.numpy(), y.numpy()) for a, y in zip(rows, target, strict=True)]


def _batch(batch: int, n: int, k: int) -> Case:
    return Case(
        f"{batch} problems n={n} k={k}",
        partial(_batch_inputs, batch, n),
        {
            "ours": lambda ours, _: ops.match(*ours, k),
            "Python loop over SciPy nnls": _with(
                peers.scipy_nnls(), lambda solve, _, problems: [solve(a, y) for a, y in problems]
            ),
        },
        limits={"Python loop over SciPy nnls": 1 / 50},
        rounds=5,
    )


CASES = [
    _pursuit(128, 32, "digits", "early", quick=True),
    *(_pursuit(n, n // 4, source, stage) for n in (512, 1024) for source in ("digits", "clusters") for stage in STAGES),
    *(_pursuit(2048, 512, "clusters", stage) for stage in STAGES),  # there are 1797 digits
    *(_nnls(n, source, "late") for n in (256, 512) for source in ("digits", "clusters")),
    _batch(32, 64, 16),
    _batch(1024, 64, 16),
]
test_matching = suite(CASES)


# --------------------------------------------------------------------------------------- what single cases cannot show


def _milliseconds(
    call: Callable[[], object], seconds: float = 1.0, now: Callable[[], float] = time.process_time
) -> float:
    call()
    samples, end = [], time.perf_counter() + seconds
    while len(samples) < 5 or time.perf_counter() < end:
        start = now()
        call()
        samples.append(now() - start)
    return 1e3 * statistics.median(samples)


def _against(value: float, limit: float, unit: str) -> str:
    return f"{value:.2f} {unit} <= {limit:g}: {'met' if value <= limit else 'missed'}"


def selection(source: Any, logits: Tensor, target: Tensor, features: Tensor, k: int) -> object:
    """Everything between the forward and the backward: statistics, residual, Gram, mean gradient, solve.

    ``source`` is ``selbp.ops``, or ``selbp.reference`` for the same in plain torch.
    """
    stats = source.cross_entropy_statistics(logits, target, features)
    residual = source.residual(logits, target, stats.lse)
    mean = source.mean_gradient(residual, features)
    return source.match(source.gradient_gram(residual, features), mean.inner, mean.target_sq, k, valid=stats.valid)


class _Basic(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.skip = (
            nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if stride != 1 or inputs != width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet18(classes: int) -> nn.Module:
    """He et al. (2016), table 1, with the ImageNet stem."""
    widths = [
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
        (512, 512, 1),
    ]
    return nn.Sequential(
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
        *(_Basic(*w) for w in widths),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, classes),
    )


def modelled_h100_us(k: int, barriers: int = 2) -> float:
    """UNMEASURED. k iterations of the block kernel: per iteration two barriers with their shuffles and one trip to L2
    for the pivot's row of the Gram matrix, from published latencies (about 0.2 us, 0.15 us and 0.35 us at 1.7 GHz).
    """
    return k * (barriers * 0.2 + 0.15 + 0.35)


def batches() -> str:
    """Wall time of batches of 32 and 1024 problems (64, 16) on one thread and on two, and how far from linear it is.

    A call has a fixed cost, which threads do not share: t(32) - 32 (t(1024) - t(32)) / (1024 - 32). What is said of the
    number of threads leaves that cost out.
    """
    few, many = 32, 1024
    inputs, took = {batch: _batch_inputs(batch, 64, torch.device("cpu"))[0] for batch in (few, many)}, {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for batch, x in inputs.items():
            took[batch, threads] = 1e3 * _milliseconds(partial(ops.match, *x, 16), now=time.perf_counter)
    call = took[few, 1] - few * (took[many, 1] - took[few, 1]) / (many - few)
    lines = [f"  {batch:>4} problems, {threads} thread(s): {us:.1f} us" for (batch, threads), us in took.items()]
    lines += [
        f"  1024 beside 32, {threads} thread(s): "
        + _against(took[many, threads] / took[few, threads] * few / many, 1.1, "of linear in the number of problems")
        for threads in (1, 2)
    ]
    lines.append(f"  the call itself: {call:.1f} us")
    lines += [
        f"  {batch} problems, the call aside: "
        + _against(2 * (took[batch, 2] - call) / (took[batch, 1] - call), 1.1, "of linear in the number of threads")
        for batch in (few, many)
    ]
    return "\n".join(["batches of problems (64, 16):", *lines])


def main() -> None:
    """Print the three, with their limits."""
    print(batches())
    torch.set_num_threads(1)
    n, classes, d, k = 128, 10, 128, 32
    inputs = torch.randn(n, classes), torch.randint(classes, (n,)), torch.randn(n, d), k
    whole, plain = (_milliseconds(partial(selection, source, *inputs)) for source in (ops, reference))
    with torch.no_grad():
        resnet, small = resnet18(classes), SmallCNN((28, 28), classes)
        images, digits = torch.randn(n, 3, 64, 64), torch.randn(n, 1, 28, 28)
        forwards = [
            ("a ResNet-18's (ImageNet stem, 64 x 64 inputs)", 0.5, _milliseconds(lambda: resnet(images))),
            ("the demo CNN's (28 x 28 inputs)", 10.0, _milliseconds(lambda: small(digits))),
        ]
    print(f"whole selection n={n} C={classes} d={d} k={k}, Python included, one thread: {_against(whole, 0.5, 'ms')}")
    print(f"  the same in plain torch (selbp.reference): {plain:.1f} ms")
    for name, limit, forward in forwards:
        print(
            f"  of {name} forward, {forward:.2f} ms: {_against(100 * whole / forward, limit, '%')}; plain torch "
            f"{100 * plain / forward:.1f} %"
        )
    step = 3 * n * 3.6e9 / (0.3 * 989e12) * 1e3  # forward and backward at 224 x 224, 30 % of the bf16 peak
    latency = modelled_h100_us(k)
    print(
        f"H100, modelled, UNMEASURED: solve of k={k} {latency:.0f} us, ResNet-18 step of {n} (224 px) {step:.1f} ms: "
        f"{0.1 * latency / step:.2f} %"
    )


if __name__ == "__main__":
    main()
