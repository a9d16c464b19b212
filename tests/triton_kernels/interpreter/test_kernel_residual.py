"""The residual kernels against the specification, in the interpreter."""

import pytest
import torch
from support import kernel_cases as cases

from selbp import reference
from selbp.triton_kernels.configs import Tile
from selbp.triton_kernels.residual import residual

TILE = Tile(4, 64, 0)


def check(case, logits, splits=None, lse=None):
    cap = case.options.get("softcap", 0.0)
    given = torch.logsumexp(reference.soft_cap(logits.float(), cap), 1) if lse is None else lse
    spec = reference.residual(logits.double(), case.target, given.double(), **case.to(torch.float64).options)
    eager = reference.residual(logits.float(), case.target, given.float(), **case.to(torch.float32).options)
    got = residual(logits, case.target, given.float(), tile=TILE, splits=splits, **case.options)
    present = (case.target >= 0) & (case.target < logits.shape[1])
    rows = torch.arange(len(logits))[present]
    # With smoothing an entry is the difference of two shares of the target; without, nothing is subtracted.
    smooth = "label_smoothing" in case.options
    cases.assert_close("residual", got, spec, eager, smallest=1e-2 if smooth else 1e-6)
    y = case.target[present]
    if not smooth:
        cases.assert_close("target entry", got[rows, y], spec[rows, y], eager[rows, y])


@pytest.mark.parametrize(("dtype", "option"), cases.every_option())
def test_every_option(dtype, option):
    case = cases.make(19, 24, 203, dtype, option, bias=True)
    for splits in (1, 3):
        check(case, case.logits, splits)


@pytest.mark.parametrize("option", ["plain", "everything"])
@pytest.mark.parametrize("shape", [(5, 16, 1), (1, 8, 2), (3, 8, 64), (16, 8, 517)])
def test_odd_shapes(shape, option):
    case = cases.make(*shape, torch.float32, option)
    check(case, case.logits, 2)


@pytest.mark.parametrize("option", cases.OPTIONS)
def test_rows_that_are_not_valid_are_zero(option):
    case = cases.make(20, 8, 70, option=option, bias=True)
    logits = case.logits
    case.target[:6] = torch.tensor([-100, 70, -1, 3, 3, 3])
    logits[3, 3] = -torch.inf
    logits[4, 9] = torch.nan
    logits[5, 9] = -torch.inf
    lse = torch.logsumexp(reference.soft_cap(logits, case.options.get("softcap", 0.0)), 1)
    check(case, logits, 2, lse)
    got = residual(logits, case.target, lse, tile=TILE, splits=2, **case.options)
    assert (got[:3] == 0).all() and (got[4] == 0).all()


def test_confident_target_entry():
    logits = torch.zeros(9, 50)
    logits[:, 7] = torch.tensor([50 * 10.0**e for e in range(1, 10)]).log()
    target = torch.full((9,), 7)
    lse = torch.logsumexp(logits.double(), 1)
    spec = reference.residual(logits.double(), target, lse)
    got = residual(logits, target, lse.float(), tile=TILE)
    # lse is rounded to float32, which alone moves every probability by 2^-24 |lse|.
    assert cases.relative_error(got[:, 7], spec[:, 7], 0.0) < 1e-5
    assert 0 < -float(spec[:, 7].max()) < 1.1e-9


def test_other_output_type_and_strides():
    case = cases.make(7, 8, 33)
    wide = torch.randn(7, 80)
    logits = wide[:, :33]
    lse = torch.logsumexp(logits, 1)
    got = residual(logits, case.target, lse, tile=TILE, dtype=torch.bfloat16)
    exact = residual(logits, case.target, lse, tile=TILE)
    assert torch.equal(got, exact.bfloat16())


def test_empty_batch():
    assert residual(torch.empty(0, 5), torch.empty(0, dtype=torch.int64), torch.empty(0)).shape == (0, 5)
