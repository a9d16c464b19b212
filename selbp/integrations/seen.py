"""The output of a selective step's forward, kept so that a trainer's own metrics need no second forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from selbp.common.distributed import without_parallel
from selbp.common.outputs import logits_in

IGNORED = -100
CHUNK = 1 << 24  # logits in float32 at a time


class Observed:
    """Inside, what ``model`` returns in training mode is remembered, if it is wanted."""

    def __init__(self, model: Any, wanted: bool) -> None:
        self._model, self._wanted = model, wanted
        self._outputs: list[Any] = []
        self._handle: Any = None

    def __enter__(self) -> Observed:
        if self._wanted:
            # A forward that no backward follows goes around the wrapper.
            self._handle = without_parallel(self._model).register_forward_hook(self._remember)
        return self

    def __exit__(self, *unused: object) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _remember(self, module: Any, args: Any, output: Any) -> None:
        if module.training:
            self._outputs.append(output)

    def output(self, n: int) -> Any:
        """The last output that has ``n`` rows, else the last one; None where nothing was wanted."""
        whole = [output for output in self._outputs if rows_in(output) == n]
        return (whole or self._outputs or [None])[-1]


def rows_in(output: Any) -> int | None:
    """How many samples a model's output has; None where it shows none."""
    logits = logits_in(output)
    return len(logits) if isinstance(logits, Tensor) and logits.dim() else None


class Replay:
    """Stands in for a model whose forward has run: returns that forward's output, whatever it is called with."""

    def __init__(self, model: Any, output: Any, labels: Tensor) -> None:
        self._model, self._output, self._labels = model, output, labels

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        """The output, without its graph; ``fused_lm_head`` asks for TRL's figures of each token."""
        found = _Output({name: _detached(value) for name, value in dict(self._output).items()})
        found["loss"] = torch.zeros((), dtype=torch.float32, device=self._labels.device)
        if fused_lm_head:
            found.update(token_figures(found["logits"], self._labels))
        return found


class _Output(dict[str, Any]):
    """A dict whose entries are attributes too, as Transformers' outputs are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


@torch.no_grad()
def token_figures(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """(n, T - 1) of each predicted token: its log-probability, the entropy, whether it ranks first; 0 where ignored."""
    z, y = logits[:, :-1], labels[:, 1:]
    mask = y != IGNORED
    flat, wanted = z.reshape(-1, z.shape[-1]), y.clamp(min=0).reshape(-1)
    parts: list[list[Tensor]] = [[], [], []]
    for some, target in zip(*(x.split(max(1, CHUNK // z.shape[-1])) for x in (flat, wanted)), strict=True):
        log = some.float().log_softmax(-1)
        parts[0].append(log.gather(1, target[:, None])[:, 0])
        parts[1].append(-(log.exp() * log).nan_to_num(0.0).sum(-1))
        parts[2].append(some.argmax(-1) == target)
    log_probs, entropy, top = (torch.cat(part).view(mask.shape) for part in parts)
    zero = torch.zeros((), dtype=torch.float32, device=logits.device)
    return {
        "log_probs": torch.where(mask, log_probs, zero),
        "entropy": torch.where(mask, entropy, zero),
        "is_top1": top & mask,
        "label_mask": mask,
    }
