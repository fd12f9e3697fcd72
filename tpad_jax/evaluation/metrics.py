"""Exact ranking metrics over a whole catalogue, ties counted as the mean over all their orders.

There are two views of one ranked list. Against the *sampled* target, `counts` gives the number of
items that score above it and the number that equal it (itself included). hit, MRR and NDCG need no
more, and counts of parts of a catalogue add up. Against a *known* distribution, `places` gives the
probability of the item at each place, and every expected metric is a weighted sum of those.

There are V items. Column 0 of every [R, V + 1] table is padding and is never ranked. A method that
knows only a few items of each row returns `Sparse` scores, which are ranked without a dense table.
"""

import functools
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.special import logsumexp

from tpad_jax.core import ties
from tpad_jax.errors import refuse_if, refusing


class Sparse(NamedTuple):
    """Scores found + background: some cells of a row, and a back-off that all rows share.

    Attributes:
      found: csr float32 [R, V + 1], no cell twice.
      background: float32 [V + 1], such as popularity.
    """

    found: sp.csr_array
    background: np.ndarray


Scores = np.ndarray | Sparse  # float [R, V + 1]
# int32 [R, N] prefixes, left aligned, 0 pads -> scores [R, V + 1]
Scorer = Callable[[np.ndarray], Scores]

MISS = np.int32(2**31 - 2)  # items above a target that is not ranked
CHUNK = 512  # rows that are scored at a time
FEW_CELLS = 2**22  # scores of a call that cost nothing: 16 MB in float32
FILLED = 0.2  # share of cells in sparse scores from which a dense table is counted faster
# scores of a split that the host holds and ranks: 32 MB. More are ranked where they are computed
HELD = 2**23
MOST_CELLS = 2**26  # scores of a call at most: 256 MB in float32
# (places float64 [k], 1 being the first; k) -> [k], the value of a target at each place
Gain = Callable[[np.ndarray, int], np.ndarray]
GAINS: dict[str, Gain] = {
    'hit': lambda place, k: np.ones_like(place), 'mrr': lambda place, k: 1 / place,
    'ndcg': lambda place, k: 1 / np.log2(place + 1)}
TOP = 20  # K of the metrics that intervals, tests and the printed table show


def registry(named: Mapping[str, str]) -> dict[str, Gain]:
    """Add a config's metrics to the built-in ones.

    Args:
      named: {name: 'module:function'} of `config.metrics`; a function is a `Gain`.

    Returns:
      {name: function} of all metrics.

    Raises:
      InputError: a name is taken or not a word, or a function cannot be imported or used.
    """
    gains = dict(GAINS)
    for name, path in named.items():
        option = f'config.metrics.{name}={path!r}'
        refuse_if(name in GAINS or not re.fullmatch(r'(?!expected)[a-z]\w*', name),
                  f'{option}: the name cannot be used. Expected lower-case letters, digits and _, '
                  f'not {", ".join(GAINS)} or expected... Fix: rename it.')
        # anything that a user's file raises
        with refusing(Exception, f'{option}: it cannot be used', 'Expected module:function with '
                      'the arguments (places, k). Fix: repair the function or the name.'):
            gains[name] = pkgutil.resolve_name(path)
            values = gain_table(gains[name], TOP)
        refuse_if(values.shape != (TOP,) or not np.isfinite(values).all(), f'{option}: it returned '
                  f'{values.dtype} {list(values.shape)}. Expected {TOP} finite numbers. '
                  'Fix: return one value per place.')
    return gains


def gain_table(gain: Gain, k: int) -> np.ndarray:
    """Evaluate a gain at places 1, 2, .. k: float64 [k], also if it returns booleans."""
    return np.asarray(gain(np.arange(1, k + 1, dtype=np.float64), k), np.float64)


def dense(scores: Scores) -> np.ndarray:
    """Convert scores to one table [R, V + 1], `Sparse` ones to their float32 sum."""
    return scores.found.toarray() + scores.background if isinstance(scores, Sparse) else scores


def scored(scorer: Scorer, items: np.ndarray, num_items: int, *, chunk: int | None = None,
           name: str = 'model') -> Iterator[tuple[slice, Scores]]:
    """Score prefixes part by part, to bound memory.

    The scorer always gets the same number of rows, so that a compiled one compiles once. The last
    part is filled up with copies of its last row, whose scores are dropped. Where `chunk` rows of
    scores would be large, a part has fewer rows.

    Args:
      scorer: scores [chunk, V + 1], a numpy or a jax array, or `Sparse`. Arrays of another type
        than float64 are read as float32.
      items: int32 [R, N] prefixes.
      num_items: V.
      chunk: rows at a time; None: CHUNK.
      name: of the model in error messages.

    Yields:
      The rows' slice of `items` and their scores [r, V + 1], `Sparse` where the scorer's are.

    Raises:
      ValueError: the scores have another shape.
      FloatingPointError: an item's score is not finite.
    """
    chunk = chunk or CHUNK
    if chunk * num_items > FEW_CELLS:  # else one compiled shape serves any number of rows
        chunk = min(chunk, len(items), max(1, MOST_CELLS // num_items))
    for begin in range(0, len(items), chunk):
        part = items[begin:begin + chunk]
        filled = np.pad(part, ((0, chunk - len(part)), (0, 0)), mode='edge')
        scores = _read(scorer(filled), (chunk, num_items + 1), len(part), name)
        check_finite(scores, begin, name)
        yield slice(begin, begin + len(part)), scores


def _read(scores, shape, rows, name):
    """The first `rows` rows of a scorer's result, float32 (or a float64 array)."""
    found, background = scores if isinstance(scores, Sparse) else (np.asarray(scores), None)
    for part, expected_shape in ((found, shape), (background, shape[1:])):
        if part is not None and part.shape != expected_shape:
            raise ValueError(f'{name}: scores of shape {part.shape} for {shape[0]} prefixes and '
                             f'{shape[1] - 1} items; they must be {expected_shape}.')
    if background is None and found.dtype == np.float64:
        return found[:rows]
    found = found[:rows].astype(np.float32, copy=False)
    return found if background is None else Sparse(found, background.astype(np.float32, copy=False))


def check_finite(scores: Scores, begin: int, name: str) -> None:
    """Refuse scores that are not finite; column 0 may hold anything.

    Args:
      scores: float [R, V + 1].
      begin: number of the first row, for the message.
      name: of the model.

    Raises:
      FloatingPointError: an item's score is not finite.
    """
    with np.errstate(over='ignore', invalid='ignore'):
        if isinstance(scores, Sparse):
            found, background = scores
            item = found.indices > 0
            sums = found.data[item] + background[found.indices[item]]
            if np.isfinite(sums).all() and np.isfinite(background[1:]).all():
                return
        table = dense(scores)
    broken = ~np.isfinite(table[:, 1:])
    if broken.any():
        row, item = np.argwhere(broken)[0]
        raise FloatingPointError(
            f'{name}: the score of item {item + 1} in row {begin + row} is {table[row, item + 1]}, '
            f'and so are {broken.sum() - 1} others of this part; every score must be finite.')


def counts(scores: Scores, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Count the items that score above the target and those that score the same, itself included.

    Args:
      scores: float [R, V + 1]. `Sparse` ones give the counts of their `dense` table exactly.
      target: int [R], ids 1..V.

    Returns:
      above int32 [R], 0..V - 1, and equal int32 [R], 1..V.
    """
    if isinstance(scores, Sparse):
        if scores.found.nnz < FILLED * scores.found.shape[0] * scores.found.shape[1]:
            return _sparse_counts(scores, target)
        scores = dense(scores)
    score = np.take_along_axis(scores, target[:, None], axis=1)
    # a view of bytes sums three times as fast as count_nonzero along an axis
    return tuple(mask.view(np.uint8).sum(axis=1, dtype=np.int32)
                 for mask in (scores[:, 1:] > score, scores[:, 1:] == score))


def nll(scores: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Compute the negative log-likelihood of targets in a softmax over the catalogue.

    Args:
      scores: float [R, V + 1].
      target: int [R], ids 1..V.

    Returns:
      float [R], in nats.
    """
    return logsumexp(scores[:, 1:], axis=1) - np.take_along_axis(scores, target[:, None], 1)[:, 0]


def _sparse_counts(scores, target):
    """Compute `counts` of the background alone, then correct them for each found cell."""
    found, background = scores
    row = np.repeat(np.arange(len(target)), np.diff(found.indptr))
    item, before = found.indices, background[found.indices]
    after = found.data + before
    score = background[target]
    hits = item == target[row]
    score[row[hits]] = after[hits]
    ordered = np.sort(background[1:])
    until = np.searchsorted(ordered, score, side='right')
    base = len(ordered) - until, until - np.searchsorted(ordered, score, side='left')
    row, before, after = (array[item > 0] for array in (row, before, after))
    score = score[row]
    change = ((after > score) * 1. - (before > score), (after == score) * 1. - (before == score))
    return tuple((count + np.bincount(row, by, len(target))).astype(np.int32)
                 for count, by in zip(base, change, strict=True))


def ranks(scorer: Scorer, items: np.ndarray, target: np.ndarray, num_items: int, *,
          chunk: int | None = None, name: str = 'model') -> tuple[np.ndarray, np.ndarray]:
    """Compute `counts` of every row: int32 [R, N], int [R] -> above, equal int32 [R]."""
    above, equal = np.zeros((2, len(items)), np.int32)
    for part, scores in scored(scorer, items, num_items, chunk=chunk, name=name):
        above[part], equal[part] = counts(scores, target[part])
    return above, equal


def mean_gain(gain: Gain, above: np.ndarray, equal: np.ndarray, k) -> np.ndarray:
    """Average a metric over all orders of the tied items; places below the k-th earn 0.

    Args:
      gain: the value of a target at each place.
      above: int [...]. Items with a higher score than the target.
      equal: int [...]. Items with the same score, the target among them.
      k: int, or, for a gain that does not depend on it, int [...] which broadcasts.

    Returns:
      float64 [...], the mean gain over the places above + 1 .. above + equal.
    """
    return ties.mean_gain(gain_table(gain, int(np.max(k))), above, equal, k)


# of (above, equal, k). hit is also called recall, or "P@k" in papers
hit, mrr, ndcg = (functools.partial(mean_gain, GAINS[name]) for name in ('hit', 'mrr', 'ndcg'))


def unit(x: np.ndarray) -> np.ndarray:
    """Scale the vectors x [..., D] to length one; zero stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """Select the item ids int32 [B, k] of the highest scores [B, V+1], best first, not padding."""
    return 1 + np.argsort(-scores[:, 1:], axis=1, kind='stable')[:, :k].astype(np.int32)


def places(scores: Scores, weights: Iterable[np.ndarray], depth: int) -> np.ndarray:
    """Compute the weight at the first places of a ranking, averaged over the orders of tied items.

    Args:
      scores: float [R, V + 1], made dense if `Sparse`.
      weights: M tables float [R, V + 1], a weight of every item: the true probabilities, or those
        of a slice of items and 0 elsewhere.
      depth: number of places; those beyond V hold 0.

    Returns:
      float64 [M, R, depth], the weight expected at place 1, 2, .. depth.
    """
    scores = dense(scores)[:, 1:]
    first = min(depth, scores.shape[1])
    top = np.argpartition(scores, -first, axis=1)[:, -first:]
    value = np.take_along_axis(scores, top, axis=1)
    order = np.argsort(-value, axis=1)
    top, value = (np.take_along_axis(table, order, axis=1) for table in (top, value))
    # most rows have no ties and are read as they are
    within = np.flatnonzero((value[:, 1:] == value[:, :-1]).any(axis=1))
    alike = (value[within, :, None] == value[within, None, :]).astype(np.float64)
    alike /= alike.sum(axis=2, keepdims=True)
    # items beyond `first` can tie with the last value, so its mean is taken over the whole row
    lowest = value == value[:, -1:]
    beyond = np.flatnonzero((scores == value[:, -1:]).sum(axis=1) > lowest.sum(axis=1))
    lowest, tied = lowest[beyond], (scores[beyond] == value[beyond, -1:]).astype(np.float64)
    tied /= tied.sum(axis=1, keepdims=True)
    out = []
    for weight in weights:
        weight = weight[:, 1:]
        placed = np.take_along_axis(weight, top, axis=1).astype(np.float64)
        placed[within] = np.einsum('rpq,rq->rp', alike, placed[within])
        edge = np.einsum('rv,rv->r', tied, weight[beyond])[:, None]
        placed[beyond] = np.where(lowest, edge, placed[beyond])
        out.append(placed)
    return np.pad(np.stack(out), ((0, 0), (0, 0), (0, depth - first)))


def expected(gain: Gain, placed: np.ndarray, k: int) -> np.ndarray:
    """Compute a metric's expectation under the true distribution.

    Args:
      gain: the value of a target at each place.
      placed: float [..., depth] of `places`, whose weights were the true probabilities.
      k: int, at most depth.

    Returns:
      float64 [...]: the sum over the first k places of weight times gain.
    """
    return placed[..., :k] @ gain_table(gain, k)
