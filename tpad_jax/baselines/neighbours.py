"""Session-neighbour baselines: V-SKNN, STAN and VSTAN, vectorised over rows.

Training sessions that share an item with the prefix are candidates; the most recent `sample_size`
of them are compared with the prefix, the `k` most similar are its neighbours, and every item i of a
neighbour n adds to its score, prefix s:

    sim(s, n)    = sum over shared items of w1(item)  *  |n|^-1/2 if cosine  *  w2(n)
    score(i | s) = sum over neighbours of sim(s, n) * step(i*) * w3(i, i*, n) * (1 + idf(i))

i* is the most recent item of s that n holds, p(i, .) the place of an item in s or n (from 1; an
item that comes again stands at its last place), |n| the number of different items in n.

    V-SKNN  w1 = (p / |s|)^position_power, 1 being the linear decay of Ludewig and Jannach,
            "Evaluation of session-based recommendation algorithms" (2018); w2 = w3 = 1;
            step = (steps of i* from the end, from 1)^-step_power.
    STAN    w1 = exp((p - |s|) / lambda1), cosine, w2 = exp(-age / lambda2),
            w3 = exp(-|p(i, n) - p(i*, n)| / lambda3), step = 1: Garg et al., "Sequence and time
            aware neighborhood for session-based recommendations" (2019).
    VSTAN   STAN with idf, and with step = exp((p(i*) - |s|) / lambda4): Ludewig et al., "Empirical
            analysis of session-based recommendation algorithms" (2020).

idf(i) is idf_weight times ln(S / sessions that hold i). k, sample_size, the lambdas and idf are the
papers'. Ours: exponents where V-SKNN's authors try a list of decays, cosine as its option; the age
of a neighbour, by rank instead of by days (1 is the whole training split); of equally similar
sessions the more recent; `after` (VSTAN's sequential filter: only items behind i* in the neighbour
count); `repeats` (whether items of the prefix are scored); rows scaled so that the heaviest
neighbour weighs 1, which changes no ranking.

Without `ordered` sessions no one knows what is recent: candidates are sampled, and equals ranked,
in a seeded order, and w2 is 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from tpad_jax.data.sessions import Sessions, take
from tpad_jax.evaluation import metrics

WINDOW = 100  # places around i* that always count, see `_event_items`
RESOLVED = 17  # exp(-17) is below the resolution of float32


def fit_vsknn(train: Sessions, num_items: int, *, k: int = 200, sample_size: int = 2000,
              position_power: float = 1.0, cosine: bool = False, step_power: float = 1.0,
              idf_weight: float = 1.0, repeats: bool = True,
              ordered: bool | None = None) -> metrics.Scorer:
    """V-SKNN; see the head of this file.

    Args:
      train: S sessions.
      num_items: V.
      k: neighbours.
      sample_size: most recent candidates that are compared.
      position_power: how fast an item's weight in the similarity falls towards the prefix's start;
        0: not at all.
      cosine: whether long neighbours count less.
      step_power: how fast a neighbour's weight falls with the steps from the prefix's end to the
        most recent item it shares; 0: not at all.
      idf_weight: of the inverse session frequency; 0: none.
      repeats: whether the prefix's own items are scored.
      ordered: whether the sessions stand in order of time; None: unless `train.start` are all the
        same.

    Returns:
      scorer: int32 [R, N] prefixes -> `metrics.Sparse` [R, V + 1].
    """
    index = _index(train, num_items, ordered)
    return _scorer(index, _session_items(index, idf_weight), False, k=k, sample_size=sample_size,
                   weight=lambda place, length: (place / length) ** position_power,
                   step=lambda place, length: (length - place + 1.) ** -step_power,
                   cosine=cosine, lambda2=None, repeats=repeats)


def fit_stan(train: Sessions, num_items: int, *, k: int = 500, sample_size: int = 2000,
             lambda1: float = 2.0, lambda2: float = 1.0, lambda3: float = 4.0,
             repeats: bool = True, ordered: bool | None = None) -> metrics.Scorer:
    """STAN; see the head of this file.

    Args:
      lambda1: places over which an item's weight in the similarity falls to 1/e.
      lambda2: age, as a share of the training split, at which a neighbour weighs 1/e; not read
        where sessions are not ordered.
      lambda3: places between i* and another item of the neighbour at which that weighs 1/e.
      train, num_items, k, sample_size, repeats, ordered: as in `fit_vsknn`.

    Returns:
      scorer: int32 [R, N] prefixes -> `metrics.Sparse` [R, V + 1].
    """
    index = _index(train, num_items, ordered)
    return _scorer(index, _event_items(index, lambda3, 0, False), True, k=k,
                   sample_size=sample_size, weight=_decay(lambda1), step=lambda place, length: 1.,
                   cosine=True, lambda2=lambda2, repeats=repeats)


def fit_vstan(train: Sessions, num_items: int, *, k: int = 500, sample_size: int = 2000,
              lambda1: float = 2.0, lambda2: float = 1.0, lambda3: float = 4.0,
              lambda4: float = 4.0, idf_weight: float = 1.0, after: bool = False,
              repeats: bool = True, ordered: bool | None = None) -> metrics.Scorer:
    """VSTAN; see the head of this file.

    Args:
      lambda4: places from the prefix's end to i* at which a neighbour weighs 1/e.
      idf_weight: of the inverse session frequency; 0: none.
      after: whether only items behind i* in the neighbour are scored.
      train, num_items, k, sample_size, lambda1, lambda2, lambda3, repeats, ordered: as in
        `fit_stan`.

    Returns:
      scorer: int32 [R, N] prefixes -> `metrics.Sparse` [R, V + 1].
    """
    index = _index(train, num_items, ordered)
    return _scorer(index, _event_items(index, lambda3, idf_weight, after), True, k=k,
                   sample_size=sample_size, weight=_decay(lambda1), step=_decay(lambda4),
                   cosine=True, lambda2=lambda2, repeats=repeats)


def latest_places(items: np.ndarray) -> tuple[np.ndarray, ...]:
    """The different items of each prefix, each where it stands last.

    Args:
      items: int32 [R, N] prefixes, left aligned, 0 pads.

    Returns:
      row, item, place (from 1) and the row's length, int64 [P] each; by row, the latest item first.
    """
    row, place = np.nonzero(items)
    item = items[row, place].astype(np.int64)
    last = _last(row, item)
    last = last[np.lexsort((-place[last], row[last]))]
    row, place = row[last], place[last] + 1
    return row, item[last], place, np.count_nonzero(items, axis=1)[row]


class _Index(NamedTuple):
    """S sessions, the later the more recent, as E events: their different items at last places.

    item, place, session: int [E], by session; places differ by the steps between two events of a
    session, wherever they start. start: int64 [S + 1], of a session's events.
    by_item: int64 [E], events by item, then session. first: int64 [V + 2], of an item's in there.
    """

    item: np.ndarray
    place: np.ndarray
    session: np.ndarray
    start: np.ndarray
    by_item: np.ndarray
    first: np.ndarray
    ordered: bool

    @property
    def sizes(self):
        """Different items of each session, int64 [S]."""
        return np.diff(self.start)


def _index(train, num_items, ordered):
    if ordered is None:
        ordered = len(np.unique(train.start)) > 1
    count = len(train.offsets) - 1
    if not ordered:
        train = take(train, np.random.default_rng(0).permutation(count))
    owner = np.repeat(np.arange(count), np.diff(train.offsets))
    event = _last(owner, train.items)
    item, session = train.items[event], owner[event]
    by_item = np.argsort(item, kind='stable')
    return _Index(item, event, session, np.searchsorted(session, np.arange(count + 1)), by_item,
                  np.searchsorted(item[by_item], np.arange(num_items + 2)), ordered)


def _last(owner, item):
    """Numbers of the events after which their owner has the item no more, ascending: int64."""
    order = np.lexsort((item, owner))  # stable: of one item the last event comes last
    owner, item = owner[order], item[order]
    last = np.append((owner[1:] != owner[:-1]) | (item[1:] != item[:-1]), True)
    return np.sort(order[last[:len(order)]])


def _decay(scale):
    return lambda place, length: np.exp((place - length) / scale)


def _idf(index, weight):
    """1 + idf of every item: float64 [V + 1]."""
    held = np.diff(index.first)
    return 1 + weight * np.log(max(len(index.sizes), 1) / np.maximum(held, 1))


def _session_items(index, idf_weight):
    """What a neighbour adds to each item: csr float64 [S, V + 1]."""
    weight = _idf(index, idf_weight)
    return sp.csr_array((weight[index.item], index.item, index.start),
                        shape=(len(index.sizes), len(weight)))


def _event_items(index, lambda3, idf_weight, after):
    """What a neighbour adds to each item if i* is this event of it: csr float64 [E, V + 1].

    Items further than `window` places from i* are left out, for a session of n items would have
    n^2 cells. In sessions longer than WINDOW they weigh less than float32 resolves.
    """
    weight = _idf(index, idf_weight)
    window = max(WINDOW, math.ceil(RESOLVED * lambda3))
    begin = np.maximum(index.start[index.session],
                       np.searchsorted(index.place, index.place - window))
    end = np.minimum(index.start[index.session + 1],
                     np.searchsorted(index.place, index.place + window, side='right'))
    start = np.append(0, np.cumsum(end - begin))
    shared = np.repeat(np.arange(len(begin)), end - begin)
    event = np.arange(start[-1]) + (begin - start[:-1])[shared]
    distance = index.place[event] - index.place[shared]
    cells = np.exp(-np.abs(distance) / lambda3) * weight[index.item[event]]
    if after:
        cells *= distance > 0
    return sp.csr_array((cells, index.item[event], start), shape=(len(begin), len(weight)))


def _scorer(index: _Index, adds: sp.csr_array, by_event: bool, *, k: int, sample_size: int,
            weight: Callable, step: Callable, cosine: bool, lambda2: float | None,
            repeats: bool) -> metrics.Scorer:
    """The search for neighbours and the sum over them.

    Args:
      index: the training sessions.
      adds: what a neighbour adds, by session [S, V + 1] or by its event of i* [E, V + 1].
      by_event: which of the two.
      weight: w1 of (places, lengths of their prefixes).
      step: of (places of i*, lengths of their prefixes).
      k, sample_size, cosine, lambda2, repeats: as in `fit_stan`; lambda2 None: w2 is 1.
    """
    num_items, sessions = adds.shape[1] - 1, len(index.sizes)
    # a session without events shares no item, so its scale is never read
    scale = 1 / np.sqrt(np.maximum(index.sizes, 1)) if cosine else np.ones(sessions)

    def scorer(items):
        row, item, place, length = latest_places(items)
        # one entry per item of a prefix and session that holds it, most recent items first
        width = index.first[item + 1] - index.first[item]
        entry = np.repeat(np.arange(len(item)), width)
        behind = np.arange(len(entry)) - np.repeat(np.cumsum(width) - width, width)
        event = index.by_item[index.first[item][entry] + behind]
        key = row[entry] * sessions + index.session[event]
        order = np.argsort(key, kind='stable')
        key, entry, event = key[order], entry[order], event[order]
        # one per row and candidate: its first entry is i*
        begin = np.diff(key, prepend=-1) > 0
        similar = np.bincount(np.cumsum(begin) - 1, weight(place, length)[entry])
        entry, event = entry[begin], event[begin]
        owner, session = row[entry], index.session[event]
        kept = _from_end(owner, len(items)) < sample_size
        owner, session, entry, event, similar = (
            array[kept] for array in (owner, session, entry, event, similar))
        similar = similar * scale[session]
        if lambda2 is not None and index.ordered:  # from the row's latest: else all might vanish
            latest = np.zeros(len(items), session.dtype)
            latest[owner] = session  # ascending in a row, so the last stands
            similar *= np.exp((session - latest[owner]) / (sessions * lambda2))
        order = np.lexsort((similar, owner))  # stable: of equals the later session comes last
        order = order[_from_end(owner[order], len(items)) < k]
        owner, session, entry, event, similar = (
            array[order] for array in (owner, session, entry, event, similar))
        value = similar * step(place[entry], length[entry])
        heaviest = np.full(len(items), np.finfo(np.float64).tiny)
        np.maximum.at(heaviest, owner, value)
        start = np.searchsorted(owner, np.arange(len(items) + 1))
        neighbours = sp.csr_array((value / heaviest[owner], event if by_event else session, start),
                                  shape=(len(items), adds.shape[0]))
        found = neighbours @ adds
        if not repeats:
            cell = np.repeat(np.arange(len(items)), np.diff(found.indptr)) * (num_items + 1)
            found.data[np.isin(cell + found.indices, row * (num_items + 1) + item)] = 0
        return metrics.Sparse(found.astype(np.float32), np.zeros(num_items + 1, np.float32))

    return scorer


def _from_end(owner, count):
    """Sorted int [P] -> how many of the same owner follow, int64 [P]."""
    return np.cumsum(np.bincount(owner, minlength=count))[owner] - 1 - np.arange(len(owner))
