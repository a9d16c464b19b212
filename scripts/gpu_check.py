"""What only a machine with a GPU can show: ``make gpu-check``, or ``python scripts/gpu_check.py [--quick]``.

1. Parity: every operator on CUDA against the specification in float64, for each dtype and option; an error may be
   twice that of eager torch in the same dtype plus a rounding.
2. Every operator gives the same bits twice, under torch.compile(fullgraph=True), and from a captured CUDA graph.
3. Throughput: ours, eager torch, torch's own ``linear_cross_entropy``, Liger and Cut Cross-Entropy where installed.

Exits with 1 where a check fails and with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import math
import pathlib
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from selbp import ops, reference
from selbp.ops import _backends

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # run as a script, Python looks beside it only
from benchmarks.throughput_gpu import throughput  # noqa: E402

OPTIONS = (
    {},
    {"label_smoothing": 0.1},
    {"softcap": 5.0},
    {"class_weight": True, "label_smoothing": 0.2, "softcap": 7.0},
)
failures: list[str] = []


def report(name: str, good: bool, detail: str) -> None:
    """Print one line and remember a failure."""
    print(f"{'ok  ' if good else 'FAIL'} {name}: {detail}", flush=True)
    if not good:
        failures.append(name)


def error(got: Tensor, spec: Tensor) -> float:
    """Greatest difference, relative to the greatest entry, over the finite entries of the specification."""
    keep = spec.isfinite()
    scale = spec[keep].abs().max().clamp_min(1e-30)
    return float(((got.double() - spec)[keep].abs() / scale).max())


def compare(name: str, got: Tensor, spec: Tensor, eager: Tensor) -> None:
    """Hold ``got`` to twice the error of ``eager``, plus four roundings of float32."""
    ours, theirs = error(got, spec), error(eager, spec)
    report(name, ours <= 2.0 * theirs + 2.0**-21, f"error {ours:.1e}, eager's {theirs:.1e}")


def parity(dtype: torch.dtype, option: dict[str, object], shape: tuple[int, int, int]) -> None:
    """Every operator at one shape (n, d, C)."""
    n, d, n_classes = shape
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator).to("cuda", dtype)
    weight = (torch.randn(n_classes, d, generator=generator) / d**0.5).to("cuda", dtype)
    bias = torch.randn(n_classes, generator=generator).to("cuda", dtype)
    target = torch.randint(n_classes, (n,), generator=generator).cuda()
    target[::7] = -100
    options = dict(option)
    if options.pop("class_weight", False):
        options["class_weight"] = torch.rand(n_classes, generator=generator).cuda()
    wide = {**options, **({"class_weight": options["class_weight"].double()} if "class_weight" in options else {})}
    label = f"{str(dtype).removeprefix('torch.')} {shape} {sorted(option)}"

    got = ops.linear_cross_entropy_statistics(features, weight, bias, target, **options)
    spec = reference.linear_cross_entropy_statistics(features.double(), weight.double(), bias.double(), target, **wide)
    eager = reference.linear_cross_entropy_statistics(features, weight, bias, target, **options)
    for field in ("loss", "lse", "residual_sq", "feature_sq"):
        compare(f"linear statistics {field} {label}", getattr(got, field), getattr(spec, field), getattr(eager, field))
    report(f"linear statistics valid {label}", torch.equal(got.valid, spec.valid), "flags")

    logits = F.linear(features, weight, bias)
    got = ops.cross_entropy_statistics(logits, target, features, **options)
    spec = reference.cross_entropy_statistics(logits.double(), target, features.double(), **wide)
    eager = reference.cross_entropy_statistics(logits.float(), target, features.float(), **options)
    for field in ("loss", "lse", "residual_sq"):
        compare(f"statistics {field} {label}", getattr(got, field), getattr(spec, field), getattr(eager, field))
    r = ops.residual(logits, target, got.lse, **options)
    compare(
        f"residual {label}", r, reference.residual(logits.double(), target, got.lse.double(), **wide),
        reference.residual(logits.float(), target, got.lse, **options),
    )  # fmt: skip
    r, h = r.to(dtype), features
    compare(
        f"gram {label}", ops.gradient_gram(r, h), reference.gradient_gram(r.double(), h.double()),
        reference.gradient_gram(r, h),
    )  # fmt: skip
    got, spec = ops.mean_gradient(r, h), reference.mean_gradient(r.double(), h.double())
    eager = reference.mean_gradient(r, h)
    for field in ("inner", "head_weight", "head_bias"):
        compare(f"mean gradient {field} {label}", getattr(got, field), getattr(spec, field), getattr(eager, field))
    backward(label, features, weight, bias, target, options, wide)

    tokens = math.gcd(n, 10)
    h, y = features.view(n // tokens, tokens, d), target.view(n // tokens, tokens)
    left, right = ops.sketch_projections(n_classes, d + 1, (16, 16), dtype=dtype, device="cuda")  # exact in any dtype
    compare(
        f"sketch {label}", ops.sketch(h, weight, bias, y, (left, right), **options),
        reference.sketch(h.double(), weight.double(), bias.double(), y, left.double(), right.double(), **wide),
        reference.sketch(h, weight, bias, y, left, right, **options),
    )  # fmt: skip


def backward(label, features, weight, bias, target, options, wide) -> None:
    """Gradients of linear_cross_entropy against autograd's through eager torch."""

    def gradients(dtype: torch.dtype, ours: bool) -> list[Tensor]:
        inputs = [x.detach().to(dtype).requires_grad_() for x in (features, weight, bias)]
        if ours:
            loss = ops.linear_cross_entropy(*inputs, target, **options).sum()
        else:
            chosen = wide if dtype == torch.float64 else options
            logits = reference.soft_cap(F.linear(*inputs), chosen.get("softcap", 0.0))
            weights = chosen.get("class_weight")
            loss = F.cross_entropy(
                logits, target, weight=None if weights is None else weights.to(dtype), reduction="sum",
                label_smoothing=chosen.get("label_smoothing", 0.0),
            )  # fmt: skip
        return list(torch.autograd.grad(loss, inputs))

    ours, eager = gradients(features.dtype, True), gradients(features.dtype, False)
    for name, a, b, c in zip(("features", "weight", "bias"), ours, gradients(torch.float64, False), eager, strict=True):
        compare(f"gradient of {name} {label}", a, b, c)


def every_operator(
    features: Tensor, weight: Tensor, bias: Tensor, target: Tensor, logits: Tensor, left: Tensor, right: Tensor,
    solve: bool,
) -> list[Tensor]:  # fmt: skip
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
    return [tensor.detach() for tensor in found] + [loss]


def reproducible(device: str = "cuda", backend: str = "inductor") -> None:
    """The same bits twice, from compiled code, and from a captured graph."""
    features, weight, bias, logits, target = (
        torch.randn(300, 256), torch.randn(5000, 256) / 16, torch.randn(5000), torch.randn(300, 5000),
        torch.randint(5000, (300,)),
    )  # fmt: skip
    heads = [x.to(device).requires_grad_() for x in (features, weight, bias)]
    rest = (target.to(device), logits.to(device), *ops.sketch_projections(5000, 257, device=device))
    solve = device == "cpu" or _backends.cuda_core()[0] is not None  # else it is solved on the host

    def work(function: Callable[..., list[Tensor]] = every_operator) -> list[Tensor]:
        *found, loss = function(*heads, *rest, solve)
        # Summed here: the order in which compiled code adds up is not eager torch's.
        return [*found, loss.detach(), *torch.autograd.grad(loss.sum(), heads)]

    first = work()

    def same(name: str, others: list[Tensor], detail: str) -> None:
        wrong = [i for i, (a, b) in enumerate(zip(first, others, strict=True)) if not torch.equal(a, b)]
        report(name, not wrong, f"{detail}; {wrong or 'none'} of {len(first)} outputs differ")

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


def matching() -> None:
    """The solver's kernels have the CPU's bits, where the CPU fuses multiply and add."""
    core, missing = _backends.cuda_core()
    if core is None:
        print(f"     the solver's kernels are not checked: {missing}")
        return
    for dtype in (torch.float32, torch.float64):
        for batch, n, k in ((3, 33, 33), (64, 128, 32), (2, 512, 128), (1, 1024, 256)):
            generator = torch.Generator().manual_seed(n)
            rows = torch.randn(batch, n, n // 2, generator=generator, dtype=torch.float64) + 0.3
            target = rows.mean(1) + 0.2 * torch.randn(batch, n // 2, generator=generator, dtype=torch.float64)
            problem = [rows @ rows.mT, (rows @ target[..., None])[..., 0], target.square().sum(1)]
            problem = [x.to(dtype) for x in problem]
            wanted, found = ops.match(*problem, k), ops.match(*(x.cuda() for x in problem), k)
            same = all(torch.equal(a, b.cpu()) for a, b in zip(wanted, found, strict=True))
            report(f"match {str(dtype).removeprefix('torch.')} {batch}x({n},{k})", same, "the CPU's bits")


def main() -> int:
    """Run everything; see the module's docstring for the exit status."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("--quick", action="store_true", help="one shape, no throughput")
    options = parse.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device, so nothing can be checked here", file=sys.stderr)
        return 2
    print(f"device: {torch.cuda.get_device_name()}; kernels: {_backends.unavailable() or 'Triton'}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for option in OPTIONS:
            for shape in [(300, 257, 1003)] if options.quick else [(1, 8, 1), (300, 257, 1003), (512, 512, 32000)]:
                parity(dtype, option, shape)
    reproducible()
    matching()
    if not options.quick:
        throughput([(4096, 1000, 2048), (8192, 128256, 4096), (8192, 32000, 4096)])
    print(f"{len(failures)} failed" + "".join(f"\n  {name}" for name in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
