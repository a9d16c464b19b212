"""Selection under data parallelism: what crosses the ranks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from selbp.common.hooks import watched


def unwrap(model: nn.Module) -> nn.Module:
    """The user's module inside ``DistributedDataParallel`` and ``torch.compile`` wrappers."""
    while True:
        inner = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        inner = getattr(inner, "_orig_mod", inner)
        if inner is model:
            return model
        model = inner


def parallel_in(model: nn.Module) -> DistributedDataParallel | None:
    """The ``DistributedDataParallel`` that ``model`` is, by itself or compiled."""
    while not isinstance(model, DistributedDataParallel):
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return None
        model = inner
    return model


def without_parallel(model: nn.Module) -> nn.Module:
    """The module in the ``DistributedDataParallel`` that ``model`` is, by itself or compiled; else ``model``.

    For forwards that the wrapper must not see. What is compiled with the wrapper runs as it was written.
    """
    parallel = parallel_in(model)
    return model if parallel is None else parallel.module


@contextmanager
def buffers_synchronised(model: nn.Module) -> Iterator[None]:
    """The buffers are rank 0's on every rank, and the wrapper's forward inside does not see to that once more.

    For a forward that runs on copies of buffers: the wrapper would broadcast the copies.
    """
    parallel = parallel_in(model)
    if parallel is None or not parallel._check_sync_bufs_pre_fwd():
        yield
        return
    parallel._sync_buffers()
    parallel.require_forward_param_sync = False  # until the forward has run
    try:
        yield
    except BaseException:
        parallel.require_forward_param_sync = True
        raise


def inner_outputs(model: nn.Module, *, trains: bool) -> AbstractContextManager[list[Any]]:
    """Inside, what the module in a ``DistributedDataParallel`` returns, before that puts a node of its own on top.

    A gradient that is read through that node counts as the backward: with ``static_graph=True`` the ranks' gradients
    would never be averaged. The list stays empty where there is no such node. With ``trains`` False, the wrapper does
    not hear of the forward, which no backward follows, though part of it is recorded.
    """
    parallel = parallel_in(model)
    if parallel is None or (trains and not (parallel.static_graph or parallel.find_unused_parameters)):
        return nullcontext([])
    return _kept_outputs(parallel.module, trains)


@contextmanager
def _kept_outputs(module: nn.Module, trains: bool) -> Iterator[list[Any]]:
    outputs: list[Any] = []

    def keep(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        outputs.append(output)
        if not trains:
            torch.set_grad_enabled(False)
        return output

    with watched(module, keep):
        yield outputs


def check_not_bypassed(model: nn.Module) -> bool:
    """Raise RuntimeError where ``model`` is inside a ``DistributedDataParallel`` that its forward does not go through.

    Its gradients would never be averaged. Returns False where the question is to be asked again. Where the wrapper's
    own forward is what calls, all is well. Looks at every object of the process: for the first step only.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return True
    if parallel_in(model) is not None or (wrapper := _wrapper_of(model)) is None:
        return True
    if not wrapper.require_backward_grad_sync:
        return False  # inside `no_sync`, which wants the rank's own gradient
    if getattr(DistributedDataParallel, "_active_ddp_module", None) is wrapper:
        return True
    gc.collect()  # one that nobody holds any more, but for a cycle of its own
    if _wrapper_of(model) is None:
        return True
    raise RuntimeError(
        "the step's model is inside a DistributedDataParallel, whose forward the step does not call: the gradients "
        "would not be averaged over the ranks. Build the step after wrapping (or after accelerator.prepare), "
        "with the wrapped model"
    )


def _wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    inner = getattr(model, "_orig_mod", model)
    for found in gc.get_objects():
        if issubclass(type(found), DistributedDataParallel):  # `isinstance` would ask proxies for their class
            own = vars(found).get("_modules", {}).get("module")
            if own is not None and any(module is inner for module in own.modules()):
                parallel: DistributedDataParallel = found
                return parallel
    return None
