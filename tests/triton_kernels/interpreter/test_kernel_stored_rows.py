"""Statistics and residuals of stored logits in one launch, and a minibatch's unit, in the interpreter."""

import pytest
import torch
from support import kernel_cases as cases

from selbp import reference
from selbp.triton_kernels.stored_rows import in_units, stored_rows

SHAPES = [(5, 16, 1), (1, 8, 2), (9, 0, 10), (33, 24, 65), (3, 150, 1037)]  # n, d, C


def mass_of(case, n_classes):
    weight = case.options.get("class_weight")
    present = case.target != -100
    known = torch.ones(n_classes) if weight is None else weight.float()
    return torch.where(present, known[case.target.clamp(0, n_classes - 1)], 0.0)


def check(case, logits):
    bias, n_classes = case.bias is not None, logits.shape[1]

    def run(dtype):
        c = case.to(dtype)
        return reference.cross_entropy_statistics(logits.to(dtype), c.target, c.features, bias=bias, **c.options)

    spec, eager = run(torch.float64), run(torch.float32)
    found = stored_rows(logits, case.target, case.features, plus=float(bias), mass=True, factors=True, **case.options)
    cases.assert_statistics(found[:6], spec, eager)
    alone = stored_rows(logits, case.target, case.features, plus=float(bias), **case.options)
    assert len(alone) == 6
    assert all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(alone, found[:6], strict=True))
    assert torch.equal(found[6], mass_of(case, n_classes))
    assert torch.equal(found[8], torch.where(spec.valid[:, None], case.features.float(), 0.0))

    def residual(dtype, lse):
        c = case.to(dtype)
        whole = reference.residual(logits.to(dtype), c.target, lse, **c.options)
        return torch.where(spec.valid[:, None], whole, 0.0)

    smooth = "label_smoothing" in case.options
    exact, theirs = residual(torch.float64, spec.lse), residual(torch.float32, eager.lse)
    # An entry follows lse, whose rounding alone moves it by 2^-24 |lse|; the target's entry does not.
    cases.assert_close("residual", found[7], exact, theirs, smallest=1e-2 if smooth else 1e-6)
    rows = torch.arange(len(logits))[spec.valid]
    y = case.target[rows]
    if not smooth:
        cases.assert_close("target entry", found[7][rows, y], exact[rows, y], theirs[rows, y])
    return found


@pytest.mark.parametrize(("dtype", "option"), cases.every_option())
def test_every_option(dtype, option):
    case = cases.make(37, 24, 203, dtype, option, bias=True)
    check(case, case.logits)


@pytest.mark.parametrize("option", ["plain", "everything"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(shape, option):
    case = cases.make(*shape, torch.float32, option)
    check(case, case.logits)


@pytest.mark.slow
def test_the_most_classes():
    case = cases.make(3, 8, 4096, torch.bfloat16, "everything", bias=True)
    check(case, case.logits)


@pytest.mark.parametrize("option", cases.OPTIONS)
def test_rows_that_are_not_valid_spoil_no_other(option):
    case = cases.make(20, 8, 70, option=option, bias=True)
    logits = case.logits
    clean = check(case, logits)
    logits, case.features[6, 3] = logits.clone(), torch.nan
    case.target[:7] = torch.tensor([-100, 70, -1, 3, 3, 3, 5])
    logits[3, 3], logits[4, 9], logits[5, 9] = torch.inf, torch.nan, torch.inf
    found = check(case, logits)
    capped = "softcap" in case.options  # bends an infinity
    assert found[5][:7].tolist() == [False, False, False, capped, False, capped, False]
    assert (found[7][~found[5]] == 0).all()
    assert all(torch.equal(x[7:].nan_to_num(), y[7:].nan_to_num()) for x, y in zip(found, clean, strict=True))


@pytest.mark.parametrize("option", ["plain", "smoothing"])
def test_confident_rows_keep_their_accuracy(option):
    logits = torch.zeros(9, 50)
    logits[:, 7] = torch.tensor([50 * 10.0**e for e in range(1, 10)]).log()
    case = cases.make(9, 4, 50, option=option)
    case.target[:] = 7
    found = check(case, logits)
    if option == "plain":
        assert 0 < -float(found[7][:, 7].max()) < 1.1e-9
        assert (found[7].sum(1).abs() <= 1e-6 * found[7][:, 7].abs()).all()


def test_strided_rows_and_other_ignored_labels():
    wide, features = torch.randn(7, 80), torch.randn(7, 9)
    target = torch.tensor([0, 1, 2, 3, 4, 5, 6])
    found = stored_rows(wide[:, :33], target, features[:, :5], ignore_index=4, mass=True, factors=True)
    spec = reference.cross_entropy_statistics(
        wide[:, :33].double(), target, features[:, :5].double(), bias=False, ignore_index=4
    )
    assert torch.equal(found[5], spec.valid) and found[6].tolist() == [1, 1, 1, 1, 0, 1, 1]
    assert torch.allclose(found[0].double(), spec.loss, rtol=1e-6) and (found[7][4] == 0).all()


@pytest.mark.parametrize("n", [1, 7, 8, 1025])
def test_the_unit(n):
    generator = torch.Generator().manual_seed(n)
    mass, loss, squares = (torch.rand(n, generator=generator) for _ in range(3))
    valid, correct = torch.rand(n, generator=generator) < 0.7, torch.rand(n, generator=generator) < 0.3
    valid[0], correct = True, correct & valid
    mass[~valid], loss[~valid] = torch.nan, torch.inf
    residual = torch.randn(n, 5, generator=generator)
    given = residual.clone()
    scale, hits, scaled, scaled_sq = in_units(mass, valid, correct, loss, squares, residual)
    expected = (n / mass[valid].double().sum()).float()
    assert torch.allclose(scale, expected, rtol=2**-23)  # the order of a float64 sum may move a rounding
    assert hits.tolist() == [int(correct.sum()), int(valid.sum())]
    assert torch.equal(scaled, loss * scale) and torch.equal(scaled_sq, squares * scale.square())
    assert torch.equal(residual, given * scale)


def test_the_unit_of_no_valid_row():
    rows = torch.ones(3)
    none = torch.zeros(3, dtype=torch.bool)
    scale, hits, scaled, squares = in_units(rows, none, none, rows, rows, torch.empty(0, 0))
    assert scale == 0 and hits.tolist() == [0, 0] and (scaled == 0).all() and (squares == 0).all()


def test_no_rows():
    found = stored_rows(
        torch.empty(0, 5), torch.empty(0, dtype=torch.int64), torch.empty(0, 3), mass=True, factors=True
    )
    assert [tuple(x.shape) for x in found] == [(0,)] * 7 + [(0, 5), (0, 3)]
