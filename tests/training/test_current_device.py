"""A model on cuda:1 while cuda:0 is current: events, streams and captures are those of the model's device."""

import contextlib
import types

import pytest
import torch

from selbp.ops import _backends
from selbp.sampling import written
from selbp.training import graphed, stopwatch

THERE = torch.device("cuda:1")


class Stream:
    def __init__(self, index):
        self.index = index

    def wait_stream(self, other):
        assert other.index == self.index


class Cuda:
    """torch.cuda with two devices, of which the first is current; ``log`` holds what was done on which."""

    def __init__(self):
        self.current, self.log, self.capturing = 0, [], set()

    def index(self, device):
        return self.current if device is None else torch.device(device).index

    @contextlib.contextmanager
    def device(self, device):
        before, self.current = self.current, self.index(device)
        yield
        self.current = before

    @contextlib.contextmanager
    def stream(self, stream):
        with self.device(f"cuda:{stream.index}"):
            yield

    @contextlib.contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.log.append(("capture", self.current))  # torch synchronises the current device and empties its cache
        with self.stream(stream):
            yield


@pytest.fixture
def cuda(monkeypatch):
    two = Cuda()

    class Event:
        def __init__(self, enable_timing=False):
            pass

        def record(self, stream=None):
            two.log.append(("event", two.current if stream is None else stream.index))

    graph = types.SimpleNamespace(replay=lambda: two.log.append(("replay", two.current)))
    changes = {
        "Event": Event,
        "Stream": lambda device=None: Stream(two.index(device)),
        "current_stream": lambda device=None: Stream(two.index(device)),
        "device": two.device,
        "stream": two.stream,
        "graph": two.graph,
        "CUDAGraph": lambda: graph,
        "is_current_stream_capturing": lambda: two.current in two.capturing,
    }
    for name, value in changes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return two


class OnOther(torch.Tensor):
    @property
    def device(self):
        return THERE


class Here(torch.Tensor):
    def to(self, device, non_blocking):
        return self.clone()


def test_the_event_behind_what_a_table_was_sent(cuda):
    logits = torch.randn(4, 3).as_subclass(OnOther)
    written._sent([logits, None, None, None], torch.device("cpu"))
    written._sent([torch.randn(4, 3).as_subclass(Here), None, None, None], THERE)
    assert cuda.log == [("event", 1), ("event", 1)]


def test_the_stopwatch(cuda):
    stopwatch.Stopwatch(THERE).lap("score")
    assert cuda.log == [("event", 1), ("event", 1)]


def test_whether_a_stream_is_captured(cuda):
    cuda.capturing = {1}
    assert _backends.capturing(THERE) and not _backends.capturing(torch.device("cuda:0"))
    assert not _backends.capturing(torch.device("cpu")) and cuda.current == 0


def test_a_captured_step(cuda):
    ran = []
    recorder = graphed.Recorder(THERE)
    with recorder.beside():
        ran.append(cuda.current)
    replay = recorder.capture(lambda: ran.append(cuda.current), None)
    replay()
    assert ran == [1, 1] and cuda.log == [("capture", 1), ("replay", 1)] and cuda.current == 0
