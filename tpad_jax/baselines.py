"""The baselines every model is shown next to, each tuned on validation.

`fit_x(train, num_items, ...)` counts on training sessions alone and returns a scorer: int32 [R, N]
prefixes (left aligned, 0 pads) -> float32 [R, V + 1] scores, column 0 (padding) being worthless. A
row's scores depend on that row only. Items no training session holds (cold) get what popularity
gives them, nothing; `content_knn` alone can tell them apart.

Rules and neighbours follow Ludewig and Jannach, "Evaluation of session-based recommendation
algorithms" (2018); popularity as a back-off, and weighing a rule by the square root of its item's
frequency (between counts and conditional probabilities), are choices of this project.
"""

import inspect
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from tpad_jax import metrics
from tpad_jax.data.sessions import Rows, Sessions
from tpad_jax.errors import InputError

LONGEST_RULE = 10  # steps between the two items of a rule
TUNED_AT = 20  # K of the hit@K that `tune` maximises, as every model's selection does


def fit_pop(train: Sessions, num_items: int) -> metrics.Scorer:
    """POP: every prefix is followed by what is frequent in training."""
    share = _popularity(train, num_items).astype(np.float32)
    return lambda items: np.tile(share, (len(items), 1))


def fit_repeat_last(train: Sessions, num_items: int) -> metrics.Scorer:
    """The prefix's own items, the latest first; all others tie behind them. Reads no session."""
    del train

    def scorer(items):
        scores = np.zeros((len(items), num_items + 1), np.float32)
        for position, item in enumerate(items.T, 1):  # in order, so that the latest place stands
            scores[np.arange(len(items)), item] = position
        scores[:, 0] = 0
        return scores

    return scorer


def fit_markov(train: Sessions, num_items: int, backoff: float = 0.1) -> metrics.Scorer:
    """First-order transitions: (1 - backoff) P(next | last) + backoff P(next), by counts."""
    return _rule_scorer(_pairs(train, num_items, 1, 0), train, num_items, 0, backoff)


def fit_sr(train: Sessions, num_items: int, decay: float = 0.6, lag_power: float = 1,
           backoff: float = 0.1) -> metrics.Scorer:
    """Sequential rules: item -> an item up to 10 steps later, worth 1 / steps^lag_power.

    Args:
      train: S sessions.
      num_items: V.
      decay: an item d steps before the prefix's end weighs decay^d; 0: the last item alone.
      lag_power: 0: all steps count alike.
      backoff: share of popularity in the score.
    """
    rules = _pairs(train, num_items, LONGEST_RULE, lag_power)
    return _rule_scorer(rules, train, num_items, decay, backoff)


def fit_ar(train: Sessions, num_items: int, decay: float = 0.6, lag_power: float = 1,
           backoff: float = 0.1) -> metrics.Scorer:
    """Association rules: `fit_sr` counted in both directions, so blind to order."""
    rules = _pairs(train, num_items, LONGEST_RULE, lag_power)
    return _rule_scorer(rules + rules.T, train, num_items, decay, backoff)


def fit_item_knn(train: Sessions, num_items: int, decay: float = 0.6, shrink: float = 20,
                 repeats: bool = False) -> metrics.Scorer:
    """Cosine of two items' sessions: co(i, j) / sqrt((n_i + shrink) (n_j + shrink)).

    co: sessions that hold both, n: sessions that hold one. `shrink` distrusts the rare (Hidasi et
    al. 2016 use 20). `decay` as in `fit_sr`; `repeats`: whether an item is its own neighbour.
    """
    owner = np.repeat(np.arange(len(train.offsets) - 1), np.diff(train.offsets))
    holds = sp.csr_array((np.ones(len(owner)), (owner, train.items)),
                         shape=(len(train.offsets) - 1, num_items + 1))
    holds.data[:] = 1  # however often a session repeats it
    scale = sp.diags_array(1 / np.sqrt(np.maximum(holds.sum(axis=0) + shrink, 1)))
    cosine = sp.csr_array(scale @ (holds.T @ holds) @ scale)
    if not repeats:
        cosine.setdiag(0)
    return lambda items: (_prefix(items, decay, num_items) @ cosine).toarray().astype(np.float32)


def fit_content_knn(train: Sessions, num_items: int, features: np.ndarray, decay: float = 0.6,
                    repeats: bool = False) -> metrics.Scorer:
    """Cosine of item features to the decayed sum of the prefix's. Reads no session.

    Args:
      train: unused.
      num_items: V.
      features: float [V + 1, D]; a row of zeros is an item without content.
      decay: as in `fit_sr`.
      repeats: whether an item is similar to itself.
    """
    del train
    # rounded at the end: items with equal features tie, whatever order BLAS adds in, and a row's
    # scores do not hang on the rows next to it
    unit = np.array(features, np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    own = (unit * unit).sum(axis=1)

    def scorer(items):
        prefix = _prefix(items, decay, num_items)
        scores = (prefix @ unit) @ unit.T
        if not repeats:
            scores -= (prefix * own).toarray()
        return scores.round(9).astype(np.float32)

    return scorer


# Every baseline with the values tried; the first is where the search starts.
_DECAYS = (0.6, 0.0, 0.4, 0.8, 1.0)
_BACKOFFS = (0.1, 0.0, 0.01, 0.3)
BASELINES = {
    'pop': (fit_pop, {}),
    'repeat_last': (fit_repeat_last, {}),
    'markov': (fit_markov, {'backoff': _BACKOFFS}),
    'sr': (fit_sr, {'decay': _DECAYS, 'lag_power': (1, 0, 2), 'backoff': _BACKOFFS}),
    'ar': (fit_ar, {'decay': _DECAYS, 'lag_power': (1, 0, 2), 'backoff': _BACKOFFS}),
    'item_knn': (fit_item_knn, {'decay': _DECAYS, 'shrink': (20, 0, 100),
                                'repeats': (False, True)}),
    'content_knn': (fit_content_knn, {'decay': _DECAYS, 'repeats': (False, True)}),
}


class Tuned(NamedTuple):
    """A fitted baseline, the parameters chosen for it, and their hit@20 on validation."""

    scorer: metrics.Scorer
    params: dict
    hit: float


def tune(name: str, train: Sessions, valid: Rows, num_items: int, *,
         features: np.ndarray | None = None, chunk: int = 512) -> Tuned:
    """Fits a baseline with the parameters that maximise hit@20 on the validation rows.

    One parameter at a time, in the order of `BASELINES`, the others held at the best so far; of
    equal values the one tried first stays.

    Args:
      name: a key of `BASELINES`.
      train: the training sessions.
      valid: R validation rows, which nothing is counted on.
      num_items: V.
      features: float [V + 1, D], for 'content_knn'.
      chunk: rows scored at a time.

    Raises:
      InputError: an unknown name, no rows, or features where none are read or the other way round.
    """
    if name not in BASELINES:
        raise InputError(f'unknown baseline {name!r}; choose from {", ".join(BASELINES)}')
    if not len(valid.target):
        raise InputError(f'{name} cannot be tuned: the validation split has no rows; enlarge it')
    fit, grid = BASELINES[name]
    if ('features' in inspect.signature(fit).parameters) != (features is not None):
        raise InputError(f'{name} {"reads no" if features is not None else "needs"} item features')
    fixed = {} if features is None else {'features': features}

    def tried(params):
        scorer = fit(train, num_items, **fixed, **params)
        above, equal = metrics.ranks(scorer, valid.items, valid.target, num_items, chunk=chunk,
                                     name=name)
        return Tuned(scorer, params, float(metrics.hit(above, equal, TUNED_AT).mean()))

    best = tried({key: values[0] for key, values in grid.items()})
    for key, values in grid.items():
        best = max([best, *(tried({**best.params, key: value}) for value in values[1:])],
                   key=lambda candidate: candidate.hit)
    return best


def _popularity(train, num_items):
    """Share of each item among the training events: float64 [V + 1]."""
    return np.bincount(train.items, minlength=num_items + 1) / max(len(train.items), 1)


def _pairs(train, num_items, longest, lag_power):
    """Weight of (item, item up to `longest` steps later): csr float64 [V + 1, V + 1].

    An item that follows itself counts: repeats are transitions too.
    """
    owner = np.repeat(np.arange(len(train.offsets) - 1), np.diff(train.offsets))
    before, after, weight = [], [], []
    for lag in range(1, min(longest, len(owner) - 1) + 1):
        same = owner[lag:] == owner[:-lag]
        before.append(train.items[:-lag][same])
        after.append(train.items[lag:][same])
        weight.append(np.full(same.sum(), float(lag) ** -lag_power))
    cells = np.concatenate(before), np.concatenate(after)
    return sp.csr_array((np.concatenate(weight), cells), shape=(num_items + 1, num_items + 1))


def _prefix(items, decay, num_items):
    """int32 [R, N] -> csr float64 [R, V + 1], decay^d at the item d steps before the end."""
    row, position = np.nonzero(items)
    steps = np.count_nonzero(items, axis=1)[row] - 1 - position
    shape = len(items), num_items + 1
    return sp.csr_array((float(decay) ** steps, (row, items[row, position])), shape=shape)


def _rule_scorer(rules, train, num_items, decay, backoff):
    """(1 - backoff) times the prefix's rules, summing to 1, + backoff times popularity."""
    popularity = _popularity(train, num_items)
    frequency = np.maximum(np.bincount(train.items, minlength=num_items + 1), 1)
    rules = sp.diags_array(1 / np.sqrt(frequency)) @ rules

    def scorer(items):
        found = sp.csr_array(_prefix(items, decay, num_items) @ rules)
        total = found.sum(axis=1)
        share = np.divide(1 - backoff, total, out=np.zeros_like(total), where=total > 0)
        scores = (sp.diags_array(share) @ found).toarray()
        scores += backoff * popularity
        return scores.astype(np.float32)

    return scorer
