"""Bugs planted in the CPU's matching engine: the comparison with the specification must see every one of them."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support.compiled import compile_all, link, patched

from selbp import reference

DRIVER = """
#include "matching/cpu.cpp"
extern "C" bool solve(const double* gram, const double* inner, const double* target_sq, int n, int k, double ridge,
                      std::int64_t* indices, double* weights, std::int32_t* count, double* residual,
                      unsigned char* status) {
  selbp::matching::Options options{n, k, selbp::matching::Rule::ols, true, ridge, 0.0};
  options.near_bytes = n % 2 ? 0 : std::size_t(1) << 40;  // with and without rows formed ahead
  return selbp::baseline::match_f64(options, {gram, inner, target_sq, nullptr},
                                    {indices, weights, count, residual, status}, 1, 1);
}
"""
ENGINE, FEASIBLE, LOOKAHEAD, SETUP = (f"matching/{name}.hpp" for name in ("engine", "feasible", "lookahead", "setup"))
MUTANTS = {
    "none": None,
    "the sweep leaves out the newest row": (ENGINE, "s < last; ++s)\n", "s < last - 1; ++s)\n"),
    "the ridge is left out": (SETUP, "ridged = square + ridge_;", "ridged = square;"),
    "negative weights are kept": (ENGINE, "if (best.flag) {", "if (best.flag && false) {"),
    "the turns do not reach z": (FEASIBLE, "    work_.z[s] = fused(cosine, z, sine * next_z);\n", ""),
    "a removal leaves the distances": (FEASIBLE, "if (j.first < main) j.store(", "if (0) j.store("),
    "a removed row stays masked": (FEASIBLE, "Thresholds<T>::kRank * (gram_row(c", "1e300 * (gram_row(c"),
    "the shelf outlives a removal": (FEASIBLE, "  forget_lookahead();\n", ""),
    "a shelved row resumes too late": (LOOKAHEAD, "= shelf_begin_[place];", "= shelf_begin_[place] + 1;"),
    "a resumed row's columns start over": (ENGINE, "at(begin + i, pivot)", "at(i, pivot)"),
    "of four rows two are formed": (LOOKAHEAD, "form_rows<kLookahead>(", "form_rows<2>("),
    "the residual lacks its factor 2": (SETUP, "twice = 2.0 * (", "twice = ("),
}


# The driver calls the engine in float64 alone; the other half of the compilation is left out.
CALL = "Answer<float>& answers, std::int64_t batch,\n               int threads) {\n  return "
FLOAT64_ALONE = ("matching/cpu.cpp", CALL + "solve_all(options", CALL + "(options.n")


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """The solver of each mutant, compiled side by side."""
    flags = "-std=c++17 -O0 -w -fPIC -ffp-contract=off -DSELBP_LEVEL=baseline".split()

    def compiled(mutation):
        folder = tmp_path_factory.mktemp("engine")
        (folder / "driver.cpp").write_text(DRIVER)
        csrc = patched(folder / "csrc", FLOAT64_ALONE, *([mutation] if mutation else []))
        objects = compile_all([(folder / "driver.cpp", flags, [csrc])])
        return ctypes.CDLL(str(link("engine", objects, ("-shared", "-lgomp")))).solve

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MUTANTS, pool.map(compiled, MUTANTS.values()), strict=True))


def problems():
    """Targets outside of the rows' cone, so that rows leave again; then copies of rows, nearly, so that some wait."""
    generator = torch.Generator().manual_seed(0)
    for seed in range(24):
        n, d = 17 + seed % 8, 10 + seed % 5
        rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
        target = rows.mean(0) + torch.randn(d, generator=generator, dtype=torch.float64)
        yield rows, target, n - 5 * (seed % 2)
    for seed in range(60):
        generator.manual_seed(seed)
        base = torch.randn(6, 12, generator=generator, dtype=torch.float64)
        noise = torch.randn(40, 12, generator=generator, dtype=torch.float64)
        rows = base[torch.arange(40) % 6] + 10.0 ** -(1 + seed % 6) * noise
        yield rows, torch.randn(12, generator=generator, dtype=torch.float64), 40


@pytest.fixture(scope="module")
def expected():
    """Inner products of each problem, k, and the specification's answer."""
    found = []
    for rows, target, k in problems():
        gram, inner, target_sq = rows @ rows.T, rows @ target, target @ target
        found.append((gram, inner, target_sq, k, reference.match(gram, inner, target_sq, k, ridge=1e-3)))
    return found


def differences(solve, expected):
    """How many of the problems come out otherwise than specified, in their weights by row or in their residual."""
    count = 0
    for gram, inner, target_sq, k, spec in expected:
        indices, weights = torch.empty(k, dtype=torch.int64), torch.empty(k, dtype=torch.float64)
        chosen, status = torch.empty((), dtype=torch.int32), torch.empty((), dtype=torch.uint8)
        residual = torch.empty((), dtype=torch.float64)
        addresses = [ctypes.c_void_p(x.data_ptr()) for x in (gram, inner, target_sq)]
        outputs = [ctypes.c_void_p(x.data_ptr()) for x in (indices, weights, chosen, residual, status)]
        assert solve(*addresses, len(inner), k, ctypes.c_double(1e-3), *outputs)
        dense = [
            torch.zeros(len(inner) + 1, dtype=torch.float64).index_add_(0, i.where(i >= 0, len(inner)), w)[:-1]
            for i, w in ((indices, weights), (spec.indices, spec.weights))
        ]
        same = torch.allclose(*dense, rtol=1e-6, atol=1e-6) and torch.allclose(residual, spec.residual, atol=1e-6)
        count += not (same and int(status) == int(spec.status))
    return count


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_caught(engines, expected, name):
    found = differences(engines[name], expected)
    assert found == 0 if name == "none" else found > 0
