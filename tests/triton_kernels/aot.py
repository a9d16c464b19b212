"""Ahead-of-time compilation of every shipped configuration, and what its machine code must look like.

Runs as a script in a process without TRITON_INTERPRET (the two cannot share one):

    python tests/triton_kernels/aot.py sm_90 [kernel ...]

prints one JSON object a kernel variant: registers, spills, shared memory, matrix instructions, instructions per logit,
and ``failures``, the limits that it breaks. No GPU is needed: Triton compiles for a named target.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from selbp.triton_kernels import (
    configs,
    finalize,
    gram,
    linear_cross_entropy,
    residual,
    sketch,
    statistics,
    target_logit,
)

TARGETS = {
    "sm_80": [GPUTarget("cuda", 80, 32)],
    "sm_90": [GPUTarget("cuda", 90, 32)],
    "sm_100": [GPUTarget("cuda", 100, 32)],
    "gfx942": [GPUTarget("hip", "gfx942", 64)],
    "conservative": [GPUTarget("cuda", arch, 32) for arch in (86, 89, 120)],
}
# What a block may use: the opt-in limits of the CUDA programming guide (compute capabilities), LDS on CDNA3.
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KiB
MATRIX = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: r"UTC\w*MMA", 120: "HMMA", "gfx942": r"v_mfma\w*"}
PER_LOGIT_LIMIT = 11.5  # of the statistics epilogue on sm_90, exact tiles, no options
NAMES = {2: "bf16", 4: "fp32"}


@dataclasses.dataclass
class Variant:
    """One kernel with its argument types and constants."""

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    warps: int
    stages: int = 3
    matrix: bool = False
    logits_per_program: int = 0  # set where the instructions per logit are held to the limit


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _options(**changes: bool) -> dict[str, bool]:
    return {"SOFTCAP": False, "SMOOTH": False, "HAS_WEIGHT": False, **changes}


VARIANTS = {
    "plain": _options(),
    "weight": _options(HAS_WEIGHT=True),
    "softcap": _options(SOFTCAP=True),
    "smoothing": _options(SMOOTH=True),
    "everything": _options(SOFTCAP=True, SMOOTH=True, HAS_WEIGHT=True),
}


def _pointer(name: str, present: bool, element: str) -> dict[str, str]:
    return {name: f"*{element}"} if present else {}


def _matrix_operand(tile: configs.Tile, rows: int, depth: int, element: str) -> str:
    return f"tensordesc<{element}[{rows}, {depth}]>" if tile.descriptor else f"*{element}"


def _precision(itemsize: int, target: GPUTarget) -> str:
    return "tf32" if itemsize == 2 else "ieee" if target.backend == "hip" else "tf32x3"


def statistics_variants(arch: str, target: GPUTarget, tile: configs.Tile | None = None) -> list[Variant]:
    """Exact tiles, ragged ones with a bias, and the pointers that rows without alignment fall back to."""
    found = []
    for itemsize, element in NAMES.items():
        for name, options in VARIANTS.items():
            if name == "weight":
                continue  # it is read with smoothing only
            key = {"plain": "statistics", "softcap": "statistics_softcap"}.get(name, "statistics_smoothing")
            ragged = "statistics_ragged" if name == "plain" else key
            for table, exact in ((key, True), (ragged, False)):
                shape = tile or configs.TABLE[arch][table][itemsize]
                found.append(_statistics(name, options, shape, exact, element, itemsize, target))
            if shape.descriptor:
                shape = dataclasses.replace(shape, descriptor=False)
                found.append(_statistics(name, options, shape, False, element, itemsize, target))
    return found


def _statistics(name, options, shape, exact, element, itemsize, target) -> Variant:
    constants = {
        "ROWS": shape.rows, "COLUMNS": shape.columns, "DEPTH": shape.depth, "GROUP": shape.group,
        "DESCRIPTOR": shape.descriptor, "EVEN_COLUMNS": exact, "EVEN_DEPTH": exact, "HAS_BIAS": not exact,
        "PRECISION": _precision(itemsize, target), **options,
    }  # fmt: skip
    types = {
        "features": _matrix_operand(shape, shape.rows, shape.depth, element),
        "weight": _matrix_operand(shape, shape.columns, shape.depth, element),
        **_pointer("bias", not exact, element),
        **_pointer("class_weight", options["HAS_WEIGHT"], "fp32"),
        "target": "*i64", "partials": "*fp32", "softcap": "fp32",
        **_integers("n", "n_classes", "d", "stride_h", "stride_w", "tiles_per_split"),
    }  # fmt: skip
    limited = name == "plain" and exact and itemsize == 2
    label = f"statistics {element} {name} {'exact' if exact else 'ragged'}{'' if shape.descriptor else ' pointers'}"
    return Variant(
        label, statistics.statistics_kernel, types, constants, shape.warps, shape.stages, True,
        shape.rows * shape.columns if limited else 0,
    )  # fmt: skip


def row_variants(arch: str) -> list[Variant]:
    """The kernels without a product: target_logit, statistics of stored logits, finalize, residual."""
    found = []
    for itemsize, element in NAMES.items():
        constants = {"ROWS": target_logit.ROWS, "DEPTH": target_logit.DEPTH, "HAS_FEATURES": True}
        types = {
            "features": f"*{element}", "target": "*i64", "target_logit": "*fp32", "feature_sq": "*fp32", "plus": "fp32",
            **_integers("n", "d", "n_classes", "stride_h", "stride_w", "stride_z"),
        }  # fmt: skip
        linear = {"weight": f"*{element}", "bias": f"*{element}"}
        found.append(Variant(f"target_logit {element} linear", target_logit.target_logit_kernel, {**types, **linear},
                             {**constants, "HAS_LOGITS": False, "HAS_BIAS": True}, 4))  # fmt: skip
        found.append(Variant(f"target_logit {element} stored", target_logit.target_logit_kernel,
                             {**types, "logits": f"*{element}"},
                             {**constants, "HAS_LOGITS": True, "HAS_BIAS": False}, 4))  # fmt: skip
        rows, stored = (configs.TABLE[arch][kernel][itemsize] for kernel in ("residual", "logits"))
        for name, options in VARIANTS.items():
            types = {
                "logits": f"*{element}", "target": "*i64", "partials": "*fp32", "softcap": "fp32", "lse": "*fp32",
                "out": "*fp32", "sums": "*fp32", "target_logit": "*fp32", "feature_sq": "*fp32", "loss_out": "*fp32",
                "lse_out": "*fp32", "residual_sq_out": "*fp32", "others_out": "*fp32", "correct_out": "*u8",
                "valid_out": "*u8",
                "label_smoothing": "fp32", **_pointer("class_weight", options["HAS_WEIGHT"], "fp32"),
                **_pointer("weight_sum", options["HAS_WEIGHT"] and options["SMOOTH"], "fp32"),
                **_integers("n", "n_splits", "n_classes", "stride_z", "stride_out", "tiles_per_split", "ignore_index"),
            }  # fmt: skip
            if name != "weight":
                found.append(Variant(f"logits_statistics {element} {name}", statistics.logits_statistics_kernel, types,
                                     {"ROWS": stored.rows, "COLUMNS": stored.columns, **options}, stored.warps,
                                     stored.stages))  # fmt: skip
            found.append(Variant(f"residual {element} {name}", residual.residual_kernel, types,
                                 {"ROWS": rows.rows, "COLUMNS": rows.columns, **options}, rows.warps,
                                 rows.stages))  # fmt: skip
            found.append(Variant(f"residual_target {element} {name}", residual.residual_target_kernel, types,
                                 {"ROWS": residual.ROWS, "COLUMNS": residual.COLUMNS, **options}, 4))  # fmt: skip
            if itemsize == 4:
                found.append(Variant(f"finalize {name}", finalize.finalize_kernel, types,
                                     {"ROWS": finalize.ROWS, **options}, 4))  # fmt: skip
    return found


def chunk_variants(arch: str, target: GPUTarget, table: str = "chunk") -> list[Variant]:
    """Residuals of a chunk of classes, for the backward of linear_cross_entropy."""
    found = []
    for itemsize, element in NAMES.items():
        shape = configs.TABLE[arch][table][itemsize]
        for name in ("plain", "everything"):
            options = VARIANTS[name]
            plain = dataclasses.replace(shape, descriptor=False)
            for tile, exact in ((shape, True), (plain, False)):
                constants = {
                    "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth, "GROUP": tile.group,
                    "DESCRIPTOR": tile.descriptor, "EVEN_DEPTH": exact, "HAS_BIAS": not exact,
                    "PRECISION": _precision(itemsize, target), **options,
                }  # fmt: skip
                types = {
                    "features": _matrix_operand(tile, tile.rows, tile.depth, element),
                    "weight": _matrix_operand(tile, tile.columns, tile.depth, element), "target": "*i64",
                    **_pointer("bias", not exact, element), **_pointer("class_weight", options["HAS_WEIGHT"], "fp32"),
                    **dict.fromkeys(("lse", "others", "scale", "mass", "rest"), "*fp32"), "out": f"*{element}",
                    "share": "fp32", "softcap": "fp32",
                    **_integers("k", "n_columns", "first_class", "d", "stride_h", "stride_w", "stride_out"),
                }  # fmt: skip
                label = f"{table} {element} {name} {'exact' if exact else 'ragged pointers'}"
                kernel = linear_cross_entropy.residual_chunk_kernel
                found.append(Variant(label, kernel, types, constants, tile.warps, tile.stages, True))
    return found


def sketch_variants(arch: str, target: GPUTarget) -> list[Variant]:
    """The residuals' projection, for the sketch of sequences."""
    found = []
    for variant in chunk_variants(arch, target, "sketch"):
        element = "bf16" if " bf16 " in variant.name else "fp32"
        types = {**variant.types, "projection": f"*{element}", "out": "*fp32",
                 **_integers("n", "n_classes", "p", "stride_p", "tiles_per_split")}  # fmt: skip
        constants = {**variant.constants, "WIDTH": sketch.WIDTH}
        found.append(dataclasses.replace(variant, kernel=sketch.sketch_kernel, types=types, constants=constants))
    return found


def gram_variants(arch: str, target: GPUTarget) -> list[Variant]:
    found = []
    for table in ("gram", "gram_small"):
        for size_r, size_h in ((2, 2), (4, 4), (4, 2)):
            tile = configs.TABLE[arch][table][max(size_r, size_h)]
            shapes = [tile] if not tile.descriptor else [tile, dataclasses.replace(tile, descriptor=False)]
            for shape in shapes:
                depth_r, depth_h = (shape.depth * max(size_r, size_h) // size for size in (size_r, size_h))
                for exact in (True,) if shape.descriptor else (False,):
                    constants = {
                        "ROWS": shape.rows, "DEPTH_R": depth_r, "DEPTH_H": depth_h, "DESCRIPTOR": shape.descriptor,
                        "EVEN_R": exact, "EVEN_H": exact,
                        "PRECISION_R": _precision(size_r, target), "PRECISION_H": _precision(size_h, target),
                    }  # fmt: skip
                    types = {
                        "residual": _matrix_operand(shape, shape.rows, depth_r, NAMES[size_r]),
                        "features": _matrix_operand(shape, shape.rows, depth_h, NAMES[size_h]),
                        "gram": "*fp32", "broken": "*u8", "plus": "fp32",
                        **_integers("n", "n_classes", "d", "stride_r", "stride_h", "stride_k"),
                    }  # fmt: skip
                    label = f"{table} {NAMES[size_r]} {NAMES[size_h]} {'exact' if exact else 'ragged'}"
                    found.append(Variant(label + ("" if shape.descriptor else " pointers"), gram.gram_kernel, types,
                                         constants, shape.warps, shape.stages, True))  # fmt: skip
    types = {
        "residual": "*fp32", "features": "*fp32", "gram": "*fp32", "broken": "*u8",
        **_integers("n", "n_classes", "d", "stride_r", "stride_h", "stride_k"),
    }  # fmt: skip
    confirm = {"ROWS": gram.CONFIRM_ROWS, "DEPTH": gram.CONFIRM_DEPTH}
    return [
        *found,
        Variant("gram_confirm", gram.gram_confirm_kernel, types, confirm, 4),
        Variant("gram_clear", gram.gram_clear_kernel, types, {"ROWS": gram.CLEAR_ROWS}, 4),
    ]


def variants(arch: str, target: GPUTarget) -> list[Variant]:
    """Every kernel variant that ships for an architecture."""
    return [
        *statistics_variants(arch, target),
        *row_variants(arch),
        *gram_variants(arch, target),
        *chunk_variants(arch, target),
        *sketch_variants(arch, target),
    ]


def compile_variant(variant: Variant, target: GPUTarget):
    """Triton's compiled kernel; arguments that are given no type are None, as in the launch."""
    kernel = variant.kernel
    constants = dict(variant.constants)
    signature = {}
    for name in kernel.arg_names:
        if name not in constants and name not in variant.types:
            constants[name] = None
        signature[name] = "constexpr" if name in constants else variant.types[name]
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    # What the launch specialises on: allocations are 256-byte aligned, sizes and strides are multiples of 16.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride_") or name in ("d",)
    }
    source = ASTSource(kernel, signature, constants, aligned)
    return triton.compile(source, target=target, options={"num_warps": variant.warps, "num_stages": variant.stages})


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS) from the tools that Triton ships."""
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")

    def run(*command: str) -> str:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = run(os.path.join(tools, "cuobjdump"), "-res-usage", file.name)
        return usage, run(os.path.join(tools, "nvdisasm"), "-c", file.name)


def instructions(sass: str) -> tuple[list[str], list[tuple[int, int]]]:
    """(opcodes in order, [first, last] of each loop, by its backward branch)."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    branches = []
    for line in sass.splitlines():
        label = re.match(r"(\.L_x_\d+):", line.strip())
        if label:
            labels[label[1]] = len(opcodes)
            continue
        found = re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)", line)
        if found:
            jump = re.search(r"(\.L_x_\d+)", found[2])
            if found[1].startswith("BRA") and jump:
                branches.append((jump[1], len(opcodes)))
            opcodes.append(found[1].split(".")[0])
    return opcodes, sorted((labels[to], at) for to, at in branches if labels.get(to, at) < at)


def epilogue_per_logit(sass: str, logits_per_thread: float) -> float:
    """Instructions a logit in the loop over class tiles, the loop along d that it contains left out."""
    opcodes, loops = instructions(sass)
    loops = [(first, last) for first, last in loops if last - first > 16]
    inner = [loop for loop in loops if any(op in ("HGMMA", "HMMA") for op in opcodes[loop[0] : loop[1]])]
    if not inner:
        return float("nan")
    shortest = min(inner, key=lambda loop: loop[1] - loop[0])
    around = [loop for loop in loops if loop[0] <= shortest[0] and loop[1] >= shortest[1] and loop != shortest]
    if not around:
        return float("nan")
    outer = min(around, key=lambda loop: loop[1] - loop[0])
    count = (outer[1] - outer[0]) - (shortest[1] - shortest[0])
    return count / logits_per_thread


def inspect(variant: Variant, target: GPUTarget) -> dict:
    """Compile, measure and judge one variant."""
    found: dict = {"name": variant.name, "target": str(target.arch)}
    try:
        compiled = compile_variant(variant, target)
    except Exception as error:  # the report says which configuration does not compile, and goes on
        return {**found, "failures": [f"does not compile: {type(error).__name__}: {str(error)[:300]}"]}
    found["shared"] = compiled.metadata.shared
    failures = []
    if target.backend == "cuda":
        usage, sass = disassemble(compiled.asm["cubin"])
        counts = collections.Counter(instructions(sass)[0])
        found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        found["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])
        found["spills"] = counts["LDL"] + counts["STL"]
        found["matrix"] = sum(n for op, n in counts.items() if re.fullmatch(MATRIX[target.arch], op))
        if variant.logits_per_program and target.arch == 90:
            found["per_logit"] = epilogue_per_logit(sass, variant.logits_per_program / (32 * variant.warps))
            if not found["per_logit"] <= PER_LOGIT_LIMIT:
                failures.append(f"{found['per_logit']:.1f} instructions per logit, the limit is {PER_LOGIT_LIMIT}")
    else:
        text = compiled.asm["amdgcn"]

        def metadata(key: str) -> int:
            return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

        found["registers"] = metadata("vgpr_count")
        found["spills"] = metadata("vgpr_spill_count")  # a scalar register spills into a vector register, not to memory
        found["matrix"] = len(re.findall(MATRIX[target.arch], text))
    if found["spills"]:
        failures.append(f"{found['spills']} spills")
    if found["shared"] > SHARED_LIMIT[target.arch] * 1024:
        failures.append(f"{found['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[target.arch]} KiB")
    if variant.matrix and not found["matrix"]:
        failures.append(f"no {MATRIX[target.arch]} instruction")
    return {**found, "failures": failures}


def mutant() -> dict:
    """The sm_90 tile on half the threads: twice the accumulators in each, which cannot stay in registers."""
    tile = dataclasses.replace(configs.TABLE["sm_90"]["statistics"][2], warps=4)
    target = TARGETS["sm_90"][0]
    return inspect(statistics_variants("sm_90", target, tile)[0], target)


def main(architecture: str, *wanted: str) -> None:
    if architecture == "mutant":
        print(json.dumps(mutant()))
        return
    jobs = [
        (variant, device)
        for device in TARGETS[architecture]
        for variant in variants(architecture, device)
        if not wanted or variant.name.split()[0] in wanted
    ]
    with concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        for found in pool.map(lambda job: inspect(*job), jobs):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
