"""The same bits twice, from compiled code and from a captured graph; the solver's, those of the CPU; the GPU tests."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from gpu_parts.results import Results
from selbp import ops
from selbp.ops import _cuda_solver

ROOT = pathlib.Path(__file__).parents[2]


def every_operator(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    logits: Tensor,
    left: Tensor,
    right: Tensor,
    solve: bool,
) -> list[Tensor]:
    """What every operator returns, and the (n,) losses with their graph; nothing waits for the device."""
    stored = ops.cross_entropy_statistics(logits, target, features)
    r = ops.residual(logits, target, stored.lse)
    gram, mean = ops.gradient_gram(r, features), ops.mean_gradient(r, features)
    rows = torch.arange(8, device=target.device)
    found = [*stored, r, gram, *mean, ops.matching_residual(r, features, ops.Selection(rows, stored.loss[:8]))]
    found += [*ops.linear_cross_entropy_statistics(features, weight, bias, target)]
    found.append(ops.sketch(features[:300].unflatten(0, (30, 10)), weight, bias, target.view(30, 10), (left, right)))
    if solve:
        found += [*ops.match(gram, mean.inner, mean.target_sq, 16, valid=stored.valid)]
    loss = ops.linear_cross_entropy(features, weight, bias, target)
    loss = loss + ops.linear_cross_entropy(features, weight, bias, target, skip_mass=0.3)
    return [tensor.detach() for tensor in found] + [loss]


def reproducible(results: Results, device: str, backend: str) -> None:
    """The same bits twice, from compiled code, and from a captured graph."""
    torch.manual_seed(0)
    features, weight, bias, logits, target = (
        torch.randn(300, 256),
        torch.randn(5000, 256) / 16,
        torch.randn(5000),
        torch.randn(300, 5000),
        torch.randint(5000, (300,)),
    )
    heads = [x.to(device).requires_grad_() for x in (features, weight, bias)]
    rest = (target.to(device), logits.to(device), *ops.sketch_projections(5000, 257, device=device))
    solve = device == "cpu" or _cuda_solver.solver(0, 300, 16, False)[0] is not None  # else it is solved on the host

    def work(function: Callable[..., list[Tensor]] = every_operator) -> list[Tensor]:
        *found, loss = function(*heads, *rest, solve)
        # Summed here: the order in which compiled code adds up is not eager torch's.
        return [*found, loss.detach(), *torch.autograd.grad(loss.sum(), heads)]

    first = work()

    def same(name: str, others: list[Tensor], detail: str) -> None:
        wrong = [i for i, (a, b) in enumerate(zip(first, others, strict=True)) if not torch.equal(a, b)]
        results.add(name, not wrong, detail=f"{detail}; {wrong or 'none'} of {len(first)} outputs differ")

    same("determinism", work(), "two runs")
    same("torch.compile", work(torch.compile(every_operator, fullgraph=True, backend=backend)), "one full graph")
    if device == "cpu":
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    graph.replay()
    torch.cuda.synchronize()
    same("CUDA graph", captured, "captured and replayed")


def matching(results: Results, device: str, tiny: bool) -> None:
    """The solver's kernels have the CPU's bits, where the CPU fuses multiply and add."""
    for dtype in (torch.float32, torch.float64):
        for batch, n, k in ((3, 33, 33),) if tiny else ((3, 33, 33), (64, 128, 32), (2, 512, 128), (1, 1024, 256)):
            name = f"match {str(dtype).removeprefix('torch.')} {batch}x({n},{k})"
            solver, missing = (True, "") if device == "cpu" else _cuda_solver.solver(0, n, k, dtype == torch.float64)
            if solver is None:
                results.add(name, None, detail=f"not checked: {missing}")
                continue
            generator = torch.Generator().manual_seed(n)
            rows = torch.randn(batch, n, n // 2, generator=generator, dtype=torch.float64) + 0.3
            target = rows.mean(1) + 0.2 * torch.randn(batch, n // 2, generator=generator, dtype=torch.float64)
            problem = [rows @ rows.mT, (rows @ target[..., None])[..., 0], target.square().sum(1)]
            problem = [x.to(dtype) for x in problem]
            wanted, found = ops.match(*problem, k), ops.match(*(x.to(device) for x in problem), k)
            same = all(torch.equal(a, b.cpu()) for a, b in zip(wanted, found, strict=True))
            results.add(name, same, detail="the CPU's bits")


def nvrtc(results: Results, device: str) -> None:
    """What NVRTC compiles answers as the built core does; both have the CPU's bits."""
    if device == "cpu" or _cuda_solver.cuda_core()[0] is None:
        results.add("NVRTC", None, detail="compared where the core is built, on a GPU")
        return
    built = _cuda_solver.cuda_core
    _cuda_solver.cuda_core = lambda: (None, "left out")
    try:
        solver, missing = _cuda_solver.solver(0, 128, 32, False)
        results.add("NVRTC compiles and loads", solver is not None, detail=missing or solver.architectures())
        if solver is not None:
            rows = torch.randn(64, 128, 60, generator=torch.Generator().manual_seed(1)) + 0.3
            problem = [rows @ rows.mT, (rows @ rows.mean(1)[..., None])[..., 0], rows.mean(1).square().sum(1)]
            wanted, found = ops.match(*problem, 32), ops.match(*(x.to(device) for x in problem), 32)
            same = all(torch.equal(a, b.cpu()) for a, b in zip(wanted, found, strict=True))
            results.add("NVRTC's match 64x(128,32)", same, detail="the CPU's bits")
    finally:
        _cuda_solver.cuda_core = built


def gpu_tests(results: Results, device: str) -> None:
    """``pytest -m gpu``."""
    if device == "cpu" or importlib.util.find_spec("pytest") is None:
        results.add("pytest -m gpu", None, detail="needs a GPU and pytest")
        return
    workers = min(8, len(os.sched_getaffinity(0)) // 2) if importlib.util.find_spec("xdist") else 0
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-n", str(workers), "--dist", "loadfile"] if workers > 1 else []
    command += ["tests"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "4"}, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or [done.stderr[-300:]])[-1]
    results.add("pytest -m gpu", done.returncode == 0, detail=last)


def run(results: Results, device: str, tiny: bool) -> None:
    """All of it."""
    results.row("bits of the operators", lambda: reproducible(results, device, "aot_eager" if tiny else "inductor"))
    results.row("bits of the solver", lambda: matching(results, device, tiny))
    results.row("bits of NVRTC's kernels", lambda: nvrtc(results, device))
    results.row("tests", lambda: gpu_tests(results, device))
