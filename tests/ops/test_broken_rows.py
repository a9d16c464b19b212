"""Rows that are not finite reach no other: every operator of a step gives them what it gives ignored rows of zeros."""

import pytest
import torch

from selbp import ops
from selbp.ops import _logit_pass

N, D, CLASSES, KEEP = 24, 20, 70, 6


def everything(features, weight, bias, target):
    """What each operator returns: per-row results by name, then results of the whole batch."""
    logits = torch.nn.functional.linear(features, weight, bias)
    stored = ops.cross_entropy_statistics(logits, target, features)
    residual = ops.residual(logits, target, stored.lse)
    gram, mean = ops.gradient_gram(residual, features), ops.mean_gradient(residual, features)
    found = ops.match(gram, mean.inner, mean.target_sq, KEEP, valid=stored.valid)
    chosen = ops.Selection(found.indices, found.weights)
    inputs = [x.clone().requires_grad_() for x in (features, weight, bias)]
    loss = ops.linear_cross_entropy(*inputs, target)
    d_features, *d_head = torch.autograd.grad(loss, inputs, torch.linspace(0.5, 1.0, len(features)))
    projections = ops.sketch_projections(CLASSES, D + 1, (8, 8))
    tokens = ops.sketch(features[:, None], weight, bias, target[:, None], projections)
    sequence = ops.sketch(features[None], weight, bias, target[None], projections)
    head = ops.linear_cross_entropy_statistics(features, weight, bias, target)
    rows = {
        **{f"statistics {name}": field for name, field in stored._asdict().items()},
        **{f"head {name}": field for name, field in head._asdict().items()},
        "residual": residual,
        "gram": gram,
        "inner": mean.inner,
        "loss": loss.detach(),
        "features": d_features,
        "sketch": tokens,
    }
    whole = [*mean[1:], *found, ops.matching_residual(residual, features, chosen), *d_head, sequence]
    return rows, whole


@pytest.fixture(params=["one tile", "tiles", "small head"])
def batch(request, monkeypatch):
    if request.param != "small head":
        monkeypatch.setattr(_logit_pass, "_SMALL_HEAD", 0)
    if request.param == "tiles":
        monkeypatch.setattr(_logit_pass, "_TILE_ROWS", 16)
        monkeypatch.setattr(_logit_pass, "_TILE_BYTES", 16 * 64 * 4)
    bias, target = torch.randn(CLASSES), torch.arange(N)
    return torch.randn(N, D), torch.randn(CLASSES, D) / 4, bias, target


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("broken", [[5], [0, 1, 2, 17, 23]], ids=["one", "five"])
def test_the_other_rows_are_as_if_it_were_ignored(batch, broken, value):
    features, weight, bias, target = batch
    ignored, clean = target.clone(), features.clone()
    ignored[broken], clean[broken] = -100, 0.0
    expected, expected_whole = everything(clean, weight, bias, ignored)
    features[broken, 3] = value
    got, whole = everything(features, weight, bias, target)
    others = torch.ones(N, dtype=torch.bool).index_fill(0, torch.tensor(broken), False)
    for name, ours in got.items():
        if name != "inner":
            assert torch.equal(ours[others], expected[name][others]), name
    # Sums over the rows: those that count are packed, and so are added in another order than with rows of zeros.
    for ours, wanted in zip([got["inner"], *whole], [expected["inner"], *expected_whole], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
    for name in ("residual", "gram", "inner", "features", "sketch"):
        assert (got[name][broken] == 0).all(), name
    assert not got["statistics valid"][broken].any() and not got["head valid"][broken].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_batch_without_a_finite_row_has_no_gradient(batch, value):
    features, weight, bias, target = batch
    features[:] = value
    rows, whole = everything(features, weight, bias, target)
    assert not rows["statistics valid"].any() and not rows["head valid"].any()
    for name in ("residual", "gram", "inner", "features", "sketch"):
        assert (rows[name] == 0).all(), name
    target_sq, head_weight, head_bias, indices, weights, count, *_ = whole
    assert target_sq == 0 and not head_weight.any() and not head_bias.any()
    assert count == 0 and (indices == -1).all() and (weights == 0).all()
    *_, d_weight, d_bias, sequence = whole
    assert not d_weight.any() and not d_bias.any() and not sequence.any()
