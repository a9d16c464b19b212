"""The cut: exact above, the weighted subset below, the identity wherever it should be."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from selbp_study.row_models import SMALL

F64 = torch.float64
N = 8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trunk_and_head(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    """Vectors, images or tokens at the cut."""
    torch.manual_seed(0)
    if kind == "vector":
        trunk: nn.Module = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12))
        head: nn.Module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 5))  # in place on the cut's output
        x = torch.randn(N, 6)
    elif kind == "image":
        trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2), nn.GroupNorm(2, 6))
        head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 5))
        x = torch.randn(N, 3, 10, 10)
    else:
        trunk = nn.Sequential(nn.Linear(6, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))
        head = nn.Sequential(nn.GELU(), nn.Flatten(), nn.Linear(40, 5))
        x = torch.randn(N, 5, 6)
    return trunk.to(F64), head.to(F64), x.to(F64)


KINDS = ["vector", "image", "tokens"]
RULES = [
    selbp.Random(),
    selbp.TopGradNorm(),
    selbp.TopGradNorm(weights="refit"),
    selbp.GradNormImportance(),
    selbp.GradientMatching(),
    selbp.DivBS(),
]


def flat_gradients(loss: Tensor, module: nn.Module) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()), retain_graph=True)])


def loss_of(output: Tensor) -> Tensor:
    """A scalar that no per-sample loss can be taken from any more."""
    return F.cross_entropy(output, torch.arange(N) % 5) + 0.1 * output.square().mean()


@pytest.mark.parametrize("proxy", ["pooled", "flat", "positions"])
@pytest.mark.parametrize("selector", RULES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
def test_exact_above_and_the_weighted_subset_below(kind: str, selector: selbp.Selector, proxy: str) -> None:
    trunk, head, x = trunk_and_head(kind)
    cut = selbp.BackwardCut(3, selector, proxy=proxy)
    loss = loss_of(head(cut(trunk(x))))
    parameters = [*trunk.parameters(), *head.parameters()]
    got = torch.autograd.grad(loss, parameters)
    hidden = trunk(x)
    full = torch.autograd.grad(loss_of(head(hidden.clone())), [hidden, *head.parameters()], retain_graph=True)
    indices, weights = cut.report.selection
    assert (cut.report.n, cut.report.k, len(indices)) == (N, 3, 3)
    delta = torch.zeros_like(hidden).index_add(
        0, indices, full[0][indices] * (N * weights.to(F64)).view(-1, *[1] * (hidden.dim() - 1))
    )
    below = torch.autograd.grad(hidden, list(trunk.parameters()), delta)
    for a, b in zip(got, [*below, *full[1:]], strict=True):
        assert type(a) is Tensor
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    assert not cut.report.dense


def test_random_is_unbiased() -> None:
    trunk, head, x = trunk_and_head("image")
    cut = selbp.BackwardCut(0.25, selbp.Random(), generator=torch.Generator().manual_seed(0))
    want = flat_gradients(loss_of(head(trunk(x))), trunk)
    directions = torch.randn(4, len(want), dtype=F64)
    draws = torch.stack([directions @ flat_gradients(loss_of(head(cut(trunk(x)))), trunk) for _ in range(400)])
    z = (draws.mean(0) - directions @ want) / (draws.std(0) / len(draws) ** 0.5)
    assert z.abs().max() < 4
    assert draws.std(0).min() > 0


def test_matching_beats_random_on_the_trunk() -> None:
    trunk, head, x = trunk_and_head("vector")
    want = flat_gradients(loss_of(head(trunk(x))), trunk)

    def error(selector: selbp.Selector) -> float:
        cut = selbp.BackwardCut(4, selector)
        return float((flat_gradients(loss_of(head(cut(trunk(x)))), trunk) - want).norm() / want.norm())

    assert error(selbp.GradientMatching()) < 0.5 * sum(error(selbp.Random()) for _ in range(20)) / 20


@pytest.mark.parametrize("how", ["keep 1.0", "keep all", "eval", "no_grad", "no gradient wanted"])
def test_identity(how: str) -> None:
    keep = {"keep 1.0": 1.0, "keep all": N}.get(how, 0.25)
    cut = selbp.BackwardCut(keep).train(how != "eval")
    hidden = torch.randn(N, 4, requires_grad=how != "no gradient wanted") * 1
    with torch.set_grad_enabled(how != "no_grad"):
        out = cut(hidden)
    assert out is hidden
    if how in ("keep 1.0", "keep all", "eval"):
        (got,) = torch.autograd.grad(out.square().sum(), hidden)
        assert torch.equal(got, 2 * hidden)
    if how in ("keep 1.0", "keep all"):
        assert cut.report.k == N
    else:
        with pytest.raises(RuntimeError, match="first backward"):
            _ = cut.report


def all_rows(report: selbp.CutReport, n: int) -> bool:
    """Whether the report says that every one of n rows was passed on."""
    indices, weights = report.selection
    same = torch.equal(indices, torch.arange(n)) and torch.allclose(weights, torch.full_like(weights, 1 / n))
    return same and (report.n, report.k) == (n, n) and report.relative_residual is None


@pytest.mark.parametrize("in_place", [False, True])
def test_the_report_is_of_the_last_backward_also_where_all_rows_were_passed_on(in_place: bool) -> None:
    """A ragged last minibatch, which has no more rows than are kept; its hidden state may be a view."""
    trunk = torch.nn.Linear(4, 4)
    cut = selbp.BackwardCut(8)
    for n in (16, 5, 12, 8):
        hidden = cut(trunk(torch.randn(n, 3, 4)))
        hidden = torch.relu_(hidden) if in_place else torch.relu(hidden)
        hidden.square().sum().backward()
        assert all_rows(cut.report, n) if n <= 8 else (cut.report.n, cut.report.k) == (n, 8)


def test_a_gradient_that_overflowed_is_passed_on_whole_and_the_report_says_so() -> None:
    trunk, head, x = trunk_and_head("vector")
    cut = selbp.BackwardCut(4)
    loss_of(head(cut(trunk(x)))).backward()
    assert cut.report.k == 4
    (loss_of(head(cut(trunk(x)))) * torch.inf).backward()
    assert all_rows(cut.report, N)


def test_a_lower_cut_that_keeps_all_reports_the_rows_of_the_upper_one() -> None:
    for keep in (1.0, 6):  # of all n samples, or of no more than arrive
        lower, upper = selbp.BackwardCut(keep), selbp.BackwardCut(4, selbp.Random())
        x = torch.randn(N, 4, requires_grad=True)
        upper(torch.tanh(lower(x * 2))).square().sum().backward()
        chosen = upper.report.selection.indices.sort().values
        assert torch.equal(lower.report.selection.indices.sort().values, chosen)
        assert (lower.report.n, lower.report.k) == (N, 4)
        assert lower.report.weight_sum == pytest.approx(4 / N)


def test_a_cut_that_keeps_all_stands_under_transforms() -> None:
    cut = selbp.BackwardCut(1.0)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return cut((3 * x).view(2, 6)).square().sum()

    x = torch.randn(4, 3)
    torch.testing.assert_close(torch.func.grad(loss)(x), 18 * x)
    torch.testing.assert_close(torch.func.vmap(loss)(x.expand(5, 4, 3)), loss(x).expand(5))
    (got,) = torch.autograd.grad(loss(x.requires_grad_()), x, create_graph=True)
    torch.testing.assert_close(got, 18 * x)


def test_function_form_and_features() -> None:
    trunk, head, x = trunk_and_head("vector")
    hidden = trunk(x)
    out = selbp.backward_cut(hidden, 2, features=x)
    assert out is hidden
    loss_of(head(out)).backward()
    assert all(p.grad.isfinite().all() for p in trunk.parameters())
    with pytest.raises(ValueError, match="features"):
        selbp.backward_cut(hidden, 2, features=x[:3])
    with pytest.raises(ValueError, match="scalar"):
        selbp.backward_cut(hidden.sum(), 2)


def test_several_cuts_nest() -> None:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()).to(F64) for _ in range(3)]
    upper, lower = selbp.BackwardCut(5, selbp.Random()), selbp.BackwardCut(2, selbp.Random())
    x = torch.randn(N, 6, dtype=F64)
    h1 = parts[0](x)
    h2 = parts[1](lower(h1))
    loss_of(parts[2](upper(h2))).backward()
    assert set(lower.report.selection.indices.tolist()) <= set(upper.report.selection.indices.tolist())
    assert (lower.report.n, lower.report.k) == (N, 2)
    (delta,) = torch.autograd.grad(loss_of(parts[2](h2.detach().requires_grad_())), parts[2][0].bias, allow_unused=True)
    torch.testing.assert_close(parts[2][0].bias.grad, delta)
    # Below the lower cut: rows of the middle part's subset gradient, scaled by both weights (5 of 8, then 2 of 5).
    h1 = parts[0](x)
    h2 = parts[1](h1)
    (d2,) = torch.autograd.grad(loss_of(parts[2](h2)), h2, retain_graph=True)
    chosen = lower.report.selection.indices
    d2_rows = torch.zeros_like(d2).index_add(0, chosen, d2[chosen] * (N / 5))
    (d1,) = torch.autograd.grad(h2, h1, d2_rows, retain_graph=True)
    want = torch.autograd.grad(h1, list(parts[0].parameters()), d1 * (5 / 2))
    for a, b in zip(parts[0].parameters(), want, strict=True):
        torch.testing.assert_close(a.grad, b, rtol=1e-10, atol=1e-13)


def test_random_in_two_cuts_is_unbiased() -> None:
    torch.manual_seed(0)
    a, b, c = (nn.Linear(6, 6).to(F64) for _ in range(3))
    upper, lower = selbp.BackwardCut(5, selbp.Random()), selbp.BackwardCut(2, selbp.Random())
    x = torch.randn(N, 6, dtype=F64)
    want = flat_gradients(loss_of(c(b(a(x).tanh()).tanh())), a)
    draws = torch.stack([flat_gradients(loss_of(c(upper(b(lower(a(x).tanh())).tanh()))), a) for _ in range(500)])
    z = (draws.mean(0) - want).norm() / (draws.var(0).sum() / len(draws)) ** 0.5
    assert z < 3


def test_accumulation_adds_up_the_micro_batches() -> None:
    trunk, head, x = trunk_and_head("vector")
    cut = selbp.BackwardCut(2, selbp.Random(), generator=torch.Generator().manual_seed(5))
    for _ in range(2):
        loss_of(head(cut(trunk(x)))).backward()
    got = [p.grad.clone() for p in trunk.parameters()]
    trunk.zero_grad()
    again = selbp.BackwardCut(2, selbp.Random(), generator=torch.Generator().manual_seed(5))
    total = [torch.zeros_like(g) for g in got]
    for _ in range(2):
        for sum_, g in zip(
            total, torch.autograd.grad(loss_of(head(again(trunk(x)))), list(trunk.parameters())), strict=True
        ):
            sum_ += g
    for p, q in zip(got, total, strict=True):
        torch.testing.assert_close(p, q)


def test_a_gradient_that_is_not_finite_reaches_grad_scaler() -> None:
    trunk, head, x = trunk_and_head("vector")
    trunk, head, x = trunk.float(), head.float(), x.float()
    update = torch.optim.SGD([*trunk.parameters(), *head.parameters()], lr=1.0)
    before = [p.detach().clone() for p in trunk.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    cut = selbp.BackwardCut(0.25)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(cut(trunk(x)))
    scaler.scale(loss_of(output.float()) * float("inf")).backward()
    scaler.step(update)
    scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.equal(a, b) for a, b in zip(before, trunk.parameters(), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = head(cut(trunk(x)))
    update.zero_grad()
    scaler.scale(loss_of(output.float())).backward()
    scaler.step(update)
    assert not torch.equal(before[0], next(trunk.parameters()))


def test_the_scale_of_the_loss_does_not_matter() -> None:
    trunk, head, x = trunk_and_head("tokens")
    chosen = []
    for scale in (1.0, 2.0**-60, 2.0**40):
        cut = selbp.BackwardCut(3)
        (loss_of(head(cut(trunk(x)))) * scale).backward()
        chosen.append(cut.report.selection)
    for other in chosen[1:]:
        assert torch.equal(other.indices, chosen[0].indices)
        torch.testing.assert_close(other.weights, chosen[0].weights)


def test_report() -> None:
    trunk, head, x = trunk_and_head("vector")
    cut = selbp.BackwardCut(4, proxy="flat")
    loss_of(head(cut(trunk(x)))).backward()
    report = cut.report
    assert 0 < report.relative_residual < 1
    assert report.gain > 1
    assert report.weight_max <= report.weight_sum
    assert 1 <= report.effective_sample_size <= 4
    random = selbp.BackwardCut(4, selbp.Random())
    loss_of(head(random(trunk(x)))).backward()
    assert random.report.relative_residual is None and random.report.gain is None


@pytest.mark.parametrize(
    "selector",
    [selbp.TopLoss(), selbp.TopLoss(weights="refit"), selbp.LossPercentile(), selbp.LossRank(), selbp.ReducibleLoss()],
    ids=repr,
)
def test_rules_that_read_losses_are_refused(selector: selbp.Selector) -> None:
    with pytest.raises(ValueError, match="loss|per sample"):
        selbp.BackwardCut(0.5, selector)


def test_losses_may_be_handed_in() -> None:
    trunk, head, x = trunk_and_head("vector")
    values: list[Tensor] = []
    cut = selbp.BackwardCut(2, selbp.TopLoss(), losses=lambda: values[-1])
    loss = F.cross_entropy(head(cut(trunk(x))), torch.arange(N) % 5, reduction="none")
    values.append(loss)
    loss.mean().backward()
    assert set(cut.report.selection.indices.tolist()) == set(loss.topk(2).indices.tolist())


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"keep": True}, TypeError),
        ({"keep": 0.0}, ValueError),
        ({"keep": 0.5, "selector": selbp.Random}, TypeError),
        ({"keep": 0.5, "proxy": "mean"}, ValueError),
        ({"keep": 0.5, "batchnorm": "frozen"}, ValueError),
    ],
)
def test_arguments(options: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error):
        selbp.BackwardCut(**options)


@pytest.mark.parametrize("name", ["CNN", "ResNet-GN", "ViT", "GPT"])
def test_nothing_below_is_densified_in_whole_models(name: str) -> None:
    task = SMALL[name]
    model = task.build()
    x, y = task.batch(task.n)
    place = model.blocks[0] if hasattr(model, "blocks") else model[3]
    cut = selbp.BackwardCut(0.25)
    place.register_forward_hook(lambda module, args, output: cut(output))
    task.losses(model(x), y).mean().backward()
    assert cut.report.k == 2 and not cut.report.dense


def test_create_graph_is_refused_and_the_state_is_empty() -> None:
    trunk, head, x = trunk_and_head("vector")
    cut = selbp.BackwardCut(2)
    assert not cut.state_dict() and "keep=2" in repr(cut)
    with pytest.raises(NotImplementedError, match=r"create_graph.*or cut\.eval\(\)"):
        torch.autograd.grad(loss_of(head(cut(trunk(x)))), list(trunk.parameters()), create_graph=True)
    got = torch.autograd.grad(loss_of(head(cut.eval()(trunk(x)))), list(trunk.parameters()), create_graph=True)
    want = torch.autograd.grad(loss_of(head(trunk(x))), list(trunk.parameters()), create_graph=True)
    assert all(torch.equal(mine, plain) and mine.grad_fn is not None for mine, plain in zip(got, want, strict=True))


def test_the_figures_of_a_lower_cut_are_about_the_rows_that_arrive() -> None:
    """Of 4 rows that the upper cut lets on, the lower one keeps 2: figures as of a cut that is given those 4 alone."""
    torch.manual_seed(0)
    upper = selbp.BackwardCut(4, selbp.Random(), generator=torch.Generator().manual_seed(1))
    lower = selbp.BackwardCut(2, selbp.GradientMatching())
    bottom, middle, top = nn.Linear(3, 5).double(), nn.Linear(5, 5).double(), nn.Linear(5, 1).double()
    x = torch.randn(12, 3, dtype=torch.float64)
    top(upper(torch.tanh(middle(lower(torch.tanh(bottom(x))))))).square().sum().backward()
    rows, weights = upper.report.selection
    alone = selbp.BackwardCut(2, selbp.GradientMatching())
    losses = top(torch.tanh(middle(alone(torch.tanh(bottom(x[rows])))))).square().sum(1)
    (losses * 12 * weights).sum().backward()
    assert torch.equal(lower.report.selection.indices, rows[alone.report.selection.indices])
    assert lower.report.relative_residual == pytest.approx(alone.report.relative_residual, rel=1e-9)
    assert lower.report.gain == pytest.approx(alone.report.gain, rel=1e-9)
    assert lower.report.weight_sum == pytest.approx(alone.report.weight_sum * 4 / 12, rel=1e-9)
