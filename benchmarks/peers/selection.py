"""One selection step as others do it, from a minibatch's logits to weights of its rows.

Each is (logits (n, C), target (n,), features (n, d), k) -> (n,) weights w, 0 for a row that is not chosen, such that
``sum_i w_i g_i`` stands for the mean of the last-layer gradients ``g_i = (softmax - onehot) (x) [h_i, 1]``. A peer that
computes on the host gets its arrays by ``.cpu().numpy()``, which counts.

Composer       ``select_using_loss`` (pip install --no-deps mosaicml): Selective-Backprop by loss rank; its second
               forward on the chosen rows is not part of the step timed here
CORDS          GradMatch (pip install --no-deps cords): the gradients as one matrix of n rows, then its solver for the
               CPU (numpy) or the one for GPUs (torch)
scikit-learn   ``orthogonal_mp_gram`` on the Gram matrix in eager torch
SPAMS          ``omp`` (pip install spams-bin) on the matrix of gradients
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from benchmarks.harness import Unavailable
from benchmarks.peers import matching, missing, one_file

Select = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def _residual(logits: Tensor, target: Tensor) -> Tensor:
    return logits.softmax(1).scatter_add_(1, target[:, None], logits.new_full((len(logits), 1), -1.0))


def _gradients(logits: Tensor, target: Tensor, features: Tensor) -> Tensor:
    """(n, C (d + 1)): every per-sample gradient, materialised."""
    residual = _residual(logits, target)
    return torch.cat([residual, (residual[:, :, None] * features[:, None, :]).flatten(1)], 1)


def cords(solver: str) -> Select | Unavailable:
    """``solver``: ``"OrthogonalMP_REG"``, CORDS' choice on a CPU, or ``"OrthogonalMP_REG_Parallel_V1"``, on a GPU."""
    try:
        solve = getattr(matching.cords_solvers(), solver)
    except (ImportError, FileNotFoundError) as error:
        return missing("cords", error)

    def select(logits: Tensor, target: Tensor, features: Tensor, k: int) -> Tensor:
        gradients = _gradients(logits, target, features)
        matrix, total = gradients.T, gradients.sum(0)
        if solver == "OrthogonalMP_REG":
            found = solve(matrix.cpu().numpy(), total.cpu().numpy(), nnz=k, positive=True, lam=0)
            weights = torch.from_numpy(found).to(logits)
        else:
            weights = solve(matrix, total, nnz=k, positive=True, lam=0, tol=1e-4, device=logits.device.type)
        return weights / len(logits)  # its target is the sum

    return select


def scikit_learn() -> Select | Unavailable:
    """Signed weights."""
    solve = matching.scikit_learn()
    if isinstance(solve, Unavailable):
        return solve

    def select(logits: Tensor, target: Tensor, features: Tensor, k: int) -> Tensor:
        residual = _residual(logits, target)
        gram = (residual @ residual.T) * (features @ features.T + 1.0)
        found = solve(gram.cpu().numpy(), gram.mean(1).cpu().numpy(), k)
        return torch.from_numpy(found).to(logits)

    return select


def spams() -> Select | Unavailable:
    """Signed weights."""
    solve = matching.spams()
    if isinstance(solve, Unavailable):
        return solve

    def select(logits: Tensor, target: Tensor, features: Tensor, k: int) -> Tensor:
        gradients = _gradients(logits, target, features)
        found = solve(gradients.T.cpu().numpy(), gradients.mean(0).cpu().numpy(), k)
        return torch.from_numpy(found).to(logits)

    return select


@contextmanager
def _standing_in(names: dict[str, tuple[str, ...]]) -> Iterator[None]:
    """Empty modules for those that a file imports and does not use."""
    hidden = {name: sys.modules.pop(name) for name in names if name in sys.modules}
    for name, attributes in names.items():
        module = ModuleType(name)
        for attribute in attributes:
            setattr(module, attribute, type(attribute, (), {}))
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
        sys.modules.update(hidden)


def select_using_loss() -> Callable[..., tuple[Tensor, Tensor]] | Unavailable:
    """Composer's function."""
    try:
        unused = _standing_in(
            {
                "composer": (),
                "composer.core": ("Algorithm", "Event", "State", "get_precision_context"),
                "composer.loggers": ("Logger",),
                "composer.models": ("ComposerModel",),
            }
        )
        module = one_file("composer", "algorithms", "selective_backprop", "selective_backprop.py", around=unused)
    except (ImportError, FileNotFoundError) as error:
        return missing("mosaicml", error)
    return module.select_using_loss


def composer() -> Select | Unavailable:
    """Weights 1 / k, as the mean loss of its second forward gives them."""
    rule = select_using_loss()
    if isinstance(rule, Unavailable):
        return rule

    def select(logits: Tensor, target: Tensor, features: Tensor, k: int) -> Tensor:
        n = len(logits)
        chosen, _ = rule(
            torch.arange(n, device=logits.device), target, lambda rows: logits, torch.nn.functional.cross_entropy, k / n
        )
        return logits.new_zeros(n).index_fill_(0, chosen, 1.0 / k)

    return select
