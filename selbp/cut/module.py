"""``BackwardCut`` and ``backward_cut``: the identity in the forward, a choice of k rows in the backward.

A cut receives the gradient of all n samples, chooses k of them, and hands the layers below a gradient that has only
those rows, each scaled by n times its weight. Above the cut the gradients are exact and of the full batch. Below, the
backward costs k / n. The training loop, the loss and the trainer do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from selbp.common.state import ChoiceState, pack, unpack
from selbp.cut.choice import Cut, check_tensors, cut_here
from selbp.cut.proxies import Proxy
from selbp.cut.report import CutReport
from selbp.rows.layout import BatchNormPolicy
from selbp.selectors import GradientMatching, Selector

EXTRA_STATE = "_extra_state"  # torch's name for the entry


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
    """Return ``hidden``; in the backward only k chosen rows of its gradient reach the layers below.

    The function form of :class:`BackwardCut`. A function does not know the module's mode, so it also cuts in evaluation
    mode, unless gradients are off.

    Parameters
    ----------
    hidden : Tensor (n, ...)
        Floating or complex, the samples in dim 0.
    keep, selector, generator, losses, proxy, batchnorm
        As in :class:`BackwardCut`.
    features : Tensor (n, ...), optional
        The input of the layer that computed ``hidden``, if that layer is known. By default ``hidden`` stands for it.

    Returns
    -------
    Tensor (n, ...)
        ``hidden``, or if that is a view an alias in the same memory. Continue with the returned tensor.

    Raises
    ------
    TypeError, ValueError
        As :class:`BackwardCut`; also if ``hidden`` is a scalar, or ``features`` has another number of samples.
    NotImplementedError
        As :func:`selbp.select`.

    See Also
    --------
    selbp.BackwardCut : the module, which has a report and a state.

    Examples
    --------
    >>> import torch, selbp
    >>> trunk, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
    >>> hidden = selbp.backward_cut(trunk(torch.ones(8, 3)), 2, selbp.Random())
    >>> head(hidden).mean().backward()  # the head on 8 rows, the trunk on 2
    >>> trunk.weight.grad.shape
    torch.Size([4, 3])
    """
    options = dict(generator=generator, losses=losses, proxy=proxy, batchnorm=batchnorm)
    if torch.compiler.is_compiling():
        from selbp.cut import untraced  # here, because it imports Dynamo

        return untraced.cut_here(hidden, features, keep, selector, **options)
    return cut_here(hidden, features, keep, selector, **options)


class BackwardCut(nn.Module):
    """The identity. Its backward passes only k chosen rows of the gradient to the layers below.

    The gradient that arrives is delta_i = dL / d hidden_i of all n samples, for any scalar loss L. The rule chooses k
    rows and weights w with sum_j w_j g_j ~ (1 / n) sum_i g_i. Row j is passed on scaled by n w_j. The layers above the
    cut get their exact full-batch gradients. The layers below get an estimate (unbiased with :class:`selbp.Random`) at
    k / n of the cost.

    In evaluation mode, without gradients, and if k = n, the module is exactly the identity. Several cuts nest: a lower
    one chooses among the rows of the one above it. A gradient that is not finite is passed on as it is, so that
    GradScaler sees it (on a GPU as NaN in the chosen rows).

    Parameters
    ----------
    keep : float or int
        A share in (0, 1], which keeps k = max(1, round(keep n)) rows, or a number of samples of at least 1.
    selector : Selector, optional
        A rule that needs nothing or gradients. :class:`selbp.GradientMatching` by default.
    generator : torch.Generator, optional
        Where draws come from, on the gradient's device. Torch's global generator by default.
    losses : callable, optional
        For rules that read losses: returns the (n,) losses of the forward that is being differentiated.
    proxy : {"pooled", "flat", "positions"}
        How the rule compares samples that have several positions (steps, pixels). ``"pooled"`` sums over the positions.
        ``"flat"`` compares position by position. ``"positions"`` is exact for a linear layer below, and costs the most.
    batchnorm : {"exact", "subset"}
        How BatchNorm below the cut runs, as in :func:`selbp.select`.

    Raises
    ------
    TypeError
        If an argument has another type.
    ValueError
        If an argument is out of range, or the rule reads something that a cut does not have.

    Notes
    -----
    If the rule has a memory, or ``generator`` is given, the model's ``state_dict`` holds both under ``_extra_state``, a
    uint8 tensor, so that a resumed run continues bit for bit. A checkpoint without that entry loads too. The state is
    that of one process: ranks whose generators differ save their own.

    See Also
    --------
    selbp.backward_cut : the function form.
    selbp.select : selects rows that are known before the backward.
    selbp.SelectiveBackprop : ``cut=`` places a cut in a training step.

    Examples
    --------
    >>> import torch, selbp
    >>> trunk, head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)
    >>> model = torch.nn.Sequential(trunk, selbp.BackwardCut(keep=0.25), head)
    >>> model(torch.eye(8, 3)).square().mean().backward()
    >>> model[1].report.n, model[1].report.k
    (8, 2)
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
        """Return the rule's memory and the generator's state, packed in a uint8 tensor (bytes,)."""
        return pack(self._choice.state_dict())

    def set_extra_state(self, state: Any) -> None:
        """Restore what :meth:`get_extra_state` returned. Raises ValueError, and changes nothing, if it does not fit."""
        self._choice.load_state_dict(unpack(state))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self._choice.remembers:
            destination.pop(prefix + EXTRA_STATE, None)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + EXTRA_STATE
        try:
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
        except ValueError as error:
            error_msgs.append(f"{key} does not fit this cut: {error}")  # torch raises these, as for shapes that differ
        if key in missing_keys:  # saved before the cut was in the model, or when it had nothing to save
            missing_keys.remove(key)

    @property
    def keep(self) -> float | int:
        """Share or number of rows that are passed on."""
        return self._cut.keep

    @property
    def selector(self) -> Selector:
        """The rule."""
        return self._cut.selector

    @property
    def generator(self) -> torch.Generator | None:
        """Where draws come from."""
        return self._cut.generator

    @property
    def report(self) -> CutReport:
        """What the last backward chose. Raises RuntimeError before the first one."""
        if self._cut.last is None:
            raise RuntimeError("there is no report before the first backward through this cut")
        return self._cut.last

    def forward(self, hidden: Tensor, features: Tensor | None = None) -> Tensor:
        """Return ``hidden`` (n, ...).

        ``features`` (n, ...) is the input of the layer that computed ``hidden``, if that layer is known.
        """
        if not self.training:
            return hidden
        check_tensors(hidden, features)
        if torch.compiler.is_compiling():
            from selbp.cut import untraced  # here, because it imports Dynamo

            return untraced.attach(self._cut, hidden, features)
        return self._cut.attach(hidden, features)

    def extra_repr(self) -> str:
        """Return the settings for ``print(model)``."""
        return f"keep={self.keep}, selector={self.selector!r}"
