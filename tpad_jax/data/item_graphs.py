"""Two graphs over items: which stand near each other in training sessions, and which share them.

Source: Wang et al. 2020 (GCE-GNN), section 3.1: items at most `window` steps apart are neighbours,
whichever comes first; an edge weighs how often it occurs; every item keeps its heaviest edges.
Counted on training sessions alone: a graph that has seen a test session holds its targets.
"""

import numpy as np
import scipy.sparse as sp

from tpad_jax.data.sessions import Sessions


def neighbours(train: Sessions, num_items: int, *, window: int = 3, most: int = 12
               ) -> tuple[np.ndarray, np.ndarray]:
    """Each item's heaviest neighbours.

    Args:
      train: S training sessions.
      num_items: V.
      window: longest distance of a pair, in steps.
      most: neighbours kept per item; equal weights by item id.

    Returns:
      ids int32 [V + 1, most], 0 where there are fewer, and weights float32 [V + 1, most], each
      row's summing to 1 (or 0: an item without neighbours).
    """
    owner = np.repeat(np.arange(len(train.offsets) - 1), np.diff(train.offsets))
    pairs = []
    for lag in range(1, min(window, len(owner) - 1) + 1):
        inside = (owner[lag:] == owner[:-lag]) & (train.items[lag:] != train.items[:-lag])
        pairs.append(np.stack([train.items[:-lag][inside], train.items[lag:][inside]]))
    a, b = np.concatenate(pairs, axis=1) if pairs else np.zeros((2, 0), np.int32)
    shape = num_items + 1, num_items + 1
    once = sp.csr_array((np.ones(len(a), np.float32), (a, b)), shape=shape)
    ids, weights = _heaviest(sp.coo_array(once + once.T), most)
    return ids, weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)


def companions(train: Sessions, num_items: int, *, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Each item's companions: those that share most sessions with it, for how many they are in.

    An edge weighs the sessions that hold both, over the square root of those that hold the
    companion, as a cosine has it; what is kept of an item's is then scaled to a lift over chance,
    which is 1 on average over the catalogue.

    Args:
      train: S training sessions; one of n different items makes n^2 edges. num_items: V.
      most: companions kept per item; equal weights by item id.

    Returns:
      ids int32 [V + 1, most], 0 where there are fewer, and lifts float32 [V + 1, most], each row's
      summing to V (or 0: an item that was alone).
    """
    owner = np.repeat(np.arange(len(train.offsets) - 1), np.diff(train.offsets))
    held = sp.csr_array((np.ones(len(owner), np.float32), (owner, train.items)),
                        shape=(len(train.offsets) - 1, num_items + 1))
    held.sum_duplicates()
    held.data[:] = 1
    graph = sp.coo_array(held.T @ held)
    other = graph.row != graph.col
    sessions = np.maximum(held.sum(axis=0), 1)
    weight = graph.data[other] / np.sqrt(sessions[graph.col[other]])
    ids, lifts = _heaviest(sp.coo_array(
        (weight, (graph.row[other], graph.col[other])), shape=graph.shape), most)
    total = lifts.sum(axis=1, keepdims=True)
    return ids, np.where(total > 0, num_items * lifts / np.where(total > 0, total, 1), 0)


def _heaviest(graph: sp.coo_array, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns int32 and weights float32 of each row's heaviest edges, [rows, most], 0 beyond."""
    order = np.lexsort((graph.col, -graph.data, graph.row))
    row, col, weight = graph.row[order], graph.col[order], graph.data[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    kept = place < most
    ids = np.zeros((graph.shape[0], most), np.int32)
    weights = np.zeros((graph.shape[0], most), np.float32)
    ids[row[kept], place[kept]], weights[row[kept], place[kept]] = col[kept], weight[kept]
    return ids, weights
