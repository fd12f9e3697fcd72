"""k-means: groups points by their distances, the same way for the same seed."""

import numpy as np
from scipy.cluster import vq

from tpad_jax.errors import refuse_if


def kmeans(points: np.ndarray, count: int, *, seed: int,
           rounds: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Run Lloyd's algorithm (1982) from a k-means++ start (Arthur and Vassilvitskii 2007).

    It ends when no point changes its cluster. A cluster that loses all its points starts over at
    the point that is farthest from its centre.

    Args:
      points: float [A, D].
      count: number of clusters C.
      seed: of the start.
      rounds: largest number of rounds.

    Returns:
      int32 [A], the cluster of each point, and float64 [C, D], the means of the clusters.

    Raises:
      InputError: more clusters than points.
    """
    points = np.asarray(points, np.float64)
    refuse_if(not 0 < count <= len(points), f'config.model.clusters={count}, but there are '
              f'{len(points)} items. Expected at most that many')
    centres = _start(points, count, np.random.default_rng(seed))
    labels = np.full(len(points), -1, np.int32)
    for _ in range(rounds):
        before, (labels, distance) = labels, vq.vq(points, centres)
        if np.array_equal(before, labels):
            break
        sizes = np.bincount(labels, minlength=count)
        sums = np.zeros_like(centres)
        np.add.at(sums, labels, points)
        centres = sums / np.maximum(sizes, 1)[:, None]
        empty = np.flatnonzero(sizes == 0)
        centres[empty] = points[np.argsort(-distance, kind='stable')[:len(empty)]]
    return labels, centres


def _start(points, count, rng):
    """Draw points [count, D], each in proportion to its squared distance from earlier ones."""
    chosen = [rng.integers(len(points))]
    distance = np.full(len(points), np.inf)
    for _ in range(count - 1):
        distance = np.minimum(distance, ((points - points[chosen[-1]]) ** 2).sum(1))
        total = distance.sum()
        share = distance / total if total > 0 else None  # every point equals a chosen one: draw any
        chosen.append(rng.choice(len(points), p=share))
    return points[chosen]
