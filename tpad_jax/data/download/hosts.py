"""What a download keeps to, and when a host may be asked."""

import asyncio
import contextlib
import time
from typing import NamedTuple

from tpad_jax.data import images
from tpad_jax.data.untrusted import Reason

LONGEST_HOLD = 600  # seconds; a host that wants more is left for another run
GIVE_UP = 20  # pictures of a host in a row without an answer; the others are left for another run


class Limits(NamedTuple):
    """What a download keeps to; seconds and bytes."""

    jobs: int = 16  # requests at once
    per_host: int = 4  # of them to one host
    pause: float = 0.05  # between the beginnings of two requests to one host
    timeout: float = 20.0  # without a byte
    tries: int = 4  # of an address, where time-outs and 5xx are no answer
    backoff: float = 1.0  # before the second try; twice that before the third
    max_bytes: int = images.MAX_BYTES  # of a picture
    user_agent: str = 'tpad_jax/0.1.0'


class Failed(Exception):
    """No picture: `reason`, and whether another request would be answered likewise (`final`)."""

    def __init__(self, reason: str, final: bool):
        super().__init__(reason)
        self.reason, self.final = Reason(reason), final


class Host:
    """When one host may be asked.

    Attributes:
      closed: the reason why it is asked no more by this process, '' while it is.
    """

    def __init__(self, limits: Limits):
        self._slots, self._pause = asyncio.Semaphore(limits.per_host), limits.pause
        self._next, self._unanswered, self.closed = 0.0, 0, ''

    @contextlib.asynccontextmanager
    async def turn(self):
        """Waits until it may be asked, and counts as one request until it is left.

        Raises:
          Failed: it is closed.
        """
        async with self._slots:
            while not self.closed and (wait := self._next - time.monotonic()) > 0:
                await asyncio.sleep(min(wait, 1.0))
            if self.closed:
                raise Failed(self.closed, final=False)
            self._next = time.monotonic() + self._pause
            yield

    def hold(self, seconds: float) -> None:
        """It wants to be left alone for so long."""
        if seconds > LONGEST_HOLD:
            self.closed = 'host_wants_a_pause'
        self._next = max(self._next, time.monotonic() + min(seconds, LONGEST_HOLD))

    def answered(self, whether: bool) -> None:
        """What became of a picture there, all tries together: any answer counts, a refusal too."""
        self._unanswered = 0 if whether else self._unanswered + 1
        if self._unanswered >= GIVE_UP:
            self.closed = 'host_given_up'
