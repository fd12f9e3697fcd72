"""Item pairs counted in sessions: followers, neighbours and companions.

Models and baselines count on training sessions alone: a graph of test sessions holds their targets.
"""

import numpy as np
import scipy.sparse as sp

from tpad_jax.data.sessions import Sessions

PART = 2**14  # items whose table is filled at a time


def followers(sessions: Sessions, num_items: int, longest: int, lag_power: float = 0.0,
              share: np.ndarray | None = None) -> sp.csr_array:
    """Sum the weights of every pair of an item and one up to `longest` steps later.

    An item that follows itself counts: a repetition is a transition too.

    Args:
      sessions: S sessions.
      num_items: V.
      longest: largest number of steps between the two items.
      lag_power: a pair `steps` apart weighs steps^-lag_power; 0: every pair weighs 1.
      share: float [S]. Weights of the sessions; None: all are 1.

    Returns:
      csr float64 [V + 1, V + 1], row the earlier item, column the later one.
    """
    owner = sessions.owner
    share = np.ones(len(sessions.lengths)) if share is None else share
    before, after, weight = [owner[:0]], [owner[:0]], [np.zeros(0)]
    for lag in range(1, min(longest, len(owner) - 1) + 1):
        same = owner[lag:] == owner[:-lag]
        before.append(sessions.items[:-lag][same])
        after.append(sessions.items[lag:][same])
        weight.append(float(lag) ** -lag_power * share[owner[lag:][same]])
    cells = np.concatenate(before), np.concatenate(after)
    return sp.csr_array((np.concatenate(weight), cells), shape=(num_items + 1, num_items + 1))


def decayed(items: np.ndarray, decay: float, num_items: int) -> sp.csr_array:
    """Weigh the items of prefixes by their steps from the prefix's end.

    Args:
      items: int32 [R, N] prefixes, left aligned, 0 pads.
      decay: an item d steps before the end weighs decay^d; 0: the last item only.
      num_items: V.

    Returns:
      csr float64 [R, V + 1]; the weights of a repeated item are summed.
    """
    row, position = np.nonzero(items)
    weight = float(decay) ** (np.count_nonzero(items, axis=1)[row] - 1 - position)
    row, position, weight = (array[weight > 0] for array in (row, position, weight))
    return sp.csr_array((weight, (row, items[row, position])), shape=(len(items), num_items + 1))


def membership(sessions: Sessions, num_items: int, latest: int = 0) -> sp.csr_array:
    """Mark the items of every session, once each.

    Args:
      sessions: S sessions.
      num_items: V.
      latest: number of a session's last events that count; 0: all.

    Returns:
      csr float64 [S, V + 1] of ones.
    """
    owner = sessions.owner
    first = sessions.offsets[1:] - (latest or len(owner))
    counts = np.arange(len(owner)) >= first[owner]
    held = sp.csr_array((np.ones(counts.sum()), (owner[counts], sessions.items[counts])),
                        shape=(len(sessions.lengths), num_items + 1))
    held.data[:] = 1  # equal cells were summed
    return held


def neighbours(train: Sessions, num_items: int, *, window: int = 3, most: int = 12
               ) -> tuple[np.ndarray, np.ndarray]:
    """Find the items that occur most often close to each item, in either order.

    Source: Wang et al. 2020 (GCE-GNN), section 3.1. An edge weighs how often its pair occurs, and
    every item keeps its heaviest edges [paper].

    Args:
      train: S training sessions.
      num_items: V.
      window: longest distance of a pair, in steps.
      most: neighbours kept per item; equal weights are ordered by item id.

    Returns:
      ids int32 [V + 1, most], 0 where there are fewer, and weights float32 [V + 1, most], each
      row's summing to 1 (or 0: an item without neighbours).
    """
    directed = followers(train, num_items, window)
    ids, weights = _heaviest(_without_loops(directed + directed.T), most)
    return ids, weights / np.maximum(weights.sum(axis=1, keepdims=True), 1)


def companions(train: Sessions, num_items: int, *, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the items that share most sessions with each item, relative to how frequent they are.

    An edge weighs the sessions that hold both items, divided by the square root of those that hold
    the companion, as in a cosine. The kept edges of an item are scaled to a lift over chance, which
    is 1 on average over the catalogue [ours].

    Args:
      train: S training sessions; a session of n different items makes n^2 edges.
      num_items: V.
      most: companions kept per item; equal weights are ordered by item id.

    Returns:
      ids int32 [V + 1, most], 0 where there are fewer, and lifts float32 [V + 1, most], each row's
      summing to V (or 0: an item that was alone).
    """
    held = membership(train, num_items).astype(np.float32)
    graph = _without_loops(held.T @ held)
    graph.data = graph.data / np.sqrt(np.maximum(held.sum(axis=0), 1)[graph.col])
    ids, lifts = _heaviest(graph, most)
    total = lifts.sum(axis=1, keepdims=True)
    return ids, np.where(total > 0, num_items * lifts / np.where(total > 0, total, 1), 0)


def _without_loops(graph: sp.csr_array) -> sp.coo_array:
    return sp.coo_array(graph - sp.diags_array(graph.diagonal()))  # zeros are not stored


def _heaviest(graph: sp.coo_array, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns int32 and weights float32 of each row's heaviest edges, [rows, most], 0 beyond."""
    order = np.lexsort((graph.col, -graph.data, graph.row))
    row, col, weight = graph.row[order], graph.col[order], graph.data[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    first = rank < most
    ids = np.zeros((graph.shape[0], most), np.int32)
    weights = np.zeros((graph.shape[0], most), np.float32)
    ids[row[first], rank[first]], weights[row[first], rank[first]] = col[first], weight[first]
    return ids, weights


def rules(train: Sessions, num_items: int, *, ordered: bool = True, most: int = 100,
          holders: int = 50, longest: int = 12, share: np.ndarray | None = None
          ) -> dict[str, np.ndarray]:
    """Count what the experts of models/experts.py look up, in tables of fixed widths.

    Args:
      train: S training sessions.
      num_items: V.
      ordered: whether the sessions are in the order of time; if not, they are drawn.
      most: items kept per item, the heaviest by both rules.
      holders: sessions kept per item, the most recent ones.
      longest: latest items kept of a session.
      share: float [S]. Weights of the sessions in all counts; None: all are 1.

    Returns:
      near int32 [V + 1, most], 0 where there are fewer, and weight float32 [V + 1, most, 3] as the
      next item, as a later one (1 / steps) and as a companion (a cosine); holders int32
      [V + 1, holders], sessions by number from 1, the most recent first; sessions int32
      [S' + 1, longest], those that are kept for any item, and scale float32 [S' + 1], one over the
      square root of their different items; events float32 [V + 1].
    """
    share = np.ones(len(train.lengths)) if share is None else share
    after = [followers(train, num_items, longest_step, 1.0, share) for longest_step in (1, 10)]
    held = membership(train, num_items, 1000)
    weighted = sp.diags_array(share) @ held
    size = 1 / np.sqrt(weighted.sum(axis=0) + 20)  # as in item-kNN
    cosine = sp.diags_array(size) @ (held.T @ weighted) @ sp.diags_array(size)
    tables = [*after, sp.csr_array(_without_loops(cosine))]
    scaled = [sp.diags_array(1 / np.maximum(x.sum(axis=1), 1e-9)) @ x for x in tables]
    near, _ = _heaviest(sp.coo_array(sum(scaled)), most)
    weight = np.empty((*near.shape, len(tables)), np.float32)
    tables = [sp.csr_array(x) for x in tables]
    for begin in range(0, num_items + 1, PART):  # of all at once, float64 would be gigabytes
        item = near[begin:begin + PART]
        row = np.repeat(np.arange(begin, begin + len(item)), most)
        for rule, x in enumerate(tables):
            weight[begin:begin + PART, :, rule] = x[row, item.reshape(-1)].reshape(item.shape)
    weight[near == 0] = 0
    count = len(train.lengths)
    # session 1 is the most recent one
    order = np.arange(count)[::-1] if ordered else np.random.default_rng(0).permutation(count)
    number = np.empty(count, np.int64)
    number[order] = np.arange(1, count + 1)
    cells = sp.coo_array(held)
    kept = sp.coo_array((1.0 / number[cells.row], (cells.col, number[cells.row])),
                        shape=(num_items + 1, count + 1))
    by_item, _ = _heaviest(kept, holders)
    used = np.unique(np.append(by_item, 0))
    session = order[used[1:] - 1]
    begin = np.maximum(train.offsets[session], train.offsets[session + 1] - longest)
    at = begin[:, None] + np.arange(longest)
    events = np.where(at < train.offsets[session + 1][:, None],
                      train.items[np.minimum(at, len(train.items) - 1)], 0)
    events = np.pad(events, ((1, 0), (0, 0))).astype(np.int32)
    scale = np.append(0, 1 / np.sqrt(held.sum(axis=1)[session])).astype(np.float32)
    return {'near': near, 'weight': weight, 'sessions': events, 'scale': scale,
            'holders': np.searchsorted(used, by_item).astype(np.int32),
            'events': np.bincount(train.items, share[train.owner], num_items + 1).astype('f')}
