"""``SelectiveBackprop``: one training step on a chosen part of the minibatch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selbp.common.distributed import unwrap
from selbp.common.guards import without_autocast
from selbp.rows.layout import BatchNormPolicy
from selbp.sampling.table import ScoreTable
from selbp.selectors import Selector
from selbp.training.counted import CountedStep
from selbp.training.losses import warn_of_unshifted_labels
from selbp.training.options import StepOptions
from selbp.training.per_call import PerCall
from selbp.training.pooled import Backward, Scale, backward_of
from selbp.training.schedule import Schedule
from selbp.types import Selection


class SelectiveBackprop(CountedStep):
    """Forward on all n samples, choose k of them with weights, and return a loss whose backward runs those k rows.

    A rule whose steps take longer than full ones warns once, after some steps. On rows, three full steps run for that;
    gradients, buffers and random state stay as they are.

    The returned scalar is sum_j w_j l_j over the chosen rows, with l_i scaled so that (1/n) sum l_i is torch's
    ``reduction="mean"``: it is for ``backward()`` only (log ``step.report.loss``), and the sum of the weights scales
    the effective learning rate (``step.report.weight_sum``).

    Parameters
    ----------
    model : torch.nn.Module
        Called as ``model(x)``, ``model(*tuple)`` or ``model(**dict)``. Never edited.
    selector : Selector
        The rule. One that needs nothing chooses before the forward, which then runs k rows only.
    keep : float or int
        A share in (0, 1] (float, k = max(1, round(keep n))) or a number of samples (int of at least 1): ``keep=1`` is
        one sample, ``keep=1.0`` all of them.
    head : torch.nn.Module, str or None
        The last linear layer or 1x1 convolution, or its name. Found by itself when no layer with parameters follows it;
        with LoRA on it, it is the adapted layer as a whole.
    loss : str or callable
        ``"cross_entropy"`` (also of (n, T, C) or (n, C, T, ...), and against class probabilities of the logits' shape),
        ``"mse"``, ``"bce"`` (of logits), ``"causal_lm"`` (targets are shifted by one), ``"linear_causal_lm"`` (the same
        loss, of a model whose logits are its head's output as it is: the head does not run, its logits are never
        stored, and ``output.logits`` is the head's input) or a callable (output, target) -> (n,).
    backward : {"auto", "rows", "recompute"}
        ``"rows"`` differentiates the chosen rows of the forward that scored. ``"recompute"`` runs a second forward on
        them. It refuses a loss in which samples interact, such as a contrastive one, because the chosen rows alone
        have another loss; the first step checks this. ``"auto"`` takes rows where samples interact. Else it models both
        on the first minibatch and takes the cheaper, see :func:`diagnose`; on a GPU, where rows are unmeasured, it
        recomputes. A second forward changes a module's Python attributes once more, such as the hidden state that a
        recurrent network keeps: ``"rows"`` is exact there.
    scoring : {"same", "eval"}
        ``"same"`` scores with the forward as it trains: dropout is active, and batch norm updates its running
        statistics there and not in the forward of the chosen rows, which draws its own dropout masks. Other buffers
        that a forward writes stay as this one leaves them; that of the chosen rows starts from what they were before.
        ``"eval"`` scores in evaluation mode and leaves no trace: batch norm then follows the chosen rows.
    scoring_precision : {"same", "bfloat16", "float16"}
        ``"bfloat16"`` or ``"float16"`` scores under autocast to that type; the forward of the chosen rows keeps the
        caller's precision, so it goes with ``backward="recompute"``.
    head_gradient : {"subset", "full"}
        ``"full"`` gives the head its exact full-batch gradient and uses the chosen rows for the layers below only. The
        head's weight must be its own parameter: not normalised, parametrized or pruned.
    schedule : Schedule or None
        On which optimizer steps to choose; the others are full, or train on rows drawn at random.
    generator : torch.Generator or None
        Where draws come from, on the model's device; torch's global one for None.
    class_weight, ignore_index, label_smoothing : Tensor (C,) or None, int, float
        As in ``torch.nn.functional.cross_entropy``.
    skip_mass : float
        With ``loss="linear_causal_lm"``, what part of each token's probabilities the head's gradients may spread evenly
        over the classes: see :func:`selbp.ops.linear_cross_entropy`.
    target : {"local", "global"}
        ``"local"`` matches the rank's own mean gradient, ``"global"`` that of all ranks, which need not have met before
        the first step; one process is all ranks. Either way each rank chooses k rows of its own minibatch; ``scope``
        changes that.
    auto_advance : bool
        Every call counts as one optimizer step, until :meth:`advance` is called for the first time. Under gradient
        accumulation with a schedule pass False and call :meth:`advance` after each optimizer step.
    cut : torch.nn.Module, str or None
        A module, or its name: choose in the backward, at that module's output, by the gradients there. All rows run
        forward; layers above the cut get their full-batch gradients. See :class:`selbp.BackwardCut`. With
        ``backward="recompute"`` the layers below keep no graph of that forward, and run again, in the backward, on the
        chosen rows.
    batchnorm : {"exact", "subset"}
        What a backward through rows does at BatchNorm in training mode, which couples the samples: ``"exact"`` runs it,
        and all below, on n rows; ``"subset"`` runs it on k rows with the statistics of the n, an approximation, see
        :func:`selbp.select`. A second forward has k rows' statistics either way.
    shared : iterable of str or int
        Names of entries of a dict batch, or positions in a tuple, that have no samples: the model is given them whole,
        whatever rows it runs on.
    batch_dims : dict or None
        ``{name or position: dim}``: where the samples of an entry are, if not in dim 0; 0 for a batch that is one
        tensor.
    target_keys : iterable of str or None
        The entries of a dict batch that are the target, ``"labels"`` by default. Several are given to a callable loss
        as a dict.
    pass_labels : bool
        The model is called with those entries too, as one that derives decoder inputs from them needs.
    aux_weight : float or None
        What the model's ``output.aux_loss``, such as the load balancing of a mixture of experts, counts beside a
        built-in loss. None for the model's ``router_aux_loss_coef`` where it has one, else 1; 0 leaves it out. With
        ``"recompute"`` it is the auxiliary loss of the chosen rows, with ``"rows"`` that of all rows.
    proxy : {"exact", "sketch"}
        ``"sketch"`` compares the head gradients of sequences by random projections with unbiased inner products, see
        :func:`selbp.ops.sketch`, in place of the ``"exact"`` ones, which may cost more than the choice saves. Norms,
        and the report's figures of gradients, are then those of the projections. Samples with one position each are
        compared exactly.
    class_dim : {1, -1} or None
        Where the classes of ``"cross_entropy"`` are in the logits: 1 as in torch, (n, C, ...), or -1, (n, ..., C). By
        default the target's shape (n, ...) tells, and where both fit an earlier minibatch's.
    table : ScoreTable or None
        A :class:`selbp.sampling.ScoreTable`, to which each step writes what it saw of its samples. Their numbers come
        from the table's sampler, in its order, or from ``ids=`` at the call. Save the table's own ``state_dict`` too.
    micro_batch : int or None
        How many samples are in memory at a time: a minibatch of any size is scored without a graph, and the rows chosen
        among all of it run forward and backward, so many at a time, in :meth:`backward`. The gradients are those of one
        forward and backward, but for batch norm, which sees a micro-batch. A rule that matches gradients keeps the
        head's factors of all samples, n T (C + d) numbers, and n^2 products.
    scope : {"local", "global"}
        ``"global"`` chooses among the samples of all ranks, as one process that holds them all. Rows whose rank has
        more of the chosen ones than its share are sent to others, so that each trains as many. For lists, and tensors
        with rows of one shape on all ranks; token sequences with an attention mask, or for ``"causal_lm"``, are padded
        to the longest rank's. It waits for the device once a step. A rule that draws needs a generator of one seed on
        all ranks; without one, they draw from rank 0's seed. The report is of all ranks' samples.

    Raises
    ------
    TypeError, ValueError
        At construction, for anything that could not work later.

    See Also
    --------
    selbp.recommended : a rule and its options, by what they cost.
    selbp.diagnose : what a backward through rows, and a rule, cost on a model.
    selbp.insert_cut : choose in the backward, inside the model.

    Examples
    --------
    >>> import torch, selbp
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> step = selbp.SelectiveBackprop(model, selector=selbp.GradientMatching(), keep=0.25)
    >>> for inputs, target in [(torch.randn(16, 4), torch.randint(0, 3, (16,)))]:
    ...     step(inputs, target).backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> step.report.k
    4
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        selector: Selector,
        keep: float | int,
        head: nn.Module | str | None = None,
        loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
        backward: Literal["auto", "rows", "recompute"] = "auto",
        scoring: Literal["same", "eval"] = "same",
        scoring_precision: Literal["same", "bfloat16", "float16"] = "same",
        head_gradient: Literal["subset", "full"] = "subset",
        schedule: Schedule | None = None,
        generator: torch.Generator | None = None,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        target: Literal["local", "global"] = "local",
        auto_advance: bool = True,
        cut: nn.Module | str | None = None,
        batchnorm: BatchNormPolicy = "exact",
        class_dim: Literal[1, -1] | None = None,
        table: ScoreTable | None = None,
        shared: Iterable[str | int] = (),
        batch_dims: Mapping[str | int, int] | None = None,
        target_keys: Iterable[str] | None = None,
        pass_labels: bool = False,
        aux_weight: float | None = None,
        proxy: Literal["exact", "sketch"] = "exact",
        micro_batch: int | None = None,
        scope: Literal["local", "global"] = "local",
        skip_mass: float = 0.0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        options = StepOptions(
            selector=selector,
            keep=keep,
            head=head,
            loss=loss,
            backward=backward,
            scoring=scoring,
            scoring_precision=scoring_precision,
            head_gradient=head_gradient,
            schedule=schedule,
            generator=generator,
            class_weight=class_weight,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            target=target,
            auto_advance=auto_advance,
            cut=cut,
            batchnorm=batchnorm,
            class_dim=class_dim,
            table=table,
            shared=shared,
            batch_dims=batch_dims,
            target_keys=target_keys,
            pass_labels=pass_labels,
            aux_weight=aux_weight,
            proxy=proxy,
            micro_batch=micro_batch,
            scope=scope,
            skip_mass=skip_mass,
        ).validate()
        warn_of_unshifted_labels(unwrap(model), loss)
        super().__init__(model, options)

    def __call__(
        self,
        inputs: Any,
        target: Any = None,
        *,
        normalizer: float | Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        selection: Selection | None = None,
        **per_sample: Tensor,
    ) -> Tensor:
        """One minibatch: returns the scalar to call ``backward()`` on.

        Parameters
        ----------
        inputs : Tensor, tuple or mapping
            A tensor, a tuple or a dict whose tensors have n rows. Beside tensors, or in them, a list, tuple or array of
            n entries that are not tensors of n rows (strings, ragged tensors, dicts of boxes) is one entry a sample,
            and the chosen ones are taken; what has another length is a constant.
        target : Tensor, mapping or None
            Of n rows; for a dict, its ``"labels"`` where None.
        normalizer : float, Tensor or None
            What the sum of the losses is divided by, in place of this minibatch's own targets: those that count in all
            minibatches of one optimizer step (tokens for ``"causal_lm"``; the sum of their class weights where there
            are any; samples for a loss other than cross-entropy). The gradients then add up to that of the whole,
            however the targets are spread; do not divide by the number of minibatches.
        num_items_in_batch : float, Tensor or None
            The same, by the name that Hugging Face's trainer has for it.
        selection : Selection or None
            Rows and weights to train on, such as ``step.report.selection``, in place of a choice: nothing is scored,
            and only those rows run forward; with ``head_gradient="full"`` all rows are scored, for the head. The call
            belongs to the optimizer step of the one before, as the second pass of SAM does: it is not counted.
        **per_sample
            Tensors (n,) that the selector knows by name. With ``table``, ``ids`` are the samples' numbers, int64.

        Returns
        -------
        Tensor
            () for ``backward()``; its value depends on the weights.

        Raises
        ------
        TypeError, ValueError
            For a batch that does not fit, before anything has run. Whatever is raised, by the model too: selector,
            generator and buffers are as before the call, but for a buffer that no earlier step has changed.
        """
        if self._pooled is not None and self._pooled.size is not None:
            raise RuntimeError(
                "a step with micro_batch= runs a backward after each micro-batch: call step.backward(inputs, target) "
                "in place of step(inputs, target).backward()"
            )
        return self._counted(inputs, target, PerCall.of(normalizer, num_items_in_batch, selection), per_sample, None)

    def backward(
        self,
        inputs: Any,
        target: Any = None,
        *,
        scale: Scale = 1.0,
        normalizer: float | Tensor | None = None,
        num_items_in_batch: float | Tensor | None = None,
        selection: Selection | None = None,
        **per_sample: Tensor,
    ) -> Tensor:
        """One minibatch, backward and all: its gradients are added to the parameters'. Returns the mean loss, detached.

        With ``micro_batch``, at most so many samples are in memory at a time. Where an error comes up between two
        micro-batches, the gradients hold those of the first ones.

        Parameters
        ----------
        inputs, target, normalizer, num_items_in_batch, selection, **per_sample
            As in a call of the step.
        scale : float, Tensor or callable
            What each loss is multiplied by before its backward: a number such as 1 / accumulated minibatches, a tensor
            (), or a function of the loss such as ``torch.amp.GradScaler``'s ``scaler.scale``.

        Returns
        -------
        Tensor
            () :attr:`StepReport.loss` on the device.

        Raises
        ------
        TypeError, ValueError
            As a call of the step.

        Examples
        --------
        >>> import torch, selbp
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> step = selbp.SelectiveBackprop(model, selector=selbp.TopLoss(), keep=0.25, micro_batch=8)
        >>> loss = step.backward(torch.randn(64, 4), torch.randint(0, 3, (64,)))
        >>> step.report.n, step.report.k, loss.requires_grad, model[0].weight.grad is None
        (64, 16, False, False)
        """
        call, run = PerCall.of(normalizer, num_items_in_batch, selection), backward_of(scale)
        return self._with_backward(inputs, target, call, per_sample, run)

    def _with_backward(
        self, inputs: Any, target: Any, call: PerCall, per_sample: dict[str, Tensor], run: Backward
    ) -> Tensor:
        """() the mean loss of one minibatch, whose backward ``run`` has run."""
        loss = self._counted(inputs, target, call, per_sample, run)
        if self._pooled is None:
            with without_autocast(loss.device):
                run(loss)
        return self.report.mean_loss()
