"""One writer at a time: of a run, of a comparison, of a study; whoever dies holds nobody up."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from selbp_study.cli import main
from selbp_study.config import RunConfig
from selbp_study.data import load
from selbp_study.pool import folder_of, run_to_end
from selbp_study.storage import Lock, LockedError, StorageError

FAST = ["--dataset", "digits", "--model", "mlp", "--steps", "5", "--threads", "1", "--quiet"]
COMMANDS = {
    "train": ["train", *FAST],
    "resume": ["train", *FAST, "--resume"],
    "compare": ["compare", *FAST, "--arms", "random", "--seeds", "0"],
    "study": ["study", "--protocol", "quick", "--workers", "0", "--quiet"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_second_writer_ends_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Lock(tmp_path):
        assert main([*COMMANDS[name], "--out", str(tmp_path)]) == 1
        said = capsys.readouterr().err
        assert said == f"selbp: {tmp_path}: another process is writing to this folder: wait for it, or name another\n"
        assert [path.name for path in tmp_path.iterdir()] == [Lock.NAME]
    if name != "study":
        assert main([*COMMANDS[name], "--out", str(tmp_path)]) == 0
        assert not list(tmp_path.rglob(Lock.NAME))


def test_a_killed_process_holds_nobody_up(tmp_path: Path) -> None:
    code = (
        "import os, signal, pathlib\nfrom selbp_study.storage import Lock\n"
        f"lock = Lock(pathlib.Path({str(tmp_path)!r})).acquire()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=600).returncode == -signal.SIGKILL
    assert (tmp_path / Lock.NAME).exists()
    with Lock(tmp_path):
        with pytest.raises(LockedError):
            Lock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_who_waits_gets_the_file_that_is_there(tmp_path: Path) -> None:
    """The first one's file is gone when the second one has it locked: that lock would keep nobody out."""
    first, second = Lock(tmp_path).acquire(), Lock(tmp_path)
    waiting = threading.Thread(target=lambda: second.acquire(wait=True))
    waiting.start()
    first.release()
    waiting.join()
    assert os.path.samestat(os.fstat(second.file), (tmp_path / Lock.NAME).stat())
    with pytest.raises(LockedError):
        first.acquire()
    second.release()
    second.release()
    with first:
        pass


def test_a_link_in_the_locks_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / Lock.NAME).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="cannot be opened to lock"):
        Lock(tmp_path).acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_a_worker_waits_for_the_one_that_is_still_at_its_run(tmp_path: Path) -> None:
    digits = load("digits")
    config = RunConfig(
        dataset=digits.name, fingerprint=digits.fingerprint, selector="random", steps=5, lr=0.1, model="mlp", threads=1
    )
    home = folder_of(tmp_path, config)
    home.mkdir(parents=True)
    found = []
    with Lock(home):
        waiting = threading.Thread(target=lambda: found.append(run_to_end(config, digits, tmp_path)))
        waiting.start()
        assert found == [] and not (home / "config.json").exists()
    waiting.join()
    assert found[0].error is None and found[0].result["steps"] == 5
    again = run_to_end(dataclasses.replace(config), digits, tmp_path)
    assert again.result == found[0].result  # read, not run: its times are the same
