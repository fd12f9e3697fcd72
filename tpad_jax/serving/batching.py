"""A bounded queue that answers concurrent requests with one device call, on one thread; metrics.

There is no waiting time: requests that arrive while the device is busy share the next call.
"""

import asyncio
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import prometheus_client as prometheus
from fastapi import HTTPException

from tpad_jax.serving.calls import SIZES, with_events
from tpad_jax.serving.conditions import Wanted
from tpad_jax.serving.recommender import Recommender

RETRY = {'Retry-After': '1'}  # seconds
POLL = 1.0  # seconds between two looks for a newer recommender


class OverloadedError(HTTPException):
    """The queue is full, or closed."""

    def __init__(self):
        super().__init__(503, 'too many sessions wait for the device; repeat the request', RETRY)


class Batcher:
    """Answers the rows of many requests in calls of at most SIZES[-1] rows.

    Args:
      shop: the recommender.
      most_k: length of the longest list. Each call computes so many items; a shorter list is the
        start of it.
      waiting: number of rows that may wait.
      on_call: called with the number of rows of each device call.
      newer: returns a recommender that replaces `shop`, or None; called every POLL seconds outside
        of the event loop. An error of it is printed, and `shop` stays.

    Attributes:
      shop: the recommender of the requests that come now.
      waiting: number of rows that wait for the device.
    """

    def __init__(self, shop: Recommender, most_k: int, waiting: int, on_call=lambda rows: None,
                 newer: Callable[[], Recommender | None] = lambda: None):
        self.shop, self._most_k, self._room, self._on_call = shop, most_k, waiting, on_call
        self._newer, self._following = newer, None
        self._queue, self.waiting = deque(), 0
        self._came, self._closed = asyncio.Event(), False
        self._pool = ThreadPoolExecutor(1, 'device')
        self._starting, self._task = asyncio.Lock(), None

    async def start(self) -> None:
        """Compile the search for every number of rows, then start to answer; once.

        The search under conditions is compiled as well, or the first such request would wait for
        it, and so would all others after it.
        """
        loop = asyncio.get_running_loop()
        async with self._starting:
            if self._task is None:
                await loop.run_in_executor(self._pool, self._compile, self.shop)
                self._task = loop.create_task(self._answer())
                self._following = loop.create_task(self._follow())

    def _compile(self, shop):
        for size in SIZES:
            rows = with_events(shop, np.ones((size, shop.max_length), np.int32), [[]] * size)
            for asked in None, [Wanted()] * size:
                shop.first(rows, self._most_k, None, asked)

    async def _follow(self):
        """Switch to newer recommenders; the one before answers while they are compiled."""
        told = ''
        while True:
            await asyncio.sleep(POLL)
            try:
                shop = await asyncio.to_thread(self._newer)
                if shop is not None:
                    await asyncio.to_thread(self._compile, shop)
                    self.shop = shop
            except Exception as error:  # of any kind: the one before can be served
                told, before = f'{error}; the artefact before is still served', told
                if told != before:
                    print(told, file=sys.stderr, flush=True)

    async def ask(self, rows: np.ndarray, k: int, asked: list[Wanted] | None = None,
                  shop: Recommender | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return items int32 and scores float32 [S, k], see `Recommender.first`.

        Args:
          rows: int32 [S, N]. Prefixes.
          k: length of a list, at most `most_k`.
          asked: S conditions, or None.
          shop: the recommender that the rows are of; None: the one of now.

        Raises:
          OverloadedError: too many rows wait.
        """
        if not self._closed:  # an app that is mounted in another gets no lifespan events
            await self.start()
        if self.waiting + len(rows) > self._room or self._closed:
            raise OverloadedError
        answer = asyncio.get_running_loop().create_future()
        self._queue.append((rows, k, answer, asked, shop or self.shop))
        self.waiting += len(rows)
        self._came.set()
        return await answer

    async def close(self) -> None:
        """Answer the accepted requests, then stop."""
        self._closed = True
        self._came.set()
        if self._task is not None:
            self._following.cancel()
            await self._task
        self._pool.shutdown()

    async def _answer(self):
        loop = asyncio.get_running_loop()
        while self._queue or not self._closed:
            if not self._queue:
                self._came.clear()
                await self._came.wait()
                continue
            part, size, shop = [], 0, self._queue[0][-1]
            while self._queue and self._queue[0][-1] is shop and (
                    not part or size + len(self._queue[0][0]) <= SIZES[-1]):
                part.append(self._queue.popleft())
                size += len(part[-1][0])
            self.waiting -= size
            part = [request for request in part if not request[2].done()]  # clients may disconnect
            if not part:
                continue
            rows = [rows for rows, *_ in part]
            self._on_call(sum(map(len, rows)))
            asked = None
            if any(x for *_, x, _ in part):  # one call for requests with and without conditions
                asked = [x for own, *_, more, _ in part for x in more or [Wanted()] * len(own)]
            try:
                answers = await loop.run_in_executor(
                    self._pool, shop.first, np.concatenate(rows), self._most_k, None, asked)
            except Exception as error:  # each request reports it; the next call may succeed
                for _, _, answer, *_ in part:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            cuts = np.cumsum([len(x) for x in rows])[:-1]
            for (_, k, answer, *_), items, scores in zip(
                    part, *(np.split(x, cuts) for x in answers), strict=True):
                if not answer.done():
                    answer.set_result((items[:, :k], scores[:, :k]))


class Metrics:
    """The metrics of the service."""

    def __init__(self):
        self.registry = registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=registry)
        counter = partial(prometheus.Counter, registry=registry)
        histogram = partial(prometheus.Histogram, registry=registry)
        self.requests = counter('tpad_requests', 'Requests answered.', ('path', 'status'))
        self.seconds = histogram('tpad_request_seconds', 'From a request to its answer.', ('path',),
                                 buckets=(.001, .002, .005, .01, .02, .05, .1, .2, .5, 1, 2, 5, 10))
        self.rows = histogram('tpad_call_sessions', 'Sessions of a device call.', buckets=SIZES)
        self.waiting = prometheus.Gauge(
            'tpad_waiting_sessions', 'Sessions that wait for the device.', registry=registry)
        self.sessions = counter('tpad_sessions', 'Sessions asked for.')
        self.added = counter('tpad_added_items', 'Items added.')
        self.overloaded = counter('tpad_overloaded', 'Requests refused by 503.')
