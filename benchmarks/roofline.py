"""What this machine can do at best: the GEMM rate per dtype and the bandwidth per working set, measured in the run.

``python -m benchmarks.roofline`` prints both, and then the models of the Triton kernels on GPUs (roofline_gpu.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks import roofline_gpu, stream
from selbp.ops import _gemm, gradient_gram

_BYTES_PER_SAMPLE = 1 << 28  # read about this much per timing, so that a small working set is read many times


class Roofline:
    """The peak rates of one device, each measured on first use and kept."""

    def __init__(self, device: torch.device, threads: int, quick: bool = False):
        self.device, self.threads, self.quick = device, threads, quick
        self._flops: dict[torch.dtype, float] = {}
        self._read: dict[int, float] = {}
        self._copy: dict[int, float] = {}

    def flops(self, dtype: torch.dtype) -> float:
        """The best FLOP/s of a large product in ``dtype``: of every GEMM that torch offers here, and of our own.

        A roofline below what some kernel reaches would be none, and torch's float64 product is slower than ours here.
        """
        if dtype not in self._flops:
            n = 4096 if self.device.type == "cuda" else 512 if self.quick else 1024
            x = torch.randn(n, n, device=self.device).to(dtype)
            flops = 2.0 * n**3
            rates = [flops / self._seconds(lambda: torch.mm(x, x.t()))]
            if self.device.type == "cpu" and dtype in _gemm._PROBED and _gemm._agree(dtype):
                rates.append(flops / self._seconds(lambda: _gemm._onednn(x, x)))
            if dtype != torch.float16:  # one triangle of two products
                rates.append(flops / self._seconds(lambda: gradient_gram(x, x)))
            self._flops[dtype] = max(rates)
        return self._flops[dtype]

    def read(self, nbytes: int) -> float:
        """Bytes/s at which a working set of ``nbytes`` is read again and again (L1, L2, L3 or memory, as it fits)."""
        return self._bandwidth(self._read, nbytes, copy=False)

    def copy(self, nbytes: int) -> float:
        """Bytes/s, read and written ones together, at which a working set of ``nbytes`` is copied within itself."""
        return self._bandwidth(self._copy, nbytes, copy=True)

    def _bandwidth(self, known: dict[int, float], nbytes: int, copy: bool) -> float:
        size = 1 << max(15, min(29, int(nbytes - 1).bit_length()))  # the next power of two, from 32 KiB to 512 MiB
        if size not in known:
            if self.device.type == "cuda":
                known[size] = self._cuda_bandwidth(size)
            else:
                count = size // (8 if copy else 4)  # floats; a copy works on two halves
                source, target = torch.ones(count), torch.ones(count if copy else 0)
                repeats = max(1, _BYTES_PER_SAMPLE // size)

                def once() -> None:
                    if copy:
                        stream.copy(target, source, repeats, self.threads)
                    else:
                        stream.read(source, repeats, self.threads)

                known[size] = size * repeats / self._seconds(once)
        return known[size]

    def _cuda_bandwidth(self, size: int) -> float:
        source = torch.ones(size // 8, device=self.device)
        target = torch.empty_like(source)
        return size / self._seconds(lambda: target.copy_(source))

    def _seconds(self, work: Callable[[], object]) -> float:
        best = float("inf")
        now = time.process_time if self.threads == 1 and self.device.type == "cpu" else time.perf_counter
        for _ in range(4 if self.quick else 8):
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            start = now()
            work()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            best = min(best, now() - start)
        return best

    def table(self) -> dict[str, float]:
        """Everything measured so far, named, in GFLOP/s and GB/s."""
        rates = {f"gemm {str(dtype).removeprefix('torch.')} GFLOP/s": rate / 1e9 for dtype, rate in self._flops.items()}
        for name, known in (("read", self._read), ("copy", self._copy)):
            rates |= {f"{name} {size >> 10} KiB GB/s": rate / 1e9 for size, rate in sorted(known.items())}
        return rates


def main() -> None:
    """Print the rates of this machine on one thread, measured, and the models of GPUs."""
    torch.set_num_threads(1)
    here = Roofline(torch.device("cpu"), 1)
    here.flops(torch.float32), here.flops(torch.bfloat16)
    for kibibytes in (256, 4096, 131072):
        here.read(kibibytes << 10), here.copy(kibibytes << 10)
    for name, rate in here.table().items():
        print(f"{name}: {rate:.1f} measured")
    roofline_gpu.main()


if __name__ == "__main__":
    main()
