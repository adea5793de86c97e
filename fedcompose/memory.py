"""Memory for pieces of megabytes: taken from the system once, and used again.

Left alone, the C library returns a large piece to the system when it is freed. The next one then costs a page fault
every 4 KiB, many times what copying its bytes costs, and a contribution is copied some thirty times on its way.
"""

from __future__ import annotations

import ctypes

# Of glibc's malloc.h; for others this module does nothing.
TRIM_THRESHOLD, MMAP_THRESHOLD, ARENAS = -1, -3, -8
KEPT_BYTES = 64 << 20  # free memory that is not given back
LARGE_BYTES = 32 << 20  # the most that glibc lets stay; as large as a window of a contribution


def reuse_freed_memory() -> None:
    """Call this before there are threads: all are to share what one of them has freed."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(ARENAS, 1)
        libc.mallopt(MMAP_THRESHOLD, LARGE_BYTES)
        libc.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
