"""A cut with backward="recompute": the gradients of the cut on rows, without a graph of n rows below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from selbp.cut import recompute as cut_recompute

N, K = 24, 6


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 5))
    return nn.Sequential(*layers).to(dtype)


def samples(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(N, 1, 6, 6, dtype=dtype), torch.randint(0, 5, (N,))


def gradients(model: nn.Module) -> list[Tensor]:
    """Every parameter's gradient, which is then cleared."""
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def step_of(model: nn.Module, backward: str = "recompute", **options: Any) -> selbp.SelectiveBackprop:
    options = {"selector": selbp.GradientMatching(), "cut": "3", "keep": K, **options}
    return selbp.SelectiveBackprop(model, backward=backward, **options)  # type: ignore[arg-type]


def train(model: nn.Module, backward: str, x: Tensor, y: Tensor, **options: Any) -> tuple[list[Tensor], Any]:
    step = step_of(model, backward, **options)
    step(x, y).backward()
    return gradients(model), step.report


@pytest.mark.parametrize("place", ["3", "2", "0"])
@pytest.mark.parametrize("selector", [selbp.GradientMatching(), selbp.TopGradNorm(), selbp.Random()], ids=repr)
def test_the_gradients_are_those_of_the_cut_on_rows(selector: selbp.Selector, place: str) -> None:
    model, (x, y) = network(), samples()
    got = []
    for backward in ("rows", "recompute"):
        generator = torch.Generator().manual_seed(7)
        got.append(train(model, backward, x, y, selector=selector, cut=place, generator=generator))
    (want, rows), (found, recomputed) = got
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(rows.cut.selection.indices, recomputed.cut.selection.indices)
    assert (rows.backward, recomputed.backward) == ("rows", "recompute")
    assert recomputed.gain == pytest.approx(rows.gain, nan_ok=True)
    assert recomputed.loss == pytest.approx(rows.loss)


def test_a_planted_bug_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows recomputed in another order than their gradients."""
    model, (x, y) = network(), samples()
    want, _ = train(model, "rows", x, y)
    take = cut_recompute.Batch.take
    monkeypatch.setattr(cut_recompute.Batch, "take", lambda self, indices: take(self, indices.flip(0)))
    found, _ = train(model, "recompute", x, y)
    assert not torch.allclose(found[0], want[0])
    torch.testing.assert_close(found[-1], want[-1])  # above the cut nothing is recomputed


def test_low_precision_is_for_the_first_forward_only() -> None:
    dtypes: list[tuple[torch.dtype, torch.dtype]] = []
    model, (x, y) = network(dtype=torch.float32), samples(torch.float32)
    model[3].register_forward_hook(lambda module, args, out: dtypes.append((out.dtype, torch.float32)))
    model[5].register_forward_hook(lambda module, args, out: dtypes.append((torch.float32, out.dtype)))
    step = step_of(model, scoring_precision="bfloat16")
    step(x, y)  # the first one looks for a way around the cut
    dtypes.clear()
    step(x, y).backward()
    lowered, full = torch.bfloat16, torch.float32
    assert dtypes == [(lowered, full), (full, full), (full, full)]  # below, above, below again
    assert not torch.is_autocast_enabled("cpu")
    found = gradients(model)
    indices, weights = step.report.cut.selection
    below, above = model[:4], model[4:]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = below(x).float().detach().requires_grad_()
    F.cross_entropy(above(hidden), y).backward()
    assert hidden.grad is not None
    below(x[indices]).backward(hidden.grad[indices] * (N * weights)[:, None])
    for a, b in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_nothing_below_the_cut_is_stored_for_all_rows() -> None:
    model, (x, y) = network(), samples()

    def stored(backward: str) -> int:
        sizes: list[int] = []

        def pack(saved: Tensor) -> Tensor:
            sizes.append(0 if isinstance(saved, nn.Parameter) else saved.numel())
            return saved

        step = step_of(model, backward)
        step(x, y)
        sizes.clear()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            step(x, y)
        return sum(sizes)

    assert stored("recompute") < N * 64 < stored("rows")


def test_running_statistics_follow_the_full_batch_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))
    x, y = torch.randn(N, 8), torch.randint(0, 5, (N,))
    step_of(model, cut="2")(x, y).backward()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None
    assert int(norm.num_batches_tracked) == 1  # type: ignore[arg-type]
    torch.testing.assert_close(norm.running_mean, 0.1 * model[0](x).mean(0).detach())


def test_an_overflow_reaches_every_layer() -> None:
    model, (x, y) = network(), samples()
    (step_of(model)(x, y) * float("inf")).backward()
    assert all(not torch.isfinite(gradient).all() for gradient in gradients(model))


def test_keep_all_no_grad_and_accumulation() -> None:
    model, (x, y) = network(), samples()
    F.cross_entropy(model(x), y).backward()
    want = gradients(model)
    found, _ = train(model, "recompute", x, y, keep=1.0)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        assert not step_of(model)(x, y).requires_grad
    once, _ = train(model, "recompute", x, y)
    step = step_of(model)
    (step(x, y) / 2).backward()
    (step(x, y) / 2).backward()
    for a, b in zip(gradients(model), once, strict=True):
        torch.testing.assert_close(a, b)


class Skip(nn.Module):
    """A path around ``cut``."""

    def __init__(self, through: bool) -> None:
        super().__init__()
        self.first, self.cut, self.head, self.through = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 5), through

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(self.cut(h) + (h if self.through else x))


def test_a_way_around_the_cut_is_refused() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(N, 8), torch.randint(0, 5, (N,))
    step_of(Skip(through=False), cut="cut")(x, y).backward()  # the input may pass: it has no gradient
    with pytest.raises(ValueError, match=r"first\.weight, first\.bias also reach the output .* around the cut"):
        step_of(Skip(through=True), cut="cut")(x, y)


def test_what_cannot_work_is_refused() -> None:
    model, (x, y) = network(), samples()
    with pytest.raises(RuntimeError, match="not have been used in the graph"):  # below the cut there is none
        torch.autograd.grad(step_of(model)(x, y), list(model.parameters()))
    linear = nn.Linear(8, 8)
    with pytest.raises(ValueError, match="more than once"):
        step_of(nn.Sequential(linear, linear, nn.Linear(8, 5)), cut="0")(torch.randn(N, 8), y)
    with pytest.raises(ValueError, match="scoring_precision='bfloat16' is for backward=\"recompute\""):
        step_of(model, "rows", scoring_precision="bfloat16")
    with pytest.raises(ValueError, match="scoring_precision must be 'same' or 'bfloat16' or 'float16'"):
        step_of(model, scoring_precision="half")


def test_scoring_precision_without_a_cut() -> None:
    """The losses that are scored are those of autocast; the chosen rows train in full precision."""
    model, (x, y) = network(dtype=torch.float32), samples(torch.float32)
    step = step_of(model, cut=None, selector=selbp.TopLoss(), scoring_precision="bfloat16", backward="auto")
    step(x, y).backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        low = F.cross_entropy(model(x), y, reduction="none")
    assert step.report.loss == pytest.approx(float(low.float().mean()), rel=1e-3)
    found, indices = gradients(model), step.report.selection.indices
    F.cross_entropy(model(x[indices]), y[indices]).backward()
    for a, b in zip(found, gradients(model), strict=True):
        torch.testing.assert_close(a, b)
