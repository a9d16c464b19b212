"""Training on a chosen part of each minibatch: heads, losses, scoring, backward strategies, budget and report."""

from selbp.training.report import StepReport
from selbp.training.schedule import Schedule
from selbp.training.step import SelectiveBackprop

__all__ = ["Schedule", "SelectiveBackprop", "StepReport"]
