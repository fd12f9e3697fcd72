"""One picture from the web into a file: redirects, partial bodies, retries.

A body is written to `<asin>.partial` as it arrives. After a break, of the connection, of this
process or of its power, it is continued by a request of the rest (RFC 9110, section 14) that names
the body it is the rest of. Only a server that gives no parts sends it from the beginning. A whole
body is decoded by the reader of pictures that the job uses, and only then gets its name.
"""

import asyncio
import contextlib
import errno
import os
import random
import re
import ssl
from collections import Counter
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import httpcore2
import httpx2

from tpad_jax.core.files import PARTIAL
from tpad_jax.data import images
from tpad_jax.data.download.addresses import Guarded, RefusedAddressError, Transport
from tpad_jax.data.download.hosts import FetchError, Host, Limits
from tpad_jax.data.download.journal import VALIDATOR, Begun, Journal
from tpad_jax.data.untrusted import Reason
from tpad_jax.errors import UNWRITABLE

MAX_REDIRECTS = 5
LATER = frozenset({408, 425, 429})  # 4xx that may be answered otherwise later; so may all of 5xx
LONGEST_ANSWER = 300  # seconds from the connection to the last byte; then the rest is requested
SIDE = 16  # pixels that a body is decoded to, to check that it can be
_RANGE = re.compile(r'bytes (?:([0-9]{1,12})-[0-9]{1,12}|\*)/([0-9]{1,12}|\*)')


class Fetcher:
    """Fetches pictures into a folder; one per process and folder.

    Attributes:
      sizes: bytes of bodies: 'received', and 'dropped' (of this run or an earlier one) because they
        were not a picture or could not be continued.
      requests: {status: answers}, redirects among them.
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
        self._client = httpx2.AsyncClient(
            transport=Transport(network or Guarded(), limits.jobs),
            timeout=httpx2.Timeout(limits.timeout, pool=None),
            headers={'User-Agent': limits.user_agent, 'Accept': 'image/*',
                     'Accept-Encoding': 'identity'})
        self._hosts = {}
        self.sizes, self.requests = Counter(received=0, dropped=0), Counter()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

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
                self._journal.fail(asin, url, error.reason)
        raise failure

    async def _try(self, asin, url):
        first = self._host(checked(url))
        for number in range(1, 1 + self._limits.tries):
            try:
                return await self._once(asin, url, number)
            except FetchError as error:
                if error.final or first.closed or number == self._limits.tries:
                    first.count(answered=error.final)
                    raise
            await asyncio.sleep(self._backoff(number))
        raise AssertionError('not reached')

    async def _once(self, asin, url, number):
        whole = await self._body(asin, url, number)
        # a thread decodes and waits for the disk, so that the bytes of other bodies do not wait
        path = await asyncio.to_thread(_give_name, self._part(asin), self._folder / asin)
        if isinstance(path, Reason):
            self._drop(self._part(asin))
            # a damaged picture may have lost its end, or been put together of two
            raise FetchError(path, final=whole or path != images.DAMAGED)
        self._host(checked(url)).count(answered=True)
        self._journal.keep(asin, url, path.name, path.stat().st_size)
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
        request = self._client.build_request('GET', url, headers=rest)
        for _ in range(1 + MAX_REDIRECTS):
            host = self._host(checked(request.url))
            async with host.turn():
                with _as_fetch_errors():
                    async with (asyncio.timeout(LONGEST_ANSWER), contextlib.aclosing(
                            await self._client.send(request, stream=True)) as answer):
                        self.requests[answer.status_code] += 1
                        if not answer.has_redirect_location:
                            self._check_status(host, answer, number)
                            return await self._take(asin, url, answer, have, begun)
            request = answer.next_request
        raise FetchError('too_many_redirects', final=True)

    def _check_status(self, host, answer, number):
        """Pause a host that asks for it, and raise for a status without a body to keep."""
        status = answer.status_code
        if status in (429, 503):
            host.hold(seconds(answer.headers.get('retry-after', '')) or self._backoff(number))
        if status not in (200, 206, 416):
            raise FetchError(f'status_{status}', final=status < 500 and status not in LATER)

    async def _take(self, asin, url, answer, have, begun) -> bool:
        part, limit, headers = self._part(asin), self._limits.max_bytes, answer.headers
        if headers.get('content-encoding', 'identity') not in ('', 'identity'):
            raise FetchError('packed_body', final=True)
        if answer.status_code == 200:
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
            self._journal.begin(asin, begun)
        written = start
        with _open(part) as file:
            async for data in answer.aiter_raw():
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
    except RefusedAddressError as error:
        raise FetchError('address_refused', final=True) from error
    except (httpcore2.TimeoutException, TimeoutError) as error:
        raise FetchError('timeout', final=False) from error
    except httpcore2.ConnectError as error:
        refused = 'CERTIFICATE_VERIFY_FAILED' in str(error)  # httpcore keeps no cause
        raise FetchError('bad_certificate' if refused else 'no_connection', final=False) from error
    except (httpcore2.NetworkError, httpcore2.RemoteProtocolError, ssl.SSLError) as error:
        raise FetchError('connection_broke', final=False) from error
    except (httpcore2.LocalProtocolError, httpcore2.UnsupportedProtocol) as error:
        raise FetchError('bad_url', final=True) from error
    except (httpx2.RemoteProtocolError, httpx2.InvalidURL, UnicodeError) as error:
        raise FetchError('bad_redirect', final=True) from error  # the client reads the address


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
        then = parsedate_to_datetime(retry_after)
        return max((then - datetime.now(UTC)).total_seconds(), 0)
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
    try:
        return open(part, 'ab', buffering=0)
    except OSError as error:
        if error.errno in (*UNWRITABLE, errno.EMFILE):
            raise
        raise FetchError('part_is_no_file', final=False) from error


def _give_name(part: Path, stem: Path) -> Path | Reason:
    """Rename a whole body to its picture's name; the reason where it is not a picture."""
    data = part.read_bytes()
    pixels = images.read(data, SIDE)
    if isinstance(pixels, Reason):
        return pixels
    with open(part, 'rb') as file:
        os.fsync(file.fileno())
    path = stem.with_name(stem.name + ('.png' if data.startswith(b'\x89PNG') else '.jpg'))
    os.replace(part, path)
    return path
