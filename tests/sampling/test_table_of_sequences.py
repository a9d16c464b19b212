"""A table without classes: what is written of a sequence is the mean loss of the targets that count in it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.training_kit import TokenModel
from torch.nn import functional as F

import selbp
from selbp.sampling import ScoreTable

N, LENGTH, CLOSE = 6, 8, {"rtol": 1e-5, "atol": 1e-6}
WAYS: dict[str, dict[str, Any]] = {
    "all rows": {"selector": selbp.Full(), "keep": 1.0},
    "one forward of some": {"selector": selbp.Random(), "keep": 0.5},
    "rows": {"selector": selbp.TopLoss(), "keep": 0.5, "backward": "rows"},
    "recompute": {"selector": selbp.TopLoss(), "keep": 0.5, "backward": "recompute"},
    "micro-batches": {"selector": selbp.TopLoss(), "keep": 0.5, "micro_batch": 4},
    "one rank of all": {"selector": selbp.Full(), "keep": 1.0, "scope": "global"},
}


def ragged(padding: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and labels of which each sequence has another number; ``padding`` more tokens at the end."""
    tokens = torch.randint(0, 11, (N, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.roll(3, 1)
    for row in range(N):
        labels[row, LENGTH - row :] = -100
    return F.pad(tokens, (0, padding)), F.pad(labels, (0, padding), value=-100)


def written(loss: Any, x: torch.Tensor, y: torch.Tensor, way: str, **options: Any) -> tuple[ScoreTable, TokenModel]:
    torch.manual_seed(0)
    model, table = TokenModel(), ScoreTable(N)
    step = selbp.SelectiveBackprop(model, table=table, loss=loss, **WAYS[way], **options)
    step.backward(x, y, ids=torch.arange(N))
    return table, model


def entries(model: TokenModel, x: torch.Tensor, y: torch.Tensor, loss: str) -> torch.Tensor:
    """(N, T) each token's loss; 0 of one that does not count."""
    with torch.no_grad():
        logits = model(x)
    logits, y = (logits[:, :-1], y[:, 1:]) if "causal" in loss else (logits, y)
    return F.cross_entropy(logits.transpose(1, 2), y, reduction="none")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss", ["cross_entropy", "causal_lm", "linear_causal_lm"])
def test_it_is_the_mean_of_the_targets_that_count(loss, way):
    x, y = ragged()
    table, model = written(loss, x, y, way)
    found = entries(model, x, y, loss)
    counted = (y[:, 1:] if "causal" in loss else y).ne(-100).sum(1)
    seen = table.seen > 0
    assert int(seen.sum()) == (3 if way == "one forward of some" else N)
    torch.testing.assert_close(table.probability[seen], (-found.sum(1) / counted).exp()[seen], **CLOSE)


def test_it_does_not_depend_on_the_padding():
    short, _ = written("causal_lm", *ragged(), "all rows")
    long, _ = written("causal_lm", *ragged(padding=5), "all rows")
    torch.testing.assert_close(short.probability, long.probability, **CLOSE)


def test_class_weights_are_a_part_of_the_loss_and_do_not_count_targets():
    x, y = ragged()
    weight = torch.linspace(0.5, 2.0, 11)
    table, model = written("cross_entropy", x, y, "all rows", class_weight=weight)
    found = entries(model, x, y, "cross_entropy") * weight[y.clamp(min=0)]
    torch.testing.assert_close(table.probability, (-found.sum(1) / y.ne(-100).sum(1)).exp(), **CLOSE)


def test_class_probabilities_count_every_position():
    x, _ = ragged()
    soft = torch.softmax(torch.randn(N, LENGTH, 11, generator=torch.Generator().manual_seed(2)), 2)
    table, model = written("cross_entropy", x, soft, "all rows", class_dim=-1)
    with torch.no_grad():
        found = F.cross_entropy(model(x).transpose(1, 2), soft.transpose(1, 2), reduction="none")
    torch.testing.assert_close(table.probability, (-found.mean(1)).exp(), **CLOSE)


@pytest.mark.parametrize("way", ["all rows", "rows", "micro-batches"])
def test_a_loss_of_ones_own_is_taken_as_it_is(way):
    def mean(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output.transpose(1, 2), target, reduction="none").mean(1)

    x, y = ragged()
    table, model = written(mean, x, y, way)
    torch.testing.assert_close(table.probability, (-mean(model(x), y)).exp().detach(), **CLOSE)
