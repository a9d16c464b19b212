"""Launches of a step on the CUDA code path, counted on tensors of the meta device: no rule takes more than it did."""

import pytest

import selbp

pytest.importorskip("triton", reason="counts launches of Triton's kernels")
launches_gpu = pytest.importorskip("benchmarks.launches_gpu")

# rule -> most launches of scoring and of the choice, at n = 128, k = 32, C = 10, of a two-layer network.
BUDGETS = {
    "Random": (21, 4),
    "TopLoss": (23, 3),
    "LossRank": (23, 4),
    "GradNormImportance": (24, 4),
    "GradientMatching": (23, 46),
    "DivBS": (23, 42),
    "CubeSampling": (23, 15),
}
CHOICE = {"Random": 1, "TopLoss": 1, "LossRank": 1, "GradNormImportance": 1, "DivBS": 1, "CubeSampling": 1}


@pytest.mark.parametrize("rule", BUDGETS)
def test_a_rule_stays_within_its_launches(rule):
    laps = launches_gpu.step_launches(getattr(selbp, rule)())
    found = sum(laps["score"].values()), sum(laps["select"].values())
    assert all(ours <= most for ours, most in zip(found, BUDGETS[rule], strict=True)), laps
    assert laps["select"]["cuda launch_choice"] == CHOICE.get(rule, 0)


def test_what_the_reference_would_launch_is_counted(monkeypatch):
    """The counter sees the operators of torch: without the kernels the same choice is dozens of them."""
    from selbp.ops import _choice_cuda

    monkeypatch.setattr(_choice_cuda, "MOST_ROWS", 0)
    laps = launches_gpu.step_launches(selbp.GradNormImportance())
    assert sum(laps["select"].values()) > 70
