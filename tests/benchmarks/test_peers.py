"""The peers do what they say, or say why they are not there; residual and bias are those of the definition."""

import importlib
import sys

import pytest
import torch

from benchmarks.harness import Unavailable
from benchmarks.peers import heads, selection

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench():
    """The suite, which asks each peer whether it is there, and so imports it."""
    return importlib.import_module("benchmarks.bench_selection")


def test_bias_and_residual_of_known_weights(bench):
    quality = bench.quality
    torch.manual_seed(0)
    gradients = torch.randn(8, 3, dtype=torch.float64) + 1.0
    gram, mean = gradients @ gradients.T, gradients.mean(0)
    one = torch.zeros(8, dtype=torch.float64).index_fill_(0, torch.tensor(2), 1.0)
    found = quality(lambda: one, [one, one], (0, 0, 0, gram))
    assert found["residual"] == pytest.approx(float((gradients[2] - mean).norm() / mean.norm()))
    assert found["bias"] == pytest.approx(found["residual"]) and found["bias_error"] < 1e-7

    def draw(scale=1.0):  # one row, uniformly: unbiased
        return torch.nn.functional.one_hot(torch.randint(8, ()), 8).double() * scale

    found = quality(draw, [], (0, 0, 0, gram))
    assert found["bias"] < 3 * found["bias_error"] < 0.3 < found["residual"]
    found = quality(lambda: draw(2.0), [], (0, 0, 0, gram))
    assert found["bias"] == pytest.approx(1.0, abs=4 * found["bias_error"])


@pytest.mark.parametrize("name", ["scikit_learn", "composer", "spams"])
def test_a_missing_peer_says_how_to_get_it(monkeypatch, name):
    for module in ("sklearn", "sklearn.linear_model", "spams"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    peer = getattr(selection, name)()
    assert isinstance(peer, Unavailable) and "pip install" in peer.reason


def test_peers_match_as_they_say(bench):
    """Orthogonal matching pursuit of scikit-learn and SPAMS, signed, on one minibatch: nearly the same residual."""
    case = next(case for case in bench.CASES if case.name.startswith("gradient matching n=128"))
    inputs = case.draw(CPU)
    found = {}
    for name, call in case.bind(inputs).items():
        if name.startswith("CORDS"):  # slow
            continue
        result = call()
        found[name] = bench.quality(call, [result, result], inputs)["residual"]
    assert 0.0 < found["ours"] < 0.5
    assert all(found["ours"] - 1e-3 <= value < 1.5 * found["ours"] for value in found.values()), found


def test_heads_give_the_gradients_of_eager_torch():
    torch.manual_seed(0)
    features, weight = torch.randn(300, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    target, upstream = torch.randint(11, (300,)), torch.randn(300)
    expected = heads._gradients(heads.eager, features, weight, target, upstream)
    for name, head in heads.others().items():
        if isinstance(head, Unavailable):
            assert "GPU" in head.reason, name
            continue
        torch.testing.assert_close(head(features, weight, target, upstream), expected)
