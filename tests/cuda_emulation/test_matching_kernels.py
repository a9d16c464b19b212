"""The real matching kernels on emulated threads: the CPU's bits under every schedule; planted bugs are caught."""

import pytest
from support.compiled import patched
from support.emulation import build, run

KERNELS = ["shared", "global", "grid"]


def case(kernel, n, k, *, dtype="f32", rule=0, nonnegative=1, ridge=1e-3, tolerance=0.0, batch=1, masked=0, seed=1):
    def line(schedule):
        words = (kernel, dtype, n, k, rule, nonnegative, ridge, tolerance, batch, masked, seed, schedule)
        return " ".join(map(str, words))

    return line


def outcomes(program, cases, schedules):
    """What the program says of each case under each schedule; the last line is what stopped it, if anything did."""
    lines = [one(schedule) for one in cases for schedule in schedules]
    status, output, errors = run(program, text="\n".join(lines) + "\n", seconds=600)
    said = output.splitlines()
    assert status in (0, 3) and (status == 3 or len(said) == len(lines)), (output, errors)
    return said


def assert_equal(program, cases, schedules):
    for said in outcomes(program, cases, schedules):
        assert said == "equal"


@pytest.fixture(scope="module")
def emulator():
    return build("matching.cpp", host=True, defines=["-DSELBP_LEVEL=device", "-DSELBP_DEVICE_CODE"])


def sizes(n):
    return sorted({1, 2, (n + 1) // 2, n, n + 3})


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [1, 2, 31, 32, 33])
def test_same_bits_as_the_cpu(emulator, kernel, n, dtype):
    cases = [case(kernel, n, k, dtype=dtype, batch=2, masked=k % 2, seed=n + k) for k in sizes(n)]
    assert_equal(emulator, cases, range(4))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("n", [255, 256, 257])
def test_same_bits_across_warps_and_blocks(emulator, kernel, n):
    cases = [case(kernel, n, 31, seed=n), case(kernel, n, 33, dtype="f64", masked=1, seed=n + 1)]
    assert_equal(emulator, cases, [n % 4, (n + 1) % 4])


@pytest.mark.parametrize("blocks,n", [(5, 600), (8, 960)])
def test_same_bits_on_grids_of_many_blocks(emulator, blocks, n):
    k = 24
    assert -(-(-(-n // 32) * 32 + 32) // 128) == blocks  # of 128 columns: the rows, then the slots
    assert_equal(emulator, [case("grid", n, k, seed=n), case("grid", n, k, masked=1, seed=n + 1)], [n % 4])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("rule", [0, 1, 2])
@pytest.mark.parametrize("nonnegative", [0, 1])
def test_same_bits_for_every_rule(emulator, kernel, rule, nonnegative):
    options = {"rule": rule, "nonnegative": nonnegative, "seed": 5}
    cases = [
        case(kernel, 48, 48, ridge=0.0, **options),  # with removals, to the end
        case(kernel, 40, 20, tolerance=0.3, **options),
        case(kernel, 40, 20, masked=1, batch=3, ridge=0.1, **options),
    ]
    assert_equal(emulator, cases, [0, 1])


FILLED, NO_ROW = 3, 7  # of `masked`, see matching.cpp


def spare_slots(kernel):
    return [
        case(kernel, 20, 25, masked=FILLED, batch=2),  # more slots than rows
        case(kernel, 40, 40, masked=FILLED, tolerance=0.5, seed=2),  # as many as the residual needs
        case(kernel, 40, 9, masked=FILLED, tolerance=10.0, seed=3),  # none: the first valid row
        case(kernel, 33, 4, masked=NO_ROW),  # none to choose from: row 0
        case(kernel, 33, 40, masked=2, dtype="f64"),
    ]


@pytest.mark.parametrize("kernel", KERNELS)
def test_spare_slots_repeat_a_row(emulator, kernel):
    assert_equal(emulator, spare_slots(kernel), [0, 1])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("seed", range(10))
def test_same_bits_for_many_problems_and_schedules(emulator, kernel, seed):
    cases = [
        case(kernel, n, k, dtype=dtype, seed=100 * seed + n, masked=n % 2, batch=2)
        for n in (7, 31, 33, 65, 96)
        for k in (n // 3, n)
        for dtype in ("f32", "f64")
    ]
    assert_equal(emulator, cases, range(4 * seed, 4 * seed + 4))


# ------------------------------------------------------------------------------------------------- planted bugs

TEAM, ENGINE = "team/block_team.cuh", "matching/engine.hpp"


def planted(tmp_path, file, before, after):
    csrc = patched(tmp_path / "csrc", (file, before, after))
    defines = ["-DSELBP_LEVEL=device", "-DSELBP_DEVICE_CODE", "-DONLY_F32"]
    return build("matching.cpp", host=True, csrc=csrc, defines=defines)


def outcome(program, kernel, k=40):
    said = []
    for schedule in range(4):  # each in a process of its own: what stops one must not hide the others
        said += outcomes(program, [case(kernel, 70, k, seed=3)], [schedule])
    return said


def test_planted_missing_barrier(tmp_path):
    """The warps' results are read before they have all been written."""
    program = planted(tmp_path, TEAM, "best;\n    __syncthreads();\n    int lanes = 1;", "best;\n    int lanes = 1;")
    said = outcome(program, "shared")
    assert any(line != "equal" for line in said), said


def test_planted_missing_grid_barrier(tmp_path):
    program = planted(tmp_path, TEAM, "= best;\n    SELBP_GRID_SYNC();\n", "= best;\n")
    said = outcome(program, "grid")
    assert any(line != "equal" for line in said), said


def test_planted_off_by_one_row(tmp_path):
    """The sweep leaves the newest row out."""
    program = planted(
        tmp_path, ENGINE, "s = first_row(j, begin); s < last; ++s)", "s = first_row(j, begin); s < last - 1; ++s)"
    )
    assert all("differ" in line for line in outcome(program, "global"))


def test_planted_unmasked_repeat(tmp_path):
    """Neither the mask nor the rank test keeps a chosen row, or its copy, from being chosen again."""
    masked = "const auto eligible = (cosine > noise_) & (distance > j.load(work_.floor));"
    program = planted(tmp_path, ENGINE, masked, "const auto eligible = (aligned > T(0)) & (distance > T(0));")
    assert all("differ" in line for line in outcome(program, "shared"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("if (count > 0) return", "if (count > options_.n) return"),
        ("!problem_.valid[row]", "problem_.valid[row]"),
        ("row < options_.n ? row : 0", "row"),
    ],
    ids=["never the first chosen", "the first that is not valid", "past the last row"],
)
def test_planted_wrong_row_in_spare_slots(tmp_path, before, after):
    program = planted(tmp_path, "matching/setup.hpp", before, after)
    said = outcomes(program, spare_slots("shared")[:-1], [0])
    assert any("indices differ" in line for line in said), said


def test_planted_divergent_barrier(tmp_path):
    """Only part of the block reaches the barrier before the sweep."""
    program = planted(
        tmp_path,
        TEAM,
        "void sync() const { __syncthreads(); }",
        "void sync() const {\n    if (threadIdx.x < 40) __syncthreads();\n  }",
    )
    assert all("divergent barrier" in line or "divergent shuffle" in line for line in outcome(program, "shared"))


def test_planted_write_past_the_shared_arrays(tmp_path):
    program = planted(
        tmp_path,
        "matching/kernels.cuh",
        "ballot_bytes<T>(kWarp) + std::size_t(shape.rows) * sizeof(T);",
        "ballot_bytes<T>(kWarp) + std::size_t(shape.rows - 2) * sizeof(T);",
    )
    assert all("past the end of its shared memory" in line for line in outcome(program, "grid", k=12))


# --------------------------------------------------------------------------------------------------- sanitizers


@pytest.mark.parametrize("sanitizer", ["thread", pytest.param("address", marks=pytest.mark.slow)])
def test_clean_under_sanitizers(sanitizer):
    defines = ["-DSELBP_LEVEL=device", "-DSELBP_DEVICE_CODE"]
    program = build("matching.cpp", host=True, sanitizer=sanitizer, defines=defines)
    for kernel in KERNELS:
        cases = [case(kernel, n, k, dtype=t, masked=n % 2, batch=2, seed=n) for n, k, t in SANITIZED]
        for one in cases:
            status, output, errors = run(program, text=one(2) + "\n", seconds=600)
            assert (status, output) == (0, "equal\n"), errors


SANITIZED = [(1, 1, "f32"), (33, 33, "f32"), (70, 20, "f64"), (70, 70, "f32")]


@pytest.mark.slow
def test_thread_sanitizer_names_the_missing_barrier(tmp_path):
    bug = (TEAM, "best;\n    __syncthreads();\n    int lanes = 1;", "best;\n    int lanes = 1;")
    csrc = patched(tmp_path / "csrc", bug)
    defines = ["-DSELBP_LEVEL=device", "-DSELBP_DEVICE_CODE", "-DONLY_F32"]
    program = build("matching.cpp", host=True, csrc=csrc, sanitizer="thread", defines=defines)
    status, _, errors = run(program, text=case("shared", 70, 40)(2) + "\n")
    assert status == 66 and "data race" in errors and "block_team.cuh" in errors
