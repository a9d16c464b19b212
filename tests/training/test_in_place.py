"""In-place operators after a cut or after the head choose, and train, as their out-of-place forms do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp
from selbp.common import in_place

N, K, C = 16, 5, 4
F64 = torch.float64

# Each with its two forms: (x, in place?) -> x edited. Drawn masks come from a fixed seed.
Edit = Callable[[Tensor, bool], Tensor]


def _dropout(x: Tensor, inplace: bool) -> Tensor:
    torch.manual_seed(5)
    return F.dropout(x, 0.4, True, inplace)


def _residual(x: Tensor, inplace: bool) -> Tensor:
    other = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    return x.add_(other) if inplace else x + other


def _part(x: Tensor, inplace: bool) -> Tensor:
    if not inplace:
        return torch.cat([x[:, :1] * 3, x[:, 1:]], 1)
    x[:, :1] *= 3
    return x


def _mask(x: Tensor, inplace: bool) -> Tensor:
    where = torch.arange(x.shape[-1]) == x.shape[-1] - 1
    return x.masked_fill_(where, -1e4) if inplace else x.masked_fill(where, -1e4)


def _softcap(x: Tensor, inplace: bool) -> Tensor:
    return (x.div_(2).tanh_() if inplace else (x / 2).tanh()) * 2


def _temperature(x: Tensor, inplace: bool) -> Tensor:
    by = x.detach().square().mean(-1, keepdim=True) + 0.1  # each sample's own
    return x.div_(by) if inplace else x / by


def _prior(x: Tensor, inplace: bool) -> Tensor:
    by = torch.linspace(-1, 1, C, dtype=x.dtype)
    return x.add_(by) if inplace else x + by


AFTER_CUT: dict[str, Edit] = {
    "relu": lambda x, inplace: F.relu(x, inplace),
    "dropout": _dropout,
    "residual": _residual,
    "part": _part,
}
AFTER_HEAD: dict[str, Edit] = {
    "mask": _mask,
    "temperature": _temperature,
    "softcap": _softcap,
    "prior": _prior,
}


class Body(nn.Module):
    """Below the cut: vectors, the view that a linear layer makes of (n, T, d), or images through batch norm."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Linear(6, 8)
        if kind == "images":
            self.layer = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class Model(nn.Module):
    def __init__(self, kind: str, edit: Edit, inplace: bool, cut: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.cut, self.edit, self.inplace = Body(kind), cut, edit, inplace
        width = {"vectors": 8, "tokens": 24, "images": 12}[kind]
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(width, C))
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        h = h if self.cut is None else self.cut(h)
        out: Tensor = self.head(self.edit(h, self.inplace))
        return out


def batch(kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    shape = {"vectors": (N, 6), "tokens": (N, 3, 6), "images": (N, 2, 4, 4)}[kind]
    return torch.randn(shape, dtype=F64), torch.randint(0, C - 1, (N,))


def found(model: nn.Module, report: Any) -> tuple[Any, list[Tensor]]:
    """The selection, and all gradients."""
    made = getattr(report, "cut", report)
    return made.selection, [p.grad for p in model.parameters() if p.grad is not None]


def assert_equal(got: tuple[Any, list[Tensor]], want: tuple[Any, list[Tensor]]) -> None:
    (selection, gradients), (wanted, exact) = got, want
    assert torch.equal(selection.indices, wanted.indices)
    torch.testing.assert_close(selection.weights, wanted.weights, rtol=1e-12, atol=0)
    assert len(gradients) == len(exact) >= 2
    for a, b in zip(gradients, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("edit", AFTER_CUT.values(), ids=AFTER_CUT)
@pytest.mark.parametrize(
    ("how", "kind"),
    [
        ("module", "vectors"),
        ("module", "tokens"),
        ("module", "images"),
        ("rows", "tokens"),
        ("recompute", "tokens"),
        ("recompute", "images"),
    ],
)
def test_what_follows_a_cut(how: str, kind: str, edit: Edit) -> None:
    x, y = batch(kind)

    def train(inplace: bool) -> tuple[Any, list[Tensor]]:
        if how == "module":
            cut = selbp.BackwardCut(K)
            model = Model(kind, edit, inplace, cut)
            F.cross_entropy(model(x), y).backward()
            return found(model, cut.report)
        model = Model(kind, edit, inplace)
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=K, cut="body", backward=how)
        step(x, y).backward()
        return found(model, step.report)

    assert_equal(train(True), train(False))


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_features_that_are_overwritten_later(backward: str) -> None:
    """The input of a frozen linear layer at the cut, which plain torch does not need either."""

    class Frozen(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.first, self.cut, self.head = nn.Linear(6, 8), nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, C)
            self.inplace = inplace
            self.to(F64)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x).tanh() * 2
            out = self.cut(h)
            if self.inplace:
                h.mul_(-1)
            return self.head(out.relu())

    x, y = batch("vectors")

    def train(inplace: bool) -> tuple[Any, list[Tensor]]:
        model = Frozen(inplace)
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=K, cut="cut", backward=backward)
        step(x, y).backward()
        return found(model, step.report)

    assert_equal(train(True), train(False))


class Logits(nn.Module):
    """Edits its logits, or the head's input, after the head."""

    def __init__(self, kind: str, edit: Edit, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head, self.edit, self.inplace = nn.Linear(6, 8), nn.Linear(8, C), edit, inplace
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        return self.edit(self.head(self.body(x).relu()), self.inplace)


@pytest.mark.parametrize("edit", AFTER_HEAD.values(), ids=AFTER_HEAD)
@pytest.mark.parametrize(
    ("head_gradient", "backward", "kind"),
    [
        ("subset", "rows", "vectors"),
        ("subset", "rows", "tokens"),
        ("subset", "recompute", "tokens"),
        ("subset", "auto", "vectors"),
        ("full", "rows", "tokens"),
        ("full", "recompute", "vectors"),
    ],
)
def test_what_follows_the_head(head_gradient: Any, backward: Any, kind: str, edit: Edit) -> None:
    x, y = batch(kind)
    y = y if kind == "vectors" else y[:, None].expand(N, 3).contiguous()

    def train(inplace: bool) -> tuple[Any, list[Tensor]]:
        model = Logits(kind, edit, inplace)
        step = selbp.SelectiveBackprop(
            model, selector=selbp.GradientMatching(), keep=K, backward=backward, head_gradient=head_gradient
        )
        step(x, y).backward()
        return found(model, step.report)

    got, want = train(True), train(False)
    assert_equal(got, want)
    model = Logits(kind, edit, False)
    full = head_gradient == "full"
    losses = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), reduction="none").view(N, -1).mean(1)
    (losses[got[0].indices] @ got[0].weights.to(F64)).backward(retain_graph=full)
    exact = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    if full:
        exact[2:] = torch.autograd.grad(losses.mean(), list(model.head.parameters()))
    for a, b in zip(got[1], exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7 * float(b.abs().max()))


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_the_input_of_a_frozen_head_is_overwritten(backward: Any) -> None:
    class Shared(Logits):
        def forward(self, x: Tensor) -> Tensor:
            h = self.body(x).tanh() * 2
            z = self.head(h)
            if self.inplace:
                h.mul_(-3)
            return z

    x, y = batch("vectors")

    def train(inplace: bool) -> tuple[Any, list[Tensor]]:
        model = Shared("vectors", _mask, inplace)
        model.head.requires_grad_(False)
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=K, backward=backward)
        step(x, y).backward()
        return found(model, step.report)

    assert_equal(train(True), train(False))


@pytest.mark.parametrize("lazy", [True, False], ids=["lazily", "at once"])
def test_a_kept_value(lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not lazy:
        monkeypatch.delattr(torch, "_lazy_clone", raising=False)
    elif not hasattr(torch, "_lazy_clone"):
        pytest.skip("this torch has no torch._lazy_clone")
    x = torch.randn(6, 3)
    before = x.clone()
    untouched, overwritten = in_place.Kept(x), in_place.Kept(x)
    assert untouched.take().data_ptr() == x.data_ptr()
    x[2:] = 0
    assert torch.equal(overwritten.take(), before)
    assert torch.equal(overwritten.take(), before)
    with pytest.raises(RuntimeError, match="overwritten in place"):
        untouched.take()


class _OnAStream(torch.Tensor):
    is_cuda = True  # type: ignore[assignment]


def test_a_value_is_copied_at_once_on_a_stream_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lazy copy runs on the default stream, which would not wait for what computes the value."""
    lazy: list[Tensor] = []
    monkeypatch.setattr(torch, "_lazy_clone", lambda x: (lazy.append(x), x.clone())[1], raising=False)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    for stream in ("another", "default"):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device, stream=stream: stream)
        in_place.Kept(torch.ones(2).as_subclass(_OnAStream))
        assert len(lazy) == (stream == "default")


class Normalised(nn.Module):
    """Edits its input in place, and can be told when."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body, self.head, self.inplace = nn.Linear(6, 8), nn.Linear(8, C), inplace
        self.to(F64)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mul_(3).sub_(1) if self.inplace else x * 3 - 1
        out: Tensor = self.head(self.body(x).relu())
        return out


@pytest.mark.parametrize(
    ("place", "scoring"), [(None, "same"), (None, "eval"), ("body", "same")], ids=["head", "head, eval", "cut"]
)
def test_a_model_that_edits_its_inputs(place: str | None, scoring: Any) -> None:
    """The chosen rows run again on what came in, not on what the first forward made of it."""
    x, y = batch("vectors")
    options: dict[str, Any] = {"keep": K, "cut": place, "backward": "recompute", "scoring": scoring}

    def train(inplace: bool) -> list[tuple[Any, list[Tensor]]]:
        model = Normalised(inplace)
        step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), **options)
        results = []
        for _ in range(2):
            model.zero_grad()
            step(x.clone(), y).backward()
            results.append(found(model, step.report))
        return results

    for got, want in zip(train(True), train(False), strict=True):
        assert_equal(got, want)
    model = Normalised(False)
    step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), **options)
    step(x, y)
    model.inplace = True
    with pytest.raises(RuntimeError, match="edits its inputs in place"):
        step(x.clone(), y)
