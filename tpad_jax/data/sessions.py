"""Sessions: cut from timed interactions, split by time, filtered, unrolled into prefix rows.

Pure functions on arrays. A session is a run of one user's items in order. The sessions of a split
are stored as compressed rows (CSR), so that a million of them are two flat arrays.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import polars as pl

from tpad_jax.errors import InputError, refuse_if

DAY = 86_400  # seconds
CELLS = 2**22  # scores by which sessions are drawn at a time


class Sessions(NamedTuple):
    """S sessions with E events in all; session k is `items[offsets[k]:offsets[k + 1]]`.

    Attributes:
      items: int32 [E]. Item ids 1..V. Test sessions may hold 0, an item that is not ranked.
      offsets: int64 [S + 1].
      start: int64 [S]. Time of each session's first event in seconds since 1970 (UTC).
      time: int64 [E]. Milliseconds since 1970 (UTC) of every event; None: not known, as below.
      kind: int32 [E]. Number of the event's kind in `catalogue.Data.kinds`.
      visitor: int64 [S]. An opaque number, equal for sessions of one visitor; -1: not known.
    """

    items: np.ndarray
    offsets: np.ndarray
    start: np.ndarray
    time: np.ndarray | None = None
    kind: np.ndarray | None = None
    visitor: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Events of every session: int64 [S]."""
        return np.diff(self.offsets)

    @property
    def owner(self) -> np.ndarray:
        """The session of every event: int64 [E]."""
        return np.repeat(np.arange(len(self.offsets) - 1), self.lengths)


class Rows(NamedTuple):
    """R pairs of a prefix and the item that follows it, one per scored prediction.

    Attributes:
      items: int32 [R, N]. The prefix, left aligned, 0 pads.
      next: int32 [R, N]. The item that follows position j (the target at the last valid j), 0 pads.
      target: int32 [R]. The item to predict; 0: a miss of every model, see `rows`.
      session: int32 [R]. Its session's number in the split.
      context: int32 [R, C]. Times, kinds and more of the events, see events.py; None: not read.
    """

    items: np.ndarray
    next: np.ndarray
    target: np.ndarray
    session: np.ndarray
    context: np.ndarray | None = None

    def take(self, index: np.ndarray) -> 'Rows':
        """Select rows by their numbers or by a mask."""
        return Rows(*(None if array is None else array[index] for array in self))

    def read_by(self, scorer: Callable) -> np.ndarray:
        """Return what a scorer reads, int32 [R, N + C]: the prefixes, and the field of `reads`.

        A scorer without the attribute `reads` has the prefixes alone.
        """
        name = getattr(scorer, 'reads', None)
        more = None if name is None else getattr(self, name)
        return self.items if more is None else np.column_stack([self.items, more])


def ranked(rows: Rows) -> Rows:
    """Keep the rows whose target is ranked: the others have no likelihood."""
    return rows.take(rows.target > 0)


def sample(rows: Rows, most: int, seed: int) -> Rows:
    """Draw `most` rows, in their order; all, if there are no more."""
    total = len(rows.target)
    return rows if total <= most else rows.take(np.sort(
        np.random.default_rng(seed).choice(total, most, replace=False)))


def check(sessions: Sessions, name: str, num_items: int) -> None:
    """Refuse sessions that nothing can be trained or tested on.

    Args:
      sessions: of one split.
      name: what messages call them, such as 'FILE: train'.
      num_items: V.

    Raises:
      InputError: the offsets do not cut the items into sessions, an item id is not in 1..V, or no
        session has two items.
    """
    items, offsets = sessions.items, sessions.offsets
    # neighbours are compared because a difference of unsigned numbers would wrap around
    refuse_if(len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(items)
              or (offsets[1:] < offsets[:-1]).any(),
              f'{name}_offsets: they do not cut {len(items)} events into sessions. Expected to '
              f'rise from 0 to {len(items)}. Fix: write the start of every session, and the end.')
    for wrong in np.flatnonzero((items < 1) | (items > num_items)):
        raise InputError(f'{name}_items[{wrong}]={items[wrong]}: not an item id. Expected '
                         f'1..{num_items}. Fix: number the items from 1.')
    refuse_if(not (offsets[1:] - offsets[:-1] > 1).any(),
              f'{name}: none of its {len(offsets) - 1} sessions has two items. Expected one in '
              'which an item follows another. Fix: give longer sessions or another split.')


def cut(interactions: pl.DataFrame, *, by_day: bool = False, gap_seconds: int, seed: int,
        min_length: int = 2, per_second: int = 1) -> Sessions:
    """Cut each user's events into sessions, sorted by their start.

    Events with equal times carry no order: they are put in a seeded one, which depends on the
    events alone and not on the order of the file's lines; so are sessions with an equal start.

    Args:
      interactions: columns user (int), item (int, 1..V) and time (int), in any order; optionally
        kind and, where it is not the user, visitor (int).
      by_day: a session is one user's events of one UTC day (for day-granular times); otherwise
        a pause of more than `gap_seconds` begins a new session.
      gap_seconds: the longest pause inside a session; not read when `by_day`.
      seed: seed of the order among equal times.
      min_length: shorter sessions are dropped.
      per_second: units of the times in a second, 1000 for milliseconds.

    Returns:
      The sessions.

    Raises:
      InputError: `gap_seconds` is not positive, or no session is long enough.
    """
    rng = np.random.default_rng(seed)
    events, first = _grouped(interactions, by_day, gap_seconds, rng, per_second)
    item, time = events['item'], events['time']
    offsets = np.append(np.flatnonzero(first), len(item)).astype(np.int64)
    begin = offsets[:-1]
    sessions = Sessions(
        item.astype(np.int32), offsets, time[begin] // per_second, time * (1000 // per_second),
        events['kind'].astype(np.int32) if 'kind' in events else None,
        events.get('visitor', events['user'])[begin])
    long_enough = np.flatnonzero(sessions.lengths >= min_length)
    refuse_if(not len(long_enough), f'config.data.min_length={min_length}: all {len(offsets) - 1} '
              f'sessions of {len(item)} interactions are shorter. Expected longer ones. Fix: give '
              'more reviews, raise config.data.gap_hours or lower config.data.min_length.')
    order = np.lexsort((rng.random(len(long_enough)), sessions.start[long_enough]))
    return take(sessions, long_enough[order])


def time_ties(interactions: pl.DataFrame, *, by_day: bool = False, gap_seconds: int,
              per_second: int = 1) -> float:
    """Compute the share of neighbouring events of one session whose times are equal.

    Args:
      interactions: as in `cut`.
      by_day: as in `cut`.
      gap_seconds: as in `cut`.
      per_second: as in `cut`.

    Returns:
      The share, 0.0 when no session has two events.
    """
    events, first = _grouped(interactions, by_day, gap_seconds, None, per_second)
    inside = ~first[1:]
    return float((np.diff(events['time'])[inside] == 0).mean()) if inside.any() else 0.0


def split(sessions: Sessions, valid: float, test: float) -> tuple[Sessions, Sessions, Sessions]:
    """Split by time: every later split starts strictly later.

    Sessions that start in the same second (with day-granular times: on the same day) stay
    together. A boundary that falls among such sessions moves to the nearer end of them.

    Args:
      sessions: sorted by start.
      valid: share (below 1) or number of sessions for validation.
      test: share (below 1) or number of sessions for the test.

    Returns:
      Training, validation and test sessions.

    Raises:
      InputError: a size is not positive, or a split would stay empty.
    """
    total = len(sessions.start)
    sizes = [size if size >= 1 else size * total for size in (valid, test)]
    options = f'config.data.valid={valid} and config.data.test={test}'
    refuse_if(min(valid, test) <= 0, f'{options}: not both positive. Expected a share below 1 or a '
              'number of sessions. Fix: raise them.')
    last = _boundary(sessions.start, total - round(sizes[1]))
    middle = _boundary(sessions.start, last - round(sizes[0]))
    if not 0 < middle < last < total:  # counting the start times takes long
        raise InputError(f'{options}: {total} sessions with {len(np.unique(sessions.start))} '
                         'different start times cannot be split by time. Expected sessions in '
                         'every part. Fix: give more sessions or other sizes.')
    return tuple(between(sessions, *pair) for pair in pairwise((0, middle, last, total)))


def k_core(train: Sessions, core: int, min_length: int = 2) -> Sessions:
    """Drop items with fewer than `core` events and then short sessions, until nothing changes.

    Item ids stay as they are: a dropped item stays in the catalogue as a cold one.

    Args:
      train: sessions.
      core: events that an item needs; 1 or less: none is dropped.
      min_length: shorter sessions are dropped.

    Returns:
      The remaining sessions.

    Raises:
      InputError: nothing is left.
    """
    if core <= 1:
        return train
    while True:
        frequent = np.bincount(train.items)[train.items] >= core
        lengths = np.bincount(train.owner[frequent], minlength=len(train.start))
        if frequent.all() and (lengths >= min_length).all():
            return train
        offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
        shorter = _picked(train, frequent, slice(None), offsets)
        train = take(shorter, np.flatnonzero(lengths >= min_length))
        refuse_if(not len(train.start), f'config.data.core={core}: no training session of '
                  f'{min_length} items remains. Expected some. Fix: lower the option.')


def rows(sessions: Sessions, max_length: int, every_prefix: bool = True, events=None) -> Rows:
    """Unroll sessions into (prefix, target) rows, in order of session and prefix length.

    Args:
      sessions: S sessions; one with a single item gives no row.
      max_length: N, the width; a longer prefix keeps its last N items.
      every_prefix: True: a session of n items gives n - 1 rows. False (the last-item-only
        protocol of some papers): one, its target being the session's last item.
      events: events.Events, which adds the context and limits the targets to some kinds, or None.

    Returns:
      The rows. Items that are not ranked (0) are left out of prefixes. Where the item to predict is
      such an item, or no other item comes before it, no model can find it: the target is 0.
    """
    owner = sessions.owner
    place = np.arange(len(owner)) - sessions.offsets[owner]  # of every event in its session
    scored = place > 0
    if not every_prefix:
        scored &= place == sessions.lengths[owner] - 1
    if events is not None and events.targets:
        scored &= np.isin(sessions.kind, events.targets)
    end, session = np.flatnonzero(scored), owner[scored]
    ranked = sessions.items > 0
    before = np.append(0, np.cumsum(ranked))  # ranked events before each event
    stop = before[end]
    start = np.maximum(before[sessions.offsets[session]], stop - max_length)
    where = start[:, None] + np.arange(max_length)
    valid = where < stop[:, None]
    padded = np.append(sessions.items[ranked], np.int32(0)).astype(np.int32)
    items = padded[np.where(valid, where, -1)]
    target = np.where(valid[:, 0], sessions.items[end], 0).astype(np.int32)
    items[~valid[:, 0], 0] = 1  # any item: encoders need one, and the row is a miss anyway
    context = None
    if events is not None and events.reads:
        number = np.append(np.flatnonzero(ranked), -1)  # of every ranked event, among all
        context = events(sessions, number[np.where(valid, where, -1)], end)
    return Rows(items=items, target=target, next=padded[np.where(valid, where + 1, -1)],
                session=session.astype(np.int32), context=context)


def warm_items(train: Sessions, num_items: int) -> np.ndarray:
    """Mark the items that occur in a training session: bool [V + 1], False at the padding."""
    return counts(train, num_items) > 0


def counts(train: Sessions, num_items: int) -> np.ndarray:
    """Count the events of every item: int64 [V + 1]."""
    return np.bincount(train.items, minlength=num_items + 1)


def take(sessions: Sessions, index: np.ndarray) -> Sessions:
    """Select the sessions with the numbers `index` (int [S']), in that order."""
    lengths = sessions.lengths[index]
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    shift = sessions.offsets[:-1][index] - offsets[:-1]
    return _picked(sessions, np.arange(offsets[-1]) + np.repeat(shift, lengths), index, offsets)


def between(sessions: Sessions, begin: int, end: int) -> Sessions:
    """Return the sessions with the numbers begin .. end - 1, whose arrays are not copied."""
    offsets = sessions.offsets[begin:end + 1]
    items, time, kind = (None if array is None else array[offsets[0]:offsets[-1]]
                         for array in (sessions.items, sessions.time, sessions.kind))
    return Sessions(items, offsets - offsets[0], sessions.start[begin:end], time, kind,
                    None if sessions.visitor is None else sessions.visitor[begin:end])


def drawn(score: Callable, lengths: np.ndarray, events: np.ndarray, seed: int) -> Sessions:
    """Draw sessions item by item from a model of what follows.

    Args:
      score: prefixes int32 [n, N] -> logits [n, V + 1] of the next item.
      lengths: int [S] in 1..N, of the sessions.
      events: float [V + 1]. First items are drawn by their events plus the mean of all.
      seed: of the draws.

    Returns:
      S sessions, in the order of their number.
    """
    rng, count = np.random.default_rng(seed), len(lengths)
    first = events[1:] + (events[1:].mean() or 1)
    items = np.zeros((count, lengths.max()), np.int32)
    items[:, 0] = 1 + rng.choice(len(first), count, p=first / first.sum())
    size = min(count, max(1, CELLS // len(events)))
    for place in range(1, items.shape[1]):
        for begin in range(0, count, size):
            part = np.minimum(np.arange(begin, begin + size), count - 1)  # one shape
            logits = np.asarray(score(items[part]), float)[:, 1:]
            chosen = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
            items[part, place] = np.where(lengths[part] > place, 1 + chosen, 0)
    return Sessions(items[items > 0], np.append(0, lengths.cumsum()), np.arange(count))


def known(sessions: Sessions) -> Sessions:
    """Drop the events of items that are not ranked (0), and sessions without any other."""
    lengths = np.bincount(sessions.owner[sessions.items > 0], minlength=len(sessions.start))
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int64)
    return take(_picked(sessions, sessions.items > 0, slice(None), offsets),
                np.flatnonzero(lengths))


def join(first: Sessions, second: Sessions) -> Sessions:
    """Concatenate the sessions of two splits."""
    offsets = np.append(first.offsets, first.offsets[-1] + second.offsets[1:])
    parts = [None if one is None or other is None else np.append(one, other)
             for one, other in zip(first, second, strict=True)]
    return Sessions(*parts)._replace(offsets=offsets)


def _picked(sessions: Sessions, events, index, offsets: np.ndarray) -> Sessions:
    """Sessions of chosen events and chosen sessions, cut again by `offsets`."""
    time, kind, visitor = (None if array is None else array[chosen] for array, chosen in (
        (sessions.time, events), (sessions.kind, events), (sessions.visitor, index)))
    return Sessions(sessions.items[events], offsets, sessions.start[index], time, kind, visitor)


def _grouped(interactions: pl.DataFrame, by_day: bool, gap_seconds: int,
             rng: np.random.Generator | None, per_second: int
             ) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Events by user and time -> {column: int64 [E]}, session begins here bool [E].

    Without `rng` those with equal times are in the order of their items.
    """
    refuse_if(not by_day and gap_seconds <= 0, f'config.data.gap_hours: {gap_seconds} seconds are '
              'not a pause. Expected the longest pause inside a session, above 0. Fix: raise it.')
    # a canonical order first, so that the seeded order below does not depend on the file's
    columns = interactions.sort('user', 'time', 'item').cast(pl.Int64)
    events = {name: columns[name].to_numpy() for name in columns.columns}
    if rng is not None:  # most events have a time of their user that no other has: they stay
        later = (np.diff(events['user']) != 0) | (np.diff(events['time']) != 0)
        tied = np.flatnonzero(~(np.append(True, later) & np.append(later, True)))
        lots = np.lexsort((rng.random(columns.height)[tied], np.append(0, np.cumsum(later))[tied]))
        events = {name: column.copy() for name, column in events.items()}
        for column in events.values():
            column[tied] = column[tied[lots]]
    user, time = events['user'], events['time']
    first = np.ones(len(user), bool)
    apart = (np.diff(time // (DAY * per_second)) != 0 if by_day
             else np.diff(time) > gap_seconds * per_second)
    first[1:] = (np.diff(user) != 0) | apart
    return events, first


def _boundary(start: np.ndarray, wanted: int) -> int:
    """The position next to `wanted` at which the sorted `start` changes."""
    if not 0 < wanted < len(start):
        return wanted
    low, high = (int(np.searchsorted(start, start[wanted], side)) for side in ('left', 'right'))
    return low if wanted - low <= high - wanted else high
