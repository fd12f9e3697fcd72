"""The features of test rows, and the slices of rows (and of items) that results are split by."""

import numpy as np

from tpad_jax.data.sessions import Rows

# Slices of rows by prefix length, both ends included.
LENGTHS = {'length_1': (1, 1), 'length_2': (2, 2), 'length_3-5': (3, 5), 'length_6+': (6, np.inf)}
QUARTILES = ('popularity_q1', 'popularity_q2', 'popularity_q3', 'popularity_q4')


def popularity_quartiles(counts: np.ndarray) -> np.ndarray:
    """Compute the quartile of every warm item, 1 (rare) to 4 (frequent); 0 has no training events.

    The quartiles divide training *events*, ordered by the frequency of their item, into four equal
    parts. So q4 has few items and q1 many. Items of equal counts share the quartile of their middle
    event. Only training counts enter.

    Args:
      counts: int [V + 1]. Training events of every item; row 0 is padding.

    Returns:
      int8 [V + 1].
    """
    level, item, items = np.unique(counts, return_inverse=True, return_counts=True)
    events = level * items
    middle = (np.cumsum(events) - events / 2) / max(events.sum(), 1)
    quartile = np.minimum(1 + np.floor(4 * middle), 4)
    return np.where(level > 0, quartile, 0).astype(np.int8)[item]


def features(rows: Rows, warm: np.ndarray, counts: np.ndarray | None = None
             ) -> dict[str, np.ndarray]:
    """Compute the features that slices are chosen by, per row.

    Args:
      rows: R rows.
      warm: bool [V + 1].
      counts: int [V + 1]. Training events of every item; None: no 'popularity'.

    Returns:
      'length' int32 [R] of the prefix, 'repeat' bool [R] (the prefix holds the target), 'warm'
      bool [R] of the target, 'popularity' int8 [R], the target's quartile (0: cold).
    """
    out = {'length': np.count_nonzero(rows.items, axis=1).astype(np.int32),
           'repeat': (rows.target > 0) & (rows.items == rows.target[:, None]).any(axis=1),
           'warm': warm[rows.target]}
    if counts is not None:
        out['popularity'] = popularity_quartiles(counts)[rows.target]
    return out


def chosen(known: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Select the rows of every slice that the known `features` define: {slice: bool [R]}."""
    out = {}
    for inside, outside in ('warm', 'cold'), ('repeat', 'new'):
        if inside in known:
            out |= {inside: known[inside], outside: ~known[inside]}
    if 'length' in known:
        out |= {label: (known['length'] >= low) & (known['length'] <= high)
                for label, (low, high) in LENGTHS.items()}
    if 'popularity' in known:
        out |= {label: known['popularity'] == number for number, label in enumerate(QUARTILES, 1)}
    return out
