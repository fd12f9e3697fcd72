"""Limits of a download, and when a host may be asked."""

import asyncio
import contextlib
import time
from typing import NamedTuple

from tpad_jax.data import images
from tpad_jax.data.untrusted import Reason

LONGEST_HOLD = 600  # seconds; a host that asks for a longer pause is left for another run
GIVE_UP = 20  # pictures of a host without an answer, in a row; then it is left for another run


class Limits(NamedTuple):
    """Limits of a download.

    Attributes:
      jobs: requests at once.
      per_host: requests at once to one host.
      pause: seconds between the starts of two requests to one host.
      timeout: seconds without a byte.
      tries: of an address, where a time-out or 5xx came.
      backoff: seconds before the second try, doubled before each later one.
      max_bytes: of a picture.
      user_agent: name of the client.
    """

    jobs: int = 16
    per_host: int = 4
    pause: float = 0.05
    timeout: float = 20.0
    tries: int = 4
    backoff: float = 1.0
    max_bytes: int = images.MAX_BYTES
    user_agent: str = 'tpad_jax/0.1.0'


class FetchError(Exception):
    """There is no picture.

    Attributes:
      reason: why.
      final: whether another request would be answered likewise.
    """

    def __init__(self, reason: str, final: bool):
        """Make an error of a reason that is `final` or not."""
        super().__init__(reason)
        self.reason, self.final = Reason(reason), final


class Host:
    """When one host may be asked.

    Attributes:
      closed: the reason why this process asks it no more, '' while it does.
    """

    def __init__(self, limits: Limits):
        """Make a host that may be asked at once."""
        self._slots, self._pause = asyncio.Semaphore(limits.per_host), limits.pause
        self._next, self._unanswered, self.closed = 0.0, 0, ''

    @contextlib.asynccontextmanager
    async def turn(self):
        """Wait until the host may be asked; the block counts as one request.

        Raises:
          FetchError: it is closed.
        """
        async with self._slots:
            while not self.closed and (wait := self._next - time.monotonic()) > 0:
                await asyncio.sleep(min(wait, 1.0))
            if self.closed:
                raise FetchError(self.closed, final=False)
            self._next = time.monotonic() + self._pause
            yield

    def hold(self, seconds: float) -> None:
        """Ask the host no more for so many seconds, or in this run if they are too many."""
        if seconds > LONGEST_HOLD:
            self.closed = 'host_wants_a_pause'
        self._next = max(self._next, time.monotonic() + min(seconds, LONGEST_HOLD))

    def count(self, answered: bool) -> None:
        """Count one picture, all tries together; any answer counts, a refusal too."""
        self._unanswered = 0 if answered else self._unanswered + 1
        if self._unanswered >= GIVE_UP:
            self.closed = 'host_given_up'
