"""The operators that training uses, from one place."""

from selbp.ops import cross_entropy_statistics, gradient_gram, matching_residual, mean_gradient, residual

__all__ = ["cross_entropy_statistics", "gradient_gram", "matching_residual", "mean_gradient", "residual"]
