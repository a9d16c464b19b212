"""Lightning with selective steps: gradients, the count of optimizer steps, checkpoints and the log."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selbp

lightning: Any = pytest.importorskip("lightning", reason="lightning is not installed")

from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from selbp.integrations.lightning import SelectiveCallback  # noqa: E402


def data(n=36):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator).double(), torch.randint(0, 5, (n,), generator=generator)


def loader():
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=6)


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


class Module(lightning.LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.net, self.selected = network(), []
        self.step = selbp.SelectiveBackprop(self.net, **options) if options else None

    def training_step(self, batch: Any, index: int) -> Any:
        x, y = batch
        if self.step is None:
            return F.cross_entropy(self.net(x), y)
        loss = self.step(x, y)
        self.selected.append(self.step.report.selected)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), 0.1)


def fit(module, folder, callback=None, resume=None, batches=None, **options):
    callback = callback or SelectiveCallback()
    trainer = lightning.Trainer(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[callback],
        **({"max_epochs": 1, "logger": False} | options),
    )
    trainer.fit(module, loader() if batches is None else batches, ckpt_path=resume)
    return trainer


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.net.parameters()])


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_it_trains_as_a_loop_by_hand(backward, tmp_path):
    module = Module(selector=selbp.TopLoss(), keep=2, backward=backward)
    fit(module, tmp_path, accumulate_grad_batches=2)
    plain, (x, y) = network(), data()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for i in range(6):
        losses = F.cross_entropy(plain(x[6 * i : 6 * i + 6]), y[6 * i : 6 * i + 6], reduction="none")
        (losses.topk(2).values.mean() / 2).backward()
        if i % 2:
            optimizer.step(), optimizer.zero_grad()
    expected = torch.cat([p.detach().flatten() for p in plain.parameters()])
    assert float((weights(module) - expected).abs().max()) < 1e-12


def test_a_schedule_counts_optimizer_steps(tmp_path):
    module = Module(selector=selbp.TopLoss(), keep=2, schedule=selbp.Schedule(start=1))
    fit(module, tmp_path, accumulate_grad_batches=3)
    assert module.selected == [False] * 3 + [True] * 3


class TwoOptimizers(Module):
    """Each batch trains the network ``calls`` times, and then something beside it."""

    def __init__(self, calls: int, **options: Any) -> None:
        super().__init__(**options)
        self.automatic_optimization, self.calls = False, calls
        self.other = nn.Linear(6, 1).double()

    def training_step(self, batch: Any, index: int) -> None:
        first, second = self.optimizers()
        losses = [(first, lambda: super(TwoOptimizers, self).training_step(batch, index))] * self.calls
        for optimizer, loss in [*losses, (second, lambda: self.other(batch[0]).square().mean())]:
            optimizer.zero_grad()
            self.manual_backward(loss())
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net, self.other)]


@pytest.mark.parametrize("calls", [1, 2])
def test_the_steps_of_another_optimizer_do_not_count(calls, tmp_path):
    schedule = selbp.Schedule(start=3 * calls)
    module = TwoOptimizers(calls, selector=selbp.TopLoss(), keep=2, schedule=schedule)
    trainer = fit(module, tmp_path)
    assert trainer.global_step == 6 * (calls + 1) and module.step.optimizer_step == 6 * calls
    assert module.selected == [False] * 3 * calls + [True] * 3 * calls


class TakingTurns(Module):
    """A second step runs in every third batch."""

    def __init__(self) -> None:
        super().__init__(selector=selbp.TopLoss(), keep=2)
        self.rare = selbp.SelectiveBackprop(self.net, selector=selbp.TopLoss(), keep=2)

    def training_step(self, batch: Any, index: int) -> Any:
        return (self.step if index % 3 else self.rare)(*batch)


def test_a_step_counts_only_the_optimizer_steps_that_it_has_part_in(tmp_path):
    module = TakingTurns()
    fit(module, tmp_path)
    assert (module.step.optimizer_step, module.rare.optimizer_step) == (4, 2)
    module = TakingTurns()
    fit(module, tmp_path, accumulate_grad_batches=2)  # batches 0 and 1, 2 and 3, 4 and 5
    assert (module.step.optimizer_step, module.rare.optimizer_step) == (3, 2)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("saved", [True, False])
def test_counting_goes_on_in_another_trainer(saved, log, tmp_path):
    """A new one counts from 0, and one that takes over a checkpoint from where that was."""
    module = Module(selector=selbp.TopLoss(), keep=2, schedule=selbp.Schedule(every=2))
    before = fit(module, tmp_path, callback=SelectiveCallback(log=log))
    assert module.step.optimizer_step == 6 and module.selected == [True, False] * 3
    resume = str(tmp_path / "half.ckpt") if saved else None
    if saved:
        before.save_checkpoint(resume)
        module = Module(selector=selbp.TopLoss(), keep=2, schedule=selbp.Schedule(every=2))
    epochs = 2 if saved else 1
    fit(module, tmp_path, callback=SelectiveCallback(log=log), resume=resume, max_epochs=epochs)
    assert module.step.optimizer_step == 12
    assert module.selected == [True, False] * (3 if saved else 6)


def test_a_checkpoint_in_the_middle_of_an_epoch_has_the_count(tmp_path):
    checkpoint = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "half", every_n_train_steps=3, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        max_steps=5,
        callbacks=[checkpoint, SelectiveCallback()],
    )
    module = Module(selector=selbp.TopLoss(), keep=2)
    trainer.fit(module, loader())
    resumed = Module(selector=selbp.TopLoss(), keep=2, schedule=selbp.Schedule(start=4))
    resuming = fit(resumed, tmp_path, resume=str(tmp_path / "half.ckpt"))
    assert resumed.selected[:3] == [False, True, True]  # an older trainer runs the last batch again
    assert resumed.step.optimizer_step == resuming.global_step


@pytest.mark.parametrize("rule", [selbp.LossPercentile, selbp.Random], ids=lambda kind: kind.__name__)
def test_a_resumed_run_goes_on_bit_for_bit(rule, tmp_path):
    def build():
        generator = torch.Generator().manual_seed(5)
        return Module(selector=rule(), keep=0.5, generator=generator, backward="recompute")

    whole, part, resumed = build(), build(), build()
    fit(whole, tmp_path, max_epochs=2)
    fit(part, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, resume=str(tmp_path / "half.ckpt"), max_epochs=2)
    assert torch.equal(weights(resumed), weights(whole))
    without = Module()
    with pytest.raises(ValueError, match="no attribute that is a selbp.SelectiveBackprop"):
        fit(without, tmp_path)


def test_an_inserted_cut_is_saved_too(tmp_path):
    def build():
        module = Module()
        module.cut = selbp.insert_cut(
            module, "net.1", keep=2, selector=selbp.Random(), generator=torch.Generator().manual_seed(5)
        )
        return module

    whole, part, resumed = build(), build(), build()
    fit(whole, tmp_path, max_epochs=2)
    fit(part, tmp_path).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, resume=str(tmp_path / "half.ckpt"), max_epochs=2)
    assert torch.equal(weights(resumed), weights(whole)) and whole.cut.report.k == 2
    with pytest.raises(ValueError, match="steps of the module must have the entries .'step'., got .'cut'."):
        other = Module(selector=selbp.Full(), keep=1.0)
        fit(other, tmp_path, resume=str(tmp_path / "half.ckpt"), max_epochs=2)


class Drawn(Module):
    """Batches drawn by a table of scores."""

    def __init__(self) -> None:
        super().__init__()
        samples = torch.utils.data.TensorDataset(*data())
        made = selbp.auto_select(self.net, samples, classes=5, k=6, pool=9, seed=3)
        prices = {"random": 1.0, "drawn": 1.1}  # known, so that no clock decides
        self.step = selbp.AutoSelect(made.candidates["drawn"].step, made.sampler, prices=prices, every=2)
        self.batches = torch.utils.data.DataLoader(samples, batch_sampler=made.sampler)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.step(*batch)


def test_a_table_its_sampler_and_its_controller_are_saved(tmp_path):
    whole, part, resumed = Drawn(), Drawn(), Drawn()
    fit(whole, tmp_path, max_epochs=3, batches=whole.batches)
    fit(part, tmp_path, batches=part.batches).save_checkpoint(tmp_path / "half.ckpt")
    fit(resumed, tmp_path, resume=str(tmp_path / "half.ckpt"), max_epochs=3, batches=resumed.batches)
    assert torch.equal(weights(resumed), weights(whole))
    assert torch.equal(resumed.step.sampler.table.probability, whole.step.sampler.table.probability)
    assert resumed.step.log == whole.step.log and resumed.step.report.step == whole.step.report.step == 11


class Known(Drawn):
    """The controller's step and sampler are attributes too, before it or after."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        made = self.step
        del self.step
        if first:
            self.inner, self.sampler = made.step, made.sampler
        self.step = made
        if not first:
            self.inner, self.sampler = made.step, made.sampler


PARTS = ["step.step", "step.table", "step.sampler", "step.controller"]


@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_two_attributes_hold_counts_once(first, tmp_path):
    module, callback = Known(first), SelectiveCallback()
    trainer = fit(module, tmp_path, callback=callback, batches=module.batches)
    assert module.inner.optimizer_step == trainer.global_step == 4
    (states,) = callback.state_dict()["ranks"]
    assert list(states) == PARTS and list(callback._windows) == PARTS[:1]


@pytest.mark.parametrize("other", [False, True], ids=["by places", "and by two attributes"])
def test_a_checkpoint_with_other_names_is_taken(other, tmp_path):
    module = Known(True)
    fit(module, tmp_path, batches=module.batches).save_checkpoint(tmp_path / "half.ckpt")
    saved = torch.load(tmp_path / "half.ckpt", weights_only=False)
    (callback,) = saved["callbacks"].values()
    (states,) = callback["ranks"]
    before = {f"step.{place}": states[part] for place, part in enumerate(PARTS)}
    callback["ranks"] = [before | ({"inner": states["step.step"]} if other else {})]
    torch.save(saved, tmp_path / "half.ckpt")
    resumed = Known(True)
    fit(resumed, tmp_path, resume=str(tmp_path / "half.ckpt"), max_epochs=2, batches=resumed.batches)
    assert resumed.inner.optimizer_step == 8 and resumed.sampler.epoch == 1


def test_a_further_candidates_step_has_the_candidates_name():
    module = Drawn()
    step = selbp.SelectiveBackprop(module.net, selector=selbp.TopLoss(), keep=2, table=module.step.table)
    pool = {"pool": selbp.sampling.Candidate(step, k=9, scored=False)}
    module.auto = selbp.AutoSelect(module.step.step, module.step.sampler, others=pool)
    del module.step
    callback = SelectiveCallback()
    callback.setup(None, module, "fit")
    assert list(callback._parts) == ["auto.step", "auto.step.pool", "auto.table", "auto.sampler", "auto.controller"]


def test_it_logs_the_figures(tmp_path):
    module = Module(selector=selbp.GradientMatching(), keep=0.5)
    logger = CSVLogger(tmp_path)
    fit(module, tmp_path, logger=logger, log_every_n_steps=2)
    with open(logger.experiment.metrics_file_path) as file:
        lines = [line for line in csv.DictReader(file) if line["selective/batch_loss"]]
    assert len(lines) == 3
    for name in ("batch_loss", "batch_accuracy", "gain", "relative_residual", "kept", "backward_seconds"):
        assert all(float(line[f"selective/{name}"]) >= 0 for line in lines), name


def test_the_global_target_of_a_module_built_before_the_processes(tmp_path):
    local, everywhere = (
        Module(selector=selbp.GradientMatching(), keep=0.5, target=target) for target in ("local", "global")
    )
    fit(local, tmp_path), fit(everywhere, tmp_path)
    # One process: the same choice, whose sums for all ranks are added in another order.
    torch.testing.assert_close(weights(local), weights(everywhere), rtol=1e-12, atol=1e-14)


class Alternating(Module):
    """Two steps by turns."""

    def __init__(self) -> None:
        super().__init__()
        self.often, self.once = (selbp.SelectiveBackprop(self.net, selector=selbp.TopLoss(), keep=2) for _ in range(2))

    def training_step(self, batch: Any, index: int) -> Any:
        return (self.once if index == 1 else self.often)(*batch)

    def log_dict(self, figures: Any, **options: Any) -> None:
        names = {name.split("/")[1] for name in figures}
        self.selected.append((self.trainer.global_step, *names))


@pytest.mark.parametrize(("every", "once", "often"), [(1, [2], [1, 3, 4, 5, 6]), (3, [3], [3, 6])])
def test_a_step_that_did_not_run_is_not_logged_again(every, once, often, tmp_path):
    module = Alternating()
    fit(module, tmp_path, log_every_n_steps=every)
    for name, steps in (("once", once), ("often", often)):
        assert [step for step, logged in module.selected if logged == name] == steps


def test_nothing_is_collected_that_is_not_logged(tmp_path):
    callback = SelectiveCallback(log=False)
    fit(Alternating(), tmp_path, callback=callback)
    assert not any(window._seconds for window in callback._windows.values())
