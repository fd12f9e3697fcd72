"""Attributes of items, which colour plots and which linear probes predict from a feature."""

import numpy as np

from tpad_jax.data.synthetic import wording

CLASSES = 50  # most common values of an attribute that are probed
FITTED, SCORED = 20_000, 5_000  # items at most: more would not change the accuracy
SIDE = ('brand', 'category', 'price')  # columns of the side features


def known_attributes(job) -> dict[str, np.ndarray]:
    """List the known attributes of items 1..V: {attribute: int [V]}, below 0 where unknown."""
    if job.planted is not None:
        return dict(zip(wording.ATTRIBUTES, job.attributes.T, strict=True))
    data = job.data
    names = SIDE if len(data.side_sizes) == len(SIDE) and not job.config.data.ready else [
        f'side_{i}' for i in range(len(data.side_sizes))]
    # 0 is "unknown", but "no" for a field of two values
    return {name: ids if size == 2 and name not in SIDE else ids - 1
            for name, ids, size in zip(names, data.side[1:].T, data.side_sizes, strict=False)}


def category(job) -> np.ndarray:
    """Choose the label of items 1..V that colours a plot: int [V], below 0 for none.

    It is the category, if there is one; else the first value that an item has of a list of values;
    else the first side feature.
    """
    known = known_attributes(job)
    if 'category' in known:
        return known['category']
    values = [ids for ids, size in zip(known.values(), job.data.side_sizes, strict=False)
              if size == 2]
    if len(values) > 1:
        return np.where(np.any(values, axis=0), np.argmax(values, axis=0), -1)
    return next(iter(known.values()), np.full(job.data.num_items, -1))


def linear_probe(features: np.ndarray, labels: np.ndarray, fit_on: np.ndarray,
                 ridge: float = 1e-2) -> float:
    """Fit a ridge regression to one-hot labels on some rows and measure it on the others.

    Args:
      features: float [V, F].
      labels: int [V].
      fit_on: bool [V]. The rows to fit on; the others are scored.
      ridge: penalty, relative to the mean square of a standardised feature times the rows.

    Returns:
      The share of the scored rows whose label has the highest score.
    """
    mean, scale = features[fit_on].mean(0), features[fit_on].std(0) + 1e-6
    x = np.concatenate([(features - mean) / scale, np.ones((len(features), 1))], axis=1)
    x = x.astype(np.float64)
    y = np.eye(labels.max() + 1)[labels]
    gram = x[fit_on].T @ x[fit_on] + ridge * fit_on.sum() * np.eye(x.shape[1])
    weights = np.linalg.solve(gram, x[fit_on].T @ y[fit_on])
    return float(((x[~fit_on] @ weights).argmax(1) == labels[~fit_on]).mean())


def attributes(rows: np.ndarray, labels: dict[str, np.ndarray], warm: np.ndarray,
               seed: int = 0) -> dict:
    """Probe every attribute: fit on warm items, score on cold ones.

    The `CLASSES` most common values among warm items are probed, on the items with these values.

    Args:
      rows: float [V, ...]. Features; they are flattened.
      labels: {attribute: int [V]}, below 0 where it is unknown.
      warm: bool [V].
      seed: of the items that are drawn, if there are more than `FITTED` or `SCORED`.

    Returns:
      {attribute: {'accuracy', 'chance', 'rows', 'classes'}}. 'chance' is the share of the most
      common value among the scored rows. An attribute with fewer than two values, or without cold
      items, is left out.
    """
    out = {}
    for name, label in labels.items():
        values, counts = np.unique(label[warm & (label >= 0)], return_counts=True)
        values = np.sort(values[np.argsort(-counts, kind='stable')[:CLASSES]])
        known = np.isin(label, values)
        rng = np.random.default_rng(seed)
        parts = [np.flatnonzero(known & part) for part in (warm, ~warm)]
        parts = [part if len(part) <= most else rng.choice(part, most, replace=False)
                 for part, most in zip(parts, (FITTED, SCORED), strict=True)]
        if len(values) < 2 or not len(parts[1]):
            continue
        at = np.sort(np.concatenate(parts))
        x = np.asarray(rows[at], np.float64).reshape(len(at), -1)
        y = np.searchsorted(values, label[at])
        out[name] = {'accuracy': linear_probe(x, y, warm[at]),
                     'chance': float(np.bincount(y[~warm[at]]).max() / len(parts[1])),
                     'rows': len(parts[1]), 'classes': len(values)}
    return out
