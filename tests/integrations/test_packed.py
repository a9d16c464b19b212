"""Packed rows: the step's loss and gradients are those of the model that keeps the packed sequences apart itself."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import selbp

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
from support.hf_kit import VOCABULARY, llama  # noqa: E402

LENGTHS = [7, 3, 9, 1, 5, 8]


def packed(bounds):
    """As DataCollatorWithFlattening makes them."""
    total = sum(LENGTHS)
    ids = torch.randint(1, VOCABULARY, (1, total), generator=torch.Generator().manual_seed(1))
    position = torch.cat([torch.arange(k) for k in LENGTHS])[None]
    batch = {"input_ids": ids, "labels": torch.where(position == 0, -100, ids), "position_ids": position}
    if bounds:
        ends = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        batch |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 9, "max_length_k": 9}
    return batch


def by_itself(batch, rows, weights, attention):
    """(gradients) of the chosen sequences' losses, in the model's own forward of the packed row."""
    model = llama(attn_implementation=attention).double()
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, :-1]
    labels = batch["labels"][0, 1:]
    tokens = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    starts = torch.tensor([0, *LENGTHS]).cumsum(0)
    losses = torch.stack([tokens[max(a - 1, 0) : b - 1].sum() for a, b in zip(starts[:-1], starts[1:], strict=True)])
    ((losses[rows] * weights).sum() * len(LENGTHS) / int((labels != -100).sum())).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("bounds", [True, False], ids=["cu_seq_lens", "position_ids"])
@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("loss", ["causal_lm", "linear_causal_lm"])
def test_gradients_are_those_of_the_packed_row(bounds, backward, loss):
    if not hasattr(getattr(transformers, "masking_utils", None), "find_packed_sequence_indices"):
        pytest.skip("this Transformers does not keep packed sequences apart")
    rules = (selbp.Full(), selbp.TopLoss(normalize="tokens"), selbp.GradientMatching())
    for rule, attention in zip(rules, ("sdpa", "eager", "sdpa"), strict=True):
        model = llama(attn_implementation=attention).double()
        keep = 6 if isinstance(rule, selbp.Full) else 2
        step = selbp.SelectiveBackprop(model, selector=rule, keep=keep, loss=loss, backward=backward)
        step(packed(bounds)).backward()
        assert step.report.n == len(LENGTHS)
        want = by_itself(packed(True), *step.report.selection, attention)
        for name, parameter in model.named_parameters():
            error = (parameter.grad - want[name]).norm()  # Llama's norms and rotations compute in float32
            assert error <= 16 * torch.finfo(torch.float32).eps * want[name].norm(), name
