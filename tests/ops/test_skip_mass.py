"""``skip_mass`` of ``linear_cross_entropy``: what is left out, how far the gradients are off, and when nothing is."""

import pytest
import torch
from support import bounds
from support.loss_cases import DTYPES
from torch._dynamo.testing import CompileCounterWithBackend

from selbp import ops
from selbp.ops import _gemm, _skipped_tiles

N, D, C = 40, 16, 1100  # five tiles, the last one of 76 classes
FORWARD, BACKWARD = torch.ops.selbp.linear_cross_entropy, torch.ops.selbp.linear_cross_entropy_backward
CASES = {
    "plain": {},
    "class weights": {"class_weight": torch.linspace(0.0, 2.0, C)},
    "soft cap": {"softcap": 6.0},
    "rows": {"rows": torch.tensor([3, 3, 0, 17, 31])},
    "all": {"class_weight": torch.linspace(0.5, 2.0, C), "softcap": 9.0, "rows": torch.arange(1, N, 2)},
}
cases = pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
limits = pytest.mark.parametrize("memory_limit", [None, 0], ids=["kept", "formed_again"])
skips = pytest.mark.parametrize("skip_mass", [0.02, 0.3, 1.0], ids=str)


def peaked(dtype=torch.float64):
    """A head of which each row finds the classes of few tiles likely: (features, weight, bias), and targets."""
    features, weight = torch.randn(N, D), torch.randn(C, D) / 2
    weight += 1.5 * torch.randn(5, D).repeat_interleave(_skipped_tiles.COLUMNS, 0)[:C]
    weight[:, 0] += 3.0  # a part that all classes share
    target = torch.softmax(features @ weight.t(), 1).multinomial(1)[:, 0]
    target[5], target[7] = -100, C - 1
    return [x.to(dtype).requires_grad_() for x in (features, weight, torch.randn(C))], target


def gradients(tensors, target, upstream, **options):
    loss = ops.linear_cross_entropy(*tensors, target, **options)
    return torch.autograd.grad(loss, tensors, upstream.to(loss.dtype))


def weighting():
    return torch.randn(N).index_fill_(0, torch.tensor([2, 11]), 0.0)


def allowed(tensors, target, upstream, skip_mass, class_weight=None, softcap=0.0, rows=None):
    """(N,) float64: e_i of the docstring."""
    features, weight, bias = (x.detach().double() for x in tensors)
    z = torch.nn.functional.linear(features, weight, bias)
    z = softcap * torch.tanh(z / softcap) if softcap else z
    y = target.clamp(min=0)
    rest = z.scatter(1, y[:, None], -torch.inf).logsumexp(1) - z.logsumexp(1)
    live = target >= 0
    live = live if rows is None else live & torch.zeros_like(live).index_fill_(0, rows, True)
    mass = torch.ones(N) if class_weight is None else class_weight[y]
    return torch.where(live, 2 * skip_mass * upstream.double().abs() * mass * rest.exp(), 0.0)


def check_bound(ours, exact, e, features, weight):
    """The three bounds of the docstring; the slack is float64's rounding."""
    d_features, d_weight, d_bias = (a - b for a, b in zip(ours, exact, strict=True))
    slack = 1 + 1e-9
    assert (d_features.norm(dim=1) <= e * weight.norm(dim=1).max() * slack + 1e-12).all()
    assert float(d_weight.norm(dim=1).sum()) <= float((e * features.norm(dim=1)).sum()) * slack + 1e-12
    assert float(d_bias.abs().sum()) <= float(e.sum()) * slack + 1e-12
    assert float(d_weight.abs().max()) > 1e-9  # something was left out


def test_the_head_is_peaked_enough_to_leave_out_most():
    """Otherwise the tests below would compare the exact path with itself."""
    (features, weight, bias), target = peaked()
    for skip_mass, least in ((0.02, 0.3), (0.3, 0.6), (1.0, 0.75)):
        table = FORWARD(features, weight, bias, target, None, None, -100, 0.0, 0.0, False, skip_mass)[8]
        assert table.shape == (N, 5) and float((table[target >= 0] >= 0).double().mean()) > least


@cases
@skips
@limits
def test_errors_stay_within_the_bound_in_norm(options, skip_mass, memory_limit):
    tensors, target = peaked()
    upstream = weighting()
    exact = gradients(tensors, target, upstream, **options)
    ours = gradients(tensors, target, upstream, skip_mass=skip_mass, memory_limit=memory_limit, **options)
    e = allowed(tensors, target, upstream, skip_mass, **options)
    check_bound(ours, exact, e, *(x.detach() for x in tensors[:2]))


@cases
@skips
@limits
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_entry_stays_within_the_bound_and_its_rounding(dtype, options, skip_mass, memory_limit):
    tensors, target = peaked(dtype)
    a = dict(zip(("features", "weight", "bias"), tensors, strict=True)) | {"target": target, "skip_mass": skip_mass}
    a |= {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0, "rows": None} | options
    loss, stats = ops.linear_cross_entropy(**a, memory_limit=memory_limit, return_statistics=True)
    upstream = weighting().to(loss.dtype)
    found = torch.autograd.grad(loss, tensors, upstream)
    with torch.no_grad():
        exact, _ = bounds.linear_cross_entropy(a, (loss, stats))
        bounds.linear_cross_entropy_gradients(a, stats.valid, exact, upstream, found)


def more_than_allowed(monkeypatch):
    real = _skipped_tiles.left_out
    monkeypatch.setattr(_skipped_tiles, "left_out", lambda sums, y, rest, skip: real(sums, y, rest, min(1, 20 * skip)))


def target_left_out(monkeypatch):
    real = _skipped_tiles.tiles_of

    def everything(table, n_classes, chosen, grad, target, class_weight):
        return real(table, n_classes, chosen, grad, (target + 256) % C, class_weight)

    monkeypatch.setattr(_skipped_tiles, "tiles_of", everything)
    monkeypatch.setattr(_skipped_tiles, "left_out", lambda sums, y, rest, skip: rest.new_zeros(len(rest), len(sums)))


@pytest.mark.parametrize("bug", [more_than_allowed, target_left_out], ids=lambda bug: bug.__name__)
def test_a_planted_bug_exceeds_the_bound(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        test_errors_stay_within_the_bound_in_norm({}, 0.02, None)


def test_what_is_left_out_is_spread_over_its_classes():
    """A row of the logits' gradient still sums to 0, and what all weights share does not move the features' gradient.

    So nothing is simply dropped.
    """
    (features, weight, bias), target = peaked()
    upstream, shared = weighting().double(), 50 * torch.randn(D, dtype=torch.float64)
    first = gradients([features, weight, bias], target, upstream, skip_mass=0.3)
    assert abs(float(first[2].sum())) < 1e-12
    torch.testing.assert_close(first[1].sum(0), torch.zeros(D, dtype=torch.float64), rtol=0, atol=1e-11)
    moved = (weight.detach() + shared).requires_grad_()
    second = gradients([features, moved, bias], target, upstream, skip_mass=0.3)
    torch.testing.assert_close(second[0], first[0], rtol=1e-9, atol=1e-10)


@limits
def test_products_are_of_the_rows_that_a_tile_matters_to(monkeypatch, memory_limit):
    tensors, target = peaked()
    product = _gemm.linear

    def count(skip_mass):
        loss = ops.linear_cross_entropy(*tensors, target, skip_mass=skip_mass, memory_limit=memory_limit)
        work = []
        monkeypatch.setattr(
            _gemm, "linear", lambda x, w, b=None: (work.append(x.shape[0] * x.shape[1] * len(w)), product(x, w, b))[1]
        )
        loss.sum().backward()
        monkeypatch.setattr(_gemm, "linear", product)
        return sum(work)

    counted = {skip_mass: count(skip_mass) for skip_mass in (0.0, 0.02, 0.3, 1.0)}
    assert counted[1.0] < counted[0.3] < counted[0.02] < 0.75 * counted[0.0]


def backward(tensors, target, outputs, left_out, upstream):
    _, lse, _, _, _, valid, others, logits, _ = outputs
    return BACKWARD(
        upstream.to(lse.dtype), *tensors, target, lse, others, valid, logits, left_out, None, None, -100, 0.0, 0.0,
        True, True, True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", [0.0, 0.15], ids=["nothing", "little"])
def test_where_little_can_be_left_out_the_gradients_are_the_exact_ones_to_the_bit(dtype, part):
    tensors, target = peaked(dtype)
    with torch.no_grad():
        outputs = FORWARD(*tensors, target, None, None, -100, 0.0, 0.0, True, 1.0)
        table = torch.where(torch.rand(outputs[8].shape) < part, outputs[8], _skipped_tiles.FORMED)
        upstream = weighting()
        ours = backward(tensors, target, outputs, table, upstream)
        exact = backward(tensors, target, outputs, table.new_empty(0, 0), upstream)
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


def test_a_flat_softmax_leaves_nothing_out():
    features, weight = torch.randn(N, D) / 100, torch.randn(C, D) / 100
    table = FORWARD(features, weight, None, torch.arange(N), None, None, -100, 0.0, 0.0, False, 0.1)[8]
    assert float((table >= 0).double().mean()) <= 0.2  # at most the short last tile


def test_with_label_smoothing_nothing_is_left_out():
    tensors, target = peaked()
    upstream = weighting()
    exact, ours = (gradients(tensors, target, upstream, label_smoothing=0.1, skip_mass=skip) for skip in (0.0, 1.0))
    assert all(torch.equal(a, b) for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("grad", [True, False], ids=["wanted", "not wanted"])
def test_the_forward_looks_only_where_a_gradient_is_wanted(grad, monkeypatch):
    tensors, target = peaked()
    seen, real = [], _skipped_tiles.left_out
    monkeypatch.setattr(_skipped_tiles, "left_out", lambda *a: (seen.append(1), real(*a))[1])
    with torch.set_grad_enabled(grad):
        ops.linear_cross_entropy(*tensors, target, skip_mass=0.1)
    assert len(seen) == grad


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@limits
def test_rows_that_are_not_finite_spoil_no_gradient(value, memory_limit):
    tensors, target = peaked()
    upstream, good = weighting(), torch.arange(N) != 9
    clean = [tensors[0].detach()[good].requires_grad_(), *tensors[1:]]
    with torch.no_grad():
        tensors[0][9, 3] = value
    options = {"skip_mass": 0.3, "memory_limit": memory_limit}
    ours = gradients(tensors, target, upstream, **options)
    expected = gradients(clean, target[good], upstream[good], **options)
    assert (ours[0][9] == 0).all()
    for a, b in zip((ours[0][good], *ours[1:]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_an_incoming_gradient_that_is_not_finite_spoils_what_it_spoils_without(value):
    tensors, target = peaked()
    upstream = weighting()
    upstream[4] = value
    ours, exact = (gradients(tensors, target, upstream, skip_mass=skip) for skip in (0.3, 0.0))
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def test_classes_masked_by_the_bias():
    """Of logit -inf: of no probability, as is the whole of a tile; one row has no other class than its target."""
    (features, weight, bias), target = peaked()
    with torch.no_grad():
        bias[256:600] = -torch.inf
        target[(target >= 256) & (target < 600)] = 0
    upstream = weighting()
    exact = gradients([features, weight, bias], target, upstream)
    ours = gradients([features, weight, bias], target, upstream, skip_mass=0.05)
    assert all(x.isfinite().all() for x in ours)
    check_bound(
        ours, exact, allowed([features, weight, bias], target, upstream, 0.05), features.detach(), weight.detach()
    )
    with torch.no_grad():
        bias[1:] = -torch.inf
    alone = gradients([features, weight, bias], torch.zeros_like(target), upstream, skip_mass=0.05)
    assert all((x == 0).all() for x in alone)


def test_derivatives_of_the_gradients_are_exact():
    tensors, target = peaked()

    def second(skip_mass):
        loss = ops.linear_cross_entropy(*tensors, target, skip_mass=skip_mass).sum()
        first = torch.autograd.grad(loss, tensors, create_graph=True)
        weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in first]
        return torch.autograd.grad(sum((g * w).sum() for g, w in zip(first, weights, strict=True)), tensors)

    for a, b in zip(second(0.3), second(0.0), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "formed_again"])
def test_opcheck(keep):
    tensors, target = peaked(torch.float32)
    arguments = (*tensors, target, None, None, -100, 0.0, 0.0, keep, 0.3)
    torch.library.opcheck(FORWARD.default, arguments, test_utils=["test_schema", "test_autograd_registration"])
    torch.library.opcheck(FORWARD.default, arguments, test_utils="test_faketensor")


def test_compiles_without_a_graph_break_and_once_for_all_sizes():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda f, w, y: ops.linear_cross_entropy(f, w, None, y, skip_mass=0.3, memory_limit=0).sum(),
        backend=counter,
        fullgraph=True,
        dynamic=True,
    )
    (features, weight, _), target = peaked()
    frames = []
    for n in (20, 30, 40):
        part = features.detach()[:n].requires_grad_()
        ours = torch.autograd.grad(compiled(part, weight, target[:n]), (part, weight))
        loss = ops.linear_cross_entropy(part, weight, None, target[:n], skip_mass=0.3, memory_limit=0)
        for a, b in zip(ours, torch.autograd.grad(loss.sum(), (part, weight)), strict=True):
            assert torch.equal(a, b)
        frames.append(counter.frame_count)
    assert frames[0] == frames[2]
