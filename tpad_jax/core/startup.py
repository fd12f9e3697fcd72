"""How a command of this package begins: its memory, the compiler's flags, the signals it heeds."""

import ctypes
import os
import platform
import signal
from collections.abc import Callable

from absl import logging

BROKEN, UNUSABLE, STOPPED = 1, 2, 75  # exit statuses
# glibc's <malloc.h>
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
# the same, said to a process before it starts
ENVIRONMENT = {'MALLOC_MMAP_MAX_': '0', 'MALLOC_TRIM_THRESHOLD_': str(2**63 - 1),
               'MALLOC_ARENA_MAX': '1'}


def begin(xla_flags: str) -> Callable[[], bool]:
    """Prepare this process; call it before numpy or jax is imported.

    Args:
      xla_flags: of the config; those in the environment stand before them, and so give way.

    Returns:
      A function that answers whether SIGINT or SIGTERM came. A second one does not wait.
    """
    logging.set_verbosity(logging.WARNING)  # jax and tfds narrate at INFO
    received = []

    def stop(number, frame):
        del frame
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {xla_flags}'.strip()
    keep()
    return lambda: bool(received)


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
