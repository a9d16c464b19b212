"""What a Hugging Face model's own loss is, as a step's options: the task is told by the model's class and config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from selbp.training.losses import HINT

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
