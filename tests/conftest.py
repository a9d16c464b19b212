"""Shared fixtures: a fixed seed for every test, and the devices that there are."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every device that an operator runs on; `-m "not gpu"` leaves the CPU."""
    return torch.device(request.param)
