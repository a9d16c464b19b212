"""Load the native core, or say why it cannot be loaded."""

import torch  # noqa: F401  (first: the native core binds to the OpenMP runtime that torch has loaded)

from selbp._sources import stale

try:
    import selbp._native
except ImportError as error:
    if str(error).startswith("SELBP_CPU_LEVEL"):
        raise
    raise ImportError(
        "selbp's native extension is not built. Install the package (`pip install .` in the project's folder, or "
        f"`pip install -e .` to develop) and import it from there. The import said: {error}"
    ) from error
if _stale := stale(getattr(selbp._native, "SOURCES", "")):
    raise ImportError(_stale)
