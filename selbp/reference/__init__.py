"""The specification in eager PyTorch, and the backend of CUDA tensors where there is no kernel.

Every other backend is compared with these functions, in float64, and with nothing else. The operators run them too:
whatever has no Triton or CUDA kernel, or whose kernel cannot run, computes here. Nothing waits for a device, except in
``match``. This package imports nothing from ``selbp.ops``.

Notation (the same in names, docstrings and tests): ``n`` samples, ``d`` features, ``C`` classes, ``k`` kept rows.

    h_i   features   (n, d)   input of the last linear layer, the *head*
    W, c  weight, bias        the head, (C, d) and (C,)
    z_i   logits     (n, C)   W h_i + c, soft-capped where a cap is given
    p_i   probs      (n, C)   softmax(z_i)
    t_i   soft target(n, C)   t_ic = (1 - eps) w_y [c = y] + (eps / C) w_c       (eps label smoothing, w class weights)
    l_i   loss       (n,)     sum_c t_ic (lse_i - z_ic)
    r_i   residual   (n, C)   dl_i / d(W h_i + c) = (T_i p_i - t_i) * dcap,  T_i = sum_c t_ic
    g_i   gradient            r_i (x) [h_i, 1], of length C (d + 1); never materialised
    K     gram       (n, n)   K_ij = g_i . g_j = (r_i . r_j)(h_i . h_j + 1)
    M     mean gradient       (1 / n) sum_i g_i, the target of matching

Everything computes in the dtype it is given: hand it float64 to get the spec, float32 to get "eager torch".
"""

from selbp.reference.gradients import gradient_gram, matching_residual, mean_gradient
from selbp.reference.losses import (
    cross_entropy_statistics,
    linear_cross_entropy_statistics,
    residual,
    sketch,
    soft_cap,
    soft_target,
)
from selbp.reference.matching import match
from selbp.reference.sampling import choose_rows, cube_sample, percentile

__all__ = [
    "choose_rows",
    "cross_entropy_statistics",
    "cube_sample",
    "gradient_gram",
    "linear_cross_entropy_statistics",
    "match",
    "matching_residual",
    "mean_gradient",
    "percentile",
    "residual",
    "sketch",
    "soft_cap",
    "soft_target",
]
