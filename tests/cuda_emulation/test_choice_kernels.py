"""The kernels that choose rows on emulated threads: the specification's rows and weights under every schedule."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from choices import EmulatedCore, differing, emulated, numbers
from support.compiled import compile_all, link, patched
from support.emulation import COMMON, HERE, ROOT, machine_flags

from selbp.ops import choose_rows
from selbp.reference import sampling

SIZES = {
    "rows": [1, 2, 5, 33, 64],
    "norm": [1, 6, 65],
    "percentile": [1, 6, 33],
    "balanced": [1, 2, 7, 34],
    "diverse": [1, 2, 7, 33],
}
MANY = {"rows": [130, 700], "norm": [129, 700], "percentile": [130, 700], "balanced": [66, 100], "diverse": [100, 130]}


def library(csrc=ROOT / "csrc"):
    shim = HERE / "shim"
    kernels = [*COMMON, *machine_flags(), "-fPIC", "-DSELBP_LEVEL=device", "-DSELBP_DEVICE_CODE"]
    units = [
        (HERE / "selection.cpp", kernels, [shim, csrc]),
        (shim / "scheduler.cpp", [*COMMON, "-fPIC"], [shim]),
    ]
    return link("selection", compile_all(units), ("-shared",))


@pytest.fixture(scope="module")
def built():
    return library()


@pytest.mark.parametrize("operator", SIZES)
@pytest.mark.parametrize("schedule", [0, 3])
def test_the_kernels_are_the_specification(built, operator, schedule):
    core = EmulatedCore(built, schedule)
    assert differing(core, operator, SIZES[operator]) == []
    assert core.launches > 15


@pytest.mark.slow
@pytest.mark.parametrize("operator", MANY)
def test_the_kernels_are_the_specification_across_warps(built, operator):
    assert differing(EmulatedCore(built, 2), operator, MANY[operator]) == []


def test_the_same_bits_under_every_schedule(built):
    x, valid, draws = numbers(150, 1)
    found = []
    for schedule in range(4):
        with emulated(EmulatedCore(built, schedule)):
            found.append(choose_rows._cuda(x.exp(), valid, draws, 40, "odds", "unbiased"))
    for indices, weights in found[1:]:
        assert torch.equal(indices, found[0][0]) and torch.equal(weights, found[0][1])


def test_the_most_rows_of_one_block(built):
    core = EmulatedCore(built)
    x, valid, draws = numbers(4096, 0)
    with emulated(core):
        for rule in ("top", "odds"):
            arguments = (x.abs(), valid, None if rule == "top" else draws, 64, rule, "mean")
            indices, weights = choose_rows._cuda(*arguments)
            expected = sampling.choose_rows(*arguments)
            assert torch.equal(indices, expected[0]) and torch.allclose(weights, expected[1], rtol=1e-12)
    assert core.launches == 2


@pytest.mark.parametrize(
    ("n", "shared"), [(4097, 227 << 10), (600, 10 << 10)], ids=["too many rows", "too little shared memory"]
)
def test_what_a_block_does_not_hold_is_left_to_the_reference(built, n, shared):
    core = EmulatedCore(built)
    x, valid, _ = numbers(n, 0)
    with emulated(core, shared):
        indices, _ = choose_rows._cuda(x, valid, None, 7, "top", "mean")
    assert core.launches == 0 and torch.equal(indices, x.topk(7).indices)


# ------------------------------------------------------------------------------------------------- planted bugs

PLANTED = {
    "no barrier in the sort": (
        "rows",
        "block.cuh",
        "        sync();\n        each(size / 2",
        "        each(size / 2",
    ),
    "no barrier before the totals are added": (
        "rows",
        "block.cuh",
        "    totals_[thread()] = sum;\n    sync();",
        "    totals_[thread()] = sum;",
    ),
    "ties by the higher row": ("rows", "block.cuh", "rows[low] > rows[high])", "rows[low] < rows[high])"),
    "the offset forgotten": ("rows", "choose.cuh", "offset = draws[n];", "offset = 0.0;"),
    "invalid rows drawn": ("rows", "choose.cuh", "return p.valid[row] != 0 && is_finite", "return is_finite"),
    "spare slots weighted": (
        "rows",
        "choose.cuh",
        "slot < chosen ? slot_weight(mode",
        "chosen ? slot_weight(mode",
    ),
    "the old mean of tau": ("norm", "choose.cuh", "*p.after = running;", "*p.after = tau;"),
    "the threshold forgotten": ("norm", "choose.cuh", "(p.threshold < 0 || running > p.threshold)", "true"),
    "the oldest losses stay": ("percentile", "choose.cuh", "p.length - finite + int(before)", "int(before)"),
    "no losses but finite ones counted": ("percentile", "choose.cuh", "known > 1 ? known : 1", "p.length"),
    "equal losses count as below": (
        "percentile",
        "choose.cuh",
        "keys[middle] < key_of(own)",
        "keys[middle] <= key_of(own)",
    ),
    "an invalid row's loss enters": ("percentile", "choose.cuh", "return p.valid[row] ? read(", "return true ? read("),
    "no barrier after the pivot row": (
        "balanced",
        "balanced.cuh",
        "current[j] * scale; });\n    block.sync();",
        "current[j] * scale; });",
    ),
    "either end of a walk alike": (
        "balanced",
        "balanced.cuh",
        "draw * (up + down) < down ? up : -down",
        "draw < 0.5 ? up : -down",
    ),
    "a column left in": ("balanced", "balanced.cuh", "(r < rank || r > row) && j != column", "r > row && j != column"),
    "drawn rows stay": ("diverse", "diverse.cuh", "if (j == pick) free[j] = 0;", ""),
    "the span forgotten": ("diverse", "diverse.cuh", "s < step; ++s)", "s < step - 1; ++s)"),
    "no barrier before the sweep": (
        "diverse",
        "diverse.cuh",
        ": 0.0;\n    block.sync();\n",
        ": 0.0;\n",
    ),
}


SEEN_FAST = ("no barrier in the sort", "the offset forgotten", "a column left in")


@pytest.mark.parametrize(
    "name", [name if name in SEEN_FAST else pytest.param(name, marks=pytest.mark.slow) for name in PLANTED]
)
def test_a_planted_bug_is_seen(tmp_path, name):
    operator, file, before, after = PLANTED[name]
    found = library(patched(tmp_path / "csrc", (f"selection/{file}", before, after)))
    script = Path(__file__).with_name("choices.py")
    done = subprocess.run(
        [sys.executable, str(script), str(found), operator, "34"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode in (0, -signal.SIGSEGV), done.stderr
    assert done.stdout.strip() or done.returncode, "no schedule shows it"
