"""The parts of ``scripts/gpu_check.py``, a module each with ``run(results, device, tiny)``."""
