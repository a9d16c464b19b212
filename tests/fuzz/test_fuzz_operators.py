"""Every operator on random shapes, strides, dtypes, values and options, against the reference in float64.

One case alone: ``SELBP_FUZZ_SEED=17 pytest tests/fuzz/test_fuzz_operators.py -k match``.
"""

import os

import pytest
from support.operator_cases import OPERATORS, Draw

FAST, SLOW = 120, 2000
KEPT = {  # seeds that once failed
    "linear_cross_entropy_statistics": (57, 816),  # features of width 0 counted as none
    "linear_cross_entropy": (57, 816),
    "mean_gradient": (22,),  # no classes, and an infinite feature
    "matching_residual": (31,),  # no rows
}


def run(operator, seeds):
    for seed in seeds:
        try:
            operator(Draw(seed))
        except Exception as error:
            again = f"SELBP_FUZZ_SEED={seed} pytest tests/fuzz/test_fuzz_operators.py -k {operator.__name__}"
            raise AssertionError(f"{operator.__name__}, seed {seed}: {error}\n{again}") from error


def chosen(seeds):
    asked = os.environ.get("SELBP_FUZZ_SEED")
    return [int(asked)] if asked else seeds


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_some(operator):
    run(operator, chosen([*KEPT.get(operator.__name__, ()), *range(FAST)]))


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS, ids=lambda operator: operator.__name__)
def test_many(operator):
    run(operator, chosen(range(FAST, FAST + SLOW)))
