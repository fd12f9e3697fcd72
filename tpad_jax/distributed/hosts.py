"""Several processes that run the same steps: how they meet, wait for each other and stop together.

With one process, every function does what that process needs.
"""

import itertools
import json
import os
import re
import signal
from collections.abc import Callable
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from tpad_jax.errors import InputError, Stopped

HOSTS = 'TPU_WORKER_HOSTNAMES'  # set on the hosts of a TPU slice, separated by commas
REPORT = 4096  # bytes in which a process reports how its block ended
SHOWN = 400  # characters of an error message; JSON needs at most 6 bytes for each


def join(coordinator: str = '', processes: int = 0, process: int = -1) -> None:
    """Become one of several processes. Call this before JAX looks for devices.

    JAX then handles SIGTERM and SIGINT, see `together`. Without arguments, the environment of a TPU
    slice with several hosts names the processes; elsewhere there is one process.

    Args:
      coordinator: 'host:port' where process 0 listens.
      processes: number of processes.
      process: number of this process, from 0.

    Raises:
      InputError: some arguments are missing, or they are out of range.
    """
    options = dict(coordinator_address=coordinator, num_processes=processes, process_id=process)
    if not coordinator and not processes and process < 0:
        if ',' not in os.environ.get(HOSTS, ''):
            return
        options = {}
    elif not re.fullmatch(r'.+:\d+', coordinator) or not 0 <= process < processes:
        raise InputError(f'--coordinator={coordinator!r} --processes={processes} '
                         f'--process={process}: these do not name a process. Expected HOST:PORT of '
                         'process 0, their number and that of this one from 0. Fix: give all three')
    jax.distributed.initialize(**options)
    if jax.process_count() > 1:
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def together(stopping: Callable[[], bool]) -> Callable[[], bool]:
    """Make all processes stop at the same question.

    JAX's preemption service sends a signal that one process received to the others. It chooses a
    question that no process has asked yet, and every process answers True to that one. Earlier
    questions do not wait for other processes.

    Args:
      stopping: whether this process should stop. Returned unchanged with one process.

    Returns:
      The function to ask. Every process must call it equally often.
    """
    if jax.process_count() == 1:
        return stopping
    questions = itertools.count(1)
    return lambda: multihost_utils.reached_preemption_sync_point(next(questions))


@contextmanager
def joined(name: str):
    """Run the block in every process, then wait for the others.

    Args:
      name: of the meeting, the same in every process.

    Raises:
      InputError: the block raised an error in another process.
      Stopped: the block was stopped in another process.
    """
    try:
        yield
    except BaseException as error:
        _meet(name, error)
        raise
    _meet(name)


@contextmanager
def one_first(name: str):
    """Run the block in process 0, then in the others, which read the files that process 0 wrote.

    Args:
      name: of the meeting, the same in every process.

    Raises:
      InputError: the block raised an error in another process.
      Stopped: the block was stopped in another process.
    """
    first, others = jax.process_index() == 0, f'{name}, other processes'
    if not first:
        _meet(name)
    with joined(name if first else others):
        yield
    if first:
        _meet(others)


def _meet(name: str, error: BaseException | None = None) -> None:
    """Exchange how a block ended. Without an error here, raise that of another process."""
    if jax.process_count() == 1:
        return
    kind = '' if error is None else type(error).__name__
    report = json.dumps([name, kind, str(error)[:SHOWN]], ensure_ascii=False)
    report = report.encode(errors='replace').ljust(REPORT)
    reports = multihost_utils.process_allgather(np.frombuffer(report, np.uint8))
    if error is not None:
        return
    for process, row in enumerate(np.asarray(reports)):
        other, kind, message = json.loads(row.tobytes())
        if other != name:
            raise RuntimeError(f'process {process} is at {other!r} and this one at {name!r}')
        if kind in ('Stopped', 'KeyboardInterrupt'):
            raise Stopped(f'process {process} stopped in {name!r}: {message}')
        if kind:
            raise InputError(f'process {process} failed in {name!r}: {kind}: {message}. Fix: '
                             'correct this and start all processes again')


def wait(name: str) -> None:
    """Wait until every process calls this with the same name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(values: dict[str, float]) -> dict[str, float]:
    """Return the numbers of process 0, so that all processes decide alike.

    Args:
      values: numbers by name, with the same names in every process.
    """
    if jax.process_count() == 1:
        return values
    numbers = np.array(list(values.values()), np.float64)
    shared = multihost_utils.broadcast_one_to_all(numbers.view(np.uint32))
    return dict(zip(values, np.asarray(shared).view(np.float64).tolist(), strict=True))
