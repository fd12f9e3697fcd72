"""Several processes that run the same steps: how they meet, wait for each other and stop together.

Every function is what one process needs where there is only one.
"""

import itertools
import os
import re
import signal
from collections.abc import Callable
from contextlib import contextmanager

import jax
import numpy as np
from jax.experimental import multihost_utils

from tpad_jax.errors import InputError

HOSTS = 'TPU_WORKER_HOSTNAMES'  # set on the hosts of a TPU slice, separated by commas


def join(coordinator: str = '', processes: int = 0, process: int = -1) -> None:
    """Become one of several processes; call it before anything asks jax for devices.

    From then on SIGTERM, and SIGINT as well, is heard by jax: see `together`.

    Args:
      coordinator: 'host:port' of process 0, which listens there. processes: how many there are.
      process: this one's number, from 0. Without all three a TPU slice of several hosts is known by
        its environment, and elsewhere there is one process.

    Raises:
      InputError: only some of the three are given, or they are none.
    """
    told = dict(coordinator_address=coordinator, num_processes=processes, process_id=process)
    if not coordinator and not processes and process < 0:
        if ',' not in os.environ.get(HOSTS, ''):
            return
        told = {}
    elif not re.fullmatch(r'.+:\d+', coordinator) or not 0 <= process < processes:
        raise InputError(f'--coordinator={coordinator} --processes={processes} --process={process} '
                         'name no process: give all three, HOST:PORT of process 0, how many there '
                         'are, and this one\'s number from 0')
    jax.distributed.initialize(**told)
    if jax.process_count() > 1:
        signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))


def together(stopping: Callable[[], bool]) -> Callable[[], bool]:
    """`stopping`, answered alike by all processes, which have to ask equally often.

    A signal to one of them is told to the others by jax's preemption service, and all answer True
    at the same question, one that none has asked yet. A question waits for nobody before that.
    """
    if jax.process_count() == 1:
        return stopping
    asked = itertools.count(1)
    return lambda: multihost_utils.reached_preemption_sync_point(next(asked))


@contextmanager
def one_first(name: str):
    """Process 0 goes through the body, then the others: what it leaves in files they find there."""
    if jax.process_index() > 0:
        wait(name)
    yield
    if jax.process_index() == 0:
        wait(name)


def wait(name: str) -> None:
    """Until every process is here; `name` must be the same."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agreed(values: dict[str, float]) -> dict[str, float]:
    """The numbers that process 0 has, so that what is decided by them is decided alike."""
    if jax.process_count() == 1:
        return values
    found = multihost_utils.broadcast_one_to_all(np.array(list(values.values()), np.float64)
                                                 .view(np.uint32))
    return dict(zip(values, np.asarray(found).view(np.float64).tolist(), strict=True))
