import pytest
import torch

from selbp.ops import _gemm

HAS_ONEDNN = _gemm._agree(torch.float32)
PATHS = [
    pytest.param("mm", id="mm"),
    pytest.param(
        "onednn",
        id="onednn",
        marks=pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no mkldnn::_linear_pointwise for float32"),
    ),
]


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch):
    monkeypatch.setattr(_gemm, "_choice", {})
    monkeypatch.delenv("SELBP_GEMM", raising=False)


@pytest.mark.parametrize("wanted", PATHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "m,k,n", [(0, 5, 3), (5, 0, 3), (5, 3, 0), (1, 1, 1), (3, 700, 600), (129, 65, 257), (4, 4096, 64)]
)
def test_matches_float64(monkeypatch, wanted, dtype, m, k, n):
    monkeypatch.setenv("SELBP_GEMM", wanted)
    generator = torch.Generator().manual_seed(m * 31 + k)
    x = torch.randn(m, k, generator=generator).to(dtype)
    weight = torch.randn(n, k, generator=generator).to(dtype)
    bias = torch.randn(n, generator=generator).to(dtype)
    # |error| <= (k + 1) u_acc * sum |x||w| with float32 (float64) accumulation, + one rounding of the result
    scale = x.double().abs() @ weight.double().abs().t() + bias.double().abs()
    accumulate = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    for b in (None, bias):
        exact = x.double() @ weight.double().t() + (0 if b is None else b.double())
        got = _gemm.linear(x, weight, b)
        assert got.dtype == dtype and got.shape == (m, n)
        assert (
            (got.double() - exact).abs() <= (k + 2) * accumulate * scale + torch.finfo(dtype).eps * exact.abs()
        ).all()


@pytest.mark.parametrize("wanted", PATHS)
def test_any_strides(monkeypatch, wanted):
    monkeypatch.setenv("SELBP_GEMM", wanted)
    base = torch.randint(-3, 4, (260, 520)).float()  # small integers: every correct product is exact
    for x, weight in [
        (base.t(), base.t()),
        (base[:, ::2], base[::2, ::2]),
        (base[3:, 1:-1], base[:77, 1:-1]),
        (base[:, :1].expand(260, 300), base[:, :300]),
        (base[:1].expand(50, 520), base),
    ]:
        assert torch.equal(_gemm.linear(x, weight), (x.double() @ weight.double().t()).float())


def test_probe_chooses_once_per_dtype_and_only_a_clear_lead(monkeypatch):
    calls = []
    lead = {torch.float32: 1.2, torch.bfloat16: 1.3}
    monkeypatch.setattr(_gemm, "_agree", lambda dtype: True)
    monkeypatch.setattr(_gemm, "_measured_lead", lambda dtype: calls.append(dtype) or lead[dtype])
    for _ in range(3):
        assert not _gemm.uses_onednn(torch.float32) and _gemm.uses_onednn(torch.bfloat16)
        assert not _gemm.uses_onednn(torch.float64) and not _gemm.uses_onednn(torch.float16)
    assert calls == [torch.float32, torch.bfloat16]


def test_real_probe_agrees_with_its_own_timing():
    choice = _gemm.uses_onednn(torch.float32)
    assert choice in (True, False) and (HAS_ONEDNN or not choice)


@pytest.mark.parametrize("failure", [AttributeError, RuntimeError, NotImplementedError, "wrong"])
def test_falls_back_where_the_private_operator_is_missing_or_wrong(monkeypatch, failure):
    def broken(x, weight, bias=None):
        if failure == "wrong":
            return _gemm._torch_mm(x, weight, bias) + 1
        raise failure("no such operator")

    monkeypatch.setattr(_gemm, "_onednn", broken)
    monkeypatch.setenv("SELBP_GEMM", "onednn")
    assert not _gemm.uses_onednn(torch.float32)
    x = torch.randn(300, 300)
    assert torch.equal(_gemm.linear(x, x), x @ x.t())


def test_respects_the_mkldnn_switch_and_the_environment(monkeypatch):
    monkeypatch.setattr(_gemm, "_agree", lambda dtype: True)
    monkeypatch.setenv("SELBP_GEMM", "onednn")
    assert _gemm.uses_onednn(torch.float32)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not _gemm.uses_onednn(torch.float32)
    monkeypatch.setattr(_gemm, "_choice", {})
    monkeypatch.setenv("SELBP_GEMM", "fast")
    with pytest.raises(ValueError, match="SELBP_GEMM"):
        _gemm.uses_onednn(torch.float32)
