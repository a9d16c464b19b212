"""Installs the project, editable, with the extras named: ``python scripts/install.py test``. Called by the Makefile.

``--beside`` installs what the extras ask for, beside a project that is there: nothing is built again.

Where every requirement is already there, pip is told to ask no index: a machine without a network then builds what it
needs. Where something is missing and cannot be had, one line names what.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import subprocess
import sys
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]


def requirements(extras: list[str]) -> list[Requirement]:
    """What the build, the package and ``extras`` need, an extra that names the package opened."""
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = described["project"]
    lines = [*described["build-system"]["requires"], *project["dependencies"]]
    todo, seen = list(extras), set()
    while todo:
        extra = todo.pop()
        if extra in seen:
            continue
        seen.add(extra)
        if extra not in project["optional-dependencies"]:
            raise SystemExit(f"selbp: no extra {extra!r}; there are {', '.join(project['optional-dependencies'])}")
        lines += project["optional-dependencies"][extra]
        for line in project["optional-dependencies"][extra]:
            found = Requirement(line)
            if found.name == project["name"]:
                todo += found.extras
    return [found for found in map(Requirement, lines) if found.name != project["name"]]


def missing(wanted: list[Requirement]) -> list[str]:
    """Those that this environment lacks, or has in a version that does not serve."""
    found = []
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{requirement.name}{requirement.specifier}")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            found.append(f"{requirement.name}{requirement.specifier} (there is {version})")
    return found


def main() -> int:
    """Install; returns the exit status."""
    beside = "--beside" in sys.argv
    extras = [name for argument in sys.argv[1:] if argument != "--beside" for name in argument.split(",") if name]
    lacking = missing(requirements(extras))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q"]
    if beside and not lacking:
        return 0
    if not lacking:
        return subprocess.call([*pip, "--no-index", "--no-deps", "--no-build-isolation", "-e", str(ROOT)])
    target = ["-e", f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)]
    if beside:
        target = [f"{found.name}{found.specifier}" for found in requirements(extras)]
    status = subprocess.call([*pip, *shlex.split(os.environ.get("PIP_ARGS", "")), *target])
    if status:
        print(f"selbp: pip could not install all of it; this environment lacks {', '.join(lacking)}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
