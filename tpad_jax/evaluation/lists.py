"""Measures of the first 20 items of all test rows beyond accuracy, exact over the rows [ours].

V items, R lists of K = 20 items, or all items of a smaller catalogue; ties are ordered by item.
"""

from functools import partial

import jax
import numpy as np
import scipy.sparse as sp

from tpad_jax.evaluation import metrics

BINS = 10  # of a reliability curve
_first = jax.jit(lambda scores, k: jax.lax.top_k(scores[:, 1:], k)[1] + 1, static_argnames='k')


def first(scorer: metrics.Scorer, items: np.ndarray, num_items: int, *, name: str = 'model'
          ) -> np.ndarray:
    """Return the first items int32 [R, K] of all rows, scored part by part.

    Args:
      scorer: see `metrics.scored`.
      items: int32 [R, N]. Prefixes.
      num_items: V.
      name: of the model in error messages.
    """
    k, out = min(metrics.TOP, num_items), np.zeros((len(items), min(metrics.TOP, num_items)), int)
    for part, scores in metrics.scored(scorer, items, num_items, name=name):
        table = metrics.dense(scores)
        best = partial(metrics.top, k=k) if table.dtype == np.float64 else partial(_first, k=k)
        filled = np.resize(table, (metrics.CHUNK, table.shape[1])) if len(
            table) < metrics.CHUNK and table.size < metrics.FEW_CELLS else table  # one shape
        out[part] = np.asarray(best(filled))[:len(table)]
    return out


def measured(lists: np.ndarray, target: np.ndarray, counts: np.ndarray, warm: np.ndarray,
             content: np.ndarray | None = None) -> dict[str, float | None]:
    """Measure lists.

    Args:
      lists: int [R, K], ids 1..V.
      target: int [R]. The items that followed; 0: not ranked.
      counts: int [V + 1]. Training events.
      warm: bool [V + 1].
      content: float [V + 1, ...]. The items' content; None: there is none.

    Returns:
      coverage: share of the catalogue in any list.
      gini: Gini coefficient of the items' places in lists, 0 for equal exposure.
      novelty: mean self-information of a place, -log2 of the share (events + 1) / (all + V).
      diversity: mean over lists of 1 - cosine of the content of two of its items; None without
        content. Items without content count as orthogonal to all.
      popularity: mean training events of a place over those of a target; above 1: the lists favour
        popular items; null where targets have no events.
      cold: share of places with an item that no training session holds.
    """
    total, k = len(warm) - 1, lists.shape[1]
    exposure = np.sort(np.bincount(lists.ravel(), minlength=total + 1)[1:])
    weights = 2 * np.arange(1, total + 1) - total - 1
    share = (counts[1:] + 1) / (counts[1:].sum() + total)
    followed = counts[target[target > 0]]
    diversity = None
    if content is not None and k > 1:
        z = metrics.unit(np.asarray(content, np.float64).reshape(total + 1, -1))
        # the squared norm of a list's sum holds the cosines of all of its pairs, twice
        norms, cosines = (z ** 2).sum(axis=1), []
        for part in np.split(lists, range(metrics.CHUNK, len(lists), metrics.CHUNK)):
            held = sp.csr_array((np.ones(part.size), part.ravel(), np.arange(0, part.size + 1, k)),
                                shape=(len(part), total + 1))
            cosines.append(((held @ z) ** 2).sum(axis=1) - norms[part].sum(axis=1))
        diversity = float(1 - np.concatenate(cosines).mean() / (k * (k - 1)))
    return {'coverage': float((exposure > 0).mean()),
            'gini': float(weights @ exposure / (total * exposure.sum())),
            'novelty': float(-np.log2(share)[lists - 1].mean()), 'diversity': diversity,
            'popularity': float(counts[lists].mean() / followed.mean())
            if followed.sum() else None, 'cold': float((~warm[lists]).mean())}


def reliability(confidence: np.ndarray, right: np.ndarray) -> dict:
    """Compare the probability of the first item with how often it followed.

    Args:
      confidence: float [R]. The model's probability of its first item.
      right: float [R]. 1 where it is the target; with ties, its share of them.

    Returns:
      {'error': the mean distance of both over the bins, weighted by rows; 'curve': of each bin, of
      equally many rows by rising confidence, {'rows', 'predicted', 'observed'}}.
    """
    order = np.argsort(confidence, kind='stable')
    bins = [part for part in np.array_split(order, BINS) if len(part)]
    curve = [{'rows': len(part), 'predicted': float(confidence[part].mean()),
              'observed': float(right[part].mean())} for part in bins]
    error = sum(x['rows'] * abs(x['predicted'] - x['observed']) for x in curve) / len(order)
    return {'error': float(error), 'curve': curve}
