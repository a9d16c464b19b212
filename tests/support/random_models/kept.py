"""Programs that failed once, as short as they then still failed, each under the name of its cause.

A step's choices are drawn from its seed and the tables of this folder: one whose table changed draws something else.
"""

from __future__ import annotations

from support.random_models.generator import Program, Step


def _one(name: str, seed: int, n: int, shape: tuple[int, ...], position: int = 0) -> Program:
    """A program of one step."""
    return Program(seed, n, shape, (Step(name, f"{seed}/{position}"),), True)


VECTOR, SEQUENCE, IMAGE = (12,), (3, 8), (4, 3, 3)
KEPT = {
    # A saved operand with the conjugate bit was cut to rows without it.
    "conjugate_in_einsum": _one("complex_products", 0, 3, VECTOR),
    "conjugate_left_factor": _one("complex_products", 3, 3, SEQUENCE),
    "adjoint_weight": _one("complex_vector", 20, 3, VECTOR),
    "negative_view": _one("complex_vector", 21, 3, SEQUENCE),
    "conjugate_bias": _one("complex_steps_first", 2, 3, VECTOR),
    # A write through a conjugate view of a gradient went to a copy.
    "conjugate_written_in_place": _one("complex_vector", 20275, 2, IMAGE, 6),
    # Sparse operands have no strides.
    "sparse_coo_factor": _one("batch_mixed_by_weights", 0, 3, VECTOR),
    "sparse_csr_factor": _one("batch_mixed_by_weights", 3, 3, SEQUENCE),
    # Of one sample, chosen twice, a saved operand of size 1 passed for one that broadcasts.
    "gate_of_one_sample": _one("glu", 1, 1, SEQUENCE),
    "margin_of_one_sample": _one("log", 29, 1, SEQUENCE),
    # One row has any stride: a view that n rows cannot have.
    "one_row_steps_first_attention": _one("encoder_layer", 20243, 2, VECTOR),
    "one_row_steps_first_recurrence": _one("recurrent", 23829, 2, VECTOR),
    "one_row_folded": _one("folded_independent", 20665, 2, VECTOR),
    # A sample chosen twice had two gradients, each squared, in place of their sum.
    "square_of_a_repeated_sample": _one("own_function", 338, 2, SEQUENCE),
    # A gradient without memory of its own that code in C or Python asks for.
    "numpy_of_a_gradient": _one("own_function", 46, 2, SEQUENCE),
    "list_of_a_gradient": _one("own_function", 139, 2, SEQUENCE),
    "deepcopy_of_a_gradient": _one("hook", 173, 2, SEQUENCE),
    # A cut whose output has no gradient.
    "cut_without_a_gradient": Program(63, 3, SEQUENCE, (Step("linear", "63/1"), Step("own_function", "63/0")), True),
}
