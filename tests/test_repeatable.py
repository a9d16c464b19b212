"""The tests are the same each time: their ids, their draws, and what they wait for."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch

TESTS = Path(__file__).parent
PROFILE = os.environ.get("HYPOTHESIS_PROFILE", "ci")

# What makes a test depend on more than its code, by a pattern of the text.
CHANCE = {
    "a generator without a seed": r"\brandom\.Random\(\)|\bdefault_rng\(\)|SystemRandom|\.seed\(\)|os\.urandom|uuid4",
    "a port that may be taken": r"\bgetsockname\(|MASTER_PORT(?!\": \"0\")|tcp://",  # 0: the system chooses
    "a hash that differs between processes": r"(?<![\w.])hash\(",
    "less than ten minutes for what a busy machine does slowly": r"\btimeout=\d{1,2}\b|\btimeout=[1-5]\d\d\b",
    "a real clock": r"\btime\.(time|monotonic|perf_counter|process_time)\(",
}


@pytest.fixture
def ours(request: pytest.FixtureRequest):
    """The module conftest.py beside this file."""
    return request.config.pluginmanager.get_plugin(str(TESTS / "conftest.py"))


def test_ids_are_those_of_another_process(request: pytest.FixtureRequest) -> None:
    """Another hash seed and other addresses: workers that differ in an id refuse to run at all."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    layout = [shutil.which("setarch"), "-R"] if shutil.which("setarch") else []
    if layout and subprocess.run([*layout, "true"], capture_output=True).returncode != 0:
        layout = []  # forbidden in some containers
    hash_seed = "1" if outside.get("PYTHONHASHSEED") != "1" else "2"
    collect = "--collect-only -q -p no:cacheprovider --assert=plain".split()  # asserts that are rewritten change no id
    command = [*layout, sys.executable, "-m", "pytest", *collect, str(TESTS)]
    env = {**outside, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run(command, cwd=TESTS.parent, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    there = set(done.stdout.splitlines())
    here = [item.nodeid for item in request.session.items if item.nodeid.startswith("tests/")]
    assert len(there) > 1000
    assert [name for name in here if name not in there] == []


@pytest.mark.parametrize(
    "name",
    ["test_x[<function f at 0x7f]", "test_x[0x55d0]", "test_x[<object object at somewhere]"],
    ids=["cut function", "address", "object"],
)
def test_an_id_with_an_address_is_refused(ours, name: str) -> None:
    ours.pytest_collection_modifyitems([SimpleNamespace(nodeid="test_x[<lambda>0-top at 2]")])
    with pytest.raises(pytest.UsageError, match="ids="):
        ours.pytest_collection_modifyitems([SimpleNamespace(nodeid=name)])


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), np.random.rand(), random.random()


def test_every_draw_is_seeded_by_the_tests_name(ours, request: pytest.FixtureRequest) -> None:
    assert torch.initial_seed() == zlib.crc32(request.node.nodeid.encode())
    found = draws()
    ours.seed_everything(request.node.nodeid)
    assert draws() == found
    ours.seed_everything("another")
    assert all(a != b for a, b in zip(draws(), found, strict=True))


@pytest.fixture(scope="module")
def shared() -> tuple[float, float, float]:
    return draws()


def test_a_shared_fixture_draws_the_same_whoever_wants_it_first(ours, shared: tuple[float, ...]) -> None:
    ours.seed_everything(f"{Path(__file__).relative_to(TESTS.parent)}::shared")
    assert draws() == shared


def test_examples_are_the_same_each_time_and_never_late(request: pytest.FixtureRequest) -> None:
    """Of every property that was collected here; ``HYPOTHESIS_PROFILE=random`` draws anew, as `make test-all` does."""
    functions = [getattr(item, "obj", None) for item in request.session.items]
    known = [
        function._hypothesis_internal_use_settings
        for function in functions
        if hasattr(function, "_hypothesis_internal_use_settings")
    ]
    for settings in [hypothesis.settings(), *known]:
        assert settings.deadline is None and settings.derandomize == (PROFILE == "ci")
        assert PROFILE != "ci" or settings.database is None
    random_profile = hypothesis.settings.get_profile("random")
    assert random_profile.print_blob and not random_profile.derandomize and random_profile.deadline is None


@pytest.mark.parametrize("what", CHANCE)
def test_no_test_takes_a_chance(what: str) -> None:
    pattern = re.compile(CHANCE[what])
    found = [
        f"{path.relative_to(TESTS)}:{number}"
        for path in sorted(TESTS.rglob("*.py"))
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


@pytest.mark.parametrize(
    ("what", "line"),
    [
        ("a generator without a seed", "chance = random.Random()"),
        ("a generator without a seed", "np.random.default_rng()"),
        ("a port that may be taken", "port = probe.getsockname()[1]"),
        ("a hash that differs between processes", "torch.manual_seed(hash(name))"),
        ("less than ten minutes for what a busy machine does slowly", "subprocess.run(command, timeout=120)"),
        ("a real clock", "deadline = time.monotonic() + 60"),
    ],
    ids=["random", "numpy", "port", "hash", "limit", "clock"],
)
def test_the_patterns_find_what_they_are_for(what: str, line: str) -> None:
    assert re.search(CHANCE[what], line)
    assert not re.search(CHANCE[what], "chance = random.Random(0), np.random.default_rng(3), x.seed(1), timeout=600")
