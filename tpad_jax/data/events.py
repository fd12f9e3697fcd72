"""Further facts of events that a model may read: time, kind and the visitor's earlier items.

A row of (prefix, target) has columns of small whole numbers next to its N items, in this order:

    gap     N     time from each event to the next one, of the last event to the target:
                  1 + floor(log2(1 + seconds)), at most GAPS - 1
    date    1     of the target: 1 .. NOW from the first to the last moment of training. A later
                  one counts as the last
    kind    N     1 + number of the event's kind
    past    PAST  items of the visitor's events before this session, the newest first

0 means that it is not known, or not there. `config.model.event_time` reads the first two,
`.event_kind` and `.history` the others. All of it is known at the moment of the target.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tpad_jax.data.catalogue import Data
from tpad_jax.data.sessions import Sessions, join
from tpad_jax.errors import refuse_if

GAPS, KINDS, PAST = 24, 16, 20
# the model has a vector for each end of a period of training; a date is between two of them
PERIODS, STEPS = 12, 32
NOW = 1 + PERIODS * STEPS


def names(model) -> tuple[str, ...]:
    """Name the columns that `config.model` reads."""
    return (('gap', 'date') * model.event_time + ('kind',) * model.event_kind
            + ('past',) * model.history)


def columns(reads: Sequence[str], length: int) -> dict[str, slice]:
    """Return where each of these is among the columns of rows of `length` items."""
    widths = {'gap': length, 'date': 1, 'kind': length, 'past': PAST}
    ends = np.cumsum([widths[name] for name in reads]).tolist()
    return {name: slice(end - widths[name], end) for name, end in zip(reads, ends, strict=True)}


@dataclass(frozen=True, eq=False)
class Events:
    """Makes the context of rows, see `sessions.rows`.

    Attributes:
      reads: names of columns.
      targets: numbers of the kinds that are predicted; () for all.
      span: first and last time of the training sessions, ms.
      visitor: int64, all visitors in ascending order.
      time: int64, all times in ascending order.
      key: int64 [E], ascending, of the events of known visitors: by visitor, then by time.
      items: int32 [E]. Their items.
    """

    reads: tuple[str, ...]
    targets: tuple[int, ...] = ()
    span: tuple[int, int] = (0, 1)
    visitor: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    time: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    key: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))

    def __call__(self, sessions: Sessions, where: np.ndarray, target: np.ndarray) -> np.ndarray:
        """Make the columns of rows.

        Args:
          sessions: of a split.
          where: int [R, N]. The event of each position, -1 pads.
          target: int [R]. The event that follows the prefix.

        Returns:
          int32 [R, C].
        """
        here, parts = where >= 0, {}
        if 'gap' in self.reads:
            after = np.append(where[:, 1:], np.full((len(where), 1), -1), axis=1)
            after = np.where(after < 0, target[:, None], after)
            parts['gap'] = np.where(here, gap(sessions.time[after] - sessions.time[where]), 0)
            begin, end = self.span
            share = (sessions.time[target] - begin) / max(end - begin, 1)
            parts['date'] = 1 + np.round(np.clip(share, 0, 1) * (NOW - 1))[:, None]
        if 'kind' in self.reads:
            parts['kind'] = np.where(here, 1 + sessions.kind[where], 0)
        if 'past' in self.reads:
            parts['past'] = self.past(sessions)[sessions.owner[target]]
        return np.concatenate([np.zeros((len(where), 0)), *(parts[name] for name in self.reads)],
                              axis=1).astype(np.int32)

    def past(self, sessions: Sessions) -> np.ndarray:
        """Return the items before each session by its visitor, newest first: int32 [S, PAST]."""
        visitor, start = sessions.visitor, _times(sessions)[sessions.offsets[:-1]]
        number = np.searchsorted(self.visitor, visitor)
        first = np.searchsorted(self.key, number * (len(self.time) + 1))
        end = np.searchsorted(self.key, self._key(visitor, start))
        at = end[:, None] - 1 - np.arange(PAST)
        there = (at >= first[:, None]) & (visitor >= 0)[:, None]
        return np.where(there, np.append(self.items, 0)[np.where(there, at, -1)], 0)

    def _key(self, visitor, time):
        return (np.searchsorted(self.visitor, visitor) * (len(self.time) + 1)
                + np.searchsorted(self.time, time))


def gap(milliseconds: np.ndarray) -> np.ndarray:
    """Return the code of a time between events."""
    return np.minimum(1 + np.log2(1 + np.maximum(milliseconds, 0) / 1000).astype(int), GAPS - 1)


def attached(data: Data, config) -> Data:
    """Add what the model of a config reads of the events, and the kinds that it predicts.

    Args:
      data: of a source.
      config: of the run.

    Returns:
      The data; the same where nothing is read.

    Raises:
      InputError: the source has no times, kinds or returning visitors, or not these kinds.
    """
    model, targets = config.model, [n for n in config.data.target_events.split(',') if n]
    reads = names(model)
    if not reads and not targets:
        return data
    every = join(join(data.train, data.valid), data.test)
    refuse_if(model.event_time and every.time is None, 'config.model.event_time=True: the events '
              'of these data have no times. Fix: set it to False.')
    usable = every.kind is not None and every.kind.min() >= -1 and every.kind.max() < KINDS - 1
    refuse_if((model.event_kind or targets) and not usable, f'config.model.event_kind='
              f'{model.event_kind} or config.data.target_events={config.data.target_events!r}: the '
              f'events have no kinds, or too many. Expected 1 to {KINDS - 1}. Fix: turn it off, or '
              'name the column by config.data.columns.kind.')
    absent = ', '.join(name for name in targets if name not in data.kinds)
    refuse_if(absent, f'config.data.target_events={config.data.target_events!r}: no event is '
              f'{absent}. Expected some of {", ".join(data.kinds)}. Fix: correct the names.')
    out = Events(reads, tuple(data.kinds.index(name) for name in targets))
    for split in ('train', 'valid', 'test') if targets else ():
        part = getattr(data, split)
        later = np.diff(part.owner, prepend=-1) == 0
        refuse_if(not np.isin(part.kind[later], out.targets).any(), 'config.data.target_events='
                  f'{config.data.target_events!r}: no event of these kinds follows another in '
                  f'{split}. Expected some. Fix: name further kinds, or enlarge the split.')
    if model.event_time:
        out = replace(out, span=(int(data.train.time.min()), int(data.train.time.max())))
    if model.history:
        visitor = np.full(1, -1) if every.visitor is None else every.visitor
        returning = np.unique(visitor[visitor >= 0], return_counts=True)[1]
        time = _times(every)
        refuse_if(not (returning > 1).any() or (time == time[0]).all(), 'config.model.history='
                  'True: no visitor of these data has two sessions at known times. Fix: set it to '
                  'False, or name the columns by config.data.columns.user and .time.')
        owner = visitor[every.owner]
        known = (owner >= 0) & (every.items > 0)
        out = replace(out, visitor=np.unique(visitor), time=np.unique(time))
        key = out._key(owner[known], time[known])
        order = np.argsort(key, kind='stable')
        out = replace(out, key=key[order], items=every.items[known][order])
    return replace(data, events=out)


def _times(sessions: Sessions) -> np.ndarray:
    """The time of every event in ms; that of its session's start where it is not known."""
    return 1000 * sessions.start[sessions.owner] if sessions.time is None else sessions.time
