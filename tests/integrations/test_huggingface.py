"""Transformers' Trainer with selective steps: equal to the plain one where all rows are kept, else to a plain loop."""

from __future__ import annotations

import inspect
import math
import random
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selbp

pytest.importorskip("accelerate", reason="accelerate is not installed")
transformers: Any = pytest.importorskip("transformers", reason="transformers is not installed")

from support.hf_kit import (  # noqa: E402
    SAMPLES,
    STILL,
    TEXT,
    VOCABULARY,
    Rows,
    arguments,
    bert,
    classes,
    difference,
    llama,
    mixtral,
    texts,
    tokens,
    weights,
)

from selbp.integrations.huggingface import SelectiveTrainerMixin, selective  # noqa: E402

transformers.logging.set_verbosity_error()
FULL = {"selector": selbp.Full(), "keep": 1.0}
NEWER = "num_items_in_batch"
SHIFTS = "_loss_shifts_labels" in inspect.getsource(transformers.Trainer.__init__)  # before it counts labels


def parameters(function):
    return inspect.signature(function).parameters


class SelectiveTrainer(SelectiveTrainerMixin, transformers.Trainer):
    pass


def train(model, folder, data, options=None, kind=None, extra=None, **args):
    trainer = (kind or SelectiveTrainer)(
        model=model,
        args=arguments(folder, **args),
        train_dataset=data,
        **({} if options is None else {"selective": options}),
        **(extra or {}),
    )
    trainer.train()
    return trainer


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]


CASES = {
    "classifier": (bert, classes, {}, {}),
    "causal": (llama, texts, {}, {}),
    "causal, accumulated over ragged labels": (llama, texts, {"gradient_accumulation_steps": 4}, {}),
    "causal, tied, accumulated": (lambda: llama(tie_word_embeddings=True), texts,
                                  {"gradient_accumulation_steps": 2}, {}),
    "classifier, smoothed": (bert, classes, {"label_smoothing_factor": 0.1}, {}),
    "causal, smoothed, accumulated": (llama, texts, {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
                                      {}),
    "experts with a router loss": (lambda: mixtral(output_router_logits=True, router_aux_loss_coef=0.5), texts, {}, {}),
    "regression": (lambda: bert(num_labels=1), lambda: classes(torch.rand(SAMPLES)), {}, {}),
    "several labels": (lambda: bert(problem_type="multi_label_classification"),
                       lambda: classes(torch.randint(0, 2, (SAMPLES, 4)).float()), {}, {}),
    "checkpointing": (llama, texts, {"gradient_checkpointing": True}, {}),
    "reentrant checkpointing": (llama, texts, {"gradient_checkpointing": True,
                                "gradient_checkpointing_kwargs": {"use_reentrant": True}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("backward", ["rows", pytest.param("recompute", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_all_rows_train_as_the_plain_trainer_does(name, backward, tmp_path):
    if NEWER not in parameters(transformers.trainer_pt_utils.LabelSmoother.__call__) and "smoothed, acc" in name:
        pytest.skip("this transformers divides a smoothed loss by each minibatch's own labels")
    if not SHIFTS and "router" in name:
        pytest.skip("this transformers counts the first token, which has no loss, among the labels")
    build, data, args, options = CASES[name]
    torch.manual_seed(0)
    samples, ours, plain = data(), build(), build()
    start = weights(plain).clone()
    trainer = train(ours, tmp_path, samples, {**FULL, "backward": backward, **options}, **args)
    theirs = train(plain, tmp_path, samples, kind=transformers.Trainer, **args)
    assert difference(ours, plain, start) < 1e-5
    if "experts" not in name:  # the logged loss is the minibatch's, without the router's
        assert logged(trainer, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-3)


def bart():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "dropout": 0.0}
    config = transformers.BartConfig(vocab_size=VOCABULARY, max_position_embeddings=32, is_decoder=True, **sizes)
    return transformers.BartForCausalLM(config)


@pytest.mark.parametrize("args", [{}, {"label_smoothing_factor": 0.1}], ids=["plain", "smoothed"])
def test_a_decoder_that_does_not_shift_its_labels_trains_as_the_plain_trainer_does(args, tmp_path):
    """Its name is that of those that do; the trainer's smoothed loss shifts them all the same."""
    ours, plain = bart().double(), bart().double()
    start = weights(plain).clone()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "BartForCausalLM predicts the next token")
        trainer = train(ours, tmp_path, texts(), {"selector": selbp.TopLoss(), "keep": 1.0}, **args)
    train(plain, tmp_path, texts(), kind=transformers.Trainer, **args)
    assert difference(ours, plain, start) < 1e-6  # the trainer's own loss is float32
    assert trainer.selective_step._criterion.shift == bool(args)


class OddForSequenceClassification(transformers.BertForSequenceClassification):
    """Its loss is not what its name says."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            output.loss = output.loss + self.classifier.weight.abs().mean()
        return output


def test_a_model_whose_loss_is_not_what_its_name_says_is_refused(tmp_path):
    model = OddForSequenceClassification(transformers.BertConfig(**TEXT, num_labels=4))
    with pytest.raises(ValueError, match="the loss of OddForSequenceClassification is not 'cross_entropy'"):
        train(model, tmp_path, classes(), FULL, remove_unused_columns=False)
    train(model, tmp_path, classes(), {**FULL, "loss": "cross_entropy"}, max_steps=1, remove_unused_columns=False)


class Restless(transformers.BertForSequenceClassification):
    """Draws and counts in every forward, in evaluation mode too."""

    def __init__(self, config):
        super().__init__(config)
        self.register_buffer("seen", torch.zeros(()))
        self.modes = []

    def forward(self, *args, **kwargs):
        self.seen += torch.rand(()) + random.random()
        self.modes.append(self.training)
        return super().forward(*args, **kwargs)


def test_looking_at_a_models_own_loss_leaves_no_trace(tmp_path):
    found = []
    for options in (FULL, {**FULL, "loss": "cross_entropy"}):
        torch.manual_seed(0), random.seed(0)
        model = Restless(transformers.BertConfig(**TEXT, num_labels=4))
        train(model, tmp_path, classes(), options, remove_unused_columns=False)
        found.append(model)
    looked, told = found
    assert torch.equal(weights(looked), weights(told)) and torch.equal(looked.seen, told.seen)
    assert looked.modes == [False, *told.modes]


class Alone(transformers.Trainer):
    def training_step(self, model, inputs, *args, **kwargs):
        model.train()
        loss = model(**inputs).loss
        loss.backward()
        return loss.detach()


def test_a_trainer_that_trains_past_its_loss_is_told_so(tmp_path):
    trainer = selective(Alone(bert(), arguments(tmp_path), train_dataset=classes()), **FULL)
    with pytest.raises(RuntimeError, match="nothing was selected: SelectiveAlone.training_step"):
        trainer.train()


def test_an_accumulated_classifier_trains_as_on_the_whole_batch(tmp_path):
    ours, plain = bert(), bert()
    start = weights(plain).clone()
    train(ours, tmp_path, classes(), FULL, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    train(plain, tmp_path, classes(), kind=transformers.Trainer, per_device_train_batch_size=16)
    assert difference(ours, plain, start) < 1e-5


def recording():
    """What the trainer's sampler gives: the same seed, the same order."""
    recorded: list[dict[str, torch.Tensor]] = []

    class Recorder(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            recorded.append({key: value.clone() for key, value in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    return recorded, Recorder


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_chosen_rows_train_as_a_loop_by_hand(backward, tmp_path):
    steps, accumulated, size, keep = 2, 2, 8, 3
    recorded, recorder = recording()
    train(llama(), tmp_path, texts(), kind=recorder, max_steps=steps, gradient_accumulation_steps=accumulated)
    ours, plain = llama().double(), llama().double()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(steps):
        batches = recorded[step * accumulated : (step + 1) * accumulated]
        count = sum(int((batch["labels"][:, int(SHIFTS) :] != -100).sum()) for batch in batches)
        for batch in batches:
            logits = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            entries = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none")
            losses = entries.sum(1)
            top = losses.detach().topk(keep).indices
            (losses[top].sum() * (size / keep) / count).backward()
        optimizer.step(), optimizer.zero_grad()
    options = {"selector": selbp.TopLoss(), "keep": keep, "backward": backward}
    trainer = train(ours, tmp_path, texts(), options, max_steps=steps, gradient_accumulation_steps=accumulated)
    assert float((weights(ours) - weights(plain)).abs().max()) < 1e-12
    assert trainer.selective_step.optimizer_step == steps - 1 and trainer.selective_step.report.backward == backward


def test_the_log_has_the_unweighted_loss_and_what_was_chosen(tmp_path):
    plain = train(bert(), tmp_path, classes(), kind=transformers.Trainer, max_steps=1)
    ours = train(bert(), tmp_path, classes(), {"selector": selbp.GradientMatching(), "keep": 0.25}, max_steps=1)
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-3)
    for name in ("batch_accuracy", "gain", "relative_residual", "kept", "forward_seconds", "backward_seconds"):
        (value,) = logged(ours, name)
        assert math.isfinite(value) and value >= 0, name


@pytest.mark.parametrize(
    "rule",
    [selbp.LossPercentile, selbp.Random, selbp.GradNormImportance],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize("own_generator", [pytest.param(False, marks=pytest.mark.slow), True], ids=["global", "own"])
def test_a_resumed_run_goes_on_bit_for_bit(rule, own_generator, tmp_path):
    def options():
        generator = torch.Generator().manual_seed(5) if own_generator else None
        return {"selector": rule(), "keep": 0.25, "generator": generator}

    common = {"optim": "adamw_torch", "learning_rate": 1e-3}
    whole = bert()
    train(whole, tmp_path / "whole", classes(), options(), max_steps=5, **common)
    train(bert(), tmp_path / "part", classes(), options(), max_steps=2, save_strategy="steps", save_steps=2, **common)
    resumed = SelectiveTrainer(
        model=bert(),
        args=arguments(tmp_path / "part", max_steps=5, **common),
        train_dataset=classes(),
        selective=options(),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole))
    assert resumed.selective_step.optimizer_step == 4


def test_a_checkpoint_without_our_state_is_warned_of(tmp_path):
    train(bert(), tmp_path, classes(), kind=transformers.Trainer, save_strategy="steps", save_steps=2)
    trainer = SelectiveTrainer(
        model=bert(), args=arguments(tmp_path, max_steps=3), train_dataset=classes(), selective=dict(FULL)
    )
    with pytest.warns(UserWarning, match="holds no selbp_state_0.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_trainer_that_is_built_already(tmp_path):
    ours, plain = bert(), bert()
    trainer = transformers.Trainer(model=ours, args=arguments(tmp_path), train_dataset=classes())
    assert selective(trainer, selector=selbp.TopLoss(), keep=0.25) is trainer
    assert isinstance(trainer, transformers.Trainer) and type(trainer).__name__ == "SelectiveTrainer"
    trainer.train()
    train(plain, tmp_path, classes(), {"selector": selbp.TopLoss(), "keep": 0.25})
    assert torch.equal(weights(ours), weights(plain))
    with pytest.raises(TypeError, match="must be a transformers.Trainer"):
        selective(object(), **FULL)
    with pytest.raises(TypeError, match="at least 'selector' and 'keep'"):
        selective(transformers.Trainer(model=bert(), args=arguments(tmp_path)), keep=0.25)
    with pytest.raises(ValueError, match="micro_batch= runs backwards of its own"):
        selective(transformers.Trainer(model=bert(), args=arguments(tmp_path)), **FULL, micro_batch=4)


def test_evaluation_is_the_trainers_own(tmp_path):
    data = classes()
    found = []
    for kind, options in ((transformers.Trainer, None), (SelectiveTrainer, {**FULL, "keep": 0.25})):
        trainer = kind(
            model=bert(),
            args=arguments(tmp_path),
            eval_dataset=data,
            **({} if options is None else {"selective": options}),
        )
        found.append((trainer.evaluate()["eval_loss"], trainer.predict(data).predictions))
    assert found[0][0] == found[1][0] and (found[0][1] == found[1][1]).all()


def test_without_options_it_is_a_plain_trainer(tmp_path):
    ours, plain = bert(), bert()
    trainer = train(ours, tmp_path, classes())
    train(plain, tmp_path, classes(), kind=transformers.Trainer)
    assert torch.equal(weights(ours), weights(plain))
    with pytest.raises(RuntimeError, match="no selective step"):
        trainer.selective_step  # noqa: B018


def test_a_schedule_counts_optimizer_steps(tmp_path):
    seen = []

    class Recording(SelectiveTrainer):
        def training_step(self, *args, **kwargs):
            result = super().training_step(*args, **kwargs)
            seen.append(self.selective_step.report.selected)
            return result

    options = {"selector": selbp.TopLoss(), "keep": 0.25, "schedule": selbp.Schedule(start=1)}
    train(bert(), tmp_path, classes(), options, Recording, gradient_accumulation_steps=2, max_steps=3)
    assert seen == [False, False, True, True, True, True]


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_bfloat16(backward, tmp_path):
    options = {"selector": selbp.GradientMatching(), "keep": 0.25, "backward": backward}
    high, low = (train(llama(), tmp_path, texts(), options, bf16=bf16, max_steps=1) for bf16 in (False, True))
    a, b = (trainer.selective_step.report for trainer in (low, high))
    assert a.loss == pytest.approx(b.loss, rel=1e-2)
    assert a.relative_residual == pytest.approx(b.relative_residual, rel=0.05)


def test_a_loss_function_of_ones_own(tmp_path):
    def losses(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels, reduction="none").square()

    def mean(outputs, labels, num_items_in_batch=None):
        return losses(outputs, labels).mean() / 2  # of two accumulated minibatches

    ours, plain = bert(), bert()
    start = weights(plain).clone()
    args = {"gradient_accumulation_steps": 2}
    train(ours, tmp_path, classes(), FULL, extra={"compute_loss_func": losses}, **args)
    train(plain, tmp_path, classes(), kind=transformers.Trainer, extra={"compute_loss_func": mean}, **args)
    assert difference(ours, plain, start) < 1e-5
    with pytest.raises(ValueError, match="compute_loss_func must return one loss per sample"):
        train(bert(), tmp_path, classes(), FULL, extra={"compute_loss_func": mean})
    with pytest.raises(ValueError, match="two losses: pass one"):
        train(bert(), tmp_path, classes(), {**FULL, "loss": "mse"}, extra={"compute_loss_func": losses})


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def answers():
    torch.manual_seed(0)
    return transformers.BertForQuestionAnswering(transformers.BertConfig(**TEXT, **STILL))


def questions():
    generator = torch.Generator().manual_seed(4)
    ids = tokens()
    places = {f"{name}_positions": torch.randint(0, 10, (SAMPLES,), generator=generator) for name in ("start", "end")}
    return Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids), **places})


@pytest.mark.parametrize(("build", "data"), [(t5, texts), (answers, questions)], ids=["T5", "questions"])
@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_tasks_whose_targets_are_not_labels_alone(build, data, backward, tmp_path):
    ours, plain = build(), build()
    start = weights(plain).clone()
    train(ours, tmp_path, data(), {**FULL, "backward": backward}, max_steps=1)
    train(plain, tmp_path, data(), kind=transformers.Trainer, max_steps=1)
    assert difference(ours, plain, start) < 1e-5
    trainer = train(build(), tmp_path, data(), {"selector": selbp.GradientMatching(), "keep": 0.25})
    assert trainer.selective_step.report.k == 2


def test_a_model_of_an_unknown_task_needs_a_loss(tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(10, 4)

        def forward(self, input_ids, labels=None):
            return {"logits": self.head(input_ids.float())}

    data = Rows({"input_ids": tokens(), "labels": torch.zeros(SAMPLES, dtype=torch.int64)})
    with pytest.raises(ValueError, match="the loss of Plain is not known: pass loss="):
        train(Plain(), tmp_path, data, FULL)
    train(Plain(), tmp_path, data, {**FULL, "loss": "cross_entropy"})


def test_a_trainer_with_another_loss_is_refused(tmp_path):
    class Other(transformers.Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return super().compute_loss(model, inputs, *args, **kwargs) * 2

    class Selecting(SelectiveTrainerMixin, Other):
        pass

    with pytest.raises(ValueError, match="Other has a loss of its own"):
        train(bert(), tmp_path, classes(), FULL, Selecting)
    trainer = Other(model=bert(), args=arguments(tmp_path))
    with pytest.raises(ValueError, match="Other has a loss of its own"):
        selective(trainer, **FULL)
    assert type(trainer) is Other
    train(bert(), tmp_path, classes(), {**FULL, "loss": "cross_entropy"}, Selecting)  # said outright


def test_a_cut_and_an_inserted_one_under_the_trainer(tmp_path):
    trainer = train(
        llama(), tmp_path, texts(), {"selector": selbp.GradientMatching(), "keep": 0.25, "cut": "model.layers.1"}
    )
    assert trainer.selective_step.report.cut.k == 2
    model = llama(tie_word_embeddings=True)
    cut = selbp.insert_cut(model, "lm_head", keep=0.25, at="input")
    train(model, tmp_path, texts(), kind=transformers.Trainer, save_strategy="steps", save_steps=2)
    assert (cut.report.n, cut.report.k) == (8, 2)
    loaded, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_a_low_rank_adapter_on_the_head(backward):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    model, batch = peft.get_peft_model(llama().double(), config), texts()[:]
    step = selbp.SelectiveBackprop(
        model, selector=selbp.GradientMatching(), keep=0.25, loss="causal_lm", backward=backward
    )
    assert step.head is model.get_base_model().lm_head
    step(batch).backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert any("lm_head.lora_A" in name for name in got) and step.report.relative_residual < 1
    model.zero_grad()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), batch["labels"][:, 1:], reduction="none").sum(1)
    indices, chosen = step.report.selection
    count = (batch["labels"][:, 1:] != -100).sum()
    ((losses[indices] * chosen).sum() * len(losses) / count).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-9, atol=1e-12)


def test_nothing_of_it_is_imported_with_the_library():
    import subprocess
    import sys

    code = "import sys, selbp; assert not {'transformers', 'accelerate', 'lightning', 'trl'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    code = "import sys, selbp.integrations.huggingface; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
def test_torch_compile(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"selector": selbp.GradientMatching(), "keep": 0.25, "backward": "rows"}
        ours, plain = bert(), bert()
        start = weights(plain).clone()
        train(ours, tmp_path, classes(), options, torch_compile=True, torch_compile_backend="aot_eager")
        train(plain, tmp_path, classes(), options)
    assert difference(ours, plain, start) < 1e-4
