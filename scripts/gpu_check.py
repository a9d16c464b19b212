"""What only a machine with a GPU can show: ``make gpu-check``, or ``python scripts/gpu_check.py [--only PART ...]``.

parity      every operator against the specification in float64, for each type and option
bits        the same bits twice, under torch.compile and from a captured graph; the solver's, those of the CPU
sanitizer   compute-sanitizer's tools over every kernel
operators   throughput beside eager torch and the peers
selection   launches, host time and device time of each rule
steps       whole steps: full, random, recompute, rows and cut on four models
graph       selbp.cuda_graph: the bits of ordinary steps, and the time of both

Each part is a process of its own, within ``--budget`` seconds, so that one that dies takes no other with it. It writes
``PART.json`` to ``--out`` after each row, and a table to ``results.md``; started again with the same ``--out`` it goes
on where it ended, if the folder is still there. ``--quick`` runs what shows soonest whether all is well, in less than
eight minutes together. Where the environment names a folder in OUT, the table and one file of all rows are copied
there after each part, for a machine that is lent. Exits with 1 where a check failed, with 2 where there is no GPU, with
3 where a part is not whole.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import torch

SCRIPTS = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent)]
from gpu_parts.results import Results  # noqa: E402

from selbp import info  # noqa: E402

PARTS = ("parity", "bits", "sanitizer", "operators", "selection", "steps", "graph")
SHARED = {"parity": 8}  # processes that do a part together, most of it compiling; one a core at most
QUICK = {"graph": 60.0, "selection": 60.0, "parity": 200.0, "bits": 120.0}  # seconds at most


def run_part(options: argparse.Namespace) -> int:
    """One part, or a share of it, in this process."""
    share, shares = options.share
    results = Results(options.out, options.only[0], share, shares)
    importlib.import_module(f"gpu_parts.{options.only[0]}").run(results, options.device, options.tiny)
    return 0


def shares_of(part: str, options: argparse.Namespace) -> int:
    """How many processes do a part."""
    cores = len(os.sched_getaffinity(0))
    return 1 if options.tiny else max(1, min(SHARED.get(part, 1), cores // 2))


def supervise(part: str, options: argparse.Namespace) -> tuple[Results, bool]:
    """Run a part in processes of its own; returns its rows and whether it came to its end."""
    # One process is test enough, and six starts take a test's time.
    if options.tiny and (options.quick or part != options.only[0]):
        importlib.import_module(f"gpu_parts.{part}").run(Results(options.out, part), options.device, True)
        return Results(options.out, part), True
    count = shares_of(part, options)
    command = [sys.executable, __file__, "--only", part, "--device", options.device, "--out", str(options.out)]
    command += ["--tiny"] if options.tiny else []
    deadline = time.monotonic() + (min(options.budget, QUICK[part]) if options.quick else options.budget)
    jobs: list[subprocess.Popen[bytes]] = []
    whole = True
    try:
        for i in range(count):
            jobs.append(subprocess.Popen([*command, "--share", str(i), str(count)], start_new_session=True))
        for job in jobs:
            try:
                whole &= job.wait(max(0.0, deadline - time.monotonic())) == 0
            except subprocess.TimeoutExpired:
                print(f"gpu_check: {part} is not whole in its time", flush=True)
                whole = False
    finally:
        for job in jobs:
            _end(job)
        results = Results(options.out, part)
        if count > 1:
            results.merge(count)
    return results, whole


def write_up(options: argparse.Namespace, environment: dict[str, object]) -> None:
    """Write the table of all parts so far; into $OUT as well, with one file of their rows."""
    parts = [Results(options.out, part) for part in PARTS if (options.out / f"{part}.json").exists()]
    facts = "\n".join(f"* {name}: {value}" for name, value in environment.items())
    table = "\n".join([f"# gpu_check\n\n{facts}\n", *(part.markdown() for part in parts)])
    (options.out / "results.md").write_text(table)
    if folder := os.environ.get("OUT"):
        rows = {part.part: {"complete": part.complete, "rows": part.rows} for part in parts}
        pathlib.Path(folder, "gpu-check.md").write_text(table)
        pathlib.Path(folder, "gpu-check.json").write_text(
            json.dumps({"environment": environment, "parts": rows}, indent=1, default=str)
        )


def _end(job: subprocess.Popen[bytes]) -> None:
    """End a part and all that it has started, which would run beside the next part's timings."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()


def main() -> int:
    """Run what was asked for; see the module's docstring for the exit status."""
    parse = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parse.add_mutually_exclusive_group()
    which.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    which.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)}: at most {sum(QUICK.values()):.0f} s")
    parse.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/gpu-check"))
    parse.add_argument("--budget", type=float, default=480.0, help="seconds for each part (480)")
    parse.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a stand-in, for tests")
    parse.add_argument("--tiny", action="store_true", help="the smallest shapes, for tests")
    parse.add_argument("--share", type=int, nargs=2, help=argparse.SUPPRESS)
    options = parse.parse_args()
    options.out = options.out.resolve()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device, so nothing can be checked here", file=sys.stderr)
        return 2
    if options.share:
        return run_part(options)
    for number in (signal.SIGTERM, signal.SIGHUP):  # the parts, in sessions of their own, do not hear it
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores one
            signal.signal(number, lambda received, _: sys.exit(128 + received))
    environment = info.information()
    print("\n".join(f"{name}: {value}" for name, value in environment.items()), flush=True)
    failed, incomplete = [], []
    for part in QUICK if options.quick else options.only:
        print(f"== {part}", flush=True)
        try:
            results, whole = supervise(part, options)
        finally:
            write_up(options, environment)
        failed += [f"{part}: {name}" for name in results.failed]
        incomplete += [] if whole else [part]
    print(f"{len(failed)} failed" + "".join(f"\n  {name}" for name in failed))
    print(f"not whole: {', '.join(incomplete) or 'none'}; {options.out / 'results.md'}")
    return 1 if failed else 3 if incomplete else 0


if __name__ == "__main__":
    sys.exit(main())
