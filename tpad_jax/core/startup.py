"""How a command of this package begins: its memory, the compiler's flags, the signals it heeds."""

import os
import signal
from collections.abc import Callable

from absl import logging

from tpad_jax.core.memory import keep

BROKEN, UNUSABLE, STOPPED = 1, 2, 75  # exit statuses


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
