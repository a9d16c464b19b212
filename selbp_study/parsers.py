"""What the command line reads: the options of ``selbp train | compare | study | bench | info``, and their help."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from selbp._version import __version__
from selbp_study.arguments import (
    above_zero,
    count_argument,
    keep_argument,
    list_argument,
    name_argument,
    rates_argument,
    seed_argument,
    seeds_argument,
    threads_argument,
)
from selbp_study.protocols import PROTOCOLS
from selbp_study.rules import ARMS, RULES

SELECTORS = {name: rule.summary for name, rule in RULES.items()}


def _training_options(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument(
        "--dataset",
        choices=["fashion-mnist", "bible-kjv", "digits"],
        default="fashion-mnist",
        help="bible-kjv: the next character of a text; a missing set is downloaded as a Debian package, digits come "
        "with scikit-learn (default: %(default)s)",
    )
    data.add_argument("--data", type=Path, metavar="DIR", help="folder with the data set's files")
    run = parser.add_argument_group("training")
    run.add_argument(
        "--model",
        choices=["cnn", "wide-cnn", "resnet", "mlp", "transformer"],
        help="network (default: cnn, or transformer for a text)",
    )
    run.add_argument(
        "--keep",
        type=keep_argument,
        metavar="K",
        help="share of each minibatch that runs backward (0.25), or a number of samples (32); 1 is one "
        "sample, 1.0 all (default: 0.25)",
    )
    length = run.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs",
        type=above_zero,
        metavar="E",
        help="length in passes over the data (default: 4; the demo: 3; of digits: 40)",
    )
    length.add_argument("--steps", type=count_argument, metavar="N", help="length in optimizer steps")
    run.add_argument("--batch-size", type=count_argument, metavar="N", help="samples of a minibatch (default: 128)")
    run.add_argument(
        "--backward", choices=["auto", "rows", "recompute"], help="how the chosen rows run backward (default: auto)"
    )
    run.add_argument("--scoring", choices=["same", "eval"], help="mode of the scoring forward (default: same)")
    run.add_argument(
        "--head-gradient",
        choices=["subset", "full"],
        help="full gives the last layer its exact full-batch gradient (default: subset)",
    )
    run.add_argument(
        "--evaluate-every", type=count_argument, metavar="N", help="steps between evaluations (default: a tenth)"
    )
    run.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    run.add_argument(
        "--threads",
        type=threads_argument,
        default=0,
        metavar="N",
        help="torch's threads (default: 0, as torch decides)",
    )
    parser.add_argument(
        "--quiet", action="store_true", help="no progress bar (there is none where stderr is no terminal)"
    )
    parser.add_argument("--debug", action="store_true", help="on an error, show where it came from")


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line: the list of every option would push the reason off the screen."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` and where to find help, and exit with 2."""
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help explains\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = OneLineParser(
        prog="selbp",
        description="Train a PyTorch model on a chosen, weighted part of each minibatch.",
        epilog="selbp COMMAND --help explains a command, with examples. The command's processes keep the memory that "
        "they free (selbp.keep_freed_memory), which your own program does only if it says so.",
    )
    parser.add_argument("--version", action="version", version=f"selbp {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    raw = argparse.RawDescriptionHelpFormatter

    train = commands.add_parser(
        "train",
        help="one training run",
        formatter_class=raw,
        description="Train one model; log, state and result go to --out. Whatever ends the process, a kill or Ctrl-C,\n"
        "only the step in flight is lost: the same command with --resume goes on from there, bit for bit. If the\n"
        "machine itself fails, up to 20 seconds are lost.",
        epilog="examples:\n"
        "  selbp train --selector matching --keep 0.25\n"
        "  selbp train --selector top-loss:weights=refit --epochs 2 --out runs/top\n"
        "  selbp train --selector top-loss:weights=refit --epochs 2 --out runs/top --resume\n"
        "  torchrun --nproc-per-node 4 -m selbp_study train --selector matching    # each minibatch in four parts\n\n"
        f"selectors (options as name:option=value,...):\n{_lines(SELECTORS)}\n\n"
        "An arm, such as auto, is a selector with training options of its own: selbp compare --help lists them.",
    )
    train.add_argument(
        "--selector", default="matching", metavar="RULE", help="a selector or an arm, see below (default: %(default)s)"
    )
    train.add_argument("--lr", type=above_zero, help="peak learning rate (default: the rule's own)")
    train.add_argument(
        "--seed", type=seed_argument, default=0, help="weights, order of samples, draws (default: %(default)s)"
    )
    train.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the run (default: runs/DATA-RULE-seedN-DIGEST, one for each set of options)",
    )
    train.add_argument("--resume", action="store_true", help="go on with the run in the folder")
    _training_options(train)

    compare = commands.add_parser(
        "compare",
        help="selection rules by seeds: a table, plots, one page",
        formatter_class=raw,
        description="Train every arm with every seed; print a table; write results.jsonl, table.md, three plots and\n"
        "report.html to --out. Runs are cached by configuration: the same command goes on where it was stopped,\n"
        "and an arm that fails is a line of the table, not the end of the others.",
        epilog="examples:\n"
        "  selbp compare --preset demo\n"
        "  selbp compare --arms random,top-loss,matching --seeds 0-4 --keep 0.1 --epochs 8 --out runs/tenth\n"
        "  selbp compare --arms full,random,matching:ridge=0.01 --budget samples\n"
        "  selbp compare --arms random,matching --keep 0.1 --tune 0.02,0.05,0.1   # rates on held-out training data\n\n"
        f"arms:\n{_arm_help()}",
    )
    compare.add_argument("--preset", choices=["demo"], help="demo: the seven arms of `make demo`, minutes on two cores")
    compare.add_argument("--arms", type=list_argument, metavar="A,B,...", help="rules to compare (default: the demo's)")
    compare.add_argument("--seeds", "--seed", type=seeds_argument, metavar="S", help="0-4 or 0,1,7 (default: 0-2)")
    compare.add_argument(
        "--budget",
        choices=["steps", "samples", "time"],
        default="steps",
        help="what arms share: steps, samples run backward, or time, by the measured cost of each "
        "arm's step (default: %(default)s)",
    )
    rates = compare.add_mutually_exclusive_group()
    rates.add_argument("--lr", type=above_zero, help="one peak learning rate for every arm (default: each rule's own)")
    rates.add_argument(
        "--tune",
        type=rates_argument,
        metavar="R,R,...",
        help="choose each arm's rate among these, on a tenth of the training data held out",
    )
    compare.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder (default: runs/compare-DATA-MODEL-DIGEST, the same with more arms or seeds)",
    )
    _training_options(compare)

    study = commands.add_parser(
        "study",
        help="whole protocols: tuned arms, equal steps, samples and time, verdicts",
        formatter_class=raw,
        description="Run a protocol: measure what a step of each arm costs, tune each arm on held-out training data,\n"
        "train at each budget with each seed. Everything is kept in --out: the same command goes on where it was\n"
        "stopped, and protocols that share a folder share what is equal.",
        epilog="examples:\n"
        "  selbp study --protocol quick\n"
        "  selbp study --protocol main --workers 2 --results benchmarks/results\n"
        "  selbp study --protocol main --name explore --arms random,matching,matching@cut=2 --seeds 0-2\n"
        "  selbp study --render benchmarks/results --out docs/measurements/study.md\n\n"
        f"protocols:\n{_lines({name: protocol.title for name, protocol in PROTOCOLS.items()})}",
    )
    study.add_argument(
        "--protocol",
        choices=list(PROTOCOLS),
        metavar="NAME",
        default="main",
        help="which, see below (default: %(default)s)",
    )
    study.add_argument("--arms", type=list_argument, metavar="A,B,...", help="other arms than the protocol's")
    study.add_argument("--seeds", "--seed", type=seeds_argument, metavar="S", help="other seeds")
    study.add_argument("--steps", type=count_argument, metavar="N", help="another length, for every cell")
    study.add_argument("--name", type=name_argument, help="another name of the result, for a protocol that was changed")
    study.add_argument(
        "--workers", type=threads_argument, metavar="W", help="processes of one thread (default: all cores)"
    )
    study.add_argument("--data", type=Path, metavar="DIR", help="folder with Fashion-MNIST's four IDX files")
    study.add_argument("--out", type=Path, metavar="DIR", help="folder of all runs (default: runs/study)")
    study.add_argument("--results", type=Path, metavar="DIR", help="where the result file goes (default: --out)")
    study.add_argument(
        "--render",
        type=Path,
        metavar="DIR",
        help="run nothing: write the document of DIR's results to --out (default: docs/measurements/study.md)",
    )
    study.add_argument(
        "--quiet", action="store_true", help="no progress bar (there is none where stderr is no terminal)"
    )
    study.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)

    bench = commands.add_parser(
        "bench",
        help="operators, rules and whole steps against peers and the roofline",
        formatter_class=raw,
        description="Run the benchmark suites of a source checkout, ten minutes in all: ours against every peer that\n"
        "is installed and against this machine's roofline, in one run. Further arguments go to them:\n"
        "names of suites, --quick, --list, --peers, --filter TEXT, --seconds S, --threads N, --device cuda,\n"
        "--clock wall|process, --check, --no-memory (python -m benchmarks --help).",
        epilog="examples:\n  selbp bench --out runs/bench\n  selbp bench selection throughput --quick\n"
        "  selbp bench --peers          # what is installed, and how to get the rest",
    )
    bench.add_argument("--seed", type=seed_argument, help="seed of the inputs")
    bench.add_argument("--out", type=Path, metavar="DIR", help="folder of the results")
    bench.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)

    info = commands.add_parser(
        "info",
        help="what was built, what is in use, why something is missing",
        formatter_class=raw,
        description="Print versions, what was built, the CPU level in use, threads, and the state of CUDA and Triton.",
        epilog="examples:\n  selbp info\n  selbp info --json",
    )
    info.add_argument("--json", action="store_true", help="as one JSON object")
    info.add_argument("--out", type=Path, metavar="FILE", help="write it there as well")
    info.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    info.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    return parser


def _lines(texts: Mapping[str, str]) -> str:
    """A line for each name, with the texts below each other."""
    width = max(map(len, texts))
    return "\n".join(f"  {name:<{width}} {text}" for name, text in texts.items())


def _arm_help() -> str:
    named = {name: f"{title}: {text}" for name, (title, text) in ARMS.items()}
    return (
        f"{_lines(SELECTORS | named)}\n\nauto is selbp.auto_select: batches drawn by a table of scores while that "
        "pays, and a noise-aware loss.\n\nAn arm is written rule:option=value,...@option=value,..., the rule's options "
        "after the colon and\nthe arm's own training after the @: keep, lr, cut, head_gradient, backward, scoring, "
        "batch_size, precision,\nshare (of the budget), title, sampling (auto, scored, ...), every and between (a "
        "schedule), or any further\nargument of the step. In a list, write ; for the comma between options, and quote "
        "the list: a shell ends the\ncommand at a bare ;.\n  --arms 'random,matching:ridge=0.01;rule=raw'"
    )
