"""Freed memory stays with the process: a step's temporaries are not asked for anew every time."""

import ctypes
import platform

# glibc's <malloc.h>
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
# the same, said to a process before it starts
ENVIRONMENT = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**63 - 1),
               'MALLOC_ARENA_MAX': '1'}


def keep() -> bool:
    """Tell the C library to keep what is freed.

    Call it before numpy or jax is imported: threads that are there have arenas of their own, which
    cannot hold blocks above 64 MiB and map them.

    By default every large block is mapped and unmapped again, and the system zeroes its pages one
    by one as they are touched: over a quarter of a train step's processor time, where the step
    needs tens of megabytes for a moment. The price: the process holds its peak until it ends.

    Returns:
      Whether that could be done: on Linux with glibc.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(MMAP_MAX, 0), mallopt(TRIM_THRESHOLD, -1), mallopt(ARENA_MAX, 1)])
