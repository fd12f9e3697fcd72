"""The shapes of compiled calls: few sizes, so that little is compiled."""

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.data import events as events_lib
from tpad_jax.errors import refuse_if
from tpad_jax.models.experts import BY_ITEM
from tpad_jax.serving import topk

SIZES = 1, 16, 256  # rows of a compiled call; the smallest that is large enough is used
MAX_K = 1000  # items of a list at most
# what may be known of a session's events: ms since 1970 and names of kinds, one per item; the time
# of the request; ids of the visitor's earlier items, in the order of time
KEYS = 'times', 'kinds', 'now', 'earlier'
LENGTHS = 20, 50, 100, 200, 500, MAX_K  # of a compiled list; the smallest that is large enough


def parts(x) -> list:
    """Split rows into the parts of compiled calls; no rows are one part."""
    return np.split(x, range(SIZES[-1], len(x), SIZES[-1]))


def with_events(shop, rows: np.ndarray, sessions, events=None) -> np.ndarray:
    """Add the columns of data/events.py to prefixes, where the run reads them.

    Args:
      shop: recommender.Recommender.
      rows: int32 [S, N] that `shop.rows` made of the sessions.
      sessions: S lists of item ids.
      events: S dicts of KEYS, or None: nothing is known. A key that is missing or None is not
        known, and so is a kind of another name than in training.

    Returns:
      int32 [S, N + C].

    Raises:
      InputError: events are unusable, or the run reads items alone.
    """
    reads, kinds = shop.reads
    refuse_if(events is not None and not reads, 'events: this run reads item ids alone. Fix: leave '
              'them out, or train with config.model.event_time, .event_kind or .history')
    refuse_if(events is not None and not (len(events) == len(rows) and all(
        map(usable, events, sessions))), f'events: not one for each session, or of other keys or '
        f'lengths. Expected any of {", ".join(KEYS)}. Fix: give times (ms) and kinds per item')
    if not reads:
        return rows
    where, number = events_lib.columns(reads, rows.shape[1]), shop.table.number
    out = np.zeros((len(rows), max(part.stop for part in where.values())), np.int32)
    if 'date' in where:
        out[:, where['date']] = events_lib.NOW
    for row, prefix, names, event in zip(out, rows, sessions, events or [{}] * len(rows),
                                         strict=True):
        place = [i for i, name in enumerate(names) if name in number]
        place = place[len(place) - np.count_nonzero(prefix):]
        times, named, earlier = (event.get(key) or [] for key in ('times', 'kinds', 'earlier'))
        if 'gap' in where and times:
            gap = np.diff(np.array([*(times[i] for i in place), event.get('now')], float))
            row[where['gap']][:len(place)] = np.where(
                np.isnan(gap), 0, events_lib.gap(np.nan_to_num(gap)))
        if 'kind' in where and named:
            row[where['kind']][:len(place)] = [
                1 + kinds.index(named[i]) if named[i] in kinds else 0 for i in place]
        if 'past' in where:
            past = [number[name] for name in reversed(earlier) if name in number][:events_lib.PAST]
            row[where['past']][:len(past)] = past
    return np.concatenate([rows, out], axis=1)


def usable(event, session) -> bool:
    """Whether facts of a session's events have the form of KEYS."""
    if not isinstance(event, dict) or not event.keys() <= set(KEYS):
        return False
    times, kinds, now, earlier = (event.get(key) for key in KEYS)
    lists = [[] if x is None else x for x in (times, kinds, earlier)]
    if not all(isinstance(x, list) for x in lists) or not {
            len(x) for x in (times, kinds) if x is not None} <= {len(session)}:
        return False
    numbers = [*lists[0], 0 if now is None else now]
    return (all(type(x) in (int, float) and abs(x) < 1e15 for x in numbers)
            and all(isinstance(x, str) for x in (*lists[1], *lists[2])))


def filled(x, value=0):
    """Pad rows to one of SIZES."""
    size = next(size for size in SIZES if size >= len(x))
    return np.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1)), constant_values=value)


def padded(z, weights, count: int) -> tuple:
    """Give arrays room up to a whole chunk, so that most new items compile nothing.

    Args:
      z: float32 [V+1, D]. Item vectors.
      weights: of the recommenders and the experts, see `scorers.session_encoder`.
      count: rows that are needed.

    Returns:
      z and weights.
    """
    length = topk.rounded(count)

    def fill(x):
        return jnp.pad(x, ((0, length - len(x)), *((0, 0),) * (x.ndim - 1)))

    models, experts = weights
    models = tuple((jax.device_put(params), {name: fill(x) for name, x in near.items()})
                   for params, near in models)
    if experts is not None:
        tables = {name: fill(x) if name in BY_ITEM else x for name, x in experts['tables'].items()}
        experts = jax.device_put({'weights': experts['weights'], 'tables': tables})
    return fill(z), (models, experts)


def finish(rows, items, scores, popular) -> tuple[np.ndarray, np.ndarray]:
    """Return the wanted rows on the host; an empty session gets the popular items.

    Args:
      rows: int32 [s, N]. Prefixes.
      items: int32 [S, K] of the device.
      scores: float32 [S, K] of the device.
      popular: int32 [k].

    Returns:
      Items int32 [s, k] and scores float32 [s, k].
    """
    items, scores = (np.array(x)[:len(rows), :len(popular)] for x in (items, scores))
    empty = rows[:, 0] == 0
    items[empty], scores[empty] = popular, np.nan
    broken = np.flatnonzero(~(np.isfinite(scores).all(axis=1) | empty))
    if len(broken):
        raise FloatingPointError(f'the scores of session {broken[0]} of this call are not finite')
    return items, scores
