"""``cuda_graph``: a whole selective step, captured once as a CUDA graph and replayed.

In a small model the host takes longer to launch a step's kernels than the device takes to run them. A graph replays
scoring, choice, backward and the optimizer's step with one launch. It reads and writes fixed addresses, so inputs are
copied into its buffers. Python decides once, at the capture; a step that could decide differently later is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from selbp._torch import without_autocast_cache
from selbp.common.proxies import HeadProxies
from selbp.training.graph_checks import check_graph
from selbp.training.report import StepReport
from selbp.training.step import SelectiveBackprop

EAGER = 3  # steps that run as they are before the capture: they decide, allocate, and compile

Work = Callable[[], None]


class Recorder:
    """Captures work as a CUDA graph, on the stream of ``device`` on which the steps before it ran.

    Autograd's nodes that add up gradients keep the stream on which they were made. A node of another stream would end
    the capture.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device  # which need not be the current one
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def beside(self) -> Iterator[None]:
        """On the stream of the capture, after and before what the device's current one runs."""
        self._stream = self._stream or torch.cuda.Stream(self._device)
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def capture(self, work: Work, generator: torch.Generator | None) -> Work:
        """Record ``work``, which is not run; returns what runs it."""
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            graph.register_generator_state(generator)
        torch.clear_autocast_cache()

        def replay() -> None:
            with torch.cuda.device(self._device):
                graph.replay()

        # A data loader's thread may pin memory meanwhile, which a capture that watches all threads would not survive.
        with torch.cuda.device(self._device):
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                work()
        return replay


class GraphedStep:
    """What :func:`cuda_graph` returns; call it as the step is called.

    See Also
    --------
    selbp.cuda_graph : returns one, and shows how to use it.
    """

    def __init__(
        self,
        step: SelectiveBackprop,
        batch: tuple[Any, ...],
        optimizer: torch.optim.Optimizer | None,
        recorder: Recorder,
    ) -> None:
        leaves, self._form = pytree.tree_flatten(batch)
        self._step, self._optimizer, self._recorder = step, optimizer, recorder
        self._buffers = [x.detach().clone() if isinstance(x, Tensor) else x for x in leaves]
        self._parameters = [p for p in step.model.parameters() if p.requires_grad]
        self._calls, self._fitting, self._failed = 0, 0, ""
        self._replay: Callable[[], None] | None = None
        self._conditions: list[tuple[str, Any]] = []
        self._gradients: list[Tensor | None] = []
        self._loss: Tensor | None = None
        self._captured: StepReport | None = None
        self._report: StepReport | None = None

    def __call__(self, inputs: Any, target: Any = None, **per_sample: Tensor) -> Tensor:
        """Train on one minibatch. Returns the weighted loss without a graph; ``report.loss`` is the one to log.

        Gradients are those of this minibatch alone: they replace what ``.grad`` held. A minibatch of other shapes than
        those that were given to :func:`cuda_graph` runs as an ordinary step.

        Raises
        ------
        ValueError
            If a value has changed that is fixed in the graph, such as a learning rate that is a Python number, or if
            another tensor is where the graph has read one, such as after ``optimizer.load_state_dict``.
        RuntimeError
            Where the step could not be captured; says why.
        """
        leaves, form = pytree.tree_flatten((inputs, target, per_sample))
        self._calls += 1
        self._report = None
        if self._failed:
            raise RuntimeError(self._failed)
        if not self._fits(leaves, form):
            return self._eagerly(inputs, target, per_sample)
        if self._replay is None:
            self._fitting += 1
            if self._fitting < EAGER:
                return self._eagerly(inputs, target, per_sample)
            self._load(leaves)
            if self._fitting == EAGER:
                return self._eagerly(*self._as_captured())
            self._capture()
        else:
            self._load(leaves)
            self._check_conditions()
            self._step._count()
        assert self._replay is not None and self._loss is not None
        self._replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient  # the graph writes there, whatever zero_grad() put in its place
        return self._loss.clone()

    @property
    def report(self) -> StepReport:
        """The last call's figures; ``seconds`` is empty after a replay.

        ``relative_residual`` and ``gain`` of a replay are read before the next call, or raise RuntimeError. Raises
        RuntimeError before the first call.
        """
        if self._calls and self._report is None and self._captured is not None and self._loss is not None:
            self._report = _own(self, self._captured, self._step.optimizer_step - self._step._auto_advance)
        return self._report or self._step.report

    def _fits(self, leaves: list[Any], form: Any) -> bool:
        if form != self._form:
            return False
        for buffer, leaf in zip(self._buffers, leaves, strict=True):
            if isinstance(buffer, Tensor):
                if not isinstance(leaf, Tensor) or (leaf.shape, leaf.dtype) != (buffer.shape, buffer.dtype):
                    return False
            elif leaf is not buffer and leaf != buffer:
                return False
        return True

    def _load(self, leaves: list[Any]) -> None:
        pairs = [(b, x) for b, x in zip(self._buffers, leaves, strict=True) if isinstance(b, Tensor)]
        with torch.no_grad():
            for buffer, leaf in pairs:
                buffer.copy_(leaf, non_blocking=True)

    def _as_captured(self) -> Any:
        """Copies of the buffers, with their strides and alignment, for which kernels must be compiled by the capture.

        They are copies since a report reads a step's tensors later, when the buffers hold another minibatch.
        """
        copies = [x.clone() if isinstance(x, Tensor) else x for x in self._buffers]
        return pytree.tree_unflatten(copies, self._form)

    def _eagerly(self, inputs: Any, target: Any, per_sample: Mapping[str, Any]) -> Tensor:
        self._set_to_none()
        with self._recorder.beside():
            loss = self._step(inputs, target, **per_sample)
            loss.backward()
            if self._optimizer is not None:
                self._optimizer.step()
        self._report = self._step.report
        return loss.detach()

    def _set_to_none(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _capture(self) -> None:
        inputs, target, per_sample = pytree.tree_unflatten(self._buffers, self._form)

        def work() -> None:
            loss = self._step(inputs, target, **per_sample)
            loss.backward()
            if self._optimizer is not None:
                self._optimizer.step()
            self._loss = loss.detach()

        self._set_to_none()  # so that the graph writes gradients, and does not add to them
        try:
            with without_autocast_cache():
                self._replay = self._recorder.capture(work, self._step.generator)
        except Exception as error:
            self._failed = (
                f"the step cannot be captured in a CUDA graph: {error}. What waits for the GPU, or depends on its "
                "values, must be left out of model, loss and rule."
            )
            raise RuntimeError(self._failed) from error
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._captured, self._conditions = self._step.report, self._present()
        self._step._report = None  # its figures would be those of one replay for ever: see :attr:`report`

    def _present(self) -> list[tuple[str, Any]]:
        """What Python read while the graph was captured."""
        step, device = self._step, next(x.device.type for x in self._buffers if isinstance(x, Tensor))
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        found: list[tuple[str, Any]] = [("keep", step.keep), ("selector", step.selector), ("autocast", autocast)]
        found.append(("the modules' training modes", [module.training for module in step.model.modules()]))
        found.append(("requires_grad of parameters", [p.requires_grad for p in step.model.parameters()]))
        tensors = [*step.model.parameters(), *step.model.buffers()]
        found.append(("the memory of the model's parameters and buffers", [_Place.of(x) for x in tensors]))
        if self._optimizer is not None:
            state = pytree.tree_leaves(list(self._optimizer.state.values()))
            places = [_Place.of(x) for x in state if isinstance(x, Tensor)]
            found.append(("the memory of the optimizer's state", places))
            for i, group in enumerate(self._optimizer.param_groups):
                for name, value in group.items():
                    found.append((f"{name} of the optimizer's group {i}", pytree.tree_map(_fixed, value)))
        return found

    def _check_conditions(self) -> None:
        present = dict(self._present())
        for name, before in self._conditions:
            now = present.get(name)
            if before is not now and before != now:
                raise ValueError(
                    f"{name} must be as when the graph was captured, {_short(before)}, got {_short(now)}: call "
                    "selbp.cuda_graph again. Keep a learning rate that changes in a tensor on the GPU, and write to it"
                )


def _fixed(value: Any) -> Any:
    """What a graph holds fast of a value: a number, or where a tensor lies; of one on the CPU, its number."""
    if isinstance(value, Tensor):
        return value.item() if value.device.type == "cpu" and value.dim() == 0 else _Place.of(value)
    return value if isinstance(value, (bool, int, float, str)) else None


class _Place(int):
    """The address of a tensor's memory."""

    @classmethod
    def of(cls, x: Tensor) -> _Place:
        return cls(x.data_ptr() if x.layout == torch.strided else id(x))  # a sparse tensor has several

    def __repr__(self) -> str:
        return f"a tensor at {int(self):#x}"


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) < 60 else "others"


def _own(graphed: GraphedStep, report: StepReport, step: int) -> StepReport:
    """A report with tensors of its own: the next replay writes into the graph's."""
    tensors = pytree.tree_map(
        lambda x: x.clone() if isinstance(x, Tensor) else x,
        (report.selection, report._stats, report._chosen, report._hits),
    )
    selection, stats, chosen, hits = tensors
    own = replace(report, selection=selection, _stats=stats, _chosen=chosen, _hits=hits, step=step)
    if report._proxies is not None:
        own._proxies = _UntilTheNextCall(graphed, report._proxies)  # type: ignore[assignment]
    return own


class _UntilTheNextCall:
    """Gradient proxies whose factors lie in the graph's memory."""

    def __init__(self, graphed: GraphedStep, proxies: HeadProxies) -> None:
        self._graphed, self._call = graphed, graphed._calls
        self._proxies = object.__new__(type(proxies))  # a copy: what it computes and keeps is of this replay alone
        self._proxies.__dict__.update(proxies.__dict__)

    def __getattr__(self, name: str) -> Any:
        if self._graphed._calls != self._call:
            raise RuntimeError("the report's gradient figures must be read before the next call of a captured step")
        return getattr(self._proxies, name)


def cuda_graph(
    step: SelectiveBackprop,
    inputs: Any,
    target: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    **per_sample: Tensor,
) -> GraphedStep:
    """Capture a step, its backward and the optimizer's step as one CUDA graph; speed is unmeasured.

    Nothing is trained here: ``inputs`` and ``target`` give shapes. The first 3 calls run as they are and the fourth is
    captured; later ones are replayed. Each trains on its minibatch, once.

    Parameters
    ----------
    step : SelectiveBackprop
        The step. Its schedule must choose on every step from now on.
    inputs : Tensor, tuple or mapping
        As for a call of the step; every tensor on one CUDA device.
    target : Tensor, mapping or None
        As for a call of the step.
    optimizer : torch.optim.Optimizer or None
        Stepped in the graph; its ``capturable`` must be True where it has that option. None: the caller's.
    **per_sample
        As for a call of the step.

    Returns
    -------
    GraphedStep
        Called with a minibatch, it runs forward, choice, backward and, with an ``optimizer``, that one's step.

    Raises
    ------
    TypeError
        For a step or an optimizer of another type.
    ValueError
        For what a graph cannot hold, with the reason: tensors that are not on a GPU, lists of samples, a rule that
        remembers (but see ``replays`` of :class:`selbp.BaseSelector`), a cut, ``scoring="eval"``, a schedule that does
        not always choose, a table of scores, several processes.

    See Also
    --------
    selbp.SelectiveBackprop : the step that is captured.

    Examples
    --------
    >>> graphed = selbp.cuda_graph(step, inputs, target, optimizer=optimizer)  # doctest: +SKIP
    >>> for inputs, target in loader:  # doctest: +SKIP
    ...     graphed(inputs, target)
    """
    batch = (inputs, target, per_sample)
    check_graph(step, batch, optimizer)
    device = next(x.device for x in pytree.tree_leaves(batch) if isinstance(x, Tensor))
    return GraphedStep(step, batch, optimizer, Recorder(device))
