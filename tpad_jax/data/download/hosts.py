"""Limits of a download: which addresses it connects to, and when a host may be asked.

A name in a catalogue, or in a redirect, can lead into the private network that this program runs
in. Each connection resolves its name once, checks the addresses, and connects to a checked one. So
a name cannot be checked as one address and used as another.
"""

import asyncio
import contextlib
import ipaddress
import socket
import time
from collections import namedtuple

import httpcore2

from tpad_jax.data import images, untrusted

LONGEST_HOLD = 600  # seconds; a host that asks for a longer pause is left for another run
GIVE_UP = 20  # pictures of a host without an answer, in a row; then it is left for another run

# IPv6 that carries an IPv4 address: translated, and in the first 96 bits zero
_NAT64 = ipaddress.ip_network('64:ff9b::/96')


# limits of a download: default, smallest and largest value, meaning
OPTIONS = {
    'jobs': (16, 1, 256, 'requests at once'),
    'per_host': (4, 1, 256, 'requests at once to one host'),
    'pause': (0.05, 0, 1e9, 'seconds between the starts of two requests to one host'),
    'timeout': (20.0, 0.01, 1e9, 'seconds without a byte'),
    'tries': (4, 1, 1000, 'tries of an address after a time-out or a status 5xx'),
    'backoff': (1.0, 0, 1e9, 'seconds before the second try, doubled before each later one'),
    'max_bytes': (images.MAX_BYTES, 1, images.MAX_BYTES,
                  'largest size of a picture; the job reads no larger ones'),
    'user_agent': ('tpad_jax/0.1.0', 'name of the client, with your address for questions'),
}
Limits = namedtuple('Limits', OPTIONS, defaults=[default for default, *_ in OPTIONS.values()])


class FetchError(Exception):
    """There is no picture.

    Attributes:
      reason: why.
      final: whether another request would be answered likewise.
    """

    def __init__(self, reason: str, final: bool):
        """Make an error of a reason that is `final` or not."""
        super().__init__(reason)
        self.reason, self.final = untrusted.Reason(reason), final


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


def is_public(address: str) -> bool:
    """Check whether an IP address belongs to the public internet.

    Private, shared, loopback, link-local, multicast and reserved addresses do not, nor an IPv6
    address that carries such an IPv4 one (mapped, 6to4, Teredo, NAT64).

    Args:
      address: IPv4 or IPv6, with or without a zone (fe80::1%eth0).

    Returns:
      Whether it is public.

    Raises:
      ValueError: not an IP address.
    """
    ip = ipaddress.ip_address(address.partition('%')[0])
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xffff_ffff)
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    # the properties overlap, and the ranges of each differ between releases of Python
    return ip.is_global and not (ip.is_private or ip.is_reserved or ip.is_multicast
                                 or ip.is_loopback or ip.is_link_local or ip.is_unspecified)


async def resolve(host: str, port: int) -> list[str]:
    """Look up the IP addresses of a name.

    Args:
      host: a name, or an address in any spelling.
      port: of the service.

    Returns:
      Different addresses in the system's order.
    """
    entries = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(address[0] for *_, address in entries))


class Guarded(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses alone."""

    def __init__(self, allow_private: bool = False,
                 inner: httpcore2.AsyncNetworkBackend | None = None):
        """Make a guard.

        Args:
          allow_private: connect to any address.
          inner: makes the connections; None: AnyIO.
        """
        self._allow_private, self._inner = allow_private, inner or httpcore2.AnyIOBackend()

    async def connect_tcp(self, host, port, timeout=None, local_address=None,
                          socket_options=None) -> httpcore2.AsyncNetworkStream:
        """Connect to the first permitted address of `host` that answers.

        Args:
          host: name or address.
          port: of the service.
          timeout: seconds.
          local_address: as httpcore gives it.
          socket_options: as httpcore gives them.

        Raises:
          FetchError: the name has no address, not in time, or none that is permitted.
          httpcore2.ConnectError: none of its addresses answers.
          httpcore2.ConnectTimeout: the same, in time.
        """
        try:
            async with asyncio.timeout(timeout):
                addresses = await resolve(host, port)
        except (OSError, UnicodeError) as error:  # no such name, or no resolver
            late = isinstance(error, TimeoutError)
            raise FetchError('timeout' if late else 'no_connection', final=False) from error
        allowed = [address for address in addresses if self._allow_private or is_public(address)]
        if not allowed:
            raise FetchError('address_refused', final=True)
        for address in allowed:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address,
                                                     socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure
