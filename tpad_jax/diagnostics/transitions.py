"""Compares the stored rows k and r of a run: whether r differs, and what it knows of what follows.

A ridge regression predicts from an item's row the mean features of what follows the item. On the
planted catalogue these are the attributes' exact expectations, elsewhere the mean k of the next
items in training sessions [ours].
"""

import numpy as np

from tpad_jax.data import item_graphs
from tpad_jax.diagnostics import clouds
from tpad_jax.evaluation import statistics

FITTED, SCORED = 4000, 2000  # items at most
HELD_OUT = 0.2  # share of the items that are scored, where no truth scores cold ones
SMALLEST = 10  # items to fit on, and to score
PENALTIES = np.logspace(-5, 2, 15)  # of standardised features, per item


def measured(job) -> dict:
    """Measure the rows of a finished run.

    Args:
      job: job.Job after its last stage.

    Returns:
      {'transition_probe': {'k' | 'r': see `score`}, 'cka_k_r': linear CKA over the items}, each
      only where the rows exist and enough items are followed by others.
    """
    rows = {name: np.asarray(job.catalogue[name]).reshape(job.data.num_items + 1, -1)[1:]
            for name in ('k', 'r') if name in job.catalogue}
    if not rows or not job.config.diagnostics:
        return {}
    follow, weight = _following(job, rows['k'])
    rng = np.random.default_rng(job.config.seed)
    held_out = (~job.data.warm[1:] if job.planted is not None
                else rng.random(len(weight)) < HELD_OUT)
    fit_on, score_on = (rng.permutation(np.flatnonzero((weight > 0) & part))[:most]
                        for part, most in ((~held_out, FITTED), (held_out, SCORED)))
    out = {}
    if min(len(fit_on), len(score_on)) >= SMALLEST:
        known, target = follow(fit_on), follow(score_on)
        out['transition_probe'] = {name: score(
            target, ridge(x[fit_on], known, weight[fit_on], x[score_on]), weight[score_on],
            job.config.seed) for name, x in rows.items()}
    if len(rows) == 2:
        some = np.sort(rng.permutation(len(weight))[:FITTED])
        out['cka_k_r'] = clouds.linear_cka(rows['k'][some], rows['r'][some])
    return out


def _following(job, k):
    """(places of items 0..V-1) -> mean features of what follows them, and how often it did, [V]."""
    if job.planted is not None:
        true = np.asarray(job.catalogue['true'], np.float64)
        return lambda at: job.probabilities(1 + at[:, None]) @ true, np.ones(len(k))
    counts = item_graphs.followers(job.data.train, len(k), 1)[1:, 1:].astype(np.float32)
    weight = counts.sum(axis=1)
    return lambda at: counts[at] @ k / weight[at, None], weight


def ridge(x: np.ndarray, y: np.ndarray, weight: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Predict by a weighted ridge regression, whose penalty the left-out errors choose.

    Args:
      x: float [n, D]. Features, which are standardised.
      y: float [n, E].
      weight: float [n].
      new: float [m, D].

    Returns:
      float64 [m, E].
    """
    root = np.sqrt(weight / weight.mean())[:, None]
    centre, offset = (np.average(part, 0, weight) for part in (x, y))
    scale = np.sqrt(np.average((x - centre) ** 2, 0, weight)) + 1e-9
    a, b = root * (x - centre) / scale, root * (y - offset)
    values, vectors = np.linalg.eigh(a.T @ a)
    rotated = a @ vectors
    moment = rotated.T @ b

    def left_out(penalty):  # errors of every row by the fit to the others, in closed form
        shrink = 1 / (np.maximum(values, 0) + penalty)
        errors = b - rotated @ (shrink[:, None] * moment)
        return ((errors / (1 - rotated ** 2 @ shrink)[:, None]) ** 2).sum()

    penalty = min(len(a) * PENALTIES, key=left_out)
    weights = vectors @ (moment / (np.maximum(values, 0) + penalty)[:, None])
    return offset + (new - centre) / scale @ weights


def score(target: np.ndarray, guess: np.ndarray, weight: np.ndarray, seed: int = 0) -> dict:
    """Compute the share of the targets' variance that guesses explain.

    Args:
      target: float [m, E].
      guess: float [m, E].
      weight: float [m].
      seed: of the bootstrap over the m items.

    Returns:
      {'r2', 'interval': its middle 95 %, 'rows': m}. R^2 is summed over the E columns; guesses
      worse than the mean of the targets have a negative one.
    """
    columns = np.column_stack([((target - guess) ** 2).sum(1), (target ** 2).sum(1), target])
    total = (weight[:, None] * columns)[:, None]

    def r2(mean):  # of the columns [., 2 + E]
        return 1 - mean[:, 0] / (mean[:, 1] - (mean[:, 2:] ** 2).sum(1))

    drawn = r2(statistics.bootstrap(total, weight[:, None], seed=seed)[:, 0])
    edges = np.quantile(drawn, [(1 - statistics.LEVEL) / 2, (1 + statistics.LEVEL) / 2])
    return {'r2': float(r2(np.average(columns, 0, weight)[None])[0]), 'interval': edges.tolist(),
            'rows': len(target)}


def line(found: dict) -> str:
    """Put what `measured` found into words; '' where it is empty."""
    probes = found.get('transition_probe', {})
    parts = [f'{name} {x["r2"]:.3f} [{x["interval"][0]:.3f}, {x["interval"][1]:.3f}]'
             for name, x in probes.items()]
    out = [f'what follows an item, R^2 on {probes["k"]["rows"]} held-out items: '
           + '  '.join(parts)] if probes else []
    if 'cka_k_r' in found:
        out.append(f'CKA(k, r) {found["cka_k_r"]:.3f}')
    return '; '.join(out)
