"""Balanced sampling by the cube method: a random sample whose Horvitz-Thompson totals are nearly the true ones.

A sample of n units is a vertex of [0, 1]^n, their inclusion probabilities pi a point inside. The *flight* walks from pi
along directions u with A u = 0, where column i of A is x_i / pi_i: on the way the estimate sum_S x_i / pi_i stays where
it is, at sum x_i. Each walk ends on a face of the cube, where one more unit is in or out, and which of the two ends is
drawn so that the point does not move in expectation: unit i is in with probability pi_i, whatever x is. When fewer
units are left than A has rows, the *landing* drops the rows one by one, and that of the sample's size last.

Deville & Tille (2004), Biometrika 91, 893-912; flight through groups of p + 1 units: Chauvet & Tille (2006).
"""

from __future__ import annotations

import torch
from torch import Tensor

from selbp import _native, reference
from selbp._checks import check_dtype, check_floating, check_same_device, check_shape, check_tensor
from selbp.ops._register import define


def cube_sample(
    balance: Tensor,  # (n, p)
    probability: Tensor,  # (n,)
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a sample that is balanced on the columns of ``balance``, of a size that is always the same.

    Parameters
    ----------
    balance : Tensor
        (n, p) finite; columns in order of importance, the last are given up first.
    probability : Tensor
        (n,) inclusion probabilities in [0, 1], whose sum is an integer to rounding: the sample's size.
    generator : torch.Generator or None
        Where the draws come from, on the tensors' device; torch's global one for None.

    Returns
    -------
    Tensor
        (n,) bool. Each unit is in with its probability, and ``sum_S balance_i / probability_i`` has a variance that
        comes from the landing's last p units alone. Computed in float64.

    Raises
    ------
    TypeError
        An input is not a floating tensor.
    ValueError
        Shapes or devices do not fit.

    See Also
    --------
    selbp.CubeSampling : the rule that draws so.

    Examples
    --------
    >>> import torch, selbp
    >>> chosen = selbp.ops.cube_sample(torch.randn(8, 2), torch.full((8,), 0.5))
    >>> int(chosen.sum())
    4
    """
    check_tensor("balance", balance)
    check_tensor("probability", probability)
    check_floating("balance", balance)
    check_floating("probability", probability)
    check_shape("balance", balance, "(n, p)", (None, None))
    check_shape("probability", probability, f"({len(balance)},)", (len(balance),))
    check_same_device("probability", probability, "balance", balance)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator or None, got {type(generator).__name__}")
    draws = torch.rand(2, len(balance), dtype=torch.float64, device=balance.device, generator=generator)
    chosen: Tensor = _cube(balance.double(), probability.double(), draws[0].argsort(), draws[1])
    return chosen


def _check(balance: Tensor, probability: Tensor, order: Tensor, draws: Tensor) -> None:
    check_shape("balance", balance, "(n, p)", (None, None))
    n = balance.shape[0]
    for name, tensor, dtype in (
        ("balance", balance, torch.float64),
        ("probability", probability, torch.float64),
        ("order", order, torch.int64),
        ("draws", draws, torch.float64),
    ):
        check_dtype(name, tensor, dtype)
        if tensor is not balance:
            check_shape(name, tensor, f"(n,) with n = {n} rows as balance", (n,))
            check_same_device(name, tensor, "balance", balance)


def _cpu(balance: Tensor, probability: Tensor, order: Tensor, draws: Tensor) -> Tensor:
    n, p = balance.shape
    x, point = balance.t().contiguous(), probability.clone(memory_format=torch.contiguous_format)
    order, draws = order.contiguous(), draws.contiguous()
    scratch, group = x.new_empty((p + 2) * (p + 3)), order.new_empty(2 * p + 4)
    bad = _native.cube(
        n, p, x.data_ptr(), point.data_ptr(), order.data_ptr(), draws.data_ptr(), scratch.data_ptr(), group.data_ptr()
    )
    if bad >= 0:
        raise ValueError(f"order must lie in [0, {n}), got {int(order[bad])} at {bad}")
    return point > 0.5


def _fake(balance: Tensor, probability: Tensor, order: Tensor, draws: Tensor) -> Tensor:
    return torch.empty_like(probability, dtype=torch.bool)


_cube = define(
    "cube_sample(Tensor balance, Tensor probability, Tensor order, Tensor draws) -> Tensor",
    check=_check,
    fake=_fake,
    cpu=_cpu,
    cuda=reference.cube_sample,
)
