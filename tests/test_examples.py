"""Every program in examples/ runs as it stands, says what it did, and is short."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from support.processes import context

ROOT = Path(__file__).parents[1]
TOGETHER = [ROOT / "examples" / f"{name}.py" for name in ("07_ddp", "12_fsdp2")]  # two processes each
ALONE = [path for name in ("0[1-6]_*.py", "13_*.py") for path in sorted((ROOT / "examples").glob(name))]
EXAMPLES = ALONE + TOGETHER  # those of frameworks: tests/integrations
EXPECTED = {  # what the output must hold: figures that would differ if the library did the wrong thing
    "01_plain_loop": [r"full\n  accuracy 0\.[89]", r"random\n(.*k 32\n){3}", r"matching\n(.*\n){3}  accuracy 0\.[89]"],
    "02_custom_rule": [r"step 30: loss 0\.\d+, chosen of each class \[\d, \d, [1-9]\]"],
    "03_cut_in_a_vision_model": [r"16 of 64 images below", r"above .* 0\.0e\+00\n", r"below .* [1-9]\.\de-0[12]\n"],
    "04_fused_head": [r"gradient: \d\.\de-0[678]\n", r"step 4: loss \d\.\d+, trained on 64 of 256"],
    "05_batched_nnls": [r"error 0\.00\d\n", r"right in (4[89]\d|500) of 500", r"nnls_gram: .* \d\.\de-1\d\n"],
    "06_accumulation_and_amp": [r"step 2: 128 rows \(all\)", r"step 3: 32 rows \(chosen\)", r"step 5: 32 rows"],
    "13_chosen_before_the_forward": [r"random\n  accuracy 0\.9", r"most suspect samples: \[\d+, .*\n  accuracy 0\.9"],
}


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.stem)
def test_it_runs(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(path).main()
    said = capsys.readouterr().out
    assert "nan" not in said
    for pattern in EXPECTED[path.stem]:
        assert re.search(pattern, said), f"{pattern} is not in:\n{said}"


def _rank(rank: int, meeting: str, path: Path) -> None:
    """What torchrun would do, with a file to meet in instead of a port."""
    torch.set_num_threads(1)
    real = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend: real(  # type: ignore[assignment]
        backend, init_method=meeting, rank=rank, world_size=2
    )
    load(path).main()  # exits with 1 where the ranks' weights differ, or the loss does not fall


@pytest.mark.parametrize("path", TOGETHER, ids=lambda path: path.stem)
def test_two_processes_agree(path: Path, tmp_path: Path) -> None:
    if "fsdp" in path.stem and not hasattr(torch.cpu.Stream, "record_event"):
        pytest.skip("this torch's fully_shard does not run on a CPU")
    meeting = (tmp_path / "meeting").as_uri()
    ranks = [context().Process(target=_rank, args=(rank, meeting, path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_is_short_and_in_the_documentation(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80
    assert f"../examples/{path.name}\n" in (ROOT / "docs" / "examples.md").read_text()
    assert os.fspath(path.relative_to(ROOT)) in path.read_text(), "the docstring says how to run it"
