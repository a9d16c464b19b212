"""``python -m benchmarks [names]``: every suite in one run, its tables, and with --check a verdict on its limits."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import selbp
from benchmarks import peers, report
from benchmarks.harness import FAILED, Case, Clock, Row, run_case
from benchmarks.memory import measure_peaks
from benchmarks.roofline import Roofline

SUITES = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "measurements" / "benchmarks.md"  # which has the table too


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parse = argparse.ArgumentParser(
        "python -m benchmarks",
        description="Ours, peers and this machine's roofline, in one run of about half an hour; --quick for a first "
        "look. Times are medians of interleaved rounds. `python -m benchmarks integrations` measures whole steps in "
        "the loops of other frameworks, and has a --help of its own.",
    )
    parse.add_argument("names", nargs="*", metavar="name", help=f"suites to run: {', '.join(SUITES)} (all)")
    parse.add_argument("--quick", action="store_true", help="the small cases only, for a first look")
    parse.add_argument("--list", action="store_true", help="print the cases and leave")
    parse.add_argument("--peers", action="store_true", help="print which peers are installed, and leave")
    parse.add_argument("--filter", default="", metavar="TEXT", help="only cases whose name contains TEXT")
    parse.add_argument("--out", type=Path, metavar="DIR", help="write bench.json, .csv, .svg and tables in .md there")
    parse.add_argument(
        "--publish", action="store_true", help="write them to benchmarks/results, and the table of the documentation"
    )
    parse.add_argument(
        "--clock",
        choices=("wall", "process"),
        help="process: CPU time of all threads (one thread: process, which other programs move less; else wall)",
    )
    parse.add_argument("--threads", type=int, default=1, help="threads of torch, the native kernels and the BLAS (1)")
    parse.add_argument(
        "--device",
        type=torch.device,
        default=torch.device("cpu"),
        help="cpu, or cuda: CUDA events, each call on a cold L2 (unmeasured)",
    )
    parse.add_argument("--seconds", type=float, default=0.5, help="to spend on each case, at least (0.5)")
    parse.add_argument("--seed", type=int, default=0, help="of the inputs and of the order of the rounds (0)")
    parse.add_argument("--no-memory", action="store_true", help="leave out peak memory, a process of its own")
    parse.add_argument("--check", action="store_true", help="exit with 1 where a limit is missed")
    return parse


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks: 0; 1 where ours failed or ``--check`` finds a missed limit; 2 bad input; 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["integrations"]:
        from benchmarks import integrations

        return integrations.main(given[1:])
    options = parser().parse_args(given)
    reason = _bad(options)
    if reason:
        print(f"benchmarks: {reason}", file=sys.stderr)
        return 2
    if options.peers:
        known = peers.versions()
        print(
            "\n".join(f"{name:<20}{known.get(name) or f'not installed: {how}'}" for name, how in peers.INSTALL.items())
        )
        return 0
    try:
        chosen = {name: cases_of(name, options.quick, options.filter) for name in options.names or SUITES}
    except ModuleNotFoundError as error:
        print(f"benchmarks: {error}: pip install -e '.[bench]'", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{name}: {case.name}" for name, cases in chosen.items() for case in cases))
        return 0
    return _run({name: cases for name, cases in chosen.items() if cases}, options)


def _bad(options: argparse.Namespace) -> str:
    unknown = sorted(set(options.names) - set(SUITES))
    if unknown:
        return f"no suite {', '.join(unknown)}; there are: {', '.join(SUITES)}"
    if options.device.type == "cuda" and not torch.cuda.is_available():
        return "--device cuda, but torch sees no CUDA device"
    if options.threads < 1 or not options.seconds > 0:
        return "--threads and --seconds must be positive"
    if options.publish and (options.out or options.names or options.filter or options.quick):
        return "--publish is for a whole run: it goes with none of names, --out, --filter and --quick"
    return ""


def cases_of(name: str, quick: bool, text: str) -> list[Case]:
    """The chosen cases of the suite ``name``."""
    cases = importlib.import_module(f"benchmarks.bench_{name}").CASES
    return [case for case in cases if text in case.name and (case.quick or not quick)]


def limit_threads(threads: int) -> None:
    """Torch's threads and those of the BLAS under numpy and SciPy, which would spin beside it and count."""
    torch.set_num_threads(threads)
    try:
        from threadpoolctl import threadpool_limits
    except ModuleNotFoundError:
        print("benchmarks: without threadpoolctl numpy and SciPy run on as many threads as they like", file=sys.stderr)
        return
    import scipy.linalg  # noqa: F401  the limit reaches only what is loaded

    threadpool_limits(threads, user_api="blas")


def _run(chosen: dict[str, list[Case]], options: argparse.Namespace) -> int:
    limit_threads(options.threads)
    kept = options.device.type == "cpu" and selbp.keep_freed_memory()  # for all contenders alike
    roofline = Roofline(options.device, options.threads, options.quick)
    clock = Clock(options.clock or ("process" if options.threads == 1 else "wall"), options.device)
    results: dict[str, list[Row]] = {}
    try:
        _time(chosen, options, roofline, clock, results)
        if not options.no_memory:
            _add_peaks(results, options)
        status = 0
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted; what follows is what there is", file=sys.stderr)
        status = 130
    for name, rows in results.items():
        print(report.markdown(name, rows), flush=True)
    rates = roofline.table()
    print("Measured in this run: " + ", ".join(f"{key} {value:.1f}" for key, value in rates.items()))
    about = report.machine(options.device, options.threads, clock.kind, kept, options.quick)
    if results:
        print("\n" + report.summary(about, results), flush=True)
    folder = RESULTS if options.publish and not status else options.out
    if folder:
        print("Written: " + ", ".join(str(file) for file in report.write(folder, results, about, rates)))
        if options.publish:
            report.publish(RESULTS / "bench.md", PAGE)
    return status or _verdict(results, options.check)


def _time(
    chosen: dict[str, list[Case]],
    options: argparse.Namespace,
    roofline: Roofline,
    clock: Clock,
    results: dict[str, list[Row]],
) -> None:
    total, done, start = sum(map(len, chosen.values())), 0, time.perf_counter()
    seconds = options.seconds / (4 if options.quick else 1)
    for name, cases in chosen.items():
        for case in cases:
            done += 1
            spent = time.perf_counter() - start
            print(f"[{done}/{total}, {spent:.0f} s] {name}: {case.name}", file=sys.stderr, flush=True)
            results.setdefault(name, []).extend(run_case(case, roofline, clock, seconds, options.seed))


def _add_peaks(results: dict[str, list[Row]], options: argparse.Namespace) -> None:
    asked = ["--threads", str(options.threads), "--device", str(options.device), "--seed", str(options.seed)]
    asked += ["--filter", options.filter, *(["--quick"] if options.quick else [])]
    peaks = measure_peaks(list(results), asked)
    for name, rows in results.items():
        for row in rows:
            row.peak_bytes = peaks.get(name, {}).get(row.case, {}).get(row.contender, float("nan"))


def _verdict(results: dict[str, list[Row]], check: bool) -> int:
    rows = [row for found in results.values() for row in found]
    failed = [f"{row.case}: {row.contender}: {row.note}" for row in rows if row.note.startswith(FAILED)]
    if failed:
        print("Failed: " + "; ".join(failed))
    missed = [f"{row.case} against {row.contender}" for row in rows if row.passed is False]
    if missed:
        print("Limits missed: " + "; ".join(missed))
    ours = any(row.ours and row.note.startswith(FAILED) for row in rows)
    return 1 if ours or (missed and check) else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # `timeout` ends a run as Ctrl-C does
    sys.exit(main())
