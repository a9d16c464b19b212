"""What a proxy sees of each sample: at most 256 numbers, made without a network."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selbp._checks import shown
from selbp._numpy import ARRAYS

WIDTH = 256  # numbers a sample
GRAMS = 2  # characters or tokens that are hashed together, beside single ones
LABELS = ("labels", "label")  # a dict's entry with the class
RAGGED = (-1,)  # in place of one shape, where there are several
INPUTS = ("input_ids", "pixel_values")  # which of a dict's entries are the input where there are several

Features = str | Tensor | Callable[[Any], Any]


def samples_of(dataset: Any, ids: range, *, auto: bool) -> tuple[Any, Tensor]:
    """Inputs and (m,) int64 labels of the samples ``ids``. The inputs are one tensor where they stack.

    Of dicts, ``auto`` takes the entry that :func:`automatic` reads.
    """
    tensors = getattr(dataset, "tensors", None)  # of a TensorDataset
    if isinstance(tensors, (tuple, list)) and len(tensors) >= 2 and all(isinstance(x, Tensor) for x in tensors):
        part = slice(ids.start, ids.stop)
        return tensors[0][part], _labels(tensors[1][part])
    many = getattr(dataset, "__getitems__", None)
    items = many(list(ids)) if many is not None else [dataset[i] for i in ids]
    if all(isinstance(item, Mapping) for item in items):
        key = next((key for key in LABELS if key in items[0]), None)
        if key is None:
            raise TypeError(f"dataset must give dicts with {' or '.join(LABELS)}, got one with {', '.join(items[0])}")
        inputs = _stacked([_input_of(item) for item in items], auto) if auto else items
        return inputs, _labels([item[key] for item in items])
    if not all(isinstance(item, (tuple, list)) and len(item) >= 2 for item in items):
        raise TypeError(f"dataset must give (input, label), or a dict, for each number, got {shown(items[0])}")
    inputs = [item[0] for item in items]
    return _stacked(inputs, auto), _labels([item[1] for item in items])


def _labels(labels: Tensor | list[Any]) -> Tensor:
    if isinstance(labels, list):  # torch takes an array for a sequence, which one without a dim is not
        labels = [x.item() if isinstance(x, ARRAYS) and not x.ndim else x for x in labels]
    try:
        found = torch.as_tensor(labels, device="cpu")
        fits = found.dim() == 1 and not found.is_floating_point() and found.dtype != torch.bool
        if fits:
            return found.long()
        got = shown(found)
    except (TypeError, ValueError, RuntimeError):  # strings, or tensors of several numbers
        got = shown(labels[0])
    raise ValueError(
        f"a proxy needs one class a sample, an integer: the labels are {got}; without classes leave the proxy out"
    )


def _stacked(inputs: list[Any], auto: bool) -> Any:
    """One tensor of inputs that have one shape; else the list, for ``auto`` with tensors in place of arrays."""
    if auto:
        inputs = [torch.as_tensor(x, device="cpu") if isinstance(x, ARRAYS) else x for x in inputs]
    if all(isinstance(x, Tensor) and x.shape == inputs[0].shape for x in inputs):
        return torch.stack(inputs)
    if all(isinstance(x, ARRAYS) and x.shape == inputs[0].shape for x in inputs):
        return torch.stack([torch.as_tensor(x, device="cpu") for x in inputs])
    return inputs


def checked(found: Any, ids: range) -> Tensor:
    """(m, d) float32 features of the samples ``ids``, on the CPU. Raises ValueError unless ``found`` is such."""
    if not isinstance(found, Tensor) or found.dim() != 2 or len(found) != len(ids):
        raise ValueError(f"features must give a tensor (m, d) = ({len(ids)}, d), got {shown(found)}")
    return found.detach().float().cpu()


def joined(parts: list[Tensor]) -> Tensor:
    """(N, d) of parts (m, d). Raises ValueError unless they have one d."""
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise ValueError(
            f"features must have one length d for all samples, got {' and '.join(map(str, widths))}: give images as "
            "many channels, or pass features=, a function of a list of inputs that gives (m, d)"
        )
    return torch.cat(parts)


def shape_of(inputs: Any) -> tuple[int, ...] | None:
    """One sample's shape, which all must have for features of stacked inputs; :data:`RAGGED` where they differ.

    None where features do not depend on it: texts, tokens, PIL images.
    """
    if isinstance(inputs, Tensor):
        return tuple(inputs.shape[1:]) if inputs.is_floating_point() or inputs.dim() > 2 else None
    ragged = all(isinstance(x, Tensor) and (x.is_floating_point() or x.dim() > 1) for x in inputs)
    return RAGGED if ragged else None


def automatic(inputs: Any, alike: bool = True) -> Tensor:
    """(m, d) features of m samples.

    Images (m, [channels,] height, width): pooled by averages to at most 256 numbers. Vectors (m, d) floating: as they
    are, or averages of neighbours. Texts, and tokens (m, T) or ragged: counts of hashed n-grams. A PIL image is read
    as one of its pixels.

    Where the data set's samples are not ``alike`` in shape, these ones may happen to be: their features are then those
    of inputs of several shapes.
    """
    if isinstance(inputs, Tensor) and not alike:
        inputs = list(inputs)
    if isinstance(inputs, Tensor) and inputs.is_floating_point() | (inputs.dim() > 2):
        return _pooled(inputs)
    if isinstance(inputs, Tensor) and inputs.dim() == 2:
        return _hashed([row.tolist() for row in inputs])
    if isinstance(inputs, Sequence) and all(isinstance(x, (str, bytes, list, tuple)) for x in inputs):
        return _hashed(inputs)
    if isinstance(inputs, Sequence) and all(isinstance(x, Tensor) and x.dim() == 1 for x in inputs):
        return _hashed([x.tolist() for x in inputs])
    if isinstance(inputs, Sequence) and all(isinstance(x, Tensor) and x.dim() in (2, 3) for x in inputs):
        return joined([_pooled(x[None], exact=True) for x in inputs])  # images of several sizes
    if isinstance(inputs, Sequence) and all(hasattr(x, "getbands") for x in inputs):
        return joined([_pooled(_pixels(x), exact=True) for x in inputs])
    raise TypeError(
        'features="auto" takes images, vectors, texts or tokens; pass features=, a function of a list of inputs that '
        f"gives (m, d), or a matrix (N, d) of embeddings; got {shown(inputs[0] if isinstance(inputs, list) else 0)}"
    )


def _input_of(item: Mapping[str, Any]) -> Any:
    """What ``"auto"`` reads of a dict. Raises TypeError where that is not clear."""
    names = [name for name in item if name not in LABELS]
    chosen = [name for name in INPUTS if name in item] or names
    if len(chosen) != 1:
        raise TypeError(
            f'features="auto" takes dicts with input_ids, pixel_values or one entry beside the label, got one with '
            f"{', '.join(item)}: pass features=, a function of a list of them that gives (m, d)"
        )
    found, mask = item[chosen[0]], item.get("attention_mask")
    if chosen == ["input_ids"] and mask is not None:
        return torch.as_tensor(found, device="cpu")[torch.as_tensor(mask, device="cpu") != 0].tolist()
    return found


def _pixels(image: Any) -> Tensor:
    """(1, channels, height, width) of a PIL image."""
    image = image.convert("RGB" if len(image.getbands()) > 1 else "L")
    width, height = image.size
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return data.view(1, height, width, -1).permute(0, 3, 1, 2)


def _pooled(x: Tensor, exact: bool = False) -> Tensor:
    """(m, d) averages of neighbours; ``exact``: the same d for every size of image with as many channels."""
    x = x.float()
    if x.dim() == 1:
        return x[:, None]
    if x.dim() == 2:
        return x if x.shape[1] <= WIDTH else F.adaptive_avg_pool1d(x[:, None], WIDTH)[:, 0]
    x = x[:, None] if x.dim() == 3 else x.flatten(1, x.dim() - 3)
    if x.shape[1] > WIDTH // 4:
        return _pooled(x.flatten(1))
    side = int((WIDTH // x.shape[1]) ** 0.5)
    height, width = x.shape[-2:]
    if exact or height > side or width > side:
        factor = -(-max(height, width) // side)  # a whole factor pools faster, and blurs no edge
        whole = not exact and height % factor == 0 and width % factor == 0
        x = F.avg_pool2d(x, factor) if whole else F.adaptive_avg_pool2d(x, side)
    return x.flatten(1)


def _hashed(texts: Sequence[Any]) -> Tensor:
    """(m, 256) square roots of the counts of hashed single characters or tokens and of pairs, each row of norm 1."""
    found = torch.zeros(len(texts), WIDTH, dtype=torch.float32, device="cpu")
    for row, text in enumerate(texts):
        units = text.split() if isinstance(text, (str, bytes)) else text
        grams = [repr(unit) for unit in units]
        grams += [f"{a} {b}" for a, b in zip(grams, grams[1:], strict=False)] if GRAMS > 1 else []
        slots = torch.tensor([zlib.crc32(gram.encode()) % WIDTH for gram in grams], dtype=torch.int64, device="cpu")
        found[row] = torch.bincount(slots, minlength=WIDTH).float()
    found = found.sqrt()
    return found / found.norm(dim=1, keepdim=True).clamp(min=1e-12)
