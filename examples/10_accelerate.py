"""A loop of one's own under Accelerate: accumulation over ragged labels, and a checkpoint that has the rule's memory.

pip install accelerate
python examples/10_accelerate.py          # or: accelerate launch --num_processes 2 --cpu examples/10_accelerate.py
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn

import selbp
from selbp.integrations.accelerate import AcceleratedStep

ACCUMULATE = 4


class Tagger(nn.Module):
    """Token ids (n, T) to logits (n, T, 7)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(50, 16), nn.GRU(16, 32, batch_first=True)
        self.head = nn.Linear(32, 7)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.embed(ids))[0])


def data(n: int = 512, length: int = 12) -> torch.utils.data.TensorDataset:
    ids = torch.randint(0, 50, (n, length))
    tags = ids % 7
    tags[torch.arange(length) >= torch.randint(3, length, (n, 1))] = -100  # past the sentence's end
    return torch.utils.data.TensorDataset(ids, tags)


def main() -> None:
    accelerator = Accelerator(gradient_accumulation_steps=ACCUMULATE)
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loader = torch.utils.data.DataLoader(data(), batch_size=16)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    step = AcceleratedStep(accelerator, model, selector=selbp.LossPercentile(), keep=0.5)

    for _ in range(3):
        minibatches = list(loader)
        for first in range(0, len(minibatches), ACCUMULATE):
            together = minibatches[first : first + ACCUMULATE]
            count = torch.stack([(tags != -100).sum() for _, tags in together]).sum()
            count = accelerator.gather(count.reshape(1)).sum()  # targets of all processes
            for ids, tags in together:
                with accelerator.accumulate(model):
                    accelerator.backward(step(ids, tags, normalizer=count))
                    optimizer.step()
                    optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        accelerator.load_state(folder)
    report = step.report
    accelerator.print(f"loss {report.loss:.3f}, accuracy {report.accuracy:.2f}, {step.optimizer_step} optimizer steps")


if __name__ == "__main__":
    main()
