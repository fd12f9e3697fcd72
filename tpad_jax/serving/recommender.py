"""A finished run as an object that recommends: `tpad_jax.load(workdir)`.

Its lists are the ones that evaluation ranked: by the model that validation chose, over every item
of the catalogue, ties by item. The MLLM is loaded only when the first new item is added.
"""

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from tpad_jax.core import files
from tpad_jax.distributed.devices import compiled
from tpad_jax.errors import InputError, refuse_if, refusing
from tpad_jax.evaluation.scorers import session_encoder, session_shifts
from tpad_jax.models.experts import BY_ITEM
from tpad_jax.serving import artifact, topk

SIZES = 1, 16, 256  # rows of a compiled call; the smallest that is large enough is used
MAX_K = 1000  # items of a list at most
LENGTHS = 20, 50, 100, 200, 500, MAX_K  # of a compiled list; the smallest that is large enough


@dataclass(frozen=True, eq=False)
class Recommended:
    """The first K items of S sessions.

    Attributes:
      items: S lists of K item ids, best first.
      scores: float32 [S, K]. Higher is better; comparable within a session. NaN where `empty`.
      unknown: S lists of ids that are not in the catalogue and were dropped.
      empty: bool [S]. The session has no known item; its list holds the items with most events in
        the training sessions.
    """

    items: list[list[str]]
    scores: np.ndarray
    unknown: list[list[str]]
    empty: np.ndarray


class Table(NamedTuple):
    """The catalogue at one moment.

    Its index is shared with later tables and only grows, so an older table stays valid: rows from
    `count` on are not its own.

    Attributes:
      count: rows in use; row 0 is not an item.
      number: {id: row}.
      popular: int32 [at most MAX_K], rows by training events, most first.
    """

    count: int
    number: dict[str, int]
    popular: np.ndarray


class Recommender:
    """A finished run that recommends; see `load`. All methods are thread-safe.

    Attributes:
      model: name of the model in results.json.
      max_length: number of items of a session that count, its last ones.
      trained: number of items of the run; items with higher rows were added.
      table: the catalogue at this moment.
      ids: item ids by row; [0] is ''. The list only grows.
      titles: titles by row; [0] is ''. The list only grows.
    """

    def __init__(self, served: artifact.Served, base: str = ''):
        self._served, self._base, self._reader = served, base, None
        self._adding = threading.Lock()
        # An added item is written into z in place, so a call must not be dispatched meanwhile.
        self._dispatching = threading.Lock()
        self.model, self.max_length = served.about['model'], served.about['max_length']
        self.trained = len(served.ids) - 1
        encode = session_encoder(served.specs)
        self._encode = compiled(encode)
        shifts = session_shifts(served.specs)
        self._shifts = compiled(shifts)
        self._search = compiled(topk.searcher(encode, shifts),
                                static_argnames='k')
        self._write = compiled(lambda z, rows, vectors: z.at[rows].set(vectors, mode='drop'),
                               donate_argnums=0)
        self._vectors = []  # of added items, on the host
        popular = 1 + np.argsort(-served.events[1:], kind='stable').astype(np.int32)
        self.ids, self.titles = list(served.ids), list(served.titles)
        number = {name: row for row, name in enumerate(self.ids) if row}
        self.table = Table(len(self.ids), number, popular[:MAX_K])
        self._z, self._weights = self._padded(served.z, (served.weights, served.experts),
                                              len(served.z))

    def recommend(self, sessions: Sequence[Sequence[str]], k: int | None = None
                  ) -> Recommended:
        """Return the K items most likely to follow each session.

        Items of the session itself are ranked like all others, as in evaluation.

        Args:
          sessions: S lists of item ids in the order of time. Unknown ids are dropped and reported.
            Of a longer session the last `max_length` known items count.
          k: length of a list, from 1 to min(MAX_K, number of items). None: 20, or all items of a
            smaller catalogue.

        Raises:
          InputError: k is out of bounds, or a session is not a list of texts.
        """
        table = self.table
        rows, unknown = self.rows(sessions, table)
        items, scores = self.first(rows, min(20, table.count - 1) if k is None else k, table)
        lists = [[self.ids[n] for n in row] for row in items.tolist()]
        return Recommended(lists, scores, unknown, rows[:, 0] == 0)

    def rows(self, sessions: Iterable[Sequence[str]], table=None) -> tuple[np.ndarray, list]:
        """Return item rows int32 [S, N] of sessions, left aligned and padded by 0, and unknown ids.

        Args:
          sessions: S lists of item ids.
          table: the catalogue to read; the current one by default.

        Raises:
          InputError: a session is not a list of texts.
        """
        table = table or self.table
        rows, unknown = [], []
        for place, session in enumerate(sessions):
            if not isinstance(session, list | tuple) or not all(
                    isinstance(name, str) for name in session):
                raise InputError(f'session {place} is not a list of item ids (texts)')
            numbers = [table.number.get(name, table.count) for name in session]
            known = [number for number in numbers if number < table.count][-self.max_length:]
            rows.append(known + [0] * (self.max_length - len(known)))
            unknown.append([name for name, number in zip(session, numbers, strict=True)
                            if number >= table.count])
        return np.array(rows, np.int32).reshape(-1, self.max_length), unknown

    def first(self, rows: np.ndarray, k: int, table=None) -> tuple[np.ndarray, np.ndarray]:
        """Recommend by rows: int32 [S, N] -> items int32 [S, k] and scores float32 [S, k].

        Args:
          rows: int32 [S, N]. Prefixes as `rows` returns them.
          k: length of a list.
          table: the catalogue to read; the current one by default.

        Raises:
          InputError: k is out of bounds.
        """
        parts = [finish() for finish in list(self.begin(rows, k, table))]
        items, scores = (np.concatenate(x) for x in zip(*parts, strict=True))
        return items, scores

    def begin(self, rows: np.ndarray, k: int, table=None) -> Iterable:
        """Dispatch rows int32 [S, N] to the device and yield, per call, a function that waits.

        Each function returns (items int32, scores float32) [s, k] of the next s rows. The next call
        runs while the answers of the one before are read.

        Args:
          rows: int32 [S, N]. Prefixes as `rows` returns them.
          k: length of a list.
          table: the catalogue to read; the current one by default.

        Raises:
          InputError: k is out of bounds.
        """
        table = table or self.table
        most = min(MAX_K, table.count - 1)
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= most:
            raise InputError(f'k={k!r} is out of bounds. Expected a whole number from 1 to {most}, '
                             f'{MAX_K} or the {table.count - 1} items of the catalogue')
        compiled_k = next(length for length in LENGTHS if length >= k)
        for part in _calls(rows):
            with self._dispatching:
                scores, items = self._search(self._weights, self._z, np.int32(table.count),
                                             _filled(part), k=compiled_k)
            yield partial(_finish, part, items, scores, table.popular[:k])

    def embed_items(self, ids: Sequence[str] | None = None) -> np.ndarray:
        """Return item vectors z float32 [n, D]; their product with a session's vector is the score.

        Args:
          ids: item ids; None for all items, in the order of `ids[1:]`.

        Raises:
          InputError: an id is not in the catalogue.
        """
        table = self.table
        with self._dispatching:
            z = jnp.copy(self._z)  # what numpy reads must not be written to later
        if ids is None:
            return np.asarray(z)[1:table.count]
        absent = [name for name in ids if table.number.get(name, table.count) >= table.count]
        if absent:
            raise InputError(f'{len(absent)} of {len(ids)} ids are not in the catalogue, '
                             f'{absent[0]!r} among them')
        return np.asarray(z)[[table.number[name] for name in ids]]

    def embed_sessions(self, sessions: Sequence[Sequence[str]]) -> np.ndarray:
        """Return session vectors h float32 [S, D], temperature included; NaN for an empty session.

        The rules of experts, config.model.repeats and .together also shift the scores of some
        items, which no product of vectors contains; see `shifts`.

        Args:
          sessions: S lists of item ids.

        Raises:
          InputError: a session is not a list of texts.
        """
        rows, _ = self.rows(sessions)
        parts = []
        for part in _calls(rows):
            with self._dispatching:
                h = self._encode(self._weights, self._z, _filled(part))
            parts.append(np.asarray(h)[:len(part)])
        vectors = np.concatenate(parts)
        vectors[rows[:, 0] == 0] = np.nan
        return vectors

    def shifts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the shifts of scores that no product of vectors has, or None without any.

        Args:
          rows: int32 [S, N]. Prefixes as `rows` returns them.

        Returns:
          Items int32 [S, M] and float32 [S, M], see `scorers.session_shifts`.
        """
        parts = [self._shifts(self._weights, _filled(part)) for part in _calls(rows)]
        if parts[0] is None:
            return None
        items, shifts = (np.concatenate(x)[:len(rows)] for x in zip(*parts, strict=True))
        return items, shifts

    def add_items(self, items: Sequence[dict]) -> np.ndarray:
        """Add new items to the catalogue without training; they are recommended from then on.

        New items are cold: picture and text are read as the catalogue's were, and there is no id
        embedding. The first call loads the MLLM. Either all items are added or none.

        Args:
          items: dicts with 'id', with 'image' (the bytes of a JPEG, PNG, WebP or GIF file, or its
            path), and with 'text' or the fields of the run's texts (title, brand, category and
            description for Amazon files). Picture or words may be missing, not both. Brand,
            category and price (a number) are also side features if the run has them.

        Returns:
          Their vectors, float32 [n, D].

        Raises:
          InputError: an item is unusable, its id exists, or the run cannot read new items (see
            new_items.Reader).
        """
        from tpad_jax.serving import new_items  # only a new item needs the encoders

        items = list(items)
        new_items.checked(items, self._served.about['words'])
        names = [item['id'] for item in items]
        titles = [str(item.get('title') or item.get('text') or item['id'])[:200] for item in items]
        with self._adding:
            for place, name in enumerate(names):
                refuse_if(name in self.table.number or name in names[:place],
                          f'item id {name!r} exists. Fix: choose another id')
            if not items:
                return np.zeros((0, self._z.shape[1]), np.float32)
            if self._reader is None:
                self._reader = new_items.Reader(self._served, self._base)
            vectors = self._reader(items)
            self._append(vectors, names, titles)
            return vectors

    def _append(self, vectors, names, titles):
        """Write vectors into the free rows of z, in place, and publish a table that has them."""
        table = self.table
        rows = np.arange(table.count, table.count + len(names), dtype=np.int32)
        with self._dispatching:
            if rows[-1] >= len(self._z):
                self._z, self._weights = self._padded(self._z, self._weights, rows[-1] + 1)
            for part, values in zip(_calls(rows), _calls(vectors), strict=True):
                # rows that only fill a call are out of range and dropped
                self._z = self._write(self._z, _filled(part, np.iinfo(np.int32).max),
                                      _filled(values))
        self._vectors.append(vectors)
        self.ids.extend(names)
        self.titles.extend(titles)
        table.number.update(zip(names, rows.tolist(), strict=True))
        popular = np.concatenate([table.popular, rows])[:MAX_K]
        self.table = table._replace(count=table.count + len(names), popular=popular)

    def save_added(self, file) -> None:
        """Write the added items to a .safetensors file for `restore_added` of a later process.

        Args:
          file: path of the file.
        """
        first = self.trained + 1
        about = {'ids': self.ids[first:], 'titles': self.titles[first:],
                 'model': self._served.about['digests'][artifact.MODEL]}
        vectors = np.concatenate([np.zeros((0, self._z.shape[1]), np.float32), *self._vectors])
        files.write_tensors(file, {'vectors': vectors}, about)

    def restore_added(self, file) -> None:
        """Add the items that `save_added` wrote, without reading any again.

        Args:
          file: path of the file.

        Raises:
          InputError: the file is damaged, is of another run, or names an item that exists.
        """
        with (refusing(artifact.UNREADABLE, f'{file} does not hold added items',
                       'Fix: name another file, or delete it and add the items again'),
              safe_open(file, framework='np') as tensors):
            about = {key: json.loads(x) for key, x in tensors.metadata().items()}
            vectors, ids, titles = tensors.get_tensor('vectors'), about['ids'], about['titles']
            if vectors.shape != (len(ids), self._z.shape[1]) or len(titles) != len(ids):
                raise ValueError(f'{list(vectors.shape)} vectors for {len(ids)} ids')
        if about['model'] != self._served.about['digests'][artifact.MODEL]:
            raise InputError(f'{file} holds items of another run. Fix: name a file of this run')
        with self._adding:
            if not self.table.number.keys().isdisjoint(ids):
                raise InputError(f'{file} names items that exist. Fix: restore it only once')
            if ids:
                self._append(vectors, ids, titles)

    @staticmethod
    def _padded(z, weights, count):
        """Arrays with room up to a whole chunk, so that most new items compile nothing."""
        length = topk.rounded(count)

        def fill(x):
            return jnp.pad(x, ((0, length - len(x)), *((0, 0),) * (x.ndim - 1)))

        models, experts = weights
        models = tuple((jax.device_put(params), {name: fill(x) for name, x in near.items()})
                       for params, near in models)
        if experts is not None:
            tables = {name: fill(x) if name in BY_ITEM else x
                      for name, x in experts['tables'].items()}
            experts = jax.device_put({'weights': experts['weights'], 'tables': tables})
        return fill(z), (models, experts)


def load(workdir, *, base: str = '') -> Recommender:
    """Read a finished run for recommending, without an MLLM and without the raw data.

    Args:
      workdir: directory of the run.
      base: directory of the run's MLLM if it moved; only new items need it.

    Raises:
      InputError: there is no such run, it is unfinished or has no recommender, or a file is
        damaged.
    """
    return Recommender(artifact.read(workdir), base)


def _calls(x):
    """Split rows into the parts of compiled calls; no rows are one part."""
    return np.split(x, range(SIZES[-1], len(x), SIZES[-1]))


def _filled(x, value=0):
    """Rows padded to one of SIZES, so that few shapes are compiled."""
    size = next(size for size in SIZES if size >= len(x))
    return np.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1)), constant_values=value)


def _finish(rows, items, scores, popular):
    """Return the wanted rows on the host; an empty session gets the popular items."""
    items, scores = (np.array(x)[:len(rows), :len(popular)] for x in (items, scores))
    empty = rows[:, 0] == 0
    items[empty], scores[empty] = popular, np.nan
    broken = np.flatnonzero(~(np.isfinite(scores).all(axis=1) | empty))
    if len(broken):
        raise FloatingPointError(f'the scores of session {broken[0]} of this call are not finite')
    return items, scores


