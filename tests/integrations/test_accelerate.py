"""A loop under Hugging Face's Accelerator: gradients, the count of optimizer steps, and checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import selbp

accelerate: Any = pytest.importorskip("accelerate", reason="accelerate is not installed")

from selbp.integrations.accelerate import AcceleratedStep  # noqa: E402


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def network():
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))


def data(n=36):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.randint(0, 5, (n,), generator=generator)


def prepared(accumulate=1, **options):
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=6)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    return accelerator, model, optimizer, loader, AcceleratedStep(accelerator, model, **options)


def run(accelerator, model, optimizer, loader, step, stop=None, start=0):
    for i, (x, y) in enumerate(loader):
        if i < start:
            continue
        if i == stop:
            break
        with accelerator.accumulate(model):
            accelerator.backward(step(x, y))
            optimizer.step()
            optimizer.zero_grad()


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_a_loop_trains_as_one_by_hand(backward):
    parts = prepared(2, selector=selbp.TopLoss(), keep=2, backward=backward)
    run(*parts)
    plain, (x, y) = network(), data()
    optimizer = torch.optim.SGD(plain.parameters(), 0.1)
    for i in range(6):
        rows = slice(6 * i, 6 * i + 6)
        losses = F.cross_entropy(plain(x[rows]), y[rows], reduction="none")
        (losses.topk(2).values.mean() / 2).backward()
        if i % 2:
            optimizer.step(), optimizer.zero_grad()
    assert float((weights(parts[1]) - weights(plain)).abs().max()) < 1e-12
    assert parts[-1].optimizer_step == 3


def test_a_normalizer_counts_the_whole_accumulated_batch():
    accelerator, model, _, _, step = prepared(4, selector=selbp.Full(), keep=1.0, backward="recompute")
    (x, y), plain = data(), network()
    y[:9] = -100  # the minibatches have 0, 3, 6 and 6 targets
    count = int((y[:24] != -100).sum())
    for i in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(step(x[6 * i : 6 * i + 6], y[6 * i : 6 * i + 6], normalizer=count))
    F.cross_entropy(plain(x[:24]), y[:24]).backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rule", [selbp.LossPercentile, selbp.Random], ids=lambda kind: kind.__name__)
def test_a_resumed_run_goes_on_bit_for_bit(rule, tmp_path):
    def build():
        generator = torch.Generator().manual_seed(5)
        return prepared(2, selector=rule(), keep=0.5, generator=generator, backward="recompute")

    whole = build()
    run(*whole)
    part = build()
    run(*part, stop=4)
    part[0].save_state(tmp_path)
    resumed = build()
    resumed[0].load_state(tmp_path)
    assert resumed[-1].optimizer_step == 2
    run(*resumed, start=4)
    assert torch.equal(weights(resumed[1]), weights(whole[1]))


def test_a_schedule_counts_optimizer_steps():
    *parts, step = prepared(3, selector=selbp.TopLoss(), keep=2, schedule=selbp.Schedule(start=1))
    seen = []
    run(*parts, lambda x, y: [step(x, y), seen.append(step.report.selected)][0])
    assert seen == [False] * 3 + [True] * 3


def test_wrong_calls():
    accelerator, model, *_ = prepared(selector=selbp.Full(), keep=1.0)
    with pytest.raises(TypeError, match="accelerator must be an accelerate.Accelerator"):
        AcceleratedStep(model, model, selector=selbp.Full(), keep=1.0)
    with pytest.raises(TypeError, match="auto_advance is not for this step"):
        AcceleratedStep(accelerator, model, selector=selbp.Full(), keep=1.0, auto_advance=True)
    step = AcceleratedStep(accelerator, model, selector=selbp.Full(), keep=1.0)
    with pytest.raises(ValueError, match="of 2 processes, each with its own memory, and there are 1"):
        step.load_state_dict({"ranks": [{}, {}]})
    with pytest.raises(ValueError, match="the entry 'ranks'"):
        step.load_state_dict({})
