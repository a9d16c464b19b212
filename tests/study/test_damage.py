"""Whatever a file was turned into: one clear line and a status that is not 0, or the run as it would have been.

Each case takes a copy of a folder, spoils one file of it, and runs the command again.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from support.images import write_set

from selbp_study import commands
from selbp_study.cli import main
from selbp_study.config import RunConfig
from selbp_study.costs import Costs
from selbp_study.data import Dataset
from selbp_study.folder import read_config, read_result
from selbp_study.journal import HEADER, MAGIC, SUMMED, Journal, checksum, sum_of_words
from selbp_study.storage import StorageError, write_text

Damage = Callable[[Path], None]
FAST = ["--model", "mlp", "--steps", "30", "--batch-size", "32", "--evaluate-every", "10", "--threads", "1", "--quiet"]


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


def replaced(content: bytes) -> Damage:
    return lambda path: path.write_bytes(content) and None


def edited(change: Callable[[dict], object]) -> Damage:
    """The JSON object in it, changed."""

    def damage(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return damage


def halved(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def noise(path: Path) -> None:
    path.write_bytes(random.Random(1).randbytes(max(100, path.stat().st_size)))


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_instead(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nothing"))


def link_to_endless(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps(Bomb(path.parent / "unpickled")))


ANY_FILE: dict[str, Damage] = {
    "halved": halved,
    "empty": replaced(b""),
    "noise": noise,
    "a folder": folder_instead,
    "a pipe": pipe_instead,
    "a link to nothing": link_to_nothing,
    "a link to an endless file": link_to_endless,
    "a pickle": pickled,
    "no UTF-8": replaced(b'{"step": "\xff\xfe"}\n'),
    "nested too deeply": replaced(b"[" * 100_000 + b"\n"),
}
ANY_JSON: dict[str, Damage] = ANY_FILE | {
    "a list": replaced(b"[]"),
    "a number": replaced(b"7"),
    "null": replaced(b"null"),
    "no fields": replaced(b"{}"),
    "twice": lambda path: path.write_bytes(2 * path.read_bytes()) and None,
    "a number of ten thousand digits": replaced(b'{"steps": ' + b"9" * 10_000 + b"}"),
}


# ------------------------------------------------------------------------------------------------------- the folders


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, dataset: Dataset) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), dataset)


def train(images: Path, folder: Path) -> int:
    return main(["train", "--data", str(images), *FAST, "--selector", "random", "--resume", "--out", str(folder)])


def compare(images: Path, folder: Path) -> int:
    arms = ["--arms", "random,top-loss", "--seeds", "0", "--budget", "time"]
    return main(["compare", "--data", str(images), *FAST, *arms, "--out", str(folder)])


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    """A run that was interrupted after 13 steps: its slots hold the steps 12 and 13, and the state before the first."""
    folder, left = tmp_path_factory.mktemp("stopped"), [13]

    def interrupting(_bar: object, _samples: int, _loss: float) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(commands.Bar, "__call__", interrupting)
        assert train(images, folder) == commands.INTERRUPTED
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "log.jsonl", *Journal.SLOTS]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    assert train(images, folder) == 0
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("compared")
    assert compare(images, folder) == 0
    return folder


def copy_of(folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def check_one_line(status: int, said: pytest.CaptureResult[str], name: str) -> None:
    assert status != 0, said.out
    assert said.err.startswith("selbp: ") and said.err.count("\n") == 1, said.err
    assert name in said.err and "Traceback" not in said.err, said.err


def check_the_same(copy: Path, whole: Path) -> None:
    mine, theirs = (torch.load(folder / "model.pt", weights_only=True) for folder in (copy, whole))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


# ----------------------------------------------------------------------------------------------- a run that was begun

OTHER = {"int": "5", "float": None, "str": 5, "float | int": "some"}
CONFIG = {
    **ANY_JSON,
    **{
        f"without {field.name}": edited(lambda value, name=field.name: value.pop(name))
        for field in fields(RunConfig)
        if field.name != "precision"
    },
    **{
        f"{field.name} of another type": edited(
            lambda value, field=field: value.update({field.name: OTHER.get(str(field.type), 5)})
        )
        for field in fields(RunConfig)
    },
    **{
        f"{name} of NaN": edited(lambda value, name=name: value.update({name: float("nan")}))
        for name in ("lr", "momentum", "weight_decay", "warmup", "keep", "seed", "steps")
    },
    "a field more": edited(lambda value: value.update(colour="red")),
    "another run": edited(lambda value: value.update(lr=0.3)),
    "huge steps": edited(lambda value: value.update(steps=10**400)),
    "a list for a field": edited(lambda value: value.update(model=["mlp"])),
    "true for a number": edited(lambda value: value.update(lr=True)),
}


@pytest.mark.parametrize("case", CONFIG)
def test_a_spoiled_configuration(
    case: str, images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case not in ANY_JSON:  # of what the command prints, the reader's own word is enough
        shutil.copy(stopped / "config.json", tmp_path)
        before = read_config(tmp_path)
        CONFIG[case](tmp_path / "config.json")
        try:
            assert before != read_config(tmp_path)
        except StorageError as error:
            assert str(error).startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in str(error)
            return
        assert case in ("another run", "huge steps")
    copy = copy_of(stopped, tmp_path)
    CONFIG[case](copy / "config.json")
    check_one_line(train(images, copy), capsys.readouterr(), str(copy))
    assert not (copy / "unpickled").exists()


def lines(change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    return lambda path: path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True)))) and None


LOG = {
    **ANY_FILE,
    "lines twice": lines(lambda rows: [row for row in rows for _ in range(2)]),
    "lines in another order": lines(lambda rows: rows[::-1]),
    "a line less": lines(lambda rows: rows[:-1]),
    "a list": lines(lambda rows: [b"[1]\n", *rows]),
    "no step": lines(lambda rows: [b'{"kind": "train"}\n', *rows]),
    "a step of text": lines(lambda rows: [b'{"step": "1"}\n', *rows]),
    "an accuracy of NaN": lines(lambda rows: [rows[0].replace(b'"accuracy": ', b'"accuracy": NaN, "x": '), *rows[1:]]),
    "an evaluation without seconds": lines(lambda rows: [rows[0].replace(b'"seconds"', b'"hours"'), *rows[1:]]),
}


@pytest.mark.parametrize("case", LOG)
def test_a_spoiled_log(
    case: str, images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(stopped, tmp_path)
    LOG[case](copy / "log.jsonl")
    check_one_line(train(images, copy), capsys.readouterr(), str(copy / "log.jsonl"))


def exchanged(path: Path) -> None:
    """Two words of the body, 64 bits each, in each other's place."""
    words = np.frombuffer(path.read_bytes(), np.uint64).copy()
    first = -20
    second = next(place for place in range(first - 1, -len(words), -1) if words[place] != words[first])
    words[[first, second]] = words[[second, first]]
    path.write_bytes(words.tobytes())


SLOT = {
    "halved": halved,
    "empty": replaced(b""),
    "noise": noise,
    "a pickle": pickled,
    "words exchanged": exchanged,
    "header cleared": lambda path: path.write_bytes(bytes(HEADER.size) + path.read_bytes()[HEADER.size :]) and None,
    "another version": lambda path: path.write_bytes(b"SELBPJ99" + path.read_bytes()[8:]) and None,
    "another sequence number": lambda path: (
        path.write_bytes(path.read_bytes()[:8] + b"\x77" + path.read_bytes()[9:]) and None
    ),
    "a huge length": lambda path: (
        path.write_bytes(path.read_bytes()[:16] + b"\xff" * 8 + path.read_bytes()[24:]) and None
    ),
    "text": replaced(b"not a state, but forty bytes and some more of text\n"),
}


@pytest.mark.parametrize("case", SLOT)
def test_without_any_whole_state_nothing_is_begun_anew(
    case: str, images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(stopped, tmp_path)
    for name in Journal.SLOTS:
        SLOT[case](copy / name)
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    said_once = train(images, copy), capsys.readouterr()
    check_one_line(*said_once, str(copy))
    assert "no saved state can be read" in said_once[1].err and "start anew" in said_once[1].err
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize("case", SLOT)
def test_with_one_whole_state_the_run_goes_on_from_it(
    case: str, images: Path, stopped: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(stopped, tmp_path)
    SLOT[case](copy / "state-b.bin")  # that of step 13
    assert train(images, copy) == 0 and "going on at step 12 " in capsys.readouterr().out
    check_the_same(copy, whole)


def link_elsewhere(path: Path) -> None:
    shutil.move(path, path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


def hard_link(path: Path) -> None:
    os.link(path, path.parent.parent / "elsewhere")


NOT_ITS_OWN = {
    "a link to another file": link_elsewhere,
    "a hard link": hard_link,
    "a link to nothing": link_to_nothing,
    "a link to an endless file": link_to_endless,
    "a folder": folder_instead,
    "a pipe": pipe_instead,
}


@pytest.mark.parametrize("name", Journal.SLOTS)
@pytest.mark.parametrize("case", NOT_ITS_OWN)
def test_a_slot_that_is_no_file_of_its_own_is_refused(
    case: str, name: str, images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(stopped, tmp_path)
    content = (copy / name).read_bytes()
    NOT_ITS_OWN[case](copy / name)
    check_one_line(train(images, copy), capsys.readouterr(), str(copy / name))
    elsewhere = tmp_path / "elsewhere"
    assert not elsewhere.exists() or elsewhere.read_bytes() == content  # nothing was written through the link
    assert not (copy / "nothing").exists()


def forged(change: Callable[[dict], object]) -> Damage:
    """A state with a checksum that holds, newer than the run's own."""

    def damage(folder: Path) -> None:
        state, _ = Journal(folder).read()
        changed = change(state)
        journal = Journal(folder)
        journal.write(state if changed is None else changed, 1001)
        journal.close()

    return damage


def forged_text(text: bytes) -> Damage:
    def damage(folder: Path) -> None:
        block = bytes(64)
        head = HEADER.pack(MAGIC, 1001, len(text), len(block), checksum(1001, text, block))
        (folder / "state-b.bin").write_bytes(head + text + bytes(-(HEADER.size + len(text)) % 64) + block)
        for name in ("state-a.bin", "state-durable.bin"):
            (folder / name).unlink()

    return damage


STATE = "step model optimizer wrapper generator rng backward_samples seconds window".split()
FORGED = {
    "a list": forged(lambda state: [state]),
    "nothing": forged(lambda state: {}),
    **{f"without {name}": forged(lambda state, name=name: state.__delitem__(name)) for name in STATE},
    "weights of another shape": forged(lambda state: state["model"].update({"head.bias": torch.zeros(3)})),
    "weights missing": forged(lambda state: state["model"].__delitem__("head.bias")),
    "a step of text": forged(lambda state: state.update(step="13")),
    "a negative step": forged(lambda state: state.update(step=-1)),
    "a step past the end": forged(lambda state: state.update(step=31)),
    "a step of 10^30": forged(lambda state: state.update(step=10**30)),
    "a window of another shape": forged(lambda state: state.update(window=torch.zeros(3, 3))),
    "samples of text": forged(lambda state: state.update(backward_samples="many")),
    "seconds of NaN": forged(lambda state: state.update(seconds={"total": float("nan")})),
    "a generator of noise": forged(lambda state: state.update(generator=torch.zeros(5))),
    "no JSON": forged_text(b"{"),
    "an unknown dtype": forged_text(b'{"T": ["complex1", [1], 0, false]}'),
    "a tensor of 10^18": forged_text(b'{"T": ["float32", [1000000000, 1000000000], 0, false]}'),
    "a tensor of a negative size": forged_text(b'{"T": ["float32", [-4], 0, false]}'),
    "a tensor past the end": forged_text(b'{"T": ["float32", [4], 9999, false]}'),
    "an unknown kind": forged_text(b'{"X": 1}'),
    "two kinds": forged_text(b'{"L": [], "U": []}'),
    "nested too deeply": forged_text(b'{"L": [' * 50_000 + b"]}" * 50_000),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_state(
    case: str, images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(stopped, tmp_path)
    FORGED[case](copy)
    check_one_line(train(images, copy), capsys.readouterr(), str(copy))


def test_states_of_the_earlier_format_are_read_and_exchanged_words_are_what_their_checksum_misses(
    images: Path, stopped: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(stopped, tmp_path)
    for name in Journal.SLOTS:
        data = (copy / name).read_bytes()
        _, sequence, n_text, n_block, _ = HEADER.unpack_from(data)
        start = -(-(HEADER.size + n_text) // 64) * 64
        text, block = data[HEADER.size : HEADER.size + n_text], data[start : start + n_block]
        head = HEADER.pack(SUMMED, sequence, n_text, n_block, sum_of_words(sequence, text, block))
        (copy / name).write_bytes(head + data[HEADER.size :])
    shutil.copytree(copy, tmp_path / "exchanged")
    assert train(images, copy) == 0 and "going on at step 13 " in capsys.readouterr().out
    check_the_same(copy, whole)
    exchanged(tmp_path / "exchanged" / "state-b.bin")
    assert Journal(tmp_path / "exchanged").read()[1] == 13  # the sum is the same


MISSING = {
    "all slots": Journal.SLOTS,
    "the configuration": ("config.json",),
    "slots and configuration": (*Journal.SLOTS, "config.json"),
}


@pytest.mark.parametrize("case", MISSING)
def test_files_that_are_gone(
    case: str, images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(stopped, tmp_path)
    for name in MISSING[case]:
        (copy / name).unlink()
    check_one_line(train(images, copy), capsys.readouterr(), str(copy))


@pytest.mark.parametrize("kept", [0, 1], ids=["none", "a part of one"])
def test_a_kill_before_the_first_state_is_whole_costs_nothing(
    kept: int, images: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in Journal.SLOTS:
        (folder / name).write_bytes(bytes(kept * 100))
    assert train(images, folder) == 0
    check_the_same(folder, whole)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind: this one may read everything")
@pytest.mark.parametrize("name", ["config.json", "log.jsonl", *Journal.SLOTS])
def test_a_file_without_permission(
    name: str, images: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(stopped, tmp_path)
    (copy / name).chmod(0)
    check_one_line(train(images, copy), capsys.readouterr(), str(copy / name))


# -------------------------------------------------------------------------------------------- a run that is finished

RESULT = {
    **ANY_JSON,
    **{
        f"without {name}": edited(lambda value, name=name: value.pop(name))
        for name in ("accuracy", "steps", "backward_samples", "seconds", "curve", "config")
    },
    **{
        f"{name} of another type": edited(lambda value, name=name: value.update({name: "some"}))
        for name in ("accuracy", "steps", "backward_samples", "seconds", "curve", "config", "gain")
    },
    "an accuracy of NaN": edited(lambda value: value.update(accuracy=float("nan"))),
    "an accuracy of 10^400": edited(lambda value: value.update(accuracy=10**400)),
    "seconds without a phase": edited(lambda value: value["seconds"].pop("select")),
    "seconds of NaN": edited(lambda value: value["seconds"].update(total=float("nan"))),
    "an empty curve": edited(lambda value: value.update(curve=[])),
    "a curve of numbers": edited(lambda value: value.update(curve=[1, 2])),
    "a point without seconds": edited(lambda value: value["curve"][0].pop("seconds")),
    "another run's": edited(lambda value: value["config"].update(seed=7)),
}


@pytest.mark.parametrize("case", RESULT)
def test_a_spoiled_result(
    case: str, images: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(whole, tmp_path)
    RESULT[case](copy / "result.json")
    if case not in ANY_JSON:
        with pytest.raises(StorageError, match="^[^\n]*$") as caught:
            read_result(copy)
        assert str(caught.value).startswith(f"{copy / 'result.json'}: ")
        return
    check_one_line(train(images, copy), capsys.readouterr(), str(copy / "result.json"))


@pytest.mark.parametrize("case", ["empty", "a folder", "a pickle", "a link to an endless file"])
@pytest.mark.parametrize("name", ["config.json", "result.json"])
def test_a_spoiled_run_of_a_comparison_is_a_line_of_it(
    case: str, name: str, images: Path, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = copy_of(compared, tmp_path)
    (spoiled,) = (copy / "runs").glob("top-loss-*")
    ANY_JSON[case](spoiled / name)
    assert compare(images, copy) == 1
    said = capsys.readouterr()
    assert said.err == "" and f"top loss, seed 0: failed: {spoiled / name}" in said.out
    assert "random, seed 0: " in said.out and "(from before)" in said.out
    assert not (spoiled / "unpickled").exists()


COSTS = {
    **ANY_JSON,
    "no machine": edited(lambda value: value.pop("machine")),
    "costs of a list": edited(lambda v: v.update(costs=[])),
    **{
        f"a cost of {text}": edited(lambda value, cost=cost: next(iter(value["costs"].values())).update(median=cost))
        for text, cost in (("NaN", float("nan")), ("0", 0), ("text", "slow"), ("-1", -1.0), ("infinity", float("inf")))
    },
    "a cost without phases": edited(lambda value: next(iter(value["costs"].values())).pop("phases")),
    "a phase of text": edited(lambda value: next(iter(value["costs"].values()))["phases"].update(score="none")),
    "a field more": edited(lambda value: next(iter(value["costs"].values())).update(mean=1.0)),
}


@pytest.mark.parametrize("case", COSTS)
def test_spoiled_costs(
    case: str, images: Path, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if case not in ANY_JSON:
        shutil.copy(compared / "costs-cpu-1.json", tmp_path)
        COSTS[case](tmp_path / "costs-cpu-1.json")
        with pytest.raises(StorageError, match="^[^\n]*costs-cpu-1.json: [^\n]*$"):
            Costs(tmp_path / "costs-cpu-1.json")
        return
    copy = copy_of(compared, tmp_path)
    COSTS[case](copy / "costs-cpu-1.json")
    check_one_line(compare(images, copy), capsys.readouterr(), str(copy / "costs-cpu-1.json"))


# ----------------------------------------------------------------------------------------------------------- a study

PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "results" / "study-confirm.json"
RESULT_FIELDS = "format protocol machine costs seconds entries failed".split()
ENTRY_FIELDS = "arm label dataset cell_keep budget accuracy cost key lr tuning errors".split()
STUDY = {
    **ANY_JSON,
    **{f"without {name}": edited(lambda value, name=name: value.pop(name)) for name in RESULT_FIELDS},
    **{f"{name} of another type": edited(lambda value, name=name: value.update({name: 5})) for name in RESULT_FIELDS},
    **{f"an entry without {name}": edited(lambda v, name=name: v["entries"][1].pop(name)) for name in ENTRY_FIELDS},
    "an accuracy of text": edited(lambda value: value["entries"][1]["accuracy"].update({"100": "good"})),
    "a seed of text": edited(lambda value: value["entries"][1]["accuracy"].update({"first": 1.0})),
    "a format of the future": edited(lambda value: value.update(format=99)),
}


@pytest.mark.parametrize("case", STUDY)
def test_a_spoiled_result_of_a_study(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "study-confirm.json"
    shutil.copy(PUBLISHED, path)
    STUDY[case](path)
    status = main(["study", "--render", str(path), "--out", str(tmp_path / "study.md")])
    check_one_line(status, capsys.readouterr(), str(path))
    assert not (tmp_path / "study.md").exists() and not (tmp_path / "unpickled").exists()


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("studied")
    with pytest.MonkeyPatch.context() as patch:
        small_study(patch)
        assert study(folder) == 0
    return folder


def small_study(patch: pytest.MonkeyPatch) -> None:
    from selbp_study import protocols

    cell = protocols.Cell("digits", "mlp", 4, (0.25,))
    small = protocols.Protocol("quick", "small", (cell,), ("random", "matching"), (0, 1), budgets=("steps",))
    patch.setitem(protocols.PROTOCOLS, "quick", small)


def study(folder: Path) -> int:
    return main(["study", "--protocol", "quick", "--workers", "0", "--out", str(folder), "--quiet"])


@pytest.mark.parametrize("case", ["empty", "a folder", "a pickle", "a list", "a pipe", "no UTF-8"])
@pytest.mark.parametrize("name", ["config.json", "result.json", "costs.json"])
def test_a_spoiled_file_of_a_study(
    case: str, name: str, studied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    small_study(monkeypatch)
    copy = copy_of(studied, tmp_path)
    if name == "costs.json":
        ANY_JSON[case](copy / name)
        check_one_line(study(copy), capsys.readouterr(), str(copy / name))
        return
    result = json.loads((copy / "study-quick.json").read_text())
    spoiled = copy / "runs" / next(entry["key"] for entry in result["entries"] if entry["arm"] == "matching")
    ANY_JSON[case](spoiled / name)
    assert study(copy) == 1
    said = capsys.readouterr()
    assert said.err == "" and str(spoiled / name) in said.out and "(1 failed)" in said.out


def test_a_text_is_written_beside_what_lies_in_its_temporary_files_place(tmp_path: Path) -> None:
    """A link that waits there is not followed."""
    other = tmp_path / "other"
    other.write_text("precious")
    (tmp_path / f".a.txt.partial-{os.getpid()}").symlink_to(other)
    write_text(tmp_path / "a.txt", "new")
    assert other.read_text() == "precious" and (tmp_path / "a.txt").read_text() == "new"
