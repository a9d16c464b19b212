"""numpy's types, for `isinstance`: empty where numpy is not installed, for nothing in the library needs it."""

from __future__ import annotations

from typing import Any

ARRAYS: Any = ()
BOOLS: Any = (bool,)
FLOATS: Any = (float,)
try:
    import numpy
except ImportError:
    pass
else:
    ARRAYS, BOOLS, FLOATS = (numpy.ndarray,), (bool, numpy.bool_), (float, numpy.floating)
