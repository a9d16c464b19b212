"""The whole of :mod:`selbp.sampling` in one call."""

from __future__ import annotations

from typing import Any

from torch import nn

from selbp._checks import check_flag, check_int, check_number, shown
from selbp.sampling import AutoSelect, NoiseAwareCrossEntropy, ScoredBatchSampler, ScoreTable, fit_proxy
from selbp.sampling.table import NoiseModel
from selbp.selectors import Full
from selbp.training.step import SelectiveBackprop

FOR_PROXY = 0.05  # of the training's processor seconds


def auto_select(
    model: nn.Module,
    dataset: Any,
    *,
    classes: int | None = None,
    k: int = 48,
    pool: int = 256,
    features: Any = "auto",
    noise: NoiseModel = "auto",
    proxy: bool = True,
    steps: int | None = None,
    step_seconds: float | None = None,
    seed: int = 0,
    workers: int = 0,
    prices: dict[str, float] | None = None,
    **options: Any,
) -> AutoSelect:
    """Make everything that trains ``model`` on chosen samples of ``dataset``: table, proxy, sampler, step, controller.

    It was ahead of random at equal time on images with clean and with wrong labels, on ten fresh seeds, and level on a
    data set whose step takes a millisecond; the documentation's guide "Choosing a rule" has the figures.

    Parameters
    ----------
    model : torch.nn.Module
        Gives logits (n, C) where ``classes`` is given.
    dataset : map-style data set
        Of N samples, (input, label) for each number, or a dict with ``labels`` or ``label``.
    classes : int or None
        C. None for targets that are no classes: then there is neither a proxy nor a noise-aware loss, and ``options``
        name the loss.
    k, pool : int
        Rows of a batch, and samples that they are drawn from. Give ``k`` what is best for random batches.
    features : str, callable or Tensor (N, d)
        What the proxy sees, see :func:`selbp.sampling.fit_proxy`.
    noise : str
        ``"auto"``, ``"symmetric"``, ``"class"`` or ``"none"``, see :class:`selbp.sampling.ScoreTable`.
    proxy : bool
        Whether a small network fills the table first. It takes some seconds for each 100 000 samples.
    steps : int or None
        Planned for the training: on a small data set the small network then makes at most a twentieth as many,
        or one pass.
    step_seconds : float or None
        What a step takes, where that is known beside ``steps``: the small network then trains for at most a twentieth
        of the whole, and is left out if that is too short for half of a pass.
    seed : int
        Of the proxy and of every draw.
    workers : int
        Processes that read the data set for the proxy; 0: this one. The loader of the training has its own.
    prices : dict or None
        Of a step over random's, such as ``{"random": 1.0, "drawn": 1.0}``, where they are known: nothing is timed then,
        and a run is the same each time. See :class:`selbp.AutoSelect`.
    **options
        Further arguments of :class:`selbp.SelectiveBackprop`. ``keep`` goes with a ``selector``, which chooses among
        the k rows that were drawn.

    Returns
    -------
    AutoSelect
        Called as the step is. Its ``sampler`` is the loader's ``batch_sampler``, its ``table`` has the scores, its
        ``step`` is the step.

    Raises
    ------
    TypeError, ValueError
        For arguments that do not fit.

    See Also
    --------
    selbp.sampling : the parts on their own.

    Examples
    --------
    >>> import torch, selbp
    >>> data = torch.utils.data.TensorDataset(torch.randn(512, 8), torch.randint(0, 3, (512,)))
    >>> model = torch.nn.Linear(8, 3)
    >>> auto = selbp.auto_select(model, data, classes=3, k=16, pool=64)
    >>> for inputs, target in torch.utils.data.DataLoader(data, batch_sampler=auto.sampler):
    ...     auto(inputs, target).backward()
    >>> auto.report.k
    16
    """
    if "keep" in options and "selector" not in options:
        raise ValueError("keep must come with a selector=, which chooses among the rows of a batch; k= says how many")
    sampler, found = sampler_and_options(
        dataset,
        classes=classes,
        k=k,
        pool=pool,
        features=features,
        noise=noise,
        proxy=proxy,
        steps=steps,
        step_seconds=step_seconds,
        seed=seed,
        workers=workers,
    )
    step = SelectiveBackprop(model, **{**found, **options})
    begin_alike(step, sampler.table)
    return AutoSelect(step, sampler, prices=prices)


def begin_alike(step: SelectiveBackprop, table: ScoreTable) -> None:
    """Have the ranks that make one choice begin with rank 0's ``table``: a proxy may have had time for more on one."""
    if step._ranks is not None and step._ranks.size > 1:
        table.load_state_dict(step._ranks.first(table.state_dict()))


def sampler_and_options(
    dataset: Any,
    *,
    classes: int | None,
    k: int,
    pool: int,
    features: Any,
    noise: NoiseModel,
    proxy: bool,
    steps: int | None,
    step_seconds: float | None,
    seed: int,
    workers: int,
) -> tuple[ScoredBatchSampler, dict[str, Any]]:
    """The sampler of :func:`auto_select` and the options of its step."""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(f"dataset must be map-style, with a length and numbered samples, got {shown(dataset)}")
    table = ScoreTable(len(dataset), classes, noise="none" if classes is None else noise)
    options: dict[str, Any] = {"selector": Full(), "keep": 1.0, "table": table}
    if classes is not None:
        if check_flag("proxy", proxy):
            limit = _allowed(steps, step_seconds)
            fit_proxy(dataset, table, features=features, seconds=limit, steps=steps, seed=seed, workers=workers)
        if noise != "none":
            options["loss"] = NoiseAwareCrossEntropy(table)
    return ScoredBatchSampler(table, k, pool, seed=seed), options


def _allowed(steps: int | None, step_seconds: float | None) -> float | None:
    """Seconds that the proxy may train for; None where the training's are not known."""
    if step_seconds is None:
        return None
    if steps is None:
        raise ValueError("step_seconds needs steps, got steps=None")
    return FOR_PROXY * check_int("steps", steps, 1) * check_number("step_seconds", step_seconds, 0.0)
