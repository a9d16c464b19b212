"""A run's folder: begun, or gone on with from the newest whole state that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from selbp_study.config import RunConfig
from selbp_study.folder import ANEW, check_log, read_config, to_json
from selbp_study.journal import Journal
from selbp_study.storage import JsonLines, Lock, StorageError, write_text


class KeptRun:
    """The part of a run that its folder keeps: config.json, log.jsonl, and the journal's slots while it runs.

    One process at a time may open it. A subclass says what its state is.
    """

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder, self.lock = config, folder, Lock(folder)
        self.log = JsonLines(folder / "log.jsonl")
        self.journal = Journal(folder, before_durable=self.log.sync)
        self.step = 0
        self.random = torch.get_rng_state()  # torch's global generator, as this run has left it

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, and the sums that the result reports."""
        raise NotImplementedError

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state`. ValueError, or what torch raises, for a state that is none of this run's."""
        raise NotImplementedError

    def open(self) -> int:
        """Continue from the newest whole state in the folder, else start afresh; returns the step it stands at.

        Raises:
            LockedError: Another process has it open.
            StorageError: The folder holds a run that was begun, and no state of it can be read.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock.acquire()
        try:
            found = self._found()
            if found is None:
                torch.manual_seed(self.config.seed)
                self.journal.begin(self.state())
                write_text(self.folder / "config.json", to_json(self.config.as_dict()))
            else:
                self._restore(found)
            self.log.cut(self.step)
            check_log(self.log, self.config, self.step)
        except BaseException:
            self.close()
            raise
        self.random = torch.get_rng_state()
        return self.step

    def _found(self) -> Any:
        """The state to go on from; None where the folder holds no run that was begun."""
        known = read_config(self.folder)
        begun = known is not None
        if known is not None and known != self.config:
            raise StorageError(f"{self.folder} holds another run: {'; '.join(known.differences(self.config))}")
        try:
            found = self.journal.read()
        except StorageError as error:
            if begun or self.log.read():
                raise StorageError(f"{error}; {ANEW}") from error
            return None  # killed before its first state was whole
        if found is not None:
            if not begun and found[1] > 0:
                raise StorageError(f"{self.folder}: holds the state after step {found[1]}, and no config.json; {ANEW}")
            return found[0] if begun else None
        steps = [row["step"] for row in self.log.read()]
        if steps and steps[-1] >= self.config.journal_every:
            raise StorageError(f"{self.folder}: step {steps[-1]} is in its log, and no saved state is there; {ANEW}")
        return None

    def _restore(self, state: Any) -> None:
        try:
            self.load_state(state)
        except Exception as error:  # whatever torch's loaders raise at what is not theirs
            reason = (str(error).splitlines() or [""])[0]
            raise StorageError(
                f"{self.folder}: its saved state is none of this run ({type(error).__name__}: {reason}); {ANEW}"
            ) from error

    def close(self) -> None:
        """Let another process open the folder; what is saved stays."""
        self.journal.close()
        self.lock.release()
