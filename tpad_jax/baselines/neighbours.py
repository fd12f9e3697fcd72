"""Session-neighbour baselines: V-SKNN, STAN and VSTAN, vectorised over rows.

Training sessions that share an item with the prefix are candidates. The most recent `sample_size`
of them are compared with the prefix, and the `k` most similar are its neighbours. With a prefix s,
every item i of a neighbour n gets a score:

    sim(s, n)    = sum over shared items of w1(item)  *  |n|^-1/2 if cosine  *  w2(n)
    score(i | s) = sum over neighbours of sim(s, n) * step(i*) * w3(i, i*, n) * (1 + idf(i))

i* is the most recent item of s that is in n. p(i, .) is the place of an item in s or n, from 1; a
repeated item has its last place. |n| is the number of different items in n.

    V-SKNN  w1 = (p / |s|)^position_power, 1 being the linear decay of Ludewig and Jannach,
            "Evaluation of session-based recommendation algorithms" (2018); w2 = w3 = 1;
            step = (steps of i* from the end, from 1)^-step_power.
    STAN    w1 = exp((p - |s|) / lambda1), cosine, w2 = exp(-age / lambda2),
            w3 = exp(-|p(i, n) - p(i*, n)| / lambda3), step = 1: Garg et al., "Sequence and time
            aware neighborhood for session-based recommendations" (2019).
    VSTAN   STAN with idf, and with step = exp((p(i*) - |s|) / lambda4): Ludewig et al., "Empirical
            analysis of session-based recommendation algorithms" (2020).

idf(i) is idf_weight times ln(S / sessions with i). k, sample_size, the lambdas and idf are from the
papers [paper]. These are choices of this project [ours]:

  * exponents, where the authors of V-SKNN try a list of decays, and cosine as its option;
  * the age of a neighbour by rank instead of by days (1 is the whole training split);
  * among equally similar sessions, the more recent one;
  * `after`, VSTAN's sequential filter: only items after i* in the neighbour count;
  * `repeats`: whether items of the prefix are scored;
  * rows scaled so that the heaviest neighbour weighs 1, which changes no ranking.

If sessions are not `ordered`, recency is unknown: candidates are sampled, and equals ranked, in a
seeded order, and w2 is 1.
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
              repeats: bool = True, position_power: float = 1.0, cosine: bool = False,
              step_power: float = 1.0, idf_weight: float = 1.0,
              ordered: bool | None = None) -> metrics.Scorer:
    """Fit V-SKNN; see the head of this file.

    Args:
      train: S sessions.
      num_items: V.
      k: number of neighbours.
      sample_size: number of most recent candidates that are compared.
      repeats: whether items of the prefix are scored.
      position_power: how fast an item's weight in the similarity falls towards the prefix's start;
        0: not at all.
      cosine: whether long neighbours count less.
      step_power: how fast a neighbour's weight falls with the steps from the prefix's end to the
        most recent shared item; 0: not at all.
      idf_weight: of the inverse session frequency; 0: none.
      ordered: whether the sessions are in the order of time; None: yes, unless all `train.start`
        are equal.

    Returns:
      A scorer: int32 [R, N] prefixes -> `metrics.Sparse` [R, V + 1].
    """
    index = _index(train, num_items, ordered)
    idf = _idf(index, idf_weight)  # what each item of a neighbour adds
    adds = sp.csr_array((idf[index.item], index.item, index.start),
                        shape=(len(index.start) - 1, len(idf)))
    return _scorer(index, adds, False, k=k, sample_size=sample_size,
                   weight=lambda place, length: (place / length) ** position_power,
                   step=lambda place, length: (length - place + 1.) ** -step_power,
                   cosine=cosine, lambda2=None, repeats=repeats)


def fit_stan(train: Sessions, num_items: int, *, k: int = 500, sample_size: int = 2000,
             repeats: bool = True, lambda1: float = 2.0, lambda2: float = 1.0,
             lambda3: float = 4.0, ordered: bool | None = None) -> metrics.Scorer:
    """Fit STAN; see the head of this file.

    Args:
      train: S sessions.
      num_items: V.
      k: number of neighbours.
      sample_size: number of most recent candidates that are compared.
      repeats: whether items of the prefix are scored.
      lambda1: places over which an item's weight in the similarity falls to 1/e.
      lambda2: age, as a share of the training split, at which a neighbour's weight is 1/e; not read
        if sessions are not ordered.
      lambda3: distance in places from i* at which an item's weight is 1/e.
      ordered: as in `fit_vsknn`.

    Returns:
      A scorer: int32 [R, N] prefixes -> `metrics.Sparse` [R, V + 1].
    """
    return fit_vstan(train, num_items, k=k, sample_size=sample_size, repeats=repeats,
                     lambda1=lambda1, lambda2=lambda2, lambda3=lambda3, lambda4=math.inf,
                     idf_weight=0.0, ordered=ordered)


def fit_vstan(train: Sessions, num_items: int, *, k: int = 500, sample_size: int = 2000,
              repeats: bool = True, lambda1: float = 2.0, lambda2: float = 1.0,
              lambda3: float = 4.0, lambda4: float = 4.0, idf_weight: float = 1.0,
              after: bool = False, ordered: bool | None = None) -> metrics.Scorer:
    """Fit VSTAN; see the head of this file.

    Args:
      train: S sessions.
      num_items: V.
      k: as in `fit_stan`.
      sample_size: as in `fit_stan`.
      repeats: whether items of the prefix are scored.
      lambda1: as in `fit_stan`.
      lambda2: as in `fit_stan`.
      lambda3: as in `fit_stan`.
      lambda4: places from the prefix's end to i* at which a neighbour's weight is 1/e.
      idf_weight: of the inverse session frequency; 0: none.
      after: whether only items after i* in the neighbour are scored.
      ordered: as in `fit_vsknn`.

    Returns:
      A scorer: int32 [R, N] prefixes -> `metrics.Sparse` [R, V + 1].
    """
    index = _index(train, num_items, ordered)
    return _scorer(index, _event_items(index, lambda3, idf_weight, after), True, k=k,
                   sample_size=sample_size,
                   weight=lambda place, length: np.exp((place - length) / lambda1),
                   step=lambda place, length: np.exp((place - length) / lambda4),
                   cosine=True, lambda2=lambda2, repeats=repeats)


def latest_places(items: np.ndarray) -> tuple[np.ndarray, ...]:
    """List the different items of each prefix at their last places.

    Args:
      items: int32 [R, N] prefixes, left aligned, 0 pads.

    Returns:
      Row, item, place (from 1) and the row's length, int64 [P] each, ordered by row and then from
      the latest item to the earliest.
    """
    row, place = np.nonzero(items)
    item = items[row, place].astype(np.int64)
    last = _last(row, item)
    last = last[np.lexsort((-place[last], row[last]))]
    row, place = row[last], place[last] + 1
    return row, item[last], place, np.count_nonzero(items, axis=1)[row]


class _Index(NamedTuple):
    """S sessions, the most recent last, as E events: their different items at their last places.

    Attributes:
      item: int [E], by session.
      place: int [E], ascending. Differences within a session are the steps between two events.
      session: int [E].
      start: int64 [S + 1]. The first event of each session.
      by_item: int64 [E]. Events ordered by item, then by session.
      first: int64 [V + 2]. The first place of each item in `by_item`.
      ordered: whether the order of sessions is that of time.
    """

    item: np.ndarray
    place: np.ndarray
    session: np.ndarray
    start: np.ndarray
    by_item: np.ndarray
    first: np.ndarray
    ordered: bool


def _index(train, num_items, ordered):
    if ordered is None:
        ordered = len(np.unique(train.start)) > 1
    count = len(train.lengths)
    if not ordered:
        train = take(train, np.random.default_rng(0).permutation(count))
    event = _last(train.owner, train.items)
    item, session = train.items[event], train.owner[event]
    by_item = np.argsort(item, kind='stable')
    return _Index(item, event, session, np.searchsorted(session, np.arange(count + 1)), by_item,
                  np.searchsorted(item[by_item], np.arange(num_items + 2)), ordered)


def _last(owner, item):
    """Numbers of the events that are the last ones of their owner and item, ascending: int64."""
    key = owner * (item.max(initial=0) + np.int64(1)) + item
    _, from_end = np.unique(key[::-1], return_index=True)  # the first of equals, from the end
    return np.sort(len(key) - 1 - from_end)


def _idf(index, weight):
    """1 + idf of every item: float64 [V + 1]."""
    return 1 + weight * np.log(max(len(index.start) - 1, 1) / np.maximum(np.diff(index.first), 1))


def _event_items(index, lambda3, idf_weight, after):
    """The weight that a neighbour gives to each item if i* is this event: csr float64 [E, V + 1].

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
    """Make the scorer that searches for neighbours and sums over them.

    Args:
      index: the training sessions.
      adds: weights of a neighbour's items, by session [S, V + 1] or by its event i* [E, V + 1].
      by_event: whether `adds` is by event.
      k: number of neighbours.
      sample_size: number of most recent candidates that are compared.
      weight: w1 of (places, lengths of their prefixes).
      step: of (places of i*, lengths of their prefixes).
      cosine: whether similarities are divided by the square root of the neighbour's length.
      lambda2: as in `fit_stan`; None: w2 is 1.
      repeats: whether items of the prefix are scored.
    """
    num_items, sessions = adds.shape[1] - 1, len(index.start) - 1
    # a session without events shares no item, so its scale is never read
    scale = 1 / np.sqrt(np.maximum(np.diff(index.start), 1)) if cosine else np.ones(sessions)

    def scorer(items):
        row, item, place, length = latest_places(items)
        # one entry per item of a prefix and session that holds it, most recent items first
        width = index.first[item + 1] - index.first[item]
        entry = np.repeat(np.arange(len(item)), width)
        offset = np.arange(len(entry)) - np.repeat(np.cumsum(width) - width, width)
        event = index.by_item[index.first[item][entry] + offset]
        key = row[entry] * sessions + index.session[event]
        order = np.argsort(key, kind='stable')
        key, entry, event = key[order], entry[order], event[order]
        # one per row and candidate: its first entry is i*
        begin = np.diff(key, prepend=-1) > 0
        similar = np.bincount(np.cumsum(begin) - 1, weight(place, length)[entry])
        entry, event = entry[begin], event[begin]
        owner, session = row[entry], index.session[event]
        sampled = _from_end(owner, len(items)) < sample_size
        owner, session, entry, event, similar = (
            array[sampled] for array in (owner, session, entry, event, similar))
        similar = similar * scale[session]  # integers where there are none
        # relative to the row's latest candidate, or all could vanish
        if lambda2 is not None and index.ordered:
            latest = np.zeros(len(items), session.dtype)
            latest[owner] = session  # ascending within a row, so the last one remains
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
        scores = neighbours @ adds
        if not repeats:
            cell = np.repeat(np.arange(len(items)), np.diff(scores.indptr)) * (num_items + 1)
            scores.data[np.isin(cell + scores.indices, row * (num_items + 1) + item)] = 0
        scores.data = scores.data.astype(np.float32)  # scores.astype would sort every row first
        return metrics.Sparse(scores, np.zeros(num_items + 1, np.float32))

    return scorer


def _from_end(owner, count):
    """Count the later entries of the same owner: sorted int [P] -> int64 [P]."""
    return np.cumsum(np.bincount(owner, minlength=count))[owner] - 1 - np.arange(len(owner))
