"""What a step is told at its construction, and every check of it that needs no part of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selbp._checks import check_choice, check_flag, check_generator, check_int, shown
from selbp.common.guards import PRECISIONS
from selbp.common.keep import check_keep
from selbp.common.lengths import Lengths
from selbp.common.places import Places
from selbp.rows.layout import BatchNormPolicy
from selbp.sampling.table import ScoreTable
from selbp.selectors import CubeSampling, Full, Selector
from selbp.selectors.base import NEEDS
from selbp.training.linear_loss import NAME as LINEAR
from selbp.training.losses import CAUSAL, Criterion, criterion_of
from selbp.training.schedule import Schedule
from selbp.training.scores import check_table
from selbp.training.strategies import WAYS, Strategy

OF_BATCH = ("shared", "batch_dims", "target_keys", "pass_labels")  # options that say where the samples are
OF_CRITERION = ("class_weight", "ignore_index", "label_smoothing", "class_dim", "skip_mass")  # that a named loss has
UNSEEDED = 0x5E1B9  # of a generator that no rank has given, until the ranks have met
CHOICES = {
    "scoring": ("same", "eval"),
    "head_gradient": ("subset", "full"),
    "target": ("local", "global"),
    "scoring_precision": PRECISIONS,
    "batchnorm": ("exact", "subset"),
    "proxy": ("exact", "sketch"),
    "scope": ("local", "global"),
}


@dataclass(frozen=True, eq=False, kw_only=True)
class StepOptions:
    """The keyword arguments of :class:`selbp.SelectiveBackprop`, whose docstring says what each means."""

    selector: Selector
    keep: float | int
    head: nn.Module | str | None = None
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy"
    backward: Literal["auto", "rows", "recompute"] = "auto"
    scoring: Literal["same", "eval"] = "same"
    scoring_precision: Literal["same", "bfloat16", "float16"] = "same"
    head_gradient: Literal["subset", "full"] = "subset"
    schedule: Schedule | None = None
    generator: torch.Generator | None = None
    class_weight: Tensor | None = None
    ignore_index: int = -100
    label_smoothing: float = 0.0
    target: Literal["local", "global"] = "local"
    auto_advance: bool = True
    cut: nn.Module | str | None = None
    batchnorm: BatchNormPolicy = "exact"
    class_dim: Literal[1, -1] | None = None
    table: ScoreTable | None = None
    shared: Iterable[str | int] = ()
    batch_dims: Mapping[str | int, int] | None = None
    target_keys: Iterable[str] | None = None
    pass_labels: bool = False
    aux_weight: float | None = None
    proxy: Literal["exact", "sketch"] = "exact"
    micro_batch: int | None = None
    scope: Literal["local", "global"] = "local"
    skip_mass: float = 0.0

    def validate(self) -> StepOptions:
        """Return the options with ``keep`` and ``auto_advance`` as Python's own types.

        Raises TypeError or ValueError for an option of another kind, and for options that exclude each other. What
        depends on the model is checked where the model's part is looked for.
        """
        rule = self.selector
        if isinstance(rule, type) or not isinstance(rule, Selector):
            raise TypeError(f"selector must be an instance of a selector such as selbp.Random(), got {rule!r}")
        if rule.needs not in NEEDS:
            raise TypeError(
                f"selector must say what it reads, needs = one of {NEEDS}, got {rule!r} with {rule.needs!r}"
            )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {shown(value)}")
        check_choice("backward", self.backward, WAYS)
        if self.schedule is not None and not isinstance(self.schedule, Schedule):
            raise TypeError(f"schedule must be a selbp.Schedule or None, got {type(self.schedule).__name__}")
        check_generator(self.generator)
        if self.cut is not None and not isinstance(self.cut, (nn.Module, str)):
            raise TypeError(f"cut must be a module of the model, its name or None, got {shown(self.cut)}")
        check_table(self.table)
        made = replace(self, keep=check_keep(self.keep), auto_advance=check_flag("auto_advance", self.auto_advance))
        if self.micro_batch is not None:
            made = replace(made, micro_batch=check_int("micro_batch", self.micro_batch, 1, "an int (samples)"))
        made._check_together()
        return made

    def _check_together(self) -> None:
        """Raise ValueError for options that exclude each other."""
        no_mean = self.selector.needs != "gradients" or isinstance(self.selector, CubeSampling)
        if self.target == "global" and no_mean:
            raise ValueError(f'target="global" is for rules that match gradients, not for {self.selector!r}')
        if self.scoring == "eval" and self.backward == "rows":
            raise ValueError('scoring="eval" is for backward="recompute": the rows of a forward that trains are in use')
        if self.scoring_precision != "same" and self.backward == "rows":
            raise ValueError(f'scoring_precision={self.scoring_precision!r} is for backward="recompute"')
        if self.batchnorm != "exact" and self.recomputes:
            raise ValueError(
                f'batchnorm={self.batchnorm!r} is for a backward through rows: backward="recompute" has none'
            )
        if self.proxy == "sketch" and (self.full_head or self.cut is not None):
            raise ValueError('proxy="sketch" goes with none of cut and head_gradient="full": it has no exact gradient')
        scores = self.full_head or self.scoring == "eval" or self.target == "global" or self.head is not None
        if self.cut is not None and scores:
            raise ValueError("cut= goes with none of head, head_gradient, scoring and target: it needs no scoring")
        if self.linear and (self.full_head or self.pass_labels):
            raise ValueError(
                f'loss="{LINEAR}" goes with none of head_gradient="full" and pass_labels: the head does not run'
            )
        if self.pooled:
            self._check_pooled()

    def _check_pooled(self) -> None:
        """Raise ValueError for what needs one forward of all rows with its graph, or all rows' own process."""
        name = 'scope="global"' if self.micro_batch is None else "micro_batch="
        if self.cut is not None:
            raise ValueError(f"{name} goes without cut=, which chooses in the backward of one forward of all rows")
        if self.backward == "rows" or self.batchnorm != "exact":
            raise ValueError(
                f'{name} is for backward="recompute": there is no forward of all rows with a graph, of which some rows '
                "could run backward"
            )
        if self.scope == "global" and self.target == "global":
            raise ValueError('scope="global" matches the mean of all ranks as it is: leave target="global" out')

    @property
    def pooled(self) -> bool:
        """Whether the rows among which the rule chooses are not those of one forward."""
        return self.micro_batch is not None or self.scope == "global"

    @property
    def recomputes(self) -> bool:
        """Whether a second forward of the chosen rows is asked for, and not left to be decided."""
        return self.backward == "recompute" or self.scoring_precision != "same"

    @property
    def linear(self) -> bool:
        """Whether the loss reads the head's input, and the head does not run."""
        return isinstance(self.loss, str) and self.loss == LINEAR  # an array compares entry by entry

    @property
    def full_head(self) -> bool:
        """Whether the head gets its full-batch gradient."""
        return self.head_gradient == "full"

    @property
    def reads_gradients(self) -> bool:
        """Whether the scoring forward reads gradients at a head."""
        return self.cut is None and (self.selector.needs in ("statistics", "gradients") or self.full_head)

    def strategy(self) -> Strategy:
        """How the chosen rows' losses get their graph."""
        if self.scoring_precision != "same":
            return Strategy("recompute", reason="the scoring forward has another precision")
        if self.pooled:
            return Strategy("recompute", reason="the rows among which the rule chooses are not those of one forward")
        return Strategy(self.backward, self.batchnorm)

    def criterion(self) -> Criterion:
        """The loss. Raises TypeError or ValueError for an option of the loss that does not fit it."""
        return criterion_of(
            self.loss,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            class_dim=self.class_dim,
            skip_mass=self.skip_mass,
        )

    def lengths(self) -> Lengths:
        """How token sequences are padded to one length."""
        named = isinstance(self.loss, str)
        causal = named and self.loss in CAUSAL
        return Lengths(self.ignore_index if causal or (named and self.loss == "cross_entropy") else None, causal)

    def draws_from(self, model: nn.Module) -> torch.Generator | None:
        """The generator; for draws that are to be the same on every rank one that the first step gives a seed."""
        if self.generator is not None or self.scope == "local":
            return self.generator
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        return torch.Generator(device).manual_seed(UNSEEDED)

    @classmethod
    def of_a_look(cls, loss: str | Callable[[Any, Any], Tensor], options: Mapping[str, Any]) -> StepOptions:
        """``loss`` and what of ``options`` says where the samples are and what the loss is; the others are left out."""
        known = {name: options[name] for name in (*OF_BATCH, *OF_CRITERION) if name in options}
        return cls(selector=Full(), keep=1.0, loss=loss, **known)

    def places(self) -> Places:
        """Where the samples of a batch are. Raises TypeError or ValueError that names the option."""
        return Places.of(self.shared, self.batch_dims, self.target_keys, self.pass_labels)
