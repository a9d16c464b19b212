"""TRL's SFTTrainer with selective steps: its own loss where all rows are kept, its own metrics always."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import selbp

transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")
trl: Any = pytest.importorskip("trl", reason="trl is not installed")
datasets: Any = pytest.importorskip("datasets", reason="datasets is not installed")

from support.hf_kit import difference, llama, mixtral, plain_arguments, texts, weights  # noqa: E402

from selbp.integrations.huggingface import SelectiveTrainerMixin, selective  # noqa: E402

transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
FULL = {"selector": selbp.Full(), "keep": 1.0}
METRICS = ("entropy", "mean_token_accuracy", "num_tokens")


class SelectiveSFT(SelectiveTrainerMixin, trl.SFTTrainer):
    pass


def data() -> Any:
    """Token ids of 4 to 10 tokens, of which the first few are a prompt."""
    ids = texts().columns["input_ids"]
    lengths = [10 - i % 7 for i in range(len(ids))]
    rows = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
    labels = [[-100 if t < i % 3 else row[t] for t in range(len(row))] for i, row in enumerate(rows)]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": labels})


class Tokenizer:
    """As much of a tokenizer as ready-made token ids need."""

    def __new__(cls) -> Any:
        from tokenizers import Tokenizer as Fast
        from tokenizers.models import WordLevel

        words = {"<pad>": 0, "<eos>": 60} | {str(i): i for i in range(1, 60)}
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=Fast(WordLevel(words, unk_token="1")), pad_token="<pad>", eos_token="<eos>"
        )


def train(model, folder, options=None, kind=None, **args):
    plain = {
        **plain_arguments(folder),
        "bf16": False,
        "gradient_checkpointing": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    trainer = (kind or SelectiveSFT)(
        model=model,
        args=trl.SFTConfig(**(plain | args)),
        train_dataset=data(),
        processing_class=Tokenizer(),
        **({} if PADS_LABELS else {"data_collator": transformers.DataCollatorForSeq2Seq(Tokenizer())}),
        **({} if options is None else {"selective": options}),
    )
    trainer.train()
    return trainer


PADS_LABELS = trl.trainer.sft_trainer.DataCollatorForLanguageModeling.__module__.startswith("trl.")
OWN_METRICS = "compute_loss" in vars(trl.SFTTrainer)
FUSED = hasattr(trl.trainer.utils, "add_fused_lm_head")  # and with it, smoothing divides by all labels


def require(args):
    missing = set(args) - set(inspect.signature(trl.SFTConfig).parameters)
    if missing or ("label_smoothing_factor" in args and not FUSED):
        pytest.skip(f"this TRL has not, or not rightly: {', '.join(missing or args)}")


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


CASES = {
    "llama": (llama, {}),
    "accumulated": (llama, {"gradient_accumulation_steps": 2}),
    "smoothed": (llama, {"label_smoothing_factor": 0.1}),
    "checkpointing": (llama, {"gradient_checkpointing": True}),
    "experts": (lambda: mixtral(output_router_logits=True), {"router_aux_loss_coef": 0.5}),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backward", ["rows", pytest.param("recompute", marks=pytest.mark.slow)])
def test_all_rows_train_as_the_plain_trainer_does_and_its_metrics_stay(name, backward, tmp_path):
    build, args = CASES[name]
    require(args)
    ours, plain = build(), build()
    start = weights(plain).clone()
    selecting = train(ours, tmp_path, {**FULL, "backward": backward}, **args)
    theirs = train(plain, tmp_path, kind=trl.SFTTrainer, **args)
    assert difference(ours, plain, start) < 2e-5
    for metric in METRICS if OWN_METRICS else ():
        assert logged(selecting, metric) == pytest.approx(logged(theirs, metric), rel=1e-4), metric


@pytest.mark.parametrize("rule", [selbp.GradientMatching, selbp.Random], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_metrics_are_those_of_the_rows_that_ran(rule, backward, tmp_path):
    if not OWN_METRICS:
        pytest.skip("this TRL has no metrics of its own")
    trainer = train(llama(), tmp_path, {"selector": rule(), "keep": 0.25, "backward": backward}, max_steps=1)
    assert trainer.selective_step.report.k == 2
    theirs = train(llama(), tmp_path, kind=trl.SFTTrainer, max_steps=1)
    rel = 1e-4 if rule is selbp.GradientMatching else 0.1
    assert logged(trainer, "entropy") == pytest.approx(logged(theirs, "entropy"), rel=rel)
    if FUSED or rule is selbp.GradientMatching:
        assert logged(trainer, "num_tokens") == logged(theirs, "num_tokens")
    assert "gain" in trainer.state.log_history[0] or rule is selbp.Random


@pytest.mark.parametrize("rule", [selbp.TopLoss, selbp.LossPercentile], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_metrics_of_all_rows_in_whatever_order_a_rule_has_them(rule, backward, tmp_path):
    """Each row's logits meet its own labels."""

    def build():
        model = llama()
        model.lm_head.weight.data.mul_(50.0)  # the tokens' entropies differ
        return model

    selecting = train(build(), tmp_path, {"selector": rule(), "keep": 1.0, "backward": backward}, max_steps=1)
    theirs = train(build(), tmp_path, kind=trl.SFTTrainer, max_steps=1)
    for metric in METRICS if OWN_METRICS else ():
        assert logged(selecting, metric) == pytest.approx(logged(theirs, metric), rel=1e-4), metric


def test_low_rank_adapters(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")

    def build():
        config = peft.LoraConfig(
            r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
        )
        return peft.get_peft_model(llama(), config)

    ours, plain = build(), build()
    start = weights(plain).clone()
    train(ours, tmp_path, {**FULL, "backward": "rows"})
    train(plain, tmp_path, kind=trl.SFTTrainer)
    assert difference(ours, plain, start) < 2e-5
    trainer = train(build(), tmp_path, {"selector": selbp.GradientMatching(), "keep": 0.25})
    assert trainer.selective_step.head is trainer.model.get_base_model().lm_head


def test_losses_that_a_step_would_replace_are_refused(tmp_path):
    require({"loss_type": "dft"})
    trainer = train(llama(), tmp_path, kind=trl.SFTTrainer, loss_type="dft", max_steps=1)
    with pytest.raises(ValueError, match="SFTTrainer has a loss of its own"):
        selective(trainer, **FULL)


@pytest.mark.skipif(not FUSED, reason="this TRL leaves no mark of packing in the batch on a CPU")
def test_a_packed_batch_trains_as_a_padded_one(tmp_path):
    """Its sequences are the samples; TRL's own figures are of the same tokens."""
    found = []
    for padding_free in (False, True):
        rule = {"selector": selbp.TopLoss(), "keep": 0.5}
        trainer = train(llama(), tmp_path, rule, padding_free=padding_free, max_length=None)
        found.append((trainer.model, [logged(trainer, name) for name in ("loss", *METRICS)]))
    (want, figures), (got, others) = found
    assert difference(got, want, weights(llama())) < 1e-5
    for figure, other in zip(figures, others, strict=True):
        assert other == pytest.approx(figure, rel=1e-3)
