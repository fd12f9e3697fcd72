"""A scorer on every row of a split, overall and by slices, against target and true distribution."""

from collections.abc import Callable, Sequence

import numpy as np

from tpad_jax.data.sessions import Rows
from tpad_jax.errors import InputError
from tpad_jax.evaluation import metrics, slices

Result = dict
"""{'rows': R, 'tied_share': s, 'hit@K', 'mrr@K', 'ndcg@K', 'expected_hit@K', ... per K, 'slices':
{slice: the same keys}}. None where a slice holds nothing to average over."""


def evaluate(scorer: metrics.Scorer, rows: Rows, warm: np.ndarray, *,
             ks: Sequence[int] = (5, 10, 20), chunk: int = 512,
             probabilities: Callable[[np.ndarray], np.ndarray] | None = None,
             counts: np.ndarray | None = None, gains: dict[str, metrics.Gain] = metrics.GAINS,
             name: str = 'model') -> tuple[Result, dict[str, np.ndarray]]:
    """Ranks the whole catalogue for every row, each row once, and averages.

    Slices are 'warm' and 'cold' targets, 'length_*' of the prefix, targets that 'repeat' an item of
    the prefix or are 'new', and 'popularity_q1' (rare) to 'popularity_q4' (frequent) of the warm
    targets (`slices.popularity_quartiles`). Where the true distribution is known, 'expected_*'
    scores the same lists under it. On a slice of rows (length) that is the mean over its rows. On a
    slice of items (the others) every row counts: the sum over rows of P(first K within the slice),
    places weighed as the metric does, over the sum of P(slice); 'rows' there still counts sampled
    targets.

    Args:
      scorer: int32 [chunk, N] prefixes -> scores [chunk, V + 1], numpy or jax; see
        `metrics.scored`. One that has `ranks` (see `scoring.scorer`) counts on its devices.
      rows: R rows.
      warm: bool [V + 1].
      ks: the K of every metric.
      chunk: rows at a time; changes nothing but memory and time.
      probabilities: int32 [r, N] prefixes -> float64 [r, V + 1], column 0 being 0.
      counts: int [V + 1], training events of every item; without them no popularity slices.
      gains: the metrics, by name.
      name: what an error calls the model.

    Returns:
      the result, and {'above', 'equal'}: int32 [R] each, from which `metrics.hit` gives any K.

    Raises:
      InputError: there are no rows.
      ValueError: scores of a wrong shape.
      FloatingPointError: a score that is not finite; names the model.
    """
    total, depth = len(rows.target), max(ks)
    if not total:
        raise InputError(f'{name} cannot be evaluated: the split has no rows; enlarge it')
    quartile = None if counts is None else slices.popularity_quartiles(counts)
    placed, mass = {}, {}  # of each slice of items, the whole catalogue being ''
    if probabilities is None and hasattr(scorer, 'ranks'):
        above, equal = scorer.ranks(rows.items, rows.target, rows=chunk, name=name)
    elif probabilities is None:
        above, equal = metrics.ranks(scorer, rows.items, rows.target, len(warm) - 1, chunk=chunk,
                                     name=name)
    else:
        above, equal = np.zeros((2, total), np.int32)
        for part, scores in metrics.scored(scorer, rows.items, len(warm) - 1, chunk=chunk,
                                           name=name):
            above[part], equal[part] = metrics.counts(scores, rows.target[part])
            truth = probabilities(rows.items[part])
            inside = {'': 1, **_item_slices(rows.items[part], warm, quartile)}
            tables = [truth * items for items in inside.values()]
            found = metrics.places(scores, tables, depth)
            for label, table, value in zip(inside, tables, found, strict=True):
                placed.setdefault(label, np.zeros((total, depth)))[part] = value
                mass.setdefault(label, np.zeros(total))[part] = table.sum(axis=1)

    def measured(chosen, places, weight):
        out = {'rows': int(chosen.sum()), 'tied_share': _ratio((equal[chosen] > 1).sum(),
                                                               chosen.sum())}
        for metric, gain in gains.items():
            for k in ks:
                earned = metrics.mean_gain(gain, above[chosen], equal[chosen], k)
                out[f'{metric}@{k}'] = _ratio(earned.sum(), len(earned))
                if probabilities is not None:
                    earned = metrics.expected(gain, places, k)
                    out[f'expected_{metric}@{k}'] = _ratio(earned.sum(), weight.sum())
        return out

    whole = placed.get(''), mass.get('')
    parts = {}
    for label, chosen in slices.chosen(slices.features(rows, warm, counts)).items():
        if probabilities is None:
            parts[label] = measured(chosen, None, None)
        elif label in placed:
            parts[label] = measured(chosen, placed[label], mass[label])
        else:
            parts[label] = measured(chosen, *(table[chosen] for table in whole))
    result = {**measured(np.ones(total, bool), *whole), 'slices': parts}
    return result, {'above': above, 'equal': equal}


def oracle(rows: Rows, warm: np.ndarray, probabilities: Callable[[np.ndarray], np.ndarray], *,
           counts: np.ndarray | None = None, gains: dict[str, metrics.Gain] = metrics.GAINS
           ) -> tuple[Result, dict[str, np.ndarray]]:
    """`evaluate` of the true distribution as a scorer: what no model exceeds in expected hit.

    Overall that holds for every K and row. On a slice of items it need not: the list is the
    overall one, and a model may spend more of its own on the slice.
    """
    return evaluate(probabilities, rows, warm, probabilities=probabilities, counts=counts,
                    gains=gains, name='oracle')


def _item_slices(items, warm, quartile):
    """{slice: bool [R, V + 1] or [V + 1]} of the slices that are sets of items."""
    held = _held(items, len(warm))
    out = {'warm': warm, 'cold': ~warm, 'repeat': held, 'new': ~held}
    if quartile is not None:
        out |= {label: quartile == number for number, label in enumerate(slices.QUARTILES, 1)}
    return out


def _held(items, width):
    """int32 [R, N] -> bool [R, width]: the items a prefix holds; column 0 means nothing."""
    held = np.zeros((len(items), width), bool)
    held[np.arange(len(items))[:, None], items] = True
    return held


def _ratio(value, weight):
    """The value over the weight as a plain float, or None over nothing, which JSON can say."""
    return float(value / weight) if weight > 0 else None
