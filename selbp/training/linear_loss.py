"""``loss="linear_causal_lm"``: the causal loss of the head's input and weight; the logits are never stored.

While a step's forwards run, the head is the identity, so the model returns the head's input in place of logits. The
loss is :func:`selbp.ops.linear_cross_entropy` of that input and the head's weight. A model that does more to its
logits, such as scaling or capping them, is refused, because it would scale or cap the head's input.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from selbp import ops
from selbp._torch import version_of
from selbp.common.distributed import parallel_in, unwrap
from selbp.common.guards import AutocastMode
from selbp.common.hooks import COMPILED, is_compiled, outside_graphs
from selbp.common.outputs import logits_of
from selbp.training.head import listed_candidates
from selbp.training.head_kinds import is_adapter
from selbp.training.losses import CrossEntropy
from selbp.types import BatchStatistics

NAME = "linear_causal_lm"
_USE = 'loss="linear_causal_lm"'


class ByToken(NamedTuple):
    """What the loss says of the tokens of one output."""

    output: Tensor  # the model's, by which it is known again
    features: Tensor  # (n, T, d) the head's inputs that predict a label
    loss: Tensor  # (n T,) with its graph, where there is one
    stats: BatchStatistics  # of the n T tokens


def _checked(model: nn.Module, head: nn.Module) -> nn.Linear:
    """``head``, which is one of ``model``. Raises ValueError unless its weight and bias are all that it is."""
    name = next((name for name, module in unwrap(model).named_modules() if module is head), type(head).__name__)
    if is_adapter(head):
        raise ValueError(
            f"{_USE} reads the weight of the head {name!r}, to which an adapter ({type(head).__name__}) adds: pass "
            'loss="causal_lm", or leave the head out of the adapted modules'
        )
    weight: Any = getattr(head, "weight", None)
    plain = isinstance(head, nn.Linear) and type(head).forward is nn.Linear.forward
    plain = plain and type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point()
    if not plain or not isinstance(head, nn.Linear):
        raise ValueError(
            f"{_USE} needs a torch.nn.Linear with a floating weight (C, d) of its own as head, but {name!r} is a "
            f'{type(head).__name__} with a weight of type {type(weight).__name__}: pass loss="causal_lm"'
        )
    parallel = parallel_in(model)
    if parallel is not None and parallel.find_unused_parameters:
        raise ValueError(
            f"{_USE} uses the head's weight after the forward, which DistributedDataParallel with "
            'find_unused_parameters=True takes for unused: leave that out, or pass loss="causal_lm"'
        )
    return head


class LinearCausalLM:
    """A criterion, see :class:`selbp.training.losses.Criterion`: ``tokens``'s loss, of a head without its logits.

    Raises ValueError unless the head's weight and bias are all that it is.
    """

    def __init__(self, tokens: CrossEntropy, model: nn.Module, head: nn.Module) -> None:
        self.tokens = tokens  # what is a target, and what it counts
        self.head = _checked(model, head)
        tokens.check_classes(len(self.head.weight), "the head")
        self._model = model
        self._input: Tensor | None = None  # of the head, in the forward that has just run
        self._version = self._calls = 0
        self._mode: AutocastMode | None = None  # in which the head would have run
        self._copies = False  # whether the model has been seen to return a copy of the head's output
        self._untraced: Callable[[Tensor], Tensor] | None = None
        self._found: ByToken | None = None

    @contextmanager
    def headless(self) -> Iterator[None]:
        """The head hands its input on inside. Raises ValueError where something else stands in for it."""
        head = self.head
        if "forward" in vars(head) or head._forward_hooks or head._backward_hooks or head._backward_pre_hooks:
            raise ValueError(
                f"{_USE} does not run the head, but there is a hook on it, or a forward of its own: take it off, or "
                'pass loss="causal_lm"'
            )
        vars(head)["forward"] = self._stand_in()
        try:
            yield
        finally:
            del vars(head)["forward"]
            self.forget()

    def forget(self) -> None:
        """Let go of what the forwards so far have left: the loss is asked of the next one."""
        self._input = self._found = None
        self._calls = 0

    def _stand_in(self) -> Callable[[Tensor], Tensor]:
        """The head's forward for the time being. Compiled code runs it as Python, between two graphs."""
        if "torch._dynamo" not in sys.modules:
            return self._hand_on
        if self._untraced is None:
            self._untraced = outside_graphs(self._hand_on)
        return self._untraced

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_untraced": None}

    def _hand_on(self, x: Tensor) -> Tensor:
        self._calls += 1
        self._input, self._version, self._mode = x, version_of(x), AutocastMode(x.device)
        return x

    def _take(self, given: Tensor) -> Tensor:
        """The head's input, which the model has ``given`` in place of logits. Raises RuntimeError for anything else."""
        x, calls = self._input, self._calls
        self._input, self._calls = None, 0
        if calls != 1 or x is None:
            cause = COMPILED if calls == 0 and is_compiled(self._model) else ""
            raise RuntimeError(
                f"{_USE}: the head must run exactly once in a forward, it ran {calls} times: pass head=, the last "
                f"linear layer; {listed_candidates(self._model)}{cause}"
            )
        if given.shape == x.shape and version_of(x) == self._version:
            if given.dtype == x.dtype and given.data_ptr() == x.data_ptr():
                return given
            # A wrapper may copy what a model returns, or widen it after autocast. Asking a GPU would wait for it.
            if not self._copies or given.device.type == "cpu":
                same = x.detach().to(given.dtype)
                self._copies = bool(((given == same) | (same != same)).all())
            if self._copies:
                return given.to(x.dtype)
        raise RuntimeError(
            f"{_USE}: the model does more to its logits after the head, such as scaling or capping them, or leaves "
            'some out: pass loss="causal_lm"'
        )

    def by_token(self, output: Any, target: Any) -> ByToken:
        """Losses and statistics of every token; once for one output, however often it is asked."""
        given, found, head = logits_of(output), self._found, self.head
        with torch.set_grad_enabled(torch.is_grad_enabled() or given.requires_grad):
            wanted = torch.is_grad_enabled() and (given.requires_grad or head.weight.requires_grad)
            if found is not None and found.output is given and (found.loss.requires_grad or not wanted):
                return found
            again = found is not None and found.output is given
            labels = self.tokens.labels(target)
            features = found.features if again and found else self.tokens.positions(self._take(given), target, labels)
            with nullcontext() if self._mode is None else self._mode.within():
                loss, stats = ops.linear_cross_entropy(
                    features.flatten(0, 1),
                    head.weight,
                    head.bias,
                    labels.reshape(-1),
                    **self.tokens.options(given.device),
                    memory_limit=0,
                    skip_mass=self.tokens.skip_mass,
                    return_statistics=True,
                )
        self._found = ByToken(given, features, loss, stats)
        return self._found

    def operands(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """``features``, weight and bias, detached and in the type in which the head would have run."""
        mode, head = self._mode, self.head
        dtype = features.dtype if mode is None or not mode.enabled else mode.dtype

        def cast(x: Tensor) -> Tensor:
            return x.detach() if x.dtype == torch.float64 else x.detach().to(dtype)

        return cast(features), cast(head.weight), None if head.bias is None else cast(head.bias)

    def losses(self, output: Any, target: Any, n: int) -> Tensor:
        """See :class:`selbp.training.losses.Criterion`."""
        found = self.by_token(output, target)
        return found.loss.view(found.features.shape[:2]).sum(1)

    def mass(self, target: Any, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """See :class:`selbp.training.losses.Criterion`."""
        return self.tokens.mass(target, n, device)

    def terms(self, target: Any) -> Tensor | None:
        """See :class:`selbp.training.losses.Criterion`."""
        return self.tokens.terms(target)

    def hits(self, output: Any, target: Any, live: Tensor) -> tuple[Tensor, Tensor] | None:
        """See :class:`selbp.training.losses.Criterion`."""
        found = self.by_token(output, target)
        present = (self.tokens.labels(target) != self.tokens.ignore_index) & live[:, None]
        return (present & found.stats.correct.view(present.shape)).sum(), present.sum()
