"""``loss="linear_causal_lm"``: the losses, choices and gradients of ``"causal_lm"``, without its logits."""

import pickle
import subprocess
import sys

import pytest
import torch
from support.training_kit import gradients
from torch import distributed, nn

import selbp
from selbp.ops import _skipped_tiles

VOCABULARY, WIDTH = 23, 8


@pytest.fixture(autouse=True)
def _double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class Tokens(nn.Module):
    """Token ids (n, T) to logits (n, T, C); ``after`` is what it does to what its head gives."""

    def __init__(self, *, bias=False, tied=False, after=None):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mix = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.head.weight = self.embed.weight
        self.after = after

    def forward(self, input_ids):
        logits = self.head(self.body(self.mix(self.embed(input_ids))[0]))
        return {"logits": logits if self.after is None else self.after(logits)}


class Mlp(nn.Module):
    """The same of each token alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh())
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, input_ids):
        return self.head(self.body(input_ids))


def model_of(seed=0, **options):
    torch.manual_seed(seed)
    return Tokens(**options)


def mlp():
    torch.manual_seed(0)
    return Mlp()


def batch(n=16, length=9, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (n, length), generator=generator)
    labels = ids.clone()
    for i in range(n):
        labels[i, : i % (length + 1)] = -100  # one of them whole
    return {"input_ids": ids, "labels": labels}


def both(make, data, **options):
    """Steps with either loss on equal models, and their gradients."""
    found = []
    for loss in ("causal_lm", "linear_causal_lm"):
        model = make()
        generator = torch.Generator().manual_seed(3)
        step = selbp.SelectiveBackprop(model, loss=loss, generator=generator, **{"keep": 0.25, **options})
        found.append((step, gradients(model, step(dict(data)))))
    return found


def assert_equal(plain, linear):
    (step, want), (other, got) = plain, linear
    assert torch.equal(step.report.selection.indices, other.report.selection.indices)
    torch.testing.assert_close(other.report.selection.weights, step.report.selection.weights, rtol=1e-9, atol=1e-12)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(
            got[name], want[name], rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name} {m}"
        )
    for figure in ("loss", "accuracy", "weight_sum"):
        assert getattr(other.report, figure) == pytest.approx(getattr(step.report, figure), rel=1e-10), figure


RULES = {
    "full": selbp.Full(),
    "random": selbp.Random(),
    "top": selbp.TopLoss(),
    "top-tokens": selbp.TopLoss(normalize="tokens"),
    "norms": selbp.GradNormImportance(),
    "matching": selbp.GradientMatching(),
}
OPTIONS = {
    "plain": {},
    "smoothing": {"label_smoothing": 0.1},
    "weights": {"class_weight": torch.arange(VOCABULARY, dtype=torch.float64) / 7},
    "both": {"class_weight": torch.arange(VOCABULARY, dtype=torch.float64) / 7, "label_smoothing": 0.2},
    "ignore": {"ignore_index": 5},
}


@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("tied", [False, True], ids=["own", "tied"])
def test_choices_and_gradients_are_those_of_stored_logits(rule, backward, tied):
    plain, linear = both(lambda: model_of(tied=tied, bias=not tied), batch(), selector=rule, backward=backward)
    assert_equal(plain, linear)
    assert not linear[0]._strategy.dense


@pytest.mark.parametrize("rule", ["top", "matching"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_loss(rule, options):
    data = batch()
    if "ignore_index" in options:
        data["labels"][data["labels"] == -100] = 5
    assert_equal(*both(lambda: model_of(bias=True), data, selector=RULES[rule], **options))


@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("rule", [selbp.Full(), selbp.TopLoss()], ids=["full", "top"])
def test_a_part_of_the_probabilities_left_out(rule, backward, monkeypatch):
    """Same choice and losses; the bias's gradient is off by something, and by at most 2 skip_mass in all."""
    monkeypatch.setattr(_skipped_tiles, "COLUMNS", 4)
    found = []
    for skip_mass in (0.0, 0.2):
        model, data = model_of(bias=True), batch()
        with torch.no_grad():
            model.head.weight *= 12
        data["labels"] = data["input_ids"]  # equally long, so that the tokens' weights sum to 1
        step = selbp.SelectiveBackprop(
            model, selector=rule, keep=4, loss="linear_causal_lm", backward=backward, skip_mass=skip_mass
        )
        loss = step(data)
        loss.backward()
        found.append((loss.detach(), step.report.selection, model.head.bias.grad))
    (exact, chosen, grad), (ours, again, other) = found
    torch.testing.assert_close(ours, exact)
    assert torch.equal(chosen.indices, again.indices)
    assert 1e-6 < float((grad - other).abs().sum()) <= 0.4


def test_sketches_are_those_of_stored_logits():
    assert_equal(*both(lambda: model_of(bias=True), batch(), selector=selbp.GradientMatching(), proxy="sketch"))


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_a_cut_below_the_head(backward):
    options = dict(selector=selbp.GradientMatching(), cut="body", backward=backward)
    plain, linear = both(model_of, batch(), **options)
    assert set(plain[1]) == set(linear[1])
    for name, want in plain[1].items():
        torch.testing.assert_close(linear[1][name], want, rtol=1e-10, atol=1e-12)


def test_a_normalizer_and_a_given_selection():
    data, found = batch(), []
    for loss in ("causal_lm", "linear_causal_lm"):
        model = model_of()
        step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=4, loss=loss)
        step(dict(data))
        rows = selbp.types.Selection(torch.tensor([3, 1]), torch.tensor([0.5, 2.0]))
        found.append(gradients(model, step(dict(data), selection=rows, num_items_in_batch=50)))
    for name, want in found[0].items():
        torch.testing.assert_close(found[1][name], want, rtol=1e-10, atol=1e-12)


def test_the_head_is_as_it_was_and_the_logits_are_its_input_meanwhile():
    model, seen = model_of(), []
    model.register_forward_hook(lambda module, args, output: seen.append(tuple(output["logits"].shape)))
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=4, loss="linear_causal_lm", backward="rows")
    step(batch()).backward()
    assert seen == [(16, 9, WIDTH)]
    assert "forward" not in vars(model.head)
    with pytest.raises(ValueError, match="n = 16"):
        step({**batch(), "attention_mask": torch.ones(3, 9)})
    assert "forward" not in vars(model.head)
    assert model(batch()["input_ids"])["logits"].shape == (16, 9, VOCABULARY)


def test_autocast_and_a_wrapper_that_widens_the_output():
    """As Accelerate prepares a model: it runs in bfloat16, and returns float32."""

    def make():
        model = model_of().float()
        inner = model.forward

        def forward(*args, **kwargs):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return {"logits": inner(*args, **kwargs)["logits"].float()}

        model.forward = forward
        return model

    (_, want), (step, got) = both(make, batch(), selector=selbp.Full())
    for name in want:
        scale = want[name].abs().max()
        assert (got[name] - want[name]).abs().max() <= 2**-7 * scale, name  # a product rounded to 8 bits
    assert step.report.loss > 0


@pytest.mark.parametrize("rule", ["top", "matching"])
@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "ran-before"])
def test_compiled_code(rule, ran_before):
    def make():
        torch._dynamo.reset()
        torch.manual_seed(0)
        compiled = torch.compile(Mlp(), backend="eager")
        if ran_before:
            compiled(batch()["input_ids"])
        return compiled

    plain, linear = both(make, batch(), selector=RULES[rule], backward="recompute")
    assert_equal(plain, linear)
    assert linear[0].model(batch()["input_ids"]).shape == (16, 9, VOCABULARY)


def test_frozen_layers_below_the_head():
    def make():
        model = model_of()
        for layer in (model.embed, model.mix, model.body):
            layer.requires_grad_(False)
        return model

    for backward in ("rows", "recompute"):
        assert_equal(*both(make, batch(), selector=selbp.TopLoss(), backward=backward))


@pytest.mark.parametrize(
    "after",
    [lambda z: z * 1.5, lambda z: 30 * torch.tanh(z / 30), lambda z: z.mul_(2.0), lambda z: z[:, :-1]],
    ids=["scaled", "capped", "in-place", "some"],
)
def test_a_model_that_does_more_to_its_logits_is_refused(after):
    step = selbp.SelectiveBackprop(model_of(after=after), selector=selbp.TopLoss(), keep=4, loss="linear_causal_lm")
    with pytest.raises(RuntimeError, match='more to its logits .*loss="causal_lm"'):
        step(batch())


class Adapter(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.low = nn.Parameter(torch.zeros(2, 2))

    @property
    def weight(self):
        return self.base_layer.weight

    def forward(self, x):
        return self.base_layer(x)


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


def _with(head):
    model = model_of()
    model.head = head(model.head)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: _with(Adapter), {"head": "head"}, "an adapter"),
        (lambda: _with(lambda head: Own(WIDTH, VOCABULARY)), {}, "a torch.nn.Linear"),
        (model_of, {"head_gradient": "full"}, "head_gradient"),
        (model_of, {"pass_labels": True}, "pass_labels"),
        (model_of, {"cut": "head", "selector": selbp.GradientMatching()}, "cut= must be a module before it"),
        (model_of, {"class_dim": 1}, "class_dim"),
        (model_of, {"class_weight": torch.ones(4)}, "23 classes"),
    ],
    ids=["adapter", "own-forward", "full-head", "labels", "cut", "class-dim", "class-weight"],
)
def test_what_cannot_be_right_is_refused_at_construction(make, options, message):
    with pytest.raises(ValueError, match=message):
        selbp.SelectiveBackprop(
            make(), **{"selector": selbp.TopLoss(), "keep": 4, "loss": "linear_causal_lm", **options}
        )


@pytest.mark.parametrize("place", ["hook", "forward"])
def test_a_head_that_something_else_stands_in_for_is_refused(place):
    model = model_of()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=4, loss="linear_causal_lm")
    if place == "hook":
        model.head.register_forward_hook(lambda module, args, output: output * 2)
    else:
        model.head.forward = lambda x: nn.functional.linear(x, model.head.weight) * 2
    with pytest.raises(ValueError, match="a hook on it, or a forward of its own"):
        step(batch())


def test_a_head_that_runs_twice_is_refused():
    model = model_of()
    run, head = model.forward, model.head

    def forward(input_ids):
        head(torch.zeros(1, WIDTH))
        return run(input_ids)

    model.forward = forward
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=4, loss="linear_causal_lm")
    with pytest.raises(RuntimeError, match="exactly once in a forward, it ran 2 times"):
        step(batch())


def test_auto_and_diagnose_count_the_heads_work():
    data = batch()
    want = selbp.diagnose(model_of(), dict(data), loss="causal_lm")
    got = selbp.diagnose(model_of(), dict(data), loss="linear_causal_lm")
    last = 2 * 16 * WIDTH * VOCABULARY  # of each sequence, a token that predicts nothing
    assert got.forward_flops == want.forward_flops - last
    assert got.dense == {}
    step = selbp.SelectiveBackprop(model_of(), selector=selbp.TopLoss(), keep=0.25, loss="linear_causal_lm")
    step(dict(data))
    assert "modelled time" in step.report.backward_reason


def test_a_bad_token_spoils_no_other_sample():
    """NaN in one sample's hidden states: the others train as if it were not there."""

    class Poisoned(Tokens):
        def forward(self, input_ids):
            hidden = self.body(self.mix(self.embed(input_ids))[0])
            return {"logits": self.head(torch.where((input_ids == 0).all(1)[:, None, None], torch.nan, hidden))}

    def make():
        torch.manual_seed(0)
        return Poisoned()

    data = batch()
    data["input_ids"][2], data["labels"][2] = 0, 1
    for rule in (selbp.TopLoss(), selbp.GradientMatching()):
        plain, linear = both(make, data, selector=rule, backward="recompute")
        assert 2 not in linear[0].report.selection.indices[linear[0].report.selection.weights != 0]
        assert_equal(plain, linear)


def test_a_step_pickles():
    step = selbp.SelectiveBackprop(Mlp(), selector=selbp.TopLoss(), keep=4, loss="linear_causal_lm")
    step(batch())
    again = pickle.loads(pickle.dumps(step))
    assert gradients(again.model, again(batch())).keys() == {name for name, _ in again.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"proxy": "sketch"}, {"selector": "top"}], ids=["matching", "sketch", "top"])
def test_the_peak_stays_below_one_set_of_logits(options):
    """In a process of its own: 1024 tokens of 48,000 classes are 197 MB, and autograd keeps more than one copy."""
    program = f"""
import resource, torch, selbp
torch.set_num_threads(1)
class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Embedding(48000, 8), torch.nn.Linear(8, 48000, bias=False)
    def forward(self, input_ids):
        return self.head(self.body(input_ids))
options = {options!r}
rule = selbp.TopLoss() if options.pop("selector", "") == "top" else selbp.GradientMatching()
step = selbp.SelectiveBackprop(Model(), selector=rule, keep=0.25, loss="linear_causal_lm", backward="rows", **options)
few, ids = (torch.randint(0, 48000, (16, length)) for length in (2, 64))
step(few, few).backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(ids, ids).backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=600)
    grown = int(done.stdout.split()[-1]) * 1024
    assert grown < 4 * 1024 * 48000, f"{grown / 1e6:.0f} MB"


@pytest.mark.parametrize("backward", ["rows", "recompute"])
def test_data_parallel(tmp_path, backward):
    """The head's weight is used after the wrapper's forward: its gradient is averaged as the others' are."""
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("torch.distributed has no gloo here")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrap = nn.parallel.DistributedDataParallel
        for rule in (selbp.TopLoss(), selbp.GradientMatching()):
            assert_equal(*both(lambda: wrap(mlp()), batch(), selector=rule, backward=backward))
            assert_equal(*both(lambda: wrap(mlp(), static_graph=True), batch(), selector=rule, backward=backward))
        with pytest.raises(ValueError, match="find_unused_parameters"):
            options = dict(selector=selbp.TopLoss(), keep=4, loss="linear_causal_lm")
            selbp.SelectiveBackprop(wrap(Mlp(), find_unused_parameters=True), **options)
    finally:
        distributed.destroy_process_group()
