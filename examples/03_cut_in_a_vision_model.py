"""A cut in a convolutional network: the layers above train on all images, those below on a quarter of them.

Nothing else in the loop changes. Run as ``python examples/03_cut_in_a_vision_model.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp


def block(width: int, out: int, pool: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(4, out), nn.ReLU(), pool]


class Net(nn.Module):
    """Two convolutions, a cut, and two linear layers. GroupNorm: a sample's gradient depends on that sample alone."""

    def __init__(self, keep: float) -> None:
        super().__init__()
        first, second = block(1, 8, nn.MaxPool2d(2)), block(8, 16, nn.AdaptiveAvgPool2d(2))
        self.trunk = nn.Sequential(*first, *second, nn.Flatten())
        self.cut = selbp.BackwardCut(keep)  # gradient matching, unless told otherwise
        self.top = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, rows, columns) to (n, 4) logits."""
        return self.top(self.cut(self.trunk(images)))


def images_of(target: Tensor) -> Tensor:
    """A bright quarter of a noisy 12 x 12 image, which one says the class."""
    images = 0.5 * torch.randn(len(target), 1, 12, 12)
    for i, label in enumerate(target.tolist()):
        row, column = 6 * (label // 2), 6 * (label % 2)
        images[i, 0, row : row + 6, column : column + 6] += 1.0
    return images


def main() -> None:
    """Train, and compare the gradients with those of the full batch once."""
    torch.manual_seed(0)
    model = Net(keep=0.25)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for i in range(20):
        target = torch.randint(0, 4, (64,))
        F.cross_entropy(model(images_of(target)), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        if i % 5 == 0:
            report = model.cut.report
            print(
                f"step {i:2d}: {report.k} of {report.n} images below the cut, residual {report.relative_residual:.3f}"
            )

    target = torch.randint(0, 4, (64,))
    images = images_of(target)
    gradients = []
    for module in (model, nn.Sequential(model.trunk, model.top)):  # with the cut, and without
        model.zero_grad()
        F.cross_entropy(module(images), target).backward()
        gradients.append([model.top[0].weight.grad.clone(), model.trunk[0].weight.grad.clone()])
    for name, ours, full in zip(("above", "below"), *gradients, strict=True):
        print(f"{name} the cut: relative difference to the full batch {float((ours - full).norm() / full.norm()):.1e}")


if __name__ == "__main__":
    main()
