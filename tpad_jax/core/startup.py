"""Start of a process that computes: memory, environment, compiler flags and signals."""

import contextlib
import ctypes
import gc
import os
import platform
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from absl import logging

from tpad_jax.errors import InputError

# parameters of mallopt in glibc's <malloc.h>
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
LARGE_BLOCK, MAPPINGS = 2**25, 2**16  # bytes of a block that is mapped by itself, and how many are
HUGE_PAGES = 14  # MADV_HUGEPAGE of Linux's <sys/mman.h>
OFF = ('', '0', 'false', 'f', 'no', 'n', 'off')
# Variables of jax that change the types of results or forbid what every run does, and their only
# usable values in lower case. All parameters, features and checkpoints are 32 bits wide; libraries
# below rely on promotion.
REQUIRED = {
    **dict.fromkeys(('JAX_ENABLE_X64', 'JAX_NO_EXECUTION', 'JAX_NO_TRACING'), OFF),
    'JAX_NUMPY_DTYPE_PROMOTION': ('', 'standard'),
    'JAX_NUMPY_RANK_PROMOTION': ('', 'allow', 'warn'),
    **{f'JAX_TRANSFER_GUARD{way}': ('', 'allow', 'log', 'log_explicit')
       for way in ('', '_HOST_TO_DEVICE', '_DEVICE_TO_HOST', '_DEVICE_TO_DEVICE')},
    **{f'JAX_ERROR_CHECKING_BEHAVIOR_{what}': ('', 'ignore') for what in ('NAN', 'DIVIDE', 'OOB')}}

CACHE = 'JAX_COMPILATION_CACHE_DIR'
THREADS = 4  # threads at most next to a run's main one: each may hold a training's activations


def begin(xla_flags: str = '') -> Callable[[], bool]:
    """Prepare this process and listen to signals. Call it before numpy or jax is imported.

    Args:
      xla_flags: of the config. Flags in the environment come first, so the config's win.

    Returns:
      A function that returns whether SIGINT or SIGTERM came. A second signal ends the process.

    Raises:
      InputError: as in `prepare`.
    """
    received = []

    def stop(number, frame):
        del frame
        received.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    prepare(xla_flags)
    return lambda: bool(received)


def prepare(xla_flags: str = '') -> None:
    """Prepare this process to compute. Call it before numpy or jax is imported.

    Args:
      xla_flags: of the config. Flags in the environment come first, so the config's win.

    Raises:
      InputError: the environment sets jax to types that this package does not compute with.
    """
    check_environment()
    logging.set_verbosity(logging.WARNING)  # jax and tensorflow_datasets log much at INFO
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA logs from C++
    os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {xla_flags}'.strip()
    share_cores()
    cache_compilations()
    # tracing makes millions of objects that live on: do not look through them again and again
    gc.set_threshold(100_000, 50, 100)
    keep_memory()


def cores() -> int:
    """Count the processor cores that this process may use."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
            else os.cpu_count() or 1)


def share_cores() -> None:
    """Let numpy's products use a part of the cores, unless OPENBLAS_NUM_THREADS is set.

    A run computes in up to 1 + THREADS threads at once, and those of OpenBLAS wait for one another
    by spinning: on two cores that doubles the processor time of baselines that compute in numpy.
    """
    os.environ.setdefault('OPENBLAS_NUM_THREADS', str(max(1, cores() // (1 + THREADS))))


def cache_compilations() -> None:
    """Keep compiled programs in the user's cache directory, where the next process finds them.

    JAX_COMPILATION_CACHE_DIR names another directory; set to nothing, it turns the cache off. If
    the directory cannot be written, there is no cache.
    """
    if CACHE in os.environ:
        return
    directory = Path(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'tpad_jax')
    with contextlib.suppress(OSError):
        directory.mkdir(parents=True, exist_ok=True)
    if os.access(directory, os.W_OK):
        os.environ[CACHE] = str(directory)
        # jax's own limit is a second, which half of a run's programs stay below
        os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.2')


def check_environment(names: Iterable[str] = REQUIRED) -> None:
    """Refuse environment variables of jax with which this package cannot compute.

    Args:
      names: of the variables to check.

    Raises:
      InputError: naming the variable.
    """
    for name in names:
        value, usable = os.environ.get(name, ''), REQUIRED[name]
        if value.lower() not in usable:
            raise InputError(f'{name}={value!r}: this package computes in 32 bits, with the usual '
                             'promotion of types and without guards. Expected '
                             f'{usable[1]}. Fix: unset {name}')


def keep_memory() -> bool:
    """Let the C library keep memory that is freed. Call it before numpy or jax is imported.

    By default glibc maps and unmaps every large block, and the system zeroes its pages one by one
    as they are touched. That takes over a quarter of the processor time of a train step, which
    needs tens of megabytes for a moment. The price: the process holds its peak until it ends.
    Threads keep their own arenas: with a single one, stages that train and compile at the same time
    wait for its lock, and take a seventh more time and twice the memory.

    The heap is also extended by a quarter of the memory, of which no page is touched, and its pages
    may be huge: steps that pass over large tables spend a seventh of their time on small ones.

    Returns:
      Whether the C library was set: True on Linux with glibc.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    done = all([libc.mallopt(MMAP_MAX, 0), libc.mallopt(TRIM_THRESHOLD, -1)])
    page, size = os.sysconf('SC_PAGE_SIZE'), os.sysconf('SC_PHYS_PAGES') // 4
    if room := libc.malloc(ctypes.c_size_t(size * page)):
        # a kernel without huge pages refuses, which changes nothing
        libc.madvise(ctypes.c_void_p(-(-room // page) * page), ctypes.c_size_t((size - 1) * page),
                     HUGE_PAGES)
        libc.free(ctypes.c_void_p(room))
    return done


def return_memory() -> bool:
    """Let the C library return what was freed, and large blocks as soon as they are freed.

    It ends what `keep_memory` began, for tables of a gigabyte: of these the heap would keep several
    that are not used any more, and mapping them takes little time next to filling them.

    Returns:
      Whether the C library was set, as in `keep_memory`.
    """
    if platform.libc_ver()[0] != 'glibc':
        return False
    libc = ctypes.CDLL(None)
    done = all([libc.mallopt(MMAP_MAX, MAPPINGS), libc.mallopt(MMAP_THRESHOLD, LARGE_BLOCK),
                libc.mallopt(TRIM_THRESHOLD, LARGE_BLOCK)])
    libc.malloc_trim(0)
    return done
