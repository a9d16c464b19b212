"""What the study's confirmation found ahead of random at equal time, and where it did not."""

from __future__ import annotations

from typing import Any

from torch import nn

from selbp.selectors import GradientMatching

__all__ = ["recommended"]


def recommended(cut: nn.Module | str) -> dict[str, Any]:
    """Arguments of :class:`selbp.SelectiveBackprop`: gradient matching at a cut below the head, recomputed.

    ::

        step = selbp.SelectiveBackprop(model, **selbp.recommended(cut="body.9"))

    Layers above the cut get exact full-batch gradients. Those below score in bfloat16 without a graph and run again,
    in full precision, on the quarter of the rows whose weighted gradients at the cut match the minibatch's mean.

    The evidence is one network and one data set: a convolutional network of 435 000 parameters on Fashion-MNIST,
    minibatches of 64, a CPU, ten fresh seeds (``docs/study.md``). Trained in float32 it was ahead of random with its
    own keep at equal time ("confirm"). Where every arm trained in bfloat16, which makes random's steps cheaper than its
    own, no difference was shown ("confirm-bfloat16"); on a small ResNet and a text it was behind ("full"). So measure
    your own: ``step.report.gain``, or :mod:`selbp.study`.

    Args:
        cut: the module, or its name, at whose output to choose: in the evidence the layer below the head. Most of the
            network's work should lie below it; a device that is slow in bfloat16 gains less.
    """
    return {
        "cut": cut,
        "selector": GradientMatching(),
        "keep": 0.25,
        "backward": "recompute",
        "scoring_precision": "bfloat16",
    }
