"""Lays the clouds of features before and after alignment into one plane.

All clouds of both moments share the plane of the first two principal components of their rows,
scaled to length one: it shows where the features are in relation to each other. A second plane
holds the same clouds without their means. It shows how an item's category is related to each
cloud, which the gaps between the clouds would hide.
"""

from typing import NamedTuple

import numpy as np

from tpad_jax.diagnostics.clouds import unit

# The features of a snapshot, and the item ids that colour their rows: a position's item, or the
# item that follows it.
FEATURES = {'k_image': 'items', 'k_text': 'items', 'r': 'items', 't': 'at', 'c': 'at', 'p': 'next'}
NAMES = {'k_image': 'k image', 'k_text': 'k text'}
MOST = 400  # points of a cloud that are drawn


class Laid(NamedTuple):
    """The clouds of two moments, 0 and 1, in two planes.

    Attributes:
      names: features that both moments have.
      whole: {(moment, name): float [n, 2]}, all clouds in one plane.
      share: share of the clouds' variance in that plane.
      inner: {(moment, name): float [n, 2]}, the clouds without their means in a plane that they
        vary most in.
      inside: share of the variance in that second plane.
    """

    names: list[str]
    whole: dict[tuple[int, str], np.ndarray]
    share: float
    inner: dict[tuple[int, str], np.ndarray]
    inside: float


def plane(clouds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """Find the plane that all clouds vary most in.

    Every cloud has the same weight, however many rows it has.

    Args:
      clouds: float [n, D] each, of one D.

    Returns:
      The mean float [D], the basis float [D, 2] and the share of the variance in the plane.
    """
    mean = np.mean([x.mean(0) for x in clouds], axis=0)
    # the D x D covariance: a singular value decomposition of all rows takes seconds
    covariance = sum((x - mean).T @ (x - mean) / len(x) for x in clouds)
    variances, axes = np.linalg.eigh(covariance)
    basis = axes[:, [-1, -2]]
    # a fixed sign: else the plot could be mirrored from run to run
    basis *= np.sign(np.take_along_axis(basis, np.abs(basis).argmax(0)[None], axis=0))
    total = variances.sum()
    return mean, basis, float(variances[-2:].sum() / total) if total else 0.0


def lay(before: dict, after: dict) -> Laid:
    """Project both moments' clouds {name: float [n, D]} of `FEATURES` to their planes."""
    names = [name for name in FEATURES if name in before and name in after]
    rows = {(side, name): unit(clouds[name]) for side, clouds in enumerate((before, after))
            for name in names}
    mean, basis, share = plane(list(rows.values()))
    whole = {key: (x - mean) @ basis for key, x in rows.items()}
    inner = {key: x - x.mean(0) for key, x in rows.items()}
    _, basis, inside = plane(list(inner.values()))
    return Laid(names, whole, share, {key: x @ basis for key, x in inner.items()}, inside)


def farthest(laid: dict) -> float:
    """Half the side of a square that holds all points except a few outliers."""
    return 1.1 * max(np.quantile(np.abs(x), 0.995) for x in laid.values()) + 1e-6


def drawn_rows(count: int) -> np.ndarray:
    """Rows that are drawn, the same ones for two clouds of the same size: int [<= MOST]."""
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST])
