"""Cuts as ``torch.compile`` is to meet them: run as they are, between two compiled parts.

Importing this module imports Dynamo, so only code that is being compiled does.
"""

from __future__ import annotations

from selbp.training import cut
from selbp.training.hooks import outside_graphs

attach = outside_graphs(cut.Cut.attach)
selective_backward = outside_graphs(cut.selective_backward)
