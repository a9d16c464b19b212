"""Fetch a data set that Debian packages, without root: ``apt-get download`` and ``dpkg -x`` into a folder of ours.

The suite, mirror and signing keys are those that the machine's own apt sources name; apt verifies the signatures.
Where the machine has no package lists (a fresh container), private ones are fetched into the cache instead.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from selbp_study.data.idx import DataError

Runner = Callable[[Sequence[str], Path], "subprocess.CompletedProcess[str]"]
Say = Callable[[str], None]
TIMEOUT = 600.0  # seconds for one apt-get or dpkg command


def run_command(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``folder``, output captured, never a prompt."""
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT
    )


def apt_options(private: Path | None) -> list[str]:
    """Options of every ``apt-get`` call; ``private`` holds package lists of our own, None uses the machine's.

    The sandbox user is switched off because it may not enter a private cache folder (it matters to root only);
    signatures are verified all the same.
    """
    options = ["-q", "-o", "APT::Sandbox::User=root"]
    if private is not None:
        for name, value in {
            "Dir::State": private / "state",
            "Dir::State::lists": private / "state" / "lists",
            "Dir::Cache": private / "cache",
            "Dir::Cache::archives": private / "cache" / "archives",
            "Acquire::Languages": "none",
        }.items():
            options += ["-o", f"{name}={value}"]
    return options


def update_command(private: Path) -> list[str]:
    """The command that fetches package lists into ``private``."""
    return ["apt-get", *apt_options(private), "update"]


def download_command(package: str, private: Path | None) -> list[str]:
    """The command that leaves ``package``'s .deb in the working folder."""
    return ["apt-get", *apt_options(private), "download", package]


def fetch_package(
    package: str,
    wanted: str,
    destination: Path,
    *,
    megabytes: int = 0,
    say: Say = print,
    run: Runner = run_command,
    which: Callable[[str], str | None] = shutil.which,
) -> Path:
    """Put the folder ``wanted`` (a path inside the package) of Debian's ``package`` at ``destination``.

    Atomic: the destination appears whole or not at all, also when two processes fetch at once. Raises
    :class:`DataError` where there is no apt-get, no network or no such package; the message carries apt's last line.
    """
    for tool in ("apt-get", "dpkg"):
        if which(tool) is None:
            raise DataError(f"cannot fetch Debian's package {package}: there is no {tool} on this machine")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{package}-", dir=destination.parent) as name:
        work = Path(name)
        size = f" (about {megabytes} MB)" if megabytes else ""
        say(f"fetching Debian's package {package}{size} into {destination.parent} ...")
        result = _run(run, download_command(package, None), work)
        if result.returncode != 0:
            private = work / "apt"
            for part in ("state/lists/partial", "cache/archives/partial"):
                (private / part).mkdir(parents=True)
            say("this machine's package lists do not offer it; fetching private ones ...")
            _check(_run(run, update_command(private), work), "apt-get update")
            _check(_run(run, download_command(package, private), work), f"apt-get download {package}")
        archives = sorted(work.glob(f"{package}_*.deb"))
        if len(archives) != 1:
            raise DataError(f"apt-get download {package} left {len(archives)} archives, not one")
        _check(_run(run, ["dpkg", "-x", str(archives[0]), str(work / "tree")], work), "dpkg -x")
        found = work / "tree" / wanted
        if not found.is_dir():
            raise DataError(f"Debian's package {package} has no folder {wanted}")
        try:
            found.rename(destination)
        except OSError:
            if not destination.is_dir():  # else another process was faster, and its copy is as good
                raise
    return destination


def _run(run: Runner, command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return run(command, folder)
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{command[0]} gave no answer within {TIMEOUT:.0f} s") from error


def _check(result: subprocess.CompletedProcess[str], what: str) -> None:
    if result.returncode != 0:
        lines = [line for line in (result.stderr + "\n" + result.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith(("E:", "dpkg"))] or lines or ["no output"]
        raise DataError(f"{what} failed: {errors[-1].strip()}")
