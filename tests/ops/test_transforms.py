"""Derivatives of every order and mode of ``linear_cross_entropy``, against torch's own, and the others' constants."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

from selbp import ops

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
OPTIONS = {"plain": {}, "smoothed and capped": {"label_smoothing": 0.1, "softcap": 3.0}, "weighted": {"weighted": True}}


def functions(weighted=False, label_smoothing=0.0, softcap=0.0):
    """Ours, eager torch, and (features, weight, bias) in float64."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    target = torch.randint(0, 5, (6,), generator=generator)
    target[1] = -100
    class_weight = draw(5).exp() if weighted else None

    def ours(f, w, b):
        return ops.linear_cross_entropy(
            f, w, b, target, class_weight=class_weight, label_smoothing=label_smoothing, softcap=softcap
        )

    def eager(f, w, b):
        z = F.linear(f, w, b)
        z = softcap * torch.tanh(z / softcap) if softcap else z
        return F.cross_entropy(z, target, class_weight, reduction="none", label_smoothing=label_smoothing)

    return ours, eager, (draw(6, 4), draw(5, 4), draw(5))


def total(fn):
    return lambda *inputs: fn(*inputs).square().sum()


def penalty(fn, inputs):
    inputs = [x.clone().requires_grad_() for x in inputs]
    gradients = torch.autograd.grad(total(fn)(*inputs), inputs, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in gradients), inputs)


def dual(fn, inputs):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(fn(forward_ad.make_dual(inputs[0], inputs[0].cos()), *inputs[1:]))[:2]


ALL = (0, 1, 2)
DERIVATIVES = {
    "jvp": lambda fn, x: jvp(fn, x, tuple(t.cos() for t in x)),
    "dual numbers": dual,
    "vjp": lambda fn, x: vjp(fn, *x)[1](torch.arange(6.0, dtype=torch.float64)),
    "grad": lambda fn, x: grad(total(fn), ALL)(*x),
    "jacfwd": lambda fn, x: jacfwd(fn, ALL)(*x),
    "jacrev": lambda fn, x: jacrev(fn, ALL)(*x),
    "hessian": lambda fn, x: hessian(total(fn), ALL)(*x),
    "jacrev of jacrev": lambda fn, x: jacrev(jacrev(total(fn), ALL), ALL)(*x),
    "jacfwd of jacfwd": lambda fn, x: jacfwd(jacfwd(total(fn), ALL), ALL)(*x),
    "jacrev of jacfwd": lambda fn, x: jacrev(jacfwd(total(fn), ALL), ALL)(*x),
    "third": lambda fn, x: jacrev(jacrev(grad(total(fn), 2), 2), 2)(*x),
    "gradient penalty": penalty,
    "upstream depends on the weight": lambda fn, x: grad(
        lambda w: grad(lambda v: (fn(x[0], v, x[2]) * w.sum()).sum())(w).square().sum()
    )(x[1]),
    "vmap": lambda fn, x: vmap(fn, (0, None, None))(torch.stack([x[0], 2 * x[0]]), *x[1:]),
    "vmap of grad": lambda fn, x: vmap(grad(total(fn), ALL), (0, None, None))(torch.stack([x[0], -x[0]]), *x[1:]),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES.keys())
def test_derivatives_are_torchs(derivative, options):
    ours, eager, inputs = functions(**options)
    found, exact = tree_leaves(derivative(ours, inputs)), tree_leaves(derivative(eager, inputs))
    assert any(x.abs().max() > 1e-3 for x in exact)
    for a, x in zip(found, exact, strict=True):
        torch.testing.assert_close(a, x, rtol=1e-9, atol=1e-11)


def test_gradcheck_of_both_orders_and_modes():
    ours, _, inputs = functions(label_smoothing=0.1, softcap=3.0)
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(ours, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(ours, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("mode", ["forward", "second"])
def test_rows_without_a_gradient_are_constants(mode):
    """Ignored, not among ``rows``, or with a NaN in it: no tangent, no gradient, and the others' are right."""
    _, _, (f, w, b) = functions()
    target, rows = torch.tensor([0, -100, 2, 3, 4, 0]), torch.tensor([0, 2, 2, 1, 5])
    f[5, 1] = float("nan")
    keep = torch.tensor([0, 2])

    def ours(f, w, b):
        return ops.linear_cross_entropy(f, w, b, target, rows=rows)

    def eager(f, w, b):
        return F.cross_entropy(F.linear(f[keep], w, b), target[keep], reduction="none")

    if mode == "forward":
        tangents = torch.ones_like(f), torch.ones_like(w), torch.ones_like(b)
        (loss, tangent), (exact, slope) = jvp(ours, (f, w, b), tangents), jvp(eager, (f, w, b), tangents)
        torch.testing.assert_close(loss[keep], exact)
        torch.testing.assert_close(tangent[keep], slope)
        assert tangent[[1, 3, 4, 5]].eq(0).all() and loss[1] == 0
    else:
        found = penalty(lambda *x: ours(*x)[keep], (f, w, b))
        for a, x in zip(found, penalty(eager, (f, w, b)), strict=True):
            torch.testing.assert_close(a, x)


def test_by_the_operators_name():
    """The same where torch.ops.selbp is called directly."""
    _, eager, (f, w, b) = functions()
    target = torch.tensor([0, 1, 2, 3, 4, 0])

    def ours(w):
        return torch.ops.selbp.linear_cross_entropy(f, w, b, target, None, None, -100, 0.0, 0.0, False, 0.0)[0]

    exact = jacfwd(lambda w: F.cross_entropy(F.linear(f, w, b), target, reduction="none"))(w)
    torch.testing.assert_close(jacfwd(ours)(w), exact)
    torch.testing.assert_close(jacrev(ours)(w), exact)


def test_float32_and_bfloat16_tangents():
    _, eager, inputs = functions()
    ours, _, _ = functions()
    exact = jvp(eager, inputs, tuple(t.cos() for t in inputs))[1]
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):  # eps times a sum of a dozen terms of 1
        narrow = tuple(x.to(dtype) for x in inputs)
        found = jvp(ours, narrow, tuple(t.cos() for t in narrow))[1]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, rtol=tolerance, atol=tolerance)
