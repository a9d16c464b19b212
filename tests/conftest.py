"""What makes every test the same each time, and the devices that there are.

Every draw is seeded, test ids hold no address, and Hypothesis draws the same examples in each run: a test that passes
once passes always. ``HYPOTHESIS_PROFILE=random`` (as ``make test-all`` sets it) lets Hypothesis draw new examples.
"""

from __future__ import annotations

import os
import random
import re
import zlib

import numpy as np
import pytest
import torch

from selbp.training import pace

try:
    import hypothesis
except ImportError:  # the files that need it say so
    hypothesis = None

if hypothesis is not None:
    # A busy machine draws slowly: neither a deadline nor the health check of slow draws may fail a test there.
    calm = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
    hypothesis.settings.register_profile("ci", derandomize=True, database=None, **calm)
    # Said outright: where the variable CI is set, Hypothesis's own default is derandomized.
    hypothesis.settings.register_profile("random", derandomize=False, print_blob=True, **calm)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

ADDRESS = re.compile(r"0x[0-9a-f]|<function|object at\b", re.IGNORECASE)


def pytest_configure(config: pytest.Config) -> None:
    """Hand files out by name: by their number of tests, as xdist would, the long single tests come last and alone.

    No step of a test looks at a clock to warn by it.
    """
    pace.STEPS = 0
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def seed_everything(name: str) -> None:
    """Seed torch, NumPy and ``random`` from ``name``: the same in every process, unlike ``hash``."""
    seed = zlib.crc32(name.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Seed before a file is imported, by a constant: what it draws must not depend on the files before it."""
    if isinstance(collector, pytest.Module):
        seed_everything("import")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse an id that holds an address: workers of one run would collect different tests."""
    wrong = [item.nodeid for item in items if ADDRESS.search(item.nodeid)]
    if wrong:
        raise pytest.UsageError(f"an id must not hold an address, give the parameter one with ids=: {wrong[0]}")


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef, request: pytest.FixtureRequest) -> None:
    """Seed before a fixture that several tests share: its draws must not depend on the test that wants it first."""
    if fixturedef.scope != "function":
        seed_everything(f"{fixturedef.baseid}::{fixturedef.argname}")


@pytest.fixture(autouse=True)
def _seed(request: pytest.FixtureRequest) -> None:
    seed_everything(request.node.nodeid)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every device that an operator runs on; `-m "not gpu"` leaves the CPU."""
    return torch.device(request.param)
