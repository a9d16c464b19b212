"""Samples thought mislabelled, beside confident learning's, on Fashion-MNIST with 20 % planted wrong labels.

``python -m benchmarks.tools.suspects [result.json]``. Confident learning is the rule of Northcutt, Jiang and Chuang
(JAIR 2021), written here from the paper: the off-diagonal entries of the confident joint. It is given probabilities of
networks that have not seen the sample, two of them, each trained on half of the data by the same code in the same time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from selbp.info import machine
from selbp.sampling import ScoreTable, fit_proxy
from selbp.sampling.proxy import _fitted, _Plan, _scaled
from selbp.sampling.reading import read
from selbp_study.data import CHANGES, FASHION_MNIST, load

SHARE, CLASSES, SEEDS, LIKELY = 0.2, 10, range(5), 0.5
Found = tuple[Tensor, Tensor]  # (n,) bool, on the list; (n,) how suspect


def confident_learning(probability: Tensor, given: Tensor) -> Found:
    """Listed are samples that are confidently of another class: p_j at least the mean p_j of the samples given j.

    Of several such classes the most probable counts. The order is by the given label's probability, the least first.
    """
    own = probability.gather(1, given[:, None])[:, 0]
    threshold = torch.stack([probability[given == j, j].mean() for j in range(probability.shape[1])])
    confident = probability >= threshold
    likely = torch.where(confident, probability, -1.0).argmax(1)
    return confident.any(1) & (likely != given), -own


def by_table(data: TensorDataset, seed: int, *, halves: bool, passes: int) -> Found:
    """What ``suspects`` lists from a probability of one half on."""
    table = ScoreTable(len(data), CLASSES)
    fit_proxy(data, table, passes=passes, halves=halves, seed=seed)
    found = table.suspects(len(data))
    wrong = torch.zeros(len(data))
    wrong[found.ids] = found.probability
    return wrong >= LIKELY, wrong


def by_confidence(data: TensorDataset, seed: int, *, aware: bool, passes: int) -> Found:
    """Confident learning with two networks, trained by the plain or by the noise-aware loss."""
    x, y = _scaled(*read(data, "auto", len(data), workers=0), CLASSES)
    logits, _, _ = _fitted(x, y, _Plan(CLASSES, 64, passes, noisy=aware), seconds=None, halves=True, seed=seed)
    return confident_learning(torch.softmax(logits, 1), y)


WAYS: dict[str, Callable[[TensorDataset, int], Found]] = {
    "table, as auto_select fills it": lambda data, seed: by_table(data, seed, halves=False, passes=1),
    "table, halves": lambda data, seed: by_table(data, seed, halves=True, passes=1),
    "confident learning, plain loss": lambda data, seed: by_confidence(data, seed, aware=False, passes=1),
    "confident learning, noise-aware loss": lambda data, seed: by_confidence(data, seed, aware=True, passes=1),
}


def measure() -> dict[str, dict[str, float]]:
    """Of each way the means over seeds: precision and recall of its list, of its first so many, and seconds."""
    torch.set_num_threads(1)
    clean = load(FASHION_MNIST)
    rows: dict[str, list[list[float]]] = {name: [] for name in WAYS}
    for seed in SEEDS:
        noisy = CHANGES["noise"](clean, SHARE, seed)
        inputs, given = noisy.train.batch(torch.arange(len(noisy.train)))
        wrong = given != clean.train.labels
        for name, way in WAYS.items():
            started = time.process_time()
            listed, suspect = way(TensorDataset(inputs, given), seed)
            seconds = time.process_time() - started
            hits, count = int((listed & wrong).sum()), int(wrong.sum())
            first = suspect.topk(count).indices
            rows[name].append(
                [hits / max(1, int(listed.sum())), hits / count, float(wrong[first].double().mean()), seconds]
            )
    names = ("precision", "recall", "precision of as many as are wrong", "seconds")
    return {
        name: {
            key: round(statistics.fmean(column), 4) for key, column in zip(names, zip(*found, strict=True), strict=True)
        }
        for name, found in rows.items()
    }


def main(words: list[str]) -> None:
    """Print the table, and write it where a path is given."""
    found = measure()
    for name, figures in found.items():
        print(f"{name:40} {figures}")
    if words:
        result = {"data": f"Fashion-MNIST, {SHARE:.0%} wrong labels", "seeds": list(SEEDS), "machine": machine()}
        Path(words[0]).write_text(json.dumps({**result, "ways": found}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
