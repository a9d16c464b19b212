"""Heads whose weight or bias is computed from other parameters: parametrizations, pruning, and the older norms."""

import copy
import warnings

import pytest
import torch
from support.training_kit import assert_same, gradients, mlp, samples
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

import selbp


def build(model, selector=None, **options):
    return selbp.SelectiveBackprop(model, selector=selector or selbp.TopLoss(), keep=0.5, **options)


def pruned(layer):
    return prune.random_unstructured(layer, "weight", 0.5)


def quietly(normalise):
    def apply(layer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated
            return normalise(layer)

    return apply


DERIVED = {
    "pruned": pruned,
    "pruned bias": lambda layer: prune.random_unstructured(layer, "bias", 0.5),
    "older weight norm": quietly(nn.utils.weight_norm),
    "older spectral norm": quietly(nn.utils.spectral_norm),
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "parametrized bias": lambda layer: parametrize.register_parametrization(layer, "bias", nn.Softplus()),
}


@pytest.mark.parametrize("head", [None, "2"])
@pytest.mark.parametrize("backward", ["rows", "recompute"])
@pytest.mark.parametrize("kind", DERIVED)
def test_full_head_gradient_needs_a_weight_of_the_heads_own(kind, backward, head):
    model = mlp()
    DERIVED[kind](model[2])
    name = "bias" if "bias" in kind else "weight"
    with pytest.raises(ValueError, match=rf"parameters of its own, but \['{name}'\] of .*come from others.*subset"):
        build(model, head_gradient="full", backward=backward, head=head)


@pytest.mark.parametrize("kind", [kind for kind in DERIVED if "older" not in kind and "pruned" not in kind])
@pytest.mark.parametrize("bias", [True, False])
def test_a_parametrized_head_is_found_and_trains_as_in_an_ordinary_step(kind, bias):
    if "bias" in kind and not bias:
        return
    layers = {"2": nn.Linear(16, 5, bias=bias), "pointwise": nn.Conv1d(16, 5, 1, bias=bias), "itself": nn.Linear(12, 5)}
    for place, layer in layers.items():
        torch.manual_seed(0)
        layer = DERIVED[kind](layer)
        model = layer if place == "itself" else nn.Sequential(nn.Linear(12, 16), nn.Tanh(), layer)
        if place == "pointwise":
            model.insert(2, nn.Unflatten(1, (16, 1))).append(nn.Flatten())
        model, (x, y) = model.double(), samples()
        other, before = copy.deepcopy(model), {name: b.clone() for name, b in model.named_buffers()}
        step = build(model, selector=selbp.GradientMatching(), backward="rows")
        assert step.head is layer
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
        got = gradients(model, step(x.double(), y))
        indices, weights = step.report.selection
        losses = F.cross_entropy(other(x.double()), y, reduction="none")
        assert_same(got, gradients(other, (losses[indices] * weights).sum()), rtol=1e-12)
        assert_same(dict(model.named_buffers()), dict(other.named_buffers()), rtol=1e-12)


def test_a_parametrization_with_layers_of_its_own_is_no_head():
    class Low(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(16, 16)

        def forward(self, weight):
            return self.mix(weight)

    model = mlp()
    parametrize.register_parametrization(model[2], "weight", Low())
    assert build(model, selector=selbp.GradientMatching()).head is model[2]
    with pytest.raises(ValueError, match="ambiguous"):
        build(nn.Sequential(mlp(), parametrizations.weight_norm(nn.Conv1d(1, 1, 3))), selector=selbp.GradientMatching())
