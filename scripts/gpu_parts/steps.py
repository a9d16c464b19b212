"""Whole training steps: full, random rows, and chosen rows by a second forward, by rows, and at a cut."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import selbp
from gpu_parts.results import Results
from gpu_parts.timing import times, wait

Problem = tuple[nn.Module, tuple[Any, ...], str, str]  # model, batch, loss, module of the cut
WAYS = ("full", "random", "recompute", "rows", "rows-subset", "cut")


def mlp(device: str, tiny: bool) -> Problem:
    """A multi-layer perceptron on vectors."""
    n, width, classes = (16, 8, 3) if tiny else (512, 1024, 100)
    layers = [layer for _ in range(3) for layer in (nn.Linear(width, width), nn.ReLU())]
    x, y = torch.randn(n, width, device=device), torch.randint(classes, (n,), device=device)
    return nn.Sequential(*layers, nn.Linear(width, classes)), (x, y), "cross_entropy", "3"


def _images(n: int, side: int, device: str) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, side, side, device=device), torch.randint(10, (n,), device=device)


def resnet(device: str, tiny: bool) -> Problem:
    """ResNet-50 on images."""
    import torchvision

    build = torchvision.models.resnet18 if tiny else torchvision.models.resnet50
    return (
        build(num_classes=10),
        _images(8, 32, device) if tiny else _images(128, 224, device),
        "cross_entropy",
        "layer4",
    )


def vit(device: str, tiny: bool) -> Problem:
    """ViT-B/16 on images."""
    import timm

    name, images = "vit_tiny_patch16_224" if tiny else "vit_base_patch16_224", {}
    if tiny:
        images = {"img_size": 32, "depth": 2}
    model = timm.create_model(name, num_classes=10, **images)
    return model, _images(8, 32, device) if tiny else _images(128, 224, device), "cross_entropy", "norm"


def gpt2(device: str, tiny: bool) -> Problem:
    """GPT-2 small on tokens; weights are drawn, nothing is downloaded."""
    import transformers

    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50} if tiny else {}
    config = transformers.GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, **sizes)
    tokens = torch.randint(config.vocab_size, (4, 8) if tiny else (16, 512), device=device)
    model = transformers.GPT2LMHeadModel(config)
    return model, ({"input_ids": tokens, "labels": tokens},), "causal_lm", "transformer.ln_f"


MODELS: dict[str, Callable[[str, bool], Problem]] = {"MLP": mlp, "ResNet-50": resnet, "ViT-B/16": vit, "GPT-2": gpt2}


def step_of(way: str, model: nn.Module, loss: str, cut: str, n: int) -> selbp.SelectiveBackprop:
    """A step that trains as ``way`` says on a quarter of the rows."""
    options: dict[str, Any] = {"keep": max(1, n // 4), "loss": loss}
    if way == "full":
        return selbp.SelectiveBackprop(model, selector=selbp.Full(), **{**options, "keep": n})
    if way == "random":
        return selbp.SelectiveBackprop(model, selector=selbp.Random(), **options)
    if way == "cut":
        return selbp.SelectiveBackprop(model, selector=selbp.GradNormImportance(), cut=cut, backward="rows", **options)
    if way == "rows-subset":  # batch norm on k rows too, an approximation; "rows" runs it, and all below, on n
        way, options["batchnorm"] = "rows", "subset"
    return selbp.SelectiveBackprop(model, selector=selbp.GradNormImportance(), backward=way, **options)


def measure(results: Results, name: str, way: str, device: str, tiny: bool) -> None:
    """Step time and peak memory of one model trained one way; bfloat16 autocast on a GPU."""
    try:
        torch.manual_seed(0)
        model, batch, loss, cut = MODELS[name](device, tiny)
    except ImportError as error:
        results.add(f"{name} {way}", None, detail=f"not measured: {error}")
        return
    if way == "rows-subset" and not any("BatchNorm" in type(module).__name__ for module in model.modules()):
        results.add(f"{name} {way}", None, detail="as rows: the model has no batch norm")
        return
    model = model.to(device).train()
    n = len(batch[1]) if len(batch) == 2 else len(batch[0]["labels"])
    step = step_of(way, model, loss, cut, n)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def train() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device != "cpu"):
            value = step(*batch)
        value.backward()
        optimizer.step()

    took = times(train, device, 1 if tiny else 10)
    peak = None
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        train()
        wait(device)
        peak = torch.cuda.max_memory_allocated() / 2**20
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    results.add(f"{name} {way} n={n}", finite, peak_mib=peak, **took)


def run(results: Results, device: str, tiny: bool) -> None:
    """Every model every way."""
    for name in MODELS:
        for way in WAYS:
            results.row(f"{name} {way}", partial(measure, results, name, way, device, tiny))
            if device != "cpu":
                torch.cuda.empty_cache()
