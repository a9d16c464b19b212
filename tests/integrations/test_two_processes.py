"""Two processes under each framework: gradients are those of all tokens of both, and each keeps its own memory."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.two_trainers import launched
from torch import nn
from torch.nn import functional as F

import selbp

pytestmark = pytest.mark.slow


def shared_folder() -> Path:
    """One folder for both processes."""
    names = [tempfile.mkdtemp()]
    dist.broadcast_object_list(names)
    return Path(names[0])


def weights(model: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def check_equal_on_both(value: torch.Tensor) -> None:
    values = [torch.empty_like(value) for _ in range(2)]
    dist.all_gather(values, value)
    assert torch.equal(*values)


def trainer_check(rank: int) -> None:
    import transformers
    from support.hf_kit import arguments, difference, llama, texts

    from selbp.integrations.huggingface import SelectiveTrainerMixin

    transformers.logging.set_verbosity_error()

    class SelectiveTrainer(SelectiveTrainerMixin, transformers.Trainer):
        pass

    def train(kind: Any, options: Any, **args: Any) -> Any:
        extra = {} if options is None else {"selective": options}
        common = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
        trainer = kind(
            model=llama(), args=arguments(shared_folder(), **(common | args)), train_dataset=texts(), **extra
        )
        trainer.train()
        return trainer

    assert arguments("unused", ddp_backend="gloo").world_size == 2
    start = weights(llama())
    plain = train(transformers.Trainer, None)
    for backward in ("rows", "recompute"):
        full = {"selector": selbp.Full(), "keep": 1.0, "backward": backward}
        assert difference(train(SelectiveTrainer, full).model, plain.model, start) < 1e-5
        chosen = {"selector": selbp.GradientMatching(), "keep": 0.5, "backward": backward}
        for extra in (
            {},
            {"gradient_checkpointing": True},
            {"ddp_static_graph": True, "gradient_accumulation_steps": 1},
        ):
            check_equal_on_both(weights(train(SelectiveTrainer, chosen, **extra).model))

    # One choice for all ranks: what is counted is the targets of both, however the trainer counts them.
    plain = train(transformers.Trainer, None, average_tokens_across_devices=True)
    for across in (True, False):
        every = {"selector": selbp.Full(), "keep": 1.0, "scope": "global"}
        trained = train(SelectiveTrainer, every, average_tokens_across_devices=across)
        assert difference(trained.model, plain.model, start) < 1e-5
        logged = [[line["loss"] for line in kind.state.log_history if "loss" in line] for kind in (trained, plain)]
        assert logged[0] == pytest.approx(logged[1], rel=1e-3) and len(logged[0]) == 2

    def own() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(rank)
        return {"selector": selbp.LossPercentile(), "keep": 0.5, "generator": generator, "backward": "recompute"}

    whole = train(SelectiveTrainer, own(), max_steps=4)
    folder = shared_folder()
    half = SelectiveTrainer(
        model=llama(),
        train_dataset=texts(),
        selective=own(),
        args=arguments(
            folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            ddp_backend="gloo",
            save_strategy="steps",
            save_steps=2,
        ),
    )
    half.train()
    dist.barrier()
    assert (folder / "checkpoint-2" / f"selbp_state_{rank}.pt").exists()
    resumed = SelectiveTrainer(
        model=llama(),
        train_dataset=texts(),
        selective=own(),
        args=arguments(
            folder, per_device_train_batch_size=4, gradient_accumulation_steps=2, ddp_backend="gloo", max_steps=4
        ),
    )
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert torch.equal(weights(resumed.model), weights(whole.model))


def sampling_check(rank: int, scope: str) -> None:
    import transformers
    from support.hf_kit import arguments, bert, classes

    from selbp.integrations.huggingface import SelectiveTrainerMixin

    transformers.logging.set_verbosity_error()

    class SelectiveTrainer(SelectiveTrainerMixin, transformers.Trainer):
        pass

    prices = {"random": 1.0, "drawn": 1.1}  # known, so that no clock decides
    sampling = {"classes": 4, "pool": 8, "seed": 5, "prices": prices, "every": 2}
    among_all = {"selector": selbp.TopLoss(), "keep": 0.5, "scope": "global"} if scope == "global" else {}
    folder = shared_folder()

    def trainer_of(place: Path, **args: Any) -> Any:
        common = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
        return SelectiveTrainer(
            model=bert(),
            args=arguments(place, **(common | args)),
            train_dataset=classes(),
            selective={"sampling": sampling, **among_all},
        )

    whole = trainer_of(folder / "whole", max_steps=5)
    whole.train()
    check_equal_on_both(weights(whole.model))
    mine = whole.get_train_dataloader().batch_sampler
    assert mine.world_size == 2 and {i for batch in mine for i in batch} <= set(range(rank, 32, 2))
    trainer_of(folder / "part", max_steps=3, save_strategy="steps", save_steps=3).train()
    dist.barrier()
    resumed = trainer_of(folder / "part", max_steps=5)
    resumed.train(resume_from_checkpoint=str(folder / "part" / "checkpoint-3"))
    assert torch.equal(weights(resumed.model), weights(whole.model))


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def data(seed: int, n: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator).double(), torch.randint(0, 5, (n,), generator=generator)


def accelerate_check(rank: int) -> None:
    import accelerate

    from selbp.integrations.accelerate import AcceleratedStep

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2

    def build() -> tuple[Any, Any]:
        model = accelerator.prepare(network())
        generator = torch.Generator().manual_seed(rank)
        return model, AcceleratedStep(
            accelerator, model, selector=selbp.LossPercentile(), keep=0.5, generator=generator, backward="recompute"
        )

    everything = [data(10 * r + part) for r in range(2) for part in range(2)]
    for i, (_, y) in enumerate(everything):
        y[: 5 * i] = -100
    count = sum(int((y != -100).sum()) for _, y in everything)
    plain = network()
    sum(F.cross_entropy(plain(x), y, reduction="sum") for x, y in everything).div(count).backward()  # type: ignore
    parts = {"micro_batch": 5}
    for options in ({"backward": "rows"}, {"scope": "global"}, parts, {"scope": "global", **parts}):
        model = accelerator.prepare(network())
        step = AcceleratedStep(accelerator, model, selector=selbp.Full(), keep=1.0, **options)
        for part in range(2):
            with accelerator.accumulate(model):
                if "micro_batch" in options:
                    step.backward(*everything[2 * rank + part], normalizer=count)
                else:
                    accelerator.backward(step(*everything[2 * rank + part], normalizer=count))
        assert step.optimizer_step == 1
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-14)
        accelerator._custom_objects.clear(), accelerator._models.clear()

    model, step = build()
    folder = shared_folder()
    for i in range(3):
        step(*data(20 * rank + i)).backward()
    accelerator.save_state(folder)
    step(*data(20 * rank + 9))
    expected = step.report.selection
    accelerator._custom_objects.clear(), accelerator._models.clear()
    model, step = build()
    accelerator.load_state(folder)
    step(*data(20 * rank + 9))
    assert torch.equal(step.report.selection.indices, expected.indices)


def lightning_check(rank: int) -> None:
    from selbp.integrations.ranks import gathered, own

    state = gathered({"rank": rank})
    assert [entry["rank"] for entry in state["ranks"]] == [0, 1] and own(state) == {"rank": rank}
    with pytest.raises(ValueError, match="of 1 processes, each with its own memory, and there are 2"):
        own({"ranks": [state]})


def test_the_trainer():
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    launched(trainer_check)


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_trainer_whose_batches_are_drawn(scope):
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    pytest.importorskip("transformers", reason="transformers is not installed")
    launched(functools.partial(sampling_check, scope=scope))


def test_accelerate():
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    launched(accelerate_check)


def test_states_of_all_processes():
    launched(lightning_check)
