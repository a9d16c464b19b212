"""``skip_mass`` of linear_cross_entropy on the kernels, in the interpreter: what rows leave out, and all bounds."""

import importlib

import pytest
import torch
from support import bounds, triton_guard
from support import kernel_cases as cases

from selbp import reference
from selbp.ops import _skipped_tiles
from selbp.triton_kernels import skipped
from selbp.triton_kernels.configs import Tile
from selbp.triton_kernels.statistics import statistics
from selbp.types import BatchStatistics

operator = importlib.import_module("selbp.ops.linear_cross_entropy")
N, D, C = 150, 23, 700  # more than two blocks of rows, three tiles, the last one of 188 classes
NAMES = ("features", "weight", "bias")
CASES = {
    "plain": {},
    "class weights": {"class_weight": torch.linspace(0.0, 2.0, C)},
    "soft cap": {"softcap": 6.0},
    "rows": {"rows": torch.tensor([3, 3, 0, 141, 17, 31, 3])},
    "all": {"class_weight": torch.linspace(0.5, 2.0, C), "softcap": 9.0, "rows": torch.arange(N - 1, 0, -2)},
}
NONE = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0}
every = pytest.mark.parametrize("option", CASES)
TILES = [Tile(32, 32, 16), Tile(32, 32, 16, descriptor=True), Tile(32, 64, 16, quarters=True)]


@pytest.fixture(autouse=True)
def _chunks_of_one_tile(monkeypatch):
    monkeypatch.setattr(skipped, "CHUNK_BYTES", 1)


def peaked(dtype=torch.float32, n=N, d=D, n_classes=C):
    """A head of which each row finds the classes of few tiles likely: (features, weight, bias), and targets."""
    generator = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    features, weight = normal(n, d), normal(n_classes, d) / 2
    weight += 1.5 * normal(-(-n_classes // 256), d).repeat_interleave(256, 0)[:n_classes]
    bias = normal(n_classes)
    target = torch.softmax(features @ weight.t() + bias, 1).multinomial(1, generator=generator)[:, 0]
    target[5 % n] = -100
    target[7 % n] = n_classes - 1
    return [x.to(dtype) for x in (features, weight, bias)], target


def weighting(n=N):
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(5))
    return upstream.index_fill_(0, torch.tensor([2, 11]) % n, 0.0)


def run(tensors, target, upstream, skip_mass, needs=(True, True, True), rows=None, **options):
    """The CUDA implementation's outputs and gradients."""
    class_weight, *rest = (NONE | options).values()
    found = operator._cuda.forward(*operator._pack(*tensors, target, class_weight, rows, *rest, False, skip_mass))
    return found, backward(tensors, target, upstream, found, needs, rows, **options)


def backward(tensors, target, upstream, found, needs=(True, True, True), rows=None, **options):
    class_weight, *rest = (NONE | options).values()
    kept = found[1], found[6], found[5], found[7], found[8]
    return operator._cuda.backward(
        *operator._torch.pack_backward(upstream, *tensors, target, *kept, class_weight, rows, *rest, *needs)
    )


def specified(tensors, target, upstream, found, dtype, rows=None, **options):
    """The gradients in ``dtype``, with the mean over a tile in place of what the table of ``found`` leaves out."""
    features, weight, bias = (x.to(dtype) for x in tensors)
    options = {k: x.to(dtype) if isinstance(x, torch.Tensor) else x for k, x in options.items()}
    z = torch.nn.functional.linear(features, weight, bias)
    stats = reference.cross_entropy_statistics(z, target, features, **options)
    live = stats.valid if rows is None else stats.valid & torch.zeros(N, dtype=torch.bool).index_fill(0, rows, True)
    scale = torch.where(live, upstream.to(dtype), 0.0)[:, None]
    r = torch.where(live[:, None], reference.residual(z, target, stats.lse, **options), 0.0) * scale
    y = target.clamp(min=0)
    mass = 1.0 if options.get("class_weight") is None else options["class_weight"][y][:, None]
    sizes = torch.tensor([len(part) for part in weight.split(256)])
    mean = (found[8].to(dtype) * mass * scale / sizes).repeat_interleave(sizes, 1)
    r = torch.where((found[8] >= 0).repeat_interleave(sizes, 1), mean, r)
    return r @ weight, r.t() @ torch.where(live[:, None], features, 0.0), r.sum(0)


def check(dtype, option, skip_mass=0.3):
    """Gradients of what is formed and left out are exact, and all of it is within the bounds of the docstring."""
    options = CASES[option]
    tensors, target = peaked(dtype)
    found, got = run(tensors, target, weighting(), skip_mass, **options)
    table, p_rest, y = (x[target >= 0] for x in (found[8], found[6], target))
    assert float((table >= 0).double().mean()) > 0.1  # something is left out
    assert (table.clamp(min=0).sum(1) <= skip_mass * p_rest * (1 + 1e-5)).all()
    assert (table.gather(1, y[:, None] // 256) < 0).all()
    spec, eager = (
        specified(tensors, target, weighting(), found, kind, **options) for kind in (torch.float64, torch.float32)
    )
    unit = torch.finfo(dtype).eps if dtype != torch.float32 else 0.0
    for name, a, b, c in zip(NAMES, got, spec, eager, strict=True):
        size = float(b.abs().max())
        ours, theirs = (float((x.double() - b).abs().max()) / size for x in (a, c))
        assert ours <= 2.0 * theirs + 4 * cases.ULP + unit, f"{name}: {ours:.2e}, eager's {theirs:.2e}"
    a = dict(zip(NAMES, tensors, strict=True)) | {"target": target, "skip_mass": skip_mass, "rows": None}
    a |= NONE | options
    exact, _ = bounds.linear_cross_entropy(a, (found[0], BatchStatistics(*found[:6])))
    bounds.linear_cross_entropy_gradients(a, found[5], exact, weighting(), got)


@every
def test_every_option(option):
    check(torch.float32, option)


@pytest.mark.parametrize("dtype", cases.DTYPES[1:], ids=str)
def test_dtypes(dtype):
    check(dtype, "all")


@pytest.mark.parametrize("skip_mass", [0.02, 1.0], ids=str)
def test_parts(skip_mass):
    check(torch.float32, "plain", skip_mass)


def target_left_out(monkeypatch):
    real = _skipped_tiles.left_out_of
    monkeypatch.setattr(_skipped_tiles, "left_out_of", lambda share, y, *rest: real(share, (y + 256) % C, *rest))


def more_than_allowed(monkeypatch):
    real = _skipped_tiles.left_out_of
    monkeypatch.setattr(_skipped_tiles, "left_out_of", lambda *a: real(*a[:-1], min(1.0, 50 * a[-1])))


@pytest.mark.parametrize("bug", [target_left_out, more_than_allowed], ids=lambda bug: bug.__name__)
def test_a_rule_that_leaves_out_too_much_is_caught(bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check(torch.float32, "plain", 0.02)


def check_shares(tile, softcap):
    (features, weight, bias), target = peaked()
    bias = bias + torch.linspace(-20.0, 20.0, C)  # ever greater logits: the reference moves from part to part
    for given in (bias, None):
        z = torch.nn.functional.linear(features.double(), weight.double(), None if given is None else given.double())
        other = reference.soft_cap(z, softcap).scatter(1, target.clamp(min=0)[:, None], -torch.inf)
        p = torch.nn.functional.pad(torch.softmax(other, 1), (0, -C % 128)).unflatten(1, (-1, 128)).sum(2)
        _, shares = statistics(features, weight, given, target, softcap=softcap, tile=tile, splits=3, share_of=128)
        live = target >= 0
        torch.testing.assert_close(shares[live].double(), p[live], rtol=2e-5, atol=1e-30)


@pytest.mark.parametrize("tile", TILES, ids=["pointer", "descriptor", "sliced"])
@pytest.mark.parametrize("softcap", [0.0, 6.0])
def test_the_shares_of_tiles(tile, softcap):
    check_shares(tile, softcap)


def test_the_table_is_that_of_the_cpu():
    tensors, target = peaked()
    arguments = (*tensors, target, None, None, -100, 0.0, 0.0, False, 0.3)
    ours = operator._cuda.forward(*operator._pack(*arguments))[8]
    cpu = torch.ops.selbp.linear_cross_entropy(*arguments)[8]
    assert ours.is_contiguous() and ours.dtype == cpu.dtype
    assert torch.equal(ours >= 0, cpu >= 0)
    torch.testing.assert_close(ours[target >= 0], cpu[target >= 0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 256), (64, 32, 512), (65, 8, 257)], ids=str)
def test_odd_shapes(shape):
    n, d, n_classes = shape
    tensors, target = peaked(torch.float32, *shape)
    target[:] = torch.arange(n) % n_classes
    got = run(tensors, target, torch.ones(n), 0.5)[1]
    exact = run(tensors, target, torch.ones(n), 0.0)[1]
    e = 2 * 0.5 * torch.ones(n, dtype=torch.float64)
    features, weight = tensors[0].double(), tensors[1].double()
    off = [(a - b).double() for a, b in zip(got, exact, strict=True)]
    assert (off[0].norm(dim=1) <= e * weight.norm(dim=1).max() + 1e-5).all()
    assert float(off[1].norm(dim=1).sum()) <= float((e * features.norm(dim=1)).sum()) + 1e-5
    assert float(off[2].abs().sum()) <= float(e.sum()) + 1e-5
    assert abs(float(got[2].sum())) < n * 2.0**-20  # what is left out is spread, not dropped


@pytest.mark.parametrize("rows", [torch.empty(0, dtype=torch.int64), torch.tensor([5])], ids=["none", "an ignored one"])
def test_rows_without_a_gradient(rows):
    tensors, target = peaked()
    _, got = run(tensors, target, weighting(), 0.3, rows=rows)
    for ours, x in zip(got, tensors, strict=True):
        assert ours.shape == x.shape and not ours.any()


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_each_gradient_alone(needs):
    tensors, target = peaked()
    _, every = run(tensors, target, weighting(), 0.3)
    _, some = run(tensors, target, weighting(), 0.3, needs)
    for a, b, need in zip(some, every, needs, strict=True):
        assert torch.equal(a, b) if need else a.numel() == 0


def test_chunks_make_no_difference(monkeypatch):
    tensors, target = peaked()
    _, small = run(tensors, target, weighting(), 0.3)
    monkeypatch.setattr(skipped, "CHUNK_BYTES", 2 * 256 * N * 4)
    _, large = run(tensors, target, weighting(), 0.3)
    assert torch.equal(small[1], large[1]) and torch.equal(small[2], large[2])
    torch.testing.assert_close(small[0], large[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_rows_that_are_not_finite_spoil_no_gradient(value):
    tensors, target = peaked()
    good = torch.arange(N) != 9
    _, clean = run(tensors, target.where(good, -100), weighting(), 0.3)
    tensors[0][9, 3] = value
    _, got = run(tensors, target, weighting(), 0.3)
    assert (got[0][9] == 0).all()
    assert all(torch.equal(a, b) for a, b in zip(got, clean, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_an_incoming_gradient_that_is_not_finite_spoils_what_it_spoils_without(value):
    tensors, target = peaked()
    upstream = weighting().index_fill_(0, torch.tensor([4]), value)
    (_, ours), (_, exact) = (run(tensors, target, upstream, skip) for skip in (0.3, 0.0))
    for a, b in zip(ours, exact, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


def test_classes_masked_by_the_bias():
    """Of logit -inf, a whole tile among them; of no probability, so that leaving them out changes nothing."""
    (features, weight, bias), target = peaked()
    bias[256:512] = -torch.inf
    target = torch.where((target >= 256) & (target < 512), 0, target)
    found, got = run([features, weight, bias], target, weighting(), 1e-6)
    _, exact = run([features, weight, bias], target, weighting(), 0.0)
    assert (found[8][target >= 0, 1] == 0).all()
    for a, b in zip(got, exact, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_with_label_smoothing_the_exact_path_runs(monkeypatch):
    tensors, target = peaked()
    monkeypatch.setattr(skipped, "backward", None)
    found, got = run(tensors, target, weighting(), 0.3, label_smoothing=0.1)
    _, exact = run(tensors, target, weighting(), 0.0, label_smoothing=0.1)
    assert found[8].numel() == 0 and all(torch.equal(a, b) for a, b in zip(got, exact, strict=True))


def test_the_products_are_of_the_listed_rows():
    tensors, target = peaked()
    upstream = torch.zeros(N).index_fill_(0, torch.arange(40), 1.0)
    found, _ = run(tensors, target, upstream, 0.3)
    triton_guard.traffic.reset()
    backward(tensors, target, upstream, found, (False, True, False))
    formed = ((found[8] < 0) & (upstream != 0)[:, None] & found[5][:, None]).sum(0)
    assert 0 < int(formed.max()) <= 40 and int(formed.min()) < 40
    logits = sum(64 * 256 * 32 for count in formed if count)  # one block of rows, the depth padded
    product = sum(-(-int(count) // 32) * 32 * 64 * 64 * parts for count, parts in zip(formed, (4, 4, 3), strict=True))
    assert triton_guard.traffic.dot_flops == 2 * (logits + product)
