"""Which rows were chosen (``RowSet``), where they stand in a tensor (``Layout``), and their copies (``Slices``).

A gradient of n samples often keeps them in another dim than dim 0: attention folds them with the heads, a sequence
model with the time steps, ``Linear`` with both. A dim that holds the samples is therefore described as (pre, n, post)
flattened. Every view changes that description by arithmetic. Nothing is guessed from a size that happens to be n.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef

from selbp.rows.blocks import Fold, Plan, plan_of
from selbp.rows.observe import Observer, current_observers
from selbp.rows.registry import NoRuleError

BatchNormPolicy = Literal["exact", "subset"]

REMEMBERED = 4  # copies kept: the readers of one activation follow each other closely in a backward

# A cache across steps, by (n, k, dim, pre, post). It holds three things that depend only on sizes and strides: copy
# plans, the sizes and strides that row gradients show, and the results of view rules.
_Known = tuple[dict[Any, Plan], dict[Any, Any], dict[Any, Any]]
_KNOWN: dict[tuple[int, ...], _Known] = {}
_ENTRIES = 4096  # of one layout, and layouts. The cache is emptied there, for models whose shapes never repeat


def _known(key: tuple[int, ...]) -> _Known:
    known = _KNOWN.get(key)
    if known is None or max(map(len, known)) > _ENTRIES:
        if len(_KNOWN) > _ENTRIES:
            _KNOWN.clear()
        known = _KNOWN[key] = ({}, {}, {})
    return known


class Layout:
    """Dim ``dim`` of a tensor holds the samples as (pre, n, post) flattened; the row gradient stores (pre, k, post)."""

    __slots__ = ("rows", "dim", "pre", "post", "full", "kept", "plans", "outer", "views", "_at")

    def __init__(self, rows: RowSet, dim: int, pre: int, post: int) -> None:
        self.rows, self.dim, self.pre, self.post = rows, dim, pre, post
        self.full = pre * rows.n * post  # size of the dim as autograd sees it
        self.kept = pre * rows.k * post  # size of the dim as it is stored
        self.plans, self.outer, self.views = _known((rows.n, rows.k, dim, pre, post))
        self._at = {dim: self}  # spares `at`, which most view rules call, the key that `RowSet.layout` hashes

    @property
    def fold(self) -> Fold:
        """(n, k, pre, post)."""
        return Fold(self.rows.n, self.rows.k, self.pre, self.post)

    def at(self, dim: int) -> Layout:
        """Return the layout of the same (pre, n, post) in another dim."""
        layout = self._at.get(dim)
        if layout is None:
            layout = self._at[dim] = self.rows.layout(dim, self.pre, self.post)
        return layout

    def take(self, tensor: Tensor, dim: int | None = None) -> Tensor:
        """Return the chosen rows of a dense ``tensor`` whose dim ``dim`` (default: this one) has this layout."""
        return self.rows.slices.take(tensor, self, self.dim if dim is None else dim)

    def take_once(self, tensor: Tensor) -> Tensor:
        """Return :meth:`take` along this dim without remembering the copy: for a small tensor with one reader."""
        if self.pre == self.post == 1 and tensor.shape[self.dim] == self.full:
            return self.rows.copy_rows(tensor, self.dim)
        return self.take(tensor)

    def __repr__(self) -> str:
        return f"Layout(dim={self.dim}, pre={self.pre}, n={self.rows.n}, k={self.rows.k}, post={self.post})"


class RowSet:
    """One selection, as its backward sees it: the chosen rows, the options, and what happened."""

    def __init__(
        self,
        indices: Tensor,  # (k,) int64
        n: int,  # samples in the forward
        *,
        batchnorm: BatchNormPolicy = "exact",
        densified: Counter[str] | None = None,  # operator -> times its gradient was scattered back to n rows
        any_valid: Tensor | None = None,  # () bool: whether any row counts; None if that is known
        observers: tuple[Observer, ...] | None = None,  # None: the observers of the enclosing `observing` blocks
    ) -> None:
        # Copies: a caller that keeps one buffer of indices may write to it before the backward has run.
        self.indices, self.n, self.k = indices.clone(), n, indices.numel()
        self.batchnorm, self.any_valid = batchnorm, None if any_valid is None else any_valid.clone()
        self.dense: Counter[str] = Counter() if densified is None else densified
        self.observers = current_observers() if observers is None else observers
        self.slices = Slices(self)
        self.stale = False  # a tensor with views has become dense; the views follow when they are next used
        self.copied: set[int] = set()  # ids of gradients with a view that is a copy, which a write would not reach
        self.task = -1  # the engine's backward in which these rows entered
        self._all_differ: bool | None = None
        self._layouts: dict[tuple[int, int, int], Layout] = {}
        self._indices = {indices.device: self.indices}

    def layout(self, dim: int, pre: int = 1, post: int = 1) -> Layout:
        """Return the layout of these rows at ``dim``. Equal layouts are one object."""
        key = (dim, pre, post)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = Layout(self, dim, pre, post)
        return layout

    def copy_rows(self, tensor: Tensor, dim: int) -> Tensor:
        """Return a copy of the chosen rows of ``tensor``, whose dim ``dim`` holds the n samples and nothing else."""
        return self.finite_if_none_valid(tensor.index_select(dim, self.on(tensor.device)))

    def finite_if_none_valid(self, copy: Tensor) -> Tensor:
        """Return ``copy``, filled with 0.5 if no row counts.

        In that case all gradients are 0, but the forward may have left NaN, and 0 * NaN is NaN. No backward formula
        divides by zero for 0.5. ``torch.where`` decides on the device, so there is no synchronisation.
        """
        if self.any_valid is None or not (copy.is_floating_point() or copy.is_complex()):
            return copy
        return torch.where(self.any_valid.to(copy.device), copy, 0.5)

    def merge_duplicates(self, gradient: Tensor) -> Tensor:
        """Return the (k, ...) ``gradient`` with the sum of an index's rows in one of its slots, and 0 in the others.

        An operator that is not linear in the gradient (``abs``, a product of two gradients) is then right as well: it
        maps 0 to 0, and each sample's gradient is in one row. On a CPU the indices are read. On other devices the rows
        are always summed, so that nothing waits.
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
        """Return the (k,) indices on ``device``: a model may span several."""
        if device not in self._indices:
            self._indices[device] = self.indices.to(device)
        return self._indices[device]


class Slices:
    """Chosen rows of the tensors that the forward saved, for one backward. Each storage is copied at most once.

    One activation is saved in many guises: ReLU's result and the next layer's input, (n, T, d) and (n * T, d), a
    transpose, the q, k and v of one projection. All are views of one storage. The blocks of the storage are copied and
    remembered, and each guise is a strided view of the copy. A tensor whose rows are not blocks is copied by itself.

    Autograd frees what an operation saved as soon as the operation has run, and a copy must not hold its n-row source
    any longer. Sources are therefore remembered by weak references. Such a reference keeps the storage's handle but not
    its memory, so no other storage can get the handle's address, by which copies are found.
    """

    def __init__(self, rows: RowSet) -> None:
        self._rows = rows
        self._copies: dict[tuple[Any, ...], tuple[StorageWeakRef, Tensor]] = {}

    def clear(self) -> None:
        """Forget every copy, because the backward is over."""
        self._copies.clear()

    def take(self, tensor: Tensor, layout: Layout, dim: int) -> Tensor:
        """Return the rows of ``tensor``, whose dim ``dim`` is (pre, n, post) flattened, with strides in the same order.

        Raises NoRuleError if the tensor is not strided, or has another size in that dim.
        """
        if tensor.is_conj():  # the storage holds the conjugate; below dispatch torch would not resolve a lazy one
            return self.take(tensor.conj(), layout, dim).conj_physical()
        if tensor.is_neg():
            return self.take(torch._neg_view(tensor), layout, dim).neg()
        try:
            key = (dim, tensor.shape, tensor.stride(), tensor.storage_offset())
            storage = tensor.untyped_storage()
        except (RuntimeError, NotImplementedError):  # sparse, nested or oneDNN's own
            raise NoRuleError(f"an operand's memory is {tensor.layout}, not strided") from None
        plans = layout.plans
        plan = plans.get(key)
        if plan is None:
            plan = plans[key] = plan_of(tensor, layout.fold, dim)
        size, expanded, blocks, whole, strides, within, start, end, outer, step = plan
        if expanded:
            return self._rows.finite_if_none_valid(tensor.narrow(dim, 0, 1)).expand(size)
        if not blocks or end * tensor.itemsize > storage.nbytes():
            return self._copy_alone(tensor, layout, dim)
        place = (storage._cdata, start, outer, step, tensor.dtype, tensor._version)
        known = self._copies.get(place)
        if known is None:
            copy_rows = self._rows.copy_rows
            if whole:
                copy = copy_rows(tensor, 0)
                self._remember(place, storage, copy)
                return copy
            n = layout.rows.n
            if outer == 1:
                copy = copy_rows(tensor.as_strided((n, step), (step, 1), start), 0)
            else:
                copy = copy_rows(tensor.as_strided((outer, n, step), (n * step, step, 1), start), 1)
            self._remember(place, storage, copy)
        else:
            copy = known[1]
            if whole and copy.shape == size:
                return copy
        return copy.as_strided(size, strides, within)

    def _copy_alone(self, tensor: Tensor, layout: Layout, dim: int) -> Tensor:
        """Return a copy for this tensor only, with the dims in their order in memory."""
        shape, stride, storage = tuple(tensor.shape), tensor.stride(), tensor.untyped_storage()
        place = (storage._cdata, tensor.storage_offset(), shape, stride, dim, layout.pre, layout.post)
        key = (*place, tensor.dtype, tensor._version)
        known = self._copies.get(key)
        if known is not None:
            return known[1]
        x = tensor
        for axis, apart in enumerate(stride):
            if apart == 0 and axis != dim:
                x = x.narrow(axis, 0, min(1, shape[axis]))
        x = x.unflatten(dim, (layout.pre, self._rows.n, layout.post))
        order = sorted(range(x.dim()), key=lambda axis: -x.stride(axis))
        back = sorted(range(x.dim()), key=order.__getitem__)
        x = self._rows.copy_rows(x.permute(order), back[dim + 1]).permute(back).flatten(dim, dim + 2)
        size = list(shape)
        size[dim] = layout.kept
        copy = x.expand(size)
        self._remember(key, storage, copy)
        return copy

    def _remember(self, key: tuple[Any, ...], source: UntypedStorage, copy: Tensor) -> None:
        copies = self._copies
        copies[key] = (StorageWeakRef(source), copy)
        if len(copies) > REMEMBERED:
            del copies[next(iter(copies))]  # the oldest
