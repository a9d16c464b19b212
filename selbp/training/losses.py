"""Per-sample losses: what each ``loss=`` of a step is for one sample, and how the mean of a minibatch weighs it.

A criterion gives l_i unscaled, summed over the tokens of a sample. The step multiplies it by ``n / sum mass`` over
valid samples, so that (1/n) sum l_i is what torch calls ``reduction="mean"``.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from selbp._checks import check_int, check_number, shown
from selbp.common.outputs import check_classes_of, logits_of
from selbp.ops._backends import saves_launches
from selbp.ops.minibatch import count_hits
from selbp.reference.losses import label_mass
from selbp.training.soft_labels import is_soft, soft_hits, soft_losses, soft_mass
from selbp.types import widest

LOSSES = ("cross_entropy", "mse", "bce", "causal_lm", "linear_causal_lm")
CAUSAL = ("causal_lm", "linear_causal_lm")
HINT = 'one loss per sample, (n,): use reduction="none" and sum or average over every other dimension'


@contextmanager
def of_some(k: int, n: int) -> Iterator[None]:
    """Add to an error about shapes that is raised inside that it is about k of the n samples."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if k == n or type(error) not in (TypeError, ValueError):
            raise
        raise type(error)(f"on {k} of the batch's {n} samples: {error}") from error


class Criterion(Protocol):
    """What the step needs to know of a loss."""

    def losses(self, output: Any, target: Any, n: int) -> Tensor:
        """(n,) differentiable losses, unscaled; at least float32."""
        ...

    def mass(self, target: Any, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """(n,) weight of each sample in torch's mean, and (n,) bool whether it has a target at all."""
        ...

    def terms(self, target: Any) -> Tensor | None:
        """(n,) how many entries each sample's loss is the sum of; None where it is one, or a mean."""
        ...

    def hits(self, output: Any, target: Any, live: Tensor) -> tuple[Tensor, Tensor] | None:
        """() how many entries of ``live`` samples are classified correctly and () how many there are.

        None for a loss without classes.
        """
        ...


class _LastIdle(torch.autograd.Function):
    """The identity on logits (n, T, C). The last position's gradient is 0, where log-probabilities are NaN too."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gradient = grads[0]
        if type(gradient) is not Tensor or torch.is_grad_enabled():
            last = torch.arange(1 - gradient.shape[1], 1, device=gradient.device) == 0
            return gradient.masked_fill(last[:, None], 0)
        gradient[:, -1] = 0  # in place: a copy is as large as the logits, and the loss has just made this tensor
        return gradient


@dataclass(frozen=True)
class CrossEntropy:
    """Cross-entropy of logits (n, C), or of token logits (n, ..., C) with targets (n, ...) summed over tokens.

    A floating target of the logits' shape holds class probabilities, as torch's ``cross_entropy`` has them.
    Logits may be (n, C, ...) as well, as torch's ``cross_entropy`` has them: the target's shape tells which. If both
    shapes fit, ``class_dim``, 1 or -1, tells, or an earlier minibatch does. ``shift`` makes it the causal
    language-modelling loss: logits (n, T, C) at position t predict the label at t + 1.
    """

    class_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    shift: bool = False
    class_dim: int | None = None
    skip_mass: float = 0.0  # of the loss without logits
    _moved: dict[torch.device, Tensor] = field(default_factory=dict, repr=False)
    _last: list[bool] = field(default_factory=list, repr=False)  # what the first unambiguous minibatch told

    @property
    def told(self) -> bool | None:
        """Whether an earlier minibatch told that the classes are the last dim; None where none told."""
        return self._last[0] if self._last else None

    def tell(self, last: bool | None) -> None:
        """Take over a :attr:`told`."""
        self._last[:] = [] if last is None else [last]

    def weight_on(self, device: torch.device) -> Tensor | None:
        """The class weights on ``device``, copied there once."""
        if self.class_weight is None:
            return None
        if device not in self._moved:
            self._moved[device] = self.class_weight.detach().to(device)
        return self._moved[device]

    def options(self, device: torch.device) -> dict[str, Any]:
        """What the operators of :mod:`selbp.ops` that take logits and labels are called with."""
        return {
            "class_weight": self.weight_on(device),
            "ignore_index": self.ignore_index,
            "label_smoothing": self.label_smoothing,
        }

    def check_classes(self, classes: int, source: str) -> None:
        """Raise ValueError unless each of the ``classes`` that ``source`` gives has a class weight, or none has."""
        if self.class_weight is not None and len(self.class_weight) != classes:
            raise ValueError(
                f"class_weight must have one entry for each of the {classes} classes that {source} gives, got "
                f"{len(self.class_weight)}"
            )

    def labels(self, target: Any) -> Tensor:
        """(n, T) class indices, after the shift; T is 1 for one class per sample."""
        return self._indices(target).reshape(len(target), -1)

    def _indices(self, target: Any) -> Tensor:
        """The class indices (n,) or (n, ...), after the shift. Raises TypeError or ValueError for anything else."""
        if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.dim() < 1:
            raise TypeError(
                f"target must be int64 class indices (n,) or (n, T), or class probabilities of the logits' shape "
                f"(n, C), got {shown(target)}"
                + ('; loss="mse" takes numbers' if isinstance(target, Tensor) and target.is_floating_point() else "")
            )
        if self.shift:
            if target.dim() != 2 or target.shape[1] < 2:
                raise ValueError(f"causal_lm needs target (n, T) with T > 1, got {tuple(target.shape)}")
            return target[:, 1:]
        return target

    def soft(self, target: Any) -> bool:
        """Whether ``target`` holds class probabilities, for which there is no shift."""
        return not self.shift and is_soft(target)

    def classes_last(self, logits: Tensor, target: Tensor) -> bool:
        """Whether the classes are the last dim of ``logits`` (n, ...), not dim 1. Raises ValueError where both fit."""
        if self.shift or logits.dim() < 3 or logits[0].numel() == 1:
            return True
        if self.class_dim is not None:
            return self.class_dim != 1
        ahead, behind, places = logits.shape[1:-1], logits.shape[2:], target.shape[1:]
        last, second = ahead == places, behind == places
        if not last and not second:  # a target with its positions in one dim
            last, second = ahead.numel() == places.numel(), behind.numel() == places.numel()
            if not (last and second):
                return True
        if last != second:
            self._last[:] = [last]
        elif not self._last:
            raise ValueError(
                f"logits {tuple(logits.shape)} fit target {tuple(target.shape)} with the classes in dim 1, as torch "
                "has them, and with the classes in the last dim: pass class_dim=1 or class_dim=-1"
            )
        return self._last[0]

    def pairs(self, output: Any, target: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, T, C) of ``output``'s (n, ..., C) or (n, C, ...), and the labels (n, T) that they predict.

        The last position of a causal model predicts nothing. It stays, with an ignored label: to leave it out would
        copy the logits of all others. Raises ValueError for logits of another number of samples.
        """
        labels, logits = self.labels(target), logits_of(output)
        if logits.dim() < 2 or logits.shape[0] != len(target):
            raise ValueError(f"logits must have n = {len(target)} rows of classes, got {tuple(logits.shape)}")
        if self.shift and logits.dim() == 3 and logits.shape[:2] == target.shape:
            return _LastIdle.apply(logits), F.pad(labels, (0, 1), value=self.ignore_index)
        logits = logits if self.classes_last(logits, target) else logits.movedim(1, -1)
        check_classes_of(logits)
        return self.positions(logits, target, labels), labels

    def positions(self, x: Tensor, target: Tensor, labels: Tensor) -> Tensor:
        """(n, T, .) the entries of ``x`` (n, ..., .), logits or the head's input, that predict ``target``'s labels."""
        shape = tuple(x.shape)
        if self.shift and x.dim() == 3 and x.shape[1] == target.shape[1]:
            x = x[:, :-1]
        x = x.reshape(len(target), -1, x.shape[-1])
        if x.shape[1] != labels.shape[1]:
            if shape == tuple(target.shape):
                raise ValueError(
                    f"target {shape} int64 has the logits' shape: class probabilities, one-hot too, must be floating"
                )
            raise ValueError(
                "logits must be (n, C) for target (n,), and (n, T, C) or (n, C, T) for target (n, T): "
                f"got logits {shape} for target {tuple(target.shape)}"
            )
        return x

    def losses(self, output: Any, target: Any, n: int) -> Tensor:
        """See :class:`Criterion`."""
        if self.soft(target):
            logits = logits_of(output)
            return soft_losses(logits, target, self.weight_on(logits.device), self.label_smoothing, self.class_dim)
        logits, labels = self.pairs(output, target)
        self.check_classes(logits.shape[-1], "the model")
        logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
        weight = self.weight_on(logits.device)
        entries = F.cross_entropy(
            logits.flatten(0, 1),
            labels.reshape(-1),
            None if weight is None else weight.to(logits.dtype),
            ignore_index=self.ignore_index,
            reduction="none",
            label_smoothing=self.label_smoothing,
        )
        return entries.view(labels.shape).sum(1) if labels.shape[1] > 1 else entries

    def mass(self, target: Any, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """See :class:`Criterion`: the class weights of the sample's targets that are not ignored."""
        if self.soft(target):
            return soft_mass(target, self.class_dim)
        labels = self._indices(target)
        weight = self.weight_on(labels.device)
        exact = torch.float32 if weight is None else widest(labels.device)  # for a float64 loss
        return label_mass(labels if labels.dim() == 1 else labels.flatten(1), weight, self.ignore_index, exact)

    def terms(self, target: Any) -> Tensor | None:
        """See :class:`Criterion`: the sample's targets that are not ignored, whatever their class weights."""
        if self.soft(target):
            return soft_mass(target, self.class_dim)[0]
        labels = self._indices(target)
        return None if labels.dim() == 1 else (labels != self.ignore_index).flatten(1).sum(1)

    def hits(self, output: Any, target: Any, live: Tensor) -> tuple[Tensor, Tensor] | None:
        """See :class:`Criterion`."""
        if self.soft(target):
            return soft_hits(logits_of(output), target, live, self.class_dim)
        logits, labels = self.pairs(output, target)
        if saves_launches(logits.device) and labels.shape[1] == 1:
            correct, total = count_hits(logits[:, 0], labels[:, 0], live, self.ignore_index)
            return correct, total
        present = (labels != self.ignore_index) & live[:, None]
        return (present & (logits.argmax(-1) == labels)).sum(), present.sum()


@dataclass(frozen=True)
class PerSample:
    """Any other loss: ``function(output, target) -> (n,)``; every sample counts once in the mean."""

    function: Callable[[Any, Any], Tensor]
    name: str

    def losses(self, output: Any, target: Any, n: int) -> Tensor:
        """See :class:`Criterion`. Raises ValueError unless the function returns (n,)."""
        losses = self.function(output, target)
        if not isinstance(losses, Tensor) or losses.shape != (n,):
            raise ValueError(f"loss {self.name} must return {HINT}; got {shown(losses)} for n = {n}")
        return losses.float() if losses.dtype in (torch.bfloat16, torch.float16) else losses

    def mass(self, target: Any, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """See :class:`Criterion`: 1 for every sample."""
        return torch.ones(n, dtype=torch.float32, device=device), torch.ones(n, dtype=torch.bool, device=device)

    def terms(self, target: Any) -> Tensor | None:
        """None."""
        return None

    def hits(self, output: Any, target: Any, live: Tensor) -> tuple[Tensor, Tensor] | None:
        """None."""
        return None


def _mean_over_sample(function: Callable[..., Tensor], output: Any, target: Tensor) -> Tensor:
    """(n,) means of an elementwise loss over each sample's entries."""
    values = logits_of(output)
    if {tuple(values.shape), tuple(target.shape)} == {(len(target),), (len(target), 1)}:
        values = values.reshape(target.shape)  # one output a sample, with or without a dim of its own
    if values.shape != target.shape:
        raise ValueError(f"target must have the output's shape {tuple(values.shape)}, got {tuple(target.shape)}")
    return function(values, target.to(values.dtype), reduction="none").reshape(len(target), -1).mean(1)


def criterion_of(
    loss: str | Callable[[Any, Any], Tensor],
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    class_dim: int | None = None,
    skip_mass: float = 0.0,
) -> Criterion:
    """The criterion for a step's ``loss=``. Raises TypeError or ValueError for what cannot give (n,)."""
    skip_mass = check_number("skip_mass", skip_mass, 0.0, 1.0)
    if skip_mass and loss != "linear_causal_lm":
        raise ValueError(f'skip_mass is for loss="linear_causal_lm", whose head does not run, got {skip_mass}')
    if isinstance(loss, str) and loss in ("cross_entropy", *CAUSAL):
        if class_weight is not None:
            _check_class_weight(class_weight)
        label_smoothing = check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        ignore_index = check_int("ignore_index", ignore_index)
        if class_dim is not None:
            class_dim = check_int("class_dim", class_dim, meaning="1, -1 or None")
            if class_dim not in (1, -1):
                raise ValueError(f"class_dim must be 1, -1 or None, got {class_dim}")
        if loss in CAUSAL and class_dim == 1:
            raise ValueError(f'class_dim=1 is for "cross_entropy": {loss!r} has logits (n, T, C)')
        shift = loss in CAUSAL
        return CrossEntropy(class_weight, ignore_index, label_smoothing, shift, class_dim, skip_mass)
    defaults = ((class_weight, None), (ignore_index, -100), (label_smoothing, 0.0), (class_dim, None))
    if any(value is not default and not _equals(value, default) for value, default in defaults):
        raise ValueError(
            'class_weight, ignore_index, label_smoothing and class_dim apply to "cross_entropy", "causal_lm" and '
            '"linear_causal_lm" only'
        )
    if isinstance(loss, str) and loss == "mse":
        return PerSample(partial(_mean_over_sample, F.mse_loss), "mse")
    if isinstance(loss, str) and loss == "bce":
        return PerSample(partial(_mean_over_sample, F.binary_cross_entropy_with_logits), "bce")
    if not callable(loss):
        raise ValueError(f"loss must be one of {', '.join(map(repr, LOSSES))} or a callable, got {shown(loss)}")
    name = getattr(loss, "__name__", type(loss).__name__)
    if (reduction := _reduction(loss)) not in (None, "none"):
        raise ValueError(f"loss {name} has reduction={reduction!r}, but must return {HINT}")
    return PerSample(loss, name)


def _equals(value: object, default: float | None) -> bool:
    return isinstance(value, Real) and value == default


def _check_class_weight(weight: Tensor) -> None:
    """Raise ValueError or TypeError unless ``weight`` is (C,), floating, finite and nowhere negative."""
    if not isinstance(weight, Tensor) or weight.dim() != 1:
        raise ValueError(f"class_weight must be a tensor (C,), got {shown(weight)}")
    if not weight.is_floating_point():
        raise TypeError(f"class_weight must be floating, got {weight.dtype}")
    if not bool((torch.isfinite(weight) & (weight >= 0)).all()):
        raise ValueError("class_weight must be finite and nowhere negative")


def _reduction(loss: Callable[..., Any]) -> object:
    """The reduction that a loss module carries or that a function defaults to, None where there is no such thing."""
    if (carried := getattr(loss, "reduction", None)) is not None:
        return carried
    try:
        parameter = inspect.signature(loss).parameters.get("reduction")
    except (TypeError, ValueError):  # a builtin without a signature
        return None
    return None if parameter is None or parameter.default is inspect.Parameter.empty else parameter.default


def warn_of_unshifted_labels(model: object, loss: object) -> None:
    """Warn where a causal language model is given the loss of unshifted labels, which few mean."""
    names = [kind.__name__ for kind in type(model).mro()]
    causal = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if causal and isinstance(loss, str) and loss == "cross_entropy":
        warnings.warn(
            f'{names[0]} predicts the next token, and loss="cross_entropy" compares each position with the label at '
            'the same position: pass loss="causal_lm", unless the labels are shifted already',
            UserWarning,
            stacklevel=3,
        )
