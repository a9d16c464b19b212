"""What the study's confirmations found ahead of random at equal time, and where it was not."""

from __future__ import annotations

from typing import Any

from torch import nn

from selbp._checks import shown
from selbp.selectors import GradientMatching, TopLoss

__all__ = ["recommended"]


def recommended(cut: nn.Module | str | None = None) -> dict[str, Any]:
    """Arguments of :class:`selbp.SelectiveBackprop` that the study confirmed, for a quarter of the minibatch.

    Both were ahead of random at equal time on ten fresh seeds: clean images, a CPU, small convolutional networks. With
    wrong labels, on text and in short trainings they were not. The documentation's guide "Choosing a rule" has the
    figures; measure your own.

    Parameters
    ----------
    cut : torch.nn.Module, str or None
        A module, or its name, at whose output to match gradients: in the evidence the input of the second last linear
        layer. Most of the network's work should lie below it. None: the samples with the largest losses, without a
        cut.

    Returns
    -------
    dict
        ``selector`` and ``keep``, and ``cut`` where one was given.

    Raises
    ------
    TypeError
        ``cut`` is neither of the three.

    See Also
    --------
    selbp.auto_select : chooses before anything is read, at the price of a random step.

    Examples
    --------
    >>> import torch, selbp
    >>> sorted(selbp.recommended(cut="body.9"))
    ['cut', 'keep', 'selector']
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> step = selbp.SelectiveBackprop(model, **selbp.recommended())
    >>> step(torch.randn(16, 4), torch.randint(0, 3, (16,))).backward()
    >>> step.report.k
    4
    """
    if cut is not None and not isinstance(cut, (nn.Module, str)):
        raise TypeError(f"cut must be a module, its name or None, got {shown(cut)}")
    if cut is None:
        return {"selector": TopLoss(), "keep": 0.25}
    return {"cut": cut, "selector": GradientMatching(), "keep": 0.25}
