"""A cut at a complex hidden state: the choice sees both parts, and the chosen rows go on exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from selbp.cut.proxies import proxies_at_cut, statistics_at_cut

N, K = 12, 5
F64, C128 = torch.float64, torch.complex128


@pytest.mark.parametrize("length", [None, 3], ids=["one position", "three positions"])
@pytest.mark.parametrize("real_features", [False, True], ids=["complex features", "real features"])
def test_the_proxies_are_the_gradients_of_a_complex_linear_layer(length: int | None, real_features: bool) -> None:
    torch.manual_seed(0)
    middle = () if length is None else (length,)
    delta = torch.randn(N, *middle, 4, dtype=C128)
    inputs = torch.randn(N, *middle, 5, dtype=F64 if real_features else C128)
    weight = torch.zeros(4, 5, dtype=C128, requires_grad=True)
    bias = torch.zeros(4, dtype=C128, requires_grad=True)

    def gradient(row: int) -> Tensor:
        out = inputs[row].to(C128) @ weight.T + bias
        parts = torch.autograd.grad(out, [weight, bias], delta[row])
        return torch.cat([torch.view_as_real(part).flatten() for part in parts])

    each = torch.stack([gradient(row) for row in range(N)])
    found = proxies_at_cut(delta, inputs, "positions", torch.ones(()))
    torch.testing.assert_close(found.gram(), each @ each.T)
    torch.testing.assert_close(found.mean_gradient().inner, each @ each.mean(0))
    stats = statistics_at_cut(found, None, False)
    torch.testing.assert_close(stats.residual_sq * stats.feature_sq, each.square().sum(1))


class Spectrum(nn.Module):
    """The cut lies between a Fourier transform and what makes its result real again."""

    def __init__(self, cut: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.below, self.cut, self.above = nn.Linear(6, 8, dtype=F64), cut, nn.Linear(8, 5, dtype=F64)

    def trunk(self, x: Tensor) -> Tensor:
        return torch.fft.fft(self.below(x))

    def head(self, z: Tensor) -> Tensor:
        out: Tensor = self.above(z.abs() + z.imag)
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cut(self.trunk(x)))


RULES = [selbp.GradientMatching(), selbp.TopGradNorm(), selbp.GradNormImportance(), selbp.DivBS(), selbp.Random()]


@pytest.mark.filterwarnings("error:.*discards the imaginary part")
@pytest.mark.parametrize("selector", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("proxy", ["pooled", "flat"])
def test_a_cut_at_a_complex_hidden_state(proxy: Any, selector: selbp.Selector) -> None:
    torch.manual_seed(1)
    x, y = torch.randn(N, 6, dtype=F64), torch.randint(0, 5, (N,))
    model = Spectrum(selbp.BackwardCut(K, selector, proxy=proxy))
    F.cross_entropy(model(x), y).backward()
    indices, weights = model.cut.report.selection
    hidden = model.trunk(x)
    leaf = hidden.detach().requires_grad_()
    F.cross_entropy(model.head(leaf), y).backward()
    assert leaf.grad is not None
    chosen = torch.zeros_like(hidden).index_add(0, indices, leaf.grad[indices] * (N * weights)[:, None])
    want = torch.autograd.grad(hidden, list(model.below.parameters()), chosen)
    for parameter, exact in zip(model.below.parameters(), want, strict=True):
        torch.testing.assert_close(parameter.grad, exact, rtol=1e-10, atol=1e-13)
    needs = selector.needs == "nothing"
    assert (model.cut.report.relative_residual is None) == needs and (model.cut.report.gain is None) == needs


def test_the_step_recomputes_below_it() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(N, 6, dtype=F64), torch.randint(0, 5, (N,))
    found = []
    for backward in ("rows", "recompute"):
        model = Spectrum(nn.Identity())
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=K, cut="cut", backward=backward)
        step(x, y).backward()
        found.append((step.report.cut.selection.indices, [p.grad for p in model.parameters()]))
    assert torch.equal(found[0][0], found[1][0])
    for a, b in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(a, b)
