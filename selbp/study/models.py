"""The main job's networks: small, without norm layers, so that a sample's gradient depends on that sample alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from selbp.data import Split


class SmallCNN(nn.Module):
    """Three 3x3 convolutions of 16, 32 and 64 channels, each pooled by 2, then 128 hidden units (98 442 parameters).

    Runs channels-last throughout: on a CPU, ``max_pool2d`` of the default layout takes 4 times as long.
    """

    widths = (16, 32, 64, 128)

    def __init__(self, image: tuple[int, int], n_classes: int) -> None:
        super().__init__()
        rows, columns = (side // 2 // 2 // 2 for side in image)
        if rows < 1 or columns < 1:
            raise ValueError(f"image must be at least 8 x 8 pixels, got {image[0]} x {image[1]}")
        a, b, c, hidden = self.widths
        self.body = nn.Sequential(
            nn.Conv2d(1, a, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(c * rows * columns, hidden), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(hidden, n_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, rows, columns) images to (n, n_classes) logits."""
        n, _, rows, columns = images.shape
        # One channel satisfies both layouts; the strides have to say which one is meant.
        images = images.as_strided(images.shape, (rows * columns, 1, columns, 1)) if images.is_contiguous() else images
        return self.head(self.body(images))


class WideCNN(SmallCNN):
    """The same with 32, 64 and 96 channels and 412 hidden units: four times the parameters (434 718)."""

    widths = (32, 64, 96, 412)


class MLP(nn.Module):
    """Two hidden layers of 128 and 64 units."""

    def __init__(self, image: tuple[int, int], n_classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(image[0] * image[1], 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()
        )
        self.head = nn.Linear(64, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, rows, columns) images to (n, n_classes) logits."""
        return self.head(self.body(images))


MODELS: dict[str, Callable[[tuple[int, int], int], nn.Module]] = {"cnn": SmallCNN, "wide-cnn": WideCNN, "mlp": MLP}
HEAD = "head"  # the name of each model's last linear layer
# Modules at whose output a cut leaves 1, 2, ... layers with parameters above it.
CUTS: dict[str, tuple[str, ...]] = {
    "cnn": ("body.10", "body.9"),
    "wide-cnn": ("body.10", "body.9"),
    "mlp": ("body.3", "body.2"),
}


def place_of(model: str, cut: str) -> str:
    """The module that ``cut`` means: its name, or a number of layers below the output."""
    if not cut.isdigit():
        return cut
    places = CUTS[model]
    if not 1 <= int(cut) <= len(places):
        raise ValueError(f"cut must be a module's name or 1 to {len(places)} layers below the output, got {cut}")
    return places[int(cut) - 1]


def build_model(name: str, split: Split, n_classes: int, seed: int) -> nn.Module:
    """The model for this data; the initial weights depend on ``seed`` alone, not on torch's global generator."""
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    rows, columns = split.images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name]((rows, columns), n_classes)
