"""The second stage: new scores for the first items of a list.

A reranker is a pure function that reads the FIRST items of every list and their scores and returns
new scores; the list is then ordered by these. Items after them keep their order.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from tpad_jax.evaluation import metrics

FIRST = 100  # items of a list that a reranker reads


class Context(NamedTuple):
    """Further inputs of a reranker.

    Attributes:
      prefixes: int32 [B, N]. Rows of the sessions' items, left aligned, 0 pads.
      vectors: rows int32 [...] -> float32 [..., D], the items' z without the experts' columns.
      titles: titles by row.
    """

    prefixes: np.ndarray
    vectors: Callable[[np.ndarray], np.ndarray]
    titles: Sequence[str]


# (items int32 [B, FIRST], scores float32 [B, FIRST], context) -> new scores float [B, FIRST].
# A list with fewer items ends with items 0, whose scores are -inf.
Reranker = Callable[[np.ndarray, np.ndarray, Context], np.ndarray]


def mmr(items: np.ndarray, scores: np.ndarray, context: Context, *, diversity: float
        ) -> np.ndarray:
    """Order items by maximal marginal relevance on z.

    The next item maximises (1 - diversity) relevance - diversity * likeness: relevance is the
    score, from 0 for the lowest of the row to 1 for its highest, and likeness the largest cosine
    with an item chosen before, at least 0 (Carbonell and Goldstein 1998). Equal items keep their
    order.

    Args:
      items: int32 [B, n]. Rows, best first; 0 pads.
      scores: float32 [B, n].
      context: see `Context`.
      diversity: 0 keeps the order; 1 ignores the scores after the first item.

    Returns:
      float64 [B, n], the value with which an item was chosen; it falls in the order of choice.
    """
    real, row = items > 0, np.arange(len(items))
    low = np.where(real, scores, np.inf).min(axis=1, keepdims=True)
    above = np.where(real, scores.astype(np.float64) - low, 0)
    relevance = above / np.maximum(above.max(axis=1, keepdims=True), 1e-30)
    z = metrics.unit(context.vectors(items).astype(np.float64))
    like, likeness = z @ z.transpose(0, 2, 1), np.zeros(items.shape)
    new, left = np.full(items.shape, -np.inf), real.copy()
    for _ in range(items.shape[1]):
        value = np.where(left, (1 - diversity) * relevance - diversity * likeness, -np.inf)
        best = value.argmax(axis=1)
        new[row, best] = np.where(left[row, best], value[row, best], new[row, best])
        left[row, best] = False
        likeness = np.maximum(likeness, like[row, best])
    return new


@cache
def diverse(diversity: float) -> Reranker:
    """Return `mmr` with a diversity, the same function for the same number."""
    return partial(mmr, diversity=diversity)
