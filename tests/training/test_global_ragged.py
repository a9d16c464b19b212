"""``scope="global"`` with sequences whose lengths differ between ranks, and with lists of samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.processes import in_processes
from support.training_kit import TokenModel, assert_same
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import selbp
from selbp.common.batch import Batch
from selbp.common.lengths import Lengths

EXACT = 1e-12
SIZES, LENGTHS, VOCABULARY = [8, 7, 9], [6, 9, 4], 11  # of the ranks


class Both(nn.Module):
    """Every token sees all that the mask has: logits (n, T, C), or (n, C) of the whole."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.whole, self.embed, self.kind = whole, nn.Embedding(VOCABULARY, 8), nn.Embedding(2, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any, position_ids: Any = None) -> Any:
        mask = attention_mask[..., None].to(self.head.weight.dtype)
        h = torch.tanh(self.embed(input_ids) + self.kind(token_type_ids)) * mask
        mean = h.sum(1) / mask.sum(1)
        return self.head(mean if self.whole else torch.tanh(h + mean[:, None]))


class Boxes(nn.Module):
    """A list of ragged tensors, a list of texts and an array beside a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x: Any, boxes: Any, texts: Any, weights: Any) -> Any:
        assert isinstance(boxes, list) and isinstance(texts, tuple) and isinstance(weights, np.ndarray)
        assert len(boxes) == len(texts) == len(weights) == len(x)
        sums = torch.stack([box["area"].sum() * len(text) for box, text in zip(boxes, texts, strict=True)])
        return self.head(torch.tanh(self.body(x)) * (sums * torch.as_tensor(weights))[:, None])


def masked(whole: bool) -> Any:
    def make(rank: int, turn: int) -> tuple[Any, Any]:
        n, length = SIZES[rank], LENGTHS[rank] + turn
        inside = torch.arange(length) < torch.randint(2, length + 1, (n, 1))
        ids = torch.randint(0, VOCABULARY, (n, length))
        inputs = {
            "input_ids": ids,
            "attention_mask": inside.long(),
            "token_type_ids": torch.randint(0, 2, (n, length)),
            "position_ids": torch.arange(length).expand(n, length),
        }
        labels = torch.where(inside & (torch.rand(n, length) < 0.8), ids, -100)
        return inputs, torch.randint(0, VOCABULARY, (n,)) if whole else labels

    return make


def causal(named: bool) -> Any:
    def make(rank: int, turn: int) -> tuple[Any, Any]:
        n, length = SIZES[rank], LENGTHS[rank] + turn
        ids = torch.randint(0, VOCABULARY, (n, length))
        labels = torch.where(torch.arange(length) < torch.randint(2, length + 1, (n, 1)), ids, -100)
        return {"input_ids": ids} if named else ids, labels

    return make


def listed(rank: int, turn: int) -> tuple[Any, Any]:
    n = SIZES[rank]
    boxes = [{"area": torch.rand(1 + (i + rank) % 3).double()} for i in range(n)]
    texts = tuple("ab"[: 1 + i % 2] * (1 + rank) for i in range(n))
    return (torch.randn(n, 4).double(), boxes, texts, np.linspace(1, 2, n)), torch.randint(0, 5, (n,))


CASES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "tokens, matching": (lambda: Both(False), masked(False), {"selector": selbp.GradientMatching()}),
    "tokens, largest norms": (lambda: Both(False), masked(False), {"selector": selbp.TopGradNorm()}),
    "sequences": (lambda: Both(True), masked(True), {"selector": selbp.TopLoss()}),
    "next tokens": (TokenModel, causal(True), {"selector": selbp.GradientMatching(), "loss": "causal_lm"}),
    "without a dict": (TokenModel, causal(False), {"selector": selbp.TopLoss(), "loss": "causal_lm"}),
    "without logits": (TokenModel, causal(True), {"selector": selbp.TopLoss(), "loss": "linear_causal_lm"}),
    "micro-batches": (TokenModel, causal(True), {"selector": selbp.TopLoss(), "loss": "causal_lm", "micro_batch": 3}),
    "nothing scored": (TokenModel, causal(True), {"selector": selbp.Random(), "loss": "causal_lm"}),
    "lists": (Boxes, listed, {"selector": selbp.GradientMatching()}),
}


def joined(parts: Any, fill: int = 0) -> Any:
    """The ranks' parts as one, sequences filled up to the longest."""
    first = parts[0]
    if isinstance(first, dict):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, torch.Tensor):
        longest = max(x.shape[-1] for x in parts)
        return torch.cat([F.pad(x, (0, longest - x.shape[1]), value=fill) if x.dim() == 2 else x for x in parts])
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    if isinstance(first, list) or isinstance(first[0], str):
        return sum(parts, type(first)())
    return tuple(joined(column) for column in zip(*parts, strict=True))


def whole(made: list[tuple[Any, Any]]) -> tuple[Any, Any]:
    inputs, targets = zip(*made, strict=True)
    return joined(inputs), joined(targets, -100)


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def check(rank: int, size: int) -> None:
    for name, (build, make, options) in CASES.items():
        torch.manual_seed(1)
        one = build().double()
        ours = DistributedDataParallel(build().double())
        ours.module.load_state_dict(one.state_dict())
        seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
        alone = {key: value for key, value in options.items() if key != "micro_batch"}
        want = selbp.SelectiveBackprop(one, keep=0.25, backward="recompute", generator=seeds[0], **alone)
        got = selbp.SelectiveBackprop(ours, keep=0.25, scope="global", generator=seeds[1], **options)
        for turn in range(2):
            torch.manual_seed(turn)
            made = [make(who, turn if who == 0 else 0) for who in range(size)]
            want(*whole(made)).backward()
            got.backward(*made[rank])
            assert torch.equal(got.report.selection.indices, want.report.selection.indices), name
            try:
                assert_same(gradients(ours), gradients(one), rtol=EXACT)
            except AssertionError as error:
                raise AssertionError(f"{name}, step {turn}, rank {rank}: {error}") from error
            assert got.report.loss == pytest.approx(want.report.loss, rel=1e-12), name
            assert got.report.accuracy == want.report.accuracy, name


def check_refusals(rank: int, size: int) -> None:
    """What does not say how it is padded is refused, on every rank, and the step goes on."""
    length = 5 + rank
    ids = torch.randint(0, VOCABULARY, (8, length))
    ones = torch.ones_like(ids)
    dense = {"input_ids": ids, "attention_mask": torch.ones(8, length, length), "token_type_ids": ones}
    batches = {
        "no mask": ({"input_ids": ids, "token_type_ids": ones}, ids),
        "a mask of pairs": (dense, ids),
        "another tensor of that length": (
            {"input_ids": ids, "attention_mask": ones, "token_type_ids": ones, "bias": torch.rand(8, length)},
            ids,
        ),
        "floats as labels": ({"input_ids": ids, "attention_mask": ones, "token_type_ids": ones}, ids.double()),
    }
    step = selbp.SelectiveBackprop(Both(False), selector=selbp.TopLoss(), keep=0.25, scope="global")
    for name, batch in batches.items():
        with pytest.raises(ValueError, match="sequences with an attention mask"):
            step(*batch)
        assert name
    kept = {"input_ids": ids, "logits_to_keep": length}
    last = selbp.SelectiveBackprop(
        TokenModel(), selector=selbp.TopLoss(), keep=0.25, scope="global", loss="causal_lm", shared=["logits_to_keep"]
    )
    with pytest.raises(ValueError, match="sequences with an attention mask"):
        last(kept, ids)
    step({"input_ids": ids, "attention_mask": ones, "token_type_ids": ones}, ids).backward()


def check_two(rank: int) -> None:
    check(rank, 2)
    check_refusals(rank, 2)


def check_three(rank: int) -> None:
    check(rank, 3)


def test_two_processes() -> None:
    in_processes(2, check_two)


@pytest.mark.slow
def test_three_processes() -> None:
    in_processes(3, check_three)


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_samples_stays_one_when_some_are_taken(kind: Any) -> None:
    """Two samples of two rows each could be two tensors with the samples in dim 0."""
    boxes = kind(torch.full((rows, 3), float(i)) for i, rows in enumerate([2, 4, 2, 1]))
    batch = Batch.of((torch.arange(4.0), boxes), torch.arange(4), {})
    some = batch.take(torch.tensor([2, 0]))
    assert isinstance(some.inputs[1], kind) and some.finite().tolist() == [True, True]
    found = some.rows(torch.tensor([1]), torch.tensor([True])).inputs[1]
    assert type(found) is kind and torch.equal(found[0], boxes[0])


def test_what_is_put_where() -> None:
    ids = torch.tensor([[4, 5], [6, 7]])
    inputs = {"input_ids": ids, "attention_mask": ids > 4, "position_ids": torch.tensor([[0, 1], [3, 4]])}
    longer = Lengths(-7).padded(Batch.of(inputs, ids, {}), 4)
    assert longer.inputs["input_ids"].tolist() == [[4, 5, 0, 0], [6, 7, 0, 0]]
    assert longer.inputs["attention_mask"].tolist() == [[False, True, False, False], [True, True, False, False]]
    assert longer.inputs["position_ids"].tolist() == [[0, 1, 1, 1], [3, 4, 4, 4]]
    assert longer.target.tolist() == [[4, 5, -7, -7], [6, 7, -7, -7]]
    embedded = {"inputs_embeds": torch.ones(2, 2, 3)}
    assert Lengths(-100, causal=True).padded(Batch.of(embedded, ids, {}), 3).inputs["inputs_embeds"].sum() == 12
