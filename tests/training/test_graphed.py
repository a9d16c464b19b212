"""``cuda_graph`` without a GPU: what it refuses, and its bookkeeping with a recorder that runs what a graph would."""

import contextlib
import copy
import types

import pytest
import torch
from torch import nn

import selbp
from selbp.training import graphed as module
from selbp.training import pace as module_pace
from selbp.training import stopwatch


def make(selector=None, seed=0, **options):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    options = {"keep": 4, "backward": "recompute", **options}
    return selbp.SelectiveBackprop(model, selector=selector or selbp.TopLoss(), **options)


def batches(count, n=12):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for _ in range(count)]


def tensors_of(report):
    return [*report.selection, *report._stats, report._chosen, *report._hits]


class Recorder(module.Recorder):
    """As a graph: captures without an effect, then repeats the work into the tensors that the capture returned."""

    def __init__(self, step, optimizer):
        self.step, self.optimizer, self.captures, self.replays = step, optimizer, 0, 0

    def beside(self):
        return contextlib.nullcontext()

    def capture(self, work, generator):
        step, model, optimizer = self.step, self.step.model, self.optimizer
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict() if optimizer else None))
        draws = (generator.get_state() if generator else None), torch.get_rng_state()
        adds = [p.grad is not None for p in model.parameters()]  # a graph that was captured so adds at each replay
        work()
        self.captures += 1
        model.load_state_dict(before[0])
        if optimizer:
            optimizer.load_state_dict(before[1])
        if generator:
            generator.set_state(draws[0])
        torch.set_rng_state(draws[1])
        loss, report = self.graphed._loss, step._report
        gradients = [p.grad for p in model.parameters()]

        def replay():
            self.replays += 1
            kept = step._step, step._report, step._auto_advance
            there = [p.grad for p in model.parameters()]
            for parameter, old, add in zip(model.parameters(), gradients, adds, strict=True):
                parameter.grad = old.clone() if add else None
            work()
            pairs = [(loss, self.graphed._loss), *zip(tensors_of(report), tensors_of(step._report), strict=True)]
            pairs += [(g, p.grad) for g, p in zip(gradients, model.parameters(), strict=True)]
            for old, new in pairs:
                old.copy_(new)
            for parameter, gradient in zip(model.parameters(), there, strict=True):
                parameter.grad = gradient  # a graph writes memory, and no attribute
            if report._proxies is not None:  # their factors lie in the graph's memory too
                report._proxies.__dict__ = step._report._proxies.__dict__
            self.graphed._loss = loss
            step._step, step._report, step._auto_advance = kept

        return replay


def graph_of(step, optimizer=None, example=None):
    recorder = Recorder(step, optimizer)
    recorder.graphed = module.GraphedStep(step, (*(example or batches(1)[0]), {}), optimizer, recorder)
    return recorder.graphed, recorder


RULES = {
    "top": (selbp.TopLoss, False),
    "matching": (selbp.GradientMatching, False),
    "random": (selbp.Random, True),
    "norms": (selbp.GradNormImportance, True),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("inside", [True, False], ids=["optimizer inside", "optimizer outside"])
def test_replays_train_as_ordinary_steps_do(name, inside):
    rule, draws = RULES[name]
    steps = [make(rule(), generator=torch.Generator().manual_seed(5) if draws else None) for _ in range(2)]
    optimizers = [torch.optim.SGD(step.model.parameters(), lr=0.1, momentum=0.9) for step in steps]
    graphed, recorder = graph_of(steps[0], optimizers[0] if inside else None)
    for i, (x, y) in enumerate(batches(9)):
        loss = graphed(x, y)
        if not inside:
            optimizers[0].step()
            optimizers[0].zero_grad()  # to None: the next replay must put the gradients back
        wanted = steps[1](x, y)
        optimizers[1].zero_grad()
        wanted.backward()
        optimizers[1].step()
        assert torch.equal(loss, wanted.detach()) and not loss.requires_grad
        report, other = graphed.report, steps[1].report
        assert (report.step, report.loss, report.k) == (other.step, other.loss, other.k) and report.step == i
        assert report.relative_residual == other.relative_residual and report.gain == other.gain
        assert torch.equal(report.selection.indices, other.selection.indices)
    assert recorder.captures == 1 and recorder.replays == 9 - module.EAGER
    assert steps[0].optimizer_step == steps[1].optimizer_step == 9
    for a, b in zip(steps[0].model.state_dict().values(), steps[1].model.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_replay_goes_on_from_the_memory_of_a_rule_that_may_be_captured():
    """A replay runs no Python: it reads and writes the tensor that the capture met."""
    rule = selbp.GradNormImportance(threshold=1.0)
    step = make(rule, generator=torch.Generator().manual_seed(5))
    with pytest.raises(ValueError, match="must be on one CUDA device"):  # and not: must not remember
        selbp.cuda_graph(step, *batches(1)[0])
    given = batches(3)
    step(*given[0])
    memory, means = rule._tau, [rule.tau]
    for x, y in given[1:]:
        step(x, y)
        means.append(rule.tau)
    rule.load_state_dict({"tau": means[0]})
    assert rule._tau is memory and rule.tau == means[0] != means[1] != means[2]
    rule._tau = elsewhere = memory.to("meta")  # a graph's memory is on another device than a state from a file
    rule.load_state_dict({"tau": means[0]})
    assert rule._tau is elsewhere


def test_what_was_returned_and_reported_stays():
    step = make()
    graphed, _ = graph_of(step)
    given = batches(module.EAGER + 2)
    for x, y in given[:-1]:
        loss = graphed(x, y)
    report = graphed.report
    before = loss.clone(), report.selection.indices.clone(), step.model[0].weight.grad.clone()
    graphed(*given[-1])
    with pytest.raises(RuntimeError, match="read before the next call"):
        _ = report.gain
    assert torch.equal(loss, before[0]) and torch.equal(report.selection.indices, before[1])
    assert not torch.equal(step.model[0].weight.grad, before[2])


def test_a_minibatch_of_another_shape_is_an_ordinary_step():
    step = make()
    graphed, recorder = graph_of(step)
    for x, y in batches(module.EAGER, n=7):
        graphed(x, y)
    for x, y in batches(module.EAGER):  # these prepare the capture, those of another shape do not
        graphed(x, y)
    assert recorder.captures == 0
    graphed(*batches(1)[0])
    small = batches(1, n=7)[0]
    graphed(*small)
    assert recorder.replays == 1 and graphed.report.n == 7 and step.optimizer_step == 2 * module.EAGER + 2


CHANGES = {
    "keep": lambda step, optimizer: setattr(step, "keep", 5),
    "training modes": lambda step, optimizer: step.model[1].eval(),
    "requires_grad": lambda step, optimizer: step.model[0].weight.requires_grad_(False),
    "lr of the optimizer's group 0": lambda step, optimizer: optimizer.param_groups[0].update(lr=0.5),
    "the memory of the model's parameters": lambda step, optimizer: moved(step.model[0].weight),
    "the memory of .* and buffers": lambda step, optimizer: moved(step.model[1].running_mean),
    "the memory of the optimizer's state": lambda step, optimizer: loaded(optimizer),
}


def moved(x):
    """The same values in other memory."""
    x.data = x.detach().clone()


def loaded(optimizer):
    """As from a file."""
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("what", CHANGES)
def test_what_the_graph_holds_fast_must_not_change(what):
    step = make()
    optimizer = torch.optim.SGD(step.model.parameters(), lr=0.1, momentum=0.9)
    graphed, _ = graph_of(step, optimizer)
    x, y = batches(1)[0]
    for _ in range(module.EAGER + 2):
        graphed(x, y)
    CHANGES[what](step, optimizer)
    with pytest.raises(ValueError, match=f"{what}.* must be as when the graph was captured"):
        graphed(x, y)


@pytest.mark.parametrize("change", ["written", "another", "to a number"])
def test_a_learning_rate_in_a_tensor(change):
    """A graph reads a GPU's tensor where it lies, and has read a CPU's once for all."""
    step = make()
    optimizer = torch.optim.SGD(step.model.parameters(), lr=torch.tensor(0.1), foreach=False)
    graphed, _ = graph_of(step, optimizer)
    x, y = batches(1)[0]
    for _ in range(module.EAGER + 2):
        graphed(x, y)
    rate = optimizer.param_groups[0]["lr"]
    if change == "written":
        rate.fill_(0.01)
    else:
        optimizer.param_groups[0]["lr"] = torch.tensor(0.01) if change == "another" else 0.01
    with pytest.raises(ValueError, match=r"lr of the optimizer's group 0 must be .*0\.10*\d*, got 0\.0[01]"):
        graphed(x, y)


def test_the_last_ordinary_step_is_given_what_the_capture_will_be():
    """Strides and alignment choose the kernels, and none can be compiled in a capture."""

    def strides(module, inputs):
        seen.append((inputs[0].stride(), inputs[0].data_ptr() % 16))

    def kept(module, inputs):
        held.append(inputs[0])

    step, seen, held = make(backward="rows"), [], []
    graphed, _ = graph_of(step)
    given = [torch.randn(6, 13).T[1:] for _ in range(module.EAGER + 2)]  # strides (1, 13), off by one float
    step.model.register_forward_pre_hook(strides)
    step.model.register_forward_pre_hook(kept)
    for i, x in enumerate(given):
        graphed(x, batches(1)[0][1])
        if i == module.EAGER - 1:
            last, values = held[-1], held[-1].clone()
            assert torch.equal(last, x)
    assert seen[0] == ((1, 13), 4) and (6, 1) == graphed._buffers[0].stride()
    assert {place for place in seen[module.EAGER - 1 :]} == {((6, 1), 0)}
    assert torch.equal(last, values)  # a report may read them later


def test_a_capture_that_fails_says_why_each_time():
    class Failing(Recorder):
        def capture(self, work, generator):
            raise RuntimeError("operation not permitted when stream is capturing")

    step = make()
    graphed = module.GraphedStep(step, (*batches(1)[0], {}), None, Failing(step, None))
    for x, y in batches(module.EAGER):
        graphed(x, y)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph: operation not permitted"):
            graphed(*batches(1)[0])


class FakeCuda(torch.Tensor):
    """Says that it is on a GPU."""

    @property
    def device(self):
        return torch.device("cuda:0")


def on_gpu(x):
    return x.as_subclass(FakeCuda)


TABLE = selbp.sampling.ScoreTable(9, 3)
REFUSALS = {
    "CPU tensors": (lambda: make(), {"inputs": torch.zeros(4, 6)}, "must be on one CUDA device.*'cpu'"),
    "lists": (lambda: make(), {"inputs": [on_gpu(torch.zeros(4, 6)), ["a"] * 4]}, "reads no list.*str"),
    "memory": (lambda: make(selbp.LossPercentile()), {}, "must not remember earlier minibatches"),
    "schedule": (lambda: make(schedule=selbp.Schedule(every=2)), {}, "must choose at every step"),
    "late start": (lambda: make(schedule=selbp.Schedule(start=5)), {}, "must choose at every step"),
    "scoring": (lambda: make(scoring="eval"), {}, 'scoring="same"'),
    "cut": (lambda: make(selbp.GradientMatching(), cut="2", backward="rows"), {}, "must have no cut"),
    "table": (lambda: make(table=TABLE), {}, "must have neither table= nor a loss that reads one"),
    "loss": (lambda: make(loss=selbp.NoiseAwareCrossEntropy(TABLE)), {}, "must have neither table= nor a loss"),
    "micro-batches": (lambda: make(selbp.TopLoss(), micro_batch=2), {}, "must have neither micro_batch"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_cannot_be_captured_is_refused_with_the_reason(name):
    step, changes, message = REFUSALS[name]
    call = {"inputs": on_gpu(torch.zeros(4, 6)), "target": on_gpu(torch.zeros(4, dtype=torch.int64)), **changes}
    with pytest.raises(ValueError, match=message):
        selbp.cuda_graph(step(), **call)


@pytest.mark.parametrize(("optimizer", "message"), [(torch.optim.Adam, "capturable=True.*Adam"), (None, None)], ids=str)
def test_an_optimizer_that_reads_its_step_on_the_host_is_refused(optimizer, message):
    step = make()
    call = on_gpu(torch.zeros(4, 6)), on_gpu(torch.zeros(4, dtype=torch.int64))
    if optimizer is None:
        graphed = selbp.cuda_graph(step, *call)
        assert isinstance(graphed, selbp.GraphedStep) and graphed._recorder._device == torch.device("cuda:0")
        selbp.cuda_graph(step, *call, optimizer=torch.optim.SGD(step.model.parameters(), lr=0.1, momentum=0.9))
        return
    with pytest.raises(ValueError, match=message):
        selbp.cuda_graph(step, *call, optimizer=optimizer(step.model.parameters()))


@pytest.mark.parametrize(("call", "message"), [((3, None), "step must be"), ((None, 3), "optimizer must be")], ids=str)
def test_other_types_are_refused(call, message):
    step, optimizer = call
    with pytest.raises(TypeError, match=message):
        selbp.cuda_graph(make() if step is None else step, torch.zeros(4, 6), torch.zeros(4), optimizer=optimizer)


@pytest.fixture
def capturing(monkeypatch):
    """As while a graph is captured: an event that is recorded is an error."""
    flag = types.SimpleNamespace(on=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: flag.on)

    class Event:
        def __init__(self, enable_timing):
            assert not flag.on, "an event with timing in a capture"

        def record(self, stream):
            pass

        def synchronize(self):
            pass

        def query(self):
            assert not flag.on, "an event is asked in a capture"
            return True

        def elapsed_time(self, other):
            return 2000.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return flag


def test_the_stopwatch_rests_during_a_capture(capturing):
    watch = stopwatch.Stopwatch(torch.device("cuda"))
    watch.lap("score")
    leaf = torch.ones(1, requires_grad=True)
    loss = leaf.sum()
    watch.follow(loss)
    loss.backward()
    assert watch.seconds() == {}
    assert copy.copy(watch).seconds() == {}
    capturing.on = False
    assert watch.seconds() == {}
    watch = stopwatch.Stopwatch(torch.device("cuda"))
    watch.lap("score")
    assert watch.seconds() == {"score": 2.0}


def test_a_captured_step_is_not_the_one_that_looks_at_the_pace(capturing, monkeypatch):
    def report():
        watch = stopwatch.Stopwatch(torch.device("cuda"))
        for phase in ("score", "select", "forward", "backward"):
            watch.lap(phase)
        selection = selbp.Selection(torch.arange(14), torch.ones(14))
        return types.SimpleNamespace(_watch=watch, scored=True, backward="recompute", k=14, n=16, selection=selection)

    monkeypatch.setattr(module_pace, "STEPS", 10)
    capturing.on = False
    pace = module_pace.Pace(selbp.TopLoss(), 0.9)
    for _ in range(module_pace.WARM + module_pace.STEPS):
        pace.add(report())
    capturing.on = True
    pace.add(report())
    assert not pace.done
    capturing.on = False
    with pytest.warns(UserWarning, match=r"takes about .* of a full step's time"):
        pace.add(report())
    assert pace.done


def test_a_cpu_step_asks_nothing_of_cuda(capturing):
    watch = stopwatch.Stopwatch(torch.device("cpu"))
    watch.lap("score")
    assert list(watch.seconds()) == ["score"]
