"""The examples with frameworks run as they are, and learn."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
FRAMEWORKS = {
    "08_huggingface.py": ("transformers", "accelerate"),
    "09_trl.py": ("trl",),
    "10_accelerate.py": ("accelerate",),
    "11_lightning.py": ("lightning",),
}


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_example_runs_as_it_is(name, tmp_path):
    for package in FRAMEWORKS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    code = (EXAMPLES / name).read_text()
    assert len(code.splitlines()) < 80
    done = subprocess.run([sys.executable, EXAMPLES / name], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    loss = float(re.findall(r"loss (\d+\.\d+)", done.stdout)[-1])
    start = {"08_huggingface.py": 4.6, "09_trl.py": 4.6, "10_accelerate.py": 1.95, "11_lightning.py": 1.6}[name]
    assert loss < 0.8 * start, done.stdout
