"""Linear probes: what can be read off a feature by a straight line, on items training never met."""

import numpy as np


def linear_probe(features: np.ndarray, labels: np.ndarray, fit_on: np.ndarray,
                 ridge: float = 1e-2) -> float:
    """Accuracy on the other rows of a ridge regression to one-hot labels, fitted on some.

    Args:
      features: float [V, F]. labels: int [V]. fit_on: bool [V]; the rest is scored.
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
