"""Endless training batches whose order is a pure function of (seed, step).

A resumed run starts at its step with no iterator state to restore, and any number of processes
cuts the same global batches: process p of n takes every n-th row of a step from the p-th on.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import grain
import numpy as np

from tpad_jax.data import sessions as sessions_lib
from tpad_jax.data.catalogue import Content, Data
from tpad_jax.errors import refuse_if

SCANNED = 10_000  # steps whose batches are looked at beforehand, seconds of work
READ = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)


@dataclass(frozen=True)
class Cut:
    """How the rows of a step are drawn and cut among processes and devices.

    Attributes:
      batch_size: rows of a step over all processes.
      seed: of the order, >= 0.
      processes: number of processes that share a step.
      process: this one's number, from 0.
      shards: local devices, one part each.
      groups: of row numbers, each of which fills the same number of shards in every step, in
        their order. Empty: all rows are drawn together.
    """

    batch_size: int
    seed: int
    processes: int = 1
    process: int = 0
    shards: int = 1
    groups: tuple[np.ndarray, ...] = ()

    def __post_init__(self):
        """Refuse sizes that do not divide."""
        parts = self.processes * self.shards
        refuse_if(self.batch_size < 1 or self.batch_size % parts,
                  f'batch_size={self.batch_size}: not a share for {self.processes} process(es) '
                  f'of {self.shards} device(s). Expected a multiple of {parts}. Fix: choose one.')

    @property
    def size(self) -> int:
        """Rows of this process in a step."""
        return self.batch_size // self.processes

    def own_rows(self, step: int, total: int) -> np.ndarray:
        """Number the rows of this process in a step, int32 [size]; see `positions`."""
        return self._rows(step, total)[self.process::self.processes]

    def parts(self, total: int, steps: int) -> Iterator[np.ndarray]:
        """Yield the rows of `steps` steps, int32 [processes * shards, rows of a shard] each."""
        for step in range(steps + 1):  # one more: the loop fetches a batch ahead
            row = self._rows(step, total)
            yield row.reshape(-1, self.processes).T.reshape(self.processes * self.shards, -1)

    def _rows(self, step, total):
        size = self.batch_size // max(len(self.groups), 1)
        if not self.groups:
            return positions(self.seed, step, size, total)
        return np.concatenate([  # seeds are below 2**32, so the draws of groups differ
            group[positions(self.seed + number * 2**32, step, size, len(group))]
            for number, group in enumerate(self.groups, 1)]).astype(np.int32)


def session_batches(data: Data, *, max_length: int, start_step: int = 0, every_prefix: bool = True,
                    content: Content | None = None, steps: int = 0,
                    owner: np.ndarray | None = None, **cut) -> Iterator[dict]:
    """Iterate over training rows, reshuffled every epoch; a batch may reach over an epoch's end.

    Each batch is this process's part, B = batch_size / processes rows, in `shards` equal
    consecutive parts (one per local device):
      items int32 [B, N] prefix, next int32 [B, N] what follows each position, target int32 [B]
      (all as in `sessions.rows`), valid bool [B] (all True), row int32 [B] the row's number in the
      data set, which does not depend on step, shard or process. Where the model reads the events
      (data.events), also context int32 [B, C].
    With every_prefix=False, moreover `places` int32 [shards * P]: the flat positions b N + j of
    each shard that hold an item, then -1; P is the most any of `steps` steps needs.
    With content, moreover the distinct items of each shard, U rows (see `content_width`): ids
    int32 [shards * U] (0 first, then ascending, then 0 to fill up), image uint8 [shards * U, H, W,
    3], has_image bool [shards * U], tokens int32 [shards * U, T], and
      slots, next_slots int32 [B, N]: positions of items and next among the rows of their shard.

    Args:
      data: its train split is read.
      max_length: N.
      start_step: the step whose batch comes first.
      every_prefix: False trains on each session's last item only, see `sessions.rows`.
      content: pixels and tokens to add.
      steps: how many will be read, for U and P; 0: unknown.
      owner: int [S]. The group of every session, -1: of none; see `Cut`. None: no groups.
      **cut: of `Cut`.

    Returns:
      An iterator that prefetches in threads; `close()` ends them early.

    Raises:
      InputError: batch_size cannot be divided evenly, or there is no training row.
    """
    events = data.events
    if events is not None and not every_prefix:  # all positions are trained on, of any kind
        events = replace(events, targets=())
    rows = sessions_lib.rows(data.train, max_length, every_prefix, events)
    cut = Cut(**cut, groups=_groups(None if owner is None else owner[rows.session]))
    refuse_if(not len(rows.target), 'no training session has two items. Expected rows to train on. '
              'Fix: give longer sessions.')
    width = 0 if content is None else content_width(rows, data.num_items, cut, steps)
    length = np.count_nonzero(rows.items, axis=1)
    room = 0 if every_prefix else places_width(length, max_length, cut, steps)

    def batch(step: int) -> dict:
        row = cut.own_rows(step, len(rows.target))
        out = dict(items=rows.items[row], next=rows.next[row], target=rows.target[row],
                   valid=np.ones(cut.size, bool), row=row)
        if rows.context is not None:
            out['context'] = rows.context[row]
        if room:
            out['places'] = _places(out['items'], cut.shards, room)
        return out if content is None else out | with_content(out, content, cut.shards, width)

    return _iterate(batch, start_step)


def item_batches(data: Data, *, content: Content | None, start_step: int = 0,
                 owner: np.ndarray | None = None, **cut) -> Iterator[dict]:
    """Iterate over single catalogue items, cold ones included; keys as of `session_batches`.

    items int32 [B, 1] is the item, next [B, 1] and target [B] are 0 and row is the item id. The
    content rows of a shard are the padding item and its items in order, U = B / shards + 1.

    Args:
      data: its items are read.
      content: their pixels and tokens; None: the batches have none, see `session_batches`.
      start_step: the step whose batch comes first.
      owner: int [V]. The group of the items 1..V, see `session_batches`.
      **cut: of `Cut`.

    Returns:
      An iterator that prefetches in threads; `close()` ends them early.

    Raises:
      InputError: batch_size cannot be divided evenly.
    """
    cut = Cut(**cut, groups=_groups(owner))
    slots = np.tile(np.arange(1, cut.size // cut.shards + 1, dtype=np.int32), cut.shards)[:, None]

    def batch(step: int) -> dict:
        item = cut.own_rows(step, data.num_items) + 1
        none = np.zeros((cut.size, 1), np.int32)
        out = dict(items=item[:, None], next=none, target=none[:, 0],
                   valid=np.ones(cut.size, bool), row=item)
        if content is None:
            return out
        ids = np.pad(item.reshape(cut.shards, -1), ((0, 0), (1, 0)))
        return out | dict(slots=slots, next_slots=none, **content_rows(content, ids))

    return _iterate(batch, start_step)


def _groups(owner):
    """Row numbers by owner, int [R] -> a tuple; rows of owner -1 are in none."""
    known = [] if owner is None else np.unique(owner[owner >= 0])
    return tuple(np.flatnonzero(owner == one) for one in known)


def positions(seed: int, step: int, batch_size: int, total: int) -> np.ndarray:
    """Choose the rows of a step: a window of all epochs' orders, one after the other.

    Every row occurs once per epoch of total / batch_size steps.

    Args:
      seed: of the order.
      step: the step.
      batch_size: rows of a step.
      total: number of rows.

    Returns:
      int32 [batch_size], numbers in 0..total - 1.
    """
    place = step * batch_size + np.arange(batch_size, dtype=np.int64)
    epochs, where = np.divmod(place, total)
    out = np.empty(len(place), np.int32)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        inside = epochs == epoch
        out[inside] = _epoch_order(seed, epoch, total)[where[inside]]
    return out


def content_width(rows: sessions_lib.Rows, num_items: int, cut: Cut, steps: int) -> int:
    """Compute U, content rows of a shard: one static shape for the distinct items of any step.

    Such a stage spends most of its time on encoding the content. So the bound is exact: the batches
    of all `steps` are computed beforehand, as they depend on the step alone. Without a number of
    steps, or with more than SCANNED, it is the worst case, min(B / shards * (N + 1), V). Both
    bounds include the padding item.

    Args:
      rows: of training.
      num_items: V.
      cut: of a step.
      steps: how many are read; 0: unknown.

    Returns:
      U.
    """
    worst = min(cut.size // cut.shards * (rows.items.shape[1] + 1), num_items) + 1
    if not 0 < steps <= SCANNED:
        return worst
    most = max(len(np.union1d(rows.items[part], np.append(rows.target[part], 0)))
               for parts in cut.parts(len(rows.target), steps) for part in parts)
    return min(worst, -(-most // 16) * 16)


def places_width(length: np.ndarray, max_length: int, cut: Cut, steps: int) -> int:
    """Compute P, places of a shard: one static shape for the positions of any step's items.

    Exact over the batches of `steps` steps, like `content_width`; without a number of steps the
    worst case.

    Args:
      length: int [R]. Items of each row.
      max_length: N.
      cut: of a step.
      steps: how many are read; 0: unknown.

    Returns:
      P.
    """
    worst = cut.size // cut.shards * max_length
    if steps <= 0:
        return worst
    most = max(int(length[parts].sum(axis=1).max()) for parts in cut.parts(len(length), steps))
    return min(worst, -(-most // 32) * 32)


def _places(items: np.ndarray, shards: int, room: int) -> np.ndarray:
    """The flat positions of each shard's items, then -1: int32 [shards * room]."""
    out = np.full((shards, room), -1, np.int32)
    for shard, part in zip(out, np.split(items, shards), strict=True):
        used = np.flatnonzero(part)
        shard[:len(used)] = used
    return out.ravel()


def content_rows(content: Content, ids: np.ndarray) -> dict:
    """Gather the content of items.

    Args:
      content: pixels and tokens of the catalogue.
      ids: int32 [shards, U]. In every shard 0, then items, then 0 to fill up.

    Returns:
      ids int32 [shards * U] and the image, has_image and tokens of these items.
    """
    source = np.asarray(content.image)
    image = np.zeros((*ids.shape, *source.shape[1:]), np.uint8)
    for shard, out in zip(ids, image, strict=True):
        used = 1 + np.count_nonzero(shard)  # the filling is never touched, so it costs nothing
        np.take(source, shard[:used], axis=0, out=out[:used], mode='clip')
    ids = ids.ravel()
    return dict(ids=ids, image=image.reshape(len(ids), *source.shape[1:]),
                has_image=content.has_image[ids], tokens=content.tokens[ids])


@lru_cache(maxsize=4)  # two epochs of two streams
def _epoch_order(seed: int, epoch: int, total: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(np.arange(total, dtype=np.int32))


def with_content(batch: dict, content: Content, shards: int, width: int) -> dict:
    """Gather the content of a batch's items, shard by shard.

    Args:
      batch: items and next, int [B, N]. Item ids.
      content: pixels and tokens of the catalogue.
      shards: equal parts of the batch.
      width: rows of a shard's content, at least its different items and padding.

    Returns:
      slots and next_slots int [B, N], and the result of `content_rows`.
    """
    items = np.stack([batch['items'], batch['next']])  # [2, B, N]
    size = items.shape[1] // shards
    slots = np.empty_like(items)
    ids = np.zeros((shards, width), np.int32)
    for shard in range(shards):
        part = slice(shard * size, (shard + 1) * size)
        present = np.union1d(items[:, part], 0)
        ids[shard, :len(present)] = present
        slots[:, part] = np.searchsorted(present, items[:, part])
    return dict(slots=slots[0], next_slots=slots[1], **content_rows(content, ids))


def _iterate(batch: Callable[[int], dict], start_step: int) -> Iterator[dict]:
    # all steps as a source of whole batches: gathering by array beats row-wise reading 10x
    return iter(grain.MapDataset.range(sys.maxsize).map(batch)[start_step:].to_iter_dataset(READ))
