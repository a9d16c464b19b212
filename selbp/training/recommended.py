"""What the study's confirmations found ahead of random at equal time."""

from __future__ import annotations

from typing import Any, overload

from torch import nn

from selbp._checks import shown
from selbp.sampling import AutoSelect
from selbp.selectors import GradientMatching, TopLoss
from selbp.training.automatic import auto_select

__all__ = ["recommended"]


@overload
def recommended(model: nn.Module, dataset: Any, **options: Any) -> AutoSelect: ...


@overload
def recommended(model: nn.Module | str | None = None, *, cut: nn.Module | str | None = None) -> dict[str, Any]: ...


def recommended(
    model: nn.Module | str | None = None,
    dataset: Any = None,
    *,
    cut: nn.Module | str | None = None,
    **options: Any,
) -> AutoSelect | dict[str, Any]:
    """What the study recommends: :func:`selbp.auto_select`, or, where minibatches are given, a rule that scores them.

    With a model and a data set it returns ``auto_select(model, dataset, ...)``, which was ahead of random and of the
    full batch at equal time, with clean and with wrong labels. Without a data set it returns arguments of
    :class:`selbp.SelectiveBackprop` for a quarter of the minibatch. Those were ahead of random in long trainings on
    clean images. Each was confirmed on ten fresh seeds, on a CPU, with small networks. On text and where a step takes
    a millisecond nothing was. The documentation's guide "Choosing a rule" has the figures; measure your own.

    Parameters
    ----------
    model : torch.nn.Module, str or None
        The model that trains. Without a data set the same as ``cut``.
    dataset : map-style data set or None
        Of N samples, (input, label) for each number.
    cut : torch.nn.Module, str or None
        A module, or its name, at whose output to match gradients: in the evidence the input of the second last linear
        layer. Most of the network's work should lie below it. None: the samples with the largest losses, without a
        cut. Without a data set only.
    **options
        Of :func:`selbp.auto_select`, such as ``classes``. With a data set only.

    Returns
    -------
    AutoSelect or dict
        With a data set the controller; else ``selector`` and ``keep``, and ``cut`` where one was given.

    Raises
    ------
    TypeError
        ``cut`` is neither of the three, or an argument goes with the other form.

    See Also
    --------
    selbp.auto_select : what is recommended for a data set.
    selbp.SelectiveBackprop : takes the arguments that are recommended for minibatches.

    Examples
    --------
    >>> import torch, selbp
    >>> data = torch.utils.data.TensorDataset(torch.randn(512, 8), torch.randint(0, 3, (512,)))
    >>> auto = selbp.recommended(torch.nn.Linear(8, 3), data, classes=3, k=16, pool=64)
    >>> for inputs, target in torch.utils.data.DataLoader(data, batch_sampler=auto.sampler):
    ...     auto(inputs, target).backward()
    >>> sorted(selbp.recommended(cut="body.9"))
    ['cut', 'keep', 'selector']
    >>> step = selbp.SelectiveBackprop(torch.nn.Linear(8, 3), **selbp.recommended())
    """
    if dataset is not None:
        if cut is not None:
            raise TypeError("cut goes with minibatches, and not with a data set")
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
        return auto_select(model, dataset, **options)
    if options:
        raise TypeError(f"{', '.join(sorted(options))} must come with a data set, as auto_select takes them")
    cut = model if cut is None else cut
    if cut is not None and not isinstance(cut, (nn.Module, str)):
        raise TypeError(f"cut must be a module, its name or None, got {shown(cut)}")
    if cut is None:
        return {"selector": TopLoss(), "keep": 0.25}
    return {"cut": cut, "selector": GradientMatching(), "keep": 0.25}
