"""Launches of a step on the CUDA code path, counted on tensors of the meta device: no rule takes more than it did."""

import importlib

import pytest
import torch

import selbp

pytest.importorskip("triton.tools.tensor_descriptor", reason="counts launches of kernels that need Triton 3.4 or newer")
launches_gpu = pytest.importorskip("benchmarks.launches_gpu")

# rule -> launches of scoring, of the choice, and up to the loss, at n = 128, k = 32, C = 10, of a two-layer network.
BUDGETS = {
    "Random": (2, 3, 12),
    "TopLoss": (5, 2, 10),
    "LossRank": (5, 3, 10),
    "LossPercentile": (7, 3, 10),
    "GradNormImportance": (6, 4, 10),
    "GradientMatching": (5, 5, 10),
    "DivBS": (5, 8, 10),
    "CubeSampling": (5, 6, 10),
}
CHOSEN_BY_THE_SOLVER = ("GradientMatching",)
# Of these the model and its loss launch: two forwards of three kernels, or one, and two for the loss.
OWN = {rule: 5 if rule == "Random" else 8 for rule in BUDGETS}
GOALS = {"GradientMatching": 20, "TopLoss": 10, "GradNormImportance": 12, "Random": 14}  # beyond the model's own


@pytest.mark.parametrize("rule", BUDGETS)
def test_a_rule_stays_within_its_launches(rule):
    laps = launches_gpu.step_launches(getattr(selbp, rule)())
    found = tuple(sum(lap.values()) for lap in laps.values())
    assert found == BUDGETS[rule], laps
    assert laps["select"]["cuda launch_choice"] == (rule not in CHOSEN_BY_THE_SOLVER)
    assert sum(found) - OWN[rule] <= GOALS.get(rule, 20)


def test_what_the_reference_would_launch_is_counted(monkeypatch):
    """The counter sees the operators of torch: without the kernels the same choice is dozens of them."""
    from selbp.ops import _choice_cuda

    monkeypatch.setattr(_choice_cuda, "MOST_ROWS", 0)
    laps = launches_gpu.step_launches(selbp.GradNormImportance())
    assert sum(laps["select"].values()) > 70


def test_more_classes_than_a_program_holds_are_scored_by_the_operators():
    laps = launches_gpu.step_launches(selbp.GradientMatching(), n_classes=5000)
    assert laps["score"]["triton logits_statistics_kernel"] == 1 and laps["select"]["triton gram_kernel"] == 1
    assert not laps["score"]["triton stored_rows_kernel"]


def head_launches(skip_mass, rows=None):
    """Launches of the forward and the backward of linear_cross_entropy, of 16-bit inputs and in one chunk."""
    operator = importlib.import_module("selbp.ops.linear_cross_entropy")
    h, w, y, rest = (
        torch.empty(*shape, device="meta", dtype=dtype)
        for shape, dtype in (
            ((64, 32), torch.bfloat16),
            ((1000, 32), torch.bfloat16),
            ((64,), torch.int64),
            ((64,), None),
        )
    )
    rows = None if rows is None else torch.empty(rows, device="meta", dtype=torch.int64)
    options, laps = (-100, 0.0, 0.0), []
    with launches_gpu.pretended_gpu(counting := launches_gpu.Counting()), counting:
        inputs = operator._pack(h, w, None, y, None, rows, *options, False, skip_mass)
        found, fake = operator._cuda.forward(*inputs), operator._fake(*inputs)
        assert [(x.shape, x.stride(), x.dtype) for x in found] == [(x.shape, x.stride(), x.dtype) for x in fake]
        laps.append(dict(counting.found))
        counting.found.clear()
        kept = found[1], found[6], found[5], found[7], found[8]
        operator._cuda.backward(
            *operator._torch.pack_backward(rest, h, w, None, y, *kept, None, rows, *options, True, True, False)
        )
        laps.append(dict(counting.found))
    return laps


@pytest.mark.parametrize("rows", [None, 16])
def test_skip_mass_reads_no_value_and_adds_launches_only_where_it_is_asked_for(rows):
    """A value that the host read would be an error: these tensors have none."""
    (forward, backward), (skipping_forward, skipping) = (head_launches(skip_mass, rows) for skip_mass in (0.0, 0.1))
    assert (sum(forward.values()), sum(backward.values())) == (3, 21 if rows is None else 35)
    assert backward["triton residual_chunk_kernel"] == 1 and "triton residual_chunk_kernel" not in skipping
    assert skipping["triton gathered_residual_kernel"] == skipping["triton gathered_weight_kernel"] == 1
    assert sum(skipping_forward.values()) - sum(forward.values()) <= 21
    assert sum(skipping.values()) - sum(backward.values()) <= 34
