"""The baselines that every model is compared with, each tuned on validation.

`fit_x(train, num_items, ...)` counts on training sessions only and returns a scorer: int32 [R, N]
prefixes (left aligned, 0 pads) -> float32 [R, V + 1] scores. They are `metrics.Sparse`, except for
`content_knn`. Column 0 (padding) has no meaning. A row's scores depend on that row only. Items
without training sessions (cold) score 0, as their popularity is 0; only those in CONTENT, which
read item features, distinguish them. The session neighbours (V-SKNN, STAN, VSTAN) are in
`neighbours`.

Rules and neighbours follow Ludewig and Jannach, "Evaluation of session-based recommendation
algorithms" (2018) [paper]. Popularity as a back-off, and dividing a rule by the square root of its
item's frequency (between counts and conditional probabilities), are choices of this project [ours].
"""

import inspect
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp

from tpad_jax.baselines import content_lasso, neighbours
from tpad_jax.baselines.tune import search
from tpad_jax.data.item_graphs import decayed, followers, membership
from tpad_jax.data.sessions import Rows, Sessions, counts, sample
from tpad_jax.errors import refuse_if
from tpad_jax.evaluation import likelihood, metrics

LONGEST_RULE = 10  # steps between the two items of a rule
LONGEST_SESSION = 1000  # latest events of a session that item_knn pairs: n items make n^2 pairs
CELLS = 2**20  # float64 cosines of item features that are held at a time: 8 MB
ALIKE = 20  # items of similar content, the item itself among them, that content_rules smooths over
TUNED_AT = 20  # K of the hit@K that `tune` maximises, as the selection of every model does
TUNED_ROWS = 4_000  # validation rows that `tune` reads; of more rows it draws a sample


def fit_pop(train: Sessions, num_items: int) -> metrics.Scorer:
    """Fit POP: every prefix is followed by the items that are frequent in training."""
    share = (counts(train, num_items) / max(len(train.items), 1)).astype(np.float32)
    return lambda items: _sparse(sp.csr_array((len(items), num_items + 1)), share)


def fit_repeat_last(train: Sessions, num_items: int) -> metrics.Scorer:
    """Rank the items of the prefix, the latest first; all others tie below. Reads no session."""

    def scorer(items):
        row, item, place, _ = neighbours.latest_places(items)
        return _sparse(sp.csr_array((place, (row, item)), shape=(len(items), num_items + 1)))

    return scorer


def fit_markov(train: Sessions, num_items: int, backoff: float = 0.1) -> metrics.Scorer:
    """Fit first-order transitions: (1 - backoff) P(next | last) + backoff P(next), by counts."""
    return _rule_scorer(followers(train, num_items, 1), train, num_items, 0, backoff)


def fit_sr(train: Sessions, num_items: int, decay: float = 0.6, lag_power: float = 1,
           backoff: float = 0.1) -> metrics.Scorer:
    """Fit sequential rules: item -> an item up to 10 steps later, with weight 1 / steps^lag_power.

    Args:
      train: S sessions.
      num_items: V.
      decay: an item d steps before the prefix's end has the weight decay^d; 0: the last item only.
      lag_power: how fast the weight falls with the steps; 0: all steps have the same weight.
      backoff: share of popularity in the score.
    """
    return _rule_scorer(followers(train, num_items, LONGEST_RULE, lag_power), train, num_items,
                        decay, backoff)


def fit_ar(train: Sessions, num_items: int, decay: float = 0.6, lag_power: float = 1,
           backoff: float = 0.1) -> metrics.Scorer:
    """Fit association rules: `fit_sr` counted in both directions, without order."""
    rules = followers(train, num_items, LONGEST_RULE, lag_power)
    return _rule_scorer(rules + rules.T, train, num_items, decay, backoff)


def fit_item_knn(train: Sessions, num_items: int, decay: float = 0.6, shrink: float = 20,
                 repeats: bool = False) -> metrics.Scorer:
    """Fit item-kNN: the cosine of two items' sessions, co(i, j) / sqrt((n_i + s) (n_j + s)).

    co is the number of sessions with both items, n of those with one, and s is `shrink`.

    Args:
      train: S sessions; of a longer session the last LONGEST_SESSION events count.
      num_items: V.
      decay: as in `fit_sr`.
      shrink: lowers the similarity of rare items (Hidasi et al. 2016 use 20).
      repeats: whether an item is its own neighbour.
    """
    held = membership(train, num_items, LONGEST_SESSION)
    scale = sp.diags_array(1 / np.sqrt(np.maximum(held.sum(axis=0) + shrink, 1)))
    cosine = sp.csr_array(scale @ (held.T @ held) @ scale)
    if not repeats:
        cosine.setdiag(0)
    return lambda items: _sparse(decayed(items, decay, num_items) @ cosine)


def fit_content_knn(train: Sessions, num_items: int, features: np.ndarray, decay: float = 0.6,
                    repeats: bool = False) -> metrics.Scorer:
    """Fit content-kNN: the cosine of an item's features and the decayed sum of the prefix's.

    Args:
      train: unused.
      num_items: V.
      features: float [V + 1, D]; a row of zeros is an item without content.
      decay: as in `fit_sr`.
      repeats: whether an item is similar to itself.
    """
    # Scores are rounded: items with equal features then tie although BLAS may add in another order,
    # and a row's scores do not depend on the other rows.
    unit = metrics.unit(np.array(features, np.float64))
    square = (unit * unit).sum(axis=1)

    def scorer(items):
        prefix = decayed(items, decay, num_items).tocsc()
        query = prefix @ unit
        scores = np.empty((len(items), num_items + 1), np.float32)
        # a part of the catalogue at a time: all items in float64 would be gigabytes
        size = max(1, CELLS // max(len(items), 1))
        for begin in range(0, num_items + 1, size):
            part = slice(begin, begin + size)
            cosine = query @ unit[part].T
            if not repeats:
                cosine -= (prefix[:, part] * square[part]).toarray()
            scores[:, part] = cosine.round(9)
        return scores

    return scorer


def similar(features: np.ndarray) -> sp.csr_array:
    """Find the ALIKE items whose features are most similar to each item's.

    Args:
      features: float [V + 1, D]; a row of zeros is an item without content.

    Returns:
      csr float64 [V + 1, V + 1] of positive cosines of the centred features. An item is similar to
      itself, with 1; without content it is similar to no other.
    """
    unit = np.array(features, np.float64)
    known = unit.any(axis=1)
    unit[known] -= unit[known].mean(axis=0)
    unit = metrics.unit(unit)
    size, most = max(1, CELLS // len(unit)), min(ALIKE, len(unit))
    cells = []
    for begin in range(0, len(unit), size):
        cosine = unit[begin:begin + size] @ unit.T
        row = np.arange(len(cosine))
        cosine[row, begin + row] = 1
        item = np.argpartition(cosine, -most, axis=1)[:, -most:]
        cells.append((np.take_along_axis(cosine, item, axis=1), item))
    cosine, item = (np.concatenate(part).ravel() for part in zip(*cells, strict=True))
    row = np.repeat(np.arange(len(unit)), most)
    near = cosine > 0
    return sp.csr_array((cosine[near], (row[near], item[near])), shape=(len(unit), len(unit)))


def fit_content_rules(train: Sessions, num_items: int, features: np.ndarray | sp.csr_array,
                      decay: float = 0.6, backoff: float = 0.1, ordered_pairs: bool = False,
                      smoothing: float = 0.5, sharpness: float = 10) -> metrics.Scorer:
    """Fit transitions that items of similar content share, so that cold items have some too [ours].

    The rules R of `fit_sr` or `fit_ar` become S R S, S = (1 - smoothing) I + smoothing K. A row of
    K is a softmax of cosines times `sharpness` over the item's neighbours by content: what follows
    an item also follows similar ones, and is followed by items similar to what followed.

    Args:
      train: S sessions.
      num_items: V.
      features: float [V + 1, D], or what `similar` returns for them.
      decay: as in `fit_sr`.
      backoff: as in `fit_sr`.
      ordered_pairs: whether rules have a direction, as those of `fit_sr`; False: as in `fit_ar`.
      smoothing: share of an item's transitions that is read from, and given to, similar items.
      sharpness: of the softmax; the larger, the more the most similar items count.
    """
    kernel = (features if sp.issparse(features) else similar(features)).copy()
    kernel.data = np.exp(sharpness * (kernel.data - 1))
    kernel = sp.diags_array(smoothing / kernel.sum(axis=1)) @ kernel
    smooth = sp.csr_array(kernel + (1 - smoothing) * sp.eye_array(num_items + 1))
    rules = followers(train, num_items, LONGEST_RULE, lag_power=1)
    return _rule_scorer(rules if ordered_pairs else rules + rules.T, train, num_items, decay,
                        backoff, smooth)


# The axis of each keyword that a search varies; it starts from the defaults of the function.
AXES = {
    **dict.fromkeys(('repeats', 'cosine', 'after', 'ordered_pairs'), ('choice', (False, True))),
    **dict.fromkeys(('lambda1', 'lambda3', 'lambda4'), ('log', 0.3, 30.0)),
    **dict.fromkeys(('lag_power', 'step_power'), ('float', 0.0, 3.0)),
    'strength': ('log', 3e-4, 3e-2), 'gamma': ('choice', content_lasso.GAMMAS),
    'smoothing': ('float', 0.0, 1.0), 'sharpness': ('log', 1.0, 100.0),
    'decay': ('float', 0.0, 1.0), 'backoff': ('float', 0.0, 0.5), 'shrink': ('float', 0.0, 100.0),
    'position_power': ('float', 0.0, 4.0), 'idf_weight': ('float', 0.0, 5.0),
    'lambda2': ('log', 0.01, 10.0), 'k': ('choice', (50, 100, 200, 500, 1000)),
    'sample_size': ('choice', (500, 1000, 2000, 5000))}
# Every baseline with its search space.
BASELINES = {fit.__name__.removeprefix('fit_'): (fit, {
    key: AXES[key] for key in inspect.signature(fit).parameters if key in AXES})
    for fit in (fit_pop, fit_repeat_last, fit_markov, fit_sr, fit_ar, fit_item_knn,
                fit_content_knn, fit_content_rules, neighbours.fit_vsknn, neighbours.fit_stan,
                neighbours.fit_vstan, content_lasso.fit_content_lasso)}
CONTENT = 'content_knn', 'content_rules', 'content_lasso'  # those that read item features


class Tuned(NamedTuple):
    """A fitted baseline and its search.

    Attributes:
      scorer: fitted with the chosen parameters.
      params: the chosen parameters.
      valid: their {'hit@20', 'mrr@20', 'nll'} on the validation rows that were read.
      calibration: of a scorer fitted on the training sessions alone.
      record: of `tune.search`, with 'rows', the number of those rows.
    """

    scorer: metrics.Scorer
    params: dict
    valid: dict
    calibration: likelihood.Calibration
    record: dict


def tune(name: str, train: Sessions, valid: Rows, num_items: int, *, seed: int = 0,
         final: Sessions | None = None, ordered: bool | None = None,
         features: np.ndarray | content_lasso.Attributes | None = None, **budget) -> Tuned:
    """Fit a baseline with the parameters that maximise hit@20 on validation, mrr@20 among equals.

    Args:
      name: a key of `BASELINES`.
      train: the training sessions.
      valid: validation rows, which are not counted on.
      num_items: V.
      seed: of the search and of the sample of rows.
      final: sessions that the returned scorer is fitted on, if a refit includes validation
        sessions; None: `train`.
      ordered: of the session neighbours, see `neighbours.fit_vsknn`.
      features: float [V + 1, D], for those in CONTENT only; `content_lasso.Attributes` for that.
      **budget: `trials` and `storage` of `tune.search`.

    Raises:
      InputError: the name is unknown, there are no rows, or features are missing or not read.
    """
    refuse_if(name not in BASELINES,
              f'unknown baseline {name!r}. Expected one of {", ".join(BASELINES)}')
    refuse_if(not len(valid.target),
              f'{name}: the validation split has no rows to tune on. Fix: enlarge it')
    fit, space = BASELINES[name]
    keywords, extra = inspect.signature(fit).parameters, features is not None
    refuse_if(('features' in keywords) != extra,
              f'{name} {"reads no" if extra else "needs"} item features')
    if name == 'content_rules':
        features = similar(features)  # once for all trials
    fixed = {key: value for key, value in (('features', features), ('ordered', ordered))
             if key in keywords}
    valid = sample(valid, TUNED_ROWS, seed)

    def measured(params, _):
        above, equal = metrics.ranks(fit(train, num_items, **fixed, **params), valid.items,
                                     valid.target, num_items, name=name)
        return {f'hit@{TUNED_AT}': metrics.hit(above, equal, TUNED_AT).mean(),
                f'mrr@{TUNED_AT}': metrics.mrr(above, equal, TUNED_AT).mean()}

    defaults = {key: keywords[key].default for key in space}
    params, record = search(measured, space, defaults, seed=seed, name=name, **budget)
    scorer = fit(train, num_items, **fixed, **params)
    calibration = likelihood.calibrate(scorer, valid, num_items, rule=True, seed=seed)
    nll = likelihood.nll(scorer, valid, num_items, calibration, seed=seed)
    if final is not None:
        scorer = fit(final, num_items, **fixed, **params)
    return Tuned(scorer, params, {**record['tried'][record['best']]['values'], 'nll': nll},
                 calibration, {**record, 'rows': len(valid.target)})


def _rule_scorer(rules, train, num_items, decay, backoff, smooth=None):
    """(1 - backoff) times the prefix's rules, summing to 1, + backoff times popularity.

    `smooth`, csr [V + 1, V + 1], is multiplied to both sides of the rules; None: they are as
    counted. The product of three tables would be dense, so each prefix passes through them.
    """
    frequency = counts(train, num_items)
    popularity = frequency / max(len(train.items), 1)
    rules = sp.csr_array(sp.diags_array(1 / np.sqrt(np.maximum(frequency, 1))) @ rules)

    def scorer(items):
        scores = decayed(items, decay, num_items)
        scores = scores @ rules if smooth is None else scores @ smooth @ rules @ smooth
        total = scores.sum(axis=1)
        share = np.divide(1 - backoff, total, out=np.zeros_like(total), where=total > 0)
        scores.data *= np.repeat(share, np.diff(scores.indptr))
        return _sparse(scores, backoff * popularity)

    return scorer


def _sparse(scores, background=None):
    """Make float32 scores of a sparse table and a background; None: no background."""
    if background is None:
        background = np.zeros(scores.shape[1])
    return metrics.Sparse(sp.csr_array(scores, dtype=np.float32), background.astype(np.float32))
