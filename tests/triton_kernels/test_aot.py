"""Every shipped configuration compiles to clean machine code for its architecture (no GPU needed)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton", minversion="3.6", reason="needs Triton 3.6 or newer")
SCRIPT = pathlib.Path(__file__).parent / "aot.py"


OTHERS = ("sm_80", "sm_100", "gfx942", "conservative")
WIDEST = "bf16 plain exact|gram bf16 bf16|gram_small bf16 bf16"  # of statistics, sketch and backward; the Gram matrix


def gate(*gates):
    """{gate: the reports of its variants}, from one process: see aot.py."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(SCRIPT), *gates], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            found.setdefault(json.loads(line)["gate"], []).append(json.loads(line))
    return found


@pytest.fixture(scope="module")
def reports():
    return gate("sm_90", "mutant", *(f"{arch}={WIDEST}" for arch in OTHERS))


def check(found, least):
    assert len(found) >= least
    broken = [f"{one['name']} ({one['target']}): {failure}" for one in found for failure in one["failures"]]
    assert not broken, "\n".join(broken)


def test_sm_90(reports):
    check(reports["sm_90"], 60)
    counted = {one["name"]: one["per_logit"] for one in reports["sm_90"] if "per_logit" in one}
    plain, smoothing, softcap = (
        counted.pop(f"statistics bf16 {option} exact") for option in ("plain", "smoothing", "softcap")
    )
    assert 5.0 < plain < smoothing < softcap and plain < counted.pop("sketch bf16 plain exact")
    assert not counted


@pytest.mark.parametrize("arch", OTHERS)
def test_every_product_on_other_architectures(reports, arch):
    check(reports[arch], 5)


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "least"), [("sm_80", 50), ("sm_100", 60), ("gfx942", 50), ("conservative", 150)])
def test_other_architectures(arch, least):
    check(gate(arch)[arch], least)


def test_a_configuration_that_spills_fails_the_gate(reports):
    (found,) = reports["mutant"]
    assert any("spills" in failure for failure in found["failures"])
