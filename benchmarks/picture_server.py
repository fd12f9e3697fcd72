"""A web server of pictures on this machine that behaves as badly as any, and counts what it sends.

The first part of an address says how it answers, as in /stalls/17.jpg, see KINDS.
"""

import functools
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections import defaultdict
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from PIL import Image

PIECE = 4096  # bytes that are sent, and counted, at once
LIMIT = 60_000  # bytes of a picture that the downloads here take; 'large' and 'endless' are larger
DRIPS, DRIP_SECONDS = 20, 0.05  # parts of a body that drips, and between two of them
# what becomes of each where time-outs and 5xx are tried twice: '' is a picture
KINDS = {
    'plain': '', 'chunked': '', 'without_parts': '', 'without_length': '', 'without_tag': '',
    'drips': '', 'moved': '', 'moved_thrice': '',
    'stalls_within': '', 'breaks': '', 'changes': '', 'busy': '', 'too_many': '',
    'fails_once': '', 'png': '',
    'missing': 'status_404', 'gone': 'status_410', 'circle': 'too_many_redirects',
    'moved_out': 'not_http', 'html': 'image_of_unknown_format', 'bmp': 'image_of_unknown_format',
    'empty': 'image_empty_or_unreadable', 'half': 'image_damaged',
    'giant': 'image_of_too_many_pixels', 'packed': 'packed_body', 'large': 'too_large',
    'endless': 'too_large',
    'stalls': 'timeout', 'fails': 'status_500'}
FOR_NOW = frozenset({'stalls', 'fails'})  # of these, what the next run asks again


@dataclass
class Request:
    """What was asked, and how much of a body is sent."""

    start: int | None  # of a Range
    status: int = 0
    sent: int = 0


@functools.cache
def encoded(number: int, form: str = 'JPEG') -> bytes:
    """A picture of its own, some 4 to 30 kB."""
    rng = np.random.default_rng([abs(number), number < 0])
    side = int(rng.integers(40, 120))
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(file, form)
    return file.getvalue()


def giant(number: int) -> bytes:
    """A picture but for its head, which says 50,000 x 50,000 pixels."""
    head = b'IHDR' + struct.pack('>IIBBBBB', 50_000, 50_000, 8, 2, 0, 0, 0)
    data = encoded(number, 'PNG')
    return data[:12] + head + struct.pack('>I', zlib.crc32(head)) + data[33:]


class PictureServer(ThreadingHTTPServer):
    """On a free port of 127.0.0.1, in a thread, from `with` to its end.

    Attributes:
      requests: {path: [Request]}. busiest: most at once. target: where /elsewhere/ leads to.
    """

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self):
        super().__init__(('127.0.0.1', 0), _Handler)
        # what the system takes off our hands is on its way: little of it, or nobody knows what came
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        self.requests = defaultdict(list)
        self.busy, self.busiest = 0, 0
        self.target = ''
        self.lock, self.over = threading.Lock(), threading.Event()
        self.url = f'http://127.0.0.1:{self.server_port}'

    def __enter__(self):
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, told = self.server, self.headers.get('Range', '')
        self.now = Request(int(told.removeprefix('bytes=').rstrip('-')) if told else None)
        _, kind, name = self.path.split('/', 2)
        with server.lock:
            server.requests[self.path].append(self.now)
            server.busy += 1
            server.busiest = max(server.busiest, server.busy)
        try:
            self._answer(kind, name, len(server.requests[self.path]))
        except OSError:
            self.close_connection = True
        finally:
            with server.lock:
                server.busy -= 1

    def _answer(self, kind, name, time_):
        number = int(name.partition('.')[0])
        if kind in ('moved', 'moved_thrice', 'circle', 'moved_out'):
            to = {'moved': f'/plain/{name}', 'moved_thrice': f'../moved_twice/{name}',
                  'circle': f'/circle/{name}', 'moved_out': 'ftp://127.0.0.1/x.jpg'}[kind]
            self._head(302, 0, Location=to)
        elif kind == 'elsewhere':
            self._head(302, 0, Location=self.server.target)
        elif kind == 'moved_twice':
            self._head(307, 0, Location=f'{self.server.url}/moved/{name}')
        elif kind in ('missing', 'gone'):
            self._body(404 if kind == 'missing' else 410, b'not here')
        elif kind == 'busy' and time_ == 1:
            self._head(503, 0, **{'Retry-After': '1'})
        elif kind == 'too_many' and time_ == 1:
            self._head(429, 0)
        elif kind == 'fails' or (kind == 'fails_once' and time_ == 1):
            self._body(500, b'oh')
        elif kind == 'stalls':
            self.server.over.wait(30)
            self.close_connection = True
        elif kind == 'html':
            self._body(200, b'<html>a page</html>')
        elif kind == 'bmp':
            self._body(200, encoded(number, 'BMP'))
        elif kind == 'empty':
            self._body(200, b'')
        elif kind == 'half':
            self._body(200, encoded(number)[:1000])
        elif kind == 'giant':
            self._body(200, giant(number))
        elif kind == 'packed':
            self._body(200, encoded(number), **{'Content-Encoding': 'gzip'})
        elif kind == 'large':
            self._head(200, 10 * LIMIT)
            self._send(bytes(10 * LIMIT))
        elif kind == 'endless':
            self._head(200, None)
            while not self.server.over.is_set():
                self._chunk(bytes(4096))
        else:
            self._picture(kind, encoded(number, 'PNG' if kind == 'png' else 'JPEG'), time_)

    def _picture(self, kind, data, time_):
        if kind == 'changes' and time_ > 1:
            data = encoded(-1 - int(self.path.rpartition('/')[2].partition('.')[0]))
        start, tag = self.now.start or 0, f'"{zlib.crc32(data)}"'
        if kind in ('without_parts', 'chunked', 'without_length') or (
                self.headers.get('If-Range', tag) != tag):
            start = 0
        head = {} if kind == 'without_tag' else {'ETag': tag}
        if kind == 'chunked':
            self._head(200, None, **head)
            for place in range(0, len(data), 3000):
                self._chunk(data[place:place + 3000])
            self.wfile.write(b'0\r\n\r\n')
        elif kind == 'without_length':
            self.close_connection = True
            self.now.status = 200
            self.wfile.write(b'HTTP/1.0 200 OK\r\n\r\n')
            self._send(data)
        elif start >= len(data):
            self._head(416, 0, **{'Content-Range': f'bytes */{len(data)}'})
        else:
            if start:
                head['Content-Range'] = f'bytes {start}-{len(data) - 1}/{len(data)}'
            self._head(206 if start else 200, len(data) - start, **head)
            if kind in ('stalls_within', 'breaks', 'changes') and time_ == 1:
                self._send(data[:len(data) // 2])
                self.close_connection = True
                if kind == 'stalls_within':
                    self.server.over.wait(5)
            elif kind == 'drips':
                step = -(-len(data) // DRIPS)
                for place in range(start, len(data), step):
                    self._send(data[place:place + step])
                    time.sleep(DRIP_SECONDS)
            else:
                self._send(data[start:])

    def _head(self, status, length, **head):
        self.now.status = status
        self.send_response(status)
        head |= {'Transfer-Encoding': 'chunked'} if length is None else {'Content-Length': length}
        for name, value in head.items():
            self.send_header(name, str(value))
        self.end_headers()

    def _body(self, status, data, **head):
        self._head(status, len(data), **head)
        self._send(data)

    def _chunk(self, data):
        self.wfile.write(b'%x\r\n' % len(data))
        self._send(data)
        self.wfile.write(b'\r\n')

    def _send(self, data):
        for place in range(0, len(data), PIECE):
            self.wfile.write(data[place:place + PIECE])
            self.now.sent += len(data[place:place + PIECE])


def raw(folder: Path, addresses: list[str], form: str = '2023') -> Path:
    """A folder of raw files, an item per address, asins B0000 on, each with one review."""
    folder.mkdir(parents=True, exist_ok=True)
    items, reviews = [], []
    for number, url in enumerate(addresses):
        asin = f'B{number:04d}'
        if form == '2018':
            items.append({'asin': asin, 'title': 'a', 'imageURLHighRes': [url], 'imageURL': []})
            reviews.append({'asin': asin, 'reviewerID': 'A', 'unixReviewTime': 10**9 + number})
        else:
            items.append({'parent_asin': asin, 'title': 'a',
                          'images': [{'variant': 'MAIN', 'large': url, 'hi_res': None}]})
            reviews.append({'parent_asin': asin, 'user_id': 'A',
                            'timestamp': 10**12 + number})
    end = 'json' if form == '2018' else 'jsonl'
    for name, lines in ((f'meta_X.{end}', items), (f'X.{end}', reviews)):
        (folder / name).write_text(''.join(json.dumps(line) + '\n' for line in lines))
    return folder
