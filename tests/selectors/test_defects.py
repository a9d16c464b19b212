"""What selection rules elsewhere get wrong, as tests of every rule here."""

import dataclasses

import numpy as np
import pytest
import torch
from support.selection_cases import Batch

import selbp
from selbp.selectors import BatchStatistics, GradientProxies


def check(found, stats, k, rule):
    """Exactly k rows that exist; weight only on valid ones, finite, and none of them twice unless drawn so."""
    n = len(stats.valid)
    size = n if isinstance(rule, selbp.Full) else k
    assert found.indices.shape == found.weights.shape == (size,)
    assert found.indices.dtype == torch.int64 and found.weights.dtype == stats.loss.dtype
    assert ((found.indices >= 0) & (found.indices < n)).all()
    assert torch.isfinite(found.weights).all()
    carrying = found.indices[found.weights != 0]
    assert stats.valid[carrying].all()
    if not getattr(rule, "replacement", False):
        assert carrying.unique().numel() == carrying.numel()
    if getattr(rule, "nonnegative", True):
        assert (found.weights >= 0).all()
    if stats.valid.any() and not isinstance(rule, selbp.Full):
        assert stats.valid[found.indices].all()  # spare slots repeat a valid row


@pytest.mark.parametrize("k", [1, 5, 23, 24])
def test_any_k(rule, k):
    batch = Batch(n=24)
    found = batch.select(rule, k)
    check(found, batch.stats, k, rule)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_row(rule, dtype):
    batch = Batch(n=1, dtype=dtype)
    found = batch.select(rule, 1)
    check(found, batch.stats, 1, rule)
    assert found.weights.item() == pytest.approx(1.0, abs=2e-3)


def test_all_rows_are_the_whole_minibatch(rule):
    """keep = 1.0 is the ordinary step, for every rule whose weights are not fitted."""
    batch = Batch(n=24, valid=torch.arange(24) % 5 != 0)
    found = batch.select(rule, 24)
    check(found, batch.stats, 24, rule)
    if getattr(rule, "weights", "mean") != "refit" and not isinstance(rule, selbp.GradientMatching):
        if not getattr(rule, "replacement", False):
            torch.testing.assert_close(found.weights @ batch.gradients[found.indices], batch.mean)
            assert (found.weights != 0).sum() == batch.valid.sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_sample_is_never_chosen(rule, bad):
    """A NaN loss was picked in 69 % of draws elsewhere."""
    n = 24
    batch = Batch(n=n, dtype=torch.float32)
    batch.loss[3] = batch.irreducible[3] = bad
    batch.residual[3] = bad
    valid = torch.arange(n) != 3
    batch.valid = valid
    batch.refresh()
    for _ in range(8):
        found = batch.select(rule, 8)
        check(found, batch.stats, 8, rule)
        assert not ((found.indices == 3) & (found.weights != 0)).any()
        assert (found.weights != 0).any()


def test_a_bad_number_that_nobody_flagged(rule):
    """Statistics from a loss of the user's own: a row whose score is not finite is left out all the same."""
    batch = Batch(n=24, dtype=torch.float32)
    if rule.needs == "nothing" or rule.needs == "gradients":
        return  # these do not read the scores; the operators zero such rows
    stats = batch.stats._replace(
        loss=batch.stats.loss.clone().index_fill_(0, torch.tensor(3), torch.nan),
        residual_sq=batch.stats.residual_sq.clone().index_fill_(0, torch.tensor(3), torch.nan),
    )
    for _ in range(10):
        found = rule.select(stats, 8, extras=batch.extras)
        assert torch.isfinite(found.weights).all() and not (found.indices == 3).any()


@pytest.mark.parametrize("good", [0, 1, 3, 7])
def test_fewer_valid_rows_than_k(rule, good):
    batch = Batch(n=24, valid=(torch.arange(24) % 3 == 2) & (torch.arange(24) < 3 * good))
    assert batch.valid.sum() == good
    found = batch.select(rule, 8)
    check(found, batch.stats, 8, rule)
    assert (found.weights != 0).sum() <= (8 if getattr(rule, "replacement", False) else good)
    if not good:
        assert (found.weights == 0).all()
        if not isinstance(rule, selbp.Full):
            assert (found.indices == 0).all()


def test_duplicates(rule):
    batch = Batch(n=24, dtype=torch.float32)
    batch.residual[:] = batch.residual[:4].repeat(6, 1)
    batch.features[:] = batch.features[:4].repeat(6, 1)
    batch.loss[:] = batch.loss[:4].repeat(6)
    batch.refresh()
    for k in (3, 10, 24):
        check(batch.select(rule, k), batch.stats, k, rule)


def test_atoms_under_a_ridge_are_not_chosen_again():
    """Elsewhere 15 of 32 were distinct and the weights belonged to other rows: residual .636 where .029 is reached."""
    batch = Batch(n=128, classes=10, d=16)
    found = batch.select(selbp.GradientMatching(rule="raw", ridge=0.5), 32)
    assert found.indices.unique().numel() == 32
    g = batch.gradients[found.indices]
    lam = 0.5 * batch.gradients.square().sum(1).mean()
    torch.testing.assert_close(g @ g.T @ found.weights + lam * found.weights, g @ batch.mean)


def test_no_gradient_at_all(rule):
    batch = Batch(n=24, dtype=torch.float32)
    batch.residual[:] = 0.0
    batch.refresh()
    found = batch.select(rule, 8)
    check(found, batch.stats, 8, rule)


def test_equal_losses(rule):
    batch = Batch(n=24, dtype=torch.float32)
    batch.loss[:] = 0.0
    batch.irreducible[:] = 0.0
    for _ in range(3):
        check(batch.select(rule, 8), batch.stats, 8, rule)


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e6, 1e15])
def test_a_scaled_loss_chooses_the_same(rule, scale):
    """A common factor on every loss (ignored rows, a loss scaler) changes neither rows nor weights."""
    batch, scaled = Batch(n=24), Batch(n=24)
    for field in ("residual", "loss", "irreducible"):
        getattr(scaled, field).mul_(2.0 ** round(np.log2(scale)))
    scaled.refresh()
    torch.manual_seed(0)
    one = batch.select(rule, 8)
    torch.manual_seed(0)
    two = scaled.select(dataclasses.replace(rule), 8)
    assert torch.equal(one.indices, two.indices)
    torch.testing.assert_close(one.weights, two.weights, rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_upstream(rule, dtype):
    """Half-precision factors: statistics are float32, and so are weights."""
    full = Batch(n=24, dtype=torch.float32)
    proxies = GradientProxies(full.residual.to(dtype), full.features.to(dtype))
    found = rule.select(full.stats, 8, proxies=proxies, extras={"irreducible_loss": full.irreducible.to(dtype)})
    check(found, full.stats, 8, rule)
    assert (found.weights != 0).any()


def test_numpy_keeps_its_error_state_and_its_chance(rule):
    errors, state = np.geterr(), np.random.get_state()[1].copy()
    Batch(n=24, valid=torch.zeros(24, dtype=torch.bool)).select(rule, 8)
    Batch(n=24).select(rule, 8)
    assert np.geterr() == errors and (np.random.get_state()[1] == state).all()


def test_statistics_that_require_grad(rule):
    batch = Batch(n=24, dtype=torch.float32)
    for field in ("residual", "features", "loss"):
        getattr(batch, field).requires_grad_()
    batch.refresh()
    found = batch.select(rule, 8)
    assert not found.weights.requires_grad
    for value in rule.state_dict().values():
        assert not value.requires_grad


def test_inference_statistics(rule):
    """Scored under ``inference_mode``, remembered across steps."""
    with torch.inference_mode():
        batch = Batch(n=24, dtype=torch.float32)
        batch.select(rule, 8)
    assert isinstance(batch.stats, BatchStatistics)
    Batch(n=24, dtype=torch.float32, seed=1).select(rule, 8)
