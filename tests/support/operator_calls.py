"""Right and wrong calls of every operator. The arguments stand in the order of the schema.

A wrong call is what changes in the right one, and the words of the error.
"""

import warnings

import torch

from selbp import ops
from selbp.types import Selection

NAN, INF, HUGE = float("nan"), float("inf"), 1 << 40
N, C, D = 4, 3, 5


def f(*shape, dtype=torch.float32, device="cpu"):
    return torch.full(shape, 0.5, dtype=dtype, device=device)


def i(*shape, dtype=torch.int64, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def meta(x):
    return x.to("meta")


SPARSE = f(N, C).to_sparse()
with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # torch calls this layout a beta
    SPARSE_ROWS = SPARSE.to_sparse_csr()
HALF = torch.float16

# Arguments that are right, in the order of the schema.
LOSS = {"class_weight": None, "ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0}
RIGHT = {
    "cross_entropy_statistics": {"logits": f(N, C), "target": i(N), "features": f(N, D), **LOSS, "bias": True},
    "linear_cross_entropy_statistics": {"features": f(N, D), "weight": f(C, D), "bias": f(C), "target": i(N), **LOSS},
    "linear_cross_entropy": {
        "features": f(N, D), "weight": f(C, D), "bias": f(C), "target": i(N), "class_weight": None, "rows": i(2),
        "ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0, "keep_logits": False, "skip_mass": 0.0,
    },
    "linear_cross_entropy_backward": {
        "grad": f(N), "features": f(N, D), "weight": f(C, D), "bias": f(C), "target": i(N), "lse": f(N),
        "others": f(N), "valid": f(N) > 0, "logits": f(N, C), "left_out": f(N, 1).abs(), "class_weight": None,
        "rows": i(2), "ignore_index": -100, "label_smoothing": 0.0, "softcap": 0.0, "need_features": True,
        "need_weight": True, "need_bias": True,
    },
    "residual": {"logits": f(N, C), "target": i(N), "lse": f(N), **LOSS},
    "gradient_gram": {"residual": f(N, C), "features": f(N, D), "bias": True},
    "mean_gradient": {"residual": f(N, C), "features": f(N, D), "bias": True},
    "match_gradients": {
        "residual": f(N, C), "features": f(N, D), "valid": f(N) > 0, "bias": True, "k": 2, "rule": "ols", "ridge": 0.1,
        "nonnegative": True, "finite": False,
    },
    "match_small": {
        "residual": f(N, C), "features": f(N, D), "valid": f(N) > 0, "bias": True, "k": 2, "rule": "ols", "ridge": 0.1,
        "nonnegative": True,
    },
    "score_minibatch": {
        "logits": f(N, C), "target": i(N), "features": f(N, D), **LOSS, "bias": True, "factors": "both",
    },
    "finite_rows": {"x": f(N, D)},
    "unscored": {
        "target": i(N), "finite": f(N) > 0, "class_weight": f(C), "ignore_index": -100, "double": False,
    },
    "count_hits": {"logits": f(N, C), "target": i(N), "live": f(N) > 0, "ignore_index": -100},
    "weighted_loss": {"losses": f(N), "scale": f(), "weights": f(N)},
    "matching_residual": {
        "residual": f(N, C), "features": f(N, D), "indices": i(2), "weights": f(2), "bias": True
    },
    "match": {
        "gram": f(N, N), "inner": f(N), "target_sq": f(), "k": 2, "rule": "ols", "ridge": 0.1, "nonnegative": True,
        "valid": f(N) > 0, "tolerance": 0.0,
    },
    "sketch": {
        "features": f(2, 3, D), "weight": f(C, D), "bias": f(C), "target": i(2, 3), "left": f(C, 2),
        "right": f(D + 1, 2), **LOSS,
    },
    "cube_sample": {
        "balance": f(N, 2, dtype=torch.float64), "probability": f(N, dtype=torch.float64), "order": torch.arange(N),
        "draws": f(N, dtype=torch.float64),
    },
    "choose_rows": {
        "score": f(N, dtype=torch.float64), "valid": f(N) > 0, "draws": f(N + 1, dtype=torch.float64), "k": 2,
        "rule": "odds", "weights": "mean", "single": False,
    },
    "choose_by_norm": {
        "residual_sq": f(N).square(), "feature_sq": f(N).square(), "valid": f(N) > 0,
        "draws": f(N + 1, dtype=torch.float64), "tau": f(dtype=torch.float64), "k": 2, "weights": "mean",
        "momentum": 0.9, "threshold": None, "single": True,
    },
    "choose_by_percentile": {
        "loss": f(N), "valid": f(N) > 0, "history": f(6, dtype=torch.float64),
        "draws": f(N + 1, dtype=torch.float64), "k": 2, "weights": "mean", "power": 3.0, "least": 0.0, "single": True,
    },
    "choose_balanced": {
        "gram": f(N, N), "valid": f(N) > 0, "mixture": f(N, 1, dtype=torch.float64),
        "draws": f(2, N, dtype=torch.float64), "k": 2, "by_norm": True, "single": True,
    },
    "choose_diverse": {
        "gram": f(N, N), "inner": f(N), "target_sq": f(), "valid": f(N) > 0, "draws": f(2, N, dtype=torch.float64),
        "k": 2, "weights": "mean", "single": True,
    },
    "percentile": {"history": f(6, dtype=torch.float64), "loss": f(N, dtype=torch.float64)},
}  # fmt: skip

LOSS_WRONG = [
    ({"target": i(N, dtype=torch.int32)}, "target must be int64, got int32"),
    ({"target": f(N)}, "target must be int64, got float32"),
    ({"target": i(N + 1)}, r"target must be \(n,\) with n = 4 as \w+, got \(5,\)"),
    ({"target": i(N, 1)}, r"target must be \(n,\) with n = 4 as \w+, got \(4, 1\)"),
    ({"target": meta(i(N))}, "target must be on the device of .*, got "),
    ({"class_weight": f(C + 1)}, r"class_weight must be \(C,\) with C = 3 classes, got \(4,\)"),
    ({"class_weight": f(C, 1)}, r"class_weight must be \(C,\) with C = 3 classes, got \(3, 1\)"),
    ({"class_weight": i(C)}, "class_weight must be float32, float64, bfloat16 or float16, got int64"),
    ({"class_weight": meta(f(C))}, "class_weight must be on the device of "),
    ({"label_smoothing": 1.5}, r"label_smoothing must be in \[0, 1\], got 1.5"),
    ({"label_smoothing": NAN}, r"label_smoothing must be in \[0, 1\], got nan"),
    ({"softcap": -1.0}, "softcap must be at least 0 and finite, got -1"),
    ({"softcap": INF}, "softcap must be at least 0 and finite, got inf"),
]
VALUES = [  # of the targets: only where there are values to see
    ({"target": torch.tensor([0, C, 0, 0])}, r"target must lie in \[0, 3\) or be ignore_index = -100, got 3 in row 1"),
    (
        {"target": torch.tensor([0, 0, -7, 0])},
        r"target must lie in \[0, 3\) or be ignore_index = -100, got -7 in row 2",
    ),
    ({"target": torch.tensor([0, 0, 0, HUGE])}, r"target must lie in \[0, 3\) .* got 1099511627776 in row 3"),
]
HEAD_WRONG = [
    ({"features": f(N, D, 1)}, r"features must be \(n, d\), got \(4, 5, 1\)"),
    ({"features": i(N, D)}, "features must be float32, float64, bfloat16 or float16, got int64"),
    ({"features": f(N, D + 1)}, r"weight must be \(C, d\) with d = 6 as features, got \(3, 5\)"),
    ({"features": f(N, D, dtype=HALF)}, "weight must have the dtype of features, float16, got float32"),
    ({"weight": f(C, D, dtype=torch.bfloat16)}, "weight must have the dtype of features, float32, got bfloat16"),
    ({"weight": f(C)}, r"weight must be \(C, d\) with d = 5 as features, got \(3,\)"),
    ({"weight": f(0, D), "bias": None}, "logits must have at least one class, got C = 0"),
    ({"weight": meta(f(C, D))}, "weight must be on the device of features, cpu, got meta"),
    ({"bias": f(C + 1)}, r"bias must be \(C,\) with C = 3 rows as weight, got \(4,\)"),
    ({"bias": f(C, dtype=HALF)}, "bias must have the dtype of features, float32, got float16"),
    ({"bias": f(1, C)}, r"bias must be \(C,\) with C = 3 rows as weight, got \(1, 3\)"),
    ({"bias": meta(f(C))}, "bias must be on the device of features, cpu, got meta"),
]
LOGITS_WRONG = [
    ({"logits": f(N)}, r"logits must be \(n, C\), got \(4,\)"),
    ({"logits": f(N, C, 1)}, r"logits must be \(n, C\), got \(4, 3, 1\)"),
    ({"logits": f(N, 0)}, "logits must have at least one class, got C = 0"),
    ({"logits": i(N, C)}, "logits must be float32, float64, bfloat16 or float16, got int64"),
    ({"logits": f(N, C, dtype=torch.complex64)}, "logits must be float32, .*got complex64"),
    ({"logits": f(N + 1, C)}, r"target must be \(n,\) with n = 5 as logits, got \(4,\)"),
    ({"logits": SPARSE}, "logits must be a dense tensor, got a sparse_coo one"),
    ({"logits": SPARSE_ROWS}, "logits must be a dense tensor, got a sparse_csr one"),
]
FACTORS_WRONG = [
    ({"residual": f(N)}, r"residual must be \(n, C\), got \(4,\)"),
    ({"residual": i(N, C)}, "residual must be float32, float64, bfloat16 or float16, got int64"),
    ({"residual": f(N + 1, C)}, r"features must be \(n, d\) with n = 5 rows as residual, got \(4, 5\)"),
    ({"residual": f(N, C, dtype=torch.float64)}, "features must have the dtype of residual, float64, got float32"),
    ({"residual": SPARSE}, "residual must be a dense tensor, got a sparse_coo one"),
    ({"features": f(N, D, 1)}, r"features must be \(n, d\) with n = 4 rows as residual, got \(4, 5, 1\)"),
    ({"features": f(N, D, dtype=torch.bool)}, "features must be float32, .*got bool"),
    ({"features": meta(f(N, D))}, "features must be on the device of residual, cpu, got meta"),
]
ROWS_WRONG = [
    ({"rows": i(2, dtype=torch.int32)}, "rows must be int64, got int32"),
    ({"rows": i(2, 1)}, r"rows must be \(k,\), got \(2, 1\)"),
    ({"rows": meta(i(2))}, "rows must be on the device of features, cpu, got meta"),
]
ROW_VALUES = [
    ({"rows": torch.tensor([0, N])}, r"rows must lie in \[0, 4\), got values from 0 to 4"),
    ({"rows": torch.tensor([-1, 2])}, r"rows must lie in \[0, 4\), got values from -1 to 2"),
]
VECTORS = ("grad", "lse", "others", "valid")

MATCH_WRONG = [
    *FACTORS_WRONG,
    ({"valid": f(N)}, "valid must be bool, got float32"),
    ({"valid": f(N + 1) > 0}, r"valid must be \(n,\) with n = 4 rows as residual, got \(5,\)"),
    ({"valid": meta(f(N) > 0)}, "valid must be on the device of residual, cpu, got meta"),
    ({"k": -1}, "k must be at least 0, got -1"),
    ({"rule": "best"}, "rule must be one of 'ols', 'normalized', 'raw', got 'best'"),
    ({"ridge": -0.1}, "ridge must be at least 0 and finite, got -0.1"),
]

WRONG = {
    "cross_entropy_statistics": [
        *LOGITS_WRONG, *LOSS_WRONG,
        ({"features": f(N + 1, D)}, r"features must be \(n, d\) with n = 4 as logits, got \(5, 5\)"),
        ({"features": f(N)}, r"features must be \(n, d\) with n = 4 as logits, got \(4,\)"),
        ({"features": i(N, D)}, "features must be float32, .*got int64"),
        ({"features": meta(f(N, D))}, "features must be on the device of logits, cpu, got meta"),
    ],
    "linear_cross_entropy_statistics": [*HEAD_WRONG, *LOSS_WRONG],
    "linear_cross_entropy": [
        *HEAD_WRONG, *LOSS_WRONG, *ROWS_WRONG,
        *(({"skip_mass": x}, rf"skip_mass must be in \[0, 1\], got {x}") for x in (1.5, -0.1, NAN)),
    ],
    "linear_cross_entropy_backward": [
        *HEAD_WRONG[4:8], *LOSS_WRONG[:3], *ROWS_WRONG,
        *(({name: f(N + 1) > 0 if name == "valid" else f(N + 1)}, rf"{name} must be \(n,\) with n = 4 as features, "
           r"got \(5,\)") for name in VECTORS),
        *(({name: meta(RIGHT["linear_cross_entropy_backward"][name])}, f"{name} must be on the device of "
           "features, cpu, "
           "got meta") for name in VECTORS),
        ({"grad": i(N)}, "grad must be float32, .*got int64"),
        ({"lse": f(N, dtype=HALF)}, "lse must be float32, got float16"),
        ({"others": f(N, dtype=torch.float64)}, "others must be float32, got float64"),
        ({"valid": f(N)}, "valid must be bool, got float32"),
        ({"logits": f(N, C + 1)}, r"logits must be \(n, C\) = \(4, 3\), or empty, got \(4, 4\)"),
        ({"logits": f(N, C, dtype=HALF)}, "logits must have the dtype of features, float32, got float16"),
        ({"logits": meta(f(N, C))}, "logits must be on the device of features, cpu, got meta"),
        ({"left_out": f(N, 2)}, r"left_out must be \(n, tiles\) = \(4, 1\), or empty, got \(4, 2\)"),
        ({"left_out": f(N, 1, dtype=HALF)}, "left_out must be float32, got float16"),
        ({"left_out": meta(f(N, 1))}, "left_out must be on the device of features, cpu, got meta"),
    ],
    "residual": [
        *LOGITS_WRONG, *LOSS_WRONG,
        ({"lse": f(N + 1)}, r"lse must be \(n,\) with n = 4 as logits, got \(5,\)"),
        ({"lse": f()}, r"lse must be \(n,\) with n = 4 as logits, got \(\)"),
        ({"lse": i(N)}, "lse must be float32, .*got int64"),
        ({"lse": meta(f(N))}, "lse must be on the device of logits, cpu, got meta"),
    ],
    "gradient_gram": FACTORS_WRONG,
    "mean_gradient": FACTORS_WRONG,
    "match_gradients": MATCH_WRONG,
    "match_small": MATCH_WRONG,
    "matching_residual": [
        *FACTORS_WRONG,
        ({"indices": i(2, dtype=torch.int32)}, r"selection.indices must be int64, got int32"),
        ({"indices": i(2, 1)}, r"selection.indices must be \(k,\), got \(2, 1\)"),
        ({"indices": meta(i(2))}, "selection.indices must be on the device of residual, cpu, got meta"),
        ({"weights": f(3)}, r"selection.weights must be \(k,\) with k = 2 as selection.indices, got \(3,\)"),
        ({"weights": i(2)}, "selection.weights must be float32, .*got int64"),
        ({"weights": meta(f(2))}, "selection.weights must be on the device of residual, cpu, got meta"),
    ],
    "match": [
        ({"gram": f(N)}, r"gram must be \(..., n, n\), got \(4,\)"),
        ({"gram": f(N, N + 1)}, r"gram must be \(..., n, n\), got \(4, 5\)"),
        ({"gram": i(N, N)}, "gram must be float32, .*got int64"),
        ({"gram": f(2, N, N)}, r"inner must be \(..., n\) = \(2, 4\), got \(4,\)"),
        ({"inner": f(N + 1)}, r"inner must be \(..., n\) = \(4,\), got \(5,\)"),
        ({"inner": f(N, dtype=HALF)}, "inner must have the dtype of gram, float32, got float16"),
        ({"inner": meta(f(N))}, "inner must be on the device of gram, cpu, got meta"),
        ({"target_sq": f(1)}, r"target_sq must be \(...\) = \(\), got \(1,\)"),
        ({"target_sq": i()}, "target_sq must be float32, .*got int64"),
        ({"target_sq": meta(f())}, "target_sq must be on the device of gram, cpu, got meta"),
        ({"k": -1}, "k must be at least 0, got -1"),
        ({"k": HUGE}, "k must be at most 2147483647, got 1099511627776"),
        ({"rule": "best"}, "rule must be one of 'ols', 'normalized', 'raw', got 'best'"),
        ({"ridge": -0.1}, "ridge must be at least 0 and finite, got -0.1"),
        ({"ridge": NAN}, "ridge must be at least 0 and finite, got nan"),
        ({"ridge": INF}, "ridge must be at least 0 and finite, got inf"),
        ({"tolerance": -1.0}, "tolerance must be at least 0 and finite, got -1"),
        ({"tolerance": NAN}, "tolerance must be at least 0 and finite, got nan"),
        ({"valid": f(N)}, "valid must be bool, got float32"),
        ({"valid": f(N + 1) > 0}, r"valid must be \(n,\) or \(..., n\) = \(4,\), got \(5,\)"),
        ({"valid": meta(f(N) > 0)}, "valid must be on the device of gram, cpu, got meta"),
    ],
    "sketch": [
        ({"features": f(N, D)}, r"features must be \(n, T, d\), got \(4, 5\)"),
        ({"features": i(2, 3, D)}, "features must be float32, .*got int64"),
        ({"features": f(2, 3, D, dtype=HALF)}, "weight must have the dtype of features, float16, got float32"),
        ({"target": i(2, 4)}, r"target must be \(n, T\) = \(2, 3\) as features, got \(2, 4\)"),
        ({"target": i(2, 3, dtype=torch.int32)}, "target must be int64, got int32"),
        ({"target": meta(i(2, 3))}, "target must be on the device of features, cpu, got meta"),
        ({"left": f(C + 1, 2)}, r"projections\[0\] must be of 3 rows, got \(4, 2\)"),
        ({"left": i(C, 2)}, r"projections\[0\] must be float32, .*got int64"),
        ({"left": meta(f(C, 2))}, r"projections\[0\] must be on the device of features, cpu, got meta"),
        ({"right": f(D, 2)}, r"projections\[1\] must be of 6 rows, got \(5, 2\)"),
        ({"right": f(D + 1)}, r"projections\[1\] must be of 6 rows, got \(6,\)"),
        *HEAD_WRONG[4:], *LOSS_WRONG[5:],
    ],
    "cube_sample": [
        ({"balance": f(N, dtype=torch.float64)}, r"balance must be \(n, p\), got \(4,\)"),
        ({"probability": f(N + 1, dtype=torch.float64)}, r"probability must be \(n,\) with n = 4 .*got \(5,\)"),
        ({"probability": meta(f(N, dtype=torch.float64))},
            "probability must be on the device of balance, cpu, got meta"),
    ],
    "choose_rows": [
        ({"score": i(N)}, "score must be float32, .*got int64"),
        ({"score": f(N, 1, dtype=torch.float64)}, r"score must be \(n,\), got \(4, 1\)"),
        ({"valid": f(N)}, "valid must be bool, got float32"),
        ({"valid": f(N + 1) > 0}, r"valid must be \(n,\) with n = 4 as score, got \(5,\)"),
        ({"valid": meta(f(N) > 0)}, "valid must be on the device of score, cpu, got meta"),
        ({"draws": f(N, dtype=torch.float64)}, r"draws must be \(n \+ 1,\) with n = 4 as score, got \(4,\)"),
        ({"draws": f(N + 1)}, "draws must be float64, got float32"),
        ({"draws": None}, "draws must be given for rule 'odds', got None"),
        ({"k": -2}, "k must be at least 0, got -2"),
        ({"rule": "any"}, "rule must be one of 'top', 'odds', 'rank', got 'any'"),
        ({"weights": "none"}, "weights must be one of 'mean', 'batch', 'unbiased', got 'none'"),
    ],
    "score_minibatch": [
        *LOGITS_WRONG, *LOSS_WRONG,
        ({"features": f(N + 1, D)}, r"features must be \(n, d\) with n = 4 as logits, got \(5, 5\)"),
        ({"features": None}, "features must be given for factors='both', got None"),
        ({"factors": "all"}, "factors must be one of 'none', 'residual', 'both', got 'all'"),
    ],
    "finite_rows": [
        ({"x": i(N)}, r"x must be a floating tensor \(n, ...\), got torch.int64 \(4,\)"),
        ({"x": f()}, r"x must be a floating tensor \(n, ...\), got torch.float32 \(\)"),
    ],
    "unscored": [
        ({"target": f(N)}, "target must be int64, got float32"),
        ({"target": i(N, 1)}, r"target must be \(n,\), got \(4, 1\)"),
        ({"finite": f(N)}, "finite must be bool, got float32"),
        ({"finite": f(N + 1) > 0}, r"finite must be \(n,\) with n = 4 as target, got \(5,\)"),
        ({"finite": meta(f(N) > 0)}, "finite must be on the device of target, cpu, got meta"),
        ({"class_weight": i(C)}, "class_weight must be float32, .*got int64"),
        ({"class_weight": f(C, 1)}, r"class_weight must be \(C,\), got \(3, 1\)"),
        ({"class_weight": meta(f(C))}, "class_weight must be on the device of target, cpu, got meta"),
    ],
    "count_hits": [
        ({"logits": f(N)}, r"logits must be \(n, C\), got \(4,\)"),
        ({"logits": i(N, C)}, "logits must be float32, .*got int64"),
        ({"logits": f(N, 0)}, "logits must have at least one class, got C = 0"),
        ({"target": f(N)}, "target must be int64, got float32"),
        ({"target": i(N + 1)}, r"target must be \(n,\) with n = 4 as logits, got \(5,\)"),
        ({"live": f(N)}, "live must be bool, got float32"),
        ({"live": meta(f(N) > 0)}, "live must be on the device of logits, cpu, got meta"),
    ],
    "weighted_loss": [
        ({"losses": i(N)}, "losses must be float32, .*got int64"),
        ({"losses": f(N, 1)}, r"losses must be \(k,\), got \(4, 1\)"),
        ({"scale": f(1)}, r"scale must be \(\), got \(1,\)"),
        ({"scale": meta(f())}, "scale must be on the device of losses, cpu, got meta"),
        ({"weights": i(N)}, "weights must be float32, .*got int64"),
        ({"weights": f(N + 1)}, r"weights must be \(k,\) with k = 4 as losses, got \(5,\)"),
    ],
    "choose_by_percentile": [
        ({"loss": i(N)}, "loss must be float32, .*got int64"),
        ({"loss": f(N, 1)}, r"loss must be \(n,\), got \(4, 1\)"),
        ({"valid": f(N + 1) > 0}, r"valid must be \(n,\) with n = 4 as loss, got \(5,\)"),
        ({"history": f(6)}, "history must be float64, got float32"),
        ({"history": f(6, 1, dtype=torch.float64)}, r"history must be \(length,\), got \(6, 1\)"),
        ({"draws": f(N, dtype=torch.float64)}, r"draws must be \(n \+ 1,\) with n = 4 as loss, got \(4,\)"),
        ({"k": -1}, "k must be at least 0, got -1"),
        ({"weights": "none"}, "weights must be one of 'mean', 'batch', 'unbiased', got 'none'"),
    ],
    "choose_by_norm": [
        ({"residual_sq": i(N)}, "residual_sq must be float32, .*got int64"),
        ({"residual_sq": f(N, 1)}, r"residual_sq must be \(n,\), got \(4, 1\)"),
        ({"feature_sq": f(N + 1)}, r"feature_sq must be \(n,\) with n = 4 as residual_sq, got \(5,\)"),
        ({"feature_sq": f(N, dtype=torch.float64)}, "feature_sq must be float32, got float64"),
        ({"feature_sq": meta(f(N))}, "feature_sq must be on the device of residual_sq, cpu, got meta"),
        ({"valid": f(N)}, "valid must be bool, got float32"),
        ({"draws": f(N, dtype=torch.float64)}, r"draws must be \(n \+ 1,\) with n = 4 as residual_sq, got \(4,\)"),
        ({"tau": f()}, "tau must be float64, got float32"),
        ({"k": -1}, "k must be at least 0, got -1"),
        ({"weights": "none"}, "weights must be one of 'mean', 'batch', 'unbiased', got 'none'"),
    ],
    "choose_balanced": [
        ({"gram": i(N, N)}, "gram must be float32, .*got int64"),
        ({"gram": f(N, 3)}, r"gram must be \(n, n\), got \(4, 3\)"),
        ({"valid": f(N + 1) > 0}, r"valid must be \(n,\) with n = 4 as gram, got \(5,\)"),
        ({"mixture": f(N, 1)}, "mixture must be float64, got float32"),
        ({"mixture": f(3, 1, dtype=torch.float64)}, r"mixture must be \(n, p - 1\) with n = 4 as gram, got \(3, 1\)"),
        ({"draws": f(2, 3, dtype=torch.float64)}, r"draws must be \(2, n\) with n = 4 as gram, got \(2, 3\)"),
        ({"draws": meta(f(2, N, dtype=torch.float64))}, "draws must be on the device of gram, cpu, got meta"),
        ({"k": -1}, "k must be at least 0, got -1"),
    ],
    "choose_diverse": [
        ({"gram": f(N)}, r"gram must be \(n, n\), got \(4,\)"),
        ({"inner": f(N + 1)}, r"inner must be \(n,\) with n = 4 as gram, got \(5,\)"),
        ({"inner": f(N, dtype=torch.float64)}, "inner must be float32, got float64"),
        ({"target_sq": f(1)}, r"target_sq must be \(\), got \(1,\)"),
        ({"valid": meta(f(N) > 0)}, "valid must be on the device of gram, cpu, got meta"),
        ({"draws": f(1, N, dtype=torch.float64)}, r"draws must be \(k, n\) with n = 4 as gram, got \(1, 4\)"),
        ({"weights": "unbiased"}, "weights must be one of 'mean', 'batch', got 'unbiased'"),
    ],
    "percentile": [
        ({"history": f(6)}, "history must be float64, got float32"),
        ({"history": f(6, 1, dtype=torch.float64)}, r"history must be \(length,\), got \(6, 1\)"),
        ({"loss": f(N)}, "loss must be float64, got float32"),
        ({"loss": f(dtype=torch.float64)}, r"loss must be \(n,\), got \(\)"),
        ({"loss": meta(f(N, dtype=torch.float64))}, "loss must be on the device of history, cpu, got meta"),
    ],
}  # fmt: skip
ONLY_DIRECT = {
    "cube_sample": [
        ({"balance": f(N, 2)}, "balance must be float64, got float32"),
        ({"probability": f(N)}, "probability must be float64, got float32"),
        ({"order": torch.arange(N + 1)}, r"order must be \(n,\) with n = 4 rows as balance, got \(5,\)"),
        ({"order": torch.arange(N, dtype=torch.int32)}, "order must be int64, got int32"),
        ({"draws": f(N - 1, dtype=torch.float64)}, r"draws must be \(n,\) with n = 4 rows as balance, got \(3,\)"),
    ],
}
ONLY_VALUES = {
    "cross_entropy_statistics": VALUES,
    "linear_cross_entropy_statistics": VALUES,
    "residual": VALUES,
    "score_minibatch": VALUES,
    "linear_cross_entropy": [*VALUES, *ROW_VALUES],
    "linear_cross_entropy_backward": [*(({**change, "rows": None}, words) for change, words in VALUES), *ROW_VALUES],
    "sketch": [({"target": torch.tensor([[0, 1, 2], [0, C, 0]])}, r"target must lie in \[0, 3\) .*got 3 in row 4")],
    "matching_residual": [
        ({"indices": torch.tensor([0, N])}, r"selection.indices must lie in \[-1, 4\), got values from 0 to 4"),
        ({"indices": torch.tensor([-2, 0])}, r"selection.indices must lie in \[-1, 4\), got values from -2 to 0"),
    ],
    "cube_sample": [
        ({"order": torch.tensor([0, 1, 2, N])}, r"order must lie in \[0, 4\), got 4 at 3"),
        ({"order": torch.tensor([0, -1, 2, 3])}, r"order must lie in \[0, 4\), got -1 at 1"),
        ({"order": torch.tensor([HUGE, 1, 2, 3])}, r"order must lie in \[0, 4\), got 1099511627776 at 0"),
    ],
}


def through_the_function(name, arguments):
    a = dict(arguments)
    if name == "linear_cross_entropy":
        a.pop("keep_logits")
        return ops.linear_cross_entropy(**a)
    if name == "sketch":
        projections = a.pop("left"), a.pop("right")
        return ops.sketch(projections=projections, **a)
    if name == "matching_residual":
        return ops.matching_residual(
            a["residual"], a["features"], Selection(a["indices"], a["weights"]), bias=a["bias"]
        )
    if name == "cube_sample":
        return ops.cube_sample(a["balance"], a["probability"])
    return getattr(ops, name)(**a)


PRIVATE = (  # no function of selbp.ops
    "linear_cross_entropy_backward",
    "choose_rows",
    "choose_by_norm",
    "choose_by_percentile",
    "score_minibatch",
    "finite_rows",
    "unscored",
    "count_hits",
    "weighted_loss",
    "choose_balanced",
    "choose_diverse",
    "percentile",
    "match_gradients",
    "match_small",
)
