"""``loss="linear_causal_lm"`` on models of Transformers, in its trainer and in Accelerate."""

from __future__ import annotations

import inspect

import pytest
import torch

import selbp

transformers = pytest.importorskip("transformers")
from support.hf_kit import VOCABULARY, llama, tokens  # noqa: E402

LOSSES = ("causal_lm", "linear_causal_lm")


def batch(n=8):
    ids = tokens()[:n]
    mask, labels = torch.ones_like(ids), ids.clone()
    for i in range(n):
        mask[i, len(ids[0]) - i % 5 :], labels[i, len(ids[0]) - i % 5 :] = 0, -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def trained(model, loss, **options):
    """The step, and the gradients of one minibatch."""
    step = selbp.SelectiveBackprop(model, keep=0.25, loss=loss, **options)
    step(batch()).backward()
    return step, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
@pytest.mark.parametrize(
    "options",
    [{"selector": selbp.TopLoss(normalize="tokens")}, {"selector": selbp.GradientMatching()}],
    ids=["top", "matching"],
)
def test_llama_trains_as_with_logits(backward, tied, options):
    (plain, want), (linear, got) = (
        trained(llama(tie_word_embeddings=tied).double(), loss, backward=backward, **options) for loss in LOSSES
    )
    assert torch.equal(plain.report.selection.indices, linear.report.selection.indices)
    assert want.keys() == got.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-12)


def test_logits_to_keep_as_the_labels_are():
    if "logits_to_keep" not in inspect.signature(transformers.LlamaForCausalLM.forward).parameters:
        pytest.skip("this Transformers has no logits_to_keep")
    for loss in LOSSES:
        model = llama().double()
        step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=2, loss=loss, shared=["logits_to_keep"])
        data = batch()
        data["labels"] = data["labels"][:, -4:]
        value = step({**data, "logits_to_keep": 4})
        want = value if loss == "causal_lm" else want  # noqa: F821
    torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-12)


def test_capped_logits_are_refused():
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma2Config(**sizes, intermediate_size=16, num_key_value_heads=2, head_dim=8)
    with pytest.raises(RuntimeError, match='more to its logits .* pass loss="causal_lm"'):
        trained(transformers.Gemma2ForCausalLM(config), LOSSES[1], selector=selbp.TopLoss())


def test_lora_beside_the_head_trains_and_lora_on_it_is_refused():
    peft = pytest.importorskip("peft")
    adapt = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.0}

    def adapted(*names):
        model = llama().double()
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(names), **adapt)).double()

    found = []
    for loss in LOSSES:
        torch.manual_seed(3)
        found.append(trained(adapted("q_proj", "v_proj"), loss, selector=selbp.GradientMatching())[1])
    assert found[0]
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match=r"head .*lm_head.* an adapter"):
        trained(adapted("q_proj", "lm_head"), LOSSES[1], selector=selbp.TopLoss())


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16"])
def test_the_trainer_trains_as_with_logits(tmp_path, bf16):
    pytest.importorskip("accelerate")
    from selbp.integrations.huggingface import selective

    class Lines(torch.utils.data.Dataset):
        def __len__(self):
            return 16

        def __getitem__(self, i):
            return {name: value[0] for name, value in {k: v[i % 8 : i % 8 + 1] for k, v in batch().items()}.items()}

    weights = []
    for loss in LOSSES:
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / loss),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            max_steps=2,
            learning_rate=1e-2,
            max_grad_norm=0.0,
            optim="sgd",
            lr_scheduler_type="constant",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=bf16,
            disable_tqdm=True,
        )
        model = llama()
        trainer = transformers.Trainer(model, arguments, train_dataset=Lines())
        selective(trainer, selector=selbp.TopLoss(normalize="tokens"), keep=0.5, loss=loss).train()
        weights.append(
            {name: p.detach().clone() for name, p in trainer.accelerator.unwrap_model(model).named_parameters()}
        )
    before = dict(llama().named_parameters())
    for name, want in weights[0].items():
        moved = (want - before[name]).abs().max()
        assert moved > 0
        assert (weights[1][name] - want).abs().max() <= (0.05 if bf16 else 1e-4) * moved, name
