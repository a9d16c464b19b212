"""What diagnose says of the models is what happens in them, and it leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import selbp
from selbp.common.batch import Batch
from selbp.rows.observe import current_observers
from selbp.training.cost_model import Rates, Work, modelled
from selbp_study.row_models import SMALL, TIMED


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


def test_no_time_is_modelled_where_no_rate_was_measured() -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 3)).to("meta")  # stands for any other device
    batch = torch.randn(16, 8, device="meta"), torch.zeros(16, dtype=torch.int64, device="meta")
    found = selbp.diagnose(model, batch)
    assert found.seconds == {} and found.recommendation == "recompute" and found.dense == {}
    assert found.summary.startswith('a rule that reads losses, on 4 of 16 rows with backward="recompute": 0.69 of a')
    assert " ms" not in str(found) and "MiB" in str(found)


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


class Checkpointed(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.last = nn.Linear(12, 16), nn.Linear(16, 3)
        self.block = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.how == "selbp":
            x = selbp.checkpoint(self.block, x)
        elif self.how == "none":
            x = self.block(x)
        else:
            x = checkpoint(self.block, x, use_reentrant=self.how == "reentrant")
        out: torch.Tensor = self.last(x)
        return out


def test_a_checkpoint_is_counted_as_what_it_recomputes() -> None:
    x, y = torch.randn(32, 12), torch.randint(3, (32,))
    plain, found = (selbp.diagnose(Checkpointed(how), (x, y), 8) for how in ("none", "selbp"))
    assert not found.dense and found.dense_flops == plain.dense_flops == 0
    assert found.forward_flops == plain.forward_flops
    block = 2 * 32 * 2 * (16 * 32)  # its forward, which runs again on the chosen rows
    assert found.row_flops == plain.row_flops + block
    assert found.cost["rows"] == found.cost["bound"] < plain.cost["rows"]


class Eight(nn.Linear):
    """Refuses a batch of 8; its running statistics come before that."""

    error: BaseException = RuntimeError("8 is not my size")

    def __init__(self) -> None:
        super().__init__(12, 3)
        self.norm = nn.BatchNorm1d(12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.norm(x), 0.1)
        if len(x) == 8 and torch.is_grad_enabled():
            raise self.error
        return super().forward(x)


REFUSALS = {
    "reentrant checkpointing": (lambda: Checkpointed("reentrant"), "use_reentrant=True"),
    "a batch of 8": (Eight, "RuntimeError: 8 is not my size"),
    "out of memory": (lambda: failing(torch.OutOfMemoryError("no more")), "OutOfMemoryError: no more"),
    "an assertion": (lambda: failing(AssertionError("shapes")), "AssertionError: shapes"),
    "an index": (lambda: failing(IndexError("positions")), "IndexError: positions"),
    "a value": (lambda: failing(ValueError("size 8")), "ValueError: size 8"),
}


def failing(error: BaseException) -> nn.Module:
    model = Eight()
    model.error = error
    return model


@pytest.mark.parametrize("name", REFUSALS)
def test_auto_recomputes_where_it_cannot_look_ahead(name: str) -> None:
    build, why = REFUSALS[name]
    torch.manual_seed(0)
    model = build()
    x, y = torch.randn(40, 12), torch.randint(3, (40,))
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25)
    state, buffers = torch.get_rng_state(), [buffer.clone() for buffer in model.buffers()]
    step._strategy.decide(model, Batch.of(x, y, {}), 10, step._criterion, "train")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))
    assert all(p.grad is None for p in model.parameters()) and not current_observers()
    step(x, y).backward()
    assert step.report.backward == "recompute" and why in step.report.backward_reason
    assert all(p.grad is not None for p in model.parameters())


def test_auto_does_not_hide_an_interrupt() -> None:
    step = selbp.SelectiveBackprop(failing(KeyboardInterrupt()), selector=selbp.TopLoss(), keep=0.25)
    with pytest.raises(KeyboardInterrupt):
        step(torch.randn(40, 12), torch.randint(3, (40,)))


@pytest.mark.parametrize("fault", ["model", "loss"])
def test_a_fault_of_the_model_shows_the_shapes_of_the_whole_batch(fault: str) -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output.view(40, 3) @ torch.ones(7, 1)).squeeze(1)

    x, y = torch.randn(40, 5 if fault == "model" else 12), torch.randint(3, (40,))
    kind = "cross_entropy" if fault == "model" else loss
    step = selbp.SelectiveBackprop(nn.Linear(12, 3), loss=kind, selector=selbp.TopLoss(), keep=0.25)
    with pytest.raises(RuntimeError, match="40x5" if fault == "model" else "40x3"):
        step(x, y)


def test_what_diagnose_cannot_look_at_it_says() -> None:
    x, y = torch.randn(40, 12), torch.randint(3, (40,))
    with pytest.raises(RuntimeError, match="first 8 of the batch's 40 samples, .* RuntimeError: 8 is not my size"):
        selbp.diagnose(Eight(), (x, y))
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        selbp.diagnose(Checkpointed("reentrant"), (x, y))


def test_a_cut_in_the_model_is_looked_at_too() -> None:
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), selbp.BackwardCut(2, selbp.Random()), nn.Linear(16, 3))
    found = selbp.diagnose(model, (torch.randn(32, 12), torch.randint(3, (32,))), 16)
    runs = {operator.name: operator.runs for operator in found.operators}
    assert runs["aten.mm.default"] == runs["aten.tanh_backward.default"] == "rows" and found.dense_flops == 0
