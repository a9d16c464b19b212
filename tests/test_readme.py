"""What the README prints works as printed."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_example_runs_as_printed(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    exec(compile(example, "README.md", "exec"), {})  # noqa: S102
    said = capsys.readouterr().out
    figures = re.findall(r"[-+]?\d+\.\d+", said)
    assert len(figures) == 3 and "nan" not in said, said


def test_its_commands_and_files_exist():
    rules = re.findall(r"^([a-z][a-z0-9 -]*):", (ROOT / "Makefile").read_text(), re.M)
    targets = {target for rule in rules for target in rule.split()}
    assert {"demo", "test"} <= set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", README, re.M)) <= targets
    for link in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / link).exists(), link


def test_its_table_is_the_one_that_the_demo_wrote():
    assert (ROOT / "benchmarks" / "results" / "demo.md").read_text().strip() in README


def test_its_benchmarks_are_those_that_were_published():
    name = "benchmarks/results/bench.md"
    between = README.split(f"<!-- {name} -->")[1].split(f"<!-- end of {name} -->")[0]
    assert between.strip() == (ROOT / name).read_text().strip()
