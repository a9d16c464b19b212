"""Every kernel variant that ships: its argument types, constants and launch options, for the ahead-of-time gates."""

from __future__ import annotations

import dataclasses

from triton.backends.compiler import GPUTarget

from selbp.triton_kernels import (
    combine,
    configs,
    gram,
    linear_cross_entropy,
    residual,
    statistics,
    target_logit,
)

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
                shape = shape.with_pointers()
                found.append(_statistics(name, options, shape, False, element, itemsize, target))
    return found


def sketch_variants(arch: str, target: GPUTarget) -> list[Variant]:
    """The same with sums of a projection, for the sketch of sequences."""
    found = []
    for itemsize, element in NAMES.items():
        for name, options in VARIANTS.items():
            if name == "weight":
                continue
            key = {"plain": "sketch", "softcap": "sketch_softcap"}.get(name, "sketch_smoothing")
            shape = configs.TABLE[arch][key][itemsize]
            found.append(_statistics(name, options, shape, True, element, itemsize, target, statistics.WIDTH))
            found.append(_statistics(name, options, shape, False, element, itemsize, target, statistics.WIDTH))
            if shape.descriptor:
                shape = shape.with_pointers()
                found.append(_statistics(name, options, shape, False, element, itemsize, target, statistics.WIDTH))
    return found


def _statistics(name, options, shape, exact, element, itemsize, target, width=0) -> Variant:
    constants = {
        "ROWS": shape.rows, "COLUMNS": shape.columns, "DEPTH": shape.depth, "WIDTH": width, "GROUP": shape.group,
        "DESCRIPTOR": shape.descriptor, "EVEN_COLUMNS": exact, "EVEN_DEPTH": exact, "HAS_BIAS": not exact,
        "PRECISION": _precision(itemsize, target), **options,
    }  # fmt: skip
    types = {
        "features": _matrix_operand(shape, shape.rows, shape.depth, element),
        "weight": _matrix_operand(shape, shape.columns, shape.depth, element),
        **_pointer("bias", not exact, element),
        **_pointer("class_weight", options["HAS_WEIGHT"], "fp32"),
        **_pointer("projection", width > 0, element),
        **_pointer("sums", width > 0, "fp32"),
        "target": "*i64",
        "partials": "*fp32",
        "softcap": "fp32",
        **_integers("n", "n_classes", "d", "p", "stride_h", "stride_w", "stride_p", "tiles_per_split"),
    }
    limited = name == "plain" and exact and itemsize == 2
    kind = "sketch" if width else "statistics"
    label = f"{kind} {element} {name} {'exact' if exact else 'ragged'}{'' if shape.descriptor else ' pointers'}"
    return Variant(
        label,
        statistics.statistics_kernel,
        types,
        constants,
        shape.warps,
        shape.stages,
        True,
        shape.rows * shape.columns if limited else 0,
    )


def row_variants(arch: str) -> list[Variant]:
    """The kernels without a product: target_logit, statistics of stored logits, finalize, residual."""
    found = []
    for itemsize, element in NAMES.items():
        constants = {"ROWS": target_logit.ROWS, "DEPTH": target_logit.DEPTH, "HAS_FEATURES": True}
        types = {
            "features": f"*{element}",
            "target": "*i64",
            "target_logit": "*fp32",
            "feature_sq": "*fp32",
            "plus": "fp32",
            **_integers("n", "d", "n_classes", "stride_h", "stride_w", "stride_z"),
        }
        linear = {"weight": f"*{element}", "bias": f"*{element}"}
        found.append(Variant(f"target_logit {element} linear", target_logit.target_logit_kernel, {**types, **linear},
                             {**constants, "HAS_LOGITS": False, "HAS_BIAS": True}, 4))  # fmt: skip
        found.append(
            Variant(
                f"target_logit {element} stored",
                target_logit.target_logit_kernel,
                {**types, "logits": f"*{element}"},
                {**constants, "HAS_LOGITS": True, "HAS_BIAS": False},
                4,
            )
        )
        rows = configs.TABLE[arch]["residual"][itemsize]
        for name, options in VARIANTS.items():
            stored = configs.TABLE[arch]["logits_smoothing" if options["SMOOTH"] else "logits"][itemsize]
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
                found.append(
                    Variant(f"finalize {name}", combine.finalize_kernel, types, {"ROWS": combine.ROWS, **options}, 4)
                )
    return found


def chunk_variants(arch: str, target: GPUTarget) -> list[Variant]:
    """Residuals of a chunk of classes, for the backward of linear_cross_entropy."""
    found = []
    for itemsize, element in NAMES.items():
        shape = configs.TABLE[arch]["chunk"][itemsize]
        for name in ("plain", "everything"):
            options = VARIANTS[name]
            plain = shape.with_pointers()
            for tile, exact in ((shape, True), (plain, False)):
                constants = {
                    "ROWS": tile.rows,
                    "COLUMNS": tile.columns,
                    "DEPTH": tile.depth,
                    "GROUP": tile.group,
                    "DESCRIPTOR": tile.descriptor,
                    "EVEN_DEPTH": exact,
                    "HAS_BIAS": not exact,
                    "PRECISION": _precision(itemsize, target),
                    **options,
                }
                types = {
                    "features": _matrix_operand(tile, tile.rows, tile.depth, element),
                    "weight": _matrix_operand(tile, tile.columns, tile.depth, element),
                    "target": "*i64",
                    **_pointer("bias", not exact, element),
                    **_pointer("class_weight", options["HAS_WEIGHT"], "fp32"),
                    **dict.fromkeys(("lse", "p_rest", "scale", "mass", "rest"), "*fp32"),
                    "out": f"*{element}",
                    "share": "fp32",
                    "softcap": "fp32",
                    **_integers("k", "n_columns", "first_class", "d", "stride_h", "stride_w", "stride_out"),
                }
                label = f"chunk {element} {name} {'exact' if exact else 'ragged pointers'}"
                kernel = linear_cross_entropy.residual_chunk_kernel
                found.append(Variant(label, kernel, types, constants, tile.warps, tile.stages, True))
    return found


def gram_variants(arch: str, target: GPUTarget) -> list[Variant]:
    found = []
    for table in ("gram", "gram_small"):
        for size_r, size_h in ((2, 2), (4, 4), (4, 2)):
            tile = configs.TABLE[arch][table][max(size_r, size_h)]
            shapes = [tile] if not tile.descriptor else [tile, tile.with_pointers()]
            for shape in shapes:
                depth_r, depth_h = (shape.depth * max(size_r, size_h) // size for size in (size_r, size_h))
                for exact in (True,) if shape.descriptor else (False,):
                    constants = {
                        "ROWS": shape.rows,
                        "DEPTH_R": depth_r,
                        "DEPTH_H": depth_h,
                        "DESCRIPTOR": shape.descriptor,
                        "EVEN_R": exact,
                        "EVEN_H": exact,
                        "PRECISION_R": _precision(size_r, target),
                        "PRECISION_H": _precision(size_h, target),
                    }
                    types = {
                        "residual": _matrix_operand(shape, shape.rows, depth_r, NAMES[size_r]),
                        "features": _matrix_operand(shape, shape.rows, depth_h, NAMES[size_h]),
                        "gram": "*fp32",
                        "broken": "*u8",
                        "plus": "fp32",
                        **_integers("n", "n_classes", "d", "stride_r", "stride_h", "stride_k"),
                    }
                    label = f"{table} {NAMES[size_r]} {NAMES[size_h]} {'exact' if exact else 'ragged'}"
                    found.append(Variant(label + ("" if shape.descriptor else " pointers"), gram.gram_kernel, types,
                                         constants, shape.warps, shape.stages, True))  # fmt: skip
    types = {
        "residual": "*fp32",
        "features": "*fp32",
        "gram": "*fp32",
        "broken": "*u8",
        **_integers("n", "n_classes", "d", "stride_r", "stride_h", "stride_k"),
    }
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
