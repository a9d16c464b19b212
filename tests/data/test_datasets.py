"""Where data sets come from, what is said when they cannot be had, and what may see the test part."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from support.images import write_idx

from selbp_study.data import DataError, load, resolve
from selbp_study.data import datasets as module
from selbp_study.data.debian import apt_options, download_command, fetch_package, update_command

PACKAGE, INSIDE = "dataset-fashion-mnist", "usr/share/datasets/fashion-mnist"


def small_set(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    for prefix, n in (("train", 40), ("t10k", 10)):
        images = torch.randint(0, 256, (n, 6, 6), generator=generator)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images.to(torch.uint8))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", (torch.arange(n) % 10).to(torch.uint8))
    return folder


@pytest.fixture(autouse=True)
def no_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SELBP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "SYSTEM_ROOT", tmp_path / "nothing-is-installed")


def test_a_folder_is_read_and_normalised_by_its_training_part(tmp_path: Path) -> None:
    data = load("fashion-mnist", small_set(tmp_path / "set"))
    assert (len(data.train), len(data.test), data.n_classes) == (40, 10, 10)
    inputs, target = data.train.batch(torch.arange(40))
    assert inputs.shape == (40, 1, 6, 6) and inputs.dtype == torch.float32 and target.dtype == torch.int64
    assert abs(float(inputs.mean())) < 1e-5 and abs(float(inputs.std()) - 1) < 1e-3
    assert (data.test.mean, data.test.std) == (data.train.mean, data.train.std)


def test_the_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = load("fashion-mnist", small_set(tmp_path / "a"))
    assert first.fingerprint == load("fashion-mnist", small_set(tmp_path / "b")).fingerprint
    first.test.labels[0] = (first.test.labels[0] + 1) % 10
    assert first.fingerprint != load("fashion-mnist", tmp_path / "b").fingerprint


def test_held_out_cuts_the_training_part_only(tmp_path: Path) -> None:
    data = load("fashion-mnist", small_set(tmp_path / "set"))
    tuning = data.held_out(0.25, seed=3)
    assert (len(tuning.train), len(tuning.test)) == (30, 10)
    rows = {tuple(row.flatten().tolist()) for row in data.train.inputs}
    parts = [{tuple(row.flatten().tolist()) for row in split.inputs} for split in (tuning.train, tuning.test)]
    assert parts[0] | parts[1] == rows and not parts[0] & parts[1]
    assert not rows & {tuple(row.flatten().tolist()) for row in data.test.inputs}


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_broken_folder_is_an_error_that_names_it(tmp_path: Path, damage: str) -> None:
    path = small_set(tmp_path / "set") / "t10k-images-idx3-ubyte.gz"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte"):
        load("fashion-mnist", tmp_path / "set", fallback=True)  # a fallback never hides a file that is there


def test_unknown_names_and_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fashion-mnist, bible-kjv, digits"):
        load("cifar")
    with pytest.raises(DataError, match="no such folder"):
        load("fashion-mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="no folder"):
        load("digits", tmp_path)


def test_digits() -> None:
    data = load("digits")
    assert len(data.train) + len(data.test) == 1797 and data.train.inputs.shape[1:] == (8, 8)
    assert int(data.train.inputs.max()) == 255


@pytest.mark.parametrize("name", ["fashion-mnist", "bible-kjv"])
def test_the_fallback_is_said_and_off_by_default(name: str) -> None:
    def refuse(*_args: object, **_options: object) -> Path:
        raise DataError("there is no apt-get on this machine")

    said: list[str] = []
    with pytest.raises(DataError, match="no apt-get"):
        load(name, say=said.append, fetch=refuse)
    assert not said
    assert load(name, fallback=True, say=said.append, fetch=refuse).name == "digits"
    assert "no apt-get" in said[0] and "digits" in said[1]


def test_places_in_their_order(tmp_path: Path) -> None:
    """The system's copy, else the cache's, else fetched; a folder that lacks the file is not the system's copy."""

    def fetch(package: str, inside: str, destination: Path, **_options: object) -> Path:
        fetched.append((package, inside))
        return small_set(destination)

    fetched: list[tuple[str, str]] = []
    system = tmp_path / "nothing-is-installed" / INSIDE
    system.mkdir(parents=True)
    for _ in range(2):
        assert load("fashion-mnist", fetch=fetch).source == str(tmp_path / "cache" / "fashion-mnist")
    assert fetched == [(PACKAGE, INSIDE)]
    small_set(system)
    assert load("fashion-mnist", fetch=fetch).source == str(system) and len(fetched) == 1


class FakeApt:
    """Answers as apt-get and dpkg do; notes every command."""

    def __init__(self, answers: dict[str, int], tree: bool = True) -> None:
        self.commands: list[list[str]] = []
        self.answers = answers
        self.tree = tree

    def __call__(self, command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
        self.commands.append(list(command))
        private = any("Dir::State" in part for part in command)
        verb = "dpkg" if command[0] == "dpkg" else ("private " if private else "") + command[-1].replace(PACKAGE, "get")
        code = self.answers.get(verb, 0)
        if code == 0 and verb in ("get", "private get"):
            (folder / f"{PACKAGE}_1_all.deb").write_bytes(b"")
        if code == 0 and verb == "dpkg" and self.tree:
            small = Path(command[3]) / INSIDE
            small_set(small)
        return subprocess.CompletedProcess(list(command), code, "", f"W: noise\nE: {verb} refused" if code else "")


def fetch(tmp_path: Path, apt: FakeApt) -> Path:
    return fetch_package(PACKAGE, INSIDE, tmp_path / "cache" / "set", say=lambda _: None, run=apt, which=lambda _: "/x")


def test_the_machines_own_lists_come_first(tmp_path: Path) -> None:
    apt = FakeApt({})
    assert load("fashion-mnist", fetch(tmp_path, apt)).name == "fashion-mnist"
    assert [command[0] for command in apt.commands] == ["apt-get", "dpkg"]
    assert apt.commands[0] == download_command(PACKAGE, None)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["set"]  # nothing else is left behind


def test_private_lists_where_there_are_none(tmp_path: Path) -> None:
    apt = FakeApt({"get": 100})
    fetch(tmp_path, apt)
    assert [command[-1] for command in apt.commands[:3]] == [PACKAGE, "update", PACKAGE]
    for command in apt.commands[1:3]:
        values = [part for part in command if part.startswith(("Dir::State", "Dir::Cache"))]
        assert len(values) == 4 and all(str(tmp_path / "cache") in value for value in values)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"get": 100, "private update": 100}, "apt-get update failed: E: private update refused"),
        ({"get": 100, "private get": 100}, "failed: E: private get refused"),
        ({"dpkg": 2}, "dpkg -x failed: E: dpkg refused"),
    ],
)
def test_a_failed_fetch_says_why_and_leaves_nothing(tmp_path: Path, answers: dict[str, int], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        fetch(tmp_path, FakeApt(answers))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_package_without_the_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no folder"):
        fetch(tmp_path, FakeApt({}, tree=False))


def test_no_apt_is_an_error() -> None:
    with pytest.raises(DataError, match="no apt-get"):
        fetch_package(PACKAGE, INSIDE, Path("/nonexistent/set"), which=lambda _: None)


def test_no_suite_component_or_mirror_is_named() -> None:
    command = " ".join([*update_command(Path("/p")), *download_command(PACKAGE, Path("/p"))])
    assert not any(word in command for word in ("bookworm", "trixie", "main", "http", "-t "))
    assert "--allow-unauthenticated" not in command and apt_options(None)[:1] == ["-q"]


def test_label_noise_is_in_the_training_labels_alone() -> None:
    clean = load("digits")
    noisy = clean.with_label_noise(0.2)
    changed = clean.train.labels != noisy.train.labels
    assert int(changed.sum()) == round(0.2 * len(clean.train))  # each of them is another class
    assert torch.equal(clean.test.labels, noisy.test.labels) and torch.equal(clean.train.inputs, noisy.train.inputs)
    assert noisy.name == "digits+noise=0.2" and noisy.fingerprint != clean.fingerprint
    assert noisy.train.labels.min() >= 0 and noisy.train.labels.max() < 10
    again = resolve("digits+noise=0.2")
    assert again.fingerprint == noisy.fingerprint and again.name == noisy.name
    held_out = resolve("digits+noise=0.2-held-out")
    assert held_out.fingerprint == noisy.held_out().fingerprint and held_out.name == noisy.held_out().name
    # The samples held out are no better and no worse than the rest: 0.2, within 5 deviations of a draw of so many.
    wrong = (noisy.held_out().test.labels != clean.held_out().test.labels).float()
    assert abs(float(wrong.mean()) - 0.2) < 5 * (0.2 * 0.8 / len(wrong)) ** 0.5
    steps = torch.bincount((noisy.train.labels - clean.train.labels)[changed].remainder(10), minlength=10)
    assert steps[0] == 0 and (steps[1:] > 0).all()
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match="share"):
            clean.with_label_noise(share)
