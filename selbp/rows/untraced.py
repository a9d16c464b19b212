"""A checkpoint as ``torch.compile`` must run it: in ordinary Python, between two compiled parts.

Dynamo would trace the modes that record and replay masks, and sees no random state. Importing this module imports
Dynamo, so only code that is being compiled imports it.
"""

from __future__ import annotations

import torch

from selbp.rows.recompute import Checkpoint

apply = torch.compiler.disable(Checkpoint.apply)
