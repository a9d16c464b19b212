"""The operators that choose rows, as on a GPU, with their kernels on emulated threads; beside the specification.

As a script it runs one operator's cases on the library of the first argument and prints what differs, in a process of
its own: what stops an emulated launch leaves its threads where they were.
"""

import contextlib
import ctypes
import os
import sys
import types
from unittest import mock

import torch

from selbp.ops import _choice_cuda, choose_gradients
from selbp.ops import choose_rows as choose_operator
from selbp.reference import choices, sampling

F64 = torch.float64


class EmulatedCore:
    """What launches a kernel: the face of ``selbp._native_cuda``."""

    def __init__(self, library, schedule=1):
        self._library, self.schedule, self.launches = ctypes.CDLL(str(library)), schedule, 0
        self._library.what_was_said.restype = ctypes.c_char_p

    def launch_choice(self, kernel, problem, size, threads, shared, device, stream):
        self.launches += 1
        status = self._library.launch_choice(
            kernel, ctypes.c_void_p(problem), ctypes.c_size_t(size), threads, ctypes.c_size_t(shared), self.schedule
        )
        if status:
            raise RuntimeError(self._library.what_was_said().decode())


@contextlib.contextmanager
def emulated(core, shared=227 << 10):
    """CPU tensors take the way of CUDA tensors to the kernels."""
    properties = types.SimpleNamespace(shared_memory_per_block_optin=shared)
    stream = types.SimpleNamespace(cuda_stream=0)
    with (
        mock.patch.object(_choice_cuda, "chooser", lambda device: core),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device: properties),
        mock.patch.object(torch.cuda, "current_stream", lambda device: stream),
        mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()),
    ):
        yield


SCORES = {
    "any": lambda x: 5.0 * x,
    "graded": lambda x: (20.0 * x).exp(),
    "ties": lambda x: x.round(),
    "signed zeros": lambda x: (0.3 * x).round(),
    "gaps": lambda x: torch.where(x > 0.5, torch.nan, torch.where(x < -1.5, -torch.inf, x)),
    "equal": torch.ones_like,
    "zero": torch.zeros_like,
}


def numbers(n, seed):
    """Scores, which rows are valid (all, most, none) and draws."""
    generator = torch.Generator().manual_seed(seed)
    x, draws = torch.randn(n, dtype=F64, generator=generator), torch.rand(n + 1, dtype=F64, generator=generator)
    return x, torch.rand(n, generator=generator) > (0.0, 0.2, 1.1)[seed % 3], draws


def same(found, expected):
    """Whether indices are equal and the other outputs near; float32 weights come with scores that torch rounds so."""
    # Two square roots of float32 differ by an ulp at most, and so do odds. Weights and tau are quotients of sums of
    # odds, tau's of their squares: 4 ulps. In float64 1e-9 is left for sums in another order.
    rtol = 4 * torch.finfo(torch.float32).eps if found[1].dtype == torch.float32 else 1e-9
    return torch.equal(found[0], expected[0]) and all(
        torch.allclose(a.double(), b, rtol=rtol, atol=0, equal_nan=True)
        for a, b in zip(found[1:], expected[1:], strict=True)
    )


def kept(n):
    return sorted({1, (n + 2) // 3, n})


def rows_cases(sizes):
    """(name, what the kernel gives, what is specified) of each case of choose_rows."""
    for n in sizes:
        for name, make in SCORES.items():
            x, valid, draws = numbers(n, n)
            for k in kept(n):
                for rule in choose_operator.RULES:
                    for weights in choose_operator.WEIGHTS[: 2 if rule == "top" else 3]:
                        single = len(weights) % 2 == 0  # "mean"
                        score = make(x).float() if single else make(x)
                        arguments = (score, valid, None if rule == "top" else draws, k, rule, weights)
                        found = choose_operator._cuda(*arguments, single)
                        yield f"rows {name} {n} {k} {rule} {weights}", found, sampling.choose_rows(*arguments)


def norm_cases(sizes):
    """The same of choose_by_norm."""
    for n in sizes:
        for name in ("graded", "gaps", "equal", "zero"):
            x, valid, draws = numbers(n, n)
            for dtype in (torch.float32, F64):
                square = SCORES[name](x).square().to(dtype)
                feature_sq = None if n % 2 else square.roll(1) + 1
                for k, threshold in zip(kept(n), (None, 1.5, 0.2), strict=False):
                    tau = torch.tensor(1.25, dtype=F64)
                    arguments = (square, feature_sq, valid, draws, tau, k, "unbiased", 0.9, threshold)
                    found = choose_gradients._cuda_norm(*arguments, dtype == torch.float32)
                    yield f"norm {name} {n} {k} {dtype}", found, choices.choose_by_norm(*arguments)


def percentile_cases(sizes):
    """The same of choose_by_percentile, with fewer, as many and more losses remembered than there are rows."""
    for n in sizes:
        for name in ("any", "ties", "gaps", "signed zeros"):
            x, valid, draws = numbers(n, n)
            for length in (1, n + 3, 2 * n + 7):
                history = SCORES[name](torch.randn(length, dtype=F64, generator=torch.Generator().manual_seed(length)))
                history[: length // 3] = torch.nan
                for k, dtype in zip(kept(n), (torch.float32, F64, torch.float32), strict=False):
                    loss = SCORES[name](x).to(dtype)
                    arguments = (loss, valid, history, draws, k, ("mean", "unbiased")[k % 2], 3.0, 0.01)
                    found = choose_gradients._cuda_percentile(*arguments, dtype == torch.float32)
                    yield f"percentile {name} {n} {length} {k}", found, choices.choose_by_percentile(*arguments)


def gradients(n, seed, dtype):
    """A Gram matrix of rank n / 2 with a row of 0, one of NaN that is not valid, products with the mean, and draws."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, n // 2 + 2, generator=generator, dtype=F64) + 0.3
    rows[n // 3] *= n < 3
    valid = torch.rand(n, generator=generator) > (0.0, 0.2, 1.1)[seed % 3]
    gram, mean = (rows @ rows.T).to(dtype), rows.mean(0)
    if n > 5:
        valid[4] = False
        gram[4], gram[:, 4] = torch.nan, torch.nan
    inner, target_sq = (rows @ mean).to(dtype), mean.square().sum().to(dtype)
    return gram, inner, target_sq, valid, generator


def balanced_cases(sizes):
    """The same of choose_balanced."""
    for n in sizes:
        for dtype in (torch.float32, F64):
            gram, _, _, valid, generator = gradients(n, n, dtype)
            for k in kept(n):
                p = min(max(1, k // 2), n)
                mixture = torch.randn(n, p - 1, dtype=F64, generator=generator)
                draws = torch.rand(2, n, dtype=F64, generator=generator)
                for by_norm in (True, False):
                    arguments = (gram, valid, mixture, draws, k, by_norm)
                    found = choose_gradients._cuda_balanced(*arguments, dtype == torch.float32)
                    yield f"balanced {n} {k} {dtype} {by_norm}", found, choices.choose_balanced(*arguments)


def diverse_cases(sizes):
    """The same of choose_diverse."""
    for n in sizes:
        for dtype in (torch.float32, F64):
            gram, inner, target_sq, valid, generator = gradients(n, n, dtype)
            if n > 5:  # what the operator of the Gram matrix makes of such a row
                gram = gram.nan_to_num(0.0)
            for k in kept(n):
                draws = torch.rand(k, n, dtype=F64, generator=generator)
                arguments = (gram, inner, target_sq, valid, draws, k, ("mean", "batch")[k % 2])
                found = choose_gradients._cuda_diverse(*arguments, dtype == torch.float32)
                yield f"diverse {n} {k} {dtype}", found, choices.choose_diverse(*arguments)


CASES = {
    "rows": rows_cases,
    "norm": norm_cases,
    "percentile": percentile_cases,
    "balanced": balanced_cases,
    "diverse": diverse_cases,
}


def differing(core, operator, sizes):
    """Names of the cases that are not as specified."""
    with emulated(core):
        return [name for name, found, expected in CASES[operator](sizes) if not same(found, expected)]


if __name__ == "__main__":
    library, operator, *sizes = sys.argv[1:]
    for seed in range(3):
        try:
            found = differing(EmulatedCore(library, seed), operator, [int(size) for size in sizes])
        except RuntimeError as stopped:  # by the emulation, which leaves its threads where they were
            print(f"stopped: {stopped}", flush=True)
            os._exit(0)
        if found:
            print("\n".join(found))
            break
