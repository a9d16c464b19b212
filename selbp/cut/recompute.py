"""A cut whose lower part is recomputed: it runs on n rows without a graph, and in the backward on the k chosen rows.

This is checkpointing for a cut: nothing below the cut is stored for n rows. The first run may be in lower precision,
because only the choice and the layers above depend on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from selbp._torch import without_autocast_cache
from selbp.common.batch import Batch
from selbp.common.buffers import Written, buffers_put_back
from selbp.common.distributed import parallel_in
from selbp.common.guards import AutocastMode, evaluating, scoring_autocast
from selbp.common.hooks import COMPILED, is_compiled, watched
from selbp.common.in_place import Kept, Untouched, source
from selbp.common.keep import kept_rows
from selbp.cut.choice import Cut, cut_output
from selbp.cut.report import CutReport
from selbp.rows.engine import nodes_of
from selbp.rows.unsupported import refuse_backward


class _Reached(Exception):
    """Raised to end a forward at the cut; carries the cut's output."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__("the cut was reached")
        self.hidden = hidden


class RecomputedCut:
    """Feed batches to a model with a cut at ``module``'s output, and recompute the part below the cut."""

    def __init__(self, model: nn.Module, module: nn.Module, name: str, cut: Cut, precision: str) -> None:
        if parallel_in(model) is not None:
            raise ValueError(
                'cut= with backward="recompute" runs a backward inside the backward, which '
                'DistributedDataParallel does not follow: use backward="rows"'
            )
        self._model, self._module, self._name, self._cut, self._precision = model, module, name, cut, precision
        self._untouched, self._checked = Untouched(), False

    def check_once(self, batch: Batch) -> None:
        """Look once, by a forward of two samples, whether the part below can be recomputed. Raises ValueError."""
        if not self._checked and torch.is_grad_enabled() and kept_rows(self._cut.keep, batch.n) < batch.n:
            self._check_bypass(batch)
            self._checked = True

    def feed(self, batch: Batch, on_choice: Callable[[CutReport], None], written: Written) -> Any:
        """Run the forward and return the model's output. Its backward trains the part below the cut on k rows.

        These start from what buffers were when ``written`` began; it is told that the forward has run.
        When the backward has chosen, ``on_choice`` is called with the report.
        """
        if not torch.is_grad_enabled():
            return batch.feed(self._model)
        self.check_once(batch)
        k = kept_rows(self._cut.keep, batch.n)
        mode = AutocastMode(batch.device)

        def leave(hidden: Tensor, features: Tensor | None) -> Tensor:
            if hidden.shape[:1] != (batch.n,):
                raise ValueError(f"the cut's output must have {batch.n} rows in dim 0, got {tuple(hidden.shape)}")
            torch.set_grad_enabled(True)  # the forward records from here on; `no_grad` below restores the mode
            mode.apply()
            leaf = hidden.float() if hidden.dtype in (torch.bfloat16, torch.float16) and not mode.enabled else hidden
            leaf = source(leaf)
            activation = Kept(hidden if features is None else features)

            def hook(delta: Tensor | None) -> None:
                refuse_backward()
                if delta is None:  # the operators above have no gradient for the cut
                    return
                with torch.no_grad():
                    indices, rows, report = self._cut.pick(delta, activation.take(), k)
                self._cut.last = report
                on_choice(report)
                with written.replayed():  # a checkpoint runs layers again in the backward
                    with torch.enable_grad(), mode.within():
                        below = self._rerun(batch.take(indices))
                    if below.requires_grad:
                        torch.autograd.backward(below, rows.to(below.dtype))

            leaf.register_hook(hook)
            return leaf

        lowered = scoring_autocast(batch.device, self._precision)
        place = cut_at(self._module, self._name, leave, once=True)
        with torch.no_grad(), without_autocast_cache(), lowered, place as runs:
            output = self._untouched.feed(batch, self._model)
        check_reached(runs, self._model, self._name)
        written.end()
        return output

    def _rerun(self, batch: Batch) -> Tensor:
        """Run the forward on ``batch`` up to the cut and return the cut's output."""

        def stop(hidden: Tensor, features: Tensor | None) -> Tensor:
            raise _Reached(hidden)

        try:
            with cut_at(self._module, self._name, stop, once=True) as runs:
                batch.feed(self._model)
        except _Reached as reached:
            return reached.hidden
        check_reached(runs, self._model, self._name)
        raise AssertionError("the cut was reached, and the forward went on")

    def _check_bypass(self, batch: Batch) -> None:
        """Raise ValueError if a parameter reaches the output both through the cut and around it.

        The path around the cut would have no graph, so the parameter's gradient would silently lack a part. This runs
        one forward of two samples in evaluation mode.
        """
        kept: list[Tensor] = []

        def part(hidden: Tensor, features: Tensor | None) -> Tensor:
            kept.append(hidden)
            return source(hidden)

        few = batch.take(torch.arange(min(2, batch.n), device=batch.device))
        with (
            buffers_put_back(self._model),
            evaluating(self._model, batch.device),
            torch.enable_grad(),
            cut_at(self._module, self._name, part, once=True) as runs,
        ):
            output = few.feed(self._model)
        check_reached(runs, self._model, self._name)
        above = _parameters([x for x in pytree.tree_leaves(output) if isinstance(x, Tensor)])
        both = above & _parameters(kept)
        names = [name for name, parameter in self._model.named_parameters() if id(parameter) in both]
        if names:
            raise ValueError(
                f'cut={self._name!r} with backward="recompute": {", ".join(names)} also reach the output on a path '
                'around the cut, which would get no gradient: use backward="rows", or cut elsewhere'
            )


@contextmanager
def cut_at(
    module: nn.Module, name: str, function: Callable[[Tensor, Tensor | None], Tensor], *, once: bool = False
) -> Iterator[list[int]]:
    """Replace, inside the block, the first tensor of ``module``'s output by ``function(tensor, features)``.

    What ``features`` are, :func:`cut_output` says. With ``once``, a forward that runs the module twice raises
    ValueError. Yields a list that grows with every run of the module.
    """
    runs: list[int] = []

    def replace(args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        runs.append(len(runs))
        if once and len(runs) > 1:
            raise ValueError(f'cut={name!r} runs more than once in a forward: use backward="rows"')
        return cut_output(function, name, module, (*args, *kwargs.values()), output)

    with watched(module, replace):
        yield runs


def check_reached(runs: list[int], model: nn.Module, name: str) -> None:
    """Raise RuntimeError if a forward did not run the module at the cut: the step would choose nothing."""
    if not runs:
        cause = COMPILED if is_compiled(model) else ""
        raise RuntimeError(f"the forward did not reach the cut at {name!r}{cause}")


def _parameters(tensors: list[Tensor]) -> set[int]:
    """Return the ids of the leaves that ``tensors`` depend on."""
    leaves = (getattr(node, "variable", None) for node in nodes_of(tensors))
    return {id(leaf) for leaf in leaves if leaf is not None}
