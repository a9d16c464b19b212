"""Changes of a data set's *training* part that its name tells: ``fashion-mnist+noise=0.2``, ``...+long-tail=50``.

A name means the same samples everywhere. Each of several changes is drawn from a seed of its own, that of its place
in the name: from one seed, a later change would fall on the very samples that an earlier one changed. The test part
never changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from selbp_study.data.datasets import HELD_OUT, NOISE_STREAM, Dataset, check_share, load
from selbp_study.data.idx import DataError

CONFUSED = 6  # classes that class-dependent noise touches


def label_noise(data: Dataset, share: float, seed: int = 0) -> Dataset:
    """Turn ``share`` of all labels into another class, each as likely."""
    return data.with_label_noise(share, seed)


def class_noise(data: Dataset, share: float, seed: int = 0) -> Dataset:
    """Turn ``share`` of the labels of the six most confusable classes into the class that looks most alike.

    Classes look alike where the mean images of their samples are near each other. Each of the six with the nearest
    neighbours is confused with its neighbour, so that noise has a direction, as people's mistakes have.
    """
    check_share("share", share)
    if data.train.labels.dim() != 1 or data.n_classes < 2:
        raise ValueError(f"class-noise needs one label of at least two classes a sample, {data.name} has none")
    alike, distance = nearest_classes(data.train.inputs, data.train.labels, data.n_classes)
    confused = distance.argsort(stable=True)[:CONFUSED]
    generator = torch.Generator().manual_seed(seed + NOISE_STREAM)
    labels = data.train.labels.clone()
    for label in confused.sort().values.tolist():
        own = (data.train.labels == label).nonzero().squeeze(1)
        wrong = own[torch.randperm(len(own), generator=generator)[: round(share * len(own))]]
        labels[wrong] = alike[label]
    return _changed(
        data,
        f"class-noise={share:g}",
        labels=labels,
        what=f"{share:.0%} of the labels of {len(confused)} classes turned into the class most alike (seed {seed})",
    )


def long_tail(data: Dataset, ratio: float, seed: int = 0) -> Dataset:
    """Keep of class c the share ``ratio ** (-c / (C - 1))``: the first class whole, of the last one in ``ratio``.

    The profile of Cui et al., "Class-Balanced Loss Based on Effective Number of Samples" (2019). The test part stays
    balanced.
    """
    if not 1 < ratio < len(data.train):
        raise ValueError(f"ratio must be a number above 1 and below the number of samples, got {ratio!r}")
    generator = torch.Generator().manual_seed(seed + NOISE_STREAM)
    kept = []
    for label in range(data.n_classes):
        own = (data.train.labels == label).nonzero().squeeze(1)
        share = ratio ** (-label / max(1, data.n_classes - 1))
        kept.append(own[torch.randperm(len(own), generator=generator)[: max(1, round(share * len(own)))]])
    chosen = torch.cat(kept).sort().values
    return replace(
        data,
        name=f"{data.name}+long-tail={ratio:g}",
        train=data.train.take(chosen),
        source=f"{data.source}, classes thinned out to 1 in {ratio:g} (seed {seed})",
    )


def duplicates(data: Dataset, share: float, seed: int = 0) -> Dataset:
    """Replace ``share`` of the samples by copies of others, labels included."""
    check_share("share", share)
    generator = torch.Generator().manual_seed(seed + NOISE_STREAM)
    order = torch.randperm(len(data.train), generator=generator)
    count = round(share * len(order))
    source = torch.arange(len(order))
    source[order[:count]] = order[count:][torch.randint(len(order) - count, (count,), generator=generator)]
    return replace(
        data,
        name=f"{data.name}+duplicates={share:g}",
        train=data.train.take(source),
        source=f"{data.source}, {share:.0%} of the training samples are copies of others (seed {seed})",
    )


CHANGES: dict[str, Callable[..., Dataset]] = {
    "noise": label_noise,
    "class-noise": class_noise,
    "long-tail": long_tail,
    "duplicates": duplicates,
}


def apply(data: Dataset, change: str) -> Dataset:
    """``data`` with the change that ``NAME=NUMBER`` names. Raises DataError for another name or number."""
    name, _, number = change.partition("=")
    if name not in CHANGES:
        raise DataError(f"there is no change {name!r} of a data set; there are {', '.join(CHANGES)}")
    try:
        return CHANGES[name](data, float(number), seed=data.name.count("+"))
    except ValueError as error:
        raise DataError(f"{data.name}+{change}: {error}") from error


def resolve(text: str, folder: Path | None = None) -> Dataset:
    """The data set ``NAME[+CHANGE=NUMBER ...][-held-out]``: what :attr:`Dataset.name` says, made from its files."""
    name, *changes = text.removesuffix(HELD_OUT).split("+")
    data = load(name, folder, say=lambda _text: None)
    for change in changes:
        data = apply(data, change)
    return data.held_out() if text.endswith(HELD_OUT) else data


def nearest_classes(inputs: Tensor, labels: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """(C,) int64 the class whose mean input is nearest to each class's, and (C,) float64 how far it is."""
    flat = inputs.reshape(len(inputs), -1).double()
    sums = torch.zeros(n_classes, flat.shape[1], dtype=torch.float64).index_add_(0, labels, flat)
    means = sums / torch.bincount(labels, minlength=n_classes).clamp(min=1).unsqueeze(1)
    distance = torch.cdist(means, means).fill_diagonal_(torch.inf)
    nearest = distance.min(1)
    return nearest.indices, nearest.values


def _changed(data: Dataset, name: str, *, labels: Tensor, what: str) -> Dataset:
    return replace(
        data, name=f"{data.name}+{name}", train=replace(data.train, labels=labels), source=f"{data.source}, {what}"
    )
