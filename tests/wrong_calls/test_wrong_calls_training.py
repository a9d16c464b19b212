"""Wrong calls of the training step, the cut, the rules and what is beside them, each with what its error must say.

Every error names the argument, what was expected and what came. A call that fails leaves the step as it was.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import selbp
from selbp.types import BatchStatistics

N, C, D = 8, 5, 6


def mlp():
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, C))


def step(**options):
    return selbp.SelectiveBackprop(mlp(), **{"selector": selbp.TopLoss(), "keep": 0.5, **options})


X, Y = torch.zeros(N, D), torch.zeros(N, dtype=torch.int64)
NAN, INF = float("nan"), float("inf")
TENSOR, ARRAY = torch.tensor(0.5), np.array([0.5, 0.5])

# ------------------------------------------------------------------------------------------------- plain arguments

KEEP = "keep must be a float in (0, 1]|int of at least 1"
NUMBERS = {"none": None, "string": "1", "bool": True, "np.bool_": np.bool_(True), "tensor": TENSOR, "array": ARRAY}
NUMBERS |= {"list": [1], "complex": 1j}
CHOICES = {
    "none": None,
    "number": 1,
    "bool": True,
    "another": "best",
    "list": ["same"],
    "tensor": TENSOR,
    "array": ARRAY,
}
OBJECTS = {"number": 3, "string": "x", "list": [1], "tensor": TENSOR, "bool": False}


def rows(where, name, values, error, words):
    return [(f"{where} {name}={key}", value, error, words) for key, value in values.items()]


def without(values, *names):
    return {key: value for key, value in values.items() if key not in names}


STEP = [  # (argument, values, error, words)
    ("keep", NUMBERS, TypeError, KEEP + "|got"),
    (
        "keep",
        {"0": 0, "0.0": 0.0, "-1": -1, "1.5": 1.5, "nan": NAN, "inf": INF, "np": np.float32(-1)},
        ValueError,
        KEEP,
    ),
    (
        "model",
        {"function": str.upper, "class": nn.Linear, "none": None},
        TypeError,
        "model must be a torch.nn.Module|got",
    ),
    (
        "selector",
        {"class": selbp.TopLoss, "string": "top", "none": None, "number": 1},
        TypeError,
        "selector must be an instance of a selector|got",
    ),
    ("scoring", CHOICES, ValueError, "scoring must be 'same' or 'eval'|got"),
    ("head_gradient", CHOICES, ValueError, "head_gradient must be 'subset' or 'full'|got"),
    ("target", CHOICES, ValueError, "target must be 'local' or 'global'|got"),
    ("scoring_precision", CHOICES, ValueError, "scoring_precision must be 'same' or 'bfloat16' or 'float16'|got"),
    ("batchnorm", CHOICES, ValueError, "batchnorm must be 'exact' or 'subset'|got"),
    ("backward", CHOICES, ValueError, "backward must be one of 'auto', 'rows', 'recompute', got"),
    (
        "loss",
        {**without(CHOICES, "list"), "list": ["mse"]},
        ValueError,
        "loss must be one of 'cross_entropy'|callable|got",
    ),
    (
        "loss",
        {"mean": nn.CrossEntropyLoss(), "sum": nn.MSELoss(reduction="sum"), "function": nn.functional.mse_loss},
        ValueError,
        'reduction="none"|one loss per sample',
    ),
    ("head", without(OBJECTS, "string"), TypeError, "head must be a module, its name or None|got"),
    (
        "head",
        {"name": "fc", "empty": "none.at.all"},
        ValueError,
        "head|is not a module of the model; candidates: '0', '2'",
    ),
    ("head", {"another": nn.Linear(2, 2)}, ValueError, "head must be a module of the model, got another Linear"),
    ("head", {"no layer": "1"}, ValueError, "head must be a linear layer with a weight (C, d), got Tanh"),
    ("cut", without(OBJECTS, "string"), TypeError, "cut must be a module of the model, its name or None|got"),
    ("schedule", OBJECTS, TypeError, "schedule must be a selbp.Schedule or None|got"),
    ("generator", OBJECTS, TypeError, "generator must be a torch.Generator or None|got"),
    (
        "class_weight",
        {"list": [1.0] * C, "number": 1.0, "array": np.ones(C), "2-D": torch.ones(C, 1)},
        ValueError,
        "class_weight must be a tensor (C,)|got",
    ),
    (
        "class_weight",
        {"int": torch.ones(C, dtype=torch.int64), "bool": torch.ones(C, dtype=torch.bool)},
        TypeError,
        "class_weight must be floating|got torch.",
    ),
    (
        "class_weight",
        {"negative": -torch.ones(C), "nan": torch.full((C,), NAN)},
        ValueError,
        "class_weight must be finite and nowhere negative",
    ),
    ("ignore_index", {**NUMBERS, "float": 1.0}, TypeError, "ignore_index must be an int|got"),
    ("label_smoothing", NUMBERS, TypeError, "label_smoothing must be a number|got"),
    (
        "label_smoothing",
        {"1.5": 1.5, "-0.1": -0.1, "nan": NAN},
        ValueError,
        "label_smoothing must be finite|[0, 1]|got",
    ),
    ("class_dim", {**without(NUMBERS, "none"), "float": 1.0}, TypeError, "class_dim must be 1, -1 or None|got"),
    ("class_dim", {"0": 0, "2": 2}, ValueError, "class_dim must be 1, -1 or None|got"),
    (
        "auto_advance",
        {"none": None, "number": 1, "string": "no", "tensor": TENSOR},
        TypeError,
        "auto_advance must be True or False|got",
    ),
]

CUT = [
    ("keep", NUMBERS, TypeError, KEEP + "|got"),
    ("keep", {"0": 0, "1.5": 1.5, "nan": NAN}, ValueError, KEEP),
    ("selector", {"class": selbp.TopLoss, "string": "top", "number": 1}, TypeError, "selector must be an instance|got"),
    (
        "selector",
        {"loss": selbp.TopLoss(), "percentile": selbp.LossPercentile()},
        ValueError,
        "reads per-sample losses|pass losses=",
    ),
    ("generator", OBJECTS, TypeError, "generator must be a torch.Generator or None|got"),
    ("losses", {"number": 3, "tensor": TENSOR}, TypeError, "losses must be a function that returns (n,) losses|got"),
    ("proxy", CHOICES, ValueError, "proxy must be one of 'pooled', 'flat', 'positions'|got"),
    ("batchnorm", CHOICES, ValueError, "batchnorm must be one of 'exact', 'subset'|got"),
]

RULES = [
    (selbp.GradientMatching, "ridge", NUMBERS, TypeError, "ridge must be a number|got"),
    (
        selbp.GradientMatching,
        "ridge",
        {"-1": -1, "nan": NAN, "inf": INF},
        ValueError,
        "ridge must be finite|at least 0|got",
    ),
    (selbp.GradientMatching, "unit_sum", NUMBERS, TypeError, "unit_sum must be a number|got"),
    (selbp.GradientMatching, "unit_sum", {"-1": -1, "nan": NAN}, ValueError, "unit_sum must be finite|at least 0|got"),
    (selbp.GradientMatching, "rule", CHOICES, ValueError, "rule must be one of|'ols'|got"),
    (selbp.GradientMatching, "weights", CHOICES, ValueError, "weights must be one of 'refit', 'mean', 'batch'|got"),
    (
        selbp.GradientMatching,
        "nonnegative",
        {"none": None, "1": 1, "string": "yes", "tensor": TENSOR},
        TypeError,
        "nonnegative must be True or False|got",
    ),
    (selbp.TopLoss, "weights", CHOICES, ValueError, "weights must be one of 'mean', 'batch', 'refit'|got"),
    (selbp.TopLoss, "ridge", NUMBERS, TypeError, "ridge must be a number|got"),
    (selbp.TopGradNorm, "weights", {"unbiased": "unbiased"}, ValueError, "weights must be one of|got 'unbiased'"),
    (selbp.TopGradNorm, "ridge", {"-1": -1, "inf": INF}, ValueError, "ridge must be finite|got"),
    (
        selbp.ReducibleLoss,
        "irreducible",
        {"none": None, "empty": "", "number": 1},
        TypeError,
        "irreducible must be the name of a per-sample tensor|got",
    ),
    (selbp.DivBS, "weights", CHOICES, ValueError, "weights must be one of 'mean', 'batch'|got"),
    (
        selbp.CubeSampling,
        "dimensions",
        {**without(NUMBERS, "none"), "float": 1.0},
        TypeError,
        "dimensions must be an int or None|got",
    ),
    (selbp.CubeSampling, "dimensions", {"0": 0, "-1": np.int64(-1)}, ValueError, "dimensions must be at least 1|got"),
    (
        selbp.CubeSampling,
        "probabilities",
        CHOICES,
        ValueError,
        "probabilities must be one of 'gradnorm', 'uniform'|got",
    ),
    (selbp.GradNormImportance, "norm", CHOICES, ValueError, "norm must be one of 'residual', 'gradient'|got"),
    (
        selbp.GradNormImportance,
        "weights",
        {"refit": "refit"},
        ValueError,
        "weights must be one of 'unbiased'|got 'refit'",
    ),
    (
        selbp.GradNormImportance,
        "replacement",
        {"none": None, "0": 0, "string": "no"},
        TypeError,
        "replacement must be True or False|got",
    ),
    (
        selbp.GradNormImportance,
        "threshold",
        without(NUMBERS, "none", "string"),
        TypeError,
        "threshold must be a number|got",
    ),
    (
        selbp.GradNormImportance,
        "threshold",
        {"string": "auto"},
        ValueError,
        "threshold must be one of 'recompute', 'rows'|got",
    ),
    (selbp.GradNormImportance, "threshold", {"-1": -1.0, "nan": NAN}, ValueError, "threshold must be finite|got"),
    (selbp.GradNormImportance, "momentum", {"2": 2, "nan": NAN}, ValueError, "momentum must be finite|[0, 1]|got"),
    (selbp.LossPercentile, "beta", NUMBERS, TypeError, "beta must be a number|got"),
    (selbp.LossPercentile, "beta", {"-1": -1, "nan": NAN}, ValueError, "beta must be finite|got"),
    (selbp.LossPercentile, "p_min", {"2": 2.0, "-1": -1}, ValueError, "p_min must be finite|[0, 1]|got"),
    (selbp.LossPercentile, "history", {**NUMBERS, "float": 4.0}, TypeError, "history must be an int|got"),
    (selbp.LossPercentile, "history", {"0": 0, "-1": -1}, ValueError, "history must be at least 1|got"),
    (selbp.LossPercentile, "weights", {"unbiased": "unbiased"}, ValueError, "p_min must be > 0|got 0"),
    (selbp.LossRank, "weights", CHOICES, ValueError, "weights must be one of 'mean', 'batch', 'unbiased'|got"),
    (
        selbp.Schedule,
        "start",
        {**NUMBERS, "float": 1.0},
        TypeError,
        "start must be an int (a number of optimizer steps)|got",
    ),
    (selbp.Schedule, "start", {"-1": -1}, ValueError, "start must be at least 0|got -1"),
    (selbp.Schedule, "end", without(NUMBERS, "none"), TypeError, "end must be an int|got"),
    (selbp.Schedule, "end", {"-1": -1}, ValueError, "end must be at least 0|got -1"),
    (selbp.Schedule, "every", {"0": 0}, ValueError, "every must be at least 1|got 0"),
    (selbp.Schedule, "every", NUMBERS, TypeError, "every must be an int|got"),
    (selbp.Schedule, "between", CHOICES, ValueError, "between must be one of 'full', 'random'|got"),
    (selbp.recommended, "cut", without(OBJECTS, "string"), TypeError, "cut must be a module, its name or None|got"),
]

CALLS = []  # (id, call, error, words)


def _construct(function, name, value, **base):
    return lambda: function(**{**base, name: value})


def _build_step(name, value):
    return lambda: selbp.SelectiveBackprop(**{"model": mlp(), "selector": selbp.TopLoss(), "keep": 0.5, name: value})


for _name, _values, _error, _words in STEP:
    for _key, _value, _, _ in rows("step", _name, _values, _error, _words):
        CALLS.append((_key, _build_step(_name, _value), _error, _words))
for _name, _values, _error, _words in CUT:
    for _key, _value, _, _ in rows("BackwardCut", _name, _values, _error, _words):
        CALLS.append((_key, _construct(selbp.BackwardCut, _name, _value, keep=0.5), _error, _words))
for _function, _name, _values, _error, _words in RULES:
    for _key, _value, _, _ in rows(_function.__name__, _name, _values, _error, _words):
        CALLS.append((_key, _construct(_function, _name, _value), _error, _words))


def combined(*, error=ValueError, words, **options):
    return lambda: step(**options), error, words


COMBINATIONS = {
    "eval with rows": combined(scoring="eval", backward="rows", words='scoring="eval" is for backward="recompute"'),
    "precision with rows": combined(scoring_precision="bfloat16", backward="rows", words='is for backward="recompute"'),
    "global of losses": combined(target="global", words='target="global" is for rules that match gradients|TopLoss'),
    "global of products": combined(
        target="global", selector=selbp.CubeSampling(), words='target="global" is for rules that match gradients|Cube'
    ),
    "cut and head": combined(cut="0", head="2", selector=selbp.Random(), words="cut= goes with none of head"),
    "cut and full head": combined(
        cut="0", head_gradient="full", selector=selbp.Random(), words="cut= goes with none of"
    ),
    "cut of another": combined(
        cut=nn.Linear(2, 2), selector=selbp.Random(), words="cut must be a module of the model|got"
    ),
    "cut by a wrong name": combined(cut="fc", selector=selbp.Random(), words="cut='fc' names no module|it has 0, 1, 2"),
    "cut and losses": combined(cut="0", words="reads per-sample losses"),
    "subset with recompute": combined(batchnorm="subset", backward="recompute", words="batchnorm='subset'|rows"),
    "smoothing of mse": combined(loss="mse", label_smoothing=0.1, words='label_smoothing|"cross_entropy"'),
    "class_dim of mse": combined(loss="mse", class_dim=1, words='class_dim|"cross_entropy"'),
    "class_dim of causal_lm": combined(loss="causal_lm", class_dim=1, words='class_dim=1 is for "cross_entropy"'),
    "weights of bce": combined(loss="bce", class_weight=torch.ones(C), words='class_weight|"cross_entropy"'),
}
CALLS += [(f"step, {key}", call, error, words) for key, (call, error, words) in COMBINATIONS.items()]

# ------------------------------------------------------------------------------------------------- select of a rule


def stats(n=N, **changes):
    one = torch.ones(n)
    whole = BatchStatistics(one, one, one, one, one.bool(), one.bool())
    return whole._replace(**changes)


def proxies(n=N):
    return selbp.GradientProxies(torch.ones(n, C), torch.ones(n, D))


SELECT = {
    "k=0": ({"k": 0}, ValueError, "k must lie in [1, n = 8], got 0"),
    "k=9": ({"k": 9}, ValueError, "k must lie in [1, n = 8], got 9"),
    "k=1.0": ({"k": 1.0}, TypeError, "k must be an int, got 1.0"),
    "k=True": ({"k": True}, TypeError, "k must be an int, got True"),
    "k=tensor": ({"k": torch.tensor(2)}, TypeError, "k must be an int, got a Tensor"),
    "stats=tensor": ({"stats": torch.ones(N)}, TypeError, "stats must be a BatchStatistics, got a Tensor"),
    "stats=none": ({"stats": None}, TypeError, "stats must be a BatchStatistics, got None"),
    "stats.valid=int": ({"stats": stats(valid=torch.ones(N))}, ValueError, "stats.valid must be a bool tensor (n,)"),
    "stats.loss=short": (
        {"stats": stats(loss=torch.ones(3))},
        ValueError,
        "stats.loss must be a tensor (n,) = (8,)|(3,)",
    ),
    "generator=number": ({"generator": 3}, TypeError, "generator must be a torch.Generator or None, got 3"),
}
DRAWS = [selbp.Random(), selbp.LossPercentile(), selbp.LossRank(), selbp.GradNormImportance(), selbp.CubeSampling()]
EVERY = [selbp.Full(), selbp.TopLoss(), selbp.TopGradNorm(), selbp.GradientMatching(), selbp.DivBS(), *DRAWS]
READERS = [selbp.GradientMatching(), selbp.DivBS(), selbp.CubeSampling(), selbp.TopLoss(weights="refit")]


def _select(rule, **changes):
    arguments = {"stats": stats(), "k": 3, "proxies": proxies(), **changes}
    return lambda: rule.select(arguments.pop("stats"), arguments.pop("k"), **arguments)


for _rule in EVERY:
    for _key, (_changes, _error, _words) in SELECT.items():
        CALLS.append((f"{type(_rule).__name__}.select {_key}", _select(_rule, **_changes), _error, _words))
for _rule in READERS:
    _who = f"{type(_rule).__name__}.select"
    CALLS += [
        (f"{_who} proxies=none", _select(_rule, proxies=None), ValueError, "proxies must be given, got None"),
        (
            f"{_who} proxies=tensor",
            _select(_rule, proxies=torch.ones(3)),
            TypeError,
            "proxies must be a selbp.GradientPro|got",
        ),
        (
            f"{_who} proxies of 5",
            _select(_rule, proxies=proxies(5)),
            ValueError,
            "proxies must be of the n = 8 samples|got 5",
        ),
    ]
for _key, _extras, _error, _words in (
    ("none", None, ValueError, "extras must hold 'irreducible_loss'|got none"),
    ("another", {"x": torch.ones(N)}, ValueError, "extras must hold 'irreducible_loss'|got 'x'"),
    ("list", {"irreducible_loss": [1.0] * N}, TypeError, "irreducible_loss must be a Tensor, got list"),
    ("short", {"irreducible_loss": torch.ones(3)}, ValueError, "irreducible_loss must be (n,) = (8,), got (3,)"),
    ("number", 3, TypeError, "extras must be a dict of tensors (n,), got int"),
):
    CALLS.append(
        (f"ReducibleLoss.select extras={_key}", _select(selbp.ReducibleLoss(), extras=_extras), _error, _words)
    )

# --------------------------------------------------------------------------- select, fence, checkpoint, cut, diagnose

losses = torch.ones(N, requires_grad=True)
INDEX = torch.tensor([0, 1])
HIDDEN = torch.ones(N, 3, requires_grad=True)


class Shared(nn.Module):
    def forward(self, x):
        return (x,)


CALLS += [
    (
        "select indices=list",
        lambda: selbp.select(losses, [0, 1]),
        TypeError,
        "indices must be an int64 tensor, got list",
    ),
    (
        "select indices=int32",
        lambda: selbp.select(losses, INDEX.int()),
        TypeError,
        "indices must be an int64|got torch.int32",
    ),
    (
        "select indices=bool",
        lambda: selbp.select(losses, torch.ones(N).bool()),
        TypeError,
        "indices must be an int64|bool",
    ),
    ("select indices=2-D", lambda: selbp.select(losses, INDEX[None]), ValueError, "indices must be (k,), got (1, 2)"),
    ("select indices=8", lambda: selbp.select(losses, INDEX + 7), IndexError, "they must lie in [0, 8), got 7 to 8"),
    (
        "select indices=-1",
        lambda: selbp.select(losses, INDEX - 1),
        IndexError,
        "they must lie in [0, 8), got -1 to 0",
    ),
    (
        "select losses=scalar",
        lambda: selbp.select(losses.mean(), INDEX),
        ValueError,
        "losses must hold one entry per sample",
    ),
    ("select losses=number", lambda: selbp.select(3.0, INDEX), ValueError, "losses must hold one entry per sample"),
    ("select losses differ", lambda: selbp.select((losses, losses[1:]), INDEX), ValueError, "losses must agree|[7, 8]"),
    (
        "select batchnorm",
        lambda: selbp.select(losses, INDEX, batchnorm="no"),
        ValueError,
        'batchnorm must be "exact"|got',
    ),
    ("fence number", lambda: selbp.fence(3), TypeError, "fence takes a Tensor, got 3"),
    ("fence list", lambda: selbp.fence([losses]), TypeError, "fence takes a Tensor, got ["),
    (
        "checkpoint module=function",
        lambda: selbp.checkpoint(torch.tanh, losses),
        TypeError,
        "module must be a torch.nn.Module",
    ),
    ("checkpoint inputs=none", lambda: selbp.checkpoint(nn.Tanh()), TypeError, "inputs must be tensors|got ()"),
    (
        "checkpoint inputs=None",
        lambda: selbp.checkpoint(nn.Tanh(), None),
        TypeError,
        "inputs must be tensors|got (None,)",
    ),
    ("checkpoint inputs=list", lambda: selbp.checkpoint(nn.Tanh(), [HIDDEN]), TypeError, "inputs must be tensors|got"),
    (
        "checkpoint batch norm",
        lambda: selbp.checkpoint(nn.BatchNorm1d(3), HIDDEN),
        ValueError,
        "must not contain BatchNorm",
    ),
    ("checkpoint tuple", lambda: selbp.checkpoint(Shared(), HIDDEN), TypeError, "must return a Tensor, got tuple"),
    (
        "cut hidden=list",
        lambda: selbp.BackwardCut(2)([HIDDEN]),
        TypeError,
        "hidden must be a Tensor (n, ...), got [",
    ),
    (
        "cut hidden=none",
        lambda: selbp.BackwardCut(2)(None),
        TypeError,
        "hidden must be a Tensor (n, ...), got None",
    ),
    (
        "cut hidden=scalar",
        lambda: selbp.BackwardCut(2)(losses.mean()),
        ValueError,
        "hidden must be (n, ...), got a scalar",
    ),
    (
        "cut features=list",
        lambda: selbp.BackwardCut(2)(HIDDEN, [1]),
        TypeError,
        "features must be a Tensor|got [1]",
    ),
    (
        "cut features=short",
        lambda: selbp.BackwardCut(2)(HIDDEN, HIDDEN[1:]),
        ValueError,
        "features must have|(7, 3)",
    ),
    ("cut report", lambda: selbp.BackwardCut(2).report, RuntimeError, "no report before the first backward"),
    (
        "backward_cut hidden",
        lambda: selbp.backward_cut("x", 2),
        TypeError,
        "hidden must be a Tensor (n, ...)",
    ),
    ("backward_cut keep", lambda: selbp.backward_cut(HIDDEN, 0), ValueError, KEEP),
    (
        "backward_cut selector",
        lambda: selbp.backward_cut(HIDDEN, 2, selbp.Random),
        TypeError,
        "selector must be",
    ),
    ("diagnose model", lambda: selbp.diagnose(torch.tanh, (X, Y)), TypeError, "model must be a torch.nn.Module|got"),
    (
        "diagnose batch=tensor",
        lambda: selbp.diagnose(mlp(), X),
        ValueError,
        "target is missing",
    ),
    ("diagnose batch=none", lambda: selbp.diagnose(mlp(), None), TypeError, "batch must be (inputs, target)|got None"),
    ("diagnose batch of 1", lambda: selbp.diagnose(mlp(), (X,)), ValueError, "target is missing"),
    ("diagnose keep", lambda: selbp.diagnose(mlp(), (X, Y), 0), ValueError, KEEP),
    ("diagnose keep=none", lambda: selbp.diagnose(mlp(), (X, Y), None), TypeError, KEEP),
    ("diagnose loss", lambda: selbp.diagnose(mlp(), (X, Y), loss="l2"), ValueError, "loss must be one of|got 'l2'"),
    (
        "diagnose batchnorm",
        lambda: selbp.diagnose(mlp(), (X, Y), batchnorm=1),
        ValueError,
        "batchnorm must be one of|got 1",
    ),
    (
        "diagnose class_dim",
        lambda: selbp.diagnose(mlp(), (X, Y), class_dim=0),
        ValueError,
        "class_dim must be 1, -1|got 0",
    ),
    ("diagnose target", lambda: selbp.diagnose(mlp(), (X, Y.float())), TypeError, "target must be int64 class indices"),
    (
        "diagnose probe",
        lambda: selbp.diagnose(mlp(), (torch.zeros(20, D), torch.zeros(20, 2).long())),
        ValueError,
        "on 8 of the batch's 20 samples: logits must be|(8, 5)",
    ),
    ("step report", lambda: step().report, RuntimeError, "no report before the first step"),
]


@pytest.mark.parametrize(
    ("call", "error", "words"), [row[1:] for row in CALLS], ids=[row[0].replace(" ", "-") for row in CALLS]
)
def test_a_wrong_call_says_what_is_wrong(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    for part in words.split("|"):
        assert part in str(caught.value), str(caught.value)


# ---------------------------------------------------------------------------------------------------- calls of a step


def lossy(output, target):
    return (output**2).sum()


STEP_CALLS = {
    "inputs=number": ({}, (3, Y), TypeError, "inputs must be a Tensor, a tuple or a dict of tensors, got int"),
    "inputs=none": ({}, (None, Y), TypeError, "inputs must be a Tensor, a tuple or a dict of tensors, got NoneType"),
    "inputs=array": ({}, (np.zeros((N, D)), Y), TypeError, "inputs must be a Tensor|got ndarray"),
    "inputs=string": ({}, ("x", Y), TypeError, "inputs must be a Tensor|got str"),
    "inputs=empty tuple": ({}, ((), Y), ValueError, "inputs hold no tensor"),
    "inputs=empty dict": ({}, ({}, Y), ValueError, "inputs hold no tensor"),
    "inputs=scalar": ({}, (torch.tensor(1.0), Y), ValueError, "inputs hold no tensor"),
    "inputs=numbers": ({}, ((1, 2.0), Y), ValueError, "inputs hold no tensor"),
    "inputs of 0": ({}, (X[:0], Y[:0]), ValueError, "at least one sample, got a batch of 0"),
    "inputs differ": (
        {},
        ((X, X[1:]), Y),
        ValueError,
        "every tensor of the batch must have n = 8 rows, got one of (7, 6)",
    ),
    "inputs=list of samples": (
        {},
        (list(X), Y),
        ValueError,
        "A list is the model's arguments|step((samples,), target)",
    ),
    "target missing": ({}, (X,), ValueError, 'target is missing: pass step(inputs, target)|"labels"'),
    "labels missing": ({}, ({"x": X},), ValueError, 'target is missing|"labels"'),
    "target short": ({}, (X, Y[1:]), ValueError, "must have n = 8 rows, got one of (7,)"),
    "target=float": (
        {},
        (X, Y.float()),
        TypeError,
        'target must be int64 class indices|got a Tensor float32 (8,)|loss="mse" takes numbers',
    ),
    "target=int32": ({}, (X, Y.int()), TypeError, "target must be int64 class indices|got a Tensor int32 (8,)"),
    "target=list": ({}, (X, [0] * N), TypeError, "target must be int64 class indices|got [0, 0"),
    "target=array": ({}, (X, np.zeros(N)), TypeError, "target must be int64 class indices|got a ndarray float64 (8,)"),
    "target=string": ({}, (X, "labels"), TypeError, "target must be int64 class indices|got 'labels'"),
    "target=probabilities": ({}, (X, torch.ones(N, C + 1)), ValueError, "shape of the logits, (8, 5), got (8, 6)"),
    "target=one column": ({}, (X, torch.ones(N, 1)), ValueError, 'target (8, 1)|of one class|pass loss="mse"'),
    "target=one-hot": (
        {},
        (X, torch.zeros(N, C).long()),
        ValueError,
        "int64 has the logits' shape|be floating",
    ),
    "target=tokens": ({}, (X, torch.zeros(N, 3).long()), ValueError, "got logits (8, 5) for target (8, 3)"),
    "mse shape": ({"loss": "mse"}, (X, torch.zeros(N)), ValueError, "output's shape (8, 5), got (8,)"),
    "bce shape": ({"loss": "bce"}, (X, torch.zeros(N, 1)), ValueError, "output's shape (8, 5), got (8, 1)"),
    "causal_lm shape": (
        {"loss": "causal_lm"},
        (X, Y),
        ValueError,
        "causal_lm needs target (n, T) with T > 1, got (8,)",
    ),
    "loss=scalar": (
        {"loss": lossy},
        (X, Y),
        ValueError,
        "must return one loss per sample|got a Tensor float32 () for n = 8",
    ),
    "loss=none": ({"loss": lambda o, t: None}, (X, Y), ValueError, "must return one loss per sample|got None"),
    "extra=list": ({}, (X, Y, {"hardness": [1.0] * N}), ValueError, "hardness must be a tensor (n,) = (8,)|got [1.0"),
    "extra=short": (
        {},
        (X, Y, {"hardness": torch.ones(3)}),
        ValueError,
        "hardness must be a tensor (n,)|got a Tensor float32 (3,)",
    ),
    "extra missing": ({"selector": selbp.ReducibleLoss()}, (X, Y), ValueError, "extras must hold 'irreducible_loss'"),
    "nested": ({}, (torch.nested.nested_tensor([X[0]] * N, layout=torch.jagged), Y), TypeError, "a nested tensor"),
    "sparse": ({}, (torch.eye(N).to_sparse(), Y), TypeError, "layout torch.sparse_coo"),
    "packed": ({}, (nn.utils.rnn.pack_sequence([X[0]]), Y), TypeError, "a PackedSequence"),
}
BACKWARDS = ["auto", "rows", "recompute", "random", "cut"]


@pytest.mark.parametrize("backward", BACKWARDS)
@pytest.mark.parametrize("name", STEP_CALLS)
def test_a_wrong_batch_leaves_the_step_as_it_was(name, backward):
    options, arguments, error, words = STEP_CALLS[name]
    if backward == "random":
        options = {"selector": selbp.Random(), **options}
    elif backward == "cut":
        options = {"cut": "0", **options, "selector": selbp.GradientMatching()}
    else:
        options = {"selector": selbp.LossPercentile(history=16), "backward": backward, **options}
    if name == "extra missing" and backward == "cut":
        return  # a cut's rule is given no extras: refused at construction
    torch.manual_seed(0)
    one = step(generator=torch.Generator().manual_seed(3), **options)
    before, weights = copy.deepcopy(one.state_dict()), copy.deepcopy(one.model.state_dict())
    extras = arguments[2] if len(arguments) > 2 else {}
    with pytest.raises(error) as caught:
        one(*arguments[:2], **extras)
    message = str(caught.value)
    if message.startswith("on 4 of the batch's 8 samples: "):  # random rows are all that runs
        message, words = message.replace("(4, ", "(8, ").replace("(4,)", "(8,)"), words.replace("n = 8", "n = 4")
    for part in words.split("|"):
        assert part in message, message
    after = one.state_dict()
    before.pop("backward"), after.pop("backward")  # what "auto" decided is of the model, not of the batch
    assert repr(after) == repr(before) and torch.equal(after["generator"], before["generator"])
    assert all(torch.equal(weights[key], value) for key, value in one.model.state_dict().items())
    assert all(p.grad is None for p in one.model.parameters()) and one.model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in one.model.modules())


# ------------------------------------------------------------------------------------------------------ state loading


def changed(**entries):
    return lambda state: {**state, **entries}


STATES = {
    "none": (lambda state: None, "state must have the entries|got NoneType"),
    "list": (list, "state must have the entries|got list"),
    "empty": (lambda state: {}, "state must have the entries|got []"),
    "numbered": (lambda state: {0: 1, "selector": 2}, "state must have the entries|got ['0', 'selector']"),
    "more": (changed(more=1), "state must have the entries|'more'"),
    "count": (changed(optimizer_step=-1), "optimizer_step must be an int of at least 0|got -1"),
    "count=float": (changed(optimizer_step=1.0), "optimizer_step must be an int of at least 0|got 1.0"),
    "count=bool": (changed(optimizer_step=True), "optimizer_step must be an int of at least 0|got True"),
    "auto": (changed(auto_advance=1), "auto_advance a bool|and 1"),
    "backward": (changed(backward="fast"), 'backward must be "rows", "recompute" or None, got \'fast\''),
    "backward=list": (changed(backward=["rows"]), "backward must be \"rows\"|got ['rows']"),
    "rule": (changed(selector_type="TopLoss"), "state is of a TopLoss, the selector is a LossPercentile"),
    "rule=none": (changed(selector_type=None), "state is of a None, the selector is a LossPercentile"),
    "memory=none": (changed(selector=None), "state of LossPercentile must have the entries ['losses']|got NoneType"),
    "memory=empty": (changed(selector={}), "state of LossPercentile must have the entries ['losses'], got []"),
    "memory=list": (changed(selector={"losses": [0.0]}), "losses must be a float64 tensor of shape (16,), got [0.0]"),
    "memory=short": (
        changed(selector={"losses": torch.zeros(3)}),
        "losses must be a float64|got a Tensor float32 (3,)",
    ),
    "generator=none": (changed(generator=None), "pass a generator to both or to neither"),
    "generator=short": (changed(generator=torch.zeros(3, dtype=torch.uint8)), "generator does not fit cpu"),
    "generator=float": (changed(generator=torch.zeros(5056)), "generator does not fit cpu"),
    "generator=list": (changed(generator=[1]), "generator does not fit cpu"),
}


@pytest.mark.parametrize(("change", "words"), STATES.values(), ids=STATES.keys())
def test_a_wrong_state_changes_nothing(change, words):
    one = step(selector=selbp.LossPercentile(history=16), generator=torch.Generator().manual_seed(3))
    one(X, Y)
    before = copy.deepcopy(one.state_dict())
    with pytest.raises(ValueError) as caught:
        one.load_state_dict(change(one.state_dict()))
    for part in words.split("|"):
        assert part in str(caught.value), str(caught.value)
    assert repr(one.state_dict()) == repr(before) and torch.equal(one.state_dict()["generator"], before["generator"])


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("state", [None, [1], {"other": 1}, 3], ids=["none", "list", "other", "number"])
def test_a_rule_refuses_what_is_no_state_of_its(rule, state):
    before = repr(rule.state_dict())
    with pytest.raises(ValueError, match=rf"state of {type(rule).__name__} must have the entries"):
        rule.load_state_dict(state)
    assert repr(rule.state_dict()) == before


# ---------------------------------------------------------------------------------------------- numbers that are right

RIGHT = {
    "keep": lambda: [selbp.BackwardCut(v).keep for v in (np.float32(0.5), np.float64(0.5), np.int32(2))],
    "schedule": lambda: [selbp.Schedule(np.int64(1), np.int32(5), np.uint8(2)).end],
    "matching": lambda: [selbp.GradientMatching(ridge=np.float32(0.5), nonnegative=np.bool_(True)).ridge],
    "top": lambda: [selbp.TopLoss(ridge=np.float16(0.5)).ridge, selbp.TopLoss(ridge=0).ridge],
    "percentile": lambda: [selbp.LossPercentile(np.float32(2), np.float64(0.5), np.int64(16)).history],
    "importance": lambda: [selbp.GradNormImportance(threshold=np.int64(2), momentum=np.float32(0.5)).threshold],
    "cube": lambda: [selbp.CubeSampling(np.int16(2)).dimensions],
    "losses": lambda: [step(label_smoothing=np.float32(0.5), ignore_index=np.int64(-1), class_dim=np.int64(-1)).keep],
}


@pytest.mark.parametrize("name", RIGHT)
def test_numpys_numbers_are_numbers(name):
    for value in RIGHT[name]():
        assert type(value) in (int, float)


@pytest.mark.parametrize("rule", EVERY, ids=lambda rule: type(rule).__name__)
def test_k_may_be_numpys(rule):
    torch.manual_seed(1)
    one = copy.deepcopy(rule).select(stats(), np.int64(3), proxies=proxies())
    torch.manual_seed(1)
    two = copy.deepcopy(rule).select(stats(), 3, proxies=proxies())
    assert torch.equal(one.indices, two.indices) and torch.equal(one.weights, two.weights)


def test_there_are_enough():
    assert len(CALLS) + len(STEP_CALLS) + len(STATES) >= 250
