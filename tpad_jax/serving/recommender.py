"""A finished run as an object that recommends: `tpad_jax.load(workdir)`.

What it answers is what evaluation ranked: the model that validation chose, every item of the
catalogue scored, ties by item. No MLLM runs and none is loaded until a new item comes.
"""

import json
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tpad_jax.distributed.devices import compiled
from tpad_jax.errors import InputError
from tpad_jax.evaluation.scorers import session_encoder, session_shifts
from tpad_jax.serving import artifact, topk

SIZES = 1, 16, 256  # rows of a compiled call: the least that holds what is asked
MAX_K = 1000


@dataclass(frozen=True, eq=False)
class Recommended:
    """The first K items of S sessions.

    Attributes:
      items: S lists of K item ids, best first. scores: float32 [S, K], higher is better, to be
        compared within a session; NaN where `empty`.
      unknown: S lists of the ids that were dropped because no item has them.
      empty: bool [S], nothing was left of the session: its list is of the items with most events in
        the training sessions, the same for all.
    """

    items: list[list[str]]
    scores: np.ndarray
    unknown: list[list[str]]
    empty: np.ndarray


class Table(NamedTuple):
    """The catalogue of a moment; it is replaced whole, never changed."""

    z: jax.Array  # [rows, D], rows a multiple of topk.CHUNK
    weights: tuple
    ids: list[str]
    titles: list[str]
    number: dict[str, int]
    popular: np.ndarray  # items by their events


class Recommender:
    """See `load`. All methods may be called from several threads.

    Attributes:
      model: name of the model in results.json. max_length: items of a session that count, its last.
      trained: number of items the run knew; those above it were added.
    """

    def __init__(self, kept: artifact.Served, base: str = ''):
        self._kept, self._base, self._reader = kept, base, None
        self._adding = threading.Lock()
        self.model, self.max_length = kept.about['model'], kept.about['max_length']
        self.trained = len(kept.ids) - 1
        encode = session_encoder(kept.specs)
        self._encode = compiled(encode)
        self._search = compiled(topk.searcher(encode, session_shifts(kept.specs)),
                                static_argnames='k')
        popular = 1 + np.argsort(-kept.events[1:], kind='stable').astype(np.int32)
        self._table = self._laid(kept.z, kept.ids, kept.titles, popular)

    @property
    def table(self) -> Table:
        """The catalogue as it is now; numbers of an earlier one stay what they are."""
        return self._table

    @property
    def ids(self) -> list[str]:
        """Item ids by number; [0] is '', no item."""
        return self._table.ids

    @property
    def titles(self) -> list[str]:
        """Titles by number; [0] is ''."""
        return self._table.titles

    def recommend(self, sessions: Sequence[Sequence[str]], k: int = 20) -> Recommended:
        """The K items most likely to follow each session.

        Items of the session itself are ranked like all others, as in evaluation.

        Args:
          sessions: S lists of item ids in the order of time. Ids no item has are dropped and
            reported; of a longer session the last `max_length` known ones count.
          k: 1..min(MAX_K, number of items).

        Raises:
          InputError: k is out of bounds, or a session is no list of texts.
        """
        table = self._table
        rows, unknown = self.rows(sessions, table)
        items, scores = self.first(rows, k, table)
        ids = table.ids
        return Recommended([[ids[n] for n in row] for row in items.tolist()], scores, unknown,
                           rows[:, 0] == 0)

    def rows(self, sessions: Iterable[Sequence[str]], table=None) -> tuple[np.ndarray, list]:
        """Item numbers int32 [S, N] of sessions, left aligned, 0 pads, and the unknown ids of each.

        Raises:
          InputError: a session is no list of texts.
        """
        number, found, unknown = (table or self._table).number, [], []
        for place, session in enumerate(sessions):
            if not isinstance(session, list | tuple) or not all(
                    isinstance(name, str) for name in session):
                raise InputError(f'session {place} is no list of item ids (texts)')
            known = [number[name] for name in session if name in number][-self.max_length:]
            found.append(known + [0] * (self.max_length - len(known)))
            unknown.append([name for name in session if name not in number])
        return np.array(found, np.int32).reshape(-1, self.max_length), unknown

    def first(self, rows: np.ndarray, k: int, table=None) -> tuple[np.ndarray, np.ndarray]:
        """`recommend` in numbers: rows int32 [S, N] -> items int32 and scores float32 [S, k]."""
        calls = list(self.begin(rows, k, table))
        if not calls:
            return np.zeros((0, k), np.int32), np.zeros((0, k), np.float32)
        parts = [finish() for finish in calls]
        return tuple(np.concatenate(x) for x in zip(*parts, strict=True))

    def begin(self, rows: np.ndarray, k: int, table=None) -> Iterable:
        """Send rows int32 [S, N] to the device and yield, per call, a function that waits for it.

        Each returns (items int32, scores float32) [s, k] of the next s rows. What is asked for
        next is under way while the answers before are read.

        Raises:
          InputError: k is out of bounds.
        """
        table = table or self._table
        total = len(table.ids) - 1
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or not (
                1 <= k <= min(MAX_K, total)):
            raise InputError(f'k={k!r}: a whole number from 1 to {min(MAX_K, total)} is needed; '
                             f'there are {total} items, and {MAX_K} is the most')
        for begin in range(0, len(rows), SIZES[-1]):
            part = rows[begin:begin + SIZES[-1]]
            scores, items = self._search(table.weights, table.z, np.int32(total + 1),
                                         _filled(part), k=_ceil(k))
            yield partial(_finish, part, items, scores, table.popular[:k])

    def embed_items(self, ids: Sequence[str] | None = None) -> np.ndarray:
        """Item vectors z float32 [n, D], whose product with a session's is its score.

        Args:
          ids: of items; None: of all, in the order of `ids[1:]`.

        Raises:
          InputError: an id no item has.
        """
        table = self._table
        if ids is None:
            return np.asarray(table.z)[1:len(table.ids)]
        absent = [name for name in ids if name not in table.number]
        if absent:
            raise InputError(f'{len(absent)} of {len(ids)} ids are of no item, {absent[0]!r} among '
                             'them')
        return np.asarray(table.z)[[table.number[name] for name in ids]]

    def embed_sessions(self, sessions: Sequence[Sequence[str]]) -> np.ndarray:
        """Session vectors h float32 [S, D]; the temperature is in them. NaN of an empty session.

        With config.model.repeats or .together some items moreover get a shift of their scores,
        which no product of vectors says.
        """
        table = self._table
        rows, _ = self.rows(sessions, table)
        found = np.zeros((len(rows), table.z.shape[1]), np.float32)
        for begin in range(0, len(rows), SIZES[-1]):
            part = rows[begin:begin + SIZES[-1]]
            found[begin:begin + len(part)] = np.asarray(
                self._encode(table.weights, table.z, _filled(part)))[:len(part)]
        found[rows[:, 0] == 0] = np.nan
        return found

    def add_items(self, items: Sequence[dict]) -> np.ndarray:
        """Append new items to the catalogue, without training; from then on they are recommended.

        They are cold items: read from picture and text as the catalogue's items were, without an
        embedding of their own. The first call loads the MLLM. All are added, or none.

        Args:
          items: dicts of 'id'; 'image', the bytes of a JPEG, PNG, WebP or GIF file or its path;
            and either 'text' or what the run made its texts of (title, brand, category and
            description, for Amazon files). A picture or words may be missing, not both. Brand,
            category and price (a number) are side features, too, where the run has them.

        Returns:
          Their vectors, float32 [n, D].

        Raises:
          InputError: an item is unusable, has an id that is there already, or the run cannot read
            new items (see newcomers.Reader).
        """
        with self._adding:
            return self._add(list(items))

    def _add(self, items):
        from tpad_jax.serving import new_items  # here: only a new item needs what reads items

        new_items.checked(items, self._kept.about['words'])
        names = [item['id'] for item in items]
        table = self._table
        for place, name in enumerate(names):
            if name in table.number or name in names[:place]:
                raise InputError(f'there is an item {name!r} already; give another id')
        if not items:
            return np.zeros((0, table.z.shape[1]), np.float32)
        if self._reader is None:
            self._reader = new_items.Reader(self._kept, self._base)
        vectors = self._reader(items)
        self._append(vectors, names, [_title(item) for item in items])
        return vectors

    def _append(self, vectors, names, titles):
        table = self._table
        count, new = len(table.ids), np.arange(len(names), dtype=np.int32)
        z = np.asarray(table.z)[:count]
        self._table = self._laid(np.concatenate([z, vectors]), table.ids + names,
                                 table.titles + titles,
                                 np.concatenate([table.popular, count + new]))

    def save_added(self, file) -> None:
        """Leave the added items in a .safetensors file, for `restore_added` of a later process."""
        table, first = self._table, self.trained + 1
        about = {'ids': table.ids[first:], 'titles': table.titles[first:],
                 'model': self._kept.about['digests'][artifact.MODEL]}
        partial = Path(f'{file}.partial')
        save_file({'vectors': np.asarray(table.z)[first:len(table.ids)]}, partial,
                  {key: json.dumps(x) for key, x in about.items()})
        os.replace(partial, file)

    def restore_added(self, file) -> None:
        """Append what `save_added` left; nothing is read anew.

        Raises:
          InputError: the file is damaged, of another run, or names an item that is there already.
        """
        try:
            with safe_open(file, framework='np') as tensors:
                about = {key: json.loads(x) for key, x in tensors.metadata().items()}
                vectors = tensors.get_tensor('vectors')
            ids, titles = about['ids'], about['titles']
            if vectors.shape != (len(ids), self._table.z.shape[1]) or len(titles) != len(ids):
                raise ValueError(f'{list(vectors.shape)} vectors for {len(ids)} ids')
        except artifact.UNREADABLE as error:
            raise InputError(f'{file} holds no added items ({type(error).__name__}: {error}); '
                             'name another file, or delete it and add them again') from error
        if about['model'] != self._kept.about['digests'][artifact.MODEL]:
            raise InputError(f'{file} holds items that were read for another run; name its own')
        with self._adding:
            if ids and not self._table.number.keys().isdisjoint(ids):
                raise InputError(f'{file} names items that are there already')
            if ids:
                self._append(vectors, ids, titles)

    def _laid(self, z, ids, titles, popular):
        """A table with room up to the next whole chunk: a new item most often compiles nothing."""
        room = topk.rounded(len(z)) - len(z)
        z = np.pad(z, ((0, room), (0, 0)))
        weights = tuple((params, {name: np.pad(x, ((0, len(z) - len(x)), (0, 0)))
                                  for name, x in near.items()})
                        for params, near in self._kept.weights)
        number = {name: n for n, name in enumerate(ids) if n}
        return Table(jax.device_put(z), jax.device_put(weights), ids, titles, number, popular)


def load(workdir, *, base: str = '') -> Recommender:
    """Read a finished run for recommending; no MLLM and none of the raw data is read.

    Args:
      workdir: of the run. base: where its MLLM's directory lies, if it was moved since; only new
        items need it.

    Raises:
      InputError: no such run, one that is not finished or has no recommender, or a damaged file.
    """
    return Recommender(artifact.read(workdir), base)


def _filled(rows):
    """Rows up to one of SIZES, so that few shapes are ever compiled."""
    size = next(size for size in SIZES if size >= len(rows))
    return np.pad(rows, ((0, size - len(rows)), (0, 0)))


def _finish(rows, items, scores, popular):
    """On the host, the rows that were asked for; an empty session has the popular items."""
    items, scores = (np.array(x)[:len(rows), :len(popular)] for x in (items, scores))
    empty = rows[:, 0] == 0
    items[empty], scores[empty] = popular, np.nan
    broken = np.flatnonzero(~(np.isfinite(scores).all(axis=1) | empty))
    if len(broken):
        raise FloatingPointError(f'the scores of session {broken[0]} of this call are not finite')
    return items, scores


def _ceil(k):
    """The K that is compiled: 20, 50, 100, 200, 500 or 1000."""
    return next(n for n in (20, 50, 100, 200, 500, MAX_K) if n >= k)


def _title(item):
    return str(item.get('title') or item.get('text') or item['id'])[:200]
