"""Hugging Face's models from small configurations: exact to rounding, and which of them densify. No downloads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
pytestmark = pytest.mark.slow

N, STEPS, VOCABULARY = 6, 10, 50
INDEX = torch.tensor([4, 1])
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {**SMALL, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
VISION = {**SMALL, "image_size": 32, "patch_size": 8, "num_labels": 5}
T5 = {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 5}
DEBERTA = {**TEXT, "num_labels": 5, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
MIXTRAL = {**TEXT, "num_key_value_heads": 1, "num_local_experts": 3}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4}
SWIN |= {"num_labels": 5}


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (N, STEPS))}


def sequence_to_sequence() -> dict[str, Tensor]:
    return {**tokens(), "decoder_input_ids": torch.randint(3, VOCABULARY, (N, STEPS))}


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(N, 3, 32, 32, dtype=torch.float64)}


def make(model: str, config: str, inputs: Callable[[], dict[str, Tensor]], **options: Any) -> Any:
    def build() -> tuple[nn.Module, dict[str, Tensor]]:
        return getattr(transformers, model)(getattr(transformers, config)(**options)), inputs()

    return build


MODELS = {
    "GPT-2": make("GPT2LMHeadModel", "GPT2Config", tokens, vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2),
    "Llama": make("LlamaForCausalLM", "LlamaConfig", tokens, **TEXT, num_key_value_heads=1),
    "BERT": make("BertForSequenceClassification", "BertConfig", tokens, **TEXT, num_labels=5),
    "T5": make("T5ForConditionalGeneration", "T5Config", sequence_to_sequence, **T5),
    "ViT": make("ViTForImageClassification", "ViTConfig", images, **VISION),
    "ConvNeXt": make("ConvNextForImageClassification", "ConvNextConfig", images, **CONVNEXT),
    "DeBERTa": make("DebertaV2ForSequenceClassification", "DebertaV2Config", tokens, **DEBERTA),
    "Mixtral": make("MixtralForCausalLM", "MixtralConfig", tokens, **MIXTRAL),
    "Swin": make("SwinForImageClassification", "SwinConfig", images, **SWIN),
}
DENSIFY = {"Mixtral", "Swin"}


@pytest.mark.parametrize("name", MODELS)
def test_model_is_exact(name: str) -> None:
    # Mixtral's grouped product has no float64: there, rounding is float32's.
    dtype, tolerance = (torch.float32, 2e-5) if name == "Mixtral" else (torch.float64, 1e-10)

    def gradients(choose: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, inputs = MODELS[name]()
        model = model.to(dtype).train()
        torch.manual_seed(1)
        logits = model(**inputs).logits
        losses = F.cross_entropy(logits.flatten(0, -2), torch.arange(logits[..., 0].numel()) % 5, reduction="none")
        choose(losses.view(N, -1).mean(1)).sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    dense: Counter[str] = Counter()
    got = gradients(lambda losses: selbp.select(losses, INDEX, densified=dense))
    want = gradients(lambda losses: losses[INDEX])
    assert got.keys() == want.keys() and len(got) > 10
    for key, gradient in want.items():
        assert type(got[key]) is Tensor
        assert float((got[key] - gradient).norm()) <= tolerance * (1 + float(gradient.norm())), key
    assert bool(dense) == (name in DENSIFY), dense


def test_a_cut_under_the_trainer(tmp_path: Any) -> None:
    """One module in the model; the Trainer, its loss and its arguments are what they were."""
    pytest.importorskip("accelerate", reason="the Trainer needs accelerate")
    torch.manual_seed(0)
    model, _ = MODELS["BERT"]()
    cut = selbp.BackwardCut(0.25)
    model.bert.encoder.layer[0].register_forward_hook(
        lambda module, args, out: cut(out) if isinstance(out, Tensor) else (cut(out[0]), *out[1:])
    )
    data = [{"input_ids": torch.randint(3, VOCABULARY, (STEPS,)), "labels": i % 5} for i in range(24)]
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, max_steps=3, report_to=[], save_strategy="no", use_cpu=True
    )
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
    assert trainer.train().global_step == 3
    assert (cut.report.n, cut.report.k) == (8, 2) and not cut.report.dense
