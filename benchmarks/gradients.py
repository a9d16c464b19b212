"""Matching problems from the gradients of a softmax model: real digits and gaussian clusters, at three stages.

A linear softmax classifier on fixed features is trained by full-batch gradient descent; at a stage the gradients of a
minibatch are r_i (x) [h_i, 1], their target is the minibatch's mean (or, for problems whose active set is not
everything, the mean of another minibatch). Solvers that want a matrix get a square factor A with A^T A = K.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

STAGES = {"early": 1, "middle": 25, "late": 100}  # steps of gradient descent


class MatchingProblem(NamedTuple):
    """One problem in float64, and the factor that others start from."""

    gram: Tensor  # (n, n)
    inner: Tensor  # (n,)
    target_sq: Tensor  # ()
    factor: Tensor  # (n, n) A, with A^T A = gram
    target: Tensor  # (n,) y, with A^T y = inner


@functools.cache
def samples(source: str, n: int) -> tuple[Tensor, Tensor]:
    """(n, 512) features and (n,) classes: ``digits`` (random features of the pixels) or ``clusters`` (C = 100)."""
    generator = torch.Generator().manual_seed(0)
    if source == "digits":
        from sklearn.datasets import load_digits

        data = load_digits()
        pixels = torch.from_numpy(data.data).double() / 16.0
        order = torch.randperm(len(pixels), generator=generator)[:n]
        lift = torch.randn(pixels.shape[1], 512, generator=generator, dtype=torch.float64) / 8.0
        return torch.relu(pixels[order] @ lift), torch.from_numpy(data.target)[order]
    target = torch.randint(100, (n,), generator=generator)
    centres = torch.randn(100, 512, generator=generator, dtype=torch.float64) / 2.0
    return centres[target] + torch.randn(n, 512, generator=generator, dtype=torch.float64), target


def train(features: Tensor, target: Tensor, steps: int) -> Tensor:
    """(n, C) residuals softmax - onehot after ``steps`` of gradient descent on all samples."""
    n, d = features.shape
    onehot = torch.nn.functional.one_hot(target).double()
    inputs = torch.cat([features, features.new_ones(n, 1)], 1)
    weight = torch.zeros(onehot.shape[1], d + 1, dtype=torch.float64)
    rate = 4.0 * n / torch.linalg.matrix_norm(inputs, 2) ** 2  # below 2 / the curvature of the loss
    for _ in range(steps):
        weight -= rate * (torch.softmax(inputs @ weight.T, 1) - onehot).T @ inputs / n
    return torch.softmax(inputs @ weight.T, 1) - onehot


@functools.cache
def matching_problem(source: str, stage: str, n: int, external: bool = False) -> MatchingProblem:
    """``external``: the target is the mean gradient of n other samples instead of the minibatch's own."""
    features, target = samples(source, 2 * n if external else n)
    residual = train(features, target, STAGES[stage])
    other = slice(n, None) if external else slice(0, n)
    ones = features.new_ones(len(features), 1)
    inputs = torch.cat([features, ones], 1)
    mean = residual[other].T @ inputs[other] / len(residual[other])
    r, h = residual[:n], inputs[:n]
    gram = (r @ r.T) * (h @ h.T)
    inner = ((r @ mean) * h).sum(1)
    jitter = 1e-10 * gram.diagonal().max() * torch.eye(n, dtype=torch.float64)  # late gradients are nearly dependent
    lower = torch.linalg.cholesky(gram + jitter)
    target_in_factor = torch.linalg.solve_triangular(lower, inner[:, None], upper=False)[:, 0]
    return MatchingProblem(gram, inner, mean.square().sum(), lower.T.contiguous(), target_in_factor)
