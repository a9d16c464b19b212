"""target_logit, statistics and finalize against the specification, in the interpreter."""

import mmap

import pytest
import torch
from support import kernel_cases as cases

from selbp import reference
from selbp.triton_kernels import configs
from selbp.triton_kernels.configs import TABLE, Tile

POINTER, DESCRIPTOR, STORED = Tile(32, 64, 32), Tile(32, 64, 32, descriptor=True), Tile(4, 128, 0)
SLICED = Tile(32, 64, 32, quarters=True)
# (n, d, C): ragged in all, exact tiles, one class, one row, more classes than fit one split
SHAPES = [(37, 24, 203), (64, 64, 128), (5, 16, 1), (1, 8, 2), (3, 8, 517)]
pytestmark = pytest.mark.filterwarnings("ignore:All-NaN slice")


def spec_and_eager(case):
    def run(c):
        return reference.linear_cross_entropy_statistics(c.features, c.weight, c.bias, c.target, **c.options)

    return run(case.to(torch.float64)), run(case.to(torch.float32))


def check_linear(case, tile, splits=None):
    cases.assert_statistics(cases.run_linear(case, tile, splits), *spec_and_eager(case), smallest=0.1)


def check_logits(case, splits=None):
    logits = case.logits

    def run(dtype):
        c = case.to(dtype)
        return reference.cross_entropy_statistics(
            logits.to(dtype), c.target, c.features, bias=c.bias is not None, **c.options
        )

    got = cases.run_logits(logits, case, STORED, splits, case.features, float(case.bias is not None))
    cases.assert_statistics(got, run(torch.float64), run(torch.float32))


@pytest.mark.parametrize(("dtype", "option"), cases.every_option())
def test_every_option(dtype, option):
    case = cases.make(37, 24, 203, dtype, option, bias=True)
    check_linear(case, POINTER)
    check_linear(case, SLICED)
    check_linear(case, DESCRIPTOR)
    check_logits(case)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("option", cases.OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_every_shape_and_option(dtype, shape, option, splits, bias):
    case = cases.make(*shape, dtype, option, bias=bias)
    check_linear(case, POINTER, splits)
    check_linear(case, SLICED, splits)
    check_linear(case, DESCRIPTOR, splits)
    check_logits(case, splits)


@pytest.mark.parametrize("option", ["plain", "everything"])
@pytest.mark.parametrize("shape", [s for s in SHAPES if s != (37, 24, 203)] + [(2, 3, 7)])
def test_odd_shapes(shape, option):
    case = cases.make(*shape, torch.float32, option)
    check_linear(case, POINTER, splits=2)
    check_logits(case, splits=2)


@pytest.mark.parametrize("option", ["smoothing", "softcap"])
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_in_odd_shapes(shape, option):
    check_linear(cases.make(*shape, torch.float32, option), SLICED, splits=2)


@pytest.mark.parametrize("option", ["smoothing", "softcap"])
@pytest.mark.parametrize("d", [8, 9])
def test_rows_without_alignment_have_the_tile_of_ragged_classes(d, option, monkeypatch):
    """Rows of 9 numbers of 2 bytes allow no descriptor; a sliced tile is compiled with descriptors alone."""
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")
    seen = []
    split = configs.class_splits
    monkeypatch.setattr(configs, "class_splits", lambda *sizes: seen.append(sizes[1]) or split(*sizes))
    check_linear(cases.make(20, d, 512, torch.bfloat16, option), None)
    assert seen == [2 if d == 8 else 8]  # tiles of 256 classes, of 64


@pytest.mark.slow
@pytest.mark.parametrize("option", ["plain", "softcap", "smoothing", "everything"])
@pytest.mark.parametrize("arch", TABLE)
def test_shipped_tiles(arch, option):
    kernel = "statistics" if option == "plain" else f"statistics_{option}"
    for dtype in cases.DTYPES:
        case = cases.make(130, 72, 523, dtype, option, bias=True)
        check_linear(case, TABLE[arch][kernel][dtype.itemsize])
        case = cases.make(130, 72, 512, dtype, option)
        check_linear(case, TABLE[arch][kernel][dtype.itemsize])


@pytest.mark.parametrize("option", ["plain", "smoothing"])
def test_confident_rows_keep_their_accuracy(option):
    """1 - p_y from 1e-2 down to 1e-9 in one batch: loss and norm keep a relative accuracy of 1e-6."""
    logits = torch.zeros(9, 50)
    logits[:, 7] = torch.tensor([50 * 10.0**e for e in range(1, 10)]).log()
    case = cases.make(9, 4, 50, option=option)
    case.target[:] = 7
    for splits in (1, 3):
        got = cases.run_logits(logits, case, Tile(4, 16, 0), splits)
        spec = reference.cross_entropy_statistics(logits.double(), case.target, **case.options)
        eager = reference.cross_entropy_statistics(logits, case.target, **case.options)
        cases.assert_close("loss", got[0], spec.loss, eager.loss)
        cases.assert_close("residual_sq", got[2], spec.residual_sq, eager.residual_sq)
        if option == "plain":
            assert 0 < float(spec.loss.min()) < 1.1e-9
            assert cases.relative_error(got[0], spec.loss, 0.0) < 1e-6
            assert cases.relative_error(got[2], spec.residual_sq, 0.0) < 1e-6


def test_smoothing_does_not_cancel_near_its_optimum():
    """Where p is the smoothed target up to 1e-3, ||r||^2 is a millionth of the terms that an expansion subtracts."""
    n, n_classes, eps = 8, 300, 0.2
    case = cases.make(n, 4, n_classes, option="smoothing")
    case.options["label_smoothing"] = eps
    case.target[:] = torch.arange(n)
    soft = reference.soft_target(case.target, n_classes, None, eps, torch.float64)
    logits = (soft.log() + 1e-3 * torch.randn(n, n_classes)).float()
    for splits in (1, 4):
        got = cases.run_logits(logits, case, Tile(4, 32, 0), splits)
        spec = reference.cross_entropy_statistics(logits.double(), case.target, **case.options)
        eager = reference.cross_entropy_statistics(logits, case.target, **case.options)
        cases.assert_statistics(got, (*spec[:3], torch.ones(n).double(), *spec[4:]), eager)


def test_shifted_and_masked_logits():
    """Offsets of 1000, -inf and finfo.min masks, a leading and a trailing target."""
    case = cases.make(12, 4, 40)
    logits = torch.randn(12, 40) * 3
    logits[0] += 1000.0
    logits[1] -= 1000.0
    logits[2, :] = -torch.inf
    logits[3, 1:] = torch.finfo(torch.float32).min
    logits[4, 5:] = -torch.inf
    logits[5] = 0.0
    case.target[:] = torch.tensor([3, 3, 3, 0, 2, 1, 0, 1, 2, 3, 4, 5])
    logits[2, 3] = 1.0
    spec = reference.cross_entropy_statistics(logits.double(), case.target)
    eager = reference.cross_entropy_statistics(logits, case.target)
    for splits in (1, 3):
        cases.assert_statistics(cases.run_logits(logits, case, Tile(4, 16, 0), splits), spec, eager)
    assert spec.valid[[2, 3, 4]].all()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_logit_of_infinity_leaves_no_loss(smoothing):
    """Wherever it stands, and the same as in the specification."""
    case = cases.make(3, 4, 40)
    case.target[:] = 1
    logits = torch.zeros(3, 40)
    logits[0, 1] = logits[1, 22] = logits[2, 1] = logits[2, 30] = torch.inf
    case = cases.Case(case.features, case.weight, None, case.target, {"label_smoothing": smoothing})
    spec = reference.cross_entropy_statistics(logits.double(), case.target, label_smoothing=smoothing)
    for splits in (1, 3):
        got = cases.run_logits(logits, case, Tile(4, 16, 0), splits)
        for a, b in zip((got[0], got[2]), (spec.loss, spec.residual_sq), strict=True):
            assert a.isnan().all() and b.isnan().all()
        assert not got[5].any() and not spec.valid.any()


@pytest.mark.parametrize("option", cases.OPTIONS)
def test_broken_rows_are_flagged_alone(option):
    clean = cases.make(16, 8, 70, option=option, bias=True)
    clean.target[:] = torch.arange(16)
    broken = cases.Case(clean.features.clone(), clean.weight, clean.bias, clean.target.clone(), clean.options)
    broken.features[3, 2] = torch.nan
    broken.features[9, 0] = torch.inf
    broken.target[5] = 70
    broken.target[6] = -1
    before, after = cases.run_linear(clean, POINTER, 2), cases.run_linear(broken, POINTER, 2)
    others = [i for i in range(16) if i not in (3, 5, 6, 9)]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[others], b[others])
    assert not after[5][[3, 5, 6, 9]].any() and not after[4][[3, 5, 6, 9]].any()
    assert after[0][[3, 5, 6]].isnan().all()


def test_one_bit_more_of_the_same_bits():
    """Two runs give the same bits."""
    case = cases.make(37, 24, 203, torch.bfloat16, "everything", bias=True)
    first, second = (cases.run_linear(case, DESCRIPTOR, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("tile", [POINTER, DESCRIPTOR], ids=["pointers", "descriptors"])
def test_empty_batch(tile):
    """A descriptor, which has no empty dim, is not made either: of no rows, and as the sketch of none."""
    case = cases.make(0, 8, 5, torch.bfloat16)
    assert [len(field) for field in cases.run_linear(case, tile)] == [0] * 6


def test_many_classes():
    case = cases.make(2, 8, 262144, torch.bfloat16)
    check_linear(case, Tile(16, 8192, 16), splits=2)


def test_offsets_beyond_32_bits():
    """Rows 2^30 elements apart: a 32-bit offset would wrap at row 2."""
    stride = 2**30 + 8
    with cases.no_deterministic_fill(), mmap.mmap(-1, 2 * (2 * stride + 64)) as memory:
        pool = torch.frombuffer(memory, dtype=torch.bfloat16)
        logits = pool.as_strided((3, 40), (stride, 1))
        logits.copy_(torch.randn(3, 40))
        case = cases.make(3, 16, 40, torch.bfloat16)
        case.target[:] = 3
        spec = reference.cross_entropy_statistics(logits.double(), case.target)
        eager = reference.cross_entropy_statistics(logits.float(), case.target)
        ones = torch.ones(3).double()
        cases.assert_statistics(cases.run_logits(logits, case, STORED), (*spec[:3], ones, *spec[4:]), eager)
        weight = pool.as_strided((3, 16), (stride, 1))
        weight.copy_(torch.randn(3, 16))
        case = cases.Case(case.features, weight, None, torch.arange(3), {})
        cases.assert_statistics(cases.run_linear(case, Tile(16, 16, 16)), *spec_and_eager(case))
        del pool, logits, weight, case
