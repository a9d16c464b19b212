"""The fixed table of launch configurations, one row per architecture, and the pick by the device's own limits.

Nothing is tuned at run time: autotuning needs a driver, recompiles, and makes the first step of every job different.
``scripts/tune_triton.py`` measures candidates on a machine with a GPU and prints new rows for this table.

Keys: architecture -> kernel -> bytes of an element (2: bfloat16 and float16, 4: float32) -> Tile. ``conservative``
serves everything that is not named (sm_86, sm_89, sm_120, older and newer parts): pointer loads and at most 99 KiB of
shared memory. Every row is compiled ahead of time by the gates, which check spills, shared memory, the matrix
instruction and the instructions per logit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, lru_cache

import torch


@dataclass(frozen=True)
class Tile:
    """Shape of a program's tile and how it is compiled."""

    rows: int  # of the first operand
    columns: int  # of the second operand (classes), or classes per step where there is no product
    depth: int  # of one step along the contracted dimension
    warps: int = 8
    stages: int = 3
    descriptor: bool = False  # tensor descriptors (TMA) instead of pointers; needs 16-byte strides
    group: int = 8  # row tiles that walk the classes together
    quarters: bool = False  # of the columns, one after the other: a whole tile's epilogue has too few registers

    def with_pointers(self) -> Tile:
        """What serves rows that no descriptor can address: masks and addresses need registers, so 128 columns."""
        return replace(self.narrow(), descriptor=False)

    def narrow(self) -> Tile:
        """At most 128 columns, whose sums leave registers free."""
        return replace(self, columns=min(self.columns, 128))


def _rows(**kernels: dict[int, Tile]) -> dict[str, dict[int, Tile]]:
    shared = {
        "logits": {2: Tile(4, 1024, 0, 4, 1), 4: Tile(4, 512, 0, 4, 1)},
        # On 4 warps Triton 3.6 spills at (4, 512), and 3.9 at (2, 1024).
        "logits_smoothing": {2: Tile(4, 1024, 0, 4, 1), 4: Tile(2, 1024, 0, 8, 1)},
        "residual": {2: Tile(2, 512, 0, 4, 1), 4: Tile(2, 512, 0, 4, 1)},
    }
    exact = ("statistics", "statistics_softcap", "statistics_smoothing")
    defaults = {"sketch_softcap": kernels["sketch_smoothing"], **{f"{name}_ragged": kernels[name] for name in exact}}
    found = {**shared, **defaults, **kernels}
    narrow = {size: tile.narrow() for size, tile in found["statistics_ragged"].items()}
    return {"shares_ragged": narrow, **found, "statistics_everything": found["statistics_smoothing_ragged"]}


TABLE: dict[str, dict[str, dict[int, Tile]]] = {
    "sm_90": _rows(
        statistics={2: Tile(128, 256, 64, 8, 3, True), 4: Tile(128, 128, 32, 8, 3)},
        statistics_softcap={2: Tile(128, 256, 64, 8, 3, True, quarters=True), 4: Tile(128, 64, 32, 8, 3)},
        statistics_softcap_ragged={2: Tile(128, 64, 64, 8, 3, True), 4: Tile(128, 64, 32, 8, 3)},
        statistics_smoothing={2: Tile(128, 256, 64, 8, 3, True, quarters=True), 4: Tile(128, 32, 32, 8, 3)},
        statistics_smoothing_ragged={2: Tile(64, 64, 64, 8, 3, True), 4: Tile(128, 32, 32, 8, 3)},
        chunk={2: Tile(128, 128, 64, 8, 3, True), 4: Tile(128, 64, 32, 8, 3)},
        sketch={2: Tile(128, 128, 64, 8, 3, True), 4: Tile(64, 32, 32, 4, 3)},
        sketch_smoothing={2: Tile(64, 64, 64, 8, 3, True), 4: Tile(64, 16, 32, 8, 3)},
        gram={2: Tile(128, 128, 64, 8, 4, True), 4: Tile(64, 64, 32, 4, 3)},
        gram_small={2: Tile(64, 64, 64, 4, 4, True), 4: Tile(64, 64, 32, 4, 3)},
    ),
    "sm_100": _rows(
        statistics={2: Tile(256, 128, 64, 8, 4, True), 4: Tile(128, 128, 32, 8, 3)},
        statistics_ragged={2: Tile(128, 128, 64, 8, 4, True), 4: Tile(128, 128, 32, 8, 3)},
        statistics_softcap={2: Tile(128, 64, 64, 8, 3, True), 4: Tile(128, 64, 32, 8, 3)},
        statistics_softcap_ragged={2: Tile(128, 64, 32, 8, 4, True), 4: Tile(128, 64, 32, 8, 3)},
        statistics_smoothing={2: Tile(64, 64, 64, 8, 3, True), 4: Tile(128, 32, 32, 8, 3)},
        chunk={2: Tile(128, 64, 64, 8, 3, True), 4: Tile(128, 64, 32, 8, 3)},
        sketch={2: Tile(128, 128, 64, 8, 3, True), 4: Tile(64, 32, 32, 8, 3)},
        sketch_softcap={2: Tile(64, 64, 64, 4, 3, True), 4: Tile(64, 32, 32, 8, 3)},
        sketch_smoothing={2: Tile(64, 64, 64, 8, 3, True), 4: Tile(64, 32, 32, 8, 3)},
        gram={2: Tile(128, 128, 64, 8, 4, True), 4: Tile(64, 64, 32, 4, 3)},
        gram_small={2: Tile(64, 64, 64, 4, 4, True), 4: Tile(64, 64, 32, 4, 3)},
    ),
    "sm_80": _rows(
        statistics={2: Tile(128, 128, 32, 8, 4), 4: Tile(128, 64, 32, 8, 3)},
        shares_ragged={2: Tile(128, 128, 32, 8, 4), 4: Tile(64, 64, 32, 8, 3)},
        statistics_softcap={2: Tile(128, 64, 32, 8, 3), 4: Tile(64, 64, 32, 8, 3)},
        statistics_smoothing={2: Tile(128, 32, 64, 8, 3), 4: Tile(64, 32, 32, 4, 3)},
        chunk={2: Tile(128, 64, 32, 8, 3), 4: Tile(64, 64, 32, 8, 3)},
        sketch={2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 32, 32, 4, 3)},
        sketch_smoothing={2: Tile(64, 32, 64, 8, 3), 4: Tile(32, 32, 32, 8, 3)},
        gram={2: Tile(128, 128, 32, 8, 4), 4: Tile(64, 64, 32, 4, 3)},
        gram_small={2: Tile(64, 64, 64, 4, 3), 4: Tile(64, 64, 32, 4, 3)},
    ),
    "gfx942": _rows(
        statistics={2: Tile(128, 128, 32, 8, 2), 4: Tile(128, 64, 16, 8, 2)},
        statistics_softcap={2: Tile(128, 64, 32, 8, 2), 4: Tile(64, 64, 16, 8, 2)},
        statistics_smoothing={2: Tile(64, 64, 32, 4, 2), 4: Tile(64, 64, 16, 4, 2)},
        chunk={2: Tile(128, 64, 32, 8, 2), 4: Tile(64, 64, 16, 8, 2)},
        sketch={2: Tile(128, 128, 32, 8, 2), 4: Tile(64, 32, 16, 4, 2)},
        sketch_smoothing={2: Tile(64, 64, 32, 8, 2), 4: Tile(64, 32, 16, 8, 2)},
        gram={2: Tile(128, 128, 32, 8, 2), 4: Tile(64, 64, 16, 4, 2)},
        gram_small={2: Tile(64, 64, 32, 4, 2), 4: Tile(64, 64, 16, 4, 2)},
    ),
    "conservative": _rows(
        statistics={2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 64, 32, 8, 3)},
        statistics_softcap={2: Tile(128, 64, 64, 8, 2), 4: Tile(64, 64, 32, 8, 3)},
        statistics_smoothing={2: Tile(128, 32, 64, 8, 3), 4: Tile(64, 32, 32, 4, 3)},
        chunk={2: Tile(128, 64, 32, 8, 3), 4: Tile(64, 64, 32, 8, 3)},
        sketch={2: Tile(128, 128, 32, 8, 3), 4: Tile(64, 32, 32, 4, 3)},
        sketch_smoothing={2: Tile(64, 32, 64, 8, 3), 4: Tile(32, 32, 32, 8, 2)},
        gram={2: Tile(128, 128, 32, 8, 3), 4: Tile(32, 32, 32, 4, 3)},  # sm_120 spills a float32 tile of 64 rows
        gram_small={2: Tile(64, 64, 32, 4, 3), 4: Tile(32, 32, 32, 4, 3)},
    ),
}


@cache
def architecture(device: torch.device) -> str:
    """The row of the table for a device: by its name, and only where its shared memory is what that row needs."""
    if device.type != "cuda":
        return "conservative"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
        return name if name in TABLE else "conservative"
    if getattr(properties, "shared_memory_per_block_optin", 0) < 160 * 1024:
        return "conservative"
    return {8: "sm_80", 9: "sm_90", 10: "sm_100"}.get(properties.major, "conservative")


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; a fixed number where there is none, so that the interpreter is reproducible."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@lru_cache(maxsize=1024)
def class_splits(n_row_tiles: int, n_class_tiles: int, slots: int, splits: int | None = None) -> tuple[int, int]:
    """(splits, class tiles per split), none empty: ``splits`` where given, else the cheapest for a device.

    ``slots`` programs run at once, in waves that each take as long as a split's tiles and its start and end, about half
    a tile (modelled). Of equally cheap splits the fewest. The same on every run: sums are added in the same order.
    """
    if splits is not None:
        per_split = _ceil(n_class_tiles, max(1, splits))
        return _ceil(n_class_tiles, max(1, per_split)), per_split
    rows = max(n_row_tiles, 1)
    most = max(1, min(n_class_tiles, MOST_WAVES * slots // rows))
    sizes = sorted({_ceil(n_class_tiles, wanted) for wanted in range(1, most + 1)}, reverse=True)
    per_split = min(sizes, key=lambda size: _ceil(rows * _ceil(n_class_tiles, max(1, size)), slots) * (2 * size + 1))
    return _ceil(n_class_tiles, max(1, per_split)), per_split


MOST_WAVES = 32  # each split of each row leaves partial sums: this bounds their memory to a few MB


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def statistics_tile(
    device: torch.device,
    dtype: torch.dtype,
    n_classes: int,
    *,
    bias: bool,
    softcap: bool,
    smooth: bool,
    weighted: bool = False,  # classes, with smoothing
    projected: bool = False,
    shares: bool = False,  # of the tiles are written, without smoothing
) -> Tile:
    """The configuration of ``statistics``: sums of a projection, options, a bias and a ragged end need registers."""
    if projected:
        return tile("sketch_smoothing" if smooth else "sketch_softcap" if softcap else "sketch", device, dtype)
    if smooth and (softcap or weighted):
        return tile("statistics_everything", device, dtype)
    kind = "statistics_smoothing" if smooth else "statistics_softcap" if softcap else "statistics"
    exact = tile(kind, device, dtype)
    if not (bias or n_classes % exact.columns):
        return exact
    return tile("shares_ragged" if shares and not softcap else f"{kind}_ragged", device, dtype)


def tile(kernel: str, device: torch.device, dtype: torch.dtype) -> Tile:
    """The configuration of ``kernel`` for tensors of ``dtype`` on ``device``."""
    return TABLE[architecture(device)][kernel][dtype.itemsize]
