"""What a run of the benchmarks writes agrees with what it measured, and what was published with both."""

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import report
from benchmarks.harness import Case, Clock, Row, Unavailable, run_case
from benchmarks.roofline import Roofline

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def written(tmp_path, ticker):
    contenders = {
        "ours": ticker.work,
        "twice": lambda s: ticker.work(2 * s),
        "peer": Unavailable("peer is not installed"),
    }
    case = Case("sleep", lambda device: (0.002,), contenders, nbytes=1 << 20, limits={"twice": 0.1}, rounds=2)
    roofline = Roofline(CPU, threads=1, quick=True)
    results = {"nap": run_case(case, roofline, Clock("wall", CPU), seconds=0.01)}
    files = report.write(tmp_path, results, report.machine(CPU, 1, "wall"), roofline.table())
    assert {"bench.json", "bench.csv", "bench.md", "bench_all.md", "bench.svg"} <= {file.name for file in files}
    return tmp_path


def test_files(written):
    whole = json.loads((written / "bench.json").read_text())
    assert [row["contender"] for row in whole["rows"]] == ["ours", "twice", "peer"]
    assert whole["rows"][2]["median"] is None and whole["machine"]["torch"] == torch.__version__
    with (written / "bench.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == 3
    text = (written / "bench_all.md").read_text()
    assert "MISSED" in text and "peer is not installed" in text
    about, results = report.load(written / "bench.json")
    assert report.summary(about, results) == (written / "bench.md").read_text()
    assert "<svg" in (written / "bench.svg").read_text()


def inconsistencies(results):
    """Rows whose ratio is not their median over ours, or whose percentiles do not enclose it: edited or mixed up."""
    found = []
    for suite, rows in results.items():
        for group in report._by_case(rows).values():
            for row in group:
                exact = row.median / group[0].median
                if exact > 0 and not math.isclose(row.ratio, exact, rel_tol=1e-9):
                    found.append(
                        f"{suite}: {row.case}: {row.contender}: ratio {row.ratio:.4g}, its times say {exact:.4g}"
                    )
                if not math.isnan(row.median) and not row.p20 <= row.median <= row.p80:
                    found.append(f"{suite}: {row.case}: {row.contender}: a median outside its percentiles")
    return found


def test_a_planted_ratio_is_found(written):
    _, results = report.load(written / "bench.json")
    assert not inconsistencies(results)
    results["nap"][1].ratio *= 1.5
    (found,) = inconsistencies(results)
    assert found.startswith("nap: sleep: twice: ratio")
    results["nap"][1].ratio /= 1.5
    results["nap"][0].median *= 0.5
    assert len(inconsistencies(results)) == 2  # outside its percentiles, and the other's ratio is off


def test_the_short_table_takes_the_case_in_the_middle_and_tells_of_losses():
    def case(name, *ratios):
        rows = [Row(name, "ours", 1.0, 1.0, 1.0, 1, 1.0, 0.5), Row(name, "GEMM alone", 0.1, ratio=0.1)]
        return [*rows, *(Row(name, f"peer of {ratio}", ratio, ratio=ratio) for ratio in ratios)]

    def line(*cases):
        text = report.summary(report.machine(CPU, 1, "wall"), {"s": [row for rows in cases for row in rows]})
        return next(line for line in text.splitlines() if line.startswith("| s |"))

    fast, slow, middle = case("fast", 4.0, 8.0), case("slow", 0.5), case("middle", 2.0, 3.0)
    shown = line(fast, slow, middle, case("nobody"))
    assert "| middle | 1 s | 50% | peer of 2.0 | 0.5 | 0.25 – 2; slower in 1 of 3 |" in shown
    assert "| slow |" in line(fast, slow)  # of two in the middle the worse


def test_publishing_replaces_what_is_between_the_markers(tmp_path):
    table, readme = tmp_path / "bench.md", tmp_path / "README.md"
    table.write_text("| new |\n")
    readme.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    report.publish(table, readme)
    assert readme.read_text() == f"before\n{report.START}\n| new |\n{report.END}\nafter\n"
    readme.write_text("no markers")
    with pytest.raises(ValueError, match="README.md must have"):
        report.publish(table, readme)


def test_what_was_published_is_what_was_measured():
    folder = ROOT / "benchmarks" / "results"
    about, results = report.load(folder / "bench.json")
    assert not inconsistencies(results)
    assert set(results) <= set(command.SUITES)
    assert report.summary(about, results) == (folder / "bench.md").read_text()
