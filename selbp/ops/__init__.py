"""The operators: functional front over ``torch.ops.selbp.*``."""
