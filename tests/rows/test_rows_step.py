"""``SelectiveBackprop(backward="rows")`` gives the gradients of ``backward="recompute"``, from one forward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import selbp
from selbp_study.row_models import SMALL

SELECTORS = [
    selbp.Random(),
    selbp.TopLoss(),
    selbp.TopGradNorm(weights="refit"),
    selbp.GradNormImportance(),
    selbp.GradientMatching(),
]


def gradients(
    name: str, selector: selbp.Selector, backward: str, **options: object
) -> tuple[list[Tensor], selbp.StepReport]:
    torch.manual_seed(0)
    task = SMALL[name]
    model = task.build().double().eval()  # without dropout: recompute would draw other masks
    x, y = task.batch(task.n)
    loss = "causal_lm" if name == "GPT" else "cross_entropy"
    generator = torch.Generator().manual_seed(3)
    step = selbp.SelectiveBackprop(
        model, selector=selector, keep=3, loss=loss, backward=backward, generator=generator, **options
    )
    step(x.double() if x.is_floating_point() else x, y).backward()
    return [p.grad for p in model.parameters()], step.report


@pytest.mark.parametrize("selector", SELECTORS, ids=repr)
@pytest.mark.parametrize("name", ["MLP", "CNN", "ViT", "GPT"])
def test_rows_agree_with_recompute(name: str, selector: selbp.Selector) -> None:
    (got, report), (want, _) = (gradients(name, selector, how) for how in ("rows", "recompute"))
    assert report.k == 3
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_rows_with_the_full_head_gradient() -> None:
    both = [gradients("ViT", selbp.GradientMatching(), how, head_gradient="full")[0] for how in ("rows", "recompute")]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_one_forward_only() -> None:
    calls = 0

    def count(module: nn.Module, args: object, output: object) -> None:
        nonlocal calls
        calls += 1

    torch.manual_seed(0)
    model = SMALL["MLP"].build()
    model.register_forward_hook(count)
    x, y = SMALL["MLP"].batch(8)
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25, backward="rows")
    step(x, y).backward()
    assert calls == 1
    assert step.report.backward == "rows"
