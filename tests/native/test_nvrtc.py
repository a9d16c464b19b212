"""The kernels by NVRTC, where there is no GPU: they compile, within the built core's budgets, and are found again."""

import pytest
import torch
from test_cuda_build import BUDGETS, parse

from selbp.ops import _nvrtc, _nvrtc_core

KINDS = [("float", 80), ("float", 90), ("float", 100), ("double", 90), ("choice", 80), ("choice", 90), ("choice", 100)]


@pytest.fixture(scope="module")
def compiler():
    try:
        return _nvrtc.Compiler()
    except _nvrtc.Unavailable as missing:
        pytest.skip(f"needs NVRTC: {missing}")


def within_budgets(said):
    found = {kernel: used for (_, kernel), used in parse(said).items()}
    over = {k: used for k, used in found.items() if any(u > b for u, b in zip(used, BUDGETS[k], strict=True))}
    assert not over
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("unit", "capability"), KINDS, ids=lambda value: str(value))
def test_the_kernels_compile_within_the_budgets_of_the_built_core(compiler, unit, capability):
    code = compiler.compile(unit, compiler.target(capability))
    assert code.image[:4] == b"\x7fELF" and code.names.keys() == _nvrtc.expressions(unit).keys()
    assert all(name.encode() in code.image for name in code.names.values())
    wanted = {f"match_blocks<{unit}, {where}>" for where in ("shared", "global")}
    if unit == "choice":
        wanted = {f"{name}_kernel" for name in _nvrtc.CHOICES}
    assert within_budgets(code.said).keys() == wanted


def test_what_is_compiled_is_kept_and_what_is_broken_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("SELBP_CACHE", str(tmp_path / "cache"))

    class Stub:
        version, calls = "13.0", 0

        def compile(self, element, target):
            self.calls += 1
            return _nvrtc.Code(b"\x7fELF\n" + element.encode(), {"shared": "a", "global": "b"}, "said")

    stub = Stub()
    first = _nvrtc.compiled(stub, "float", "sm_90")
    again = _nvrtc.compiled(stub, "float", "sm_90")
    assert stub.calls == 1 and again == first._replace(said="")
    for change in (("double", "sm_90"), ("float", "sm_80")):
        _nvrtc.compiled(stub, *change)
    assert stub.calls == 3
    (file,) = (tmp_path / "cache").glob("match-float-sm_90-*")
    for broken in (file.read_bytes()[:-1], b"", b"{}\n", b"\xff\n", file.read_bytes().replace(b"ELF", b"elf")):
        before = stub.calls
        file.write_bytes(broken)
        assert _nvrtc.compiled(stub, "float", "sm_90").image == first.image and stub.calls == before + 1
    stub.version = "13.1"
    _nvrtc.compiled(stub, "float", "sm_90")
    monkeypatch.setattr(_nvrtc, "PROGRAM", _nvrtc.PROGRAM + "// changed\n")
    _nvrtc.compiled(stub, "float", "sm_90")
    assert stub.calls == before + 3
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".bin"]


def test_a_disk_that_takes_nothing_costs_a_compilation_only(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELBP_CACHE", str(tmp_path / "file" / "below"))
    code = _nvrtc.Code(b"image", {"shared": "a", "global": "b"}, "")
    stub = type("Stub", (), {"version": "13.0", "compile": lambda self, element, target: code})()
    assert _nvrtc.compiled(stub, "float", "sm_90") == code


def test_a_device_newer_than_the_compiler_gets_ptx(monkeypatch):
    newest = object.__new__(_nvrtc.Compiler)
    newest.version = "13.0"
    monkeypatch.setattr(_nvrtc.Compiler, "architectures", lambda self: [75, 80, 90, 100])
    assert [newest.target(c) for c in (80, 90, 103)] == ["sm_80", "sm_90", "compute_100"]
    with pytest.raises(_nvrtc.Unavailable, match="sm_70"):
        newest.target(70)


def test_every_header_that_the_kernels_include_is_handed_over():
    texts = _nvrtc.sources()
    for name, text in texts.items():
        for line in text.splitlines():
            if line.startswith("#include") and "cooperative_groups" not in line:
                assert line.split()[1].strip('"<>') in texts, (name, line)


@pytest.mark.parametrize(("status", "stays"), [(2, False), (900, False), (901, False), (209, True), (1, True)])
def test_an_error_that_passes_is_not_kept(monkeypatch, status, stays):
    """A first use in a capture, or without memory left, must not mean the host for the rest of the process."""

    class Made(_nvrtc_core.Loaded):
        statuses = []

        def __init__(self, *what):
            self._driver = type("Driver", (), {"cuGetErrorString": staticmethod(lambda status, text: 0)})
            self._check(self.statuses.pop(0))

    for name in ("Core", "Choice"):
        monkeypatch.setattr(_nvrtc_core, name, Made)
    for number, make in ((False, _nvrtc_core.core), (None, _nvrtc_core.choice)):
        Made.statuses = [status, 0, 0]
        key = [f"a device of {status}", number][: 2 - (number is None)]
        first, second, third = make(*key), make(*key), make(*key)
        assert f"({status})" in first and second is third
        assert second == first if stays else isinstance(second, Made)


def test_without_a_driver_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: (_ for _ in ()).throw(RuntimeError("none")))
    assert _nvrtc_core.core.__wrapped__(0, False) == "none"
