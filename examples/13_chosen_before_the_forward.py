"""Choose before the forward: a table of scores draws the batches, beside random batches at as many steps.

Every fifth training label is wrong. Run as ``python examples/13_chosen_before_the_forward.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import selbp

CLASSES, K, STEPS = 5, 32, 300


def make_data(n: int, wrong: float, seed: int) -> TensorDataset:
    """Noisy clusters: (n, 20) inputs and (n,) labels, of which the share ``wrong`` is drawn anew."""
    centers = torch.randn(CLASSES, 20, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    inputs = centers[labels] + 1.5 * torch.randn(n, 20, generator=generator)
    anew = torch.rand(n, generator=generator) < wrong
    return TensorDataset(inputs, torch.where(anew, torch.randint(0, CLASSES, (n,), generator=generator), labels))


def make_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A small network; the seed makes both runs start alike."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    return model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def batches(loader: DataLoader) -> Iterator[list[Tensor]]:
    """STEPS minibatches, over as many epochs as that takes: one of the table's has len(data) // pool of them."""
    return islice(chain.from_iterable(repeat(loader)), STEPS)


def at_random(data: TensorDataset) -> nn.Module:
    """The ordinary loop on shuffled batches of K."""
    model, optimizer = make_model()
    for inputs, target in batches(DataLoader(data, K, shuffle=True, generator=torch.Generator().manual_seed(0))):
        F.cross_entropy(model(inputs), target).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def chosen(data: TensorDataset) -> nn.Module:
    """The same loop with ``selbp.auto_select``: its sampler draws the batches, its step returns the loss."""
    model, optimizer = make_model()
    auto = selbp.auto_select(model, data, classes=CLASSES, k=K, pool=128)
    for inputs, target in batches(DataLoader(data, batch_sampler=auto.sampler)):
        auto(inputs, target).backward()
        optimizer.step()
        optimizer.zero_grad()
    suspects = auto.table.suspects(5)
    print(f"  headroom {auto.report.headroom:.2f}; most suspect samples: {suspects.ids.tolist()}")
    return model


def main() -> None:
    """Train both ways on labels of which some are wrong; test on clean samples that no training saw."""
    data, clean = make_data(20_000, wrong=0.25, seed=1), make_data(5_000, wrong=0.0, seed=2)
    inputs, labels = clean.tensors
    for name, train in (("random", at_random), ("auto_select", chosen)):
        print(name)
        model = train(data)
        print(f"  accuracy {(model(inputs).argmax(1) == labels).float().mean():.3f}")


if __name__ == "__main__":
    main()
