"""A selection among everything else that a training loop does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from selbp_study.row_models import SMALL

F64 = torch.float64
INDEX = torch.tensor([1, 4, 6])


def pair(seed: int = 0) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 5)).to(F64)
    return model, torch.randn(8, 6, dtype=F64), torch.randint(5, (8,))


def losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y, reduction="none")


def indexed(values: Tensor, index: Tensor) -> Tensor:
    return values[index]


def both(run: Callable[[Callable[[Tensor, Tensor], Tensor]], list[Tensor]], tolerance: float = 1e-12) -> None:
    """``run`` gives the same tensors with a selection and with autograd's own indexing."""
    for got, want in zip(run(selbp.select), run(indexed), strict=True):
        assert type(got) is Tensor
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_accumulation_and_clipping() -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        for _ in range(3):
            choose(losses(model, x, y), INDEX).mean().backward()
            choose(losses(model, -x, y), torch.tensor([0, 7])).mean().backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        return [*grads(model), norm]

    both(run)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_training_takes_the_same_path(optimizer: type[torch.optim.Optimizer]) -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        update = optimizer(model.parameters(), lr=0.05)
        for step in range(6):
            choose(losses(model, x, y), (INDEX + step) % 8).mean().backward()
            update.step()
            update.zero_grad()
        return [p.detach() for p in model.parameters()]

    both(run, 1e-10)


def test_hooks_of_parameters_and_hidden_tensors() -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        seen: list[Tensor] = []
        model[0].weight.register_hook(lambda gradient: gradient * 2)
        model[2].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        hidden = model[1](model[0](x))
        hidden.register_hook(lambda gradient: gradient.clamp(-1e-3, 1e-3))  # no rule: densifies
        model[3].register_full_backward_hook(lambda module, given, received: None)
        choose(F.cross_entropy(model[4](model[3](model[2](hidden))), y, reduction="none"), INDEX).sum().backward()
        return grads(model) + seen

    both(run)


def test_tied_weights_frozen_layers_and_unused_parameters() -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        model[0].bias.requires_grad_(False)
        unused = nn.Linear(2, 2)
        square = model[2].weight
        hidden = F.gelu(F.linear(model[2](model[1](model[0](x))), square.t()))  # the weight is used twice
        choose(F.cross_entropy(model[4](hidden), y, reduction="none"), INDEX).sum().backward()
        assert unused.weight.grad is None and model[0].bias.grad is None
        return grads(model)

    both(run)


def test_two_selections_and_a_dense_term() -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        values = losses(model, x, y)
        total = choose(values, INDEX).sum() + 2 * choose(values, torch.tensor([1, 2])).sum() + values.mean()
        total.backward()
        return grads(model)

    both(run)


def test_a_pytree_of_outputs() -> None:
    model, x, y = pair()
    chosen = selbp.select({"losses": losses(model, x, y), "aux": (model(x), 3)}, INDEX)
    assert chosen["aux"][1] == 3
    (chosen["losses"].sum() + chosen["aux"][0].square().sum()).backward()
    got = grads(model)
    model.zero_grad()
    (losses(model, x, y)[INDEX].sum() + model(x)[INDEX].square().sum()).backward()
    for a, b in zip(got, grads(model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradient_of_the_input_is_an_ordinary_tensor() -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        x.requires_grad_()
        hidden = model[0](x)
        hidden.retain_grad()
        choose(F.cross_entropy(model[1:](hidden), y, reduction="none"), INDEX).sum().backward()
        assert x.grad is not None and hidden.grad is not None
        x.grad.numpy()
        return [x.grad, hidden.grad + 0 * hidden.detach()]

    both(run)


def test_fence_gives_hooks_an_ordinary_tensor() -> None:
    model, x, y = pair()
    seen: list[type] = []
    hidden = model[0](x)
    hidden.register_hook(lambda gradient: seen.append(type(gradient)))
    selbp.select(F.cross_entropy(model[1:](selbp.fence(hidden)), y, reduction="none"), INDEX).sum().backward()
    assert seen == [Tensor]


def test_autocast_and_grad_scaler() -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        model, x = model.float(), x.float()
        update = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values = losses(model, x, y)
            scaler.scale(choose(values, INDEX).mean()).backward()
            scaler.unscale_(update)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(update)
            scaler.update()
        return [p.detach() for p in model.parameters()]

    both(run, 5e-3)  # bf16 products of 3 and of 8 rows round differently: 2^-8


def test_grad_scaler_sees_an_overflow() -> None:
    model, x, y = pair()
    model, x = model.float(), x.float()
    update = torch.optim.SGD(model.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(selbp.select(losses(model, x, y), INDEX).sum() * float("inf")).backward()
    scaler.step(update)
    scaler.update()
    assert scaler.get_scale() < 2.0**10
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_rows_that_were_not_chosen_may_be_infinite() -> None:
    model, x, y = pair()
    x[0] = float("nan")
    selbp.select(losses(model, x, y), INDEX).sum().backward()
    assert all(gradient.isfinite().all() for gradient in grads(model))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        hidden = torch.utils.checkpoint.checkpoint(model[:3], x.requires_grad_(), use_reentrant=reentrant)
        choose(F.cross_entropy(model[3:](hidden), y, reduction="none"), INDEX).sum().backward()
        return grads(model)

    both(run)


def test_a_backward_run_twice() -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        chosen = choose(losses(model, x, y), INDEX).sum()
        chosen.backward(retain_graph=True)
        chosen.backward()
        return grads(model)

    both(run)


def test_a_dense_custom_function_below() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient.add(gradient) + gradient.new_zeros(()).expand(gradient.shape)

    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        choose(F.cross_entropy(model[1:](Double.apply(model[0](x))), y, reduction="none"), INDEX).sum().backward()
        return grads(model)

    both(run)


def test_in_place_on_a_view_of_the_gradient() -> None:
    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        hidden = model[0](x)

        def hook(gradient: Tensor) -> Tensor:
            out = gradient.clone()
            out[:, 2:5].mul_(3)  # through a view, by a rule
            out[:, 0].fill_(1.0)  # through a view, without one
            out.t()[1].zero_()
            return out

        hidden.register_hook(hook)
        choose(F.cross_entropy(model[1:](hidden), y, reduction="none"), INDEX).sum().backward()
        return grads(model)

    both(run)


def test_one_sample_only() -> None:
    for index in ([0], [], [0, 0]):
        model, x, y = pair()
        x, y, chosen = x[:1], y[:1], torch.tensor(index, dtype=torch.int64)
        selbp.select(losses(model, x, y), chosen).sum().backward()
        got = grads(model)
        model.zero_grad()
        losses(model, x, y)[chosen].sum().backward()
        for a, b in zip(got, grads(model), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_no_samples_at_all() -> None:
    model, x, y = pair()
    selbp.select(losses(model, x[:0], y[:0]), torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert all(not gradient.any() for gradient in grads(model))


def test_saved_copies_are_released() -> None:
    model, x, y = pair()
    dense: Counter[str] = Counter()
    chosen = selbp.select(losses(model, x, y), INDEX, densified=dense)
    rows = chosen.grad_fn.rows
    chosen.sum().backward()
    assert not rows.slices._copies


@pytest.mark.parametrize("name", SMALL)
def test_small_model_with_autocast(name: str) -> None:
    task = SMALL[name]
    model = task.build()
    x, y = task.batch(task.n)

    def gradient(choose: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        model.zero_grad()
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            values = task.losses(model(x), y)
        choose(values, INDEX).sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    got, want = gradient(selbp.select), gradient(indexed)
    assert float((got - want).norm()) <= 0.02 * float(want.norm())


@pytest.mark.parametrize("which", ["indices", "any_valid"])
def test_a_buffer_may_be_written_to_before_the_backward(which: str) -> None:
    """Two micro-batches whose choices stand in one buffer, and one backward for both."""
    first, second, valid = torch.tensor([1, 4, 6]), torch.tensor([0, 2, 3]), torch.tensor(True)

    def run(choose: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
        model, x, y = pair()
        chosen = [choose(losses(model, sign * x, y), index) for sign, index in ((1, first), (-1, second))]
        if which == "any_valid":
            valid.fill_(False)
        torch.cat(chosen).sum().backward()
        return grads(model)

    buffer = first.clone()

    def select(values: Tensor, index: Tensor) -> Tensor:
        chosen: Tensor = selbp.select(values, buffer.copy_(index), any_valid=valid if which == "any_valid" else None)
        return chosen

    for got, want in zip(run(select), run(indexed), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_two_cuts_whose_rules_return_one_buffer() -> None:
    """The lower cut chooses before the rows of the upper one have gone through the skip connection."""
    buffer = torch.zeros(4, dtype=torch.int64)

    class Last(selbp.BaseSelector):
        needs = "nothing"
        reuse = True

        def choose(self, rows: Any, k: int) -> Any:
            raise AssertionError("`select` chooses")

        def select(self, stats: selbp.BatchStatistics, k: int, **_: Any) -> selbp.Selection:
            n = len(stats.valid)
            indices = torch.arange(n - k, n)
            return selbp.Selection(
                buffer[:k].copy_(indices) if self.reuse else indices, torch.full((k,), 1 / k, dtype=F64)
            )

    def run(reuse: bool) -> list[Tensor]:
        model, x, y = pair()
        rule = Last()
        rule.reuse = reuse
        upper, lower = selbp.BackwardCut(4, selector=rule), selbp.BackwardCut(2, selector=rule)
        hidden = model[1](model[0](x))
        skip = model[2](hidden)  # computed first, so that the backward comes to it after the lower cut
        F.cross_entropy(model[4](upper(lower(hidden.sin()) + skip)), y).backward()
        return grads(model)

    for got, want in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)
