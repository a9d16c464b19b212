"""``python -m benchmarks [names] [--quick]``: every suite, its tables, and with --check a verdict on its limits."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.harness import Case, Clock, Row, run_case
from benchmarks.roofline import Roofline

SUITES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser("python -m benchmarks", description="Ours, peers and the roofline, in one run.")
    parse.add_argument("names", nargs="*", metavar="name", help=f"suites to run: {', '.join(SUITES)} (all)")
    parse.add_argument("--quick", action="store_true", help="the small cases only, for a first look")
    parse.add_argument("--list", action="store_true", help="print the cases and leave")
    parse.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parse.add_argument("--out", type=Path, metavar="DIR", help="write results.json, .csv, .md and .png there")
    parse.add_argument("--clock", choices=("wall", "process"), default="wall", help="process: CPU time of all threads")
    parse.add_argument("--threads", type=int, default=1, help="threads of torch and of the native kernels (1)")
    parse.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parse.add_argument("--seconds", type=float, default=2.0, help="to spend on each case (2)")
    parse.add_argument("--seed", type=int, default=0)
    parse.add_argument("--check", action="store_true", help="exit with 1 where a limit is missed")
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; the exit status is 1 where ``--check`` finds a missed limit, 2 for bad input."""
    options = parser().parse_args(arguments)
    unknown = sorted(set(options.names) - set(SUITES))
    if unknown:
        print(f"benchmarks: no suite {', '.join(unknown)}; there are: {', '.join(SUITES)}", file=sys.stderr)
        return 2
    if options.device.type == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda, but torch sees no CUDA device", file=sys.stderr)
        return 2
    chosen = {name: _cases(name, options.quick, options.filter) for name in options.names or SUITES}
    if options.list:
        print("\n".join(f"{name}: {case.name}" for name, cases in chosen.items() for case in cases))
        return 0
    return _run(chosen, options)


def _cases(name: str, quick: bool, text: str) -> list[Case]:
    cases = importlib.import_module(f"benchmarks.bench_{name}").CASES
    return [case for case in cases if text in case.name and (case.quick or not quick)]


def _run(chosen: dict[str, list[Case]], options: argparse.Namespace) -> int:
    torch.set_num_threads(options.threads)
    roofline = Roofline(options.device, options.threads, options.quick)
    clock = Clock(options.clock, options.device)
    results: dict[str, list[Row]] = {}
    for name, cases in chosen.items():
        for case in cases:
            print(f"{name}: {case.name}", file=sys.stderr, flush=True)
            seconds = options.seconds / (4 if options.quick else 1)
            results.setdefault(name, []).extend(run_case(case, roofline, clock, seconds, options.seed))
        print(report.markdown(name, results.get(name, [])), flush=True)
    rates = roofline.table()
    print("Measured in this run: " + ", ".join(f"{key} {value:.1f}" for key, value in rates.items()))
    if options.out:
        about = report.machine(options.device, options.threads, clock.kind)
        print("Written: " + ", ".join(str(file) for file in report.write(options.out, results, about, rates)))
    missed = [f"{row.case} against {row.contender}" for rows in results.values() for row in rows if row.passed is False]
    if missed:
        print("Limits missed: " + "; ".join(missed))
    return 1 if missed and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
