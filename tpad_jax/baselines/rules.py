"""The baselines every model is shown next to, each tuned on validation.

`fit_x(train, num_items, ...)` counts on training sessions alone and returns a scorer: int32 [R, N]
prefixes (left aligned, 0 pads) -> float32 [R, V + 1] scores (`metrics.Sparse` from all but
`content_knn`), column 0 (padding) being worthless. A row's scores depend on that row only. Items no
training session holds (cold) get what popularity gives them, nothing; `content_knn` alone can tell
them apart. The session neighbours (V-SKNN, STAN, VSTAN) are `session_knn`'s.

Rules and neighbours follow Ludewig and Jannach, "Evaluation of session-based recommendation
algorithms" (2018); popularity as a back-off, and weighing a rule by the square root of its item's
frequency (between counts and conditional probabilities), are choices of this project.
"""

import inspect
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from tpad_jax.baselines import neighbours
from tpad_jax.baselines.tune import search
from tpad_jax.data.item_graphs import followers
from tpad_jax.data.sessions import Rows, Sessions, counts
from tpad_jax.errors import InputError
from tpad_jax.evaluation import metrics

LONGEST_RULE = 10  # steps between the two items of a rule
LONGEST_SESSION = 1000  # latest events of a session that item_knn pairs: n items make n^2 pairs
CELLS = 2**20  # float64 scores that content_knn holds at a time: 8 MB
TUNED_AT = 20  # K of the hit@K that `tune` maximises, as every model's selection does


def fit_pop(train: Sessions, num_items: int) -> metrics.Scorer:
    """POP: every prefix is followed by what is frequent in training."""
    share = _popularity(train, num_items).astype(np.float32)
    return lambda items: _sparse(sp.csr_array((len(items), num_items + 1)), share)


def fit_repeat_last(train: Sessions, num_items: int) -> metrics.Scorer:
    """The prefix's own items, the latest first; all others tie behind them. Reads no session."""
    del train

    def scorer(items):
        row, item, place, _ = neighbours.latest_places(items)
        return _sparse(sp.csr_array((place, (row, item)), shape=(len(items), num_items + 1)))

    return scorer


def fit_markov(train: Sessions, num_items: int, backoff: float = 0.1) -> metrics.Scorer:
    """First-order transitions: (1 - backoff) P(next | last) + backoff P(next), by counts."""
    return _rule_scorer(followers(train, num_items, 1), train, num_items, 0, backoff)


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
    rules = followers(train, num_items, LONGEST_RULE, lag_power)
    return _rule_scorer(rules, train, num_items, decay, backoff)


def fit_ar(train: Sessions, num_items: int, decay: float = 0.6, lag_power: float = 1,
           backoff: float = 0.1) -> metrics.Scorer:
    """Association rules: `fit_sr` counted in both directions, so blind to order."""
    rules = followers(train, num_items, LONGEST_RULE, lag_power)
    return _rule_scorer(rules + rules.T, train, num_items, decay, backoff)


def fit_item_knn(train: Sessions, num_items: int, decay: float = 0.6, shrink: float = 20,
                 repeats: bool = False) -> metrics.Scorer:
    """Cosine of two items' sessions: co(i, j) / sqrt((n_i + shrink) (n_j + shrink)).

    co: sessions that hold both, n: sessions that hold one. `shrink` distrusts the rare (Hidasi et
    al. 2016 use 20). `decay` as in `fit_sr`; `repeats`: whether an item is its own neighbour.
    """
    lengths = np.diff(train.offsets)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    late = np.arange(len(owner)) >= (train.offsets[1:] - LONGEST_SESSION)[owner]
    holds = sp.csr_array((np.ones(late.sum()), (owner[late], train.items[late])),
                         shape=(len(lengths), num_items + 1))
    holds.data[:] = 1  # an item counts once per session
    scale = sp.diags_array(1 / np.sqrt(np.maximum(holds.sum(axis=0) + shrink, 1)))
    cosine = sp.csr_array(scale @ (holds.T @ holds) @ scale)
    if not repeats:
        cosine.setdiag(0)
    return lambda items: _sparse(_prefix(items, decay, num_items) @ cosine)


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
        prefix = _prefix(items, decay, num_items).tocsc()
        wanted = prefix @ unit
        scores = np.empty((len(items), num_items + 1), np.float32)
        # a part of the catalogue at a time: in float64 and over all items it would be gigabytes
        size = max(1, CELLS // max(len(items), 1))
        for begin in range(0, num_items + 1, size):
            part = slice(begin, begin + size)
            cosine = wanted @ unit[part].T
            if not repeats:
                cosine -= (prefix[:, part] * own[part]).toarray()
            scores[:, part] = cosine.round(9)
        return scores

    return scorer


# Every baseline with what is searched; the search starts from the defaults of its function.
_DECAY, _BACKOFF = ('float', 0.0, 1.0), ('float', 0.0, 0.5)
_YES_NO = ('choice', (False, True))
_RULE = {'decay': _DECAY, 'lag_power': ('float', 0.0, 3.0), 'backoff': _BACKOFF}
_NEIGHBOURS = {'k': ('choice', (50, 100, 200, 500, 1000)),
               'sample_size': ('choice', (500, 1000, 2000, 5000)), 'repeats': _YES_NO}
_LAMBDAS = {'lambda1': ('log', 0.3, 30.0), 'lambda2': ('log', 0.01, 10.0),
            'lambda3': ('log', 0.3, 30.0)}
_IDF = ('float', 0.0, 5.0)
BASELINES = {
    'pop': (fit_pop, {}),
    'repeat_last': (fit_repeat_last, {}),
    'markov': (fit_markov, {'backoff': _BACKOFF}),
    'sr': (fit_sr, _RULE),
    'ar': (fit_ar, _RULE),
    'item_knn': (fit_item_knn, {'decay': _DECAY, 'shrink': ('float', 0.0, 100.0),
                                'repeats': _YES_NO}),
    'content_knn': (fit_content_knn, {'decay': _DECAY, 'repeats': _YES_NO}),
    'vsknn': (neighbours.fit_vsknn, {
        **_NEIGHBOURS, 'position_power': ('float', 0.0, 4.0), 'cosine': _YES_NO,
        'step_power': ('float', 0.0, 3.0), 'idf_weight': _IDF}),
    'stan': (neighbours.fit_stan, {**_NEIGHBOURS, **_LAMBDAS}),
    'vstan': (neighbours.fit_vstan, {
        **_NEIGHBOURS, **_LAMBDAS, 'lambda4': ('log', 0.3, 30.0), 'idf_weight': _IDF,
        'after': _YES_NO}),
}


class Tuned(NamedTuple):
    """A fitted baseline, the parameters chosen for it, and how they were found.

    valid: {'hit@20', 'mrr@20'} of them on the validation rows read. record: of `trials.search`,
    with 'rows', how many those were.
    """

    scorer: metrics.Scorer
    params: dict
    valid: dict
    record: dict


def tune(name: str, train: Sessions, valid: Rows, num_items: int, *, trials: int, seed: int = 0,
         rows: int = 10_000, storage: str | Path | None = None, final: Sessions | None = None,
         ordered: bool | None = None, features: np.ndarray | None = None,
         chunk: int = 512) -> Tuned:
    """Fits a baseline with the parameters that maximise hit@20 on validation, mrr@20 among equals.

    Args:
      name: a key of `BASELINES`.
      train: the training sessions.
      valid: validation rows, which nothing is counted on.
      num_items: V.
      trials: budget of the search, as many as any model has; 1: the defaults alone.
      seed: of the search and of the sample of rows.
      rows: validation rows read; of more, a sample.
      storage: journal file that keeps the trials.
      final: sessions that the scorer returned is fitted on, where a refit counts validation
        sessions in; None: `train`.
      ordered: of the session neighbours, see `session_knn.fit_vsknn`.
      features: float [V + 1, D], for 'content_knn'.
      chunk: rows scored at a time.

    Raises:
      InputError: an unknown name, no rows, or features where none are read or the other way round.
    """
    if name not in BASELINES:
        raise InputError(f'unknown baseline {name!r}; choose from {", ".join(BASELINES)}')
    if not len(valid.target):
        raise InputError(f'{name} cannot be tuned: the validation split has no rows; enlarge it')
    fit, space = BASELINES[name]
    keywords = inspect.signature(fit).parameters
    if ('features' in keywords) != (features is not None):
        raise InputError(f'{name} {"reads no" if features is not None else "needs"} item features')
    given = {'features': features, 'ordered': ordered}
    fixed = {key: value for key, value in given.items() if key in keywords}
    if len(valid.target) > rows:
        drawn = np.random.default_rng(seed).choice(len(valid.target), rows, replace=False)
        valid = Rows(*(array[np.sort(drawn)] for array in valid))

    def measured(params, number):
        del number
        above, equal = metrics.ranks(fit(train, num_items, **fixed, **params), valid.items,
                                     valid.target, num_items, chunk=chunk, name=name)
        return {f'hit@{TUNED_AT}': metrics.hit(above, equal, TUNED_AT).mean(),
                f'mrr@{TUNED_AT}': metrics.mrr(above, equal, TUNED_AT).mean()}

    defaults = {key: keywords[key].default for key in space}
    params, record = search(measured, space, defaults, trials=trials, seed=seed, storage=storage,
                            name=name)
    best = next(one for one in record['tried'] if one['trial'] == record['best'])
    scorer = fit(train if final is None else final, num_items, **fixed, **params)
    return Tuned(scorer, params, best['values'], {**record, 'rows': len(valid.target)})


def _popularity(train, num_items):
    """Share of each item among the training events: float64 [V + 1]."""
    return counts(train, num_items) / max(len(train.items), 1)


def _prefix(items, decay, num_items):
    """int32 [R, N] -> csr float64 [R, V + 1], decay^d at the item d steps before the end."""
    row, position = np.nonzero(items)
    weight = float(decay) ** (np.count_nonzero(items, axis=1)[row] - 1 - position)
    row, position, weight = (array[weight > 0] for array in (row, position, weight))
    shape = len(items), num_items + 1
    return sp.csr_array((weight, (row, items[row, position])), shape=shape)


def _rule_scorer(rules, train, num_items, decay, backoff):
    """(1 - backoff) times the prefix's rules, summing to 1, + backoff times popularity."""
    popularity = _popularity(train, num_items)
    frequency = np.maximum(counts(train, num_items), 1)
    rules = sp.csr_array(sp.diags_array(1 / np.sqrt(frequency)) @ rules)

    def scorer(items):
        found = _prefix(items, decay, num_items) @ rules
        total = found.sum(axis=1)
        share = np.divide(1 - backoff, total, out=np.zeros_like(total), where=total > 0)
        found.data *= np.repeat(share, np.diff(found.indptr))
        return _sparse(found, backoff * popularity)

    return scorer


def _sparse(found, background=None):
    """Scores found + background in float32; None: there is none."""
    if background is None:
        background = np.zeros(found.shape[1])
    return metrics.Sparse(sp.csr_array(found, dtype=np.float32), background.astype(np.float32))
