"""Offline tuner: times candidate tiles of a kernel on this machine's GPU and prints rows for triton_kernels/configs.py.

    python scripts/tune_triton.py statistics --shape 8192 32000 4096 --dtype bfloat16

Never run by the library: a table that is fixed gives every job the same first step and the same bits. A new row must
pass the ahead-of-time gates (tests/triton_kernels/aot.py) before it ships. Exits with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import statistics as numbers
import sys
from collections.abc import Callable

import torch

KERNELS = ("statistics", "sketch", "gram", "logits")


def candidates(kernel: str) -> list:
    """The tiles that are tried."""
    from selbp.triton_kernels.configs import Tile

    if kernel == "logits":
        return [Tile(r, c, 0, w, 1) for r, c, w in itertools.product((1, 2, 4, 8), (512, 1024, 2048), (4, 8))]
    shapes = ((64, 64), (128, 128)) if kernel == "gram" else ((64, 128), (128, 128), (128, 256), (256, 128))
    return [
        Tile(*shape, depth, warps, stages, descriptor)
        for shape, depth, warps, stages, descriptor in itertools.product(
            shapes, (32, 64), (4, 8), (2, 3, 4), (False, True)
        )
    ]


def launch(kernel: str, shape: list[int], dtype: torch.dtype) -> Callable:
    """A function of the tile that runs the kernel once at ``shape`` = (n, C, d)."""
    from selbp.triton_kernels.gram import gram
    from selbp.triton_kernels.statistics import WIDTH, logits_statistics, statistics

    n, n_classes, d = shape
    target = torch.randint(n_classes, (n,), device="cuda")
    features = torch.randn(n, d, device="cuda", dtype=dtype)
    if kernel in ("statistics", "sketch"):
        weight = torch.randn(n_classes, d, device="cuda", dtype=dtype) / d**0.5
        projection = torch.randn(n_classes, WIDTH, device="cuda", dtype=dtype) if kernel == "sketch" else None
        return lambda tile: statistics(features, weight, None, target, projection=projection, tile=tile)
    logits = torch.randn(n, n_classes, device="cuda", dtype=dtype)
    if kernel == "gram":
        return lambda tile: gram(logits, features, tile=tile)
    return lambda tile: logits_statistics(logits, target, tile=tile)


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Median time after a warm-up that compiles."""
    samples = []
    for index in range(repeats + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        if index >= 2:
            samples.append(begin.elapsed_time(end))
    return numbers.median(samples)


def main() -> int:
    """Try every candidate and print the five fastest."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parse.add_argument("kernel", choices=KERNELS)
    parse.add_argument("--shape", type=int, nargs=3, default=[8192, 32000, 4096], metavar=("N", "C", "D"))
    parse.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    options = parse.parse_args()
    if not torch.cuda.is_available():
        print("tune_triton: torch sees no CUDA device, so there is nothing to time", file=sys.stderr)
        return 2
    from triton.runtime.errors import OutOfResources

    run = launch(options.kernel, options.shape, getattr(torch, options.dtype))
    found = []
    for tile in candidates(options.kernel):
        try:
            found.append((milliseconds(lambda tile=tile: run(tile)), tile))
        except (OutOfResources, RuntimeError) as reason:
            print(f"     {tile}: {str(reason)[:80]}")
            continue
        print(f"{found[-1][0]:8.3f} ms  {tile}", flush=True)
    print("fastest:")
    for took, tile in sorted(found, key=lambda pair: pair[0])[:5]:
        print(f"{took:8.3f} ms  {tile}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
