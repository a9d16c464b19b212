"""A Lightning module that selects, and the callback that counts, logs and saves its state with the checkpoints.

pip install lightning
python examples/11_lightning.py
"""

import tempfile
from pathlib import Path

import lightning
import torch
from torch import nn

import selbp
from selbp.integrations.lightning import SelectiveCallback


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5))
        self.step = selbp.SelectiveBackprop(self.model, selector=selbp.GradientMatching(), keep=0.25)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return self.step(*batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.model.parameters(), 0.2, momentum=0.9)


def loader() -> torch.utils.data.DataLoader:
    torch.manual_seed(0)
    x = torch.randn(1024, 20)
    y = (x @ torch.randn(20, 5)).argmax(1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=64)


def trainer(folder: str, epochs: int) -> lightning.Trainer:
    return lightning.Trainer(
        max_epochs=epochs,
        accelerator="auto",
        devices=1,
        callbacks=[SelectiveCallback()],
        log_every_n_steps=4,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accumulate_grad_batches=2,
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        first = trainer(folder, 1)
        first.fit(Classifier(), loader())
        first.save_checkpoint(Path(folder, "half.ckpt"))
        module, second = Classifier(), trainer(folder, 3)
        second.fit(module, loader(), ckpt_path=str(Path(folder, "half.ckpt")))
        logged = second.callback_metrics
        names = ("batch_loss", "batch_accuracy", "gain")
        print(", ".join(f"{name} {float(logged['selective/' + name]):.3f}" for name in names))


if __name__ == "__main__":
    main()
