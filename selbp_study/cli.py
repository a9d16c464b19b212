"""The command line, ``selbp train | compare | study | bench | info``. Bad input ends in one line and non-zero exit."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence

from selbp_study.parsers import build_parser

STUDY_NEEDS = ("numpy", "tqdm")  # of the extra "study": the library needs torch alone


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 1 a run failed, 2 bad input, 130 interrupted."""
    arguments, rest = build_parser().parse_known_args(argv)
    if rest and arguments.command != "bench":
        build_parser().error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        return _run(arguments, rest)
    except ModuleNotFoundError as error:
        if error.name not in STUDY_NEEDS:
            raise
        print(f"selbp: {error.name} is not installed: pip install 'selbp[study]'", file=sys.stderr)
        return 1


def _info(arguments: argparse.Namespace) -> int:
    """``selbp info``, of torch alone: where the rest is not installed, this is what says so."""
    import json

    from selbp.info import information
    from selbp_study.storage import write_text

    values = information()
    width = max(map(len, values))
    lines = "\n".join(f"{name:<{width}}  {value}" for name, value in values.items())
    lines = json.dumps(values, indent=1) if arguments.json else lines
    print(lines, flush=True)
    if arguments.out is not None:
        try:
            write_text(arguments.out, lines + "\n")
        except OSError as error:
            print(f"selbp: {error.filename}: {error.strerror}", file=sys.stderr)
            return 1
    return 0


def _run(arguments: argparse.Namespace, rest: list[str]) -> int:
    if arguments.command == "info":
        return _info(arguments)
    from selbp_study import commands, study_command

    handlers = {"train": commands.train, "compare": commands.compare, "study": study_command.study}
    try:
        if arguments.command == "bench":
            return commands.bench(arguments, rest)
        return handlers[arguments.command](arguments)
    except KeyboardInterrupt:
        print("\nselbp: interrupted", file=sys.stderr)
        return commands.INTERRUPTED
    except commands.EXPECTED as error:
        if arguments.debug:
            traceback.print_exc()
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        if not getattr(error, "told", False):  # by the first process of several
            print(f"selbp: {reason}", file=sys.stderr)
        return commands.status_of(error)


if __name__ == "__main__":
    sys.exit(main())
