"""The models on which a backward through chosen rows is tested (small) and timed: every common architecture."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def mlp(features: int = 784, width: int = 1024, layers: int = 4) -> nn.Module:
    """ReLU layers of one width, 10 classes."""
    widths = [features] + [width] * layers
    blocks = [m for i, o in zip(widths, widths[1:], strict=False) for m in (nn.Linear(i, o), nn.ReLU())]
    return nn.Sequential(*blocks, nn.Linear(width, 10))


def cnn(width: int = 32) -> nn.Module:
    """3 x 3 convolutions with pooling, no normalisation; 32 x 32 images."""

    def pair(i: int, o: int) -> list[nn.Module]:
        return [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]

    top = [nn.Conv2d(2 * width, 4 * width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*pair(3, width), *pair(width, 2 * width), *top, nn.Linear(4 * width, 10))


class _Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), norm(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), norm(o)
        self.skip = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), norm(o)) if i != o else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))) + self.skip(x))


def resnet(norm: Callable[[int], nn.Module], width: int = 32, blocks: int = 2) -> nn.Module:
    """Three stages of residual blocks; 32 x 32 images."""
    stages: list[nn.Module] = []
    i = width
    for stage in range(3):
        for block in range(blocks):
            o = width * 2**stage
            stages.append(_Residual(i, o, 2 if block == 0 and stage else 1, norm))
            i = o
    stem = [nn.Conv2d(3, width, 3, 1, 1, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*stem, *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(i, 10))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width), nn.Dropout(dropout)
        )
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        n, steps, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, steps, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, steps, width))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Patches of 4 x 4, a class token, pre-norm blocks; 32 x 32 images."""

    def __init__(self, width: int = 192, heads: int = 3, layers: int = 4, dropout: float = 0.1) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, 65, width) * 0.02)
        self.blocks = nn.Sequential(*[_Block(width, heads, False, dropout) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """(n, 3, 32, 32) to (n, 10)."""
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        out: Tensor = self.head(self.norm(self.blocks(x))[:, 0])
        return out


class GPT(nn.Module):
    """Token and position embeddings, causal pre-norm blocks, the head tied to the embedding."""

    def __init__(
        self, vocabulary: int = 2048, width: int = 192, heads: int = 3, layers: int = 4, steps: int = 128
    ) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(vocabulary, width), nn.Embedding(steps, width)
        self.blocks = nn.Sequential(*[_Block(width, heads, True, 0.1) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, T) to (n, T, vocabulary)."""
        x = self.embed(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))
        out: Tensor = self.head(self.norm(self.blocks(x)))
        return out


class Recurrent(nn.Module):
    """A two-layer LSTM over tokens, classified at the last step."""

    def __init__(self, vocabulary: int = 512, width: int = 128) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(vocabulary, width), nn.LSTM(width, width, 2, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """(n, T) to (n, 10)."""
        out: Tensor = self.head(self.lstm(self.embed(tokens))[0][:, -1])
        return out


def classification(output: Tensor, target: Tensor) -> Tensor:
    """(n,) cross-entropy."""
    return F.cross_entropy(output, target, reduction="none")


def next_token(output: Tensor, tokens: Tensor) -> Tensor:
    """(n,) mean next-token loss of each sequence."""
    n, steps, vocabulary = output.shape
    per_token = F.cross_entropy(output[:, :-1].reshape(-1, vocabulary), tokens[:, 1:].reshape(-1), reduction="none")
    return per_token.view(n, steps - 1).mean(1)


class Task(NamedTuple):
    """A model with its batch and per-sample loss."""

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    losses: Callable[[Tensor, Tensor], Tensor]
    n: int  # minibatch of the benchmark


def images(n: int) -> tuple[Tensor, Tensor]:
    """Random images and classes."""
    return torch.randn(n, 3, 32, 32), torch.randint(10, (n,))


def vectors(n: int) -> tuple[Tensor, Tensor]:
    """Random vectors and classes."""
    return torch.randn(n, 784), torch.randint(10, (n,))


def _group(width: int) -> nn.Module:
    return nn.GroupNorm(8, width)


def _tokens(vocabulary: int, steps: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    def draw(n: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(vocabulary, (n, steps))
        return tokens, tokens

    return draw


TIMED: dict[str, Task] = {
    "MLP": Task(mlp, vectors, classification, 512),
    "CNN": Task(cnn, images, classification, 64),
    "ResNet-GN": Task(lambda: resnet(_group), images, classification, 40),
    "ViT": Task(ViT, images, classification, 40),
    "GPT": Task(GPT, _tokens(2048, 128), next_token, 20),
}


def _labelled(draw: Callable[[int], tuple[Tensor, Tensor]]) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (draw(n)[0], torch.randint(10, (n,)))


SMALL: dict[str, Task] = {
    "MLP": Task(lambda: mlp(width=24, layers=3), vectors, classification, 8),
    "CNN": Task(lambda: cnn(4), images, classification, 8),
    "ResNet-GN": Task(lambda: resnet(_group, 8, 1), images, classification, 8),
    "ResNet-BN": Task(lambda: resnet(nn.BatchNorm2d, 4, 1), images, classification, 8),
    "ViT": Task(lambda: ViT(16, 2, 2), images, classification, 8),
    "GPT": Task(lambda: GPT(31, 16, 2, 2, 12), _tokens(31, 12), next_token, 8),
    "LSTM": Task(lambda: Recurrent(31, 12), _labelled(_tokens(31, 9)), classification, 8),
}
