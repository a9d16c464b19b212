"""Which module may import which. Imports inside functions count; those under TYPE_CHECKING do not."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Lowest first: a room imports from rooms above it in this list, and from those in its own line.
ROOMS = [
    ("selbp", "selbp._numpy", "selbp._sources", "selbp._version", "selbp._native", "selbp._native_cuda", "selbp._load"),
    ("selbp._checks", "selbp._torch"),
    ("selbp.allocator", "selbp.triton_kernels"),
    ("selbp.types",),
    ("selbp.reference",),
    ("selbp.ops",),
    ("selbp.info",),
    ("selbp.selectors",),
    ("selbp.rows",),
    ("selbp.common",),
    ("selbp.cut",),
    ("selbp.sampling",),
    ("selbp.training",),
    ("selbp.integrations",),
    ("selbp_study", "selbp.__main__"),
]
FACADE = "selbp"  # its own imports make the public names: no room, and no module but the study's imports it


def module_files(root: Path) -> dict[str, Path]:
    """The modules of both packages by name; a stub stands for a compiled module."""
    files: dict[str, Path] = {}
    for package in ("selbp", "selbp_study"):
        for path in sorted([*(root / package).rglob("*.py"), *(root / package).rglob("*.pyi")]):
            parts = path.relative_to(root).with_suffix("").parts
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom | ast.Call]:
    """Imports, and calls of ``import_module``, outside ``if TYPE_CHECKING``."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from statements(other)
        elif isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        else:
            if isinstance(child, ast.Call) and ast.unparse(child.func).endswith("import_module"):
                yield child
            yield from statements(child)


def imports(name: str, source: str, known: set[str], package: bool) -> set[str]:
    """The modules of both packages that module ``name`` imports."""
    out: set[str] = set()
    for statement in statements(ast.parse(source)):
        if isinstance(statement, ast.Import):
            wanted = [alias.name for alias in statement.names]
        elif isinstance(statement, ast.Call):
            first = statement.args[0]
            wanted = [first.value] if isinstance(first, ast.Constant) and isinstance(first.value, str) else []
        else:
            parts = name.split(".") if package else name.split(".")[:-1]
            parts = parts[: len(parts) - statement.level + 1] if statement.level else []
            base = ".".join([*parts, *([statement.module] if statement.module else [])])
            # `from package import module` imports the module; of any other name, the package gives it.
            wanted = [full if (full := f"{base}.{alias.name}") in known else base for alias in statement.names]
        out |= {module for module in wanted if module in known}
    return out - {name}


def graph_of(root: Path) -> dict[str, set[str]]:
    files = module_files(root)
    known = set(files)
    return {name: imports(name, path.read_text(), known, path.stem == "__init__") for name, path in files.items()}


def room_of(module: str) -> int:
    """The place in ROOMS; raises KeyError for a module that is in no room."""
    for level, rooms in enumerate(ROOMS):
        if any(module == room or (room != FACADE and module.startswith(f"{room}.")) for room in rooms):
            return level
    if module.startswith("selbp.reference"):  # selbp/reference*.py
        return ROOMS.index(("selbp.reference",))
    raise KeyError(f"{module} is in no room: add it to ROOMS")


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a higher room, and of the facade by its own rooms."""
    out = []
    for module, wanted in graph.items():
        for other in sorted(wanted) if module != FACADE else []:
            own = module.split(".")[0]
            if room_of(other) > room_of(module) or (other == FACADE and own == "selbp"):
                out.append(f"{module} imports {other}")
    return out


def cycle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of modules that import each other, or an empty list."""
    done: set[str] = set()
    path: list[str] = []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph[module]):
            if found := visit(other):
                return found
        done.add(path.pop())
        return []

    return next((found for module in sorted(graph) if (found := visit(module))), [])


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return graph_of(ROOT)


def test_every_module_is_in_a_room(graph: dict[str, set[str]]) -> None:
    assert len(graph) > 100 and all(room_of(module) >= 0 for module in graph)


def test_no_room_imports_a_higher_one(graph: dict[str, set[str]]) -> None:
    assert not upward(graph)


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    assert not cycle(graph)


WRONG = {
    "upward": ("selbp.rows.layout", "from selbp.training import report", "selbp.training.report"),
    "in_a_function": ("selbp.rows.layout", "def f():\n    import selbp.cut.choice", "selbp.cut.choice"),
    "by_name": ("selbp.rows.layout", "importlib.import_module('selbp.cut.choice')", "selbp.cut.choice"),
    "relative": ("selbp.rows.layout", "from ..cut import choice", "selbp.cut.choice"),
    "study": ("selbp.training.step", "import selbp_study.arms", "selbp_study.arms"),
    "facade": ("selbp.training.step", "from selbp import select", "selbp"),
    "types_only": ("selbp.rows.layout", "if TYPE_CHECKING:\n    from selbp.training import report", ""),
}


@pytest.mark.parametrize(("module", "source", "imported"), WRONG.values(), ids=WRONG)
def test_a_wrong_import_is_found(graph: dict[str, set[str]], module: str, source: str, imported: str) -> None:
    wanted = imports(module, source, set(graph), package=False)
    assert wanted == ({imported} if imported else set())
    assert upward({**graph, module: wanted}) == ([f"{module} imports {imported}"] if imported else [])


def test_a_circle_is_found(graph: dict[str, set[str]]) -> None:
    planted = {**graph, "selbp.rows.layout": graph["selbp.rows.layout"] | {"selbp.rows.wrap"}}
    assert set(cycle(planted)) >= {"selbp.rows.layout", "selbp.rows.wrap"}
