"""Cuts as ``torch.compile`` is to meet them: run as they are, between two compiled parts.

Importing this module imports Dynamo, so only code that is being compiled does.
"""

from __future__ import annotations

from selbp.common.hooks import outside_graphs
from selbp.cut import choice, module

attach = outside_graphs(choice.Cut.attach)
backward_cut = outside_graphs(module.backward_cut)
