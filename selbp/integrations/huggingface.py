"""Selective steps in Hugging Face's ``Trainer`` and those built on it, such as TRL's ``SFTTrainer``.

::

    class SelectiveTrainer(SelectiveTrainerMixin, Trainer): ...

    trainer = SelectiveTrainer(model, args, train_dataset=data, selective=dict(selector=selbp.TopLoss(), keep=0.25))
    trainer.train()

or, for a trainer that is built already, ``selective(trainer, selector=selbp.TopLoss(), keep=0.25)``.
``selective=dict(sampling=dict(classes=C))`` is :func:`selbp.auto_select`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from selbp._checks import shown
from selbp.common.packed import unpacked
from selbp.integrations.sampled import Sampled
from selbp.integrations.scale import accumulated, is_scaled, over_processes
from selbp.integrations.seen import Observed, Replay, rows_in
from selbp.integrations.tasks import base_of, checked, per_sample, task_options
from selbp.integrations.window import Window
from selbp.training.linear_loss import NAME as LINEAR
from selbp.training.losses import CAUSAL
from selbp.training.step import SelectiveBackprop

SAMPLING = "sampling"  # the option, and the entry of its state in a process's file
FILE = "selbp_state_{}.pt"  # one a process, in the checkpoint's folder
TOKEN_LOSSES = ("cross_entropy", *CAUSAL)


class SelectiveTrainerMixin:
    """Trains on chosen rows of each minibatch: put it before a ``transformers.Trainer`` among the bases of a class.

    Parameters
    ----------
    *args, **kwargs
        The trainer's own.
    selective : dict, optional
        Options of :class:`selbp.SelectiveBackprop`, at least ``selector`` and ``keep``. ``loss`` is that of the model's
        task where it is left out, which is compared once with the model's own. With ``sampling``, a dict of options of
        :func:`selbp.auto_select` and :class:`selbp.AutoSelect`, batches of ``per_device_train_batch_size`` rows are
        drawn by a table of scores, and ``selector`` and ``keep`` may be left out. Without ``selective`` the trainer is
        what it was.

    Notes
    -----
    The step is built on the wrapped model at the first training step. It divides by ``num_items_in_batch`` where the
    trainer would, takes ``label_smoothing_factor`` and the model's auxiliary loss, counts optimizer steps for a
    ``schedule``, and its state is saved with every checkpoint, one file a process, and restored with it. A
    ``compute_loss_func`` must return one loss a sample. Evaluation is the trainer's own. Logged are the unweighted mean
    loss of the minibatches, as ``loss``, and the figures of :class:`~selbp.integrations.window.Window`.

    With ``sampling`` an epoch is one of the sampler's, N / pool batches: ``max_steps`` says best how long to train. A
    resumed training goes on from the sampler's own state, in the middle of an epoch too, so that
    ``ignore_data_skip`` is set while it trains. Each process draws from its own share of the data set.

    Examples
    --------
    >>> class SelectiveTrainer(SelectiveTrainerMixin, Trainer): ...
    >>> options = dict(selector=selbp.GradientMatching(), keep=0.25, loss="causal_lm")
    >>> SelectiveTrainer(model, args, train_dataset=data, selective=options).train()  # doctest: +SKIP
    """

    _selective: _Selective | None = None

    def __init__(self, *args: Any, selective: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if selective is not None:
            self._selective = _Selective(self, selective)

    @property
    def selective_step(self) -> SelectiveBackprop:
        """The step in use. Raises RuntimeError before the first training step."""
        if self._selective is None or self._selective.step is None:
            raise RuntimeError("there is no selective step before the first training step")
        return self._selective.step

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; its arguments are afterwards as they were."""
        parent: Any = super()
        arguments: Any = self.args  # type: ignore[attr-defined]
        skip = arguments.ignore_data_skip
        if self._selective is not None and self._selective.sampled is not None:
            # A batch that is drawn and skipped would have other samples. The trainer must know before it counts those
            # to skip: it restores the random state before the first batch only where there are none.
            arguments.ignore_data_skip = True
        try:
            return parent.train(*args, **kwargs)
        finally:
            arguments.ignore_data_skip = skip

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loss whose backward runs the chosen rows; outside of training, the trainer's own."""
        parent: Any = super()
        if self._selective is None or not model.training:
            return parent.compute_loss(model, inputs, return_outputs, num_items_in_batch=num_items_in_batch, **kwargs)
        if "labels" in inputs:  # the rows of a packed batch, also for what is read off them below
            rows, labels = unpacked({k: v for k, v in inputs.items() if k != "labels"}, inputs["labels"])
            inputs = {**rows, "labels": labels}
        loss, output = self._selective.loss(model, inputs, num_items_in_batch, return_outputs)
        if self._selective.metrics:  # TRL's own, read off the same forward
            with torch.no_grad():
                seen = self._selective.inputs_of(inputs, output)
                replay = Replay(model, output, seen["labels"])
                shown = seen if self._selective.by_logits else dict(inputs)
                parent.compute_loss(replay, shown, num_items_in_batch=num_items_in_batch, **kwargs)
        return (loss, output) if return_outputs else loss

    def get_train_dataloader(self) -> Any:
        """As the trainer's; with ``sampling``, of batches that are drawn by the table."""
        if self._selective is None or self._selective.sampled is None:
            parent: Any = super()
            return parent.get_train_dataloader()
        return self._selective.loader()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """As the trainer's; returns the unweighted mean loss, which is what it logs."""
        parent: Any = super()
        result = parent.training_step(*args, **kwargs)
        if self._selective is None:
            return result
        mean = self._selective.take_mean()
        if mean is None:
            raise RuntimeError(
                f"nothing was selected: {type(self).__name__}.training_step does not train on what compute_loss gives. "
                "Leave the trainer as it is and place a cut by selbp.insert_cut"
            )
        return mean.to(result)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the trainer's, with the figures of the steps since the last line."""
        parent: Any = super()
        if self._selective is not None and "loss" in logs:
            logs.update(self._selective.window.figures(every=False))
        parent.log(logs, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        parent: Any = super()
        parent._save_rng_state(output_dir)
        if self._selective is not None:
            self._selective.save(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        parent: Any = super()
        parent._load_optimizer_and_scheduler(checkpoint)
        if self._selective is not None:
            self._selective.begin(checkpoint)


def selective(trainer: Any, **options: Any) -> Any:
    """Make ``trainer``, which is built already, select; returns it.

    Parameters
    ----------
    trainer : transformers.Trainer
        Or one of a class built on it. Its class becomes one with :class:`SelectiveTrainerMixin` in front.
    **options
        Of :class:`selbp.SelectiveBackprop`, at least ``selector`` and ``keep``, or ``sampling``.

    Returns
    -------
    transformers.Trainer
        The same object.

    Raises
    ------
    TypeError, ValueError
        For options that do not fit, or a trainer with a loss of its own.

    Examples
    --------
    >>> selective(SFTTrainer(model, args, train_dataset=data), selector=selbp.TopLoss(), keep=0.25).train()
    ... # doctest: +SKIP
    """
    kind = type(trainer)
    if not hasattr(trainer, "compute_loss") or not hasattr(trainer, "training_step"):
        raise TypeError(f"trainer must be a transformers.Trainer, got {shown(trainer)}")
    if not isinstance(trainer, SelectiveTrainerMixin):
        trainer.__class__ = type(f"Selective{kind.__name__}", (SelectiveTrainerMixin, kind), {})
    try:
        trainer._selective = _Selective(trainer, options)
    except BaseException:
        trainer.__class__ = kind
        raise
    return trainer


class _Selective:
    """What a selective trainer holds: its options, its step, and what it logs."""

    def __init__(self, trainer: Any, options: Mapping[str, Any]) -> None:
        known = isinstance(options, Mapping)
        if not known or not (SAMPLING in options or {"selector", "keep"} <= set(options)):
            raise TypeError(
                f"selective must be a dict with at least 'selector' and 'keep', or 'sampling', got {shown(options)}"
            )
        self.trainer, self.options = trainer, {name: options[name] for name in options if name != SAMPLING}
        self.sampled: Sampled | None = None
        if SAMPLING in options:
            planned = trainer.args.max_steps
            rows = trainer.args.per_device_train_batch_size
            self.sampled = Sampled(options[SAMPLING], rows, planned if planned > 0 else None)
        self.step: SelectiveBackprop | None = None
        self._run: Callable[..., Tensor]  # the step, or its controller
        self.window = Window()
        # A head without logits has none for the trainer's metrics.
        self.metrics = self._own_metrics() and self.options.get("loss") != LINEAR
        # TRL before 1 reads its metrics off the logits and the inputs beside them, all of the rows that ran
        self.by_logits = not hasattr(sys.modules.get("trl.trainer.utils"), "add_fused_lm_head")
        self._state: dict[str, Any] | None = None  # of a checkpoint, for the step that is to be built
        self._mean: Tensor | None = None
        if self.options.get("micro_batch") is not None:
            raise ValueError("micro_batch= runs backwards of its own, and a trainer runs one: leave it out")
        if trainer.args.n_gpu > 1:
            raise ValueError("a selective trainer needs one process a GPU: start it with torchrun, not DataParallel")

    def _own_metrics(self) -> bool:
        """Whether the trainer reads metrics in its ``compute_loss``. Raises ValueError where it has another loss."""
        mro = type(self.trainer).__mro__
        after = mro[mro.index(SelectiveTrainerMixin) + 1 :]
        owner = next(kind for kind in after if "compute_loss" in vars(kind))
        if owner.__module__.startswith("transformers."):
            return False
        plain = getattr(self.trainer.args, "loss_type", "nll") in ("nll", "chunked_nll")
        if owner.__name__ == "SFTTrainer" and (plain or callable(self.options.get("loss"))):
            return True
        if "loss" in self.options and owner.__name__ != "SFTTrainer":
            return False
        raise ValueError(
            f"{owner.__name__} has a loss of its own, which a step on chosen rows would replace: pass loss=, a "
            "function (output, target) -> (n,), or leave the trainer as it is and place a cut by selbp.insert_cut"
        )

    # ------------------------------------------------------------------------------------------------- the step

    def loss(self, model: Any, inputs: Any, count: Any, outputs: bool) -> tuple[Tensor, Any]:
        """The scalar for ``backward()``, and the model's output on all rows, or on those that ran, if it is wanted."""
        trainer = self.trainer
        if self.metrics:
            inputs["use_cache"] = False
            if getattr(trainer, "aux_loss_enabled", False):
                inputs["output_router_logits"] = True
        step = self._step_on(model, inputs)
        while step.optimizer_step < trainer.state.global_step:
            step.advance()
        scaled, factor = is_scaled(trainer, count), 1.0
        by_count = scaled and count is not None and self._counts_targets
        if by_count:
            count, factor = over_processes(trainer, step, count)
        elif scaled:
            factor = 1.0 / accumulated(trainer)
        with Observed(model, self.metrics or outputs) as seen:
            loss = self._run(inputs, normalizer=count if by_count else None) * factor
        report = step.report
        self.window.add(report)
        mean = report.mean_loss().detach()
        share = factor if report.share is None else report.share * factor
        self._mean = mean * (share if scaled else 1.0 / accumulated(trainer))
        return loss, seen.output(report.n)

    def inputs_of(self, inputs: Any, output: Any) -> dict[str, Any]:
        """The inputs of the rows that the model's ``output`` has."""
        n = len(inputs["labels"])
        if self.step is None or rows_in(output) == n:
            return dict(inputs)
        indices = self.step.report.selection.indices

        def some(x: Any) -> Any:
            rows = isinstance(x, Tensor) and x.dim() and len(x) == n
            return x.index_select(0, indices.to(x.device)) if rows else x

        return {name: some(value) for name, value in inputs.items()}

    def take_mean(self) -> Tensor | None:
        """() the mean loss of the last minibatch as the trainer's loss is scaled, once."""
        mean, self._mean = self._mean, None
        return mean

    def _step_on(self, model: Any, inputs: Any) -> SelectiveBackprop:
        """The step, built on ``model`` when it is first asked for."""
        if self.sampled is not None and self.step is not None and self.step.table is not self.sampled.table:
            self.step = None  # another training begins, with a table of its own
        if self.step is None or self.step.model is not model:
            state = self._state if self.step is None else self.step.state_dict()
            self.step = SelectiveBackprop(model, **self._step_options(model, inputs))
            if state is not None:
                self.step.load_state_dict(state)
            self._state = None
            self._run = self.step if self.sampled is None else self.sampled.control(self.step)
        return self.step

    def loader(self) -> Any:
        """The training's loader, of batches that the sampler draws."""
        assert self.sampled is not None
        trainer, dataset, how = self.trainer, self.trainer.train_dataset, {}
        args, read, collator = trainer.args, dataset, trainer.data_collator
        if hasattr(dataset, "remove_columns"):  # a datasets.Dataset; the proxy sees all of its columns
            read = trainer._remove_unused_columns(dataset, description="training")
        else:
            collator = trainer._get_collator_with_removed_columns(collator, description="training")
        if args.dataloader_num_workers:
            how = {
                "persistent_workers": args.dataloader_persistent_workers,
                "prefetch_factor": args.dataloader_prefetch_factor,
            }
        return self.sampled.loader(
            dataset,
            read,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            **how,
        )

    def _step_options(self, model: Any, inputs: Any) -> dict[str, Any]:
        trainer, options = self.trainer, {"auto_advance": False, **self.options}
        if self.sampled is not None:
            options = {**self.sampled.step_options, **options}
        if trainer.compute_loss_func is not None:
            if "loss" in self.options:
                raise ValueError("compute_loss_func and loss= of selective are two losses: pass one")
            options["loss"] = per_sample(trainer.compute_loss_func)
        elif "loss" not in options:
            options = {**task_options(model, inputs.get("labels")), **options}
            if not trainer.args.label_smoothing_factor:  # else the trainer has no use for the model's own loss either
                options = checked(options, model, inputs)
        if base_of(model).__class__.__name__.endswith("ForConditionalGeneration") and "pass_labels" not in options:
            options["pass_labels"] = bool(getattr(base_of(model).config, "is_encoder_decoder", False))
        smoothing = trainer.args.label_smoothing_factor
        if smoothing and "label_smoothing" not in options:
            if options["loss"] not in TOKEN_LOSSES:
                raise ValueError(
                    f"label_smoothing_factor={smoothing} is for cross-entropy, not for {options['loss']!r}"
                )
            options["label_smoothing"] = smoothing
        if getattr(trainer, "aux_loss_enabled", False):
            options.setdefault("aux_weight", trainer.router_aux_loss_coef)
        loss = options.get("loss")
        counted = CAUSAL if getattr(trainer, "_loss_shifts_labels", False) else TOKEN_LOSSES
        self._counts_targets = isinstance(loss, str) and loss in counted and options.get("class_weight") is None
        return options

    # ------------------------------------------------------------------------------------------------ its state

    def save(self, folder: str) -> None:
        """Write this process's state into a checkpoint's folder."""
        state = self._state if self.step is None else self.step.state_dict()
        if state is not None:
            if self.sampled is not None:
                state = {**state, SAMPLING: self.sampled.state_dict()}
            os.makedirs(folder, exist_ok=True)
            torch.save(dict(state), self._file(folder))

    def begin(self, checkpoint: str | None) -> None:
        """A training begins, from ``checkpoint`` or anew: the next step is built for it."""
        self.step, self._state, self.window = None, None, Window()
        if checkpoint is None:
            return
        file = self._file(checkpoint)
        if not os.path.isfile(file):
            self._empty(checkpoint, f"no {os.path.basename(file)}: the rule's memory starts empty")
            return
        self._state = torch.load(file, map_location="cpu", weights_only=True)
        drawn = self._state.pop(SAMPLING, None)
        if self.sampled is not None and drawn is None:
            self._empty(checkpoint, "no table of scores: the training starts with a new one")
        elif self.sampled is not None:
            self.sampled.load_state_dict(drawn)

    def _empty(self, checkpoint: str, what: str) -> None:
        warnings.warn(f"{checkpoint} holds {what}", UserWarning, 3)

    def _file(self, folder: str) -> str:
        return os.path.join(folder, FILE.format(self.trainer.args.process_index))
