"""Planted bugs: each must be caught by the guard or by the comparison that the other tests of this folder make."""

import importlib
import pathlib
import shutil
import sys

import pytest
import test_kernel_gram
import test_kernel_mean
import test_kernel_minibatch
import test_kernel_residual
import test_kernel_sketch
import test_kernel_skipped
import test_kernel_statistics as check
import test_kernel_stored_rows
import torch
from support import kernel_cases as cases

import selbp.triton_kernels
from selbp.ops import _backends

FOLDER = pathlib.Path(selbp.triton_kernels.__file__).parent


def linear(option="plain"):
    check.check_linear(cases.make(37, 24, 203, torch.float32, option, bias=True), check.POINTER, 3)


def sliced(option="smoothing"):
    check.check_linear(cases.make(37, 24, 203, torch.float32, option, bias=True), check.SLICED, 3)


def described():
    check.check_linear(cases.make(37, 24, 203, torch.float32, bias=True), check.DESCRIPTOR, 3)


def stored(option="plain", splits=3):
    check.check_logits(cases.make(37, 24, 203, torch.float32, option, bias=True), splits)


def residual(option="plain"):
    case = cases.make(19, 24, 203, torch.float32, option, bias=True)
    test_kernel_residual.check(case, case.logits, 3)


def projection(option="plain"):
    # Ever greater logits: the reference moves from tile to tile and from split to split.
    case = cases.make(37, 24, 203, torch.float32, option, bias=True)
    case.bias += torch.linspace(-20.0, 20.0, 203)
    test_kernel_sketch.check(case, test_kernel_sketch.POINTER, splits=3)


def few(option="plain"):
    case = cases.make(37, 24, 203, torch.float32, option, bias=True)
    case.features[3, 1], case.target[3] = torch.nan, 5
    test_kernel_stored_rows.check(case, case.logits.nan_to_num())


def unit():
    test_kernel_stored_rows.test_the_unit(7)


def mean():
    test_kernel_mean.test_shapes((70, 45, 29), True)


def capped():
    projection("everything")


def left_out():
    test_kernel_skipped.check(torch.float32, "all")


def gradients():
    test_kernel_gram.test_shapes((70, 45, 29), True)


def confident():
    check.test_confident_rows_keep_their_accuracy("plain")


DOT = "acc = tl.dot(x, y, acc, input_precision=PRECISION)"
CLAMP = "columns = tl.where(columns < n_b, columns, 0)"
MUTANTS = {
    "off by one: ragged classes counted": ("online", "offset >= n_classes -", "offset > n_classes -", linear),
    "off by one: ragged classes read": ("matmul_tile", CLAMP, CLAMP.replace("<", "<="), linear),
    "off by one: stored logits": (
        "statistics",
        "mask = inside[:, None] & (columns < n",
        "mask = inside[:, None] & (columns <= n",
        stored,
    ),
    "off by one: ragged depth": (
        "matmul_tile",
        "mask=(k + depth < length)[:, None]",
        "mask=(k + depth <= length)[:, None]",
        linear,
    ),
    "off by one: rows": ("statistics", "inside = rows < n", "inside = rows <= n", linear),
    "rows of the last tile stored unmasked": (
        "combine",
        "tl.store(loss_out + rows, loss, mask=inside)",
        "tl.store(loss_out + rows, loss)",
        linear,
    ),
    "product accumulated in float16": ("matmul_tile", DOT, f"{DOT}.to(tl.float16).to(tl.float32)", linear),
    "sum accumulated in float16": (
        "online",
        "s = s * scale + total",
        "s = (s * scale + total).to(tl.float16).to(tl.float32)",
        stored,
    ),
    "target not excluded": (
        "online",
        "offset[None, :] == (y - first)[:, None]",
        "offset[None, :] == (0 * y - 1)[:, None]",
        linear,
    ),
    "target not excluded from stored logits": ("statistics", "(columns[None, :] == y[:, None]) | ", "", stored),
    "slices: all at the tile's first class": ("statistics", "+ part * (COLUMNS", "+ 0 * (COLUMNS", sliced),
    "slices: out of order": ("matmul_tile", "return a, b, c, d", "return c, d, a, b", sliced),
    "slices: the ragged one left out": ("statistics", "if at < n_classes:", "if at + 16 <= n_classes:", sliced),
    "slices: counted past the last class": ("statistics", "if at < n_classes:", "if at < n_classes + 64:", sliced),
    "the target counted in the amount": ("online", " - own.to(tl.int32)", "", sliced),
    "sums of a slice not rescaled": (
        "online",
        "state[3] * (scale * scale), state[4]",
        "state[3] * scale, state[4]",
        sliced,
    ),
    "spread of a slice not moved": ("online", "state[4] * (new - ref) - tl", "-tl", sliced),
    "tile offset ignored": ("matmul_tile", "b.load([j * COLUMNS, k])", "b.load([0, k])", described),
    "sums not rescaled": ("online", "state[3] * (scale * scale) + tl.sum", "state[3] * scale + tl.sum", linear),
    "fits not rescaled": ("combine", "rho * scale,", "rho,", lambda: linear("smoothing")),
    "projection not rescaled": ("statistics", "projected * scale[:, None]", "projected", projection),
    "projection without the target": ("sketch", "own = rest - mass * p_rest", "own = rest", projection),
    "projection: splits at one reference": ("sketch", "torch.exp2(reference - reference.amax(0))", "1.0", projection),
    "projection: share of the target under a cap": ("sketch", "share * sums[1]", "0.0 * sums[1]", capped),
    "spread not moved to the new reference": (
        "online",
        "state[4] * (new - ref) + ",
        "",
        lambda: stored("smoothing", 1),
    ),
    "splits dropped": ("combine", "for split in range(0, n_splits)", "for split in range(0, 1)", linear),
    "log of one plus a small number": (
        "combine",
        "log1p(a / tl.where(leads, t, 1.0))",
        "tl.log(1.0 + a / t)",
        confident,
    ),
    "one minus a probability near one": ("combine", "p_rest = a / total", "p_rest = 1.0 - t / total", confident),
    "class weight of the wrong class": (
        "combine",
        "tl.where(in_range, y, 0), mask",
        "tl.where(in_range, y * 0, 0), mask",
        lambda: stored("weight"),
    ),
    "bias forgotten in the target": ("target_logit", "z += tl.load(bias + y", "z += 0.0 * tl.load(bias + y", linear),
    "slope of the cap forgotten": ("online", "e = e * g", "e = e", lambda: linear("softcap")),
    "residual's target from its probability": (
        "residual",
        "rest - (t_y + rest) * p_rest",
        "tl.exp(z - lse_row) - 1.0",
        test_kernel_residual.test_confident_target_entry,
    ),
    "residual off by one": ("residual", "(columns < n_classes)[None, :]", "(columns <= n_classes)[None, :]", residual),
    "residual of rows without a target": ("residual", "tl.where(present[:, None], r, 0.0)", "r", residual),
    "gram: mirror not transposed": ("gram", "tl.trans(acc)", "acc", gradients),
    "gram: wrong tile of the triangle": (
        "gram",
        "columns = j * ROWS + tl.arange(0, ROWS)\n    if",
        "columns = i * ROWS + tl.arange(0, ROWS)\n    if",
        gradients,
    ),
    "gram: bias twice": ("gram", "acc * (other + plus)", "acc * (other + 2.0 * plus)", gradients),
    "gram: broken rows kept": (
        "gram",
        "bad_row[:, None] | bad_column[None, :]",
        "bad_row[:, None]",
        test_kernel_gram.test_broken_rows_count_as_zero,
    ),
    "gram: off by one": ("matmul_tile", "rows < n_a, rows", "rows <= n_a, rows", gradients),
    "stored rows: the target not excluded": ("stored_rows", "(columns[None, :] == y[:, None]) | ", "", few),
    "stored rows: classes beyond the last": (
        "stored_rows",
        "(columns >= n_classes)[None, :]",
        "(columns > n_classes)[None, :]",
        few,
    ),
    "stored rows: smoothing's share forgotten": (
        "stored_rows",
        "r - (label_smoothing / n_classes) * w",
        "r",
        lambda: few("smoothing"),
    ),
    "stored rows: the cap's slope forgotten": ("stored_rows", "r = r * g", "r = r", lambda: few("softcap")),
    "stored rows: the class weight forgotten": ("stored_rows", "r * factor[:, None]", "r", lambda: few("weight")),
    "stored rows: the target's entry from its probability": (
        "stored_rows",
        "own[:, None], r)",
        "(exponential(z_y - lse) - 1.0)[:, None], r)",
        lambda: test_kernel_stored_rows.test_confident_rows_keep_their_accuracy("plain"),
    ),
    "stored rows: residuals of rows that are not valid": (
        "stored_rows",
        "tl.where(valid[:, None], r, 0.0)",
        "r",
        lambda: test_kernel_stored_rows.test_rows_that_are_not_valid_spoil_no_other("plain"),
    ),
    "stored rows: features of rows that are not valid": ("stored_rows", "there & valid[:, None]", "there", few),
    "stored rows: an ignored row has a mass": ("stored_rows", "tl.where(ignored, 0.0, 1.0)", "0.0 * y + 1.0", few),
    "unit: of all rows": ("stored_rows", "mask=live, other=0.0", "mask=row < n, other=0.0", unit),
    "unit: the norms scaled once": ("stored_rows", "square * (scale * scale)", "square * scale", unit),
    "unit: a hit beyond the last row": (
        "stored_rows",
        "correct + row, mask=row < n",
        "correct + row, mask=row <= n",
        unit,
    ),
    "mean: rows beyond the last": ("mean", "kept = rows < n", "kept = rows <= n", mean),
    "mean: broken rows kept": ("mean", "if MASKED:", "if False:", test_kernel_mean.test_broken_rows_count_as_zero),
    "mean: the bias's square forgotten": (
        "mean",
        "square += tl.sum(wide_sums",
        "square += 0.0 * tl.sum(wide_sums",
        mean,
    ),
    "mean: the bias's inner product forgotten": ("mean", "total += tl.sum(r.to", "total += 0.0 * tl.sum(r.to", mean),
    "mean: squares of the first tile alone": ("mean", "mask=tile < n_tiles", "mask=tile < 1", mean),
    "mean: an infinity is finite": (
        "gram",
        '(tl.abs(entry.to(tl.float32)) < float("inf")) == 0',
        "entry != entry",
        test_kernel_mean.test_broken_rows_count_as_zero,
    ),
    "gram: flags of the rows alone": (
        "gram",
        "kept[:, None] & ",
        "",
        test_kernel_mean.test_broken_rows_count_as_zero,
    ),
    "unscored: rows that are not finite count": (
        "minibatch",
        "valid = present & (tl.load",
        "valid = present | (tl.load",
        lambda: test_kernel_minibatch.test_unscored(7, False),
    ),
    "hits: the last of equal ones": (
        "minibatch",
        "(z == own) & ahead",
        "(z == own) & (columns[None, :] > at[:, None])",
        lambda: test_kernel_minibatch.test_hits(37, 10, torch.float32),
    ),
    "hits: NaN does not lead": (
        "minibatch",
        "better | ((z != z) & ((own == own) | ahead))",
        "better",
        lambda: test_kernel_minibatch.test_hits(37, 10, torch.float32),
    ),
    "weighted loss: slots without a weight": (
        "minibatch",
        "tl.where(w != 0.0, scaled * w, 0.0)",
        "(scaled * w)",
        lambda: test_kernel_minibatch.test_weighted_loss(33),
    ),
    "left out: the mean not added to the classes": (
        "skipped",
        "total += tl.load(left_out",
        "total += 0.0 * tl.load(left_out",
        left_out,
    ),
    "left out: the mean not added to the features": (
        "skipped",
        "mean @ _tile_sums",
        "0.0 * mean @ _tile_sums",
        left_out,
    ),
    "left out: the mean of a whole tile": ("skipped", "[:, None] / sizes", "[:, None] / TILE", left_out),
    "left out: what should be formed": ("skipped", "& ~out", "& out", left_out),
    "left out: by the next tile's list": ("skipped", "tile = part * COLUMNS // TILE", "tile = 0 * part", left_out),
    "left out: one row of the list too many": (
        "skipped",
        "inside = place < count",
        "inside = place <= count",
        left_out,
    ),
    "left out: the last row of a list": ("skipped", "place[:, -1].contiguous()", "place[:, -1] - 1", left_out),
    "left out: classes not weighted": ("skipped", "(scale * mass)", "scale", left_out),
    "shares of a slice not rescaled": (
        "statistics",
        "tile_sum * scale + total",
        "tile_sum + total",
        lambda: test_kernel_skipped.check_shares(test_kernel_skipped.TILES[2], 0.0),
    ),
    "shares of the last slice alone": (
        "statistics",
        "tile_sum * scale + total",
        "total",
        lambda: test_kernel_skipped.check_shares(test_kernel_skipped.TILES[2], 6.0),
    ),
    "32-bit offset": (
        "statistics",
        "rows.to(tl.int64)[:, None] * stride_z",
        "rows[:, None] * stride_z",
        check.test_offsets_beyond_32_bits,
    ),
}


@pytest.fixture
def plant(tmp_path, monkeypatch):
    """A function that makes the tests use a copy of the kernels with one text replaced."""

    def use(module, old, new):
        package = tmp_path / "mutated_kernels"
        shutil.copytree(FOLDER, package, ignore=shutil.ignore_patterns("__pycache__"))
        source = (package / f"{module}.py").read_text()
        assert old in source, f"the mutant no longer applies to {module}.py"
        (package / f"{module}.py").write_text(source.replace(old, new))
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.startswith("mutated_kernels")]:
            del sys.modules[name]
        for where, names in {
            cases: ("combine.finalize", "target_logit", "statistics"),
            test_kernel_residual: ("residual",),
            test_kernel_gram: ("gram",),
            test_kernel_sketch: ("sketch.projected_residuals",),
            test_kernel_stored_rows: ("stored_rows", "stored_rows.in_units"),
            test_kernel_skipped: ("statistics",),
            test_kernel_mean: ("gram", "mean.finite_rows", "mean.mean_gradient"),
        }.items():
            for name in names:
                name, _, function = name.partition(".")
                mutated = importlib.import_module(f"mutated_kernels.{name}")
                monkeypatch.setattr(where, function or name, getattr(mutated, function or name))
        stats = importlib.import_module("mutated_kernels.statistics")
        monkeypatch.setattr(cases, "logits_statistics", stats.logits_statistics)
        launch = importlib.import_module("mutated_kernels.launch")
        monkeypatch.setattr(_backends, "kernels", lambda *tensors: launch)

    return use


@pytest.mark.parametrize("name", MUTANTS)
def test_planted_bug_is_caught(name, plant):
    module, old, new, attempt = MUTANTS[name]
    plant(module, old, new)
    with pytest.raises(Exception) as caught:
        attempt()
    reason = repr(caught.value) + repr(caught.value.__cause__)
    expected = ("AssertionError", "OutOfBounds", "OverflowError", "int32")
    assert any(word in reason for word in expected), f"failed for another reason: {reason[:500]}"


def test_the_copy_without_a_bug_passes(plant):
    plant("online", "zero = tl.zeros", "zero = tl.zeros")
    linear()
    sliced()
    described()
    stored("everything")
    residual()
    projection()
    capped()
    left_out()
