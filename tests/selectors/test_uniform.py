import pytest
import torch

from selbp.selectors import BatchStatistics, Full, GradientProxies, Random, Selector


def unscored(*flags):
    return BatchStatistics.unscored(torch.tensor(flags, dtype=torch.bool))


def test_full_keeps_every_row_in_place():
    indices, weights = Full().select(unscored(True, False, True, True), 2)
    assert indices.tolist() == [0, 1, 2, 3]
    assert weights.tolist() == [0.25, 0.0, 0.25, 0.25]


def test_random_draws_k_distinct_rows_with_the_generator():
    stats = unscored(*[True] * 50)
    one, two = (Random().select(stats, 10, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.indices.unique().numel() == 10
    assert torch.equal(one.indices, two.indices)
    torch.testing.assert_close(one.weights, torch.full((10,), 0.1))
    torch.manual_seed(1)
    first = Random().select(stats, 10).indices
    torch.manual_seed(1)
    assert torch.equal(first, Random().select(stats, 10).indices)
    assert not torch.equal(first, Random().select(stats, 10).indices)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_random_with_fewer_valid_rows_than_k(k):
    stats = unscored(False, True, False, True)
    indices, weights = Random().select(stats, k)
    assert set(indices.tolist()) <= {1, 3} and len(indices) == k
    assert weights.sum().item() == pytest.approx(0.5)
    assert (weights > 0).sum() == min(k, 2)
    assert indices[weights > 0].unique().numel() == min(k, 2)


def test_random_without_a_valid_row():
    indices, weights = Random().select(unscored(False, False), 2)
    assert indices.tolist() == [0, 0] and weights.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("selector", [Full(), Random()])
def test_bad_calls(selector):
    stats = unscored(True, True)
    assert isinstance(selector, Selector)
    for k in (0, 3, -1):
        with pytest.raises(ValueError, match="k must lie"):
            selector.select(stats, k)
    for k in (True, 1.0):
        with pytest.raises(TypeError, match="k must be an int"):
            selector.select(stats, k)
    selector.load_state_dict(selector.state_dict())
    with pytest.raises(ValueError, match="state of"):
        selector.load_state_dict({"history": 1})


def test_proxies_are_lazy_and_computed_once():
    calls = []

    def residual():
        calls.append("residual")
        return torch.randn(4, 3)

    def features():
        calls.append("features")
        return torch.randn(4, 5)

    proxies = GradientProxies(residual, features, bias=False)
    assert calls == []
    assert proxies.residual is proxies.residual and calls == ["residual"]
    assert proxies.gram() is proxies.gram()
    assert proxies.mean_gradient().head_bias is None
    assert calls == ["residual", "features"]
