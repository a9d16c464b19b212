"""A step on a model that torch.compile has compiled, and run, before: its head and its cut are found all the same."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from selbp.common import hooks

N, K = 16, 4
F64 = torch.float64


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Without a loop in its forward, which Dynamo would leave to Python as a whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.cut, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 5)
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.cut(torch.tanh(self.first(x)))))
        return out


class Scaled(Net):
    """Scales its logits in place after the head, each sample by its own."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z.mul_(1 + z.detach().square())


def whole(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def ahead(model: nn.Module) -> nn.Module:
    """One autograd node for all that is compiled together, inside which no hook sees a gradient."""
    return torch.compile(model, backend="aot_eager")


def in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def layers(model: nn.Module) -> nn.Module:
    for layer in model.children():
        layer.compile(backend="eager")
    return model


COMPILERS: list[Callable[[nn.Module], nn.Module]] = [whole, in_place, layers]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(N, 6, dtype=F64), torch.randint(0, 5, (N,))


def steps(model: nn.Module, count: int, **options: Any) -> list[tuple[Any, list[Tensor]]]:
    """What was chosen and all gradients of each of ``count`` steps."""
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=K, **options)
    found = []
    for seed in range(count):
        model.zero_grad()
        step(*batch(seed)).backward()
        report = step.report
        chosen = getattr(report, "cut", report)
        found.append((None if chosen is None else chosen.selection, [p.grad.clone() for p in model.parameters()]))
    return found


def assert_equal(got: list[Any], want: list[Any]) -> None:
    for (chosen, gradients), (wanted, exact) in zip(got, want, strict=True):
        assert torch.equal(chosen.indices, wanted.indices)
        for a, b in zip(gradients, exact, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


ROWS, RECOMPUTE, CUT = {"backward": "rows"}, {"backward": "recompute"}, {"backward": "rows", "cut": "cut"}
LATER = {**CUT, "schedule": selbp.Schedule(start=1)}
CASES = [
    (Net, whole, ROWS),
    (Scaled, ahead, ROWS),
    (Scaled, in_place, RECOMPUTE),
    (Net, whole, CUT),
    (Net, layers, CUT),
    (Net, in_place, {**RECOMPUTE, "cut": "cut"}),
    (Net, whole, {**ROWS, "schedule": selbp.Schedule(start=1)}),
    (Net, whole, LATER),
    (Net, whole, {**CUT, "schedule": selbp.Schedule(every=2)}),
]


def name_of(case: tuple[type, Any, dict[str, Any]]) -> str:
    kind, compiled, options = case
    return f"{kind.__name__} {compiled.__name__} {options}"


@pytest.mark.parametrize(("kind", "compiled", "options"), CASES, ids=map(name_of, CASES))
def test_a_step_on_a_model_that_ran_before(kind: type[Net], compiled: Any, options: dict[str, Any]) -> None:
    want = steps(kind(), 3, **options)
    model = compiled(kind())
    model(batch(0)[0]).sum().backward()
    assert_equal(steps(model, 3, **options), want)
    assert "forward" not in vars(hooks_of(model).head) and "forward" not in vars(hooks_of(model).cut)


def hooks_of(model: nn.Module) -> Any:
    return getattr(model, "_orig_mod", model)


class Cut(Net):
    """A cut in the model itself, as a module or by the function, whose output is edited in place."""

    def __init__(self, function: bool) -> None:
        super().__init__()
        self.choose = selbp.BackwardCut(K)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        h = self.cut(torch.tanh(self.first(x)))
        h = selbp.backward_cut(h, K) if self.function else self.choose(h)
        out: Tensor = self.head(torch.relu_(h))
        return out


@pytest.mark.filterwarnings("error:.*Dynamo does not know", "error:Graph break")
@pytest.mark.parametrize("function", [False, True], ids=["module", "function"])
def test_a_cut_in_a_compiled_model_runs_untraced(function: bool) -> None:
    found = []
    for compiled in (None, ahead):
        model = Cut(function)
        run = model if compiled is None else compiled(model)
        for seed in range(2):
            x, y = batch(seed)
            model.zero_grad()
            F.cross_entropy(run(x), y).backward()
            found.append([p.grad for p in model.parameters()])
    for got, want in zip(found[2:], found[:2], strict=True):
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [None, {}, {"cut": "cut"}], ids=["module", "head", "cut in a step"])
def test_one_graph_is_refused_by_name(options: dict[str, Any] | None) -> None:
    x, y = batch(0)
    if options is None:
        model = torch.compile(Cut(function=False), backend="eager", fullgraph=True)
        run = lambda: model(x)  # noqa: E731
    else:
        model = torch.compile(Net(), backend="eager", fullgraph=True)
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=K, backward="rows", **options)
        run = lambda: step(x, y)  # noqa: E731
    with pytest.raises(torch._dynamo.exc.Unsupported) as error:
        run()
    if "reason" in inspect.signature(torch.compiler.disable).parameters:  # before, the message is torch's alone
        assert "compile without fullgraph=True" in str(error.value)


def test_nothing_is_compiled_anew_in_each_step() -> None:
    counters = torch._dynamo.utils.counters
    for options in (ROWS, LATER):
        torch._dynamo.reset()
        model, graphs = whole(Net()), []
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=K, **options)
        counters.clear()
        for seed in range(5):
            step(*batch(seed)).backward()
            graphs.append(counters["stats"]["unique_graphs"])
        assert 0 < graphs[2] == graphs[-1], options


def test_a_module_with_a_forward_of_its_own_and_two_watchers() -> None:
    """Some libraries give a module's instance a forward; whoever watches gives it back."""
    model = Net()
    layer = model.cut
    plain = layer.forward
    layer.forward = lambda x: plain(x) * 2  # type: ignore[method-assign]
    patched = vars(layer)["forward"]
    compiled = whole(model)
    x, y = batch(0)
    compiled(x)
    want = model(x)
    seen: list[Tensor] = []

    def watcher(args: Any, kwargs: Any, output: Tensor) -> Tensor:
        seen.append(output)
        return output

    with hooks.watched(layer, watcher), hooks.watched(layer, watcher):
        got = compiled(x)
    torch.testing.assert_close(got, want)
    assert len(seen) == 2 and vars(layer)["forward"] is patched
    compiled(x)
    assert len(seen) == 2 and not layer._forward_hooks


def test_a_rule_that_reads_losses_leaves_the_code_whole() -> None:
    model = torch.compile(Net(), backend="eager", fullgraph=True)
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=K, backward="rows")
    step(*batch(0)).backward()
    assert step.report.relative_residual is None


@pytest.mark.parametrize("options", [{}, {"cut": "cut"}], ids=["head", "cut"])
def test_a_module_that_is_not_reached_is_an_error(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Dynamo sees no difference: never a step without the cut, and the error names the cause."""
    monkeypatch.setattr(hooks, "mark", lambda module: lambda: None)
    model = whole(Net())
    x, y = batch(0)
    model(x)
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=K, backward="rows", **options)
    with pytest.raises(RuntimeError, match=r"torch\.compile.*torch\.compiler\.reset\(\)"):
        step(x, y)
    torch.compiler.reset()
    step(x, y).backward()


@pytest.mark.parametrize("name", ["cut", "_orig_mod.cut"])
def test_names_are_those_of_the_model_that_was_compiled(name: str) -> None:
    step = selbp.SelectiveBackprop(whole(Net()), selector=selbp.GradientMatching(), keep=K, cut=name)
    x, y = batch(0)
    loss = step(x, y)
    torch.testing.assert_close(loss, F.cross_entropy(Net()(x), y))
    loss.backward()
    assert step.report.cut.k == K
    with pytest.raises(ValueError, match="it has first, cut, head"):
        selbp.SelectiveBackprop(whole(Net()), selector=selbp.GradientMatching(), keep=K, cut="2")
