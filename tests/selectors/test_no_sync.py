"""No rule waits for the device, and no rule's shapes depend on data."""

import dataclasses

import pytest
import torch
from support.selection_cases import Batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import selbp
from selbp.selectors import BatchStatistics, GradientProxies

_READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "bincount")


class Forbid(TorchDispatchMode):
    """Raises on every operator that reads a value back to the host or has a shape that depends on values."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.split("::")[1]
        if any(name == read or name.startswith(f"{read}_") or name.startswith(f"_{read}") for read in _READS):
            raise AssertionError(f"{func} waits for the device")
        if name.startswith("index") and len(args) > 1 and isinstance(args[1], (list, tuple)):
            if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]):
                raise AssertionError(f"{func} with a mask waits for the device")
        if name == "_to_copy" and (kwargs or {}).get("device") not in (None, args[0].device):
            raise AssertionError(f"{func} moves data between devices")
        return func(*args, **(kwargs or {}))


def test_the_guard_bites():
    x = torch.arange(4.0)
    for read in (lambda: x[0].item(), lambda: x[x > 1], lambda: x.nonzero(), lambda: bool((x > 0).all()), x.unique):
        with pytest.raises(AssertionError, match="waits for the device"), Forbid():
            read()
    with pytest.raises(AssertionError, match="waits for the device"), Forbid():
        x[torch.tensor(1)]


@pytest.mark.parametrize("valid", [None, torch.arange(24) % 6 == 0])
def test_no_value_is_read_back(rule, valid):
    batch = Batch(n=24, valid=valid, dtype=torch.float32)
    proxies = batch.proxies
    proxies.gram()  # the operators' own kernels are free to look at host memory
    proxies.mean_gradient()
    with Forbid():
        for _ in range(2):
            rule.select(batch.stats, 6, proxies=proxies, extras=batch.extras, generator=torch.Generator())


def test_shapes_do_not_depend_on_data(rule):
    """Fake tensors have no data to depend on."""
    with FakeTensorMode(allow_non_fake_inputs=False):
        n = 24
        loss, valid = torch.rand(n), torch.ones(n, dtype=torch.bool)
        stats = BatchStatistics(loss, loss, loss, loss, valid, valid)
        proxies = GradientProxies(torch.rand(n, 5), torch.rand(n, 7))
        k = n if isinstance(rule, selbp.Full) else 6
        for _ in range(2):
            found = rule.select(stats, 6, proxies=proxies, extras={"irreducible_loss": loss})
            assert found.indices.shape == found.weights.shape == (k,)
            assert found.indices.dtype == torch.int64 and found.weights.dtype == torch.float32


def test_compiles_whole(rule):
    torch._dynamo.reset()  # each rule is a recompilation of one function, and there is a limit to those
    batch = Batch(n=24, dtype=torch.float32)

    @torch.compile(fullgraph=True, backend="eager")
    def choose(stats, residual, features, irreducible):
        proxies = GradientProxies(residual, features)
        return rule.select(stats, 4, proxies=proxies, extras={"irreducible_loss": irreducible})

    torch.manual_seed(3)
    found = choose(batch.stats, batch.residual, batch.features, batch.irreducible)
    assert len(found.indices) == (24 if isinstance(rule, selbp.Full) else 4)
    fresh = dataclasses.replace(rule)
    torch.manual_seed(3)
    expected = batch.select(fresh, 4)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.weights, expected.weights)
