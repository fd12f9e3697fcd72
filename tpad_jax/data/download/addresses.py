"""Which addresses may be asked, said of the very address that is connected to.

A name in a catalogue, or one that a server redirects to, can lead into the network that the program
runs in. It is resolved here, once per connection, and what it gave is what is connected to, so that
a name cannot be looked at as one address and used as another.
"""

import asyncio
import ipaddress
import socket

import httpcore2

# IPv6 that carries an IPv4 address: translated, and in the first 96 bits zero
_NAT64 = ipaddress.ip_network('64:ff9b::/96')


class Refused(Exception):
    """A name that leads to no address that may be asked."""


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet at large.

    Not so are private, shared, loopback, link-local, multicast and reserved ones, nor an IPv6
    address that stands for such an IPv4 one (mapped, 6to4, Teredo, NAT64).

    Raises:
      ValueError: it is no IP address.
    """
    ip = ipaddress.ip_address(address.partition('%')[0])  # fe80::1%eth0
    if ip.version == 6:
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xffff_ffff)
        if inner:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    # the properties overlap, and which ranges each holds differs between releases of Python
    return ip.is_global and not (ip.is_private or ip.is_reserved or ip.is_multicast
                                 or ip.is_loopback or ip.is_link_local or ip.is_unspecified)


async def resolve(host: str, port: int) -> list[str]:
    """The IP addresses of a name, as the system gives them; of an address in any spelling, it."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(address[0] for *_, address in found))


class Guarded(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses alone; the hook that httpcore has for it."""

    def __init__(self, allow_private: bool = False,
                 inner: httpcore2.AsyncNetworkBackend | None = None):
        self._allow_private, self._inner = allow_private, inner or httpcore2.AnyIOBackend()

    async def connect_tcp(self, host, port, timeout=None, local_address=None,
                          socket_options=None) -> httpcore2.AsyncNetworkStream:
        """The first address of `host` that may be asked and answers.

        Raises:
          Refused: none of its addresses may. httpcore2.ConnectError, ConnectTimeout: the name has
            none, or none answers.
        """
        try:
            async with asyncio.timeout(timeout):
                addresses = await resolve(host, port)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(f'{host}: no answer about this name') from error
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f'{host}: no such name') from error
        allowed = [one for one in addresses if self._allow_private or is_public(one)]
        if not allowed:
            raise Refused(f'{host} is {", ".join(addresses)}')
        for address in allowed:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address,
                                                     socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if address == allowed[-1]:
                    raise
        raise AssertionError('not reached')
