"""Evaluates a scorer on every row of a split, overall and by slices.

Two views of the same lists: the sampled target of each row and, where it is known, the true
distribution.
"""

from collections.abc import Callable, Sequence

import numpy as np

from tpad_jax.data.sessions import Rows
from tpad_jax.errors import refuse_if
from tpad_jax.evaluation import metrics, slices


def evaluate(scorer: metrics.Scorer, rows: Rows, warm: np.ndarray, *,
             ks: Sequence[int] = (5, 10, 20),
             probabilities: Callable[[np.ndarray], np.ndarray] | None = None,
             counts: np.ndarray | None = None, gains: dict[str, metrics.Gain] = metrics.GAINS,
             name: str = 'model') -> tuple[dict, dict[str, np.ndarray]]:
    """Rank the whole catalogue once for every row, and average.

    Slices are 'warm' and 'cold' targets, 'length_*' of the prefix, targets that 'repeat' an item of
    the prefix or are 'new', and 'popularity_q1' (rare) to 'popularity_q4' (frequent) of the warm
    targets (`slices.popularity_quartiles`).

    Where the true distribution is known, 'expected_*' scores the same lists under it. On a slice of
    rows (length) that is the mean over its rows. On a slice of items (the others) every row counts:
    the sum over rows of P(first K within the slice), weighted by place as in the metric, divided by
    the sum of P(slice). 'rows' of such a slice still counts sampled targets.

    Args:
      scorer: int32 [r, N] prefixes -> scores [r, V + 1], see `metrics.scored`. A scorer
        with `ranks` (see `scorers.scorer`) counts on its devices.
      rows: R rows. A target of 0 is below every place.
      warm: bool [V + 1].
      ks: the K of every metric.
      probabilities: int32 [r, N] prefixes -> float64 [r, V + 1], column 0 being 0.
      counts: int [V + 1]. Training events of every item; None: no popularity slices.
      gains: the metrics, by name.
      name: of the model in error messages.

    Returns:
      {'rows': R, 'tied_share': s, 'hit@K', 'mrr@K', 'ndcg@K', 'expected_hit@K', ... per K,
      'slices': {slice: the same keys}}, where a metric over no rows is None; and {'above',
      'equal'}: int32 [R] each, from which `metrics.hit` computes any K.

    Raises:
      InputError: there are no rows.
      ValueError: scores have a wrong shape.
      FloatingPointError: a score is not finite.
    """
    total = len(rows.target)
    refuse_if(not total, f'{name} cannot be evaluated: the split has no rows. Fix: enlarge it')
    placed, mass = {}, {}
    if probabilities is not None:
        above, equal, placed, mass = _against_truth(scorer, rows, warm, counts, max(ks),
                                                    probabilities, name)
    elif hasattr(scorer, 'ranks'):
        above, equal = scorer.ranks(rows.read_by(scorer), rows.target, name=name)
    else:
        above, equal = metrics.ranks(scorer, rows.read_by(scorer), rows.target, len(warm) - 1,
                                     name=name)
    missed = rows.target == 0  # no list holds the item that followed
    above, equal = np.where(missed, metrics.MISS, above), np.where(missed, 1, equal)

    def measured(chosen, places, weight):
        out = {'rows': int(chosen.sum()),
               'tied_share': _ratio((equal[chosen] > 1).sum(), chosen.sum())}
        for metric, gain in gains.items():
            for k in ks:
                earned = metrics.mean_gain(gain, above[chosen], equal[chosen], k)
                out[f'{metric}@{k}'] = _ratio(earned.sum(), len(earned))
                if places is not None:
                    earned = metrics.expected(gain, places, k)
                    out[f'expected_{metric}@{k}'] = _ratio(earned.sum(), weight.sum())
        return out

    def part(label, chosen):
        if label in placed or not placed:
            return measured(chosen, placed.get(label), mass.get(label))
        return measured(chosen, placed[''][chosen], mass[''][chosen])

    chosen = slices.chosen(slices.features(rows, warm, counts))
    result = {**part('', np.ones(total, bool)),
              'slices': {label: part(label, mask) for label, mask in chosen.items()}}
    return result, {'above': above, 'equal': equal}


def _against_truth(scorer, rows, warm, counts, depth, probabilities, name):
    """Ranks of the targets, and the probability that each place holds, by slice of items.

    Returns:
      above and equal int32 [R]; {slice: float64 [R, depth]} of `metrics.places` and
      {slice: float64 [R]}, the slice's probability. The slice '' is the whole catalogue.
    """
    quartile = None if counts is None else slices.popularity_quartiles(counts)
    total, placed, mass = len(rows.target), {}, {}
    above, equal = np.zeros((2, total), np.int32)
    known = rows.read_by(probabilities)
    for part, scores in metrics.scored(scorer, rows.read_by(scorer), len(warm) - 1, name=name):
        above[part], equal[part] = metrics.counts(scores, rows.target[part])
        truth = probabilities(known[part])
        inside = {'': 1, **_item_slices(rows.items[part], warm, quartile)}
        tables = [truth * items for items in inside.values()]
        places = metrics.places(scores, tables, depth)
        for label, table, value in zip(inside, tables, places, strict=True):
            placed.setdefault(label, np.zeros((total, depth)))[part] = value
            mass.setdefault(label, np.zeros(total))[part] = table.sum(axis=1)
    return above, equal, placed, mass


def _item_slices(items, warm, quartile):
    """{slice: bool [R, V + 1] or [V + 1]} of the slices that are sets of items."""
    held = np.zeros((len(items), len(warm)), bool)  # by the prefix; column 0 is padding
    held[np.arange(len(items))[:, None], items] = True
    out = {'warm': warm, 'cold': ~warm, 'repeat': held, 'new': ~held}
    if quartile is not None:
        out |= {label: quartile == number for number, label in enumerate(slices.QUARTILES, 1)}
    return out


def _ratio(value, weight):
    """The value over the weight as a float, or None over no weight, for JSON has no nan."""
    return float(value / weight) if weight > 0 else None
