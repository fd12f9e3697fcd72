"""Concurrent requests answered by one device call: a bounded queue, and one thread that computes.

Nothing is waited for: what has come while the device was busy is answered together next.
"""

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from tpad_jax.serving.recommender import SIZES, Recommender


class Overloaded(Exception):
    """The queue is full."""


class Batcher:
    """Rows of many requests, in calls of at most SIZES[-1].

    Args:
      shop: answers. most_k: the longest list served; every call computes so many, and shorter
        lists are its beginnings. waiting: rows that may wait.
      on_call: called with the rows of each device call, and how many wait behind it.
    """

    def __init__(self, shop: Recommender, most_k: int, waiting: int,
                 on_call=lambda rows, waiting: None):
        self._shop, self._most_k, self._room, self._tell = shop, most_k, waiting, on_call
        self._queue, self._waiting = deque(), 0
        self._came, self._closed = asyncio.Event(), False
        self._pool = ThreadPoolExecutor(1, 'device')
        self._task = None

    @property
    def waiting(self) -> int:
        """Rows that wait for the device."""
        return self._waiting

    async def start(self) -> None:
        """Compile what will be asked for, and begin to answer."""
        loop = asyncio.get_running_loop()
        for size in SIZES:
            rows = np.ones((size, self._shop.max_length), np.int32)
            await loop.run_in_executor(self._pool, self._shop.first, rows, self._most_k)
        self._task = loop.create_task(self._answer())

    async def ask(self, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Items int32 and scores float32 [S, k] of rows int32 [S, N], see `Recommender.first`.

        Raises:
          Overloaded: more rows would wait than may.
        """
        if self._waiting + len(rows) > self._room or self._closed:
            raise Overloaded
        answer = asyncio.get_running_loop().create_future()
        self._queue.append((rows, k, answer))
        self._waiting += len(rows)
        self._came.set()
        return await answer

    async def close(self) -> None:
        """Answer what was accepted, then end."""
        self._closed = True
        self._came.set()
        if self._task is not None:
            await self._task
        self._pool.shutdown()

    async def _answer(self):
        loop = asyncio.get_running_loop()
        while self._queue or not self._closed:
            if not self._queue:
                self._came.clear()
                await self._came.wait()
                continue
            part, size = [], 0
            while self._queue and (not part or size + len(self._queue[0][0]) <= SIZES[-1]):
                rows, k, answer = self._queue.popleft()
                self._waiting -= len(rows)
                if not answer.done():  # else who asked has gone
                    part.append((rows, k, answer))
                    size += len(rows)
            if not part:
                continue
            self._tell(size, self._waiting)
            try:
                items, scores = await loop.run_in_executor(
                    self._pool, self._shop.first, np.concatenate([rows for rows, _, _ in part]),
                    self._most_k)
            except Exception as error:  # theirs to report, each of them; the next call may do
                for _, _, answer in part:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            begin = 0
            for rows, k, answer in part:
                own = slice(begin, begin + len(rows))
                begin = own.stop
                if not answer.done():
                    answer.set_result((items[own, :k], scores[own, :k]))
