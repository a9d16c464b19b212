"""What a run reads: the order of the training samples, and the evaluation of a model on the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from selbp_study.data import Split


def evaluate(model: nn.Module, split: Split, device: torch.device, rows: int = 250) -> tuple[float, float]:
    """Accuracy in per cent and mean loss over all labels of ``split``; the model's mode is put back.

    Logits are (n, C) for labels (n,), or (n, T, C) for a text's (n, T): then it is the next character's accuracy.
    """
    training = model.training
    model.eval()
    correct, loss, labels = 0, 0.0, split.labels.numel()
    with torch.no_grad():
        for part in torch.arange(len(split), device=device).split(rows):
            inputs, target = split.batch(part)
            logits, target = model(inputs).flatten(0, -2), target.flatten()
            correct += int((logits.argmax(1) == target).sum())
            loss += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
    model.train(training)
    return 100.0 * correct / labels, loss / labels


class BatchOrder:
    """Which samples step t reads: a fresh permutation each epoch, drawn from (seed, epoch) alone.

    The position in the data is a function of the step, so a resumed run needs no more than its number. The last,
    incomplete batch of an epoch is dropped.
    """

    charged = False  # what is read does not depend on what is read

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if batch_size > n:
            raise ValueError(f"batch_size must be at most the {n} training samples, got {batch_size}")
        self.n, self.batch_size, self.seed = n, batch_size, seed
        self.per_epoch = n // batch_size
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> Tensor:
        """(batch_size,) int64 sample numbers of step ``step``."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        return self._order[position * self.batch_size : (position + 1) * self.batch_size]

    def elsewhere(self, step: int) -> Tensor:
        """As many samples as a step reads: those of step ``step``."""
        return self.indices(step)

    def state(self) -> None:
        """Nothing: the step's number is all that the order depends on."""

    def load_state(self, state: object) -> None:
        """The inverse of :meth:`state`."""
