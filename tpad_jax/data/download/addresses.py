"""The transport of the downloader: it connects to public addresses alone.

A name in a catalogue, or in a redirect, can lead into the private network that this program runs
in. Each connection resolves its name once, checks the addresses, and connects to a checked one. So
a name cannot be checked as one address and used as another.
"""

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator

import httpcore2
import httpx2

# IPv6 that carries an IPv4 address: translated, and in the first 96 bits zero
_NAT64 = ipaddress.ip_network('64:ff9b::/96')


class RefusedAddressError(Exception):
    """A name has no address that may be connected to."""


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
          RefusedAddressError: none of its addresses is permitted.
          httpcore2.ConnectError: the name has no address, or none answers.
          httpcore2.ConnectTimeout: the same, in time.
        """
        try:
            async with asyncio.timeout(timeout):
                addresses = await resolve(host, port)
        except TimeoutError as error:
            raise httpcore2.ConnectTimeout(f'{host}: the name was not resolved in time') from error
        except (OSError, UnicodeError) as error:
            raise httpcore2.ConnectError(f'{host}: no such name') from error
        allowed = [address for address in addresses if self._allow_private or is_public(address)]
        if not allowed:
            raise RefusedAddressError(f'{host} is {", ".join(addresses)}')
        for address in allowed:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address,
                                                     socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                if address == allowed[-1]:
                    raise
        raise AssertionError('not reached')


class Transport(httpx2.AsyncBaseTransport):
    """Carries the requests of an httpx2 client over a network backend, which httpx2 cannot set."""

    def __init__(self, network: httpcore2.AsyncNetworkBackend, connections: int):
        """Make a transport.

        Args:
          network: makes the connections.
          connections: the most at once.
        """
        self._pool = httpcore2.AsyncConnectionPool(
            max_connections=connections, max_keepalive_connections=connections,
            keepalive_expiry=15, network_backend=network,
            ssl_context=httpcore2.default_ssl_context())  # else one per connection, 20 ms each

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request; its errors are httpcore2's.

        Args:
          request: of the client.

        Returns:
          The response, whose body is not read yet.
        """
        url = request.url
        response = await self._pool.handle_async_request(httpcore2.Request(
            request.method, httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port,
                                          target=url.raw_path),
            headers=request.headers.raw, content=request.stream, extensions=request.extensions))
        return httpx2.Response(response.status, headers=response.headers,
                               stream=_Body(response), extensions=response.extensions)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()


class _Body(httpx2.AsyncByteStream):
    """The body of a response, as httpx2 reads it."""

    def __init__(self, response: httpcore2.Response):
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async with contextlib.aclosing(self._response.aiter_stream()) as stream:
            async for data in stream:
                yield data

    async def aclose(self) -> None:
        await self._response.aclose()
