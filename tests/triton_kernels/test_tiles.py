"""Which tile of the table the statistics of a head take: by options, a bias and the number of classes."""

import pytest
import torch

from selbp.triton_kernels import configs


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    monkeypatch.setattr(configs, "architecture", lambda device: "sm_90")


def pick(n_classes, bias=False, softcap=False, smooth=False, **options):
    return configs.statistics_tile(
        torch.device("cpu"), torch.bfloat16, n_classes, bias=bias, softcap=softcap, smooth=smooth, **options
    )


@pytest.mark.parametrize("option", ["smooth", "softcap"])
def test_an_option_alone_keeps_the_plain_tile_where_the_classes_fill_it(option):
    plain, tile = pick(128256), pick(128256, **{option: True})
    assert (tile.rows, tile.columns, tile.slices) == (plain.rows, plain.columns, 4)
    assert pick(128256, weighted=True) == plain  # weights are read with smoothing only
    for other in (pick(50257, **{option: True}), pick(128256, bias=True, **{option: True})):
        assert other.columns < plain.columns and other.slices == 1


@pytest.mark.parametrize("second", ["softcap", "weighted"])
def test_smoothing_with_more_takes_a_smaller_tile(second):
    assert pick(128256, smooth=True, **{second: True}) == configs.TABLE["sm_90"]["statistics_everything"][2]
    assert pick(128256, smooth=True, **{second: True}).slices == 1


def test_slices_divide_their_tile():
    for kernels in configs.TABLE.values():
        for tiles in kernels.values():
            for tile in tiles.values():
                assert tile.slices & (tile.slices - 1) == 0 and tile.columns % tile.slices == 0
