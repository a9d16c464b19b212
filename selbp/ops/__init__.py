"""The operators: functional front over ``torch.ops.selbp.*``."""

from selbp.ops.gram import gradient_gram

__all__ = ["gradient_gram"]
