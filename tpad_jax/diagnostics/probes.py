"""Linear probes: attributes predicted from a feature, on items without training sessions."""

import numpy as np

CLASSES = 50  # most common values of an attribute that are probed
FITTED, SCORED = 20_000, 5_000  # items at most: more would not change the accuracy


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
    guess = (x[~fit_on] @ weights).argmax(1)
    return float((guess == labels[~fit_on]).mean())


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
