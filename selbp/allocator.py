"""The C library's allocator, and what it does to a step: glibc gives large freed blocks back to the system.

A forward that keeps its activations then takes them anew, page by page, in every step. The faults cost as much as many
operators do, and more for a backward through rows or a full step than for a forward that keeps nothing.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_KEEP = 2**31 - 1  # bytes, the greatest value of an int
_kept = False


def kept() -> bool:
    """Whether :func:`keep_freed_memory` took effect in this process."""
    return _kept


def keep_freed_memory() -> bool:
    """Tell glibc to keep the memory that this process frees, for its next allocations.

    It acts on the whole process and cannot be undone, which is why nothing calls it by itself: the process's resident
    memory then stays at its peak. Call it once, before training on a CPU. CUDA's memory has a cache of its own.

    Returns
    -------
    bool
        Whether the allocator took it; False where it is not glibc's.

    See Also
    --------
    selbp.diagnose : models seconds by whether freed memory is kept.

    Examples
    --------
    >>> import selbp
    >>> took = selbp.keep_freed_memory()  # doctest: +SKIP
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    # Some versions refuse a threshold above 32 MiB; blocks above it still go back then.
    mapped = mallopt(_MMAP_THRESHOLD, _KEEP) or mallopt(_MMAP_THRESHOLD, 32 << 20)
    global _kept
    _kept = bool(mapped and mallopt(_TRIM_THRESHOLD, _KEEP))
    return _kept
