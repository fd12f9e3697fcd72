"""One picture from the web into a file: hops, parts, tries, and when a host may be asked.

A body is written to `<asin>.part` as it arrives. What is there after a break, of the line, of this
process or of its power, is continued by a request of the rest (RFC 9110, section 14) that names the
body it is the rest of, and only a server that gives no parts sends it from the beginning. A whole
body is decoded by the reader of the pictures itself, so what gets a name can be used.
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

from tpad_jax.data import images
from tpad_jax.data.download.addresses import Guarded, Refused
from tpad_jax.data.download.hosts import Failed, Host, Limits
from tpad_jax.data.download.journal import VALIDATOR, Begun, Journal
from tpad_jax.data.untrusted import Reason
from tpad_jax.errors import UNWRITABLE

REDIRECTS, MAX_REDIRECTS = frozenset({301, 302, 303, 307, 308}), 5
LATER = frozenset({408, 425, 429})  # 4xx that may be answered otherwise later; so may all of 5xx
LONGEST_ANSWER = 300  # seconds from the connection to the last byte; then the rest is asked for
SIDE = 16  # pixels a body is decoded to, to see that it can be


class Fetcher:
    """Fetches pictures into a folder; one per process and folder.

    Attributes:
      sizes: bytes of bodies: 'received', and 'dropped', of this run or an earlier one, as they were
        of no picture or could not be continued.
      requests: {status: answers}, redirects among them.
    """

    def __init__(self, folder: Path, journal: Journal, limits: Limits,
                 network: httpcore2.AsyncNetworkBackend | None = None):
        self._folder, self._journal, self._limits = folder, journal, limits
        self._pool = httpcore2.AsyncConnectionPool(
            max_connections=limits.jobs, max_keepalive_connections=limits.jobs,
            keepalive_expiry=15, network_backend=network or Guarded(),
            ssl_context=httpcore2.default_ssl_context())  # else one per connection, 20 ms each
        self._slots, self._hosts = asyncio.Semaphore(limits.jobs), {}
        self.sizes, self.requests = Counter(received=0, dropped=0), Counter()

    async def close(self) -> None:
        """Closes the connections."""
        await self._pool.aclose()

    async def fetch(self, asin: str, urls: tuple[str, ...]) -> Path:
        """The first of the addresses that has a picture, as a file `<asin>.jpg` or `.png`.

        A reason that is final is in the journal when this raises.

        Args:
          asin: checked: it becomes a part of a path.
          urls: the one to take first.

        Raises:
          Failed: none has, or one may have another time, for the reason given.
          OSError: the disk can be written no more.
        """
        failure = Failed('without_url', final=True)
        for url in urls:
            try:
                return await self._tried(asin, url)
            except Failed as failed:
                failure = failed
                if not failed.final:
                    break
                self._drop(self._part(asin))
                self._journal.fail(asin, url, failed.reason)
        raise failure

    async def _tried(self, asin, url):
        first = self._host(_parsed(url))
        for number in range(self._limits.tries):
            if number:
                await asyncio.sleep(self._backoff(number))
            try:
                return await self._once(asin, url, number)
            except Failed as failed:
                if failed.final or first.closed or number + 1 == self._limits.tries:
                    first.answered(failed.final)
                    raise
        raise AssertionError('not reached')

    async def _once(self, asin, url, number):
        part = self._part(asin)
        whole = await self._body(asin, url, number)
        # decoding takes its time, and so does the disk: the others' bytes should not wait
        found = await asyncio.to_thread(_named, part, self._folder / asin)
        if isinstance(found, Reason):
            self._drop(part)
            # what begins as a picture may have lost its end, or been put together of two
            raise Failed(found, final=whole or found != images.DAMAGED)
        self._host(_parsed(url)).answered(True)
        self._journal.keep(asin, url, found.name, found.stat().st_size)
        return found

    async def _body(self, asin, url, number) -> bool:
        """Has the body of an address lie in the part; whether it surely is as it was sent."""
        part, begun = self._part(asin), self._journal.begun.get(asin)
        have = _size(part)
        if begun is None or begun.url != url or not 0 < have <= (begun.size or have):
            begun, have = None, self._drop(part)
        elif have == begun.size:
            return False
        here = _parsed(url)
        for _ in range(1 + MAX_REDIRECTS):
            host = self._host(here)
            async with host.turn(), self._slots:
                with _failures():
                    async with (asyncio.timeout(LONGEST_ANSWER),
                                self._pool.stream('GET', _plain(here), headers=self._head(
                                    have, begun), extensions=self._extensions()) as answer):
                        self.requests[answer.status] += 1
                        head = _Head(answer.headers)
                        if answer.status not in REDIRECTS:
                            self._heed(host, answer.status, head, number)
                            return await self._take(asin, url, answer, head, have, begun)
            try:
                here = here.join(head['location'])
            except (httpx2.InvalidURL, UnicodeError) as error:
                raise Failed('bad_redirect', final=True) from error
            _parsed(here)
        raise Failed('too_many_redirects', final=True)

    def _heed(self, host, status, head, number):
        """What a host says of when to ask again, and the answers that are none of a picture."""
        if status in (429, 503):
            host.hold(_seconds(head['retry-after']) or self._backoff(number + 1))
        if status not in (200, 206, 416):
            raise Failed(f'status_{status}', final=status < 500 and status not in LATER)

    async def _take(self, asin, url, answer, head, have, begun) -> bool:
        part, limit = self._part(asin), self._limits.max_bytes
        if head['content-encoding'] not in ('', 'identity'):
            raise Failed('packed_body', final=True)
        if answer.status == 200:
            start, size = self._drop(part), _whole_number(head['content-length'])
            begun = Begun(url, head.validator, size)
        else:  # the rest of a body, or 416: there is none
            start, size = head.range()
            fits = have and begun.size in (None, size) and start in (None, have)
            if not fits or (start is None and size != have):
                self._drop(part)
                raise Failed('no_such_part', final=False)
            if start is None:
                return False
        if size is not None and size > limit:
            raise Failed('too_large', final=True)
        if start == 0:
            self._journal.begin(asin, begun)
        written = start
        with _opened(part) as file:
            async for data in answer.aiter_stream():
                self.sizes['received'] += len(data)
                written += len(data)
                if written > limit:
                    self.sizes['dropped'] += len(data)
                    raise Failed('too_large', final=True)
                while data:  # unbuffered, so that a kill leaves all that came
                    data = data[file.write(data):]
        if size is not None and written != size:
            raise Failed('cut_short', final=False)
        return start == 0 and (size is not None or 'chunked' in head['transfer-encoding'])

    def _head(self, have, begun):
        head = {'User-Agent': self._limits.user_agent, 'Accept': 'image/*',
                'Accept-Encoding': 'identity'}
        if have:
            head['Range'] = f'bytes={have}-'
            if begun.validator:
                head['If-Range'] = begun.validator
        return head

    def _extensions(self):
        seconds = self._limits.timeout
        return {'timeout': {'connect': seconds, 'read': seconds, 'write': seconds, 'pool': None}}

    def _backoff(self, number):
        return self._limits.backoff * 2 ** (number - 1) * random.uniform(0.75, 1.25)

    def _host(self, url):
        return self._hosts.setdefault(url.host, Host(self._limits))

    def _part(self, asin):
        return self._folder / f'{asin}.part'

    def _drop(self, part) -> int:
        """Removes a part; 0, the bytes that are left."""
        self.sizes['dropped'] += _size(part)
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            part.unlink()
        return 0


class _Head:
    """The head of an answer."""

    def __init__(self, pairs):
        self._values = {name.decode('latin-1').lower(): value.decode('latin-1').strip()
                        for name, value in pairs}

    def __getitem__(self, name) -> str:
        return self._values.get(name, '')

    @property
    def validator(self) -> str | None:
        """What tells this body from others of its address; a weak tag tells not enough."""
        return next((self[name] for name in ('etag', 'last-modified')
                     if VALIDATOR.fullmatch(self[name])), None)

    def range(self) -> tuple[int | None, int | None]:
        """First byte, size of the whole; None where it does not say."""
        told = re.fullmatch(r'bytes (?:(\d{1,12})-\d{1,12}|\*)/(\d{1,12}|\*)',
                            self['content-range'])
        if not told:
            return None, None
        return _whole_number(told[1] or ''), _whole_number(told[2])


@contextlib.contextmanager
def _failures():
    """What goes wrong between two machines, as `Failed`."""
    try:
        yield
    except Refused as error:
        raise Failed('address_refused', final=True) from error
    except (httpcore2.TimeoutException, TimeoutError) as error:
        raise Failed('timeout', final=False) from error
    except httpcore2.ConnectError as error:
        refused = 'CERTIFICATE_VERIFY_FAILED' in str(error)  # what caused it is not handed on
        raise Failed('bad_certificate' if refused else 'no_connection', final=False) from error
    except (httpcore2.NetworkError, httpcore2.RemoteProtocolError, ssl.SSLError) as error:
        raise Failed('connection_broke', final=False) from error
    except (httpcore2.LocalProtocolError, httpcore2.UnsupportedProtocol) as error:
        raise Failed('bad_url', final=True) from error


def host_of(url: str) -> str:
    """The name of the host an address leads to first, '' if none."""
    try:
        return _parsed(url).host
    except Failed:
        return ''


def _parsed(url: str | httpx2.URL) -> httpx2.URL:
    try:
        url = httpx2.URL(url)
    except (httpx2.InvalidURL, UnicodeError, ValueError) as error:
        raise Failed('bad_url', final=True) from error
    if url.scheme not in ('http', 'https'):
        raise Failed('not_http', final=True)
    if not url.host or url.userinfo or not 0 < (url.port or 80) < 2**16:
        raise Failed('bad_url', final=True)
    return url


def _plain(url: httpx2.URL) -> httpcore2.URL:
    return httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port,
                         target=url.raw_path)


def _seconds(text: str) -> float:
    """Of a Retry-After: seconds, or a date; 0 if it says neither."""
    if (number := _whole_number(text)) is not None:
        return number
    try:
        then = parsedate_to_datetime(text)
        return max((then - datetime.now(UTC)).total_seconds(), 0)
    except (TypeError, ValueError, OverflowError):  # no date, or one of no time zone
        return 0


def _whole_number(text: str) -> int | None:
    return int(text) if re.fullmatch(r'[0-9]{1,12}', text) else None


def _size(part: Path) -> int:
    return part.stat().st_size if part.is_file() and not part.is_symlink() else 0


def _opened(part: Path):
    """The part, to write behind what is there; links and pipes are dropped before."""
    try:
        return open(part, 'ab', buffering=0)
    except OSError as error:
        if error.errno in (*UNWRITABLE, errno.EMFILE):
            raise
        raise Failed('part_is_no_file', final=False) from error


def _named(part: Path, stem: Path) -> Path | Reason:
    """Gives a whole body its name, or says why it is no picture."""
    data = part.read_bytes()
    pixels = images.read(data, SIDE)
    if isinstance(pixels, Reason):
        return pixels
    with open(part, 'rb') as file:
        os.fsync(file.fileno())
    path = stem.with_name(stem.name + ('.png' if data.startswith(b'\x89PNG') else '.jpg'))
    os.replace(part, path)
    return path
