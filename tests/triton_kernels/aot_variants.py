"""Every kernel variant that ships: its argument types, constants and launch options, for the ahead-of-time gates."""

from __future__ import annotations

import dataclasses

from triton.backends.compiler import GPUTarget

from selbp.triton_kernels import (
    combine,
    configs,
    gram,
    linear_cross_entropy,
    mean,
    minibatch,
    residual,
    skipped,
    statistics,
    stored_rows,
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
    options: dict[str, int] = dataclasses.field(default_factory=dict)  # further ones of the launch


def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _floats(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "*fp32")


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
            key = "statistics" if name == "plain" else f"statistics_{name}"
            ragged = key if name == "everything" else f"{key}_ragged"
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


def shares_variants(arch: str, target: GPUTarget) -> list[Variant]:
    """Statistics that write the sums of each tile too, for skip_mass."""
    found = []
    for itemsize, element in NAMES.items():
        for name in ("plain", "softcap"):
            options = VARIANTS[name] | {"PER_TILE": True}
            key = "statistics" if name == "plain" else f"statistics_{name}"
            ragged = "shares_ragged" if name == "plain" else f"{key}_ragged"
            shapes = configs.TABLE[arch][key][itemsize], configs.TABLE[arch][ragged][itemsize]
            found += [
                _statistics(name, options, shape, exact, element, itemsize, target)
                for shape, exact in zip(shapes, (True, False), strict=True)
            ]
            if shapes[1].descriptor:
                found.append(_statistics(name, options, shapes[1].with_pointers(), False, element, itemsize, target))
    return found


def _statistics(name, options, shape, exact, element, itemsize, target, width=0) -> Variant:
    constants = {
        **{"ROWS": shape.rows, "COLUMNS": shape.columns, "DEPTH": shape.depth, "WIDTH": width, "GROUP": shape.group},
        "QUARTERS": shape.quarters,
        **{"DESCRIPTOR": shape.descriptor, "EVEN_COLUMNS": exact, "EVEN_DEPTH": exact, "HAS_BIAS": not exact},
        "PER_TILE": False,
        "PRECISION": _precision(itemsize, target),
        **options,
    }
    types = {
        "features": _matrix_operand(shape, shape.rows, shape.depth, element),
        "weight": _matrix_operand(shape, shape.columns, shape.depth, element),
        **_pointer("bias", not exact, element),
        **_pointer("class_weight", options["HAS_WEIGHT"], "fp32"),
        **_pointer("projection", width > 0, element),
        **_pointer("sums", width > 0 or "PER_TILE" in options, "fp32"),
        "target": "*i64",
        "partials": "*fp32",
        "softcap": "fp32",
        **_integers("n", "n_classes", "d", "p", "stride_h", "stride_w", "stride_p", "tiles_per_split"),
    }
    limited = (name == "plain" or shape.quarters) and exact and itemsize == 2 and "PER_TILE" not in options
    kind = "sketch" if width else "shares" if "PER_TILE" in options else "statistics"
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


def _tile(shape: configs.Tile, options: dict[str, bool]) -> dict[str, object]:
    return {"ROWS": shape.rows, "COLUMNS": shape.columns, **options}


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
        kernel = target_logit.target_logit_kernel
        for kind, own in (("linear", ("weight", "bias")), ("stored", ("logits",))):
            flags = {"HAS_LOGITS": kind == "stored", "HAS_BIAS": kind == "linear"}
            given = dict.fromkeys(own, f"*{element}")
            found.append(Variant(f"target_logit {element} {kind}", kernel, types | given, constants | flags, 4))
        rows = configs.TABLE[arch]["residual"][itemsize]
        for name, options in VARIANTS.items():
            stored = configs.TABLE[arch]["logits_smoothing" if options["SMOOTH"] else "logits"][itemsize]
            types = {
                "logits": f"*{element}",
                "target": "*i64",
                **_floats("partials", "lse", "out", "sums", "target_logit", "feature_sq"),
                **_floats("loss_out", "lse_out", "residual_sq_out", "p_rest_out"),
                **dict.fromkeys(("correct_out", "valid_out"), "*u8"),
                **dict.fromkeys(("softcap", "label_smoothing"), "fp32"),
                **_pointer("class_weight", options["HAS_WEIGHT"], "fp32"),
                **_pointer("weight_sum", options["HAS_WEIGHT"] and options["SMOOTH"], "fp32"),
                **_integers("n", "n_splits", "n_classes", "stride_z", "stride_out", "tiles_per_split", "ignore_index"),
            }
            label = f"{element} {name}"
            if name != "weight":
                kernel, tile = statistics.logits_statistics_kernel, _tile(stored, options)
                found.append(Variant(f"logits_statistics {label}", kernel, types, tile, stored.warps, stored.stages))
            tile = _tile(rows, options)
            found.append(Variant(f"residual {label}", residual.residual_kernel, types, tile, rows.warps, rows.stages))
            tile = {"ROWS": residual.ROWS, "COLUMNS": residual.COLUMNS, **options}
            found.append(Variant(f"residual_target {label}", residual.residual_target_kernel, types, tile, 4))
            if itemsize == 4:
                found.append(
                    Variant(f"finalize {name}", combine.finalize_kernel, types, {"ROWS": combine.ROWS, **options}, 4)
                )
    return found


def stored_variants(target: GPUTarget) -> list[Variant]:
    """Few classes and the most, with and without residuals; and a minibatch's unit."""
    found = []
    for element in NAMES.values():
        for name, options in VARIANTS.items():
            for classes, factors in ((10, True), (2048, True), (4096, True), (4096, False)):
                if name != "everything" and (name, classes, factors) != ("plain", 4096, True):
                    continue  # fewer values of each entry
                rows, columns, warps = stored_rows.row_tile(classes)
                outputs = ["loss", "lse", "residual_sq", "feature_sq"]
                outputs += ["mass", "residual", "features"] if factors else []
                types = {
                    **dict.fromkeys(("logits", "features"), f"*{element}"),
                    "target": "*i64",
                    **_pointer("class_weight", options["HAS_WEIGHT"], "fp32"),
                    **_floats(*(f"{output}_out" for output in outputs)),
                    **dict.fromkeys(("correct_out", "valid_out"), "*u8"),
                    **dict.fromkeys(("label_smoothing", "softcap", "plus"), "fp32"),
                    **_integers("n", "n_classes", "d", "stride_z", "stride_h", "ignore_index"),
                }
                tile = {"ROWS": rows, "COLUMNS": columns, "DEPTH": max(128, 2048 // rows)}
                constants = tile | {"HAS_FEATURES": True, "MASS": factors, "FACTORS": factors, **options}
                label = f"stored_rows {element} {name} {columns} columns{' factors' if factors else ''}"
                limit = stored_rows.register_limit(columns, warps) if target.backend == "cuda" else {}
                found.append(Variant(label, stored_rows.stored_rows_kernel, types, constants, warps, options=limit))
    for columns in (0, stored_rows.UNIT_COLUMNS):
        types = {
            **_floats("mass", "loss", "residual_sq", "scaled_out", "residual_sq_out", "scale_out"),
            **_pointer("residual", columns > 0, "fp32"),
            **dict.fromkeys(("valid", "correct"), "*u8"),
            "hits_out": "*i64",
            **_integers("n", "n_classes"),
        }
        constants = {"ROWS": stored_rows.UNIT_ROWS, "COLUMNS": columns, "BLOCK": stored_rows.UNIT_BLOCK}
        label = f"in_units{' residual' if columns else ''}"
        found.append(Variant(label, stored_rows.in_units_kernel, types, constants, 4))
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


def skipped_variants(arch: str, target: GPUTarget) -> list[Variant]:
    """Residuals and weight's gradient of gathered rows, for the backward with skip_mass."""
    found = []
    for itemsize, element in NAMES.items():
        shape = configs.TABLE[arch]["chunk"][itemsize].with_pointers()
        common = {"DEPTH": shape.depth, "TILE": skipped.TILE, "PRECISION": _precision(itemsize, target)}
        types = {
            **dict.fromkeys(("features", "weight", "residuals", "out"), f"*{element}"),
            "target": "*i64",
            **_floats("lse", "p_rest", "scale", "mass", "rest", "left_out"),
            **dict.fromkeys(("lists", "counts"), "*i32"),
            "softcap": "fp32",
            **_integers("k", "n_columns", "first_class", "d", "stride_h", "stride_w", "stride_r", "stride_out"),
        }
        for capped in (False, True):
            for exact in (True, False):
                constants = {
                    **{"ROWS": shape.rows, "COLUMNS": shape.columns // (2 if capped else 1), "EVEN_DEPTH": exact},
                    **{"HAS_BIAS": not exact, "SOFTCAP": capped},
                }
                given = types | _pointer("bias", not exact, element)
                name = f"{'softcap' if capped else 'plain'} {'exact' if exact else 'ragged'}"
                kernel = skipped.gathered_residual_kernel
                label = f"gathered_residual {element} {name}"
                found.append(Variant(label, kernel, given, constants | common, shape.warps, shape.stages, True))
        constants = {"CLASSES": shape.columns, "WIDTH": shape.rows}
        label = f"gathered_weight {element} plain exact"
        kernel = skipped.gathered_weight_kernel
        found.append(Variant(label, kernel, types, constants | common, shape.warps, shape.stages, True))
    return found


def gram_variants(arch: str, target: GPUTarget) -> list[Variant]:
    found = []
    for table in ("gram", "gram_small"):
        for size_r, size_h in ((2, 2), (4, 4), (4, 2)):
            tile = configs.TABLE[arch][table][max(size_r, size_h)]
            shapes = [tile] if not tile.descriptor else [tile, tile.with_pointers()]
            for shape in shapes:
                depth_r, depth_h = (shape.depth * max(size_r, size_h) // size for size in (size_r, size_h))
                exact = shape.descriptor
                # A factor of the epilogue alone.
                for flags in ("find", "clear", "none") if size_r == size_h == 4 else ("find",):
                    constants = {
                        "FLAGS": flags,
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
                        **_pointer("flags", flags != "none", "u8"),
                        "plus": "fp32",
                        **_integers("n", "n_classes", "d", "stride_r", "stride_h", "stride_k"),
                    }
                    label = f"{table} {NAMES[size_r]} {NAMES[size_h]} {'exact' if exact else 'ragged'} {flags}"
                    label += "" if shape.descriptor else " pointers"
                    kernel, warps, stages = gram.gram_kernel, shape.warps, shape.stages
                    found.append(Variant(label, kernel, types, constants, warps, stages, True))
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


def mean_variants(target: GPUTarget) -> list[Variant]:
    """The mean gradient of float32 and of mixed factors, and the flags of rows."""
    found = []
    for size_r, size_h in ((4, 4), (4, 2)):
        types = {
            "residual": f"*{NAMES[size_r]}",
            "features": f"*{NAMES[size_h]}",
            "finite": "*u8",
            "squares": "*fp64",
            **_floats("mean", "mean_bias", "inner", "target_sq"),
            **_integers("n", "n_classes", "d", "n_tiles", "stride_r", "stride_h"),
        }
        tile = {"ROWS": mean.ROWS, "CLASSES": mean.CLASSES, "WIDTH": mean.WIDTH}
        constants = tile | {"BIAS": True, "MASKED": True, "PRECISION": _precision(4, target)}
        label = f"{NAMES[size_r]} {NAMES[size_h]}"
        found.append(Variant(f"mean {label}", mean.mean_kernel, types, constants, mean.MEAN_WARPS))
        found.append(Variant(f"inner {label}", mean.inner_kernel, types, constants, mean.INNER_WARPS))
        flags = {"ROWS": mean.FLAG_ROWS, "DEPTH": mean.FLAG_DEPTH}
        found.append(Variant(f"finite_rows {label}", mean.finite_rows_kernel, types, flags, 4))
    return found


def minibatch_variants() -> list[Variant]:
    """The vectors of a minibatch."""
    types = {
        "target": "*i64",
        **dict.fromkeys(("finite", "valid_out", "never_out"), "*u8"),
        **_floats("class_weight", "mass_out", "unknown_out", "scale_out"),
        **_integers("n", "n_classes", "ignore_index"),
    }
    block = {"BLOCK": minibatch.BLOCK}
    found = [Variant("unscored", minibatch.unscored_kernel, types, {**block, "HAS_WEIGHT": True}, 4)]
    for element in NAMES.values():
        types = {
            "logits": f"*{element}",
            **dict.fromkeys(("target", "hits_out"), "*i64"),
            "live": "*u8",
            **_integers("n", "n_classes", "stride", "ignore_index"),
        }
        for columns in (16, 1024):
            constants = {"ROWS": minibatch.LOOKED_AT // columns, "COLUMNS": columns}
            found.append(Variant(f"hits {element} {columns}", minibatch.hits_kernel, types, constants, 8))
    types = {**_floats("losses", "scale", "weights", "loss_out", "scaled_out"), **_integers("k")}
    return [*found, Variant("weighted_sum", minibatch.weighted_sum_kernel, types, block, 4)]


def variants(arch: str, target: GPUTarget) -> list[Variant]:
    """Every kernel variant that ships for an architecture."""
    return [
        *statistics_variants(arch, target),
        *row_variants(arch),
        *stored_variants(target),
        *gram_variants(arch, target),
        *mean_variants(target),
        *minibatch_variants(),
        *chunk_variants(arch, target),
        *shares_variants(arch, target),
        *skipped_variants(arch, target),
        *sketch_variants(arch, target),
    ]
