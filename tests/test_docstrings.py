"""Docstrings of public classes and functions have every section, and each example prints what it says."""

from __future__ import annotations

import doctest
import inspect
import pydoc
import re
import sys

import pytest

import selbp
import selbp.ops
import selbp.sampling

PUBLIC = {
    f"{room.__name__}.{name}": thing
    for room in (selbp.ops, selbp.sampling, selbp)
    for name in room.__all__
    if inspect.isclass(thing := getattr(room, name)) or inspect.isfunction(thing)
}
PUBLIC["selbp.selectors.Candidates"] = selbp.selectors.Candidates  # what a rule of the user's own is given
WITHOUT = ("selbp.GraphedStep",)  # needs a GPU; its example is that of selbp.cuda_graph


def examples_of(name: str) -> list[doctest.DocTest]:
    thing = PUBLIC[name]
    members = [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]
    found = doctest.DocTestFinder(recurse=False)
    documented = [member for member in members if (getattr(member, "__module__", None) or "").startswith("selbp")]
    globs = {"selbp": selbp, **vars(sys.modules[thing.__module__])}  # an example may use the names of its file
    tests = [test for member in documented for test in found.find(member, name, globs=globs)]
    return [test for test in tests if test.examples]


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_its_example_prints_what_it_says(name: str) -> None:
    tests = examples_of(name)
    assert tests or name in WITHOUT, "its docstring has no example"
    for test in tests:
        said: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
        assert not said, "".join(said)


def test_a_wrong_example_is_caught() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    said: list[str] = []
    doctest.DocTestRunner().run(wrong, out=said.append)
    assert said


def parameters_of(docstring: str) -> list[str]:
    """The names in a NumPy docstring's section Parameters."""
    section = docstring.split("Parameters\n----------\n", 1)[1]
    names: list[str] = []
    for line in section.splitlines():
        if line and not line[0].isspace():
            if set(line) == {"-"}:
                return names[:-1]  # the next section's title came last
            names += [name.strip(" *") for name in line.split(" : ")[0].split(",")]
    return names


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_its_sections_are_in_numpy_style_and_name_every_parameter(name: str) -> None:
    thing = PUBLIC[name]
    members = [thing, *(vars(thing).values() if inspect.isclass(thing) else ())]
    for member in members:
        if not (inspect.isclass(member) or inspect.isfunction(member)) or not member.__module__.startswith("selbp"):
            continue
        text = inspect.cleandoc(member.__doc__ or "")
        google = {"Args:", "Returns:", "Raises:", "Example:", "Examples:"} & {
            line.strip() for line in text.splitlines()
        }
        assert not google, f"{member.__qualname__}: {google}"
        if "Parameters\n----------\n" in text:
            takes = [parameter for parameter in inspect.signature(member).parameters if parameter != "self"]
            assert sorted(parameters_of(text)) == sorted(takes), member.__qualname__


def sections_wanted(thing: object) -> set[str]:
    """Those that every docstring has, and those of what a function takes, gives and raises."""
    if not inspect.isfunction(thing):
        return {"See Also"}
    takes = {"Parameters", "Raises"} if inspect.signature(thing).parameters else set()  # without any, nothing is wrong
    return {"See Also", "Returns"} | takes


def sections_of(docstring: str) -> dict[str, str]:
    """The text of each section of a NumPy docstring, by its title."""
    parts = re.split(r"^(\w[\w ]*)\n-{4,}\n", inspect.cleandoc(docstring), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_its_docstring_has_every_section(name: str) -> None:
    sections = sections_of(PUBLIC[name].__doc__ or "")
    missing = sections_wanted(PUBLIC[name]) - set(sections)
    assert not missing
    for line in re.findall(r"^(\S+) : ", sections["See Also"], re.M):
        other = PUBLIC.get(line) or pydoc.locate(line)
        assert other is not None and other is not PUBLIC[name], line


def test_a_missing_section_is_seen() -> None:
    def half(x: int) -> int:
        """Do it.

        Parameters
        ----------
        x : int

        Returns
        -------
        int
        """
        return x

    assert sections_wanted(half) - set(sections_of(half.__doc__)) == {"See Also", "Raises"}
