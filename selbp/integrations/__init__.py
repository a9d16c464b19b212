"""Selective training inside other people's loops. Each module imports its framework when it is imported itself.

``selbp.integrations.huggingface`` for Transformers' and TRL's trainers, ``.accelerate`` and ``.lightning`` for theirs.
"""
