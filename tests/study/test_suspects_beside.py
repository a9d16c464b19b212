"""Confident learning's rule as the benchmark has it, and the guide's figures of it."""

import json
from pathlib import Path

import torch
from torch.utils.data import TensorDataset

from benchmarks.tools.suspects import CLASSES, WAYS, confident_learning

ROOT = Path(__file__).resolve().parents[2]


def test_confident_learning_lists_what_is_confidently_of_another_class():
    """Thresholds are the mean own probabilities: (.9 + .2 + .55) / 3 = .55 of class 0, (.8 + .4) / 2 = .6 of 1."""
    first = torch.tensor([0.9, 0.2, 0.55, 0.2, 0.6], dtype=torch.float64)
    given = torch.tensor([0, 0, 0, 1, 1])
    listed, suspect = confident_learning(torch.stack([first, 1 - first], 1), given)
    assert listed.tolist() == [False, True, False, False, True]
    assert suspect.tolist() == [-0.9, -0.2, -0.55, -0.8, -0.4]


def test_every_way_lists_most_of_what_is_wrong():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, CLASSES, (30_000,), generator=generator)
    inputs = torch.eye(CLASSES)[truth] + 0.1 * torch.randn(30_000, CLASSES, generator=generator)
    wrong = torch.arange(30_000) % 5 == 0
    other = (truth + torch.randint(1, CLASSES, (30_000,), generator=generator)) % CLASSES
    data = TensorDataset(inputs, torch.where(wrong, other, truth))
    for name, way in WAYS.items():
        listed, suspect = way(data, 0)
        assert (listed & wrong).sum() > 0.5 * wrong.sum(), name
        assert suspect[wrong].mean() > suspect[~wrong].mean(), name


def test_the_guide_has_the_figures_of_the_result_file():
    ways = json.loads((ROOT / "benchmarks" / "results" / "suspects.json").read_text())["ways"]
    text = " ".join((ROOT / "docs" / "guides" / "sampling.md").read_text().split())
    mine, theirs = ways["table, as auto_select fills it"], ways["confident learning, plain loss"]
    order = "precision of as many as are wrong"
    for wanted in (
        f"one half, {mine['precision']:.0%} were wrong, and they held {mine['recall']:.0%}",
        f"listed {theirs['precision']:.0%} were wrong, and they held {theirs['recall']:.0%} of all",
        f"as were planted: {mine[order]:.0%} of the table's are wrong, and {theirs[order]:.0%} of confident learning's",
    ):
        assert wanted.replace("%", " %") in text, wanted
