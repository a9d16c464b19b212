"""Operators under autocast do what torch's own would: linear layers in its dtype, everything else in full precision."""

import pytest
import torch
import torch.nn.functional as F

from selbp import ops

torch.manual_seed(5)
H, W, C, Y = torch.randn(12, 16), torch.randn(9, 16), torch.randn(9), torch.randint(0, 9, (12,))
LOW = [torch.bfloat16, torch.float16]
COMPILED = [False, True]


def maybe_compiled(function, compiled):
    torch._dynamo.reset()
    return torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function


@pytest.mark.parametrize("compiled", COMPILED, ids=["eager", "compiled"])
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by_name", [False, True], ids=["function", "operator"])
def test_the_loss_and_its_gradients_are_a_linear_layers(hidden, by_name, compiled):
    def ours(f, w, c):
        with torch.autocast("cpu", torch.bfloat16):
            if by_name:
                return torch.ops.selbp.linear_cross_entropy(f, w, c, Y, None, None, -100, 0.0, 0.0, False, 0.0)[0]
            return ops.linear_cross_entropy(f, w, c, Y)

    def exactly(f, w, c):  # the operands that autocast makes, and then no rounding
        rounded = [x.bfloat16().double() for x in (f, w, c)]
        return F.cross_entropy(F.linear(*rounded), Y, reduction="none")

    results = []
    for function in (maybe_compiled(ours, compiled), exactly):
        leaves = [H.to(hidden).requires_grad_(), W.clone().requires_grad_(), C.clone().requires_grad_()]
        loss = function(*leaves)
        results.append((loss, *torch.autograd.grad(loss.sum(), leaves)))
    for a, x, leaf in zip(results[0][1:], results[1][1:], leaves, strict=True):
        assert a.dtype == leaf.dtype
        # Logits, residuals and gradients are each rounded to 8 bits; a logit of 12 moves p by a twentieth of its size.
        torch.testing.assert_close(a.double(), x.double(), rtol=0, atol=2**-5 * float(x.abs().max()))
    assert results[0][0].dtype == torch.float32
    torch.testing.assert_close(results[0][0].double(), results[1][0], rtol=2**-6, atol=2**-4)


@pytest.mark.parametrize("low", LOW, ids=str)
@pytest.mark.parametrize("hidden", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_cast_is_what_a_linear_layer_casts(hidden, low):
    """Bit for bit the operator on operands cast by hand."""
    projections = ops.sketch_projections(9, 17, (3, 4))
    calls = {
        "loss": lambda f, w, c: ops.linear_cross_entropy(f, w, c, Y),
        "statistics": lambda f, w, c: torch.stack([*ops.linear_cross_entropy_statistics(f, w, c, Y)][:4]),
        "sketch": lambda f, w, c: ops.sketch(f.view(3, 4, 16), w, c, Y.view(3, 4), projections),
    }
    f = H.to(hidden)
    for name, call in calls.items():
        with torch.autocast("cpu", low):
            ours = call(f, W, C)
        assert torch.equal(ours, call(f.to(low), W.to(low), C.to(low))), name


def test_float64_is_left_as_it_is():
    f, w, c = H.double(), W.double(), C.double()
    expected = ops.linear_cross_entropy(f, w, c, Y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.linear_cross_entropy(f, w, c, Y), expected)
        assert F.linear(f, w, c).dtype == torch.float64


R, Z = torch.randn(12, 9), torch.randn(12, 9)
K = ops.gradient_gram(R, H)
B = K.mean(1)
FULL = {
    "cross_entropy_statistics": lambda: torch.stack([*ops.cross_entropy_statistics(Z, Y, H)][:4]),
    "residual": lambda: ops.residual(Z, Y, Z.logsumexp(1)),
    "gradient_gram": lambda: ops.gradient_gram(R, H),
    "mean_gradient": lambda: ops.mean_gradient(R, H).head_weight,
    "mean_gradient inner": lambda: ops.mean_gradient(R, H).inner,
    "match": lambda: ops.match(K, B, B.mean(), 4).weights,
    "matching_residual": lambda: ops.matching_residual(R, H, ops.match(K, B, B.mean(), 4)),
    "nnls": lambda: ops.nnls(H, H[:, 0]),
    "nnls_gram": lambda: ops.nnls_gram(K, B),
    "sketch_gram": lambda: ops.sketch_gram(H.view(3, 4, 16)),
}


@pytest.mark.parametrize("compiled", COMPILED, ids=["eager", "compiled"])
@pytest.mark.parametrize("call", FULL.values(), ids=FULL.keys())
def test_the_others_keep_full_precision(call, compiled):
    """Bit for bit what they are outside: a product inside that autocast reached would be rounded to 8 bits."""
    expected = call()

    def inside():
        with torch.autocast("cpu", torch.bfloat16):
            return call()

    ours = maybe_compiled(inside, compiled)()
    assert ours.dtype == expected.dtype and torch.equal(ours, expected)


@pytest.mark.parametrize(
    "call",
    [
        lambda r, h: ops.gradient_gram(r, h),
        lambda r, h: ops.mean_gradient(r, h).inner,
        lambda r, h: ops.matching_residual(r, h, ops.match(K, B, B.mean(), 4)),
    ],
    ids=["gradient_gram", "mean_gradient", "matching_residual"],
)
def test_float32_residuals_and_low_features(call):
    """What a head's forward under autocast leaves: widened, as the operators widen anyway."""
    low = H.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours = call(R, low)
    assert torch.equal(ours, call(R, low.float()))
    with pytest.raises(TypeError, match="features must have the dtype of residual, float32, got bfloat16"):
        call(R, low)


def test_the_backward_inside_autocast():
    """A backward that runs while autocast is on computes as one outside."""
    gradients = []
    for inside in (False, True):
        w = W.clone().requires_grad_()
        loss = ops.linear_cross_entropy(H, w, None, Y).sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(loss, w)[0])
    assert torch.equal(*gradients)


def test_second_derivatives_inside_autocast():
    gradients = []
    for inside in (False, True):
        w = W.clone().requires_grad_()
        (first,) = torch.autograd.grad(ops.linear_cross_entropy(H, w, None, Y).sum(), w, create_graph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients.append(torch.autograd.grad(first.square().sum(), w)[0])
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)
