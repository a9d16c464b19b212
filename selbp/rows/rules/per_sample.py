"""Rules of kernels that work sample by sample: one declaration each.

``kernel(name, rows_in, rows_out)`` says which positional arguments hold the samples, in dim 0 or, if ``when`` allows
it, in the gradient's dim. The first of ``rows_in`` is the gradient. ``rows_out`` has a letter for each result: ``r``
for one row per sample, ``d`` for a sum over the samples.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from selbp.rows.gradient import RowGradient
from selbp.rows.registry import NoRuleError, require, rule
from selbp.rows.wrap import wrap

Condition = Callable[[RowGradient, list[Any]], bool]
Adjust = Callable[[RowGradient, list[Any]], None]


def in_front(gradient: RowGradient, args: list[Any]) -> bool:
    """The samples are dim 0."""
    return gradient._layout.dim == 0


def kernel(
    name: str,
    rows_in: tuple[int, ...],
    rows_out: str,
    when: Condition = in_front,
    *,
    text: str = "The samples are dim 0.",
    adjust: Adjust | None = None,
    once: tuple[int, ...] = (),
) -> None:
    """Declare the rule of operator ``name``, as the module's docstring describes.

    ``adjust`` changes the other arguments. ``once`` lists small operands that no other operator reads.
    """
    gradient_at, cut = rows_in[0], rows_in[1:]
    results = [position for position, kind in enumerate(rows_out) if kind == "r"]

    def run(func: Any, *args: Any, **kwargs: Any) -> Any:
        gradient = args[gradient_at]
        if type(gradient) is not RowGradient:
            raise NoRuleError("the gradient is dense, a saved tensor is not")
        layout, operands = gradient._layout, list(args)
        if not when(gradient, operands):
            raise NoRuleError(f"does not hold here: {text}")
        operands[gradient_at] = gradient._data
        for position in cut:
            value = args[position]
            if isinstance(value, Tensor) and type(value) is not RowGradient:
                operands[position] = layout.take_once(value) if position in once else layout.take(value)
        for position, value in enumerate(operands):
            if type(value) is RowGradient:
                require(position in cut and value._layout is layout, "another argument is a gradient too")
                operands[position] = value._data
        if adjust is not None:
            adjust(gradient, operands)
        out = func(*operands, **kwargs)
        if isinstance(out, Tensor):
            return wrap(out, layout) if results else out
        out = list(out)
        for position in results:
            if out[position] is not None:
                out[position] = wrap(out[position], layout)
        return tuple(out)

    rule(name, when=text)(run)


def outside(position: int) -> Condition:
    """The samples are not among the normalized dims, whose sizes are the argument at ``position``."""
    return lambda gradient, args: gradient._layout.dim < gradient.dim() - len(args[position])


def before_last(n: int) -> Condition:
    """The samples are not one of the last ``n`` dims."""
    return lambda gradient, args: gradient._layout.dim < gradient.dim() - n


def _batch_size(position: int) -> Adjust:
    """Set the argument at ``position``, the number of samples, to k."""

    def adjust(gradient: RowGradient, args: list[Any]) -> None:
        args[position] = gradient._data.shape[0]

    return adjust


def _input_size(position: int) -> Adjust:
    """Set the argument at ``position``, the size of the kernel's input, to that of the k rows."""

    def adjust(gradient: RowGradient, args: list[Any]) -> None:
        size = list(args[position])
        size[gradient._layout.dim] = gradient._layout.kept
        args[position] = size

    return adjust


# ------------------------------------------------------------------------------------- convolution, normalisation
kernel("convolution_backward", (0, 1), "rdd")

_NORMALIZED = "The samples are not normalized over."
kernel("native_layer_norm_backward", (0, 1, 3, 4), "rdd", outside(2), text=_NORMALIZED, once=(3, 4))
kernel("_fused_rms_norm_backward", (0, 1, 3), "rd", outside(2), text=_NORMALIZED, once=(3,))
kernel("native_group_norm_backward", (0, 1, 2, 3), "rdd", adjust=_batch_size(5), once=(2, 3))

# ------------------------------------------------------------------------------------------------ pooling, resizing
_PLANES = "The samples are not pooled over."
for _dims in (2, 3):
    kernel(f"max_pool{_dims}d_with_indices_backward", (0, 1, 7), "r", before_last(_dims), text=_PLANES)
    kernel(f"avg_pool{_dims}d_backward", (0, 1), "r", before_last(_dims), text=_PLANES)
    kernel(f"_adaptive_avg_pool{_dims}d_backward", (0, 1), "r", before_last(_dims), text=_PLANES)
    kernel(f"adaptive_max_pool{_dims}d_backward", (0, 1, 2), "r", before_last(_dims), text=_PLANES)
    kernel(f"grid_sampler_{_dims}d_backward", (0, 1, 2), "rr")
for _mode in ("reflection", "replication"):
    for _dims in (1, 2, 3):
        kernel(f"{_mode}_pad{_dims}d_backward", (0, 1), "r", before_last(_dims), text="The samples are not padded.")
for _mode in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d", "bicubic2d", "trilinear3d"):
    kernel(f"upsample_{_mode}_backward", (0,), "r", adjust=_input_size(2))
for _mode in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d", "bilinear2d_aa", "bicubic2d_aa"):
    kernel(f"_upsample_{_mode}_backward", (0,), "r", adjust=_input_size(2))
kernel("channel_shuffle", (0,), "r")
_BATCHED = "The samples are not the channels of a single image."
for _name, _dims in (("pixel_shuffle", 3), ("pixel_unshuffle", 3), ("im2col", 3), ("col2im", 2)):
    kernel(_name, (0,), "r", before_last(_dims), text=_BATCHED)

# ------------------------------------------------------------------------------------------------- softmax, losses
_NOT_ALONG = "The softmax does not run along the samples."
for _name in ("_softmax_backward_data", "_log_softmax_backward_data"):
    kernel(_name, (0, 1), "r", lambda g, args: args[2] % g.dim() != g._layout.dim, text=_NOT_ALONG)
for _name in ("nll_loss_backward", "nll_loss2d_backward"):
    kernel(_name, (0, 1, 2), "r", lambda g, args: in_front(g, args) and args[4] == 0, text='reduction="none".')
kernel(
    "multi_margin_loss_backward",
    (0, 1, 2),
    "r",
    lambda g, args: in_front(g, args) and len(args) > 6 and args[6] == 0,
    text='reduction="none".',
)


@rule("_cdist_backward")
def distance(func: Any, gradient: Any, first: Tensor, second: Tensor, p: float, distances: Tensor) -> Any:
    """Batched over the samples."""
    require(isinstance(gradient, RowGradient) and gradient.dim() > 2, "distances between samples")
    layout = gradient._layout
    require(layout.dim == 0 and first.dim() == second.dim() == gradient.dim(), "the samples are not dim 0")
    return wrap(
        func(gradient._data, *(layout.take(x, 0) for x in (first, second)), p, layout.take(distances, 0)), layout
    )
