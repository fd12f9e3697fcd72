"""Exact ranking metrics over a whole catalogue, ties counted as the mean over all their orders.

Two views of one ranked list. Against the *sampled* target: `counts` says how many items score above
it and how many equal it (itself included), which is all hit, MRR and NDCG need; counts of parts of
a catalogue add up. Against a *known* distribution: `places` says how probable the item at each
place is, and every expected metric is a weighted sum of that.

V items; column 0 of every [R, V + 1] table is padding and is never ranked.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np

Scorer = Callable[[np.ndarray], np.ndarray]
"""int32 [R, N] prefixes, left aligned, 0 pads -> float [R, V + 1] scores."""

GAINS = {'hit': np.ones_like, 'mrr': np.reciprocal, 'ndcg': lambda place: 1 / np.log2(place + 1)}
"""What finding the target at a place (1 is the first) is worth; float [...] -> float [...]."""


def scored(scorer: Scorer, items: np.ndarray, num_items: int, *, chunk: int = 512,
           name: str = 'model') -> Iterator[tuple[slice, np.ndarray]]:
    """Scores prefixes part by part, which bounds memory.

    The scorer always gets exactly `chunk` rows, so that a compiled one compiles once; the last part
    is filled up with copies of its last row, whose scores are dropped.

    Args:
      scorer: scores [chunk, V + 1], a numpy or a jax array; anything but float64 is read as
        float32.
      items: int32 [R, N] prefixes.
      num_items: V.
      chunk: rows at a time.
      name: what an error calls the model.

    Yields:
      the rows' slice of `items` and their scores [r, V + 1].

    Raises:
      ValueError: the scores have another shape.
      FloatingPointError: an item's score is not finite.
    """
    for begin in range(0, len(items), chunk):
        part = items[begin:begin + chunk]
        filled = np.pad(part, ((0, chunk - len(part)), (0, 0)), mode='edge')
        scores = np.asarray(scorer(filled))
        if scores.shape != (chunk, num_items + 1):
            raise ValueError(f'{name}: scores of shape {scores.shape} for {chunk} prefixes and '
                             f'{num_items} items; they must be {(chunk, num_items + 1)}.')
        scores = scores[:len(part)]
        if scores.dtype != np.float64:
            scores = scores.astype(np.float32, copy=False)
        broken = ~np.isfinite(scores[:, 1:])
        if broken.any():
            row, item = np.argwhere(broken)[0]
            raise FloatingPointError(
                f'{name}: the score of item {item + 1} in row {begin + row} is '
                f'{scores[row, item + 1]}, and so are {broken.sum() - 1} others of this part; '
                'every score must be finite.')
        yield slice(begin, begin + len(part)), scores


def counts(scores: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Items that score above the target, and items that score the same, the target among them.

    Args:
      scores: float [R, V + 1].
      target: int [R], ids 1..V.

    Returns:
      above int32 [R], 0..V - 1, and equal int32 [R], 1..V.
    """
    own = np.take_along_axis(scores, target[:, None], axis=1)
    # a view of bytes sums three times as fast as count_nonzero along an axis
    return tuple(mask.view(np.uint8).sum(axis=1, dtype=np.int32)
                 for mask in (scores[:, 1:] > own, scores[:, 1:] == own))


def ranks(scorer: Scorer, items: np.ndarray, target: np.ndarray, num_items: int, *,
          chunk: int = 512, name: str = 'model') -> tuple[np.ndarray, np.ndarray]:
    """`counts` of every row: int32 [R, N], int [R] -> above, equal int32 [R]; see `scored`."""
    above, equal = np.zeros((2, len(items)), np.int32)
    for part, scores in scored(scorer, items, num_items, chunk=chunk, name=name):
        above[part], equal[part] = counts(scores, target[part])
    return above, equal


def hit(above, equal, k):
    """hit@k (recall@k, "P@k" in papers): clip((k - above) / equal, 0, 1). See `mean_gain`."""
    return mean_gain('hit', above, equal, k)


def mrr(above, equal, k):
    """MRR@k: 1 / place, 0 beyond k. See `mean_gain`."""
    return mean_gain('mrr', above, equal, k)


def ndcg(above, equal, k):
    """NDCG@k for one relevant item: 1 / log2(place + 1), 0 beyond k. See `mean_gain`."""
    return mean_gain('ndcg', above, equal, k)


def mean_gain(name, above, equal, k):
    """A metric's mean over all orders of the equal items; what lies beyond place k is worth 0.

    Args:
      name: 'hit', 'mrr' or 'ndcg'.
      above: int [...], items above the target.
      equal: int [...], items at its score, itself among them.
      k: int or int [...]; the three broadcast.

    Returns:
      float64 [...], the mean gain over the places above + 1 .. above + equal.
    """
    gains = GAINS[name](np.arange(1, np.max(k) + 1, dtype=np.float64))
    until = np.append(0, np.cumsum(gains))  # gains of the first 0, 1, .. places together
    return (until[np.minimum(above + equal, k)] - until[np.minimum(above, k)]) / equal


def places(scores: np.ndarray, weights: Iterable[np.ndarray], depth: int) -> np.ndarray:
    """What stands at the first places of a ranking, in expectation over the orders of tied items.

    Args:
      scores: float [R, V + 1].
      weights: M tables float [R, V + 1], a weight of every item: the true probabilities, or those
        of a slice of items and 0 elsewhere.
      depth: number of places; those beyond V hold 0.

    Returns:
      float64 [M, R, depth], the weight expected at place 1, 2, .. depth.
    """
    scores = scores[:, 1:]
    first = min(depth, scores.shape[1])
    top = np.argpartition(scores, -first, axis=1)[:, -first:]
    value = np.take_along_axis(scores, top, axis=1)
    order = np.argsort(-value, axis=1)
    top, value = (np.take_along_axis(table, order, axis=1) for table in (top, value))
    alike = (value[:, :, None] == value[:, None, :]).astype(np.float64)
    alike /= alike.sum(axis=2, keepdims=True)
    # the last value may go on beyond `first`, so its mean is taken over the whole row
    lowest = value[:, -1:]
    tied = (scores == lowest).astype(np.float64)
    tied /= tied.sum(axis=1, keepdims=True)
    out = []
    for weight in weights:
        weight = weight[:, 1:]
        inside = np.einsum('rpq,rq->rp', alike, np.take_along_axis(weight, top, axis=1))
        edge = np.einsum('rv,rv->r', tied, weight)[:, None]
        out.append(np.where(value == lowest, edge, inside))
    return np.pad(np.stack(out), ((0, 0), (0, 0), (0, depth - first)))


def expected(name: str, placed: np.ndarray, k: int) -> np.ndarray:
    """A metric's expectation under the true distribution.

    Args:
      name: 'hit', 'mrr' or 'ndcg'.
      placed: float [..., depth] of `places`, whose weights were the true probabilities.
      k: int, at most depth.

    Returns:
      float64 [...]: the sum over the first k places of weight times gain.
    """
    return placed[..., :k] @ GAINS[name](np.arange(1, k + 1, dtype=np.float64))
