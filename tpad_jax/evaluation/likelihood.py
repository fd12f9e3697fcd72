"""The likelihood of the next item under any scorer, by two numbers fitted on validation [ours].

Scores of a recommender are logits up to a temperature. Scores of a rule are shares of what it
counted, so they are raised to a power after a floor, without which an item it never saw would have
no probability.
"""

from typing import NamedTuple

import numpy as np
import scipy.optimize

from tpad_jax.data.sessions import Rows, ranked, sample
from tpad_jax.evaluation import metrics

CELLS = 2**25  # scores that a likelihood is computed from: of more rows it draws a sample
FEW = 2**18  # scores that a calibration reads, or those of 64 rows


class Calibration(NamedTuple):
    """How scores become logits.

    Attributes:
      power: factor of the logits.
      floor: added to a rule's shares; None: scores are logits already.
    """

    power: float = 1.0
    floor: float | None = None


def calibrate(scorer: metrics.Scorer, valid: Rows, num_items: int, *, rule: bool, seed: int = 0
              ) -> Calibration:
    """Fit a calibration on validation rows, which the scorer was not fitted on.

    Args:
      scorer: of a recommender or a rule.
      valid: validation rows.
      num_items: V.
      rule: whether the scores are shares instead of logits.
      seed: of the sample of rows.
    """
    rows = sample(ranked(valid), max(64, FEW // num_items), seed)
    if not len(rows.target):
        return Calibration(floor=0.1 / num_items if rule else None)
    scores = np.concatenate([_shares(metrics.dense(part), rule) for _, part in
                             metrics.scored(scorer, rows.read_by(scorer), num_items)])

    def known(x):
        return Calibration(*map(float, np.exp(np.clip(np.atleast_1d(x), -25, 25))))

    def objective(x):
        _, total, own, _ = _sums(scores, rows.target, known(x))
        return (total - own).mean()

    if not rule:  # convex in the power
        return known(scipy.optimize.minimize_scalar(
            objective, bounds=(-7, 7), method='bounded', options={'xatol': 1e-2}).x)
    begin = np.log([1.0, 0.1 / num_items])
    return known(scipy.optimize.minimize(
        objective, begin, method='Nelder-Mead', options={
            'maxfev': 120, 'initial_simplex': np.vstack([begin, begin + np.diag([-1.0, -3.0])])}).x)


def nll(scorer: metrics.Scorer, rows: Rows, num_items: int, calibration: Calibration, *,
        seed: int = 0) -> float | None:
    """Compute the mean negative log-likelihood of targets over the whole catalogue, in nats.

    Args:
      scorer: of a recommender or a rule.
      rows: rows to score. Those with the target 0, which is not ranked, have no likelihood.
      num_items: V.
      calibration: of `calibrate`.
      seed: of the sample of rows.

    Returns:
      The mean; None without a ranked target.
    """
    known = predicted(scorer, rows, num_items, calibration, seed=seed)
    return None if known is None else float(known[0].mean())


def predicted(scorer: metrics.Scorer, rows: Rows, num_items: int, calibration: Calibration, *,
              seed: int = 0) -> list[np.ndarray] | None:
    """Compute what a model predicts of the rows that `nll` reads; its arguments.

    Returns:
      Float [R] each: the negative log-likelihood of the target, the probability of the first item,
      and whether that is the target, with ties its share of them. Or None, if no target is ranked.
    """
    rows = sample(ranked(rows), max(64, CELLS // num_items), seed)
    if not len(rows.target):
        return None
    parts = [_predicted(_shares(metrics.dense(scores), calibration.floor is not None),
                        rows.target[part], calibration)
             for part, scores in metrics.scored(scorer, rows.read_by(scorer), num_items)]
    return [np.concatenate(x) for x in zip(*parts, strict=True)]


def _shares(scores, rule):
    """Scores of the items 1..V; those of a rule as shares."""
    scores = np.asarray(scores, np.float64)[:, 1:]
    if not rule:
        return scores
    scores = np.maximum(scores, 0)
    return scores / np.maximum(scores.sum(axis=1, keepdims=True), 1e-30)


def _sums(scores, target, calibration):
    """Logits [R, V]; of each row log sum exp, the target's and the highest one: [R]."""
    power, floor = calibration
    logits = power * (scores if floor is None else np.log(scores + floor))
    highest = logits.max(axis=1)
    total = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
    return logits, total, logits[np.arange(len(target)), target - 1], highest


def _predicted(scores, target, calibration):
    logits, total, own, highest = _sums(scores, target, calibration)
    right = (own == highest) / (logits == highest[:, None]).sum(axis=1)
    return total - own, np.exp(highest - total), right
