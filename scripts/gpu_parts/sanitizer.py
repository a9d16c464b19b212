"""compute-sanitizer over every kernel at small, ragged shapes; run as a script, this file is what it watches."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the script is started without the parts beside it
    from gpu_parts.results import Results

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SCRIPTS = pathlib.Path(__file__).parents[1]
FOUND = 99  # the exit status that says an error was found


def driver(device: str) -> None:
    """Every kernel once for each of its options that change what it addresses."""
    import torch

    import selbp
    from selbp import ops
    from selbp.ops import minibatch
    from selbp.ops.match_gradients import _match_gradients
    from selbp.ops.score_minibatch import _score_minibatch

    torch.manual_seed(0)
    n, d, n_classes = 37, 24, 203
    for dtype in (torch.float32, torch.bfloat16):
        h, w, c = (torch.randn(*s, device=device).to(dtype) for s in ((n, d), (n_classes, d), (n_classes,)))
        y = torch.randint(n_classes, (n,), device=device)
        for options in ({}, {"label_smoothing": 0.1, "softcap": 5.0}):
            ops.linear_cross_entropy_statistics(h, w, c, y, **options)
            logits = h @ w.T + c
            stats = ops.cross_entropy_statistics(logits, y, h, **options)
            r = ops.residual(logits, y, stats.lse, **options)
            leaves = [x.detach().requires_grad_() for x in (h, w, c)]
            torch.autograd.grad(ops.linear_cross_entropy(*leaves, y, **options).sum(), leaves)
        for softcap in (0.0, 5.0):
            wide = [h.detach().requires_grad_(), w.repeat(3, 1).requires_grad_(), c.repeat(3).requires_grad_()]
            torch.autograd.grad(ops.linear_cross_entropy(*wide, y, skip_mass=0.5, softcap=softcap).sum(), wide)
        r = r.to(dtype)
        gram, mean = ops.gradient_gram(r, h), ops.mean_gradient(r, h)
        for factors, finite in (("both", True), ("none", False)):
            _score_minibatch(logits, y, h, None, -100, 0.1, 5.0, True, factors)
            _match_gradients(r, h, stats.valid, True, 12, "ols", 1e-3, True, finite)
        live = minibatch.finite_rows(h)
        minibatch.unscored(y, live, None, -100, False)
        minibatch.count_hits(logits, y, live, -100)
        minibatch.weighted_loss(stats.loss, stats.loss.sum(), stats.lse)
        ops.sketch(
            h[:30].unflatten(0, (10, 3)),
            w,
            c,
            y[:30].view(10, 3),
            ops.sketch_projections(n_classes, d + 1, (8, 8), dtype=dtype, device=device),
        )
        for wide in (torch.float32, torch.float64):
            problem = [x.to(wide) for x in (gram, mean.inner, mean.target_sq)]
            ops.match(*problem, 12, valid=stats.valid)
            ops.match(*(x.expand(3, *x.shape).contiguous() for x in problem), n)
        proxies = selbp.GradientProxies(r, h)
        rules = selbp.TopLoss(), selbp.LossRank(), selbp.LossPercentile(), selbp.GradNormImportance()
        for rule in (*rules, selbp.CubeSampling(), selbp.DivBS()):
            rule.select(stats, 12, proxies=proxies)
    for size, k, wide in (  # tableaus in global memory, and the whole grid on one problem
        (512, 128, torch.float32),
        (300, 100, torch.float64),
        (1024, 256, torch.float32),
    ):
        rows = torch.randn(size, 64, dtype=wide, device=device)
        ops.match(rows @ rows.T, rows @ rows.mean(0), rows.mean(0).square().sum(), k)
    if device != "cpu":
        torch.cuda.synchronize()


def check(results: Results, tool: str, device: str) -> None:
    """One tool; without the caching allocator, so that each tensor has bounds of its own."""
    command, environment = [sys.executable, __file__, device], dict(os.environ)
    paths = [str(SCRIPTS.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    found = shutil.which("compute-sanitizer")
    if device == "cpu" or found is None:
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        detail = "there is no compute-sanitizer here; the driver alone " + ("ran" if not done.returncode else "failed")
        results.add(tool, None if done.returncode == 0 else False, detail=detail + done.stderr[-400:])
        return
    environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    options = ["--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "5"]
    done = subprocess.run([found, *options, *command], env=environment, capture_output=True, text=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    results.add(
        tool,
        done.returncode == 0,
        detail=f"exit {done.returncode}; {' '.join(said[-12:])[:900]}"
        + (done.stderr[-400:] if done.returncode not in (0, FOUND) else ""),
    )


def run(results: Results, device: str, tiny: bool) -> None:
    """Every tool; a stand-in runs the driver once."""
    for tool in TOOLS[:1] if tiny else TOOLS:
        results.row(f"sanitizer {tool}", partial(check, results, tool, device))


if __name__ == "__main__":
    driver(sys.argv[1])
