"""A tiny network that fills a table of scores before the first step (selection via proxy, Coleman et al. 2020)."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selbp._checks import check_flag, check_int, check_number, shown
from selbp.sampling.features import Features
from selbp.sampling.noise import anchored_transition, noise_aware, undone
from selbp.sampling.reading import read
from selbp.sampling.record import FEW
from selbp.sampling.table import ScoreTable

CHUNK = 4096  # samples that are scored at a time
LEAST = 100  # minibatches: fewer do not show the noise
MOST = 10  # passes, to reach LEAST on a small data set
SHARE = 0.05  # of the steps of the training that follows: as many minibatches beyond the first pass at most
HALF = 0.5  # of a pass: the scores of a training that ended earlier are of no use
RATE, BATCH = 0.01, 128  # of Adam
START, PACE = 0.2, 0.05  # eps before the first minibatch, and how far each one moves it
FOR_TRANSITION = 20_000  # samples that a transition matrix is learned from


@dataclass(frozen=True)
class Proxy:
    """What :func:`fit_proxy` did.

    Attributes
    ----------
    seconds : float
        Processor seconds of this process, reading the data included, and of the workers that read it.
    fit_seconds : float
        Of those, for training and scoring.
    passes : float
        Over the data.
    accuracy : float
        On the given labels, of the samples as they were scored.
    losses : Tensor
        (N,) float32, each sample's cross-entropy.

    See Also
    --------
    selbp.sampling.fit_proxy : returns one.

    Examples
    --------
    >>> data = torch.utils.data.TensorDataset(torch.randn(200, 4), torch.randint(0, 2, (200,)))
    >>> proxy = fit_proxy(data, ScoreTable(200, classes=2), passes=2)
    >>> proxy.passes, proxy.losses.shape
    (2.0, torch.Size([200]))
    """

    seconds: float
    fit_seconds: float
    passes: float
    accuracy: float
    losses: Tensor


def fit_proxy(
    dataset: Any,
    table: ScoreTable,
    *,
    features: Features = "auto",
    hidden: int = 64,
    passes: int | None = None,
    seconds: float | None = None,
    steps: int | None = None,
    halves: bool = False,
    seed: int = 0,
    workers: int = 0,
) -> Proxy:
    """Train a small perceptron on simple features, score every sample by it, and estimate the noise from the scores.

    Its loss is the noise-aware one, and eps is estimated along with it, a step of expectation-maximisation each
    minibatch: a network that is trained by plain cross-entropy is unsure of every label where some are wrong, and its
    probabilities then leave no noise to be found.

    One pass over Fashion-MNIST and its scan take about a third of a second on one core; its losses rank the samples
    much as the trained network's own do. Count that time as training: the result's ``seconds`` has it.

    Parameters
    ----------
    dataset : map-style data set
        (input, label) for each number, or a dict with ``labels`` or ``label``; a ``TensorDataset`` is read as tensors.
        It is read in order, some samples at a time: their inputs take about 64 MiB at most. Random augmentation is read
        as it comes, once. Where images turn out to have several sizes, the reading begins anew. If it takes long,
        tqdm shows a bar on a terminal.
    table : ScoreTable
        Of as many samples, with classes.
    features : "auto", callable or Tensor (N, d)
        ``"auto"``: images by average pooling to at most 256 numbers, texts and tokens by hashed n-grams, vectors as
        they are; of a dict ``input_ids``, ``pixel_values`` or the one entry beside the label. Or a function of the
        inputs (a tensor, or a list where they do not stack or are dicts) of m samples that gives (m, d); or a matrix
        (N, d), such as embeddings. How many samples a function is given at a time is not fixed.
    hidden : int
        Units of its one hidden layer.
    passes : int or None
        Over the data, in a random order. None: one, and of a small data set as many as it takes to make 100
        minibatches, at most 10; fewer leave the noise unseen.
    seconds : float or None
        End the training after so many processor seconds, reading not counted, even if the passes are not through.
        If that is before half of a pass, the table is left as it was.
    steps : int or None
        Of the training that follows: passes beyond the first are made only while the proxy's minibatches are at most a
        twentieth of them, for ``passes=None``.
    halves : bool
        Train two, each on half of the samples, and score each sample by the one that has not seen it. No score is of a
        sample learned by heart, but each network has half of the data.
    seed : int
        Of the weights and the order; torch's global generator is left alone.
    workers : int
        Processes that read the data set, as a ``DataLoader``'s do; 0: this one. The result is the same to the bit, but
        for random augmentation. A function as ``features`` runs in this process.

    Returns
    -------
    Proxy
        What was done, and the samples' losses.

    Raises
    ------
    TypeError, ValueError
        Arguments that do not fit, labels that are no classes, a sample's label outside [0, C).

    See Also
    --------
    selbp.sampling.ScoreTable : what it fills.

    Examples
    --------
    >>> data = torch.utils.data.TensorDataset(torch.eye(4).repeat(50, 1), torch.arange(4).repeat(50))
    >>> table = ScoreTable(200, classes=4)
    >>> fit_proxy(data, table, passes=40).accuracy
    1.0
    """
    start = _processor_seconds()
    if not isinstance(table, ScoreTable):
        raise TypeError(f"table must be a selbp.sampling.ScoreTable, got {shown(table)}")
    if table.classes is None:
        raise ValueError("a proxy needs a table with classes=, the number of classes")
    n = table.samples
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must be map-style, with a length and numbered samples, got {shown(dataset)}")
    if len(dataset) != n:
        raise ValueError(f"dataset must have the table's {n} samples, got {len(dataset)}")
    features = _check_features(features, n)
    hidden, seed = check_int("hidden", hidden, 1), check_int("seed", seed, 0)
    passes = _enough(n, steps) if passes is None else check_int("passes", passes, 1)
    limit = None if seconds is None else check_number("seconds", seconds, 0.0)
    x, y = _scaled(*read(dataset, features, n, check_int("workers", workers, 0)), table.classes)
    seen = _processor_seconds()
    plan = _Plan(table.classes, hidden, passes, noisy=table.noise != "none")
    logits, done, epsilon = _fitted(x, y, plan, limit, check_flag("halves", halves), seed)
    if done >= HALF:
        _fill(table, logits, y, epsilon, seed)
    losses = F.cross_entropy(logits, y, reduction="none")
    accuracy = float((logits.argmax(1) == y).double().mean())
    end = _processor_seconds()
    return Proxy(end - start, end - seen, done, accuracy, losses)


def _processor_seconds() -> float:
    """Of this process, and of those that it started and that have ended."""
    others = os.times()
    return time.process_time() + others.children_user + others.children_system


def _fill(table: ScoreTable, logits: Tensor, y: Tensor, epsilon: float, seed: int) -> None:
    """Write the scores of all samples, and what they say of the noise."""
    n = len(y)
    if table.adaptive:
        table._become("symmetric")
    if table.noise != "none":
        table.epsilon.fill_(epsilon)
    if table.noise == "class":
        few = torch.randperm(n, generator=_generator(seed), device="cpu")[:FOR_TRANSITION]
        table.estimate(logits[few], y[few])
    table.fill(torch.arange(n, device="cpu"), logits, y)
    table.measure() if table.noise == "class" else table.estimate()
    if table.adaptive and epsilon < FEW:  # else the network has learned of the noise itself
        found = anchored_transition(logits, y)
        if found is not None:
            table._believe(found.to(table.device), y.to(table.device))
            table.fill(torch.arange(n, device="cpu"), undone(logits, found), y)
            table.measure()


def _enough(n: int, steps: int | None) -> int:
    """Passes over ``n`` samples that make :data:`LEAST` minibatches, at most :data:`MOST`, and no more than that."""
    wanted = LEAST if steps is None else min(LEAST, int(SHARE * check_int("steps", steps, 1)))
    found = wanted * BATCH / n
    return max(1, min(MOST, math.ceil(found) if steps is None or wanted == LEAST else int(found)))


def _check_features(features: Features, n: int) -> Features:
    if isinstance(features, str):
        if features != "auto":
            raise ValueError(f'features must be "auto", a function or a matrix (N, d), got {features!r}')
        return features
    if callable(features) and not isinstance(features, Tensor):
        return features
    try:
        matrix = torch.as_tensor(features, device=features.device if isinstance(features, Tensor) else "cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f'features must be "auto", a function or a matrix (N, d), got {shown(features)}') from error
    if matrix.dim() != 2 or len(matrix) != n:
        raise ValueError(f"features must be (N, d) with N = {n}, got {tuple(matrix.shape)}")
    return matrix


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _scaled(x: Tensor, y: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(N, d) features of mean 0 and variance 1, and (N,) labels; values that are no numbers become 0."""
    if len(y) and not (0 <= int(y.min()) and int(y.max()) < classes):
        raise ValueError(f"labels must lie in [0, {classes}), got {int(y.min())} to {int(y.max())}")
    x = torch.where(torch.isfinite(x), x, 0.0)
    x = x - x.mean(0)
    # Pixels share a scale: one that hardly varies says little, and would say much if it were blown up.
    return x / x.square().mean().sqrt().clamp(min=1e-12), y


class _Plan(NamedTuple):
    """The sizes of one perceptron and of its training."""

    classes: int
    hidden: int
    passes: int
    noisy: bool  # whether some labels may be wrong


def _fitted(
    x: Tensor, y: Tensor, plan: _Plan, seconds: float | None, halves: bool, seed: int
) -> tuple[Tensor, float, float]:
    """(N, C) logits, how many passes were made, and eps."""
    n, end = len(x), None if seconds is None else time.process_time() + seconds
    if not halves:
        model, done, epsilon = _trained(x, y, torch.arange(n, device="cpu"), plan, end, seed)
        return _scores(model, x), done, epsilon
    logits, done, epsilon = torch.empty(n, plan.classes, dtype=torch.float32, device="cpu"), 0.0, 0.0
    for part in (0, 1):
        until = end if seconds is None or end is None or part else end - seconds / 2  # half of the time for each
        mine = torch.arange(part, n, 2, device="cpu")
        model, made, found = _trained(x, y, mine, plan, until, seed + part)
        logits[1 - part :: 2] = _scores(model, x[1 - part :: 2])
        done, epsilon = done + made / 2, epsilon + found / 2
    return logits, done, epsilon


@torch.no_grad()
def _scores(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(CHUNK)])


def _trained(
    x: Tensor, y: Tensor, ids: Tensor, plan: _Plan, end: float | None, seed: int
) -> tuple[nn.Module, float, float]:
    """A perceptron trained on the samples ``ids`` at a rate that falls to 0, the passes made, and eps."""
    classes, hidden, passes, noisy = plan
    epsilon = torch.tensor(START if noisy else 0.0, dtype=torch.float64, device="cpu")
    generator = _generator(seed)
    with torch.random.fork_rng(devices=[]):  # layers draw weights when they are made
        made: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        model = nn.Sequential(nn.Linear(x.shape[1], hidden, **made), nn.ReLU(), nn.Linear(hidden, classes, **made))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            assert isinstance(layer, nn.Linear)
            bound = layer.in_features**-0.5
            layer.weight.uniform_(-bound, bound, generator=generator)
            layer.bias.zero_()
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE, fused=True)
    orders = [ids[torch.randperm(len(ids), generator=generator, device="cpu")] for _ in range(passes)]
    batches = [batch for order in orders for batch in order.split(BATCH)]
    for number, batch in enumerate(batches):
        if end is not None and time.process_time() >= end:
            return model, number * BATCH / len(ids), float(epsilon)
        optimizer.param_groups[0]["lr"] = RATE * (1.0 - number / len(batches))
        with torch.enable_grad():
            losses = F.cross_entropy(model(x[batch]), y[batch], reduction="none")
            believed = noise_aware(losses, epsilon, classes)
            believed.mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if noisy:  # a step of expectation-maximisation: no row is drawn for its score here
            right = (believed.detach() - losses.detach()).exp().mean() * (1.0 - epsilon)
            epsilon = epsilon + PACE * (1.0 - right - epsilon)
    return model, float(passes), float(epsilon)
