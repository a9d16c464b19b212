"""Every public class and function shows an example in its docstring, and every example says what it prints."""

from __future__ import annotations

import doctest
import inspect
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
WITHOUT = (
    "selbp.sampling.",
    "selbp.cut.insert",
    "selbp.training.graphed",
)  # whose docstrings need not all have one; those that are there run


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
    assert tests or PUBLIC[name].__module__.startswith(WITHOUT), "its docstring has no example"
    for test in tests:
        said: list[str] = []
        doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append)
        assert not said, "".join(said)


def test_a_wrong_example_is_caught() -> None:
    wrong = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    said: list[str] = []
    doctest.DocTestRunner().run(wrong, out=said.append)
    assert said
