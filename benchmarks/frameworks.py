"""A few steps of training in each framework, with its own loop, for ``python -m benchmarks integrations``.

Each function trains ``model`` on ``rows``, a minibatch a step, in the order given, by SGD with the learning rate
``rate``. It calls ``before()`` and ``after()`` around each step, optimizer and all, and returns the selective step, or
None where ``options`` is None: then the framework trains as it does by itself.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import selbp

Note = Callable[[], None]


class Lines(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Samples by number, of columns (n, ...)."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns["input_ids"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def minibatches(rows: dict[str, Tensor], n: int) -> list[dict[str, Tensor]]:
    """``rows`` in parts of n."""
    parts = {name: column.split(n) for name, column in rows.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(rows["input_ids"]) // n)]


def mean_loss(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss by the token, as the model's own."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


def plain(model: Any, rows: Any, n: int, rate: float, options: Any, before: Note, after: Note) -> Any:
    """A loop by hand."""
    step = None if options is None else selbp.SelectiveBackprop(model, **options)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for batch in minibatches(rows, n):
        before()
        (mean_loss(model, batch) if step is None else step(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        after()
    return step


def accelerate(model: Any, rows: Any, n: int, rate: float, options: Any, before: Note, after: Note) -> Any:
    """Accelerate."""
    from accelerate import Accelerator

    from selbp.integrations.accelerate import AcceleratedStep

    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    loader = torch.utils.data.DataLoader(Lines(rows), batch_size=n)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = None if options is None else AcceleratedStep(accelerator, model, **options)
    for batch in loader:
        before()
        accelerator.backward(mean_loss(model, batch) if step is None else step(batch))
        optimizer.step()
        optimizer.zero_grad()
        after()
    return step


def lightning(model: Any, rows: Any, n: int, rate: float, options: Any, before: Note, after: Note) -> Any:
    """Lightning."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    from selbp.integrations.lightning import SelectiveCallback

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self.step = None if options is None else selbp.SelectiveBackprop(model, **options)

        def training_step(self, batch: Any, index: int) -> Any:
            return mean_loss(self.model, batch) if self.step is None else self.step(batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.model.parameters(), rate)

    class Around(Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            before()

        def on_train_batch_end(self, *_: Any) -> None:
            after()

    module = Module()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            barebones=False,
            callbacks=[Around()] if options is None else [Around(), SelectiveCallback(log=False)],
        )
        trainer.fit(module, torch.utils.data.DataLoader(Lines(rows), batch_size=n))
    return module.step


def trainer(model: Any, rows: Any, n: int, rate: float, options: Any, before: Note, after: Note) -> Any:
    """The Trainer of Transformers."""
    from transformers import Trainer, TrainingArguments

    return _huggingface(Trainer, TrainingArguments, model, Lines(rows), n, rate, options, before, after)


def sft(model: Any, rows: Any, n: int, rate: float, options: Any, before: Note, after: Note) -> Any:
    """TRL's SFTTrainer, which reads its metrics off the same forward."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {"<pad>": 0, "<end>": 1} | {str(i): i for i in range(2, 8)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="2")), pad_token="<pad>", eos_token="<end>"
    )
    lengths = rows["attention_mask"].sum(1).tolist()
    lists = {
        name: [row[:k].tolist() for row, k in zip(rows[name], lengths, strict=True)] for name in ("input_ids", "labels")
    }
    data = datasets.Dataset.from_dict(lists)
    extra = {"dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False}
    return _huggingface(
        SFTTrainer, SFTConfig, model, data, n, rate, options, before, after, extra, processing_class=tokenizer
    )


def _huggingface(
    kind: Any,
    arguments: Any,
    model: Any,
    data: Any,
    n: int,
    rate: float,
    options: Any,
    before: Note,
    after: Note,
    extra: Any = None,
    **more: Any,
) -> Any:
    import transformers

    from selbp.integrations.huggingface import selective

    transformers.logging.set_verbosity_error()

    class Around(transformers.TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            before()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            after()

    with tempfile.TemporaryDirectory() as folder:
        made = arguments(
            output_dir=folder,
            per_device_train_batch_size=n,
            num_train_epochs=1,
            learning_rate=rate,
            optim="sgd",
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            bf16=False,
            logging_strategy="no",
            **(extra or {}),
        )
        trained = kind(model=model, args=made, train_dataset=data, callbacks=[Around()], **more)
        if options is not None:
            selective(trained, **options)
        trained.remove_callback(transformers.PrinterCallback)
        trained.train()
        return None if options is None else trained.selective_step


FRAMEWORKS = {
    "by hand": (plain, ()),
    "Trainer": (trainer, ("accelerate",)),
    "TRL SFT": (sft, ("trl", "datasets", "tokenizers")),
    "Accelerate": (accelerate, ("accelerate",)),
    "Lightning": (lightning, ("lightning",)),
}
