"""``checkpoint``: a block whose activations are not kept. The backward recomputes the k chosen rows, not all n.

Ordinary checkpointing recomputes n rows, and a row selection then throws most of them away. Here the block's input is
cut to the rows of the gradient that arrives. Only those rows run forward again, with the dropout masks that the first
forward drew.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from selbp._checks import check_int, shown
from selbp.rows.masks import OTHER_DRAW
from selbp.rows.recompute import Checkpoint


def _have_samples(inputs: tuple[Tensor, ...], shared: Iterable[int]) -> list[bool]:
    """Return which inputs have the samples in dim 0. Raises TypeError or ValueError that names the argument."""
    if isinstance(shared, str) or not isinstance(shared, Iterable):
        raise TypeError(f"shared must be positions among the inputs, such as (1,), got {shown(shared)}")
    positions = [check_int("shared", position, None, "positions among the inputs, such as (1,)") for position in shared]
    if not all(0 < position < len(inputs) for position in positions):
        raise ValueError(f"shared must lie in [1, {len(inputs)}): inputs[0] has the samples; got {shown(shared)}")
    if inputs[0].dim() == 0:
        raise ValueError("inputs[0] must be (n, ...), with the samples in dim 0, got a scalar")
    sampled = [x.dim() > 0 and i not in positions for i, x in enumerate(inputs)]
    n = inputs[0].shape[0]
    for i, x in enumerate(inputs):
        if sampled[i] and x.shape[0] != n:
            raise ValueError(
                f"inputs[{i}] must have the n = {n} samples of inputs[0] in dim 0, got {tuple(x.shape)}: "
                f"if all samples share it, name it, shared=({i},)"
            )
    return sampled


def checkpoint(module: nn.Module, *inputs: Tensor, shared: Iterable[int] = ()) -> Tensor:
    """Run ``module(*inputs)`` without keeping its activations. The backward runs it again on the rows with a gradient.

    Below a row selection or a cut, only the k chosen rows are recomputed. Without one, all n rows are, as in
    ``torch.utils.checkpoint``. The dropout masks of the first forward are kept, one byte per entry, and replayed.

    Parameters
    ----------
    module : nn.Module
        Must treat samples independently, and return one tensor with the samples in dim 0.
    *inputs : Tensor
        (n, ...) with the samples in dim 0, but for those that ``shared`` names and scalars. Of any dtype.
    shared : iterable of int
        Positions among ``inputs`` of those that all samples share, such as a mask or a table of positions. They are not
        told by their size, which may happen to be n. The first input has the samples.

    Returns
    -------
    Tensor
        The module's output.

    Raises
    ------
    TypeError
        If ``module`` is not a module, an input is not a tensor, or the output is not one tensor.
    ValueError
        If an input is not (n, ...) and not named in ``shared``, or if the module contains BatchNorm in training mode:
        its statistics couple the samples, and a second forward would count them again. Also if the module edits an
        input in place, as one that begins with ``ReLU(inplace=True)``.
    NotImplementedError
        If the module draws random numbers other than the masks of dropout layers: attention or recurrent layers with
        dropout, ``AlphaDropout``, noise. Also for dropout of a tensor in which no dim has size n. Global generators are
        seen to move: a run during which another thread draws from one is made again, and refused after 16 such runs.
    RuntimeError
        In the backward, if the module calls dropout otherwise than in the forward, for instance because its mode was
        changed between them.

    See Also
    --------
    selbp.select : selects the rows that the backward runs on.

    Examples
    --------
    >>> import torch, selbp
    >>> block = torch.nn.Linear(3, 3, bias=False)
    >>> losses = selbp.checkpoint(block, torch.ones(4, 3)).sum(1)  # (4,)
    >>> selbp.select(losses, torch.tensor([0, 2])).sum().backward()  # recomputes two rows
    >>> block.weight.grad[0]
    tensor([2., 2., 2.])
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {shown(module)}")
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(f"inputs must be tensors, the first with the samples in dim 0, got {shown(inputs)}")
    sampled = _have_samples(inputs, shared)
    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and layer.training:
            raise ValueError(
                "a checkpointed block must not contain BatchNorm in training mode: its statistics couple rows"
            )
        # cuDNN keeps a random state of its own for these, which `Recording` does not see.
        if isinstance(layer, nn.RNNBase) and layer.training and layer.dropout > 0 and layer.num_layers > 1:
            raise NotImplementedError(OTHER_DRAW)
    named = list(module.named_parameters())
    if not torch.is_grad_enabled():
        out: Tensor = module(*inputs)
        return out
    if torch.compiler.is_compiling():
        from selbp.rows.untraced import apply  # here, because it imports Dynamo
    else:
        apply = Checkpoint.apply
    result: Tensor = apply(module, [name for name, _ in named], sampled, *inputs, *(p for _, p in named))
    return result
