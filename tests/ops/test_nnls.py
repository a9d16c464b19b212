"""``selbp.ops.nnls`` and ``nnls_gram``: SciPy's answers, batched."""

import numpy as np
import pytest
import scipy.optimize
import torch
from support.matching_cases import F32, F64, rows

from selbp import ops


@pytest.mark.parametrize("dtype", [F64, F32])
@pytest.mark.parametrize("shape", [(30, 12), (10, 25), (12, 12), (5, 1), (1, 5)])
def test_nnls_equals_scipy(shape, dtype):
    generator = torch.Generator().manual_seed(shape[0])
    a = torch.randn(4, *shape, generator=generator, dtype=F64).to(dtype)
    b = torch.randn(4, shape[0], generator=generator, dtype=F64).to(dtype)
    x = ops.nnls(a, b)
    assert x.shape == (4, shape[1]) and x.dtype == dtype and (x >= 0).all()
    for i in range(4):
        _, best = scipy.optimize.nnls(a[i].double().numpy(), b[i].double().numpy())
        reached = (a[i].double() @ x[i].double() - b[i].double()).norm()
        assert float(reached) == pytest.approx(best, rel=1e-5, abs=1e-6 if dtype == F64 else 1e-5)
        if shape[0] >= shape[1]:
            exact = scipy.optimize.nnls(a[i].double().numpy(), b[i].double().numpy())[0]
            np.testing.assert_allclose(x[i].numpy(), exact, atol=1e-9 if dtype == F64 else 1e-5)
    gram = ops.nnls_gram(a.double().mT @ a.double(), (a.double().mT @ b.double()[..., None])[..., 0])
    if shape[0] >= shape[1]:
        torch.testing.assert_close(gram, x.double(), rtol=1e-5, atol=1e-5)


def test_nnls_with_a_ridge():
    a, b = rows(15, 8), rows(1, 15, seed=4)[0]
    weight = (0.1 * a.square().sum(0).mean()).sqrt()
    tall = torch.cat([a, weight * torch.eye(8, dtype=F64)])
    exact = scipy.optimize.nnls(tall.numpy(), torch.cat([b, b.new_zeros(8)]).numpy())[0]
    np.testing.assert_allclose(ops.nnls(a, b, ridge=0.1).numpy(), exact, atol=1e-10)


def test_nnls_on_valid_rows_and_bad_numbers():
    a, b = rows(15, 8), rows(1, 15, seed=4)[0]
    gram, inner = a.T @ a, a.T @ b
    valid = torch.arange(8) != 3
    x = ops.nnls_gram(gram, inner, valid=valid)
    assert x[3] == 0
    np.testing.assert_allclose(x[valid].numpy(), scipy.optimize.nnls(a[:, valid].numpy(), b.numpy())[0], atol=1e-10)
    pair = torch.stack([a, a])
    pair[0, 2, 3] = torch.nan
    both = ops.nnls(pair, torch.stack([b, b]))
    assert both[0].isnan().all() and torch.equal(both[1], ops.nnls(a, b))
    assert torch.equal(ops.nnls(torch.zeros(3, 2), torch.ones(3)), torch.zeros(2))
    assert ops.nnls(torch.zeros(3, 0), torch.ones(3)).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32, F64], ids=str)
def test_inner_products_may_be_as_large_as_their_type_holds(dtype):
    """Their squares are not finite in float16 from 256 on, in float32 and bfloat16 from 2e19 on."""
    size = {torch.float16: 400.0, F64: 1e150}.get(dtype, 1e30)
    x = ops.nnls_gram((size * torch.eye(2, dtype=F64)).to(dtype), torch.tensor([size, -size], dtype=dtype))
    torch.testing.assert_close(x.double(), torch.tensor([1.0, 0.0], dtype=F64), rtol=1e-6, atol=0.0)
