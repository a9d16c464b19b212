"""Names that were renamed go on working, and every public name is there."""

from __future__ import annotations

import selbp


def test_former_names_are_the_same_objects() -> None:
    assert selbp.SelectiveBackward is selbp.BackwardCut
    assert selbp.selective_backward is selbp.backward_cut
    assert selbp.select is selbp.rows.select
    assert selbp.checkpoint is selbp.rows.checkpoint
    assert selbp.fence is selbp.rows.fence


def test_every_public_name_is_there() -> None:
    assert [name for name in selbp.__all__ if not hasattr(selbp, name)] == []
