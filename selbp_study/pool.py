"""Worker processes that carry runs to their end, one thread each; one that dies loses its run's last steps only."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from selbp_study.config import RunConfig
from selbp_study.data import FASHION_MNIST, DataError, Dataset, resolve
from selbp_study.engine import Finished, failure, read_back
from selbp_study.folder import finished as finished_result
from selbp_study.run import Run

ATTEMPTS = 3  # of a run whose worker dies; it goes on from its last saved state


def folder_of(folder: Path, config: RunConfig) -> Path:
    """Where a run lives while it runs and after."""
    return folder / "runs" / config.key()


def run_to_end(config: RunConfig, data: Dataset, folder: Path) -> Finished:
    """Carry one run to its end in this process, from where it stands; what it raises becomes the error."""
    home = folder_of(folder, config)
    try:
        if config.fingerprint != data.fingerprint:
            raise ValueError(f"{config.dataset} is not the data that this run was planned with")
        home.mkdir(parents=True, exist_ok=True)
        run = Run(config, data, home)
        with run.lock.acquire(wait=True):  # a worker whose study was killed may still be at it
            result = finished_result(home, config)
            if result is None:
                run.open()
                result = run.execute()
    except Exception as error:  # a failed run is a line of the table, not the end of the others
        return failure(config, home, error)
    for name in ("model.pt", "log.jsonl", "error.txt"):  # hundreds of runs: the result is what is kept
        (home / name).unlink(missing_ok=True)
    return Finished(config, result)


class DatasetCache:
    """The data sets by name, each read once; ``folder`` is Fashion-MNIST's."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder, self.sets = folder, dict[str, Dataset]()

    def __call__(self, name: str) -> Dataset:
        """The data set of this name, see :func:`selbp_study.data.resolve`."""
        if name not in self.sets:
            self.sets[name] = resolve(name, self.folder if name.startswith(FASHION_MNIST) else None)
        return self.sets[name]


def _work(pipe: Connection, folder: Path, data_folder: Path | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's to handle
    import torch

    from selbp.allocator import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    sets = DatasetCache(data_folder)
    while True:
        try:
            config = pipe.recv()
        except EOFError:  # the parent is gone
            return
        try:
            finished = run_to_end(config, sets(config.dataset), folder)
        except DataError as error:
            finished = Finished(config, None, str(error))
        try:
            pipe.send(finished)
        except BrokenPipeError:  # the parent was killed; what is finished is on disk
            return


class Pool:
    """A :class:`selbp_study.engine.Runner` of ``workers`` processes; 0 runs everything in this one."""

    def __init__(self, workers: int, folder: Path, data_folder: Path | None = None) -> None:
        self.folder, self.data_folder, self.workers = folder, data_folder, workers
        self.queue: deque[tuple[RunConfig, int]] = deque()
        self.busy: dict[Connection, tuple[RunConfig, int]] = {}
        self.idle: list[Connection] = []
        self.processes: dict[Connection, Any] = {}
        self.sets = DatasetCache(data_folder)

    def cached(self, config: RunConfig) -> Finished | None:
        """The run, if it was finished before."""
        return read_back(folder_of(self.folder, config), config)

    def submit(self, config: RunConfig) -> None:
        """Have it run when a worker is free, in the order of submission."""
        self.queue.append((config, 1))

    def __len__(self) -> int:
        return len(self.queue) + len(self.busy)

    def next(self) -> Finished:
        """The next run that is finished. Call it only while ``len(self)`` is positive."""
        if self.workers == 0:
            config, _ = self.queue.popleft()
            return run_to_end(config, self.sets(config.dataset), self.folder)
        while True:
            while self.queue and len(self.busy) < self.workers:
                pipe = self.idle.pop() if self.idle else self._start()
                task = self.queue.popleft()
                self.busy[pipe] = task
                try:
                    pipe.send(task[0])
                except OSError:  # it died while idle; what follows finds its end of the pipe closed
                    continue
            for ready in wait(list(self.busy)):
                assert isinstance(ready, Connection)
                config, attempt = self.busy.pop(ready)
                try:
                    finished = ready.recv()
                except (EOFError, OSError):
                    code = self._bury(ready)
                    if attempt < ATTEMPTS:
                        self.queue.appendleft((config, attempt + 1))
                        break
                    return Finished(config, None, f"its process died {attempt} times, last with status {code}")
                self.idle.append(ready)
                assert isinstance(finished, Finished)
                return finished

    def _start(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self.folder, self.data_folder), daemon=True)
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # read when the child imports torch
        try:
            process.start()
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = before
        theirs.close()
        self.processes[ours] = process
        return ours

    def _bury(self, pipe: Connection) -> int | None:
        process = self.processes.pop(pipe)
        pipe.close()
        process.join(10)
        code: int | None = process.exitcode
        return code

    def close(self) -> None:
        """End the workers at once; what they were at goes on from its last saved state next time."""
        for pipe, process in self.processes.items():
            process.terminate()
            pipe.close()
        for process in self.processes.values():
            process.join()
        self.processes, self.busy, self.idle = {}, {}, []
        self.queue.clear()


@contextmanager
def pool(workers: int, folder: Path, data_folder: Path | None = None) -> Iterator[Pool]:
    """A :class:`Pool` that is closed at the end, whatever happens."""
    made = Pool(workers, folder, data_folder)
    try:
        yield made
    finally:
        made.close()
