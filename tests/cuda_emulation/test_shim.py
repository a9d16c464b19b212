"""The stand-in for CUDA itself: it runs right kernels rightly and reports every kind of wrong one."""

import re

import pytest
from support.emulation import build, run

SEEDS = range(8)  # two of each order in which threads are picked


@pytest.fixture(scope="module")
def selftest():
    return build("selftest.cpp")


@pytest.mark.parametrize("kernel", ["rotate", "warp_sum", "grid_total", "reads_unwritten"])
def test_right_kernels(selftest, kernel):
    for seed in SEEDS:
        assert run(selftest, kernel, seed) == (0, "right\n", "")


@pytest.mark.parametrize(
    "kernel,report",
    [
        ("missing_barrier", "wrong"),
        ("divergent", "divergent barrier: .* at another place"),
        ("leaves_early", "divergent barrier: thread 7 of block . exited|1 threads have exited"),
        ("half_a_shuffle", "deadlock: .* 48 at a shuffle; 48 have exited"),
        ("outside_the_mask", "mask"),
        ("grid_barrier_alone", "not cooperative"),
        ("past_the_end", "block 0 wrote past the end of its shared memory"),
    ],
)
def test_wrong_kernels_are_reported(selftest, kernel, report):
    for seed in SEEDS:
        status, output, _ = run(selftest, kernel, seed)
        assert status in (1, 3)
        assert re.search(report, output), output


def test_thread_sanitizer_sees_the_race_and_no_other():
    program = build("selftest.cpp", sanitizer="thread")
    for seed in range(4):
        status, _, errors = run(program, "missing_barrier", seed)
        assert status == 66 and "data race" in errors and "selftest.cpp" in errors
        for kernel in ("rotate", "warp_sum", "grid_total"):
            assert run(program, kernel, seed) == (0, "right\n", "")


def test_address_sanitizer_sees_the_write_past_the_end_and_no_other():
    program = build("selftest.cpp", sanitizer="address")
    for seed in range(4):
        status, _, errors = run(program, "past_the_end", seed)
        assert status == 1 and "heap-buffer-overflow" in errors
        for kernel in ("rotate", "warp_sum", "grid_total"):
            assert run(program, kernel, seed)[:2] == (0, "right\n")
