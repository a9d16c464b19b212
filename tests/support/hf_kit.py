"""Tiny models of Transformers from configurations, random data, and a trainer's arguments. No downloads."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, LENGTH, SAMPLES = 61, 10, 32
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**TEXT, **STILL, **({"num_labels": 4} | options))
    )


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**TEXT, num_key_value_heads=2, pad_token_id=0, **options)
    return transformers.LlamaForCausalLM(config)


def mixtral(**options: Any) -> Any:
    torch.manual_seed(0)
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=3, pad_token_id=0, **options)
    )


class Rows(torch.utils.data.Dataset):
    """Dicts of one sample each."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def tokens(seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(seed))


def classes(labels: Tensor | None = None) -> Rows:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, 4, (SAMPLES,), generator=generator) if labels is None else labels
    ids = tokens()
    return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


def texts() -> Rows:
    """Labels of 9 down to 3 tokens: the minibatches of an accumulated one have unequal numbers of them."""
    ids = tokens()
    labels = ids.clone()
    for i in range(SAMPLES):
        labels[i, : (i * 5) % 8] = -100
    return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})


def plain_arguments(folder: Any) -> dict[str, Any]:
    """Two steps of plain SGD at one rate, the same samples each time: what every trainer here is given."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 0.1,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "seed": 3,
        "data_seed": 3,
    }


def arguments(folder: Any, **options: Any) -> Any:
    return transformers.TrainingArguments(**{**plain_arguments(folder), **options})


def weights(model: Any) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def difference(a: Any, b: Any, start: Tensor) -> float:
    """Between two trained models, relative to how far the second has gone from ``start``."""
    return float((weights(a) - weights(b)).norm() / (weights(b) - start).norm())
