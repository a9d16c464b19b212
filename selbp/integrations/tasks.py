"""What a Hugging Face model's own loss is, as a step's options: the task is told by the model's class and config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from selbp._torch import without_autocast_cache
from selbp.common.batch import Batch
from selbp.common.buffers import buffers_put_back
from selbp.common.distributed import unwrap
from selbp.common.guards import evaluating, random_state_put_back
from selbp.common.hooks import eagerly
from selbp.common.places import Places
from selbp.training.auxiliary import Auxiliary
from selbp.training.losses import HINT, criterion_of
from selbp.training.options import OF_CRITERION, StepOptions

FEW = 8  # samples on which the model's own loss is looked at
OF_THE_LOSS = {*OF_CRITERION, "aux_weight"} - {"skip_mass"}  # with which a loss is no longer the model's own
SHIFTED = ("ForCausalLM", "LMHeadModel")
CLASSES = (
    "ForTokenClassification",
    "ForImageClassification",
    "ForAudioClassification",
    "ForVideoClassification",
    "ForMaskedLM",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
)


def base_of(model: Any) -> Any:
    """The model inside wrappers of torch and of PEFT."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None and hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        if inner is None or inner is model:
            return model
        model = inner


def answer_losses(output: Any, target: Mapping[str, Tensor]) -> Tensor:
    """(n,) cross-entropy of the start and of the end of an answer, averaged; a position off the end is not counted."""
    total: Any = 0.0
    for name in ("start", "end"):
        logits = output[f"{name}_logits"]
        place = target[f"{name}_positions"].reshape(-1).clamp(0, logits.shape[1])
        total = total + F.cross_entropy(logits, place, ignore_index=logits.shape[1], reduction="none")
    return total / 2


def task_options(model: Any, labels: Any) -> dict[str, Any]:
    """``loss`` and what goes with it. ``labels`` is a first batch's.

    Raises ValueError for a model whose loss is not known here.
    """
    model = base_of(model)
    config, names = getattr(model, "config", None), [kind.__name__ for kind in type(model).mro()]

    def ends(suffixes: tuple[str, ...]) -> bool:
        return any(name.endswith(suffixes) for name in names)

    if ends(("ForQuestionAnswering",)):
        return {"loss": answer_losses, "target_keys": ("start_positions", "end_positions")}
    if ends(("ForConditionalGeneration",)):
        decodes = bool(getattr(config, "is_encoder_decoder", False))
        return {"loss": "cross_entropy", "pass_labels": True} if decodes else {"loss": "causal_lm"}
    if ends(SHIFTED):
        return {"loss": "causal_lm"}
    if ends(("ForSequenceClassification", "ForImageClassification")):
        return {"loss": _classification(config, labels)}
    if ends(CLASSES):
        return {"loss": "cross_entropy"}
    raise ValueError(f"the loss of {names[0]} is not known: pass loss= among the options of `selective`")


def _classification(config: Any, labels: Any) -> str:
    """As Transformers infers it: from ``problem_type``, else from the number of labels and the type of the targets."""
    kind = getattr(config, "problem_type", None)
    if kind is None:
        floating = isinstance(labels, Tensor) and labels.is_floating_point()
        single = "multi_label_classification" if floating else "single_label_classification"
        kind = "regression" if getattr(config, "num_labels", 2) == 1 else single
    return {"regression": "mse", "multi_label_classification": "bce"}.get(str(kind), "cross_entropy")


def checked(options: Mapping[str, Any], model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """``options`` with the loss that ``model`` computes itself: a class's name does not say all.

    Decoders such as ``BartForCausalLM`` do not shift their labels: their loss becomes ``"cross_entropy"``. The model
    runs once on a few samples of ``inputs``, in evaluation mode, and is left as it was; nothing is said where it has no
    loss of its own, or cannot run so. Raises ValueError where no loss that is known here is the model's.
    """
    options, named = dict(options), options["loss"]
    if not isinstance(named, str) or OF_THE_LOSS & options.keys():
        return options
    try:
        output, few = _evaluated(model, inputs, StepOptions.of_a_look(named, {**options, "pass_labels": True}).places())
        own = output["loss"] if isinstance(output, Mapping) else output.loss
        extra = Auxiliary(base_of(model), None, True).of(output)
        own = float(own) - (0.0 if extra is None else float(extra))
        coarse = torch.finfo(output.logits.dtype).eps
    except Exception:  # a fault of the model comes up again
        return options
    means = {}
    for loss in dict.fromkeys((named, "cross_entropy") if named == "causal_lm" else (named,)):
        criterion = criterion_of(loss)
        losses, (mass, _) = criterion.losses(output, few.target, few.n), criterion.mass(few.target, few.n, few.device)
        means[loss] = float(losses.double().sum() / mass.double().sum())
    fits = [loss for loss, mean in means.items() if not abs(mean - own) > max(1e-4, 4 * coarse) * max(1.0, abs(own))]
    if not fits:
        raise ValueError(
            f"the loss of {type(base_of(model)).__name__} is not {named!r}, as its name says: on {few.n} samples it is "
            f"{own:.4g}, and would be {means[named]:.4g}. Pass loss= among the options of `selective`: a function "
            f"(output, target) -> (n,), or {named!r} if that is meant"
        )
    return {**options, "loss": fits[0]}


@torch.no_grad()
def _evaluated(model: Any, inputs: Mapping[str, Any], places: Places) -> tuple[Any, Batch]:
    """The output of the first few samples of ``inputs``, labels and all, and the samples."""
    model = unwrap(model)
    batch = Batch.of(inputs, None, {}, places)
    few = batch.take(torch.arange(min(batch.n, FEW), device=batch.device))
    with random_state_put_back(few.device), buffers_put_back(model), evaluating(model, few.device), eagerly(model):
        with without_autocast_cache():
            return few.feed(model), few


def per_sample(function: Any) -> Any:
    """``compute_loss_func`` as a step's loss."""

    def compute_loss_func(output: Any, target: Any) -> Tensor:
        losses = function(output, target, num_items_in_batch=None)
        if isinstance(losses, Tensor) and losses.dim() == 0:
            raise ValueError(
                f"compute_loss_func must return {HINT}, got a scalar. For one that returns a scalar, leave the trainer "
                "as it is and place a cut by selbp.insert_cut"
            )
        found: Tensor = losses
        return found

    return compute_loss_func
