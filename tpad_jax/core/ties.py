"""The gain of a rank if several items have the same score."""

import numpy as np


def mean_gain(gains: np.ndarray, above: np.ndarray, equal: np.ndarray, k) -> np.ndarray:
    """Average a gain over all orders of the items that have the target's score.

    Args:
      gains: float64 [K]. Gain of the target at place 1, 2, .. K.
      above: int [...]. Items with a higher score.
      equal: int [...]. Items with the same score, the target among them.
      k: int or int [...], at most K. Places below the k-th earn nothing.

    Returns:
      float64 [...], the mean gain over the places above + 1 .. above + equal.
    """
    until = np.append(0, np.cumsum(gains))  # gains of the first 0, 1, .. places together
    return (until[np.minimum(above + equal, k)] - until[np.minimum(above, k)]) / equal
