"""Tables whose every entry is known, and small data sets."""

import torch
from torch.utils.data import TensorDataset

from selbp.sampling import ScoreTable


def known_table(samples=40, classes=4, seed=0, **options):
    """A table of random scores, all known."""
    generator = torch.Generator().manual_seed(seed)
    table = ScoreTable(samples, classes, **options)
    logits = 2 * torch.randn(samples, classes, generator=generator)
    target = torch.randint(0, classes, (samples,), generator=generator)
    table.fill(torch.arange(samples), logits, target)
    if table.noise == "symmetric":
        table.epsilon.fill_(0.2)
        table.refresh()
    return table


def data(samples=200, features=6, classes=4, seed=0):
    """Samples of a linear rule, with labels that it gives."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, features, generator=generator)
    return TensorDataset(x, (x @ torch.randn(features, classes, generator=generator)).argmax(1))


def model(features=6, classes=4, seed=0):
    """A small classifier."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(features, 16), torch.nn.Tanh(), torch.nn.Linear(16, classes))
