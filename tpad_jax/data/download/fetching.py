"""One picture from the web into a file: redirects, partial bodies, retries.

A body is written to `<asin>.partial` as it arrives. After a break, of the connection, of this
process or of its power, it is continued by a request of the rest (RFC 9110, section 14) that names
the body it is the rest of. Only a server that gives no parts sends it from the beginning. A whole
body is decoded by the reader of pictures that the job uses, and only then gets its name.
"""

import asyncio
import contextlib
import os
import random
import re
import ssl
from collections import Counter
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from pathlib import Path

import httpcore2
import httpx2

from tpad_jax.core.files import PARTIAL
from tpad_jax.data import images, untrusted
from tpad_jax.data.download.hosts import FetchError, Guarded, Host, Limits
from tpad_jax.data.download.journal import VALIDATOR, Begun, Journal

MAX_REDIRECTS, REDIRECTS = 5, frozenset({301, 302, 303, 307, 308})
LATER = frozenset({408, 425, 429})  # 4xx that may be answered otherwise later; so may all of 5xx
LONGEST_ANSWER = 300  # seconds from the connection to the last byte; then the rest is requested
SIDE = 16  # pixels that a body is decoded to, to check that it can be
# errors between two machines, the reason they become, and whether it is final; the first that fits
_FAILURES = (
    ((httpcore2.TimeoutException, TimeoutError), 'timeout', False),
    (httpcore2.ConnectError, 'no_connection', False),
    ((httpcore2.NetworkError, httpcore2.RemoteProtocolError, ssl.SSLError),
     'connection_broke', False),
    ((httpcore2.LocalProtocolError, httpcore2.UnsupportedProtocol), 'bad_url', True),
    ((httpx2.InvalidURL, UnicodeError), 'bad_redirect', True))
_RANGE = re.compile(r'bytes (?:([0-9]{1,12})-[0-9]{1,12}|\*)/([0-9]{1,12}|\*)')


class Fetcher:
    """Fetches pictures into a folder; one per process and folder.

    Attributes:
      sizes: bytes of bodies: 'received', and 'dropped' (of this run or an earlier one) because they
        were not a picture or could not be continued.
      requests: {status: answers}, redirects among them.
      fetched: how many pictures have their name.
    """

    def __init__(self, folder: Path, journal: Journal, limits: Limits,
                 network: httpcore2.AsyncNetworkBackend | None = None):
        """Make a fetcher.

        Args:
          folder: where pictures go.
          journal: records the answers.
          limits: of the download.
          network: makes the connections; None: to public addresses alone.
        """
        self._folder, self._journal, self._limits = folder, journal, limits
        self._pool = httpcore2.AsyncConnectionPool(
            max_connections=limits.jobs, max_keepalive_connections=limits.jobs, keepalive_expiry=15,
            network_backend=network or Guarded(),
            ssl_context=httpcore2.default_ssl_context())  # else one per connection, 20 ms each
        self._hosts = {}
        self.sizes, self.requests, self.fetched = Counter(received=0, dropped=0), Counter(), 0

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()

    async def fetch(self, asin: str, urls: tuple[str, ...]) -> Path:
        """Fetch a picture from the first of its addresses that has one.

        A final failure is in the journal when this raises.

        Args:
          asin: a checked one, as it becomes part of a path.
          urls: addresses, the preferred one first.

        Returns:
          The file, `<asin>.png` for a PNG, else `<asin>.jpg`; readers look at the content.

        Raises:
          FetchError: no address has a picture, or one may have it another time.
          OSError: the disk cannot be written any more.
        """
        failure = FetchError('without_url', final=True)
        for url in urls:
            try:
                return await self._try(asin, url)
            except FetchError as error:
                failure = error
                if not error.final:
                    break
                self._drop(self._part(asin))
                self._journal.record(asin, url, failed=error.reason)
        raise failure

    async def _try(self, asin, url):
        first, part = self._host(checked(url)), self._part(asin)
        for number in count(1):
            try:
                whole = await self._body(asin, url, number)
                # a thread decodes and waits for the disk, so that other bodies do not wait
                path = await asyncio.to_thread(_give_name, part, self._folder / asin)
                if not isinstance(path, untrusted.Reason):
                    break
                self._drop(part)
                # a damaged picture may have lost its end, or been put together of two
                raise FetchError(path, final=whole or path != images.DAMAGED)
            except FetchError as error:
                if error.final or first.closed or number == self._limits.tries:
                    first.count(answered=error.final)
                    raise
                await asyncio.sleep(self._backoff(number))
        first.count(answered=True)
        self.fetched += 1
        self._journal.record(asin, url, file=path.name, size=path.stat().st_size)
        return path

    async def _body(self, asin, url, number) -> bool:
        """Complete the partial file of a body; True if the body certainly is as it was sent."""
        part, begun = self._part(asin), self._journal.begun.get(asin)
        have = _size(part)
        if begun is None or begun.url != url or not 0 < have <= (begun.size or have):
            begun, have = None, self._drop(part)
        elif have == begun.size:
            return False
        rest = {'Range': f'bytes={have}-'} if have else {}
        if have and begun.validator:
            rest['If-Range'] = begun.validator
        address = httpx2.URL(url)
        for _ in range(1 + MAX_REDIRECTS):
            host = self._host(checked(address))
            async with host.turn():
                with _as_fetch_errors():
                    async with (asyncio.timeout(LONGEST_ANSWER),
                                self._answer(address, rest) as answer):
                        status, headers = answer.status, httpx2.Headers(answer.headers)
                        self.requests[status] += 1
                        if status in (429, 503):
                            wanted = seconds(headers.get('retry-after', ''))
                            host.hold(wanted or self._backoff(number))
                        if status in (200, 206, 416):
                            return await self._take(asin, url, answer, headers, have, begun)
                        if status not in REDIRECTS or 'location' not in headers:
                            final = status < 500 and status not in LATER
                            raise FetchError(f'status_{status}', final)
                        address = address.join(headers['location'])
        raise FetchError('too_many_redirects', final=True)

    def _answer(self, address: httpx2.URL, headers: dict):
        """The context of one request, which yields its answer before the body is read."""
        url = httpcore2.URL(scheme=address.raw_scheme, host=address.raw_host, port=address.port,
                            target=address.raw_path)
        headers = {'Host': address.netloc, 'User-Agent': self._limits.user_agent,
                   'Accept': 'image/*', 'Accept-Encoding': 'identity', **headers}
        timeouts = dict.fromkeys(('connect', 'read', 'write'), self._limits.timeout)
        return self._pool.stream('GET', url, headers=headers, extensions={'timeout': timeouts})

    async def _take(self, asin, url, answer, headers, have, begun) -> bool:
        part, limit = self._part(asin), self._limits.max_bytes
        if headers.get('content-encoding', 'identity') not in ('', 'identity'):
            raise FetchError('packed_body', final=True)
        if answer.status == 200:
            start, size = self._drop(part), _whole_number(headers.get('content-length', ''))
            begun = Begun(url, _validator(headers), size)
        else:  # the rest of a body, or 416: there is none
            match = _RANGE.fullmatch(headers.get('content-range', ''))
            start, size = (_whole_number(text or '') for text in match.groups()) if match else (
                None, None)
            fits = have and begun.size in (None, size) and start in (None, have)
            if not fits or (start is None and size != have):
                self._drop(part)
                raise FetchError('no_such_part', final=False)
            if start is None:
                return False
        if size is not None and size > limit:
            raise FetchError('too_large', final=True)
        if start == 0:
            self._journal.record(asin, **begun._asdict())
        written = start
        with _open(part) as file:
            async for data in answer.aiter_stream():
                self.sizes['received'] += len(data)
                written += len(data)
                if written > limit:
                    self.sizes['dropped'] += len(data)
                    raise FetchError('too_large', final=True)
                while data:  # unbuffered, so that a kill loses nothing that came
                    data = data[file.write(data):]
        if size is not None and written != size:
            raise FetchError('cut_short', final=False)
        return start == 0 and (size is not None
                               or 'chunked' in headers.get('transfer-encoding', ''))

    def _backoff(self, number):
        return self._limits.backoff * 2 ** (number - 1) * random.uniform(0.75, 1.25)

    def _host(self, url):
        return self._hosts.setdefault(url.host, Host(self._limits))

    def _part(self, asin):
        return self._folder / f'{asin}{PARTIAL}'

    def _drop(self, part) -> int:
        """Remove a partial file; returns 0, the bytes that remain."""
        self.sizes['dropped'] += _size(part)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            part.unlink()
        return 0


@contextlib.contextmanager
def _as_fetch_errors():
    """Turn what goes wrong between two machines into FetchError."""
    try:
        yield
    except Exception as error:
        if 'CERTIFICATE_VERIFY_FAILED' in str(error):  # httpcore keeps no cause
            raise FetchError('bad_certificate', final=False) from error
        for errors, reason, final in _FAILURES:
            if isinstance(error, errors):
                raise FetchError(reason, final) from error
        raise


def checked(url: str | httpx2.URL) -> httpx2.URL:
    """Parse an address and check its form.

    Args:
      url: as it is written.

    Returns:
      The address.

    Raises:
      FetchError: neither http nor https, or malformed.
    """
    try:
        url = httpx2.URL(url)
    except (httpx2.InvalidURL, UnicodeError, ValueError) as error:
        raise FetchError('bad_url', final=True) from error
    if url.scheme not in ('http', 'https'):
        raise FetchError('not_http', final=True)
    if not url.host or url.userinfo or not 0 < (url.port or 80) < 2**16:
        raise FetchError('bad_url', final=True)
    return url


def seconds(retry_after: str) -> float:
    """Read a Retry-After header.

    Args:
      retry_after: seconds, or a date.

    Returns:
      Seconds from now on, 0 if it holds neither.
    """
    if (number := _whole_number(retry_after)) is not None:
        return number
    try:
        return max((parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds(), 0)
    except (TypeError, ValueError, OverflowError):  # not a date, or one without time zone
        return 0


def _validator(headers: httpx2.Headers) -> str | None:
    """The header that tells this body from others of its address; a weak tag does not."""
    return next((value for name in ('etag', 'last-modified')
                 if VALIDATOR.fullmatch(value := headers.get(name, ''))), None)


def _whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r'[0-9]{1,12}', text) else None


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() and not part.is_symlink() else 0


def _open(part: Path):
    """Open a partial file to append to it; links and pipes were dropped before."""
    if part.is_dir():
        raise FetchError('part_is_no_file', final=False)
    return open(part, 'ab', buffering=0)


def _give_name(part: Path, stem: Path) -> Path | untrusted.Reason:
    """Rename a whole body to its picture's name; the reason where it is not a picture."""
    data = part.read_bytes()
    pixels = images.read(data, SIDE)
    if isinstance(pixels, untrusted.Reason):
        return pixels
    with open(part, 'rb') as file:
        os.fsync(file.fileno())
    path = stem.with_name(stem.name + ('.png' if data.startswith(b'\x89PNG') else '.jpg'))
    os.replace(part, path)
    return path
