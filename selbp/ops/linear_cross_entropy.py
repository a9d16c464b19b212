"""``linear_cross_entropy``: a head and its loss in one, differentiable; one pass also gives the statistics.

Forward: the pass of ``linear_cross_entropy_statistics``, a tile of logits at a time. Of each row only its log-sum-exp
and p_rest = 1 - p_y are kept. Backward, for the k rows whose loss has a gradient: a tile of their logits again, turned
in place into residuals scaled by the incoming gradient, then R W into the features' gradient and R^T H into the
weight's rows of that tile. Three products of k rows; nothing of size n x C exists at any time. On a CPU, where
``memory_limit`` has room for the logits, the forward keeps them and the backward makes two products. What ``skip_mass``
leaves out of them is in ``_skipped_tiles.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from selbp._checks import (
    accumulate_dtype,
    check_dtype,
    check_flag,
    check_floating,
    check_optional_tensor,
    check_range,
    check_same_device,
    check_same_dtype,
    check_shape,
    check_tensor,
    symbolic_float,
    symbolic_int,
)
from selbp.ops import _linear_cross_entropy_cpu as _cpu
from selbp.ops import _linear_cross_entropy_cuda as _cuda
from selbp.ops import _linear_cross_entropy_torch as _torch
from selbp.ops._linear_cross_entropy_cuda import Forward, Gradients, Head, Needs, Scored, empty_gradients
from selbp.ops._logit_pass import empty_statistics
from selbp.ops._loss_options import LossOptions, autocast_head, check_head, check_loss
from selbp.ops._register import define_differentiable
from selbp.ops._skipped_tiles import leaves_out, table_shape
from selbp.types import BatchStatistics

_MEMORY_LIMIT = 256 << 20  # bytes of logits that are kept where the caller names no limit


@overload
def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    class_weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    softcap: float = ...,
    rows: Tensor | None = ...,
    return_statistics: Literal[False] = ...,
    memory_limit: int | None = ...,
    skip_mass: float = ...,
) -> Tensor: ...


@overload
def linear_cross_entropy(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    class_weight: Tensor | None = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    softcap: float = ...,
    rows: Tensor | None = ...,
    return_statistics: Literal[True],
    memory_limit: int | None = ...,
    skip_mass: float = ...,
) -> tuple[Tensor, BatchStatistics]: ...


def linear_cross_entropy(
    features: Tensor,  # (n, d)
    weight: Tensor,  # (C, d)
    bias: Tensor | None,  # (C,)
    target: Tensor,  # (n,)
    *,
    class_weight: Tensor | None = None,  # (C,)
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float = 0.0,
    rows: Tensor | None = None,  # (k,)
    return_statistics: bool = False,
    memory_limit: int | None = None,
    skip_mass: float = 0.0,
) -> Tensor | tuple[Tensor, BatchStatistics]:
    """Cross-entropy of ``features @ weight.T + bias`` per row, differentiable, without a probability stored.

    The gradients of features, weight and bias cost two products of the rows that have one, and a third where their
    logits are not kept. On the CPU these are the rows whose incoming gradient is not 0, found in the backward. On a
    GPU, where looking would wait for the device, they are all rows or those that ``rows`` names. The weight's gradient
    is accumulated in float32 and written once. Forward mode (``torch.func.jvp``) and derivatives of the gradients run
    in torch's own operators, which store the logits.

    Parameters
    ----------
    features : Tensor
        (n, d), float32, float64, bfloat16 or float16.
    weight : Tensor
        (C, d) of the dtype of ``features``; autocast casts both, and ``bias``, as for a linear layer.
    bias : Tensor or None
        (C,).
    target : Tensor
        (n,) int64 class indices, or ``ignore_index``.
    class_weight : Tensor or None
        (C,) weights of the classes, as torch's ``weight``; not differentiated.
    ignore_index : int
        Rows with this target have loss 0 and no gradient.
    label_smoothing : float
        In [0, 1], as torch's.
    softcap : float
        Where positive, the loss is that of ``softcap * tanh(logits / softcap)``.
    rows : Tensor or None
        (k,) int64, the rows whose losses carry a gradient; the others' count as constants. Repeated entries count once.
    return_statistics : bool
        Also return the statistics of the same pass, which carry no gradient.
    memory_limit : int or None
        Bytes of logits that may be kept for the backward, which then need not form them again; where (n, C) of them
        take more, and at 0, no logits are stored. None: 256 MiB. Read on a CPU, and only where a gradient is wanted;
        on a GPU none are kept.
    skip_mass : float
        In [0, 1]. Above 0, the backward leaves out classes of little probability: of each row up to this part of
        1 - p_i, with p_i the probability of the row's target. It goes by tiles of one row and 256 classes, which the
        forward finds. What is left out is spread evenly over its tile. Let e_i = 2 skip_mass abs(g_i) w_i (1 - p_i),
        with the incoming gradient g_i and the target's class weight w_i. Bounds of the errors: row i of the logits'
        gradient, in sum of absolute values, e_i, which is that part of the row itself where there is no ``softcap``;
        row i of the features' gradient, in norm, e_i max_c norm(weight_c); the weight's gradient, in norms of its rows
        together, sum_i e_i norm(features_i); the bias's, in sum of absolute values, sum_i e_i. Nothing is left out with
        label smoothing, in forward mode, in derivatives of the gradients, on a CPU where less than a quarter of the
        tiles can be, and on a GPU in float64 or without Triton. A GPU leaves out fewer as well, since
        counting them first would wait for the device. That is then slower than leaving out nothing, says a model
        (unmeasured). The idea is that of Cut Cross-Entropy (Wijmans et al. 2024, arXiv 2411.09009), which goes by the
        greatest probability of a block of rows.

    Returns
    -------
    Tensor, or a pair of it and a BatchStatistics
        loss (n,), or (loss, statistics); float64 for float64 inputs, else float32. Rows that are not ``valid`` (see
        :class:`selbp.BatchStatistics`) have no gradient and spoil none.

    Raises
    ------
    TypeError
        An argument has the wrong type, or the dtypes differ.
    ValueError
        A shape, device or option is wrong, or (CPU) a target lies outside [0, C) or an entry of ``rows`` outside
        [0, n).

    See Also
    --------
    selbp.ops.linear_cross_entropy_statistics : the statistics alone, without a gradient.
    selbp.select : lets the layers below the head run backward on the chosen rows as well.

    Examples
    --------
    >>> import torch, selbp
    >>> features, weight = torch.ones(4, 8, requires_grad=True), torch.zeros(3, 8, requires_grad=True)
    >>> loss, stats = selbp.ops.linear_cross_entropy(
    ...     features, weight, None, torch.tensor([0, 1, 2, 0]), return_statistics=True
    ... )
    >>> chosen = selbp.TopLoss().select(stats, k=2)
    >>> (loss[chosen.indices] * chosen.weights).sum().backward()  # products of 2 rows
    >>> weight.grad.shape
    torch.Size([3, 8])
    """
    check_tensor("features", features)
    check_tensor("weight", weight)
    check_optional_tensor("bias", bias)
    check_tensor("target", target)
    check_optional_tensor("rows", rows)
    check_flag("return_statistics", return_statistics)
    wanted = _wants_gradient(features, weight, bias)
    keep = _keeps_logits(features, weight, wanted, _MEMORY_LIMIT if memory_limit is None else memory_limit)
    skip_mass = symbolic_float("skip_mass", skip_mass)
    check_range("skip_mass", skip_mass, 0.0, 1.0)
    class_weight, *options = LossOptions.of(class_weight, ignore_index, label_smoothing, softcap)
    skip = skip_mass if wanted else 0.0
    outputs = _linear_cross_entropy(features, weight, bias, target, class_weight, rows, *options, keep, skip)
    loss, *statistics = outputs[:6]
    return (loss, BatchStatistics(loss.detach(), *statistics)) if return_statistics else loss


def _wants_gradient(features: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    wanted = features.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    return wanted and torch.is_grad_enabled()


def _keeps_logits(features: Tensor, weight: Tensor, wanted: bool, limit: object) -> bool:
    """Return whether the forward keeps the logits: on a CPU, if a gradient is ``wanted`` and ``limit`` has room."""
    limit = symbolic_int("memory_limit", limit)
    if limit < 0:
        raise ValueError(f"memory_limit must be at least 0 bytes or None, got {limit}")
    if features.device.type != "cpu" or features.dim() != 2 or weight.dim() != 2:
        return False
    return wanted and features.shape[0] * weight.shape[0] * features.element_size() <= limit


def _pack(*flat: Any) -> tuple[Any, ...]:
    features, weight, bias, target, class_weight, rows, *options, keep, skip_mass = flat
    return Head(features, weight, bias), target, rows, LossOptions(class_weight, *options), keep, skip_mass


def _check(
    head: Head, target: Tensor, rows: Tensor | None, options: LossOptions, keep: bool = False, skip_mass: float = 0.0
) -> None:
    features = head.features
    check_head(*head)
    check_loss("features", features, head.weight.shape[0], target, options)
    if rows is not None:
        check_dtype("rows", rows, torch.int64)
        check_shape("rows", rows, "(k,)", (None,))
        check_same_device("rows", rows, "features", features)
    check_range("skip_mass", skip_mass, 0.0, 1.0)


def _check_backward(
    grad: Tensor, head: Head, scored: Scored, rows: Tensor | None, options: LossOptions, needs: Needs
) -> None:
    features, (target, lse, p_rest, valid, logits, left_out) = head.features, scored
    _check(head, target, rows, options)
    check_floating("grad", grad)
    check_dtype("lse", lse, accumulate_dtype(features.dtype))
    check_dtype("others", p_rest, accumulate_dtype(features.dtype))
    check_dtype("valid", valid, torch.bool)
    n = features.shape[0]
    for name, tensor in (("grad", grad), ("lse", lse), ("others", p_rest), ("valid", valid)):
        check_shape(name, tensor, f"(n,) with n = {n} as features", (n,))
        check_same_device(name, tensor, "features", features)
    if logits.numel():
        check_same_dtype("logits", logits, "features", features)
        check_same_device("logits", logits, "features", features)
        check_shape("logits", logits, f"(n, C) = {(n, len(head.weight))}, or empty", (n, len(head.weight)))
    if left_out.numel():
        tiles = table_shape(n, len(head.weight))
        check_dtype("left_out", left_out, accumulate_dtype(features.dtype))
        check_same_device("left_out", left_out, "features", features)
        check_shape("left_out", left_out, f"(n, tiles) = {tiles}, or empty", tiles)


def _fake(
    head: Head, target: Tensor, rows: Tensor | None, options: LossOptions, keep: bool, skip_mass: float
) -> Forward:
    features, classes = head.features, len(head.weight)
    n, dtype, cpu = target.shape[0], accumulate_dtype(features.dtype), features.device.type == "cpu"
    p_rest, logits = features.new_empty(n, dtype=dtype), features.new_empty((n, classes) if keep and cpu else (0, 0))
    shape = table_shape(n, classes) if leaves_out(skip_mass, options) else (0, 0)
    return *empty_statistics(features, n, dtype), p_rest, logits, p_rest.new_empty(shape)


def _backward_fake(
    grad: Tensor, head: Head, scored: Scored, rows: Tensor | None, options: LossOptions, needs: Needs
) -> Gradients:
    return empty_gradients(head, needs)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Forward) -> None:
    features, weight, bias, target, class_weight, rows, *options, _, _ = inputs
    _, lse, _, _, _, valid, p_rest, logits, left_out = output
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(features, weight, bias, target, lse, p_rest, valid, logits, left_out, class_weight, rows)
    ctx.options = options


def _backward(ctx: Any, needed: Sequence[bool], grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 11
    features, weight, bias, *rest = ctx.saved_tensors
    needs = needed[:3]
    gradients = _linear_cross_entropy_backward(grad, features, weight, bias, *rest, *ctx.options, *needs)
    return *(gradient if need else None for gradient, need in zip(gradients, needs, strict=True)), *(None,) * 8


_linear_cross_entropy = define_differentiable(
    "linear_cross_entropy(Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    "Tensor? rows, SymInt ignore_index, float label_smoothing, float softcap, bool keep_logits, "
    # BatchStatistics, then (n,) 1 - p_y, the logits that were kept, and (n, tiles) what each row leaves out
    "float skip_mass) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    check=_check,
    fake=_fake,
    cpu=_cpu.forward,
    cuda=_cuda.forward,
    setup_context=_setup_context,
    backward=_backward,
    composed=_torch.outputs,
    pack=_pack,
    autocast=autocast_head,
)
_linear_cross_entropy_backward = define_differentiable(
    "linear_cross_entropy_backward(Tensor grad, Tensor features, Tensor weight, Tensor? bias, Tensor target, "
    "Tensor lse, Tensor others, Tensor valid, Tensor logits, Tensor left_out, Tensor? class_weight, Tensor? rows, "
    "SymInt ignore_index, float label_smoothing, float softcap, bool need_features, bool need_weight, bool need_bias) "
    "-> (Tensor, Tensor, Tensor)",
    check=_check_backward,
    fake=_backward_fake,
    cpu=_cpu.backward,
    cuda=_cuda.backward,
    setup_context=_torch.setup_second,
    backward=_torch.backward_second,
    composed=lambda _, *inputs: _torch.gradients(*inputs),
    pack=_torch.pack_backward,
)
