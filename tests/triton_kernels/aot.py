"""Ahead-of-time compilation of every shipped configuration, and what its machine code must look like.

Runs as a script in a process without TRITON_INTERPRET (the two cannot share one):

    python tests/triton_kernels/aot.py sm_90 "sm_80=part of a variant's name|another" mutant

prints one JSON object a kernel variant: its gate (what stands before the "="), registers, spills, shared memory, matrix
instructions, instructions per logit, and ``failures``, the limits that it breaks. No GPU is needed: Triton compiles for
a named target.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile

import triton
from aot_variants import Variant, statistics_variants, variants
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from selbp.triton_kernels import configs

TARGETS = {
    "sm_80": [GPUTarget("cuda", 80, 32)],
    "sm_90": [GPUTarget("cuda", 90, 32)],
    "sm_100": [GPUTarget("cuda", 100, 32)],
    "gfx942": [GPUTarget("hip", "gfx942", 64)],
    "conservative": [GPUTarget("cuda", arch, 32) for arch in (86, 89, 120)],
}
# What a block may use: the opt-in limits of the CUDA programming guide (compute capabilities), LDS on CDNA3.
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}  # KiB
# In PTX, where each is one machine instruction (HMMA, HGMMA, UTC..MMA), and in AMD's assembly.
MATRIX = {90: r"wgmma\.mma_async", 100: r"tcgen05\.mma", "gfx942": "v_mfma"}
WARP_MATRIX = r"mma\.sync"  # of the others
PER_LOGIT_LIMIT = {  # of the epilogue on sm_90, exact tiles
    "statistics bf16 plain": 11.5,
    "statistics bf16 softcap": 44.5,
    "statistics bf16 smoothing": 21.5,
    "sketch bf16 plain": 16.5,
}


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
        if signature[name].startswith("*")
        or ((name.startswith("stride_") or name == "d") and not kernel.params[index].do_not_specialize)
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": variant.warps, "num_stages": variant.stages, "enable_fp_fusion": True, **variant.options}
    return triton.compile(source, target=target, options=options)


def tool(name: str, *options: str, cubin: bytes) -> str:
    """What one of the binary tools that Triton ships prints about ``cubin``."""
    path = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


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
    matrix = re.compile(MATRIX.get(target.arch, WARP_MATRIX))
    if target.backend == "cuda":
        usage = tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
        found["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        found["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])
        found["matrix"] = len(matrix.findall(compiled.asm["ptx"]))
        limited = variant.logits_per_program and target.arch == 90
        # A spill needs a stack, so that most variants need not be disassembled, which takes as long as compiling.
        sass = tool("nvdisasm", "-c", cubin=compiled.asm["cubin"]) if limited or found["stack"] else ""
        counts = collections.Counter(instructions(sass)[0])
        found["spills"] = counts["LDL"] + counts["STL"]
        if limited:
            found["per_logit"] = epilogue_per_logit(sass, variant.logits_per_program / (32 * variant.warps))
            limit = PER_LOGIT_LIMIT[variant.name.removesuffix(" exact")]
            if not found["per_logit"] <= limit:
                failures.append(f"{found['per_logit']:.1f} instructions per logit, the limit is {limit}")
    else:
        text = compiled.asm["amdgcn"]

        def metadata(key: str) -> int:
            return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])

        found["registers"] = metadata("vgpr_count")
        found["spills"] = metadata("vgpr_spill_count")  # a scalar register spills into a vector register, not to memory
        found["matrix"] = len(matrix.findall(text))
    if found["spills"]:
        failures.append(f"{found['spills']} spills")
    if found["shared"] > SHARED_LIMIT[target.arch] * 1024:
        failures.append(f"{found['shared']} bytes of shared memory, the limit is {SHARED_LIMIT[target.arch]} KiB")
    if variant.matrix and not found["matrix"]:
        failures.append(f"no {matrix.pattern} instruction")
    return {**found, "failures": failures}


def mutant() -> dict:
    """The sm_90 tile on half the threads: twice the accumulators in each, which cannot stay in registers."""
    tile = dataclasses.replace(configs.TABLE["sm_90"]["statistics"][2], warps=4)
    target = TARGETS["sm_90"][0]
    return inspect(statistics_variants("sm_90", target, tile)[0], target)


def main(*gates: str) -> None:
    jobs = []
    for gate in gates:
        architecture, _, parts = gate.partition("=")
        if architecture == "mutant":
            print(json.dumps({"gate": "mutant", **mutant()}))
        jobs += [
            (architecture, variant, device)
            for device in TARGETS.get(architecture, [])
            for variant in variants(architecture, device)
            if any(part in variant.name for part in parts.split("|"))
        ]
    # Forked processes: half of a compilation is Python. They find the jobs in `inspect_job`, which need not be pickled.
    with multiprocessing.get_context("fork").Pool(len(os.sched_getaffinity(0)), _share, (jobs,)) as pool:
        for found in pool.imap(inspect_job, range(len(jobs)), chunksize=2):
            print(json.dumps(found), flush=True)


def _share(jobs: list[tuple[str, Variant, GPUTarget]]) -> None:
    inspect_job.jobs = jobs


def inspect_job(index: int) -> dict:
    """:func:`inspect` of a job that the parent process has listed."""
    architecture, *job = inspect_job.jobs[index]
    return {"gate": architecture, **inspect(*job)}


if __name__ == "__main__":
    main(*sys.argv[1:])
