"""The fused head and loss: value, gradients, rows without a gradient, and what the backward computes."""

from importlib import import_module

import pytest
import torch
from support.loss_cases import DTYPES, assert_error, compute_dtype

from selbp import ops
from selbp.ops import _gemm

OPTIONS = [{}, {"label_smoothing": 0.1}, {"softcap": 3.0}, {"label_smoothing": 0.2, "softcap": 4.0}]


def head(n, d, n_classes, dtype, bias=True):
    features, weight = torch.randn(n, d).to(dtype), (torch.randn(n_classes, d) * 2 / d**0.5).to(dtype)
    target = torch.randint(n_classes, (n,))
    tensors = [features, weight, torch.randn(n_classes).to(dtype) if bias else None]
    return [t if t is None else t.requires_grad_() for t in tensors], target


def eager(features, weight, bias, target, class_weight=None, softcap=0.0, **options):
    logits = torch.nn.functional.linear(features, weight, bias)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return torch.nn.functional.cross_entropy(logits, target, class_weight, reduction="none", **options)


def gradients(loss, tensors, upstream):
    return torch.autograd.grad(loss, [t for t in tensors if t is not None], upstream.to(loss.dtype))


def small_tiles(monkeypatch):
    """Tiles of 64 classes, so that small heads take several."""
    monkeypatch.setattr(import_module("selbp.ops._logit_pass"), "_TILE_BYTES", 1)
    cpu = import_module("selbp.ops._linear_cross_entropy_cpu")
    monkeypatch.setattr(cpu, "_TILE_BYTES", dict.fromkeys((2, 4, 8), 1))


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("memory_limit", [None, 0], ids=["kept", "formed_again"])
def test_matches_eager_torch_over_tiles(memory_limit, dtype, weighted, options, monkeypatch):
    small_tiles(monkeypatch)
    for n, d, n_classes, bias in ((1, 3, 1, True), (7, 5, 70, False), (40, 16, 150, True)):
        tensors, target = head(n, d, n_classes, dtype, bias)
        if n > 1:
            target[1] = -100
        class_weight = torch.rand(n_classes).to(dtype) if weighted else None
        upstream = torch.randn(n)
        limit = {"memory_limit": memory_limit}
        loss = ops.linear_cross_entropy(*tensors, target, class_weight=class_weight, **limit, **options)
        assert loss.dtype == compute_dtype(dtype)
        ours = gradients(loss, tensors, upstream)
        theirs_loss = eager(*tensors, target, class_weight, **options)
        theirs = gradients(theirs_loss, tensors, upstream.to(dtype))
        wide = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
        exact_loss = eager(*wide, target, None if class_weight is None else class_weight.double(), **options)
        exact = gradients(exact_loss, wide, upstream.double())
        eps = torch.finfo(dtype).eps
        assert_error("loss", loss.detach(), theirs_loss.detach(), exact_loss.detach(), eps)
        for name, a, e, x in zip(("features", "weight", "bias"), ours, theirs, exact, strict=False):
            assert a.dtype == dtype
            assert_error(name, a, e, x, eps)


@pytest.mark.parametrize(
    "memory_limit,products",
    [(None, [40, 3]), (0, [3, 40, 3])],  # logits and features' gradient of 3 rows; the weight's gradient has C rows
    ids=["kept", "formed_again"],
)
def test_only_rows_with_a_gradient_are_computed(monkeypatch, memory_limit, products):
    tensors, target = head(64, 16, 40, torch.float64)
    chosen = torch.tensor([3, 17, 40, 3])
    loss = ops.linear_cross_entropy(*tensors, target, memory_limit=memory_limit)
    rows = []
    product = _gemm.linear
    monkeypatch.setattr(_gemm, "linear", lambda x, w, b=None: (rows.append(max(x.shape[0], 0)), product(x, w, b))[1])
    ours = gradients(loss[chosen].sum(), tensors, torch.ones(()))
    assert rows == products
    expected = gradients(eager(*tensors, target)[chosen].sum(), tensors, torch.ones(()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert (ours[0].abs().sum(1) != 0).nonzero()[:, 0].tolist() == [3, 17, 40]


def test_rows_outside_the_index_set_are_constants():
    tensors, target = head(12, 5, 9, torch.float64)
    rows = torch.tensor([2, 7, 7])
    ours = gradients(ops.linear_cross_entropy(*tensors, target, rows=rows), tensors, torch.ones(12))
    keep = torch.zeros(12, dtype=torch.bool).index_fill_(0, rows, True)
    expected = gradients(eager(*tensors, target)[keep].sum(), tensors, torch.ones(()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gpu_fallback_computes_the_same():
    module = import_module("selbp.ops.linear_cross_entropy")
    (features, weight, bias), target = head(12, 5, 9, torch.float64)
    with torch.no_grad():
        features[4, 0] = torch.nan
        packed = module._pack(features, weight, bias, target, None, None, -100, 0.1, 0.0, False, 0.0)
        forward = module._cpu.forward(*packed)
        for a, b in zip(module._cuda.forward(*packed)[:7], forward[:7], strict=True):
            torch.testing.assert_close(a[forward[5]], b[forward[5]])
        for rows in (None, torch.tensor([1, 4, 1, 8])):
            arguments = (
                torch.randn(12, dtype=torch.float64),
                features,
                weight,
                bias,
                target,
                forward[1],
                forward[6],
                forward[5],
                forward[7],
                forward[8],
                None,
                rows,
                -100,
                0.1,
                0.0,
                True,
                True,
                True,
            )
            packed = module._torch.pack_backward(*arguments)
            for a, b in zip(module._cuda.backward(*packed), module._cpu.backward(*packed), strict=True):
                torch.testing.assert_close(a, b)


def test_rows_that_are_not_finite_spoil_no_gradient():
    tensors, target = head(8, 5, 9, torch.float32)
    with torch.no_grad():
        tensors[0][3] = torch.nan
        tensors[0][5] = torch.inf
    loss, stats = ops.linear_cross_entropy(*tensors, target, return_statistics=True)
    assert stats.valid.tolist() == [True, True, True, False, True, False, True, True]
    ours = gradients(loss, tensors, torch.ones(8))
    good = stats.valid
    clean = [tensors[0].detach()[good].requires_grad_(), *tensors[1:]]
    expected = gradients(eager(*clean, target[good]), clean, torch.ones(6))
    assert (ours[0][~good] == 0).all()
    torch.testing.assert_close(ours[0][good], expected[0])
    for a, b in zip(ours[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_statistics_are_those_of_the_operator(dtype):
    tensors, target = head(20, 6, 70, dtype)
    loss, stats = ops.linear_cross_entropy(*tensors, target, return_statistics=True, label_smoothing=0.1)
    alone = ops.linear_cross_entropy_statistics(*tensors, target, label_smoothing=0.1)
    for a, b in zip(stats, alone, strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert loss.requires_grad and torch.equal(loss, stats.loss)


def test_confident_rows_keep_their_gradient():
    n_classes, q = 50, torch.logspace(-9, -2, 8, dtype=torch.float64)
    weight = torch.zeros(n_classes, 1, dtype=torch.float64)
    weight[0] = 1
    features = torch.log((1 - q) / q * (n_classes - 1))[:, None]  # logit of class 0; the others' are 0
    features, weight = features.float().requires_grad_(), weight.float()
    loss = ops.linear_cross_entropy(features, weight, None, torch.zeros(8, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss.sum(), features)
    z = features.detach().double()[:, 0]
    expected = -(n_classes - 1) / ((n_classes - 1) + z.exp())
    assert float(((grad[:, 0] - expected) / expected).abs().max()) < 1e-5


@pytest.mark.parametrize("memory_limit,products", [(None, 1), (0, 2)], ids=["kept", "formed_again"])
def test_gradients_not_asked_for_are_not_computed(monkeypatch, memory_limit, products):
    (features, weight, bias), target = head(30, 8, 40, torch.float32)
    loss = ops.linear_cross_entropy(features.detach(), weight, bias.detach(), target, memory_limit=memory_limit)
    calls = []
    product = _gemm.linear
    monkeypatch.setattr(_gemm, "linear", lambda *a: (calls.append(1), product(*a))[1])
    loss.sum().backward()
    assert len(calls) == products and weight.grad is not None and bias.grad is None


def saved_sizes(*arguments, **options):
    """The loss, and how many elements each tensor has that the forward saved."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        loss = ops.linear_cross_entropy(*arguments, **options)
    return loss, sizes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_kept_where_the_limit_has_room_for_them(dtype):
    tensors, target = head(30, 7, 41, dtype)
    size = 30 * 41 * tensors[0].element_size()
    for limit, kept in ((None, True), (size, True), (size - 1, False), (0, False)):
        assert (30 * 41 in saved_sizes(*tensors, target, memory_limit=limit)[1]) == kept
    with torch.no_grad():
        assert saved_sizes(*tensors, target)[1] == []


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("rows", [None, torch.tensor([3, 0, 3, 17])], ids=["all", "some"])
def test_kept_logits_give_what_formed_ones_give(options, rows, monkeypatch):
    small_tiles(monkeypatch)
    tensors, target = head(20, 9, 150, torch.float64)
    upstream = torch.randn(20).double()
    upstream[4] = 0.0
    losses = [
        ops.linear_cross_entropy(*tensors, target, rows=rows, memory_limit=limit, **options) for limit in (None, 0)
    ]
    assert torch.equal(*losses)
    for _ in range(2):  # the first backward leaves the logits as they are
        kept, formed = (torch.autograd.grad(x, tensors, upstream, retain_graph=True) for x in losses)
        for a, b in zip(kept, formed, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_kept_logits_that_are_not_finite_spoil_no_other_row(value):
    tensors, target = head(12, 5, 9, torch.float32)
    with torch.no_grad():
        tensors[0][4, 2] = value
    loss, sizes = saved_sizes(*tensors, target)
    assert 12 * 9 in sizes
    kept = torch.autograd.grad(loss, tensors, torch.ones(12))
    formed = torch.autograd.grad(ops.linear_cross_entropy(*tensors, target, memory_limit=0), tensors, torch.ones(12))
    for a, b in zip(kept, formed, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b)


def test_kept_logits_under_autocast_are_of_its_type():
    tensors, target = head(12, 5, 9, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept, formed = (ops.linear_cross_entropy(*tensors, target, memory_limit=limit) for limit in (None, 0))
    for a, b in zip(*(torch.autograd.grad(x, tensors, torch.ones(12)) for x in (kept, formed)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "limit,error,words",
    [
        (-1, ValueError, "memory_limit must be at least 0 bytes or None, got -1"),
        (1.5, TypeError, "memory_limit must be an int, got 1.5"),
        (True, TypeError, "memory_limit must be an int, got True"),
        ("1G", TypeError, "memory_limit must be an int, got '1G'"),
    ],
    ids=["negative", "float", "bool", "text"],
)
def test_a_limit_that_is_none(limit, error, words):
    tensors, target = head(3, 4, 5, torch.float32)
    with pytest.raises(error, match=words):
        ops.linear_cross_entropy(*tensors, target, memory_limit=limit)


def test_no_rows():
    tensors, target = head(0, 3, 5, torch.float32)
    loss = ops.linear_cross_entropy(*tensors, target)
    assert loss.shape == (0,)
    loss.sum().backward()
    assert (tensors[1].grad == 0).all() and tensors[0].grad.shape == (0, 3)


@pytest.mark.parametrize("rows", [None, torch.tensor([1, 4])])
@pytest.mark.parametrize("keep", [True, False], ids=["kept", "formed_again"])
def test_opcheck(rows, keep):
    tensors, target = head(9, 4, 5, torch.float32)
    arguments = (*tensors, target, torch.rand(5), rows, -100, 0.1, 5.0, keep, 0.0)
    torch.library.opcheck(torch.ops.selbp.linear_cross_entropy.default, arguments)
    _, lse, _, _, _, valid, others, logits, left_out = torch.ops.selbp.linear_cross_entropy(*arguments)
    backward = (
        torch.randn(9),
        *(t.detach() for t in tensors),
        target,
        lse.detach(),
        others.detach(),
        valid,
        logits,
        left_out,
        torch.rand(5),
        rows,
        -100,
        0.1,
        5.0,
        True,
        False,
        True,
    )
    torch.library.opcheck(torch.ops.selbp.linear_cross_entropy_backward.default, backward)


def test_compiles_without_a_graph_break():
    tensors, target = head(9, 4, 5, torch.float32)

    def step(features, weight, bias):
        loss, stats = ops.linear_cross_entropy(features, weight, bias, target, return_statistics=True)
        return loss[:4].sum(), stats.gradient_norm

    expected, norm = step(*tensors)
    ours, our_norm = torch.compile(step, fullgraph=True)(*tensors)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(our_norm, norm)
    for a, b in zip(gradients(ours, tensors, ours), gradients(expected, tensors, expected), strict=True):
        torch.testing.assert_close(a, b)
