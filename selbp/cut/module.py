"""The cut: the identity in the forward, a selection in the backward.

Put anywhere in a model, it receives the gradient of all n samples from above, chooses k of them there, and hands the
part of the model below a gradient that has only those rows, each scaled by n times its weight. Above the cut gradients
are exact and full-batch; below, the backward costs k / n. The loop, the loss and the trainer do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from selbp._checks import shown
from selbp.common.state import ChoiceState, pack, unpack
from selbp.cut.choice import Cut
from selbp.cut.proxies import Proxy
from selbp.cut.report import CutReport
from selbp.rows.layout import BatchNormPolicy
from selbp.selectors import GradientMatching, Selector

EXTRA_STATE = "_extra_state"  # torch's name of the entry


def backward_cut(
    hidden: Tensor,
    keep: float | int,
    selector: Selector | None = None,
    *,
    features: Tensor | None = None,
    generator: torch.Generator | None = None,
    losses: Callable[[], Tensor] | None = None,
    proxy: Proxy = "pooled",
    batchnorm: BatchNormPolicy = "exact",
) -> Tensor:
    """``hidden``; in the backward only k chosen rows of its gradient go on. See :class:`BackwardCut`.

    Go on with what is returned: ``hidden`` itself, or where that is a view an alias in the same memory. Also active in
    evaluation mode (a function does not know the mode), unless gradients are off.
    """
    if torch.compiler.is_compiling():
        from selbp.cut import untraced

        options = dict(generator=generator, losses=losses, proxy=proxy, batchnorm=batchnorm)
        return untraced.backward_cut(hidden, keep, selector, features=features, **options)
    rule = GradientMatching() if selector is None else selector
    cut = Cut(keep, rule, generator=generator, losses=losses, proxy=proxy, batchnorm=batchnorm)
    _check_tensors(hidden, features)
    return cut.attach(hidden, features)


def _check_tensors(hidden: object, features: object) -> None:
    """Raise TypeError unless both are tensors, the latter or None."""
    for name, value in (("hidden", hidden), ("features", features)):
        if not isinstance(value, Tensor) and (value is not None or name == "hidden"):
            raise TypeError(f"{name} must be a Tensor (n, ...), got {shown(value)}")


class BackwardCut(nn.Module):
    """The identity, whose backward lets k chosen rows of the gradient into the layers below it.

    ::

        model = nn.Sequential(trunk, selbp.BackwardCut(keep=0.25), head)   # nothing else changes

    The gradient that arrives is that of all n samples, delta_i = dL / d hidden_i for any scalar loss L. The rule
    chooses k rows and weights w with sum_j w_j g_j ~ (1 / n) sum_i g_i, and row j goes on scaled by n w_j: the layers
    above get their exact full-batch gradients, those below an estimate (unbiased with :class:`selbp.Random`) at k / n
    of the cost. In evaluation mode, without gradients, and where k = n, it is exactly the identity. Several cuts nest:
    a lower one chooses among the rows of the one above it. A gradient that is not finite goes on as it is, for
    GradScaler to see (on a GPU as NaN in the chosen rows).

    Where the rule has a memory, or ``generator`` is given, the model's ``state_dict`` holds them as ``_extra_state``, a
    uint8 tensor, so that a resumed run goes on bit for bit. A checkpoint without that entry loads as well. It is one
    process's state: ranks whose generators differ each save their own.

    Args:
        keep: a share in (0, 1] (float, k = max(1, round(keep n))) or a number of samples (int of at least 1).
        selector: a rule that needs nothing or gradients, :class:`selbp.GradientMatching` by default.
        generator: where draws come from, on the device of the gradient; torch's global one for None.
        losses: for rules that read losses: returns the (n,) losses of the forward being differentiated.
        proxy: what the rule sees of samples that have several positions: ``"pooled"`` sums over them, ``"flat"``
            compares position by position, ``"positions"`` is exact for a linear layer below, and the dearest.
        batchnorm: for BatchNorm below the cut, as in :func:`selbp.select`.

    Raises:
        TypeError, ValueError: at construction, for a rule that could not work here.
    """

    def __init__(
        self,
        keep: float | int,
        selector: Selector | None = None,
        *,
        generator: torch.Generator | None = None,
        losses: Callable[[], Tensor] | None = None,
        proxy: Proxy = "pooled",
        batchnorm: BatchNormPolicy = "exact",
    ) -> None:
        super().__init__()
        rule = GradientMatching() if selector is None else selector
        self._cut = Cut(keep, rule, generator=generator, losses=losses, proxy=proxy, batchnorm=batchnorm)
        self._choice = ChoiceState(rule, generator)

    def get_extra_state(self) -> Tensor:
        """The rule's memory and the generator's state, packed in a uint8 tensor (bytes,)."""
        return pack(self._choice.state_dict())

    def set_extra_state(self, state: Any) -> None:
        """Take over :meth:`get_extra_state`. Raises ValueError, and changes nothing, where it does not fit."""
        self._choice.load_state_dict(unpack(state))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._choice.remembers:
            destination.pop(prefix + EXTRA_STATE, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        key = prefix + EXTRA_STATE
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        except ValueError as error:
            error_msgs.append(f"{key} does not fit this cut: {error}")  # torch raises, as for a shape that differs
        if key in missing_keys:  # saved before the cut was there, or when it had nothing to save
            missing_keys.remove(key)

    @property
    def keep(self) -> float | int:
        """Share or number of rows that go on."""
        return self._cut.keep

    @property
    def selector(self) -> Selector:
        """The rule."""
        return self._cut.selector

    @property
    def report(self) -> CutReport:
        """What the last backward chose. Raises RuntimeError before the first one."""
        if self._cut.last is None:
            raise RuntimeError("there is no report before the first backward through this cut")
        return self._cut.last

    def forward(self, hidden: Tensor, features: Tensor | None = None) -> Tensor:
        """``hidden`` (n, ...), unchanged. ``features`` (n, ...) is the input of the layer below, where it is known."""
        if not self.training:
            return hidden
        _check_tensors(hidden, features)
        if torch.compiler.is_compiling():
            from selbp.cut import untraced

            return untraced.attach(self._cut, hidden, features)
        return self._cut.attach(hidden, features)

    def extra_repr(self) -> str:
        """Settings for ``print(model)``."""
        return f"keep={self.keep}, selector={self.selector!r}"
