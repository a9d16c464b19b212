"""The copy of running statistics that each step takes, in case it raises: right, and a launch for all of them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from selbp.common.guards import RunningStatistics


class Launches(TorchDispatchMode):
    """Operators that would launch a kernel: those that return no view and allocate no memory only."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "empty" not in str(function) and "detach" not in str(function):
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def model(layers=53):
    return nn.Sequential(*(nn.BatchNorm1d(5) for _ in range(layers)))


def buffers(net):
    return [buffer.clone() for buffer in net.buffers()]


def test_what_a_step_copies_takes_three_launches_at_most():
    statistics = RunningStatistics(model())
    for _ in range(2):  # the second finds the memory of the first
        with Launches() as seen:
            restore = statistics.snapshot()
        assert len(seen.names) <= 3, seen.names
        with Launches() as seen:
            restore()
        assert len(seen.names) <= 3, seen.names


def test_the_memory_is_kept():
    statistics = RunningStatistics(model(3))
    statistics.snapshot()
    first = [copy.data_ptr() for copies in statistics._kept.values() for copy in copies]
    statistics.snapshot()
    assert first == [copy.data_ptr() for copies in statistics._kept.values() for copy in copies]


@pytest.mark.parametrize("change", ["train", "eval", "dtype", "fewer", "deepcopy", "pickle"])
def test_the_statistics_come_back(change):
    net = model(3)
    statistics = RunningStatistics(net)
    net(torch.randn(4, 5))
    statistics.snapshot()
    if change == "eval":
        net[1].eval()
    if change == "dtype":
        net.double()
    if change == "fewer":
        net[0].running_mean, net[0].running_var = torch.zeros(2), torch.ones(2)
    if change in ("deepcopy", "pickle"):
        statistics = copy.deepcopy(statistics) if change == "deepcopy" else pickle.loads(pickle.dumps(statistics))
        assert statistics._kept == {}
        net = nn.Sequential(*statistics._layers)
    before = buffers(net)
    restore = statistics.snapshot()
    for layer in net:
        if layer.training:
            for buffer in layer.buffers():
                buffer.add_(1)
    restore()
    assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))
    assert all(
        kept.data_ptr() != b.data_ptr() for group in statistics._kept.values() for kept in group for b in net.buffers()
    )


def test_a_pause_takes_three_launches_and_swaps_what_layers_write_to():
    net = model()
    statistics, own = RunningStatistics(net), [*net.buffers()]
    for _ in range(2):
        before = buffers(net)
        with Launches() as seen:
            pause = statistics.paused()
            pause.__enter__()
        assert len(seen.names) <= 3, seen.names
        assert all(torch.equal(a, b) for a, b in zip(before, net.buffers(), strict=True))  # some layers read them
        net(torch.randn(4, 5))
        assert not torch.equal(before[0], net[0].running_mean) and int(net[-1].num_batches_tracked) == 1
        pause.__exit__(None, None, None)
        assert all(a is b for a, b in zip(own, net.buffers(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before, own, strict=True))
