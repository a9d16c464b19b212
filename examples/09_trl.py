"""TRL's SFTTrainer, built as ever, then made selective: gradient matching over sequences, TRL's own metrics beside it.

pip install trl
python examples/09_trl.py
"""

import tempfile

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import selbp
from selbp.integrations.huggingface import selective

VOCABULARY = 101


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<eos>": 1} | {str(i): i for i in range(2, VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="2"))
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def data() -> Dataset:
    """Sequences of different lengths that count upwards; the first tokens are a prompt."""
    ids = [[2 + (first + t) % 99 for t in range(8 + first % 9)] for first in range(512)]
    labels = [[-100] * 3 + row[3:] for row in ids]
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            max_steps=20,
            per_device_train_batch_size=16,
            learning_rate=1e-2,
            logging_steps=5,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(model(), arguments, train_dataset=data(), processing_class=tokenizer())
        selective(trainer, selector=selbp.GradientMatching(), keep=0.25).train()
        last = [line for line in trainer.state.log_history if "loss" in line][-1]
        names = ("loss", "mean_token_accuracy", "gain", "relative_residual")
        print(", ".join(f"{name} {last[name]:.3f}" for name in names))


if __name__ == "__main__":
    main()
