"""How often each kernel would be compiled over batches of changing size: prints {kernel: number of keys} as JSON.

A second line says the same where the sizes ``n`` are specialised, as they must not be.

Runs in a process without TRITON_INTERPRET. Triton's own binder makes the key of each launch, for a named target, and
nothing is compiled: no GPU is needed.
"""

from __future__ import annotations

import json
from collections import defaultdict

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime import jit

from selbp.triton_kernels import configs, linear_cross_entropy, minibatch, skipped, target_logit
from selbp.triton_kernels.combine import finalize
from selbp.triton_kernels.gram import gram
from selbp.triton_kernels.mean import finite_rows, mean_gradient
from selbp.triton_kernels.residual import residual
from selbp.triton_kernels.sketch import projected_residuals
from selbp.triton_kernels.statistics import logits_statistics, statistics
from selbp.triton_kernels.stored_rows import in_units, stored_rows

BACKEND = make_backend(GPUTarget("cuda", 90, 32))
keys: dict[str, set[str]] = defaultdict(set)
binders: dict[str, object] = {}
specialised: set[str] = set()  # parameters


def record(self, *args, grid, warmup, **kwargs):
    """In place of ``JITFunction.run``."""
    name = self.fn.__name__
    if name not in binders:
        for parameter in self.params:
            if parameter.name in specialised:
                parameter.do_not_specialize = False
        binders[name] = jit.create_function_from_signature(self.signature, self.params, BACKEND)
    _, specialization, options = binders[name](*args, **kwargs, debug=False)
    keys[name].add(repr((specialization, options)))


def every_kernel(n: int, n_classes: int, d: int, bias: torch.Tensor, weight: torch.Tensor) -> None:
    """One launch of each kernel for a batch of n rows."""
    features, target = torch.zeros(n, d, dtype=torch.bfloat16), torch.zeros(n, dtype=torch.int64)
    logits, ones = torch.zeros(n, n_classes), torch.zeros(n)
    z, square = target_logit.target_logit(target, n_classes, features=features, weight=weight, bias=bias)
    partials, _ = statistics(features, weight, bias, target)
    finalize(partials, z, square, target, n_classes)
    logits_statistics(logits, target)
    r = residual(logits, target, ones)
    gram(r, features.float())
    stored = stored_rows(logits, target, features, mass=True, factors=True)
    in_units(stored[6], stored[5], stored[4], *stored[:2], stored[7])
    mean_gradient(r, features.float(), finite_rows(r, features))
    minibatch.unscored(target, stored[5], None, -100)
    minibatch.hits(logits, target, stored[5], -100)
    minibatch.weighted_sum(ones, ones[0], ones)
    projected_residuals(features, weight, bias, target, torch.zeros(n_classes, 16, dtype=torch.bfloat16))
    linear_cross_entropy.backward(ones, features, weight, bias, target, ones, ones, None)
    table = torch.zeros(n, -(-n_classes // skipped.TILE))
    skipped.backward(ones, features, weight, bias, target, ones, ones, None, table)


def main() -> None:
    """Fifty ragged batches, among them one row and a multiple of 16."""
    jit.JITFunction.run = record
    configs.architecture, configs.processors = (lambda device: "sm_90"), (lambda device: 132)
    n_classes, d = 4000, 64
    weight, bias = torch.zeros(n_classes, d, dtype=torch.bfloat16), torch.zeros(n_classes, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    sizes = [1, 16, 128, 1024, *torch.randint(1, 3000, (46,), generator=generator).tolist()]
    for parameters in (set(), {"n"}):
        specialised.update(parameters)
        keys.clear(), binders.clear()
        for n in sizes:
            every_kernel(n, n_classes, d, bias, weight)
        print(json.dumps({name: len(found) for name, found in keys.items()}))


if __name__ == "__main__":
    main()
