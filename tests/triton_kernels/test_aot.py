"""Every shipped configuration compiles to clean machine code for its architecture (no GPU needed)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.6", reason="needs Triton 3.6 or newer")
SCRIPT = pathlib.Path(__file__).parent / "aot.py"


def gate(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(arch, least, *parts):
    found = gate(arch, *parts)
    assert len(found) >= least
    broken = [f"{one['name']} ({one['target']}): {failure}" for one in found for failure in one["failures"]]
    assert not broken, "\n".join(broken)
    return found


def test_sm_90():
    found = check("sm_90", 60)
    alone, with_sketch = (one["per_logit"] for one in found if "per_logit" in one)
    assert 5.0 < alone <= 11.5 and alone < with_sketch <= 16.5


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942", "conservative"])
def test_every_product_on_other_architectures(arch):
    """Statistics, sketch and backward at their widest tiles, and the Gram matrix."""
    check(arch, 5, "bf16 plain exact", "gram bf16 bf16", "gram_small bf16 bf16")


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "least"), [("sm_80", 50), ("sm_100", 60), ("gfx942", 50), ("conservative", 150)])
def test_other_architectures(arch, least):
    check(arch, least)


def test_a_configuration_that_spills_fails_the_gate():
    (found,) = gate("mutant")
    assert any("spills" in failure for failure in found["failures"])
