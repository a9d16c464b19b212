"""Which tile of the table the statistics of a head take: by options, a bias and the number of classes."""

import ast
import pathlib

import pytest
import torch

from selbp.triton_kernels import configs


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")


def pick(n_classes, bias=False, softcap=False, smooth=False, **options):
    return configs.statistics_tile(
        torch.device("cpu"), torch.bfloat16, n_classes, bias=bias, softcap=softcap, smooth=smooth, **options
    )


@pytest.mark.parametrize("option", ["smooth", "softcap"])
def test_an_option_alone_keeps_the_plain_tile_where_the_classes_fill_it(option):
    plain, tile = pick(128256), pick(128256, **{option: True})
    assert (tile.rows, tile.columns, tile.quarters) == (plain.rows, plain.columns, True)
    assert pick(128256, weighted=True) == plain  # weights are read with smoothing only
    for other in (pick(50257, **{option: True}), pick(128256, bias=True, **{option: True})):
        assert other.columns < plain.columns and not other.quarters


@pytest.mark.parametrize("second", ["softcap", "weighted"])
def test_smoothing_with_more_takes_a_smaller_tile(second):
    assert pick(128256, smooth=True, **{second: True}) == configs.TABLE["sm_90"]["statistics_everything"][2]
    assert not pick(128256, smooth=True, **{second: True}).quarters


def test_no_kernel_calls_itself():
    """Triton 3.4, which torch 2.8 brings, looks through what a kernel calls without end."""
    for path in pathlib.Path(configs.__file__).parent.glob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                called = {node.func.id for node in ast.walk(function) if _is_plain_call(node)}
                assert function.name not in called, f"{path.name}: {function.name}"


def test_every_launch_fuses_products_and_sums():
    """Triton 3.10 turns that off by default, with which no tile's registers and no roofline were measured."""
    launches = 0
    for path in pathlib.Path(configs.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                launches += 1
                said = {option.arg: ast.unparse(option.value) for option in node.keywords}
                assert said.get("enable_fp_fusion") == "True", f"{path.name}: {ast.unparse(node.func)}"
    assert launches >= 18


def _is_plain_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
