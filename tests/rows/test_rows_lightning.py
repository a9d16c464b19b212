"""A cut in a LightningModule: nothing else of it, or of its trainer, changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import selbp

lightning: Any = pytest.importorskip("lightning", reason="lightning is not installed")
pytestmark = pytest.mark.slow


def test_a_cut_under_lightning(tmp_path: Any) -> None:
    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.cut = selbp.BackwardCut(0.25)
            self.model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), self.cut, nn.Linear(16, 5))

        def training_step(self, batch: Any, index: int) -> Tensor:
            x, y = batch
            return F.cross_entropy(self.model(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), 1e-2)

    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(32, 6), torch.randint(5, (32,)))
    module = Module()
    before = [p.detach().clone() for p in module.parameters()]
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    assert (module.cut.report.n, module.cut.report.k) == (8, 2) and not module.cut.report.dense
    assert all(not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))
