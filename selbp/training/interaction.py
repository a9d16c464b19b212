"""Losses in which samples interact: a second forward of the chosen rows alone would train another loss.

Examples are contrastive and ranking losses, in-batch negatives, and attention across samples. The first step with a
second forward checks that the chosen rows have the same losses alone as among all n. It compares the step's own two
forwards. If dropout or batch norm makes those differ, it compares two forwards of a few samples in evaluation mode
instead. The coupling by BatchNorm in training mode is known and accepted, and is not checked.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from selbp._torch import version_of, without_autocast_cache
from selbp.common.batch import Batch
from selbp.common.buffers import buffers_put_back
from selbp.common.guards import evaluating, random_state_put_back
from selbp.common.hooks import is_compiled

SAMPLES = 8  # of the forwards in evaluation mode

Losses = Callable[[Batch], tuple[Tensor, Any]]  # rows of a batch -> their (k,) losses, and the model's output


class SamplesInteractError(ValueError):
    """Raised where the chosen rows' losses differ between a forward of these rows and one of all rows."""


class Surroundings:
    """What else can make two forwards differ: random draws, and buffers that a forward changes."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._model, self._device = model, device
        self._draws, self._versions = self._random(), self._buffers()

    def unchanged(self) -> bool:
        """Whether nothing was drawn and no buffer written since."""
        return self._draws == self._random() and self._versions == self._buffers()

    def _random(self) -> list[Any]:
        states: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
        if (numpy := sys.modules.get("numpy")) is not None:
            _, keys, position, *_ = numpy.random.get_state()  # the legacy state is the global one
            states += [keys.tolist(), position]
        return [*states, torch.cuda.get_rng_state(self._device).tolist()] if self._device.type == "cuda" else states

    def _buffers(self) -> list[int]:
        return [version_of(buffer) for buffer in self._model.buffers() if not is_lazy(buffer)]


def couples_by_batch_norm(model: nn.Module) -> bool:
    """Whether a BatchNorm normalises with the statistics of the minibatch."""
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    return any(layer.training or layer.running_mean is None for layer in layers)


def normalises_by_rows(model: nn.Module) -> bool:
    """Whether a layer computes statistics of the rows that it is given, to normalise with or to keep."""
    return any(isinstance(m, _NormBase) and (m.training or m.running_mean is None) for m in model.modules())


def tolerance(model: nn.Module, device: torch.device, output: Any) -> float:
    """Relative difference of losses that rounding may make: half of the digits of the coarsest type that computes.

    An independent sample's loss differs between minibatch sizes by the order of sums only, some units in the last
    place; deep networks amplify that, by far less than the square root of 1 / eps.
    """
    types = {x.dtype for x in (*model.parameters(), *_tensors(output)) if x.is_floating_point()} | {torch.float32}
    if torch.is_autocast_enabled(device.type):
        types.add(torch.get_autocast_dtype(device.type))
    if device.type == "cuda" or torch.get_float32_matmul_precision() != "highest":
        types.add(torch.float16)  # TF32 has as many digits
    if torch.get_float32_matmul_precision() == "medium":
        types.add(torch.bfloat16)
    return float(max(torch.finfo(dtype).eps for dtype in types)) ** 0.5


def _tensors(output: Any) -> list[Tensor]:
    """The floating tensors in a model's output."""
    return [x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()]


def _excess(among: Tensor, alone: Tensor, live: Tensor, bound: Tensor) -> float:
    """Mean difference of the ``live`` rows' losses, 1 being the bound. Reads it: waits for the device."""
    ratio = ((among - alone).abs() / bound).nan_to_num(0.0, 0.0, 0.0)
    return float(torch.where(live, ratio, 0.0).sum() / live.sum().clamp(min=1))


def _bound(model: nn.Module, device: torch.device, alone: Tensor, output: Any) -> Tensor:
    """(k,) differences that rounding may make, in the scale of losses and outputs."""
    largest = [x.detach().nan_to_num(0.0, 0.0, 0.0).abs().amax().double() for x in _tensors(output) if x.numel()]
    scale = torch.stack(largest).amax() if largest else alone.new_zeros(())
    return tolerance(model, device, output) * (1.0 + alone.abs() + scale)


class Forwards(NamedTuple):
    """The results of two forwards: of n samples, and of k of them."""

    place: Tensor  # (k,) the k samples' rows among the n
    live: Tensor  # (k,) bool: whether they count
    among: Tensor  # (n,) losses of the first forward
    alone: Tensor  # (k,) losses of the second
    output: Any  # the model's in the second


@torch.no_grad()
def _interact(model: nn.Module, losses: Losses, everyone: Batch, few: Batch, found: Forwards) -> bool:
    """Whether the losses of ``few`` differ alone and among ``everyone``, and differ again in repeated forwards.

    False if a repeated forward gives other losses than before, as in a model that counts its calls or draws by itself:
    the difference may then have that cause.
    """
    place, live = found.place, found.live
    among, alone = found.among.detach().double(), found.alone.detach().double()
    bound = _bound(model, everyone.device, alone, found.output)
    if _excess(among[place], alone, live, bound) <= 1.0:
        return False
    again, alone_again = (losses(rows)[0].detach().double() for rows in (everyone, few))
    repeats = max(_excess(among[place], again[place], live, bound), _excess(alone, alone_again, live, bound)) <= 0.5
    return repeats and _excess(again[place], alone_again, live, bound) > 1.0


class FirstComparison:
    """Compares once, in the first step that runs a second forward on a part of the rows."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self._done = model, False
        self._before: Surroundings | None = None

    def begin(self, batch: Batch, wanted: bool) -> None:
        """Before the scoring forward; ``wanted``: a second forward will follow."""
        self._before = Surroundings(self._model, batch.device) if wanted and not self._done else None

    @property
    def due(self) -> bool:
        """Whether :meth:`end` will compare."""
        return self._before is not None

    def end(
        self,
        batch: Batch,  # all n samples
        forwards: Forwards,
        finite: Tensor,  # (n,) bool: which samples run as they came
        losses: Losses,  # runs either forward again
        *,
        same_forward: bool,  # both ran in the same mode and precision
    ) -> None:
        """After the second forward. Raises :class:`SamplesInteractError`."""
        before, self._before = self._before, None
        if before is None or len(forwards.place) >= batch.n:
            return
        self._done = True
        if same_forward and before.unchanged() and not couples_by_batch_norm(self._model):
            everyone, few = batch.rows(None, finite), batch.rows(forwards.place, forwards.live)
            found = _interact(self._model, losses, everyone, few, forwards)
        else:
            found = self._in_evaluation_mode(batch, finite, losses)
        if found:
            raise SamplesInteractError(
                'samples interact: the chosen rows have other losses alone than among all rows, so that backward="'
                'recompute" would train another loss. Use backward="rows", or cut= above which all rows run'
            )

    def _in_evaluation_mode(self, batch: Batch, finite: Tensor, losses: Losses) -> bool:
        """The same of the first samples, without dropout and with running statistics, leaving no trace."""
        count = min(batch.n, SAMPLES)
        if count < 2 or is_compiled(self._model):
            return False  # compiled code would be compiled again for another mode and size
        place = torch.arange((count + 1) // 2, device=batch.device)
        everyone = batch.rows(torch.arange(count, device=batch.device), finite[:count])
        few = batch.rows(place, finite[: len(place)])
        with ExitStack() as undo:
            buffers = buffers_put_back(self._model)
            for context in (
                *(buffers, random_state_put_back(batch.device), evaluating(self._model, batch.device)),
                *(without_autocast_cache(), torch.no_grad()),
            ):
                undo.enter_context(context)
            if couples_by_batch_norm(self._model):
                return False
            before = Surroundings(self._model, batch.device)
            try:
                among, (alone, output) = losses(everyone)[0], losses(few)
                live = finite[: len(place)]
                forwards = Forwards(place, live, among, alone, output)
                found = _interact(self._model, losses, everyone, few, forwards)
            except Exception:  # many models return something else in evaluation mode: then there is no telling
                return False
            return found and before.unchanged()
