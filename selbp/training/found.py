"""Joins what several forwards found of the samples: those of micro-batches, or of the ranks of one choice.

Each part is scored with unscaled losses. The factor that makes them torch's mean follows from all parts together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from selbp.common.exchange import Ranks
from selbp.common.outputs import logits_of
from selbp.common.proxies import HeadProxies
from selbp.reference.losses import scale_of
from selbp.training.scored import Scored, worth_keeping
from selbp.types import BatchStatistics, widest


@dataclass(frozen=True)
class Found:
    """What is known of some samples, or of all of them. Nothing in it keeps a graph or an activation alive."""

    stats: BatchStatistics  # in units of the unscaled loss
    mass: Tensor  # (n,) what each sample counts in torch's mean
    factors: tuple[Tensor, Tensor] | None = None  # (n, T, C) and (n, T, d): the head's, 0 where not valid
    bias: bool = True  # whether the head has one
    hits: tuple[Tensor, Tensor] | None = None  # () correct entries and () all entries
    logits: Tensor | None = None  # (n, ...), where they were to be kept

    @classmethod
    def of(cls, scored: Scored, head: nn.Module | None, n: int, *, factors: bool, keep_output: bool) -> Found:
        """Of a part of ``n`` samples in all that was scored with ``unit`` 1.

        The factors stay where they are to be read, or where they are small enough for the report.
        """
        assert scored.mass is not None
        proxies = scored.proxies
        if proxies is not None and not factors:
            proxies = worth_keeping(proxies, head, n)
        pair, bias = None, True
        if proxies is not None:
            pair, bias = (proxies.token_residual, proxies.token_features), proxies.bias
        logits = logits_of(scored.output).detach() if keep_output and scored.output is not None else None
        return cls(scored.stats, scored.mass, pair, bias, scored.hits, logits)

    @classmethod
    def joined(cls, parts: Sequence[Found]) -> Found:
        """All parts of a minibatch, in order."""
        if len(parts) == 1:
            return parts[0]
        stats = BatchStatistics(*map(torch.cat, zip(*(part.stats for part in parts), strict=True)))
        every = [part.factors for part in parts if part.factors is not None]
        factors = None
        if len(every) == len(parts):  # else those of long samples were too large to keep for the report
            most = max(residual.shape[1] for residual, _ in every)
            longer = [_with_positions(pair, most) for pair in every]
            factors = torch.cat([r for r, _ in longer]), torch.cat([h for _, h in longer])
        logits = [part.logits for part in parts if part.logits is not None]
        return cls(
            stats,
            torch.cat([part.mass for part in parts]),
            factors,
            parts[0].bias,
            added([part.hits for part in parts]),
            torch.cat(logits) if logits else None,
        )

    def over(
        self, ranks: Ranks, counts: Sequence[int], extras: Mapping[str, Tensor], *, factors: bool
    ) -> tuple[Found, dict[str, Tensor]]:
        """What all ranks found, one after the other, and what their callers know of each sample.

        The factors travel where they are to be read: for the report alone they are not worth the traffic.
        """
        if ranks.size == 1:
            return self, dict(extras)
        wide = widest(self.mass.device)
        hits = torch.stack(self.hits).to(wide) if self.hits is not None else self.mass.new_zeros(2, dtype=wide)
        names = sorted(extras)  # a caller may pass them in another order on each rank
        floating = [name for name in names if extras[name].is_floating_point()]
        integers = [name for name in names if name not in floating]  # which a floating type may round
        known = [*self.stats, self.mass, *(extras[name] for name in floating)]
        table = torch.stack([x.to(wide) for x in known], 1)
        own = 0 if self.factors is None else self.factors[0].shape[1]
        sums = torch.cat([hits, hits.new_full((1,), own), hits.new_zeros(table.shape[1] - 3)])[None]
        together = ranks.rows(torch.cat([table, sums]), [n + 1 for n in counts])
        parts = together.split([n + 1 for n in counts])
        columns = torch.cat([part[:-1] for part in parts]).unbind(1)
        back = [column.to(x.dtype).contiguous() for column, x in zip(columns, known, strict=True)]
        correct, total = torch.stack([part[-1, :2] for part in parts]).sum(0).to(torch.int64).unbind()
        pair = None
        if factors and self.factors is not None:
            most = int(torch.stack([part[-1, 2] for part in parts]).max())
            residual, features = _with_positions(self.factors, most)
            pair = ranks.rows(residual, counts), ranks.rows(features, counts)
        fields = len(self.stats)
        whole = replace(
            self,
            stats=BatchStatistics(*back[:fields]),
            mass=back[fields],
            factors=pair,
            hits=None if self.hits is None else (correct, total),
            logits=None if self.logits is None else ranks.rows(self.logits, counts),
        )
        given = dict(zip(floating, back[fields + 1 :], strict=True))
        if integers:
            whole_numbers = ranks.rows(torch.stack([extras[name].to(torch.int64) for name in integers], 1), counts)
            given |= {name: x.to(extras[name].dtype) for name, x in zip(integers, whole_numbers.unbind(1), strict=True)}
        return whole, given

    def scaled(self, reduce: Any = None) -> Scored:
        """In the units of torch's mean over these samples."""
        valid, dtype = self.stats.valid, self.stats.loss.dtype
        scale = scale_of(self.mass, valid).to(dtype)
        proxies = None
        if self.factors is not None:
            residual, features = self.factors
            proxies = HeadProxies(
                lambda: residual * scale, lambda: features, positions=features.shape[1], bias=self.bias, reduce=reduce
            )
        stats = self.stats._replace(residual_sq=self.stats.residual_sq * scale.square())
        output = None if self.logits is None else {"logits": self.logits}
        return Scored(stats, scale, proxies, hits=self.hits, mass=self.mass, output=output)


def _with_positions(factors: tuple[Tensor, Tensor], most: int) -> tuple[Tensor, Tensor]:
    """The factors with ``most`` positions, 0 in those that are new: their gradients are 0 as well."""
    residual, features = (nn.functional.pad(x, (0, 0, 0, most - x.shape[1])) for x in factors)
    return residual, features


def added(hits: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Tensor, Tensor] | None:
    """The sums of all parts' correct and all entries; None where a part has none."""
    pairs = [pair for pair in hits if pair is not None]
    if len(pairs) < len(hits) or not pairs:
        return None
    return torch.stack([a for a, _ in pairs]).sum(), torch.stack([b for _, b in pairs]).sum()
