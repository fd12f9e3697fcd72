"""A scorer on every row of a split, overall and by slices, against target and true distribution."""

from collections.abc import Callable, Sequence

import numpy as np

from tpad_jax import metrics
from tpad_jax.data.sessions import Rows
from tpad_jax.errors import InputError

Result = dict
"""{'rows': R, 'tied_share': s, 'hit@K', 'mrr@K', 'ndcg@K', 'expected_hit@K', ... per K, 'slices':
{slice: the same keys}}. None where a slice holds nothing to average over."""

# Slices of rows by prefix length, both ends included.
LENGTHS = {'length_1': (1, 1), 'length_2': (2, 2), 'length_3-5': (3, 5), 'length_6+': (6, np.inf)}


def evaluate(scorer: metrics.Scorer, rows: Rows, warm: np.ndarray, *,
             ks: Sequence[int] = (5, 10, 20), chunk: int = 512,
             probabilities: Callable[[np.ndarray], np.ndarray] | None = None,
             name: str = 'model') -> tuple[Result, dict[str, np.ndarray]]:
    """Ranks the whole catalogue for every row, each row once, and averages.

    Slices are 'warm' and 'cold' targets, 'length_*' of the prefix, and targets that 'repeat' an
    item of the prefix or are 'new'. Where the true distribution is known, 'expected_*' scores the
    same lists under it. On a slice of rows (length) that is the mean over its rows. On a slice of
    items (the others) every row counts: the sum over rows of P(first K within the slice), places
    weighed as the metric does, over the sum of P(slice); 'rows' there still counts sampled targets.

    Args:
      scorer: int32 [chunk, N] prefixes -> scores [chunk, V + 1], numpy or jax; see
        `metrics.scored`.
      rows: R rows.
      warm: bool [V + 1].
      ks: the K of every metric.
      chunk: rows at a time; changes nothing but memory and time.
      probabilities: int32 [r, N] prefixes -> float64 [r, V + 1], column 0 being 0.
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
    above, equal = np.zeros((2, total), np.int32)
    placed, mass = np.zeros((3, total, depth)), np.zeros((3, total))  # of all, warm, repeated items
    for part, scores in metrics.scored(scorer, rows.items, len(warm) - 1, chunk=chunk, name=name):
        above[part], equal[part] = metrics.counts(scores, rows.target[part])
        if probabilities is not None:
            truth = probabilities(rows.items[part])
            tables = truth, truth * warm, truth * _held(rows.items[part], len(warm))
            placed[:, part] = metrics.places(scores, tables, depth)
            mass[:, part] = [table.sum(axis=1) for table in tables]

    def measured(chosen, places, weight):
        out = {'rows': int(chosen.sum()), 'tied_share': _ratio((equal[chosen] > 1).sum(),
                                                               chosen.sum())}
        for metric in metrics.GAINS:
            for k in ks:
                gain = metrics.mean_gain(metric, above[chosen], equal[chosen], k)
                out[f'{metric}@{k}'] = _ratio(gain.sum(), len(gain))
                if probabilities is not None:
                    gain = metrics.expected(metric, places, k)
                    out[f'expected_{metric}@{k}'] = _ratio(gain.sum(), weight.sum())
        return out

    everything = np.ones(total, bool)
    slices = {}
    for inside, outside, chosen, table in (
            ('warm', 'cold', warm[rows.target], 1),
            ('repeat', 'new', (rows.items == rows.target[:, None]).any(axis=1), 2)):
        slices[inside] = measured(chosen, placed[table], mass[table])
        slices[outside] = measured(~chosen, placed[0] - placed[table], mass[0] - mass[table])
    lengths = np.count_nonzero(rows.items, axis=1)
    for label, (shortest, longest) in LENGTHS.items():
        chosen = (lengths >= shortest) & (lengths <= longest)
        slices[label] = measured(chosen, placed[0][chosen], mass[0][chosen])
    result = {**measured(everything, placed[0], mass[0]), 'slices': slices}
    return result, {'above': above, 'equal': equal}


def oracle(rows: Rows, warm: np.ndarray, probabilities: Callable[[np.ndarray], np.ndarray], *,
           ks: Sequence[int] = (5, 10, 20), chunk: int = 512
           ) -> tuple[Result, dict[str, np.ndarray]]:
    """`evaluate` of the true distribution as a scorer: what no model exceeds in expected hit.

    Overall that holds for every K and row. On a slice of items it need not: the list is the
    overall one, and a model may spend more of its own on the slice.
    """
    return evaluate(probabilities, rows, warm, ks=ks, chunk=chunk, probabilities=probabilities,
                    name='oracle')


def _held(items, width):
    """int32 [R, N] -> bool [R, width]: the items a prefix holds; column 0 means nothing."""
    held = np.zeros((len(items), width), bool)
    held[np.arange(len(items))[:, None], items] = True
    return held


def _ratio(value, weight):
    """The value over the weight as a plain float, or None over nothing, which JSON can say."""
    return float(value / weight) if weight > 0 else None
