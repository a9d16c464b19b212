"""The studies' networks: small, and without BatchNorm, so that a sample's gradient depends on that sample alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from selbp_study.data import Split


def channels_last(images: Tensor) -> Tensor:
    """Return (n, 1, rows, columns) images with the strides of channels-last.

    With one channel both layouts are the same memory, and torch chooses its kernels by the strides.
    """
    _, _, rows, columns = images.shape
    return images.as_strided(images.shape, (rows * columns, 1, columns, 1)) if images.is_contiguous() else images


class SmallCNN(nn.Module):
    """Three 3x3 convolutions of 16, 32 and 64 channels, each pooled by 2, then 128 hidden units (98 442 parameters).

    Runs channels-last throughout: on a CPU, ``max_pool2d`` of the default layout takes 4 times as long.
    """

    widths = (16, 32, 64, 128)

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        image = image_of(shape)
        rows, columns = (side // 2 // 2 // 2 for side in image)
        if rows < 1 or columns < 1:
            raise ValueError(f"image must be at least 8 x 8 pixels, got {image[0]} x {image[1]}")
        a, b, c, hidden = self.widths
        self.body = nn.Sequential(
            nn.Conv2d(1, a, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(a, b, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(b, c, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(c * rows * columns, hidden),
            nn.ReLU(),
        )
        self.head = nn.Linear(hidden, n_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, rows, columns) images to (n, n_classes) logits."""
        return self.head(self.body(channels_last(images)))


class WideCNN(SmallCNN):
    """The same with 32, 64 and 96 channels and 412 hidden units: four times the parameters (434 718)."""

    widths = (32, 64, 96, 412)


class MLP(nn.Module):
    """Two hidden layers of 128 and 64 units."""

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        image = image_of(shape)
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(image[0] * image[1], 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()
        )
        self.head = nn.Linear(64, n_classes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, rows, columns) images to (n, n_classes) logits."""
        return self.head(self.body(images))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with group norms of 8 channels each, beside a 1x1 one where shape or width changes."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Conv2d(inside, outside, 3, stride, padding=1, bias=False),
            nn.GroupNorm(outside // 8, outside),
            nn.ReLU(),
            nn.Conv2d(outside, outside, 3, padding=1, bias=False),
            nn.GroupNorm(outside // 8, outside),
        )
        same = inside == outside and stride == 1
        self.beside = nn.Identity() if same else nn.Conv2d(inside, outside, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        """(n, inside, rows, columns) to (n, outside, ceil(rows / stride), ceil(columns / stride))."""
        return F.relu(self.beside(images) + self.inner(images))


class ResNet(nn.Module):
    """A strided 3x3 convolution, residual blocks of 16, 32 and 64 channels, and the mean over pixels (77 642)."""

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        image_of(shape)
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, 2, padding=1),
            nn.ReLU(),
            ResidualBlock(16, 16, 1),
            ResidualBlock(16, 32, 2),
            ResidualBlock(32, 64, 2),
        )
        self.head = nn.Linear(64, n_classes)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing from torch's stubs

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, rows, columns) images to (n, n_classes) logits."""
        return self.head(self.body(channels_last(images)).mean((2, 3)))


class Block(nn.Module):
    """Causal attention and a two-layer perceptron, each behind a layer norm and beside what it reads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """(n, T, width) to the same; position t reads none after it."""
        n, length, width = hidden.shape
        parts = self.attention(self.before(hidden)).view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return hidden + self.mlp(self.between(hidden))


class Transformer(nn.Module):
    """A causal transformer over characters: two blocks of 64 units and 4 heads, learned positions (110 271)."""

    width, heads, depth = 64, 4, 2

    def __init__(self, shape: tuple[int, ...], n_classes: int) -> None:
        super().__init__()
        if len(shape) != 1:
            raise ValueError(f"model transformer reads text, not samples of {' x '.join(map(str, shape))}")
        self.codes = nn.Embedding(n_classes, self.width)
        self.places = nn.Parameter(torch.randn(shape[0], self.width))
        self.blocks = nn.Sequential(*(Block(self.width, self.heads) for _ in range(self.depth)))
        self.norm = nn.LayerNorm(self.width)
        self.head = nn.Linear(self.width, n_classes)

    def forward(self, codes: Tensor) -> Tensor:
        """(n, T) codes to (n, T, n_classes) logits of the code that follows each."""
        return self.head(self.norm(self.blocks(self.codes(codes) + self.places)))


def image_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """``shape`` as rows and columns; ValueError where samples are no images."""
    if len(shape) != 2:
        raise ValueError(f"this model reads images, and the data's samples have the shape {shape}: use transformer")
    return shape[0], shape[1]


MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {
    "cnn": SmallCNN,
    "wide-cnn": WideCNN,
    "resnet": ResNet,
    "mlp": MLP,
    "transformer": Transformer,
}
HEAD = "head"  # the name of each model's last linear layer
# Modules at whose output a cut leaves 1, 2, ... layers with parameters above it, a residual block being one layer.
CUTS: dict[str, tuple[str, ...]] = {
    "cnn": ("body.10", "body.9"),
    "wide-cnn": ("body.10", "body.9"),
    "resnet": ("body.4", "body.3"),
    "mlp": ("body.3", "body.2"),
    "transformer": ("blocks.1", "blocks.0"),
}


def place_of(model: str, cut: str) -> str:
    """The module that ``cut`` means: its name, or a number of layers below the output."""
    if not cut.isdigit():
        return cut
    places = CUTS[model]
    if not 1 <= int(cut) <= len(places):
        raise ValueError(f"cut must be a module's name or 1 to {len(places)} layers below the output, got {cut}")
    return places[int(cut) - 1]


def model_for(split: Split) -> str:
    """The model that this kind of data gets where none is named."""
    return "transformer" if split.inputs.dim() == 2 else "cnn"


def build_model(name: str, split: Split, n_classes: int, seed: int) -> nn.Module:
    """The model for this data; the initial weights depend on ``seed`` alone, not on torch's global generator."""
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](tuple(split.inputs.shape[1:]), n_classes)
