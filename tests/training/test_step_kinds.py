"""What the step is told, and the parts of its kinds that no other test looks at."""

import dataclasses
import inspect

import pytest
import torch
from torch import nn

import selbp
from selbp.training.options import StepOptions

PARAMETERS = list(inspect.signature(selbp.SelectiveBackprop).parameters.values())[1:]


def test_the_options_are_the_steps_keyword_arguments():
    fields = dataclasses.fields(StepOptions)
    assert [field.name for field in fields] == [parameter.name for parameter in PARAMETERS]
    assert [str(field.type) for field in fields] == [parameter.annotation for parameter in PARAMETERS]
    for field, parameter in zip(fields, PARAMETERS, strict=True):
        none = parameter.default is inspect.Parameter.empty
        assert field.default is dataclasses.MISSING if none else field.default == parameter.default


def test_every_option_reaches_the_step(monkeypatch):
    """A keyword that the constructor does not hand on would keep its default in silence."""
    given = {parameter.name: object() for parameter in PARAMETERS}
    seen = {}

    def note(options):
        seen.update({field.name: getattr(options, field.name) for field in dataclasses.fields(options)})
        raise InterruptedError

    monkeypatch.setattr(StepOptions, "validate", note)
    with pytest.raises(InterruptedError):
        selbp.SelectiveBackprop(nn.Linear(2, 2), **given)
    assert all(seen[name] is value for name, value in given.items()) and len(seen) == len(given)


class Routed(nn.Module):
    """Dropout, so that the two forwards cannot be compared as they are, and a loss beside the logits."""

    def __init__(self):
        super().__init__()
        self.gate, self.dropout, self.head = nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3)

    def forward(self, x):
        gate = self.gate(x)
        return {"logits": self.head(self.dropout(gate).detach()), "aux_loss": gate.square().mean()}


def test_the_first_comparison_of_forwards_leaves_the_auxiliary_loss_alone():
    torch.manual_seed(0)
    model = Routed()
    step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.5, backward="recompute")
    x, y = torch.randn(8, 4), torch.randint(0, 3, (8,))
    step(x, y).backward()
    rows = x[step.report.selection.indices]
    (expected,) = torch.autograd.grad(model.gate(rows).square().mean(), model.gate.weight)
    torch.testing.assert_close(model.gate.weight.grad, expected)
