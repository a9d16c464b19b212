"""Flops, bytes and modelled times of the Triton kernels on GPUs: ``python -m benchmarks.roofline_gpu``.

Nothing here is measured: each time is a model, printed beside the roofline of the vendor's data sheet, and marked
*unmeasured*. ``scripts/gpu_check.py`` runs the same shapes on a machine that has a GPU. The model of a kernel with a
product: the matrix units at 70 % of their peak, then the epilogue, its instructions per logit (read from the machine
code, tests/triton_kernels/aot.py) at four warp instructions a cycle and multiprocessor; never less than the bytes take.

``requested_bytes`` is what the programs of a launch ask the memory system for; the interpreter tests count the same
number, byte for byte, so the formulas and the kernels cannot drift apart. ``least_bytes`` is what must come from DRAM.
"""

from __future__ import annotations

from dataclasses import dataclass

EFFICIENCY = 0.70  # of the matrix peak that a good main loop sustains


@dataclass(frozen=True)
class Device:
    """A GPU by its data sheet (dense rates, no sparsity)."""

    name: str
    processors: int
    clock: float  # Hz
    flops: float  # bfloat16 tensor FLOP/s
    bandwidth: float  # bytes/s
    epilogue: float  # instructions per logit of statistics, from the machine code


DEVICES = {
    "H100": Device("H100 SXM", 132, 1.755e9, 989e12, 3.35e12, 10.9),
    "A100": Device("A100 SXM 80 GB", 108, 1.41e9, 312e12, 2.04e12, 16.0),
    "B200": Device("B200", 148, 1.85e9, 2250e12, 8.0e12, 10.9),
}


@dataclass(frozen=True)
class Work:
    """What one launch does."""

    kernel: str
    shape: str
    flops: float
    least_bytes: float
    logits: float = 0.0  # that pass through the epilogue
    extra: float = 0.0  # instructions per logit beyond those of statistics
    beside: float = 0.0  # bytes that pass while no product runs


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def statistics(n: int, n_classes: int, d: int, item: int = 2) -> Work:
    """H W^T once; H and W read once, the partials negligible."""
    logits = float(n) * n_classes
    return Work("statistics", f"{n}x{n_classes}x{d}", 2.0 * logits * d, float(n + n_classes) * d * item, logits)


def gram(n: int, n_classes: int, d: int, item: int = 2, rows: int = 128) -> Work:
    """One triangle of tiles of both products; the factors read once, K written once in float32."""
    shape = f"n={n} C={n_classes} d={d}"
    return Work("gram", shape, float(n) * (n + rows) * (n_classes + d), n * (n_classes + d) * item + 4.0 * n * n)


def logits_statistics(n: int, n_classes: int, item: int = 2) -> Work:
    """Every stored logit read once."""
    return Work("logits_statistics", f"{n}x{n_classes}", 8.0 * n * n_classes, float(n) * n_classes * item)


def residual(n: int, n_classes: int, item: int = 2) -> Work:
    """Every stored logit read once, every residual written once in float32."""
    return Work("residual", f"{n}x{n_classes}", 8.0 * n * n_classes, float(n) * n_classes * (item + 4))


def sketch(n: int, n_classes: int, d: int, p: int = 64, item: int = 2) -> Work:
    """Statistics and the projection of the residuals onto p columns, in the same pass."""
    logits = float(n) * n_classes
    nbytes = float(n + n_classes) * d * item + n_classes * p * item + n * p * 4.0
    return Work("sketch", f"{n}x{n_classes}x{d} p={p}", 2.0 * logits * (d + p), nbytes, logits, extra=4.7)


def chunk(k: int, n_classes: int, d: int, item: int = 2) -> Work:
    """Logits of the rows with a gradient again, stored as residuals: the backward but for its two BLAS products."""
    logits = float(k) * n_classes
    return Work(
        "residual_chunk", f"{k}x{n_classes}x{d}", 2.0 * logits * d, (k + n_classes) * d * item + logits * item, logits
    )


CHUNK_BYTES = 256 << 20  # of triton_kernels/linear_cross_entropy.py
CACHE_BYTES = 50 << 20  # of the L2 of an H100: smaller chunks of residuals are not read from DRAM


def training(
    n: int, n_classes: int, d: int, item: int = 2, chunk_bytes: int = CHUNK_BYTES, adds_in_place: bool = True
) -> Work:
    """Forward and backward of every row: the logits twice and two products of the BLAS; the gradients written.

    Beside the products, each chunk of residuals reads and writes dH in float32; without ``adds_in_place`` it writes and
    reads the chunk's share as well, and dW takes a way through float32. Residuals that the L2 does not hold are written
    once and read twice.
    """
    logits = float(n) * n_classes
    columns = max(256, chunk_bytes // (n * item) // 256 * 256)
    chunks = _ceil(n_classes, columns)
    beside = chunks * (8.0 if adds_in_place else 16.0) * n * d
    if not adds_in_place:
        beside += 8.0 * n_classes * d
    if min(columns, n_classes) * n * item > CACHE_BYTES:
        beside += 3.0 * logits * item
    nbytes = (n + n_classes) * d * item * 3.0
    name = f"{n}x{n_classes}x{d} in {chunks} chunks" + ("" if adds_in_place else ", added apart")
    return Work("linear_cross_entropy", name, 8.0 * logits * d, nbytes, 2.0 * logits, beside=beside)


TILE = 256  # classes that a row leaves out together, of triton_kernels/skipped.py
GATHERED = 0.60  # of the matrix peak: rows by pointer, narrower tiles
IN_FLOAT32 = 16  # flops of the matrix units in the time of one in float32


def backward(k: int, n_classes: int, d: int, item: int = 2, formed: float | None = None) -> Work:
    """The backward alone, exact or with ``skip_mass``, of which the rows form the part ``formed`` of their tiles.

    Logits and the weight's gradient are then products of what is formed; the features' gradient keeps all its flops.
    Every chunk of residuals is zeroed first. Beside them what is left out, two products of k x tiles in float32, and
    passes over the (k, tiles) table: sorted, summed, listed.
    """
    logits, tiles = float(k) * n_classes, _ceil(n_classes, TILE)
    chunks = _ceil(n_classes, max(256, CHUNK_BYTES // (k * item) // 256 * 256))
    part = 1.0 if formed is None else formed
    beside = chunks * 8.0 * k * d + 3.0 * logits * item
    flops = 6.0 * logits * d
    if formed is not None:
        flops = (4.0 * formed * EFFICIENCY / GATHERED + 2.0) * logits * d + IN_FLOAT32 * 4.0 * k * tiles * d
        beside += (2.0 * formed - 1.0) * logits * item + 100.0 * k * tiles + n_classes * d * item
    name = f"{k}x{n_classes}x{d} " + ("exact" if formed is None else f"{formed:.2f} formed")
    return Work("backward", name, flops, (k + n_classes) * d * item * 2.0, part * logits, beside=beside)


def target_logit(n: int, d: int, item: int = 2) -> Work:
    """A row of the features and one of the weight for each sample."""
    return Work("target_logit", f"{n}x{d}", 4.0 * n * d, float(target_logit_requests(n, d, item)))


def finalize(n: int, splits: int) -> Work:
    """Vectors of n numbers."""
    return Work("finalize", f"n={n} splits={splits}", 50.0 * n * splits, float(finalize_requests(n, splits)))


def roofline(work: Work, device: Device) -> float:
    """Seconds at the data sheet's peaks."""
    flops = work.flops if work.logits or work.kernel == "gram" else 0.0
    return max(flops / device.flops, work.least_bytes / device.bandwidth)


def modelled(work: Work, device: Device) -> float:
    """Seconds by the model of this module; unmeasured."""
    product = work.flops / (EFFICIENCY * device.flops) if work.logits or work.kernel == "gram" else 0.0
    instructions = work.logits * (device.epilogue + work.extra) / 32
    epilogue = instructions / (4 * device.processors * device.clock)
    return max(product + epilogue, work.least_bytes / (0.9 * device.bandwidth)) + work.beside / (0.9 * device.bandwidth)


def statistics_requests(n: int, n_classes: int, d: int, splits: int, tile: tuple[int, int], item: int) -> int:
    """Bytes that ``statistics_kernel`` requests by pointer, exact depth, no bias: loads and stores.

    Rows and classes past the end are clamped, so every tile is read whole: (ROWS + COLUMNS) d for each pair of row and
    class tile, the targets once a program, three partials a row and split.
    """
    rows, columns = tile
    row_tiles, class_tiles = _ceil(n, rows), _ceil(n_classes, columns)
    return row_tiles * class_tiles * (rows + columns) * d * item + splits * n * (8 + 3 * 4)


def sketch_requests(n: int, n_classes: int, d: int, p: int, splits: int, tile: tuple[int, int], item: int) -> int:
    """The same with a projection: P once a row tile, and p sums a row and split."""
    projected = _ceil(n, tile[0]) * n_classes * p * item + splits * n * p * 4
    return statistics_requests(n, n_classes, d, splits, tile, item) + projected


def logits_statistics_requests(n: int, n_classes: int, splits: int, item: int) -> int:
    """Bytes that ``logits_statistics_kernel`` requests: masked, so each logit once; targets and partials a split."""
    return n * n_classes * item + splits * n * (8 + 3 * 4)


def target_logit_requests(n: int, d: int, item: int) -> int:
    """Bytes that ``target_logit_kernel`` requests from features and weight, no bias: h, W[y], y and two outputs."""
    return n * (2 * d * item + 8 + 4 + 4)


def finalize_requests(n: int, splits: int) -> int:
    """Bytes that ``finalize_kernel`` requests, no options: three partials a split, three inputs, six outputs."""
    return n * (3 * 4 * splits + 4 + 4 + 8 + 4 * 4 + 2)


def residual_requests(n: int, n_classes: int, splits: int, item: int) -> int:
    """Bytes that both residual kernels request, no options: each logit read and each residual written once."""
    first = n * n_classes * item + n * (n_classes - 1) * 4 + splits * n * (8 + 4 + 4)
    return first + n * (splits * 4 + 8 + item + 4 + 4)


ROW_TERMS = 8 + 5 * 4  # target, and lse, 1 - p_y, scale and two sums of the soft target


def chunk_requests(k: int, n_columns: int, d: int, tile: tuple[int, int], item: int) -> int:
    """Bytes that ``residual_chunk_kernel`` requests by pointer, exact depth, no options: tiles whole, stores masked."""
    rows, columns = tile
    row_tiles, class_tiles = _ceil(k, rows), _ceil(n_columns, columns)
    return row_tiles * class_tiles * (rows + columns) * d * item + class_tiles * k * ROW_TERMS + k * n_columns * item


def gram_requests(n: int, n_classes: int, d: int, rows: int, item: int, clear_rows: int = 64) -> int:
    """Bytes that the three Gram kernels request by pointer, exact depths, no broken row."""
    count = _ceil(n, rows)
    tiles = count * (count + 1) // 2
    flags = n + n + 2 * n * _ceil(n, clear_rows)  # written, confirmed, read by the clearing tiles
    return tiles * 2 * rows * (n_classes + d) * item + 4 * n * n + flags


SHAPES = (
    statistics(8192, 128256, 4096),
    statistics(8192, 32000, 4096),
    statistics(4096, 1000, 2048),
    sketch(8192, 128256, 4096),
    sketch(8192, 32000, 4096),
    training(8192, 128256, 4096, chunk_bytes=32 << 20, adds_in_place=False),  # what it was before
    training(8192, 128256, 4096),
    training(2048, 128256, 4096, chunk_bytes=32 << 20, adds_in_place=False),
    training(2048, 128256, 4096),
    training(8192, 32000, 4096, chunk_bytes=32 << 20, adds_in_place=False),
    training(8192, 32000, 4096),
    backward(8192, 128256, 4096),
    *(backward(8192, 128256, 4096, formed=part) for part in (1.0, 0.5, 0.2)),
    chunk(2048, 128256, 4096),
    chunk(2048, 32000, 4096),
    logits_statistics(8192, 32000),
    residual(8192, 32000),
    target_logit(8192, 4096),
    finalize(8192, 2),
    gram(4096, 1000, 2048),
    gram(1024, 1000, 768),
)


def main() -> None:
    """Print the table."""
    print("kernel | shape | GFLOP | MB | " + " | ".join(f"{d.name}: roofline, model (ms)" for d in DEVICES.values()))
    for work in SHAPES:
        times = " | ".join(
            f"{1e3 * roofline(work, device):.3g}, {1e3 * modelled(work, device):.3g} unmeasured"
            for device in DEVICES.values()
        )
        print(
            f"{work.kernel} | {work.shape} | {work.flops / 1e9:.3g} | {work.least_bytes / 1e6:.3g} | {times}",
            flush=True,
        )


if __name__ == "__main__":
    main()
