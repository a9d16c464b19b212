"""The cut: the identity in the forward, a choice of k rows in the backward. Start reading at ``module``."""
