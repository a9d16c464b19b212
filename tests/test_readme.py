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


def test_it_is_short_and_has_one_table_of_figures():
    assert len(README.splitlines()) < 120
    assert len(re.findall(r"^\|[-:| ]*-:[-:| ]*$", README, re.M)) == 1  # a column of figures is set to the right
