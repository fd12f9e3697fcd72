"""Intervals and paired tests for metrics whose rows come in sessions.

The rows of one session are not independent; sessions are assumed to be. So sessions are drawn
(cluster bootstrap, Davison and Hinkley 1997, section 3.8), and sessions change sign (the paired
randomisation test of Smucker, Allan and Carterette, CIKM 2007).
"""

from collections.abc import Iterable, Iterator

import numpy as np

DRAWS = 1000  # bootstrap samples
FLIPS = 10_000  # sign patterns; where fewer exist, every one is tried
LEVEL = 0.95
SMALLEST = 2  # sessions: an interval over fewer would have no width
_BLOCK = 250  # samples at a time, to bound memory


def sliced(values: np.ndarray, chosen: Iterable[np.ndarray], session: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray]:
    """Sum values over each session's rows, by slices of rows.

    Args:
      values: float [R, Q].
      chosen: L slices, bool [R] each.
      session: int [R], 0..S - 1.

    Returns:
      Sums float64 [S, L, Q], and their numbers of rows float64 [S, L].
    """
    count = int(session.max()) + 1
    total, weight = [], []
    for rows in chosen:
        owner = session[rows]
        weight.append(np.bincount(owner, minlength=count).astype(np.float64))
        total.append(np.stack([np.bincount(owner, column, count) for column in values[rows].T], 1))
    return np.stack(total, axis=1), np.stack(weight, axis=1)


def bootstrap(total: np.ndarray, weight: np.ndarray, *, draws: int = DRAWS,
              seed: int = 0) -> np.ndarray:
    """Compute ratios of sums over sessions that are drawn with replacement.

    Args:
      total: float [S, L, Q] of `sliced`.
      weight: float [S, L].
      draws: samples.
      seed: of the draw; equal seeds and equal S draw the same sessions.

    Returns:
      float64 [draws, L, Q]; nan where a sample has no row of a slice.
    """
    count, parts, width = total.shape
    flat = np.concatenate([total.reshape(count, -1), weight], axis=1, dtype=np.float64)
    rng = np.random.default_rng(seed)
    sums = np.concatenate([drawn_counts(rng, count, min(_BLOCK, draws - begin)).astype(float) @ flat
                           for begin in range(0, draws, _BLOCK)])
    over, under = sums[:, :-parts].reshape(draws, parts, width), sums[:, -parts:, None]
    return np.divide(over, under, where=under > 0, out=np.full(over.shape, np.nan))


def intervals(total: np.ndarray, weight: np.ndarray, *, draws: int = DRAWS,
              seed: int = 0) -> np.ndarray:
    """Compute the middle 95 % of `bootstrap` (percentile method).

    Args:
      total: float [S, L, Q] of `sliced`.
      weight: float [S, L].
      draws: samples.
      seed: of the draw.

    Returns:
      float64 [L, Q, 2]; nan in slices in which fewer than SMALLEST sessions have rows.
    """
    out = np.full((*total.shape[1:], 2), np.nan)
    known = (weight > 0).sum(axis=0) >= SMALLEST
    samples = bootstrap(total[:, known], weight[:, known], draws=draws, seed=seed)
    edges = np.nanquantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    out[known] = np.moveaxis(edges, 0, -1)
    return out


def sign_flip(difference: np.ndarray, *, flips: int = FLIPS, seed: int = 0) -> np.ndarray:
    """Compute the two-sided p-value of a paired randomisation test.

    If two models are equally good, a session's difference is as likely to have the other sign.
    Sessions without a difference carry no information; without any other session, p is 1. All sign
    patterns are tried where there are at most `flips` of them. Otherwise `flips` drawn patterns and
    the observed one are used, so p > 0.

    Args:
      difference: float [S, M]. Sums of M differences over each session's rows.
      flips: sign patterns.
      seed: of the draw.

    Returns:
      float64 [M].
    """
    different = difference[(difference != 0).any(axis=1)].astype(np.float64)
    observed = np.abs(different.sum(axis=0))
    near = observed - 1e-9 * np.abs(different).sum(axis=0)  # equal but for rounding
    exact = len(different) < 63 and 2 ** len(different) <= flips
    patterns = _signs(len(different), flips, seed)
    if exact:
        number, session = np.arange(2 ** len(different))[:, None], np.arange(len(different))
        patterns = [1.0 - 2.0 * (number >> session & 1)]
    extreme, tried = 0, 0
    for signs in patterns:
        extreme = extreme + (np.abs(signs @ different) >= near).sum(axis=0)
        tried += len(signs)
    return (extreme + (not exact)) / (tried + (not exact))


def drawn_counts(rng, count, draws):
    """Count how often each of `count` is drawn when `count` are drawn: int [draws, count]."""
    chosen = rng.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
    return np.bincount(chosen.ravel(), minlength=draws * count).reshape(draws, count)


def _signs(count: int, flips: int, seed: int) -> Iterator[np.ndarray]:
    """Random signs -1 and 1: float64 [at most _BLOCK, count] each."""
    rng = np.random.default_rng(seed)
    for begin in range(0, flips, _BLOCK):
        bits = rng.integers(256, size=(min(_BLOCK, flips - begin), -(-count // 8)), dtype=np.uint8)
        yield 1.0 - 2.0 * np.unpackbits(bits, axis=1, count=count)
