"""Residuals and features for the tests of the operators on gradients' factors, and the exact results."""

import torch

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def draw(n, n_classes, d, dtype=torch.float32, seed=0):
    """Residuals of a softmax model and features, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(n, n_classes, generator=generator, dtype=torch.float64).mul_(2).softmax(1)
    target = torch.randint(n_classes, (n, 1), generator=generator)
    residual = probs.scatter_add(1, target, -torch.ones(n, 1, dtype=torch.float64))
    if n_classes == 1:
        residual = torch.randn(n, 1, generator=generator, dtype=torch.float64)  # the softmax's is zero
    return residual.to(dtype), torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def unit(dtype):
    """Relative rounding unit of what an operator accumulates in for inputs of ``dtype``."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def output_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_bias(features, bias):
    """[H, 1] in float64, or H."""
    features = features.double()
    return torch.cat([features, features.new_ones(len(features), 1)], 1) if bias else features


class Rows:
    """Matrices whose strides are not those of a contiguous one."""

    TRANSFORMS = {
        "transposed": lambda x: x.t().contiguous().t(),
        "strided": lambda x: x.repeat_interleave(2, 1)[:, ::2],
        "sliced": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    }
