"""A layer's backward, or a hook, that takes the gradient's memory, pickles it or changes it past torch's dispatcher."""

from __future__ import annotations

import copy
import ctypes
import io
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import selbp
from selbp.rows import RowGradient, RowSet
from selbp.rows.exposed import densify
from selbp.rows.wrap import wrap

F64 = torch.float64
N, INDEX = 6, torch.tensor([1, 2, 5])
DATA = torch.linspace(-2, 3, 3 * 4, dtype=F64).view(3, 4)


def gradient() -> tuple[Tensor, Tensor]:
    """A row gradient and the tensor that it stands for."""
    return wrap(DATA.clone(), RowSet(INDEX, N).layout(0)), torch.zeros(N, 4, dtype=F64).index_add(0, INDEX, DATA)


def by_pointer(g: Tensor) -> Tensor:
    return torch.tensor(list((ctypes.c_double * g.numel()).from_address(g.data_ptr())), dtype=F64).view(g.shape)


def saved(g: Tensor) -> Tensor:
    file = io.BytesIO()
    torch.save({"gradient": g}, file)
    file.seek(0)
    found: Tensor = torch.load(file)["gradient"]
    return found


def shared(g: Tensor) -> Tensor:
    assert g.share_memory_() is g and g.is_shared()
    return g + 0


READS: dict[str, Callable[[Tensor], Any]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy in a list": lambda g: copy.deepcopy([g, g])[1],
    "copy": copy.copy,
    "pickle": lambda g: pickle.loads(pickle.dumps(g)),
    "old pickle": lambda g: pickle.loads(pickle.dumps(g, protocol=2)),
    "torch.save": saved,
    "pointer": by_pointer,
    "pointer of a clone": lambda g: by_pointer(g.contiguous().clone()),
    "pointer of a view": lambda g: by_pointer(g.view(N * 4)).view(N, 4),
    "pointer of a transpose": lambda g: by_pointer(g.t().contiguous()).t(),
    "numpy": lambda g: torch.from_numpy(g.numpy()),
    "numpy, forced": lambda g: torch.from_numpy(g.numpy(force=True)),
    "asarray": lambda g: torch.from_numpy(np.asarray(g)),
    "numpy's own functions": lambda g: torch.tensor(np.linalg.norm(g)),
    "tolist": lambda g: torch.tensor(g.tolist(), dtype=F64),
    "torch.tensor": lambda g: torch.tensor(g.clone()),
    "as_tensor": lambda g: torch.as_tensor(g),
    "untyped storage": lambda g: torch.tensor([], dtype=F64).set_(g.untyped_storage(), g.storage_offset(), g.shape),
    "storage": lambda g: torch.tensor(list(g.storage()), dtype=F64).view(N, 4),
    "dlpack": lambda g: torch.from_dlpack(g),
    "numpy by dlpack": lambda g: torch.from_numpy(np.from_dlpack(g)),
    "shared memory": shared,
    "item": lambda g: torch.tensor([[x.item() for x in row] for row in g]),
    "truth": lambda g: torch.tensor(bool(g.any())),
    "iteration": lambda g: torch.stack(list(g)),
    "reversed": lambda g: torch.stack(list(reversed(g))),
    "length": lambda g: torch.tensor(len(g)),
    "contains": lambda g: torch.tensor(0.0 in g),
    "data": lambda g: g.data,
    "detach": lambda g: g.detach(),
    "cpu": lambda g: g.cpu(),
    "requires no grad": lambda g: g.requires_grad_(False),
    "to": lambda g: g.to(torch.float32).double(),
    "type": lambda g: g.type(F64),
    "new": lambda g: g.new(2, 3).fill_(1.0),
    "apply_": lambda g: g.apply_(lambda value: value * 2),
    "map_": lambda g: g.map_(g * 2, lambda a, b: a - b),
    "map2_": lambda g: g.map2_(g * 2, g * 3, lambda a, b, c: a - b + c),
    "unique": lambda g: g.unique(),
    "nonzero": lambda g: g.nonzero(),
    "dtype view": lambda g: g.view(torch.int64),
    "to_sparse": lambda g: g.to_sparse().to_dense(),
    "set data": lambda g: set_data(g, g.data * 2),
    "set data to a plain tensor": lambda g: set_data(g, torch.ones(N, 4, dtype=F64)),
}


def set_data(g: Tensor, value: Tensor) -> Tensor:
    view = g.t()
    g.data = value
    return torch.cat([g, view.t(), g.view(N, 4) + 1])


@pytest.mark.filterwarnings("ignore:TypedStorage", "ignore:.*copy construct")
@pytest.mark.parametrize("name", READS)
def test_what_leaves_torch_is_the_full_gradient(name: str) -> None:
    rows, dense = gradient()
    got, want = densify(READS[name](rows)), READS[name](dense)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_written_memory_is_seen() -> None:
    rows, _ = gradient()
    view = rows.t()
    array = rows.numpy()
    array[0, 3] = 7.0
    assert rows[0, 3].item() == view[3, 0].item() == 7.0
    assert rows.data_ptr() == array.ctypes.data  # settled once


def test_the_pointer_lives_as_long_as_the_gradient() -> None:
    rows, dense = gradient()
    pointer = rows.data_ptr()
    junk = [torch.full((N, 4), 9.0, dtype=F64) for _ in range(50)]
    assert rows.data_ptr() == pointer and len(junk) == 50
    assert torch.equal(by_pointer(rows), dense)


def test_a_null_pointer_is_never_handed_out() -> None:
    rows, _ = gradient()
    with pytest.raises(RuntimeError, match="data pointer"):  # torch's own code, which asks the tensor itself
        torch.Tensor.data_ptr(rows)
    with pytest.raises(RuntimeError, match="data pointer"):
        torch._C._to_dlpack(rows)
    gaps = rows.unsqueeze(2).expand(N, 4, 3).clone()[:, :, 0] * 1
    assert torch.equal(by_pointer(gaps.contiguous()), by_pointer(gradient()[1]))


@pytest.mark.parametrize(
    "change",
    [
        lambda g: g.t_(),
        lambda g: g.transpose_(0, 1),
        lambda g: g.unsqueeze_(0),
        lambda g: g.resize_(2, 2),
        lambda g: g.set_(torch.ones(3, dtype=F64)),
        lambda g: setattr(g, "data", torch.ones(2, dtype=F64)),
        lambda g: setattr(g, "data", torch.ones(N, 4)),
    ],
    ids=["t_", "transpose_", "unsqueeze_", "resize_", "set_", "data of another shape", "data of another dtype"],
)
def test_what_would_change_the_outer_shape_names_the_fence(change: Callable[[Tensor], Any]) -> None:
    rows, dense = gradient()
    with pytest.raises((NotImplementedError, RuntimeError), match=r"selbp\.fence"):
        change(rows)
    torch.testing.assert_close(densify(rows), dense, rtol=0, atol=0)


class Double(torch.autograd.Function):
    """Twice its input; the backward takes the gradient's memory by ``how``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, how: str) -> Tensor:
        ctx.how = how
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if ctx.how == "pointer":
            g = g.contiguous()
            out = torch.empty_like(g)
            source = (ctypes.c_double * g.numel()).from_address(g.data_ptr())
            target = (ctypes.c_double * g.numel()).from_address(out.data_ptr())
            for place in range(g.numel()):
                target[place] = 2 * source[place]
        elif ctx.how == "numpy":
            out = torch.from_numpy(g.numpy() * 2)
        elif ctx.how == "in place":
            out = g.clone()
            out.numpy()[:] *= 2
        else:
            out = g.new_empty(g.shape)
            out.copy_(g).mul_(2)
        return out, None


@pytest.mark.parametrize("how", ["pointer", "numpy", "in place", "new_empty"])
def test_a_custom_function_below_a_selection(how: str) -> None:
    torch.manual_seed(0)
    x, below, above = torch.randn(N, 5, dtype=F64), nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def gradients(choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        losses = above(Double.apply(below(x).tanh(), how)).square().sum(1)
        return torch.autograd.grad(choose(losses).sum(), [*below.parameters(), *above.parameters()])

    dense: Counter[str] = Counter()
    got = gradients(lambda losses: selbp.select(losses, INDEX, densified=dense))
    for a, b in zip(got, gradients(lambda losses: losses[INDEX]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert dense  # counted: the layers below run on all rows


@pytest.mark.parametrize("keep", [copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))], ids=["deepcopy", "pickle"])
def test_hooks_that_keep_a_copy(keep: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    seen: list[Tensor] = []
    for layer in net:
        layer.register_full_backward_hook(lambda module, given, received: seen.append(keep(received[0])))
    x = torch.randn(N, 5, dtype=F64)
    for _ in range(3):
        selbp.select(net(x).square().sum(1), INDEX).sum().backward()
    half = len(seen) // 3
    net(x).square().sum(1)[INDEX].sum().backward()
    for got, want in zip(seen[:half], seen[3 * half :], strict=True):
        assert type(got) is Tensor
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_a_dense_tensor_with_views_slows_its_own_backward_only() -> None:
    rows, _ = gradient()
    view = rows.t()
    rows.fill_(1.0)
    assert rows._rows.stale and (view == 1).all()
    assert not gradient()[0]._rows.stale
    assert type(gradient()[0] * 2) is RowGradient


@pytest.mark.parametrize("part", [torch.real, torch.imag], ids=["real", "imag"])
def test_a_write_to_a_part_of_a_conjugate_is_refused_by_name(part: Callable[[Tensor], Tensor]) -> None:
    """torch writes through to the gradient; a wrapper cannot, and to write to a copy would be silently wrong."""

    def hook(gradient: Tensor) -> Tensor:
        own = gradient.clone()
        part(own.conj()).mul_(2.0)
        return own

    x = torch.ones(4, 3, dtype=torch.complex128, requires_grad=True)
    hidden = x * 2
    hidden.register_hook(hook)
    with pytest.raises(NotImplementedError, match="fence"):
        selbp.select(hidden.abs().sum(1), torch.tensor([1, 2])).sum().backward()


def test_a_write_to_a_conjugate_reaches_the_gradient() -> None:
    def hook(gradient: Tensor) -> Tensor:
        own = gradient.clone()
        own.conj().mul_(0.5 + 1j)
        return own

    found = []
    for pick in (lambda losses: losses[[1, 2]], lambda losses: selbp.select(losses, torch.tensor([1, 2]))):
        x = torch.linspace(1, 2, 12, dtype=torch.float64).reshape(4, 3).to(torch.complex128).requires_grad_()
        hidden = x * (1 + 2j)
        hidden.register_hook(hook)
        pick(hidden.abs().sum(1)).sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0])
