"""A finished run as an object that recommends: `tpad_jax.load(workdir)`.

Its lists are the ones that evaluation ranked: by the model that validation chose, over every item
of the catalogue, ties by item. The MLLM is loaded only when the first new item is added.
"""

import json
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import jax.numpy as jnp
import numpy as np
import polars as pl
from safetensors import safe_open

from tpad_jax.core import files
from tpad_jax.distributed.devices import compiled
from tpad_jax.errors import refuse_if, refusing
from tpad_jax.evaluation.scorers import session_encoder, session_shifts
from tpad_jax.serving import artifact, calls, topk
from tpad_jax.serving.artifact import Table
from tpad_jax.serving.conditions import Wanted, begin, wanted
from tpad_jax.serving.explain import explain as reasons
from tpad_jax.serving.rerank import Reranker


@dataclass(frozen=True, eq=False)
class Recommended:
    """The first K items of S sessions.

    Attributes:
      items: S lists of K item ids, best first.
      scores: float32 [S, K]. Higher is better; comparable within a session. NaN where `empty`.
      unknown: S lists of ids that are not in the catalogue and were dropped.
      empty: bool [S]. The session has no known item; its list holds the items with most events in
        the training sessions.
      why: S reasons, see `explain.explain`, or None.

    Under conditions a list may be shorter than K; `scores` are then NaN after its last item.
    """

    items: list[list[str]]
    scores: np.ndarray
    unknown: list[list[str]]
    empty: np.ndarray
    why: list[dict] | None = None


class Recommender:
    """A finished run that recommends; see `load`. All methods are thread-safe.

    Attributes:
      model: name of the model in results.json.
      max_length: number of items of a session that count, its last ones.
      trained: number of items of the run; items with higher rows were added.
      table: the catalogue at this moment.
      ids: item ids by row; [0] is ''. The list only grows.
      titles: titles by row; [0] is ''. The list only grows.
      served, reads: the artefact, and its property `reads`.
      base: directory of the run's MLLM, if it moved.
      kept_masks: masks of conditions that may be repeated, see conditions.py.
    """

    def __init__(self, served: artifact.Served, base: str = ''):
        self.served, self.base, self.reads, self._reader = served, base, served.reads, None
        self._adding = threading.Lock()
        # An added item is written into z in place, so a call must not be dispatched meanwhile.
        self._dispatching = threading.Lock()
        self.model, self.max_length = served.about['model'], served.about['max_length']
        self.trained = len(served.ids) - 1
        encode, shifts = session_encoder(served.specs), session_shifts(served.specs)
        self._encode, self._shifts = compiled(encode), compiled(shifts)
        self._search = compiled(topk.searcher(encode, shifts), static_argnames='k')
        self._write = compiled(lambda z, rows, vectors: z.at[rows].set(vectors, mode='drop'),
                               donate_argnums=0)
        self._vectors = []  # of added items, on the host
        self._popular = 1 + np.argsort(-served.events[1:], kind='stable').astype(np.int32)
        self._rows = compiled(lambda z, rows: z[rows], seldom=True)
        self.kept_masks = {}  # of conditions that may be repeated
        self.ids, self.titles = list(served.ids), list(served.titles)
        number = {name: row for row, name in enumerate(self.ids) if row}
        self.table = Table(len(self.ids), number, served.attributes)
        self._z, self._weights = calls.padded(served.z, (served.weights, served.experts),
                                              len(served.z))

    def recommend(self, sessions: Sequence[Sequence[str]], k: int | None = None,
                  conditions: dict | None = None, *, seen: Sequence[Sequence[str]] | None = None,
                  rerank: Reranker | None = None, explain: bool = False,
                  events: Sequence[dict] | None = None) -> Recommended:
        """Return the K items most likely to follow each session.

        Items of the session itself are ranked like all others, as in evaluation.

        Args:
          sessions: S lists of item ids in the order of time. Unknown ids are dropped and reported.
            Of a longer session the last `max_length` known items count.
          k: length of a list, from 1 to min(MAX_K, number of items). None: 20, or all.
          conditions: what the lists may hold; see `conditions.Conditions`.
          seen: S lists of ids that the lists must not hold; unknown ids are ignored.
          rerank: changes the order of the first items; see rerank.py.
          explain: whether to return the reasons.
          events: what is known of the sessions' events, see `calls.with_events`.

        Raises:
          InputError: k is out of bounds, a session is not a list of texts, or a condition is
            unusable.
        """
        table = self.table
        rows, unknown = self.rows(sessions, table)
        asked = wanted(self, rows, table, conditions, seen, rerank)
        wide = calls.with_events(self, rows, sessions, events)
        items, scores = self.first(wide, min(20, table.count - 1) if k is None else k, table, asked)
        why = reasons(self, wide, items, table, asked) if explain else None
        return Recommended(self.names(items), scores, unknown, rows[:, 0] == 0, why)

    def names(self, items: np.ndarray) -> list[list[str]]:
        """Return the ids of lists int32 [S, k]; places that hold 0 are empty."""
        return [[self.ids[n] for n in row if n] for row in items.tolist()]

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
            refuse_if(not isinstance(session, list | tuple) or not all(
                isinstance(name, str) for name in session),
                f'session {place} is not a list of item ids (texts)')
            numbers = [table.number.get(name, table.count) for name in session]
            known = [number for number in numbers if number < table.count][-self.max_length:]
            rows.append(known + [0] * (self.max_length - len(known)))
            unknown.append([name for name, number in zip(session, numbers, strict=True)
                            if number >= table.count])
        return np.array(rows, np.int32).reshape(-1, self.max_length), unknown

    def first(self, rows: np.ndarray, k: int, table=None, asked: Sequence[Wanted] | None = None
              ) -> tuple[np.ndarray, np.ndarray]:
        """Recommend by rows: int32 [S, N] -> items int32 [S, k] and scores float32 [S, k].

        Args:
          rows: int32 [S, N]. Prefixes as `rows` returns them.
          k: length of a list.
          table: the catalogue to read; the current one by default.
          asked: S conditions of `conditions.wanted`; None: there are none.

        Raises:
          InputError: k is out of bounds.
        """
        parts = [finish() for finish in list(self.begin(rows, k, table, asked))]
        items, scores = (np.concatenate(x) for x in zip(*parts, strict=True))
        return items, scores

    def begin(self, rows: np.ndarray, k: int, table=None, asked: Sequence[Wanted] | None = None
              ) -> Iterable:
        """Dispatch rows int32 [S, N] to the device and yield, per call, a function that waits.

        Each function returns (items int32, scores float32) [s, k] of the next s rows. The next call
        runs while the answers of the one before are read.

        Args:
          rows: int32 [S, N]. Prefixes as `rows` returns them.
          k: length of a list.
          table: the catalogue to read; the current one by default.
          asked: as for `first`.

        Raises:
          InputError: k is out of bounds.
        """
        table = table or self.table
        most = min(calls.MAX_K, table.count - 1)
        refuse_if(isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= most,
                  f'k={k!r} is out of bounds. Expected a whole number from 1 to {most}, '
                  f'{calls.MAX_K} or the {table.count - 1} items of the catalogue')
        for part in calls.parts(np.arange(len(rows))):
            if asked:
                yield begin(self, rows[part], k, table, [asked[row] for row in part])
            else:
                scores, items = self.search(rows[part], k, table)
                yield partial(calls.finish, rows[part], items, scores, self.by_events(table)[:k])

    def search(self, rows: np.ndarray, k: int, table: Table, allowed: np.ndarray | None = None,
               boosts: Sequence[np.ndarray] | None = None) -> tuple:
        """Dispatch one call of the compiled search.

        Args:
          rows: int32 [s, N]. Prefixes, at most SIZES[-1].
          k: items of a list that are needed.
          table: the catalogue.
          allowed: uint8 [s, R / 8] of `topk.packed`, or None.
          boosts: items int32 [s, M] and shifts of their scores float32 [s, M], or None.

        Returns:
          Scores and items of the device, [S, K] with S in SIZES and K in LENGTHS.
        """
        compiled_k = next(length for length in calls.LENGTHS if length >= k)
        with self._dispatching:
            if allowed is not None:  # rows of the table that were added since
                more = len(self._z) // 8 - allowed.shape[1]
                allowed = calls.filled(np.pad(allowed, ((0, 0), (0, more))))
            return self._search(self._weights, self._z, np.int32(table.count), calls.filled(rows),
                                allowed, boosts and tuple(map(calls.filled, boosts)), k=compiled_k)

    def by_events(self, table: Table) -> np.ndarray:
        """Return all rows int32 [V] by training events, most first; added items come last."""
        added = np.arange(self.trained + 1, table.count, dtype=np.int32)
        return np.concatenate([self._popular, added]) if len(added) else self._popular

    def vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return z float32 [..., D] of rows int32 [...], without the experts' columns."""
        with self._dispatching:
            z = self._rows(self._z, rows)
        return np.asarray(z)[..., :sum(spec.fusion.width for spec in self.served.specs)]

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
        refuse_if(absent, f'{len(absent)} of {len(ids)} ids are not in the catalogue, '
                  f'{next(iter(absent), "")!r} among them')
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
        return self.encode(self.rows(sessions)[0])

    def encode(self, rows: np.ndarray) -> np.ndarray:
        """Return h float32 [S, D] of rows int32 [S, N], see `embed_sessions`."""
        with self._dispatching:
            parts = [self._encode(self._weights, self._z, calls.filled(part))
                     for part in calls.parts(rows)]
        vectors = np.concatenate(parts)[:len(rows)]
        vectors[rows[:, 0] == 0] = np.nan
        return vectors

    def shifts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return the shifts of scores that no product of vectors has, or None without any.

        Args:
          rows: int32 [S, N]. Prefixes as `rows` returns them.

        Returns:
          Items int32 [S, M] and float32 [S, M], see `scorers.session_shifts`.
        """
        with self._dispatching:
            parts = [self._shifts(self._weights, self._z, calls.filled(part))
                     for part in calls.parts(rows)]
        if parts[0] is None:
            return None
        items, shifts = (np.concatenate(x)[:len(rows)] for x in zip(*parts, strict=True))
        return items, shifts

    def add_items(self, items: Sequence[dict]) -> np.ndarray:
        """Add new items to the catalogue without training; they are recommended from then on.

        New items are cold: picture and text are read as the catalogue's were, and there is no id
        embedding. The first call loads the MLLM. Either all items are added or none. Where the run
        recommends from features computed elsewhere, an item brings its own, and no MLLM is loaded.

        Args:
          items: dicts with 'id', with 'image' (the bytes of a JPEG, PNG, WebP or GIF file, or its
            path), and with 'text' or the fields of the run's texts (title, brand, category and
            description for Amazon files). Picture or words may be missing, not both. Brand,
            category and price (a number) are also side features if the run has them. 'features',
            F numbers, of a run that recommends from `given` rows.

        Returns:
          Their vectors, float32 [n, D].

        Raises:
          InputError: an item is unusable, its id exists, or the run cannot read new items (see
            new_items.Reader).
        """
        from tpad_jax.serving import new_items  # only a new item needs the encoders

        items = list(items)
        new_items.checked(items, self.served.about['words'])
        names = [item['id'] for item in items]
        titles = [str(item.get('title') or item.get('text') or item['id'])[:200] for item in items]
        with self._adding:
            for place, name in enumerate(names):
                refuse_if(name in self.table.number or name in names[:place],
                          f'item id {name!r} exists. Fix: choose another id')
            if not items:
                return np.zeros((0, self._z.shape[1]), np.float32)
            if self._reader is None:
                self._reader = new_items.Reader(self.served, self.base)
            vectors = self._reader(items)
            self._append(vectors, names, titles, pl.DataFrame(
                {name: [item.get(name) for item in items] for name in artifact.ATTRIBUTES},
                artifact.ATTRIBUTES))
            return vectors

    def _append(self, vectors, names, titles, attributes):
        """Write vectors into the free rows of z, in place, and publish a table that has them."""
        table = self.table
        rows = np.arange(table.count, table.count + len(names), dtype=np.int32)
        with self._dispatching:
            if rows[-1] >= len(self._z):
                self._z, self._weights = calls.padded(self._z, self._weights, rows[-1] + 1)
            for part, values in zip(calls.parts(rows), calls.parts(vectors), strict=True):
                # rows that only fill a call are out of range and dropped
                self._z = self._write(self._z, calls.filled(part, np.iinfo(np.int32).max),
                                      calls.filled(values))
        self._vectors.append(vectors)
        self.ids.extend(names)
        self.titles.extend(titles)
        table.number.update(zip(names, rows.tolist(), strict=True))
        self.table = table._replace(count=table.count + len(names), attributes=pl.concat(
            [table.attributes, attributes.select(table.attributes.columns)]))

    def save_added(self, file) -> None:
        """Write the added items to a .safetensors file for `restore_added` of a later process.

        Args:
          file: path of the file.
        """
        first = self.trained + 1
        about = {'ids': self.ids[first:], 'titles': self.titles[first:],
                 'model': self.served.about['digests'][artifact.MODEL]}
        about['attributes'] = self.table.attributes[self.trained:].to_dict(as_series=False)
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
            # a file of an earlier version has none
            columns = {name: about.get('attributes', {}).get(name, [None] * len(ids))
                       for name in artifact.ATTRIBUTES}
            attributes = pl.DataFrame(columns, artifact.ATTRIBUTES)
            if vectors.shape != (len(ids), self._z.shape[1]) or not (
                    len(titles) == len(attributes) == len(ids)):
                raise ValueError(f'{list(vectors.shape)} vectors for {len(ids)} ids')
        refuse_if(about['model'] != self.served.about['digests'][artifact.MODEL], f'{file} holds '
                  'items of another run or update. Fix: name a file of this one')
        with self._adding:
            refuse_if(not self.table.number.keys().isdisjoint(ids),
                      f'{file} names items that exist. Fix: restore it only once')
            if ids:
                self._append(vectors, ids, titles, attributes)


def load(workdir, *, base: str = '', added: str = '') -> Recommender:
    """Read a finished run for recommending, without an MLLM and without the raw data.

    Args:
      workdir: directory of the run.
      base: directory of the run's MLLM if it moved; only new items need it.
      added: file of added items, which are restored if it exists; see `artifact.added_file`.

    Raises:
      InputError: the run is absent, unfinished or without recommender, or a file is damaged.
    """
    shop = Recommender(artifact.read(workdir), base)
    if added and (file := artifact.added_file(shop.served, added)).is_file():
        shop.restore_added(file)
    return shop
