"""A Transformers trainer whose batches are drawn by a table of scores, as ``selbp.auto_select`` draws them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

import selbp

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from support.hf_kit import arguments, bert, classes, difference, weights  # noqa: E402

from selbp.integrations.huggingface import SelectiveTrainerMixin, selective  # noqa: E402

transformers.logging.set_verbosity_error()
PRICES = {"random": 1.0, "drawn": 1.1}  # known, so that no clock decides
DRAWN = {"classes": 4, "pool": 16, "seed": 5}
SAMPLING = {**DRAWN, "prices": PRICES, "every": 2}


class SelectiveTrainer(SelectiveTrainerMixin, transformers.Trainer):
    pass


def trainer_of(model, folder, sampling=None, data=None, **args):
    return SelectiveTrainer(
        model=model,
        args=arguments(folder, **args),
        train_dataset=classes() if data is None else data,
        selective={"sampling": SAMPLING if sampling is None else sampling},
    )


def collate(items):
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def test_it_trains_as_a_loop_by_hand(tmp_path):
    trained, by_hand, data = bert(), bert(), classes()
    start = weights(by_hand).clone()
    trainer = trainer_of(trained, tmp_path, max_steps=5)
    trainer.train()
    made = selbp.auto_select(by_hand, data, k=8, steps=5, **DRAWN)
    sampler, step = made.sampler, made.candidates["drawn"].step
    auto = selbp.AutoSelect(step, sampler, prices=PRICES, every=2)
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1)
    by_hand.train()
    left = 5
    while left:
        for batch in DataLoader(data, batch_sampler=sampler, collate_fn=collate):
            auto(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            left -= 1
            if not left:
                break
    assert difference(trained, by_hand, start) < 1e-6
    assert trainer.selective_step.report.k == 8 and isinstance(trainer.selective_step.selector, selbp.Full)
    line = next(line for line in trainer.state.log_history if "headroom" in line)
    assert line["headroom"] >= 1.0 and 0.0 < line["coverage"] <= 1.0


def with_dropout():
    model = bert()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


@pytest.mark.parametrize(
    ("workers", "saved"), [(0, 3), (0, 4), pytest.param(2, 3, marks=pytest.mark.slow)], ids=["middle", "end", "workers"]
)
@pytest.mark.parametrize("build", [bert, with_dropout])
def test_a_resumed_run_goes_on_bit_for_bit_in_the_middle_of_an_epoch(build, workers, saved, tmp_path):
    common = {"optim": "adamw_torch", "learning_rate": 1e-3, "dataloader_num_workers": workers}
    saving = {"save_strategy": "steps", "save_steps": saved}
    sampling = {**SAMPLING, "pool": 8}  # four batches an epoch
    whole = build()
    trainer_of(whole, tmp_path / "whole", sampling, max_steps=10, **common).train()
    first = trainer_of(build(), tmp_path / "part", sampling, max_steps=saved, **saving, **common)
    first.train()
    torch.rand(7)  # wherever torch's generator is
    resumed = trainer_of(build(), tmp_path / "part", sampling, max_steps=10, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{saved}"))
    assert torch.equal(weights(resumed.model), weights(whole))
    assert resumed.selective_step.optimizer_step == 9


def test_its_arguments_are_afterwards_as_they_were(tmp_path):
    trainer_of(bert(), tmp_path, save_strategy="steps", save_steps=2).train()
    for skip in (False, True):
        resumed = trainer_of(bert(), tmp_path, max_steps=4, ignore_data_skip=skip)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert resumed.args.ignore_data_skip is skip and resumed.state.global_step == 4


def test_a_checkpoint_without_a_table_is_warned_of(tmp_path):
    args = arguments(tmp_path, save_strategy="steps", save_steps=2)
    rule = {"selector": selbp.Full(), "keep": 1.0}
    SelectiveTrainer(model=bert(), args=args, train_dataset=classes(), selective=rule).train()
    resumed = trainer_of(bert(), tmp_path, max_steps=4)
    with pytest.warns(UserWarning, match="holds no table of scores"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.selective_step.table.coverage > 0


def test_a_second_training_begins_with_a_table_of_its_own(tmp_path):
    trainer = trainer_of(bert(), tmp_path)
    tables = []
    for _ in range(2):
        trainer.train()
        tables.append(trainer.selective_step.table)
        trainer.get_train_dataloader()  # which someone only looks at
    assert tables[0] is not tables[1] and all(table.coverage > 0 for table in tables)


def test_a_trainer_that_is_built_already_and_rows_that_follow_its_batch_size(tmp_path):
    trainer = transformers.Trainer(
        model=bert(), args=arguments(tmp_path, per_device_train_batch_size=4), train_dataset=classes()
    )
    selective(trainer, sampling=DRAWN)
    trainer.train()
    assert trainer.selective_step.report.n == 4


@pytest.mark.parametrize(
    ("sampling", "data", "error", "says"),
    [
        ({"colour": 1}, None, TypeError, "sampling must be a dict with some of classes, .*got colour"),
        (3, None, TypeError, "sampling must be a dict with some of .*got 3"),
        ({"classes": 4}, iter([]), TypeError, "dataset must be map-style"),
        ({"classes": 3}, None, ValueError, r"labels must lie in \[0, 3\)"),
    ],
    ids=["option", "number", "iterable", "classes"],
)
def test_wrong_options_are_named(sampling, data, error, says, tmp_path):
    with pytest.raises(error, match=says):
        trainer_of(bert(), tmp_path, sampling, data).train()


def test_neither_a_rule_nor_sampling_is_refused(tmp_path):
    with pytest.raises(TypeError, match="'selector' and 'keep', or 'sampling'"):
        SelectiveTrainer(model=bert(), args=arguments(tmp_path), train_dataset=classes(), selective={"keep": 0.5})
