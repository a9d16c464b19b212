"""``selbp study``: run a protocol, or render results that are there."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from selbp_study.arms import Arm, build_selector
from selbp_study.commands import FAILED, INTERRUPTED, OK, UsageError, asked_by, require_plots
from selbp_study.document import document, read_result_file, result_files, section, study_page
from selbp_study.pool import pool
from selbp_study.protocols import PROTOCOLS, Protocol
from selbp_study.show import new_bar
from selbp_study.storage import Lock, read_object, write_text
from selbp_study.study import run_study


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """The protocol that was named, with what was given in its place."""
    protocol = PROTOCOLS[arguments.protocol]
    for name in arguments.arms or ():
        with asked_by(f"--arms {name}"):
            build_selector(Arm.parse(name).selector)
    if arguments.arms:
        protocol = replace(protocol, arms=tuple(arguments.arms))
    if arguments.seeds:
        protocol = replace(protocol, seeds=tuple(arguments.seeds))
    if arguments.steps:
        protocol = replace(protocol, cells=tuple(replace(cell, steps=arguments.steps) for cell in protocol.cells))
    if arguments.name:
        protocol = replace(protocol, name=arguments.name)
    return protocol


def _keep_result(protocol: Protocol, path: Path) -> None:
    """UsageError where the result of ``protocol`` would take the place of one that has more than it."""
    found = (read_object(path) or {}).get("protocol")
    before: dict[str, Any] = found if isinstance(found, dict) else {}
    now = json.loads(json.dumps(asdict(protocol)))
    for name in ("arms", "seeds", "cells"):
        lost = [value for value in before.get(name) or () if value not in now[name]]
        if lost:
            shown = [f"{cell['steps']} steps of {cell['dataset']}" for cell in lost] if name == "cells" else lost
            raise UsageError(
                f"{path} holds a result with {name} that this one lacks: {', '.join(map(str, shown))}. --name gives "
                "this one a name of its own; what both train is trained once"
            )


def study(arguments: argparse.Namespace) -> int:
    """Run what is missing of a protocol; write its result, its table and its page. 1 where something failed."""
    if arguments.render is not None:
        return render(arguments.render, arguments.out)
    require_plots()
    from tqdm import tqdm

    protocol, folder = protocol_of(arguments), arguments.out or Path("runs/study")
    workers = os.cpu_count() or 1 if arguments.workers is None else arguments.workers
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    bars: list[Any] = []

    def progress(done: int, known: int) -> None:
        if not bars:  # not before the first run: what is wrong with the call is said on a line of its own
            bars.append(new_bar(f"study {protocol.name}", " runs", arguments.quiet))
        bars[0].total = known
        bars[0].update(done - bars[0].n)

    def say(text: str) -> None:
        tqdm.write(text, file=sys.stdout)

    home = arguments.results or folder
    path = home / f"study-{protocol.name}.json"
    try:
        with Lock(folder), pool(workers, folder, arguments.data) as runs:
            if protocol != PROTOCOLS[arguments.protocol]:
                _keep_result(protocol, path)
            result = run_study(protocol, runs, progress=progress, say=say)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from there", flush=True)
        return INTERRUPTED
    finally:
        for bar in bars:
            bar.close()
    home.mkdir(parents=True, exist_ok=True)
    write_text(path, dumps(result))
    write_text(folder / f"study-{protocol.name}.html", study_page(result))
    print(section(result), flush=True)
    print(f"\n{time.monotonic() - started:.0f} s; result {path}, page {folder / f'study-{protocol.name}.html'}")
    return FAILED if result["failed"] or any(entry["errors"] for entry in result["entries"]) else OK


def dumps(result: dict[str, object]) -> str:
    """JSON with a line for each entry, so that results can be compared line by line."""
    entries = result["entries"]
    assert isinstance(entries, list)
    head = json.dumps({name: value for name, value in result.items() if name != "entries"}, indent=1, sort_keys=True)
    lines = ",\n".join("  " + json.dumps(entry, sort_keys=True) for entry in entries)
    return f'{head[:-2]},\n "entries": [\n{lines}\n ]\n}}\n'


def render(source: Path, out: Path | None) -> int:
    """Write ``docs/measurements/study.md`` (``out``) from a folder of results, or one result file."""
    files = result_files(source) if source.is_dir() else [source]
    if not files:
        raise ValueError(f"--render {source}: must be a study's result or a folder with some; it has no study-*.json")
    target = out or Path("docs/measurements/study.md")
    write_text(target, document([read_result_file(path) for path in files]))
    print(f"{target}: {', '.join(path.name for path in files)}")
    return OK
