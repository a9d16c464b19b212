"""Hugging Face's Trainer on a quarter of each minibatch: a tiny Llama, random text, gradient accumulation, a resume.

pip install transformers accelerate
python examples/08_huggingface.py
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import selbp
from selbp.integrations.huggingface import SelectiveTrainerMixin

VOCABULARY, LENGTH = 101, 24


class SelectiveTrainer(SelectiveTrainerMixin, Trainer):
    """That is all: the mixin goes first."""


class Texts(torch.utils.data.Dataset):
    """Counts upwards from a random number. The labels begin after a prompt, whose length differs."""

    def __init__(self, n: int) -> None:
        self.first = torch.randint(1, VOCABULARY, (n,))

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = (self.first[index] + torch.arange(LENGTH)) % VOCABULARY
        labels = ids.clone()
        labels[: index % 8] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def trainer(folder: str, steps: int) -> SelectiveTrainer:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=5,
        save_steps=10,
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    torch.manual_seed(0)
    data = Texts(512)
    options = dict(
        selector=selbp.TopLoss(), keep=0.25, schedule=selbp.Schedule(start=2)
    )  # loss: the model's task tells
    return SelectiveTrainer(model(), arguments, train_dataset=data, eval_dataset=data, selective=options)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer(folder, 10).train()
        resumed = trainer(folder, 20)
        resumed.train(resume_from_checkpoint=True)  # the rule goes on as it was
        print(f"evaluation loss {resumed.evaluate()['eval_loss']:.3f}, kept {resumed.selective_step.report.k} of 16")


if __name__ == "__main__":
    main()
