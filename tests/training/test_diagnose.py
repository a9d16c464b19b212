"""What diagnose says of the models is what happens in them, and it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

import selbp
from benchmarks.row_models import SMALL, TIMED
from selbp.training.cost import Rates, Work, modelled


def diagnosis(name: str, keep: float = 0.25, **options: str) -> tuple[nn.Module, selbp.Diagnosis]:
    torch.manual_seed(0)
    task = SMALL[name]
    model = task.build()
    x, y = task.batch(16)
    return model, selbp.diagnose(model, (x, y), keep, loss="causal_lm" if name == "GPT" else "cross_entropy", **options)


@pytest.mark.parametrize("name", ["MLP", "CNN", "ResNet-GN", "ViT", "GPT", "LSTM"])
def test_a_sparse_model_meets_its_bound(name: str) -> None:
    _, found = diagnosis(name)
    assert (found.n, found.k) == (16, 4)
    assert not found.dense
    assert found.cost["rows"] == pytest.approx(found.cost["bound"], rel=0.02)
    assert 0.45 < found.flop_ratio < 0.65  # (1 + 2 f) / 3 is a half, a little more without the input's gradient
    assert found.cost["rows"] < found.cost["recompute"] < 1


def test_batchnorm_densifies_and_is_recomputed() -> None:
    _, found = diagnosis("ResNet-BN")
    assert set(found.dense) == {"aten.native_batch_norm_backward.default"}
    assert found.recommendation == "recompute"
    assert found.cost["rows"] > 0.9
    text = str(found)
    assert "batch statistics couple the samples" in text and 'backward="recompute"' in text
    _, subset = diagnosis("ResNet-BN", batchnorm="subset")
    assert not subset.dense and subset.cost["rows"] == pytest.approx(subset.cost["bound"], rel=0.02)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As measured: more threads shorten the operators, and not the Python between them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", TIMED)
@pytest.mark.parametrize("keep", [0.25, 0.5])
def test_rows_are_recommended_where_they_are_measured_ahead(name: str, keep: float, one_thread: None) -> None:
    task = TIMED[name]
    found = selbp.diagnose(task.build(), task.batch(task.n), keep, loss=task.losses)
    assert found.recommendation == "rows"
    assert found.seconds["rows"] < found.seconds["recompute"] < found.seconds["full"]


def test_python_outweighs_the_flops_of_a_tiny_network() -> None:
    _, found = diagnosis("MLP")
    assert found.cost["rows"] < found.cost["recompute"]
    assert found.recommendation == "recompute" and "ms" in str(found)


def test_time_is_modelled_per_thread_and_with_the_allocators_faults() -> None:
    forward, rows, dense = Work(3.0, 10), Work(6.0, 20), Work()
    few = modelled(forward, rows, dense, 10**9, 0.25, Rates(threads=1, kept=False))
    kept = modelled(forward, rows, dense, 10**9, 0.25, Rates(threads=1, kept=True))
    assert kept["rows"] < few["rows"] and kept["recompute"] == few["recompute"]
    assert kept["full"] == pytest.approx(9.0, rel=1e-3) and kept["recompute"] == pytest.approx(5.25, rel=1e-3)
    one, two = Work(), Work()
    assert one.add(1e9, 0.0, False, 1) == 2 * two.add(1e9, 0.0, False, 2)


def test_memory_is_that_of_the_activations() -> None:
    _, few = diagnosis("ViT", 0.25)
    assert few.memory["rows"] == few.memory["full"] == 4 * few.memory["recompute"] > 0


def test_flops_are_those_of_the_whole_batch() -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    found = selbp.diagnose(model, (torch.randn(32, 10), torch.randint(5, (32,))), 8)
    assert found.forward_flops == 2 * 32 * (10 * 20 + 20 * 5)
    assert found.row_flops == 2 * 32 * (10 * 20 + 2 * 20 * 5)  # no gradient of the input


def test_no_trace_is_left() -> None:
    torch.manual_seed(0)
    model = SMALL["ResNet-BN"].build()
    x, y = SMALL["ResNet-BN"].batch(8)
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    selbp.diagnose(nn.Sequential(model, nn.Dropout(0.5)), (x, y), 0.5)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


def test_arguments() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="target"):
        selbp.diagnose(model, torch.randn(4, 3))
    with pytest.raises(TypeError, match="keep"):
        selbp.diagnose(model, (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)), True)


def test_auto_decides_once_there_is_something_to_differentiate():
    x, y = torch.randn(8, 3), torch.randint(0, 2, (8,))
    model = torch.nn.Linear(3, 2)
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5)
    with torch.no_grad():
        assert not step(x, y).requires_grad
    model.requires_grad_(False)
    assert not step(x, y).requires_grad and step.report.backward == "recompute"
    model.requires_grad_(True)
    assert step(x, y).requires_grad and "modelled time" in step.report.backward_reason
