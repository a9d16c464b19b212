"""How the classes are split over a GPU's processors: the modelled share of them that is busy, at every batch size."""

import pytest

from selbp.triton_kernels import configs

PROCESSORS, ROWS, COLUMNS = 132, 128, 256  # an H100 and the widest tile of its table


def tiles(length, size):
    return -(-length // size)


def share_busy(rows, classes, splits, per_split):
    """Class tiles that are computed, of those that all processors could compute in the waves that the launch takes."""
    return rows * classes / (PROCESSORS * tiles(rows * splits, PROCESSORS) * per_split)


def share_at_best(rows, classes):
    """The same where any tile may run anywhere: whole tiles leave some processors idle at the end."""
    return rows * classes / (PROCESSORS * tiles(rows * classes, PROCESSORS))


@pytest.mark.parametrize(("n_classes", "least"), [(128256, 0.95), (151936, 0.95), (50257, 0.91), (32000, 0.89)])
def test_the_processors_are_busy_at_every_batch_size(n_classes, least):
    classes = tiles(n_classes, COLUMNS)
    seen = {}
    for n in range(128, 32769):
        rows = tiles(n, ROWS)
        if rows not in seen:
            chosen = configs.class_splits(rows, classes, PROCESSORS)
            seen[rows] = share_busy(rows, classes, *chosen) / share_at_best(rows, classes)
        assert seen[rows] >= least - 1e-9, n
    assert len(seen) == 256


@pytest.mark.parametrize("classes", [1, 2, 7, 125, 501])
def test_no_split_is_cheaper_and_none_is_empty(classes):
    def cost(rows, splits, per_split):
        return tiles(rows * splits, PROCESSORS) * (per_split + 0.5)

    for rows in range(1, 300):
        splits, per_split = configs.class_splits(rows, classes, PROCESSORS)
        assert (splits - 1) * per_split < classes <= splits * per_split
        for other in range(1, min(classes, max(1, configs.MOST_WAVES * PROCESSORS // rows)) + 1):
            width = tiles(classes, other)
            assert cost(rows, splits, per_split) <= cost(rows, tiles(classes, width), width), (rows, other)
        assert 3 * 4 * splits * rows * ROWS < 8 << 20 or splits == 1  # bytes of the partial sums


@pytest.mark.parametrize(("classes", "splits", "wanted"), [(10, 1, (1, 10)), (10, 3, (3, 4)), (10, 6, (5, 2))], ids=str)
def test_a_number_of_splits_that_is_asked_for_is_taken(classes, splits, wanted):
    assert configs.class_splits(5, classes, 1, splits) == wanted
