"""The command line, as a user meets it: help, results, one line on bad input, interrupts that can be resumed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import processes
from support.images import small_dataset, write_set

import selbp
from selbp_study import commands
from selbp_study.arguments import keep_argument, list_argument, seeds_argument
from selbp_study.arms import Arm
from selbp_study.cli import build_parser, main
from selbp_study.rules import RULES

FAST = ["--model", "mlp", "--steps", "12", "--batch-size", "16", "--threads", "1", "--quiet"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set"), small_dataset())


def test_the_library_run_as_a_module_starts_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: started.append([path, *arguments]))
    monkeypatch.setattr(sys, "argv", ["selbp", "info", "--json"])
    runpy.run_module("selbp", run_name="__main__")
    assert started == [[sys.executable, sys.executable, "-m", "selbp_study", "info", "--json"]]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="the command is in the package selbp_study, which is not installed here"):
        runpy.run_path(str(Path(selbp.__file__).with_name("__main__.py")), run_name="__main__")
    assert len(started) == 1


def test_train_then_refuse_then_resume(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--data", str(images), *FAST, "--selector", "top-loss", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    assert "test accuracy" in capsys.readouterr().out
    assert main(command) == 2
    assert re.fullmatch(r"selbp: .* holds a run already.*--resume.*\n", capsys.readouterr().err)
    assert main([*command, "--resume"]) == 0
    assert "is finished" in capsys.readouterr().out
    assert main([*command, "--resume", "--lr", "0.3"]) == 2
    assert "holds another run: lr: 0.05, not 0.3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "told", "backward"),
    [
        ("full --keep 0.25", "12 steps, 16 of 16 samples run backward", 12 * 16),
        ("full@keep=4", "12 steps, 16 of 16 samples run backward", 12 * 16),
        ("top-loss --keep 4", "12 steps, 4 of 16 samples run backward", 12 * 4),
        ("auto --keep 8", "12 steps, 8 samples run backward, drawn from pools of 256", 12 * 8),
        ("auto-half --keep 8", "6 of 12 steps, 8 samples run backward, drawn from pools of 256", 6 * 8),
        ("rho-loss --keep 8", "12 steps, 8 of 128 samples run backward", 12 * 8),
        ("info-batch --keep 8", "12 steps, 8 samples run backward\n", 12 * 8),
    ],
)
def test_train_says_what_runs(
    options: str, told: str, backward: int, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(images), *FAST, "--selector", *options.split(), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert told in out and f"{backward} backward samples" in out


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(
    "command", [["train", "--selector", "random"], ["compare", "--arms", "random", "--seeds", "0"]]
)
def test_a_bar_is_drawn_on_a_terminal_alone(
    command: list[str],
    terminal: bool,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    options = [option for option in FAST if option != "--quiet"]
    assert main([*command, "--data", str(images), *options, "--out", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert ("samples/s" in err) == terminal and "\r" not in out and (terminal or err == "")


@pytest.mark.parametrize("changes", [["--model", "transformer"], ["--keep", "17"], ["--selector", "top-loss@x=1"]])
def test_arguments_are_checked_before_the_folder(
    changes: list[str], images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", "--data", str(images), *FAST, "--selector", "random", "--out", str(tmp_path)]
    assert main(command) == 0 and main([*command, *changes]) == 2
    message = capsys.readouterr().err
    assert changes[1].rpartition("@")[2] in message and "holds" not in message
    assert main([*command, "--lr", "0.3"]) == 2
    assert "holds another run: lr: 0.05, not 0.3. Another --out" in capsys.readouterr().err


def test_a_missing_folder_recommends_what_the_command_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = ["--data", str(tmp_path / "missing"), "--out", str(tmp_path / "out")]
    assert main(["train", *missing]) == 2
    assert "or use --dataset digits" in capsys.readouterr().err
    assert main(["study", "--protocol", "quick", "--workers", "0", *missing]) == 2
    message = capsys.readouterr().err
    assert "no such folder" in message and "--dataset" not in message


def test_compare_prints_the_table_and_the_page(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--data", str(images), *FAST, "--seeds", "0-1", "--out", str(tmp_path)]
    assert main(command) == 0
    out = capsys.readouterr().out
    for name in commands.DEMO_ARMS:
        assert f"| {Arm.parse(name).label} " in out
    assert f"page: {tmp_path / 'report.html'}" in out and (tmp_path / "report.html").exists()
    assert main(command) == 0
    assert capsys.readouterr().out.count("(from before)") == 2 * len(commands.DEMO_ARMS)


def test_digits_train_long_enough_to_learn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--dataset", "digits", "--model", "mlp", "--arms", "random", "--seeds", "0", "--quiet"]
    for place, more in enumerate(([], ["--preset", "demo"])):
        assert main([*command, *more, "--threads", "1", "--out", str(tmp_path / str(place))]) == 0
        rows = (tmp_path / str(place) / "results.jsonl").read_text().splitlines()
        assert [json.loads(row)["steps"] for row in rows] == [440] and json.loads(rows[0])["accuracy"] > 90
    assert "Every arm takes the same number of steps." in capsys.readouterr().out


def test_compare_leaves_the_report_of_another_comparison_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*changes: str) -> int:
        return main(["compare", "--data", str(images), *FAST, *changes, "--out", str(tmp_path)])

    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file() and path.name[0] != "."}

    two = ("--arms", "random,top-loss", "--seeds", "0-1")
    assert run(*two) == 0
    before = files()
    for changes, reason in (
        (("--arms", "random,full", "--seeds", "0-1"), r"top loss, seed 0, and 1 more\."),
        (("--arms", "random,top-loss", "--seeds", "0"), r"random, seed 1, and 1 more\."),
        ((*two, "--steps", "13"), r"random, seed 0 \(steps: 12, not 13.*\), and 3 more\."),
        ((*two, "--lr", "0.07"), r"random, seed 0 \(lr: 0.05, not 0.07\), and 3 more\."),
        ((*two, "--keep", "2", "--tune", "0.1,0.2"), r"random, seed 0 \(keep: 0.25, not 2\), and 3 more\."),
        ((*two, "--batch-size", "8", "--budget", "time"), r"random, seed 0 \(batch_size: 16, not 8\), and 3 more\."),
    ):
        capsys.readouterr()
        assert run(*changes) == 2, changes
        message = capsys.readouterr().err
        assert re.search(f"holds another comparison, with runs that this one lacks: {reason}.*--out", message), message
        assert files() == before  # nothing was measured or tuned either
    assert run(*two) == 0 and run("--arms", "top-loss,random,full", "--seeds", "0-2") == 0
    assert run("--arms", "top-loss,random,full", "--seeds", "0-2") == 0
    (tmp_path / "results.jsonl").write_text('{"arm": "random"}\n')
    assert run(*two) == 2 and "line 1 is no run of a comparison" in capsys.readouterr().err


OWN = (["--steps", "13"], ["--batch-size", "8"], ["--lr", "0.07"], ["--keep", "2"], ["--head-gradient", "full"])


def test_comparisons_with_other_settings_have_folders_of_their_own(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["compare", "--data", str(images), *FAST, "--arms", "random", "--seeds", "0"]

    def first_line(*changes: str) -> str:
        assert main([*command, *changes]) == 0, changes
        return capsys.readouterr().out.splitlines()[0]

    first = first_line()
    assert re.fullmatch(r"in runs/compare-fashion-mnist-mlp-[0-9a-f]{8}: random; seeds 0", first)
    folder = first.partition(": ")[0]
    assert first_line("--arms", "top-loss,random", "--seeds", "0-1") == f"{folder}: top-loss, random; seeds 0, 1"
    others = [first_line(*changes).partition(": ")[0] for changes in (*OWN, ["--budget", "samples"], ["--tune", "0.1"])]
    assert len({folder, *others}) == 1 + len(others) == len(list((tmp_path / "runs").iterdir()))
    report = (tmp_path / folder.removeprefix("in ") / "report.html").read_text()
    for other in (["--arms", "top-loss"], ["--seeds", "1"]):  # the report with more of them stays
        assert first_line(*other).partition(": ")[0] not in (folder, *others)
    assert (tmp_path / folder.removeprefix("in ") / "report.html").read_text() == report


def test_trainings_with_other_settings_have_folders_of_their_own(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["train", "--data", str(images), *FAST, "--selector", "random"]
    for changes in ([], *OWN, ["--seed", "1"]):
        assert main([*command, *changes]) == 0, changes
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(folders) == 2 + len(OWN)
    assert all(re.fullmatch(r"fashion-mnist-random-seed[01]-[0-9a-f]{8}", name) for name in folders)
    assert main(command) == 2 and "holds a run already: --resume" in capsys.readouterr().err
    assert main([*command, "--resume"]) == 0 and "is finished" in capsys.readouterr().out
    assert main([*command, "--resume", "--steps", "14"]) == 0  # what runs with other options is said, not taken up
    assert f"no run yet: starting one; with other settings there are runs/{folders[0]}, " in capsys.readouterr().out


def test_a_tuned_comparison_goes_on_and_another_tuning_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["compare", "--data", str(images), *FAST, "--arms", "random", "--seeds", "0", "--out", str(tmp_path)]
    assert main([*command, "--tune", "0.0001,0.2"]) == 0 == main([*command, "--tune", "0.0001,0.2"])
    before = (tmp_path / "tuning.json").read_text()
    assert main([*command, "--tune", "0.0001,0.1"]) == 2
    assert "(lr: 0.2, not 0.1)" in capsys.readouterr().err and (tmp_path / "tuning.json").read_text() == before


def test_compare_with_a_failing_arm_exits_1_and_keeps_the_rest(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = ["--arms", "random,top-loss", "--lr", "1e30", "--seeds", "0"]
    assert main(["compare", "--data", str(images), *FAST, *arms, "--out", str(tmp_path)]) == 1
    assert "no longer finite" in capsys.readouterr().out


def test_tune_writes_what_decided(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["--arms", "random", "--tune", "0.0001,0.2", "--seeds", "0"]
    assert main(["compare", "--data", str(images), *FAST, *arms, "--out", str(tmp_path)]) == 0
    assert set(json.loads((tmp_path / "tuning.json").read_text())["random"]) == {"0.0001", "0.2"}
    assert "random: rate 0.2 (held-out accuracy by rate" in capsys.readouterr().out


BAD = {
    "unknown selector": (["train", "--selector", "best"], "there is no selector 'best'"),
    "unknown option": (["train", "--selector", "random:colour=red"], "has no option 'colour': it has none"),
    "another option": (["train", "--selector", "matching:colour=red"], "its options are rule, ridge, nonnegative"),
    "an arm's option": (["train", "--selector", "auto:pool=64"], "write it out, full@keep=48,sampling=auto"),
    "step's option": (["train", "--selector", "random@x=1"], "--selector random@x=1: training options 'x=1'"),
    "an arm's step": (["compare", "--arms", "random@x=1"], "--arms random@x=1: training options 'x=1'"),
    "model": (["compare", "--arms", "random", "--model", "transformer"], "selbp: --model transformer: "),
    "keep": (["compare", "--arms", "random", "--keep", "500"], "--keep must be at most the minibatch's 128"),
    "nearly": (["train", "--selector", "toploss:weights=refit"], "no selector 'toploss' (did you mean top-loss?)"),
    "a comma": (["compare", "--arms", "random,matching:ridge=1,rule=raw"], "write ; between a rule's options"),
    "arms, too": (["compare", "--arms", "best"], "and the arms matching-head, "),
    "selector value": (["train", "--selector", "loss-percentile:beta=-1"], "beta"),
    "rows": (["train", "--batch-size", "100000"], "--batch-size"),
    "device": (["train", "--device", "abacus"], "--device abacus"),
    "arm": (["compare", "--arms", "random,best"], "there is no selector 'best'"),
    "rule alone": (["train", "--selector", "rho"], "take the arm rho-loss"),
    "rule alone in a list": (["compare", "--arms", "random,rho"], "take the arm rho-loss"),
    "twice": (["compare", "--arms", "random,random"], "random is given twice"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(case: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command, reason = BAD[case]
    assert main([*command, "--data", str(images), "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("selbp: ") and message.count("\n") == 1 and reason in message
    assert main([*command, "--data", str(images), "--out", str(tmp_path / "out"), "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_broken_file_is_one_line_that_names_it(
    tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for path in images.iterdir():
        (folder / path.name).write_bytes(path.read_bytes()[: 40 if "t10k-images" in path.name else None])
    assert main(["train", "--data", str(folder), *FAST, "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert str(folder / "t10k-images-idx3-ubyte.gz") in message and message.count("\n") == 1


USAGE = [
    "",
    "fly",
    "train --kep 3 x",
    "train --keep half",
    "train --keep 1.5",
    "train --epochs 0",
    "train --steps 0",
    "train --lr -1",
    "compare --seeds a",
    "compare --seeds 4-2",
    "compare --tune x",
]


@pytest.mark.parametrize("line", USAGE)
def test_usage_errors(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    message = capsys.readouterr().err
    assert caught.value.code == 2 and message.startswith("selbp") and message.count("\n") == 1
    assert "--help" in message


@pytest.mark.parametrize("command", ["train", "compare", "info"])
def test_an_out_that_cannot_be_written_is_one_line_that_names_it(
    command: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / "file" / "run"
    line = [command, "--out", str(out)]
    if command != "info":
        line += ["--data", str(images), *FAST]
    if command == "compare":
        line += ["--arms", "random", "--seeds", "0"]
    assert main(line) != 0
    message = capsys.readouterr().err
    assert re.fullmatch(rf"selbp: {re.escape(str(tmp_path / 'file'))}\S*: Not a directory\n", message), message


@pytest.mark.parametrize("command", ["train", "compare", "bench", "info"])
def test_help_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and "example" in text and "--out" in text
    assert command in ("bench", "info") or all(name in text for name in RULES)


def test_every_command_takes_seed_and_out() -> None:
    for command in ("train", "compare", "bench", "info"):
        build_parser().parse_args([command, "--seed", "1", "--out", "x"])


def test_arguments() -> None:
    assert (keep_argument("1"), type(keep_argument("1.0"))) == (1, float)
    assert seeds_argument("0-2,7") == [0, 1, 2, 7]
    assert list_argument("random, matching:ridge=1;rule=raw") == ["random", "matching:ridge=1,rule=raw"]


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in (selbp.__version__, torch.__version__, "native core", "CPU level in use", "threads", "CUDA", "triton"):
        assert part in text
    assert main(["info", "--json", "--out", str(tmp_path / "info.json")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "info.json").read_text())


def test_bench_outside_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "site-packages" / "selbp" / "commands.py"))
    assert main(["bench"]) == 2
    assert "source checkout" in capsys.readouterr().err


def test_bench_hands_its_arguments_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    monkeypatch.setattr(commands, "__file__", str(tmp_path / "selbp" / "commands.py"))
    seen: list[list[str]] = []

    def note(command: list[str], **_options: object) -> subprocess.CompletedProcess[bytes]:
        seen.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(commands.subprocess, "run", note)
    assert main(["bench", "--seed", "4", "-k", "gram"]) == 3
    assert seen[0][1:] == ["-m", "benchmarks", "-k", "gram", "--seed", "4"]


def _interrupted(left: int, line: list[str]) -> None:
    """The command, with Ctrl-C in the step number ``left``."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with the signal ignored
    advance = commands.Bar.__call__
    steps = itertools.count(1)

    def interrupting(bar: commands.Bar, samples: int, loss: float) -> None:
        if next(steps) == left:
            signal.raise_signal(signal.SIGINT)
        advance(bar, samples, loss)

    commands.Bar.__call__ = interrupting  # type: ignore[method-assign]
    sys.exit(main(line))


@pytest.mark.parametrize("command", ["train", "compare"])
def test_ctrl_c_leaves_a_state_to_resume_and_says_so(
    command: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = (
        ["--selector", "random", "--resume"] if command == "train" else ["--arms", "random,top-loss", "--seeds", "0"]
    )
    line = [command, "--data", str(images), *FAST, *extra, "--out", str(tmp_path)]
    stopped = processes.run(_interrupted, 7, line)
    assert stopped.returncode == 130, stopped.stderr
    assert "stopped" in stopped.stdout and "same command" in stopped.stdout and "Traceback" not in stopped.stderr
    assert main(line) == 0
    if command == "train":
        assert "going on at step 7 " in capsys.readouterr().out


def test_importing_the_command_line_is_light() -> None:
    heavy = ("triton", "matplotlib", "sklearn", "scipy")
    code = f"import sys, selbp_study.cli; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_comparison_at_equal_time_measures_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--dataset digits --model mlp --arms random,matching --steps 6 --seeds 0 --threads 1 --budget time"
    arguments = ["compare", *options.split(), "--quiet", "--out", str(tmp_path)]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("ms a step") == 2 and "same time" in (tmp_path / "table.md").read_text()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert rows[1]["config"]["steps"] == 6 < rows[0]["config"]["steps"]  # random, which scores nothing, gets more
    assert main(arguments) == 0 and capsys.readouterr().out.count("(from before)") == 2


def test_a_study_from_the_command_line_is_cached_and_rendered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from selbp_study import protocols

    cell = protocols.Cell("digits", "mlp", 4, (0.25,))
    small = protocols.Protocol("quick", "small", (cell,), ("random", "matching"), (0, 1), own_keeps=(8, 16))
    monkeypatch.setitem(protocols.PROTOCOLS, "quick", small)
    arguments = ["study", "--protocol", "quick", "--workers", "0", "--out", str(tmp_path), "--quiet"]
    assert main(arguments) == 0
    first = (tmp_path / "study-quick.json").read_text()
    assert main(arguments) == 0 and (tmp_path / "study-quick.json").read_text() == first
    assert (tmp_path / "study-quick.html").stat().st_size > 50_000
    for changes, lost in (
        (["--seeds", "0"], "seeds that this one lacks: 1. --name"),
        (["--arms", "random,full"], "arms that this one lacks: matching. --name"),
        (["--steps", "5"], "cells that this one lacks: 4 steps of digits. --name"),
    ):
        capsys.readouterr()
        assert main([*arguments, *changes]) == 2 and lost in capsys.readouterr().err
        assert (tmp_path / "study-quick.json").read_text() == first
    assert main([*arguments, "--seeds", "0", "--name", "one"]) == 0 and (tmp_path / "study-one.json").exists()
    assert main(["study", "--render", str(tmp_path), "--out", str(tmp_path / "study.md")]) == 0
    assert "digits, MLP, 32 of 128 samples" in (tmp_path / "study.md").read_text()
    for bad, word in (
        (["--render", str(tmp_path / "runs")], "no study-"),
        (["--arms", "random,best"], "best"),
        (["--seeds", "1000"], "1000"),
        (["--arms", "matching"], "random"),
    ):
        capsys.readouterr()
        assert main([*arguments, *bad]) == 2 and word in capsys.readouterr().err


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "{module}":
            raise ModuleNotFoundError(name, name="{module}")

sys.meta_path.insert(0, Missing())
import selbp
from selbp_study.cli import main
sys.exit(main(["train", "--data", sys.argv[1], "--steps", "2", "--out", sys.argv[2]]))
"""


@pytest.mark.parametrize("module", ["numpy", "tqdm"])
def test_what_the_library_does_not_need_is_named_where_the_command_does(module, images, tmp_path):
    """The import of selbp itself needs torch alone."""
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT.format(module=module), str(images), str(tmp_path / "run")]
    tried = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert tried.returncode == 1
    assert tried.stderr.splitlines()[-1] == f"selbp: {module} is not installed: pip install 'selbp[study]'"
