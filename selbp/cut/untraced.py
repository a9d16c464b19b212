"""The cut's functions as ``torch.compile`` must run them: in ordinary Python, between two compiled parts.

Importing this module imports Dynamo, so only code that is being compiled imports it.
"""

from __future__ import annotations

from selbp.common.hooks import outside_graphs
from selbp.cut import choice

attach = outside_graphs(choice.Cut.attach)
cut_here = outside_graphs(choice.cut_here)
