"""The selection rules and arms by the names that the command line and the tables use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Rule:
    """A selection rule by name. ``lr`` is its default rate: the best of .02, .05, .1 and .2 for the random rule, on
    held-out Fashion-MNIST at keep 0.25; ``selbp compare --tune`` finds each rule's own.
    """

    selector: str  # class in selbp.selectors, or in the module that stands before a colon
    label: str
    summary: str
    options: dict[str, Any] = field(default_factory=dict)
    lr: float = 0.05
    training: str = ""  # options of the training that every arm with this rule has: option=value,...
    sampling: str = ""  # the one that hands the rule what it needs, where it cannot do without
    arm: str = ""  # of ARMS, which has that sampling


RULES: dict[str, Rule] = {
    "full": Rule("Full", "full batch", "every sample: the ordinary step (keep is 1.0)"),
    "random": Rule("Random", "random", "k at random; needs no scoring forward"),
    "top-loss": Rule("TopLoss", "top loss", "the k largest losses"),
    "top-loss-refit": Rule("TopLoss", "top loss, refit", "the same, weights by least squares", {"weights": "refit"}),
    "top-gradnorm": Rule("TopGradNorm", "top gradient norm", "the k largest last-layer gradients"),
    "loss-percentile": Rule("LossPercentile", "loss percentile", "odds by the loss's percentile (Selective-Backprop)"),
    "loss-rank": Rule("LossRank", "loss rank", "odds by the loss's rank in its minibatch"),
    "gradnorm": Rule("GradNormImportance", "gradient-norm importance", "odds by gradient norm, unbiased weights"),
    "matching": Rule("GradientMatching", "gradient matching", "weights and rows that match the mean gradient"),
    "cube": Rule("CubeSampling", "unbiased matching (cube)", "balanced on sketched gradients, unbiased weights"),
    "matching-average": Rule(
        "selbp_study.ideas:AveragedTarget", "matching an average", "matches the mean gradient's exponential average"
    ),
    "rho": Rule(
        "ReducibleLoss",
        "RHO-LOSS",
        "the largest losses above those of a small network; only with sampling=rho, as in the arm rho-loss",
        sampling="rho",
        arm="rho-loss",
    ),
    "divbs": Rule("DivBS", "diverse (DivBS)", "odds by what the chosen ones do not yet span"),
}

# A cut below the head whose lower part scores in bfloat16 and runs again, in full precision, on the chosen rows.
RECUT = "cut=1,backward=recompute,scoring_precision=bfloat16"

# Arms that are more than a rule: title, and rule[:option=value,...]@option=value,... as Arm.parse reads it.
ARMS: dict[str, tuple[str, str]] = {
    "matching-head": ("matching, exact head", "matching@head_gradient=full"),
    "matching-cut1": ("matching below the head", "matching@cut=1"),
    "matching-cut2": ("matching two layers below the head", "matching@cut=2"),
    "matching-recut": ("matching below the head, recomputed", f"matching@{RECUT}"),
    "cube-recut": ("unbiased matching below the head, recomputed", f"cube@{RECUT}"),
    "gradnorm-recut": ("gradient norms below the head, recomputed", f"gradnorm:norm=gradient@{RECUT}"),
    "random-recut": ("random rows below the head, recomputed", f"random@{RECUT}"),
    "matching-recut-8": ("matching below the head, recomputed, 8 rows", f"matching@{RECUT},keep=8"),
    "matching-recut-128": (
        "matching below the head, recomputed, 16 of 128",
        f"matching@{RECUT},batch_size=128,keep=16",
    ),
    "matching-recut2": (
        "matching two layers below the head, recomputed",
        f"matching@{RECUT.replace('cut=1', 'cut=2')}",
    ),
    "matching-recut-every2": (
        "matching below the head, recomputed, every second step, else random",
        f"matching@{RECUT},every=2,between=random",
    ),
    "matching-average-recut": ("matching an average below the head, recomputed", f"matching-average@{RECUT}"),
    "top-loss-every2": ("top loss every second step, else random", "top-loss@every=2,between=random"),
    "top-loss-128": ("top loss, 16 of 128", "top-loss@batch_size=128,keep=16"),
    "scored": ("the whole: proxy, history, noise-aware loss", "full@keep=48,sampling=scored"),
    "auto": ("auto", "full@keep=48,sampling=auto"),
    "auto-half": ("auto, half of the time", "full@keep=48,share=0.5,sampling=auto"),
    "auto-two-thirds": ("auto, two thirds of the time", "full@keep=48,share=0.667,sampling=auto"),
    "auto-32": ("auto, 32 rows", "full@keep=32,sampling=auto"),
    "auto-one-pass": ("auto, a proxy of one pass", "full@keep=48,sampling=auto,passes=1"),
    "aware-random": ("random, noise-aware loss", "full@keep=48,sampling=uniform,proxy=false"),
    "scored-history": ("history alone", "full@keep=48,sampling=scored,proxy=false"),
    "scored-proxy": ("proxy alone", "full@keep=48,sampling=scored,history=false"),
    "scored-plain-loss": ("the whole without the noise-aware loss", "full@keep=48,sampling=scored,aware=false"),
    "scored-hard": ("hardness alone", "full@keep=48,sampling=scored,responsibility=false,aware=false"),
    "scored-right": ("responsibility alone", "full@keep=48,sampling=scored,power=0"),
    "scored-64": ("the whole, 64 rows", "full@keep=64,sampling=scored"),
    "scored-512": ("the whole, pools of 512", "full@keep=48,sampling=scored,pool=512"),
    "info-batch": ("InfoBatch", "full@keep=64,sampling=info-batch,proxy=false,aware=false,responsibility=false"),
    "rho-loss": ("RHO-LOSS", "rho@keep=32,sampling=rho,pool=128,aware=false,responsibility=false"),
    "top-loss-64": ("top loss, 32 of 64", "top-loss@batch_size=64,keep=32"),
    "random-cut2": ("random rows two layers below the head", "random@cut=2"),
}
