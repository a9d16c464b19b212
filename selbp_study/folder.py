"""What a run's folder says of it, believed only after a look at every field that is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from selbp_study.config import RunConfig
from selbp_study.storage import JsonLines, StorageError, checked, read_bytes, read_object
from selbp_study.timing import PHASES

POINT = ("step", "accuracy", "backward_samples", "seconds")  # of a curve
ANEW = "to start anew, delete the folder or name another"


def to_json(value: Any) -> str:
    """JSON for a file that people read."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def read_config(folder: Path) -> RunConfig | None:
    """The configuration of the run in ``folder``; None where there is none. StorageError when it cannot be read."""
    path = folder / "config.json"
    values = read_object(path)
    if values is None:
        return None
    try:
        return RunConfig.from_dict(values)
    except (ValueError, TypeError, OverflowError) as error:
        raise StorageError(f"{path}: {error}") from error


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of the finished run in ``folder``; None where it is not finished.

    StorageError when it cannot be read, is no result, or belongs to another run than ``config.json`` describes.
    """
    path = folder / "result.json"
    value = read_object(path)
    if value is None:
        return None
    checked(path, value, wrong_result)
    config = read_config(folder)
    try:
        same = RunConfig.from_dict(value["config"]) == config
    except (ValueError, TypeError, OverflowError):
        same = False
    if not same:
        raise StorageError(f"{path}: is not the result of the run that config.json describes; {ANEW}")
    return value


def read_compared(folder: Path) -> list[tuple[str, RunConfig]]:
    """Label and configuration of every run that the comparison in ``folder`` reports, those that failed left out."""
    path = folder / "results.jsonl"
    found = []
    for number, line in enumerate((read_bytes(path) or b"").splitlines(), 1):
        try:
            row = json.loads(line)
            if row["error"] is None:
                found.append((str(row["arm"]), RunConfig.from_dict(row["config"])))
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
            raise StorageError(f"{path}: line {number} is no run of a comparison; {ANEW}") from error
    return found


def finished(folder: Path, config: RunConfig) -> dict[str, Any] | None:
    """The result in ``folder``, if it is that of ``config``."""
    result = read_result(folder)
    return result if result is not None and read_config(folder) == config else None


def wrong_result(value: dict[str, Any]) -> str | None:
    """What is wrong with a run's result; None where nothing that is read of it is."""
    for name in ("accuracy", "steps", "backward_samples"):
        if not is_number(value.get(name)):
            return f"{name} must be a finite number, got {short(value.get(name))}"
    seconds, curve = value.get("seconds"), value.get("curve")
    if not isinstance(seconds, dict) or not all(is_number(seconds.get(phase)) for phase in PHASES):
        return f"seconds must hold a finite number for each of {', '.join(PHASES)}, got {short(seconds)}"
    if not isinstance(curve, list) or not curve:
        return f"curve must be a list of points, got {short(curve)}"
    for point in curve:
        if not isinstance(point, dict) or not all(is_number(point.get(name)) for name in POINT):
            return f"a point of the curve must hold a finite {', '.join(POINT)}, got {short(point)}"
    if not isinstance(value.get("config"), dict):
        return f"config must be an object, got {short(value.get('config'))}"
    return next(
        (
            f"{name} must be a number or null, got {short(value[name])}"
            for name in ("gain", "gain_at_cost")
            if value.get(name) is not None and type(value[name]) not in (int, float)
        ),
        None,
    )


def check_log(log: JsonLines, config: RunConfig, step: int) -> list[dict[str, Any]]:
    """The rows of the log of a run that stands at ``step``: StorageError where they are not those that it wrote."""
    rows = log.read()
    every = config.evaluate_every
    wanted = list(range(0 if every < config.steps else every, step + 1, every))
    wanted += [config.steps] if step == config.steps and config.steps % every else []
    if step == 0:
        wanted = wanted[: len(rows)]  # the untrained network is evaluated after the first state is kept
    found = [row for row in rows if row.get("kind") == "evaluation"]
    for row in found:
        if not all(is_number(row.get(name)) for name in POINT):
            raise StorageError(f"{log.path}: the evaluation after step {row['step']} lacks a finite {', '.join(POINT)}")
    if [row["step"] for row in found] != wanted:
        raise StorageError(
            f"{log.path}: must hold an evaluation after each of the steps {short(wanted)}, got those after "
            f"{short([row['step'] for row in found])}; {ANEW}"
        )
    return rows


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite int or float of JSON."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def short(value: object) -> str:
    """``value`` for a message: one line, not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
