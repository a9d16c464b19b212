import pytest


@pytest.fixture(autouse=True)
def precision_of_one_test(monkeypatch):
    """Older Transformers leave a trainer's ``bf16=True`` in the environment, for every trainer that follows."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
