"""``insert_cut``: a cut in a model that is built already, as a hook that leaves the model's modules as they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selbp._checks import check_choice, check_entries, shown
from selbp.common.hooks import is_compiled, mark
from selbp.common.modules import find_place
from selbp.common.state import CHOICE_ENTRIES, ChoiceState
from selbp.cut.choice import cut_output
from selbp.cut.module import BackwardCut
from selbp.cut.proxies import Proxy
from selbp.cut.report import CutReport
from selbp.rows.layout import BatchNormPolicy
from selbp.selectors import Selector


class _Hook:
    """What the place calls in each forward; it is copied and pickled with the model."""

    def __init__(self, name: str, cut: BackwardCut) -> None:
        self.name, self.cut = name, cut

    def output(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """After the module."""
        if not module.training:
            return output
        return cut_output(self.cut, self.name, module, (*args, *kwargs.values()), output)

    def input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before the module."""
        if not module.training:
            return args, kwargs
        if args and isinstance(args[0], Tensor):
            return (self.cut(args[0]), *args[1:]), kwargs
        first = next(iter(kwargs), None)
        if not args and first is not None and isinstance(kwargs[first], Tensor):
            return args, {**kwargs, first: self.cut(kwargs[first])}
        raise TypeError(f"the cut at {self.name!r}: its first argument must be a Tensor")


class InsertedCut:
    """A cut that :func:`insert_cut` has placed: its report, its state, and how it is taken out again.

    Attributes
    ----------
    name : str
        The name of the module in the model.
    report : CutReport
        What the last backward chose.

    See Also
    --------
    selbp.insert_cut : returns one.

    Examples
    --------
    >>> import torch, selbp
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    >>> cut = selbp.insert_cut(model, "1", keep=4)
    >>> cut.name
    '1'
    >>> model(torch.randn(16, 8)).square().mean().backward()
    >>> cut.report.k
    4
    >>> cut.remove()  # the next backward runs all 16 rows
    """

    def __init__(self, name: str, cut: BackwardCut, undo: list[Callable[[], None]]) -> None:
        self.name = name
        self._cut, self._undo = cut, undo
        self._choice = ChoiceState(cut.selector, cut.generator)

    @property
    def report(self) -> CutReport:
        """What the last backward chose. Raises RuntimeError before the first one."""
        return self._cut.report

    def state_dict(self) -> dict[str, Any]:
        """The rule's memory and the generator's state, which the model's own ``state_dict`` has not."""
        return self._choice.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state_dict`. Raises ValueError, and changes nothing, where it does not fit."""
        check_entries("state", state, CHOICE_ENTRIES)
        self._choice.load_state_dict(state)

    def remove(self) -> None:
        """Take the cut out. A second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def __repr__(self) -> str:
        return f"InsertedCut({self.name!r}, {self._cut.extra_repr()})"


def insert_cut(
    model: nn.Module,
    place: nn.Module | str,
    *,
    keep: float | int,
    selector: Selector | None = None,
    at: Literal["output", "input"] = "output",
    generator: torch.Generator | None = None,
    losses: Callable[[], Tensor] | None = None,
    proxy: Proxy = "pooled",
    batchnorm: BatchNormPolicy = "exact",
) -> InsertedCut:
    """Place a cut in ``model``, which may be anybody's, without a change to its modules.

    A hook at ``place`` does what a :class:`selbp.BackwardCut` there would do. The ``state_dict`` has the same
    keys as before, weights stay tied, ``save_pretrained`` and any trainer see the same model. The cut follows the
    training mode of the module at ``place``. Place it before the model runs compiled for the first time.

    Parameters
    ----------
    model : nn.Module
        The model, by itself or inside ``DistributedDataParallel`` or ``torch.compile``.
    place : nn.Module or str
        One of its modules, or the name of one.
    keep : float or int
        A share in (0, 1] or a number of samples of at least 1.
    selector : Selector, optional
        The rule, :class:`selbp.GradientMatching` by default.
    at : {"output", "input"}
        Cut what the module returns, so that its own gradient is of k rows, or what it is given, so that its own
        gradient stays exact. It is a tensor (n, ...), or the first of a tuple.
    generator, losses, proxy, batchnorm
        As for :class:`selbp.BackwardCut`.

    Returns
    -------
    InsertedCut
        With ``report``, ``state_dict``, ``load_state_dict`` and ``remove``.

    Raises
    ------
    TypeError, ValueError
        For a place that the model has not, or an option that could not work.

    See Also
    --------
    selbp.BackwardCut : the cut as a module of your model.
    selbp.SelectiveBackprop : ``cut=`` places one in a step.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> cut = selbp.insert_cut(model, "2", keep=0.25, at="input")
    >>> model(torch.randn(16, 4)).square().mean().backward()
    >>> cut.report.k
    4
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    check_choice("at", at, ("output", "input"))
    if not isinstance(place, (nn.Module, str)):
        raise TypeError(f"place must be a module of the model or its name, got {shown(place)}")
    name, module = find_place("place", model, place)
    cut = BackwardCut(keep, selector, generator=generator, losses=losses, proxy=proxy, batchnorm=batchnorm)
    hook = _Hook(name, cut)
    if at == "output":
        handle = module.register_forward_hook(hook.output, with_kwargs=True)
    else:
        handle = module.register_forward_pre_hook(hook.input, with_kwargs=True)
    undo = [handle.remove]
    if is_compiled(model):  # code that ran before has no guard on a module's hooks
        undo.append(mark(module))
    return InsertedCut(name, cut, undo)
