"""What every selection rule offers, and the checks they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from selbp._checks import check_entries, check_generator, check_int, shown
from selbp.selectors.candidates import Candidates
from selbp.selectors.proxies import GradientProxies
from selbp.types import BatchStatistics, Selection

Needs = Literal["nothing", "loss", "statistics", "gradients"]
NEEDS = ("nothing", "loss", "statistics", "gradients")


@runtime_checkable
class Selector(Protocol):
    """A rule that chooses k rows of a minibatch of n, and their weights: what a rule of your own must offer.

    :class:`selbp.BaseSelector` offers it to subclasses, which choose only.

    Attributes
    ----------
    needs : {"nothing", "loss", "statistics", "gradients"}
        What the rule reads, so that nothing else is computed. ``"nothing"``: chosen before the forward, which then
        runs k rows only. ``"statistics"``: losses and gradient norms. ``"gradients"``: the ``proxies`` as well.

    See Also
    --------
    selbp.BaseSelector : has all but the choice.
    selbp.SelectiveBackprop : calls the rule.

    Examples
    --------
    >>> import selbp
    >>> isinstance(selbp.TopLoss(), selbp.Selector), selbp.TopLoss().needs
    (True, 'loss')
    """

    @property
    def needs(self) -> Needs:
        """What :meth:`select` reads."""
        ...

    def select(
        self,
        stats: BatchStatistics,
        k: int,
        *,
        proxies: GradientProxies | None = None,
        extras: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Selection:
        """Choose k of the ``len(stats.valid)`` rows, without synchronising with the device.

        Parameters
        ----------
        stats : BatchStatistics
            ``stats.loss`` is each sample's own loss as torch's ``reduction="none"`` gives it, summed over the tokens of
            a sequence: it means the same in every minibatch. ``stats.residual_sq`` and the ``proxies`` are of the
            losses scaled so that their mean over the n rows is torch's ``reduction="mean"``, whose gradient is matched.
        k : int
            How many rows.
        proxies : GradientProxies or None
            The per-sample gradients, where ``needs`` is ``"gradients"``.
        extras : mapping or None
            What the caller knows about each sample: tensors (n,) by name.
        generator : torch.Generator or None
            Where every draw comes from, on the statistics' device; torch's global one for None.

        Returns
        -------
        Selection
            Exactly k rows and their weights.

        Raises
        ------
        ValueError
            Unless 1 <= k <= n.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on as if it had not stopped; empty for a rule without memory."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Raises ValueError, and changes nothing, where it does not fit."""
        ...


class BaseSelector:
    """A rule to subclass: say what it reads, ``needs``, and choose in :meth:`choose`.

    What every rule repeats is here. :meth:`select` checks its arguments and records no gradient. The state is that of
    a rule without memory: empty. The ``repr`` is the call that makes the rule.

    Attributes
    ----------
    needs : {"nothing", "loss", "statistics", "gradients"}
        What the rule reads, see :class:`selbp.Selector`.
    replays : bool
        Whether a CUDA graph may hold the rule although it remembers earlier minibatches: what it remembers is written
        to the same tensors each time. False; a rule without memory does not need it.

    Raises
    ------
    TypeError
        By ``needs`` of a class that does not say what it reads.

    See Also
    --------
    selbp.Selector : what a step asks of a rule, whose class may be any.
    selbp.selectors.Candidates : what a rule is given.

    Examples
    --------
    >>> import torch, selbp
    >>> class Easiest(selbp.BaseSelector):
    ...     needs = "loss"
    ...
    ...     def choose(self, rows, k):
    ...         return rows.pick(-rows.stats.loss, k)
    >>> logits = torch.tensor([[4.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    >>> stats = selbp.ops.cross_entropy_statistics(logits, torch.zeros(4, dtype=torch.int64))
    >>> Easiest().select(stats, k=2)
    Selection(indices=tensor([0, 2]), weights=tensor([0.5000, 0.5000]))
    >>> Easiest()
    Easiest()
    """

    replays: ClassVar[bool] = False

    @property
    def needs(self) -> Needs:
        """What the rule reads."""
        raise TypeError(f"{type(self).__name__} must say what it reads: needs = one of {NEEDS}")

    def choose(self, rows: Candidates, k: int) -> Selection:
        """Choose k of the ``rows``: what a subclass writes.

        Parameters
        ----------
        rows : Candidates
            The n rows of the minibatch. :meth:`Candidates.pick <selbp.selectors.Candidates.pick>` takes the best or
            draws, and weights them.
        k : int
            How many, 1 <= k <= n.

        Returns
        -------
        Selection
            Exactly k rows and their weights, 0 for a row that is not ``rows.stats.valid``.
        """
        raise NotImplementedError(f"{type(self).__name__} must define choose(rows, k)")

    def select(
        self,
        stats: BatchStatistics,
        k: int,
        *,
        proxies: GradientProxies | None = None,
        extras: Mapping[str, Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Selection:
        """See :meth:`Selector.select`: checks, then :meth:`choose`."""
        with torch.no_grad():  # a decorator would cost a call more
            k = check_select(stats, k, generator)
            return self.choose(Candidates(stats, proxies, extras, generator, self), k)

    def state_dict(self) -> dict[str, Any]:
        """An empty dict: a rule with memory returns what it remembers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept an empty state. Raises ValueError for any other, which belongs to another rule."""
        check_state(self, state, ())

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items() if not name.startswith("_"))
        return f"{type(self).__name__}({options})"


def check_state(selector: object, state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raise ValueError unless ``state`` has exactly the entries ``names``."""
    check_entries(f"state of {type(selector).__name__}", state, names)


def state_tensor(state: Mapping[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """A copy of the state's entry ``name``. Raises ValueError unless it is a float64 tensor of ``shape``."""
    value = state[name]
    if not isinstance(value, Tensor) or value.shape != shape or value.dtype != torch.float64:
        raise ValueError(f"{name} must be a float64 tensor of shape {shape}, got {shown(value)}")
    return value.clone()


def check_selection(rule: object, selection: object, k: int | None, n: int) -> Selection:
    """What ``rule`` returned, as it is. Raises TypeError or ValueError unless it is k of n rows; None for any number.

    Whether the rows of a rule from elsewhere lie in [0, n) is looked at on a CPU; on a GPU it would wait.
    """
    if not isinstance(selection, tuple) or len(selection) != 2 or not all(isinstance(x, Tensor) for x in selection):
        raise TypeError(
            f"{rule!r} must return a selbp.Selection of two tensors, indices and weights, got {shown(selection)}"
        )
    indices, weights = selection
    wanted = "k" if k is None else f"k = {k}"
    if (
        indices.dim() != 1
        or indices.shape != weights.shape
        or indices.dtype != torch.int64
        or (k is not None and len(indices) != k)
    ):
        raise ValueError(
            f"{rule!r} must return indices ({wanted},) int64 and weights ({wanted},), "
            f"got {indices.dtype} {tuple(indices.shape)} and {tuple(weights.shape)}"
        )
    if indices.device.type == "cpu" and len(indices) and type(rule).__module__.partition(".")[0] != "selbp":
        least, most = (int(x) for x in indices.aminmax())
        if least < 0 or most >= n:
            raise ValueError(f"{rule!r} must return rows in [0, n = {n}), got values from {least} to {most}")
    return Selection(indices, weights)


def check_select(stats: BatchStatistics, k: int, generator: torch.Generator | None) -> int:
    """Check what every ``select`` is given, and return k."""
    if not isinstance(stats, BatchStatistics):
        raise TypeError(f"stats must be a BatchStatistics, got {shown(stats)}")
    valid = stats.valid
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool or valid.dim() != 1:
        raise ValueError(f"stats.valid must be a bool tensor (n,), got {shown(valid)}")
    shape = valid.shape
    for name, value in zip(BatchStatistics._fields, stats, strict=True):
        if not isinstance(value, Tensor) or value.shape != shape:
            raise ValueError(f"stats.{name} must be a tensor (n,) = {tuple(shape)}, got {shown(value)}")
    n = shape[0]
    if not isinstance(k, torch.SymInt):
        k = check_int("k", k)
    if not 1 <= k <= n:
        raise ValueError(f"k must lie in [1, n = {n}], got {k}")
    check_generator(generator, valid.device)
    return k
