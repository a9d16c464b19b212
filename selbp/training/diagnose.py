"""``diagnose``: which operators of a model's backward run on k rows, which do not and why, and what a rule costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selbp._checks import check_choice, check_int, shown
from selbp.common.batch import Batch
from selbp.common.keep import check_keep, kept_rows
from selbp.rows import BatchNormPolicy
from selbp.selectors import Selector
from selbp.training.analysis import SAMPLES, analyse_batch
from selbp.training.diagnosis import Diagnosis
from selbp.training.head import find_head
from selbp.training.linear_loss import NAME as LINEAR
from selbp.training.linear_loss import LinearCausalLM
from selbp.training.losses import CrossEntropy, of_some
from selbp.training.measured import measure
from selbp.training.options import OF_BATCH, OF_CRITERION, StepOptions


def diagnose(
    model: nn.Module,
    batch: Any,
    keep: float | int = 0.25,
    *,
    selector: Selector | None = None,
    steps: int = 5,
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
    batchnorm: BatchNormPolicy = "exact",
    class_dim: Literal[1, -1] | None = None,
    **options: Any,
) -> Diagnosis:
    """Report what a backward through chosen rows would save in ``model``, and recommend a way.

    The model runs forward and backward once, on at most 8 samples, and costs are modelled from what was counted. With a
    ``selector`` its steps and full steps are run on the whole minibatch as well, and measured. Gradients of the
    parameters, buffers and the random state are left as they are.

    Parameters
    ----------
    model : nn.Module
        In the mode (training or evaluation) in which it will be trained.
    batch : (inputs, target) or dict
        A minibatch, as for :class:`selbp.SelectiveBackprop`. A dict has its target under ``"labels"``.
    keep : float or int
        Share in (0, 1] or number of rows.
    selector : Selector or None
        The rule whose price is measured, such as ``selbp.GradientMatching()``.
    steps : int
        How many steps of each kind are timed, with a selector.
    loss, class_dim
        As for :class:`selbp.SelectiveBackprop`.
    batchnorm : {"exact", "subset"}
        As in :func:`selbp.select`.
    **options
        Further arguments of :class:`selbp.SelectiveBackprop`. Those that say where the samples are and what the loss
        is (``shared``, ``class_weight``, ``head``, ...) always; others, such as ``proxy``, with a selector.

    Returns
    -------
    Diagnosis
        ``print`` it for a table, which ends with its ``summary``: what the recommended step costs, and how that is
        known. Without a selector the time is modelled, on a CPU only; on another device it is left out.

    Raises
    ------
    TypeError, ValueError
        For a batch or an option that does not fit.
    NotImplementedError
        For a sharded model, reentrant checkpointing, and everything that :func:`selbp.select` refuses.
    RuntimeError
        If the model or the loss fails on the few samples.

    See Also
    --------
    selbp.select : the backward that is looked at.
    selbp.SelectiveBackprop : ``backward="auto"`` follows the recommendation on a CPU, and recomputes elsewhere.

    Examples
    --------
    >>> import torch, selbp
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> batch = torch.ones(16, 8), torch.zeros(16, dtype=torch.int64)
    >>> diagnosis = selbp.diagnose(model, batch, keep=0.25)
    >>> diagnosis.k, diagnosis.dense  # every operator of the backward runs on 4 rows
    (4, {})
    >>> measured = selbp.diagnose(model, batch, keep=0.25, selector=selbp.GradientMatching(), steps=1).measured
    >>> sorted(measured.seconds)
    ['full', 'recompute', 'rows']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("model must have a parameter that requires a gradient, got none")
    if not isinstance(batch, (Tensor, tuple, list, Mapping)):
        raise TypeError(f'batch must be (inputs, target), or a dict with "labels", got {shown(batch)}')
    check_choice("batchnorm", batchnorm, ("exact", "subset"))
    kept = check_keep(keep)
    if selector is None and (others := sorted(options.keys() - {*OF_BATCH, *OF_CRITERION, "head"})):
        raise TypeError(f"{', '.join(others)} must come with a selector, whose steps are measured")
    if selector is not None and (isinstance(selector, type) or not isinstance(selector, Selector)):
        raise TypeError(f"selector must be an instance of a selector such as selbp.TopLoss(), got {shown(selector)}")
    check_int("steps", steps, 1)
    inputs, target = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (batch, None)
    known = StepOptions.of_a_look(loss, {**options, "class_dim": class_dim})
    minibatch, criterion = Batch.of(inputs, target, {}, known.places()), known.criterion()
    headless: AbstractContextManager[None] = nullcontext()
    if isinstance(criterion, CrossEntropy) and loss == LINEAR:
        criterion = linear = LinearCausalLM(criterion, model, find_head(model, options.get("head")))
        headless = linear.headless()

    def losses(pair: Any) -> Tensor:
        few, output = pair
        return criterion.losses(output, few.target, few.n)

    try:
        with torch.enable_grad(), headless, of_some(min(minibatch.n, SAMPLES), minibatch.n):
            found = analyse_batch(model, minibatch, kept_rows(kept, minibatch.n), losses, batchnorm=batchnorm)
    except (NotImplementedError, TypeError, ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise RuntimeError(
            f"selbp.diagnose runs the model forward and backward on the first {min(minibatch.n, SAMPLES)} of the "
            f"batch's {minibatch.n} samples, and there met {type(error).__name__}: {error}"
        ) from error
    if minibatch.device.type != "cpu":
        found = replace(found, seconds={})  # the model's rates are a CPU's
    if selector is None:
        return found
    given = {"loss": loss, "batchnorm": batchnorm, "class_dim": class_dim, **options}
    return replace(found, measured=measure(model, (inputs, target), selector, kept, steps, given))
