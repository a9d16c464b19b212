"""Which rows were chosen (``RowSet``) and where they stand in a tensor (``Layout``).

A gradient of n samples seldom keeps them in dim 0: attention folds them with the heads, a sequence model with the
time steps, ``Linear`` with both. So a dim that holds the samples is described as ``pre * n * post`` flattened, and
every view moves that description exactly: nothing is guessed from a size that happens to be n.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor

from selbp.rows.slices import Plan, Slices

BatchNormPolicy = Literal["exact", "subset"]

# What follows from sizes and strides alone, kept from step to step: by (n, k, dim, pre, post), the plans of tensors
# that were cut to rows, the outer sizes and strides of gradients that were wrapped, where views put the samples.
_Known = tuple[dict[Any, Plan], dict[Any, Any], dict[Any, Any]]
_KNOWN: dict[tuple[int, ...], _Known] = {}
_ENTRIES = 4096  # of one layout, and layouts; a model whose shapes never repeat starts afresh then


def _known(key: tuple[int, ...]) -> _Known:
    found = _KNOWN.get(key)
    if found is None or max(map(len, found)) > _ENTRIES:
        if len(_KNOWN) > _ENTRIES:
            _KNOWN.clear()
        found = _KNOWN[key] = ({}, {}, {})
    return found


class Layout:
    """Dim ``dim`` of a tensor holds the samples as (pre, n, post) flattened; the row gradient stores (pre, k, post)."""

    __slots__ = ("rows", "dim", "pre", "post", "full", "kept", "plans", "outer", "views", "_at")

    def __init__(self, rows: RowSet, dim: int, pre: int, post: int) -> None:
        self.rows, self.dim, self.pre, self.post = rows, dim, pre, post
        self.full = pre * rows.n * post  # size of the dim as autograd sees it
        self.kept = pre * rows.k * post  # size of the dim as it is stored
        self.plans, self.outer, self.views = _known((rows.n, rows.k, dim, pre, post))
        self._at = {dim: self}

    def at(self, dim: int) -> Layout:
        """The same (pre, n, post), standing in another dim."""
        found = self._at.get(dim)
        if found is None:
            found = self._at[dim] = self.rows.layout(dim, self.pre, self.post)
        return found

    def take(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """The chosen rows of a dense ``tensor`` whose dim ``dim`` (default: this one) has this layout."""
        return self.rows.slices.take(tensor, self, self.dim if dim is None else dim)

    def once(self, tensor: Tensor) -> Tensor:
        """:meth:`take` along this dim for a small tensor that no other operator reads: the copy is not remembered."""
        if self.pre == self.post == 1 and tensor.shape[self.dim] == self.full:
            return self.rows.cut(tensor, self.dim)
        return self.take(tensor)

    def __repr__(self) -> str:
        return f"Layout(dim={self.dim}, pre={self.pre}, n={self.rows.n}, k={self.rows.k}, post={self.post})"


class RowSet:
    """One selection, as its backward sees it: the chosen rows, the policy, and what happened."""

    def __init__(
        self,
        indices: Tensor,  # (k,) int64
        n: int,  # samples in the forward
        *,
        batchnorm: BatchNormPolicy = "exact",
        dense: Counter[str] | None = None,  # op name -> times its gradient was scattered back to n rows
        live: Tensor | None = None,  # () bool: whether any row counts; None where that is known
    ) -> None:
        self.indices, self.n, self.k = indices, n, indices.numel()
        self.batchnorm, self.live = batchnorm, live
        self.dense: Counter[str] = Counter() if dense is None else dense
        self.slices = Slices(self)
        self.stale = False  # some tensor with views has become dense, which they follow when next used
        self.copied: set[int] = set()  # ids of gradients of which a view is a copy, which a write would not reach
        self.task = -1  # the engine's backward in which these rows entered
        self._all_differ: bool | None = None
        self._layouts: dict[tuple[int, int, int], Layout] = {}
        self._indices = {indices.device: indices}

    def layout(self, dim: int, pre: int = 1, post: int = 1) -> Layout:
        """The (shared) layout of these rows at ``dim``; equal layouts are one object."""
        key = (dim, pre, post)
        found = self._layouts.get(key)
        if found is None:
            found = self._layouts[key] = Layout(self, dim, pre, post)
        return found

    def cut(self, tensor: Tensor, dim: int) -> Tensor:
        """A copy of the chosen rows of ``tensor``, whose dim ``dim`` holds the n samples and nothing else.

        Where no row counts, see :meth:`alive`.
        """
        return self.alive(tensor.index_select(dim, self.on(tensor.device)))

    def alive(self, copy: Tensor) -> Tensor:
        """``copy``, filled with 0.5 where no row counts.

        There the gradients are 0 but the forward may have left NaN, and 0 * NaN is NaN: 0.5 is what no backward divides
        by zero for. The device decides, so that nobody waits for it.
        """
        if self.live is None or not (copy.is_floating_point() or copy.is_complex()):
            return copy
        return torch.where(self.live.to(copy.device), copy, 0.5)

    def merged(self, gradient: Tensor) -> Tensor:
        """The (k, ...) ``gradient`` with the sum of an index's rows in one of its slots, and 0 in its others.

        An operator that is not linear in the gradient (``abs``, a product of two gradients) is then right as well: it
        maps 0 to 0, and meets each sample's gradient whole. On a CPU the indices are looked at, elsewhere all are
        taken to repeat, so that nobody waits.
        """
        device = gradient.device
        if self.k == 1 or (device.type == "cpu" and self._distinct()):
            return gradient
        indices, slots = self.on(device), torch.arange(self.k, device=device)
        owner = slots.new_empty(self.n).scatter_(0, indices, slots).index_select(0, indices)
        return gradient.new_zeros(gradient.shape).index_add_(0, owner, gradient)

    def _distinct(self) -> bool:
        if self._all_differ is None:
            self._all_differ = len(set(self.on(torch.device("cpu")).tolist())) == self.k
        return self._all_differ

    def on(self, device: torch.device) -> Tensor:
        """(k,) the indices on ``device``: a model may span several."""
        if device not in self._indices:
            self._indices[device] = self.indices.to(device)
        return self._indices[device]
