"""Intervals and paired tests for metrics whose rows come in sessions.

The rows of one session are not independent; sessions are assumed to be. So sessions are drawn
(cluster bootstrap, Davison and Hinkley 1997, section 3.8), and sessions change sign (the paired
randomisation test of Smucker, Allan and Carterette, CIKM 2007).

A claim about other catalogues and other seeds needs both as well: sessions and seeds of training
are drawn within worlds, and worlds are drawn (`hierarchical`).
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

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
    sums = np.concatenate([times @ flat for times in _drawn(count, draws, seed)])
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


class World(NamedTuple):
    """One independent repetition of an experiment, such as a catalogue. It gives a ratio of sums.

    Attributes:
      total: float [R, S]. Sums over the rows of S sessions under R seeds of training, as a rule of
        a difference.
      weight: float [S]. The sums are divided by its sum.
    """

    total: np.ndarray
    weight: np.ndarray

    @property
    def by_seed(self) -> np.ndarray:
        """The ratio under every seed, float64 [R]."""
        return self.total.sum(axis=1) / self.weight.sum()


class Components(NamedTuple):
    """Variances of a ratio: between worlds, between seeds of a world, and of one session."""

    world: float
    seed: float
    session: float

    def of_mean(self, worlds: int, seeds: int, sessions: int) -> float:
        """Variance of the mean over so many worlds with so many seeds and sessions each."""
        return (self.world + self.seed / seeds + self.session / sessions) / worlds


def hierarchical(worlds: Sequence[World], *, draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Draw worlds, seeds and sessions with replacement, and average the ratios of the worlds.

    All seeds of a world are tested on the same sessions, which are drawn once for all of them. The
    draws vary a little more than the estimate: by the world's components once more, less a W-th of
    the variance between W worlds (Davison and Hinkley 1997, section 3.8). So intervals are rather
    too wide than too narrow.

    Args:
      worlds: W worlds. Their numbers of seeds and sessions may differ.
      draws: samples.
      seed: of the draw.

    Returns:
      float64 [draws].
    """
    rng, out = np.random.default_rng(seed), np.zeros(draws)
    chosen = rng.integers(len(worlds), size=(draws, len(worlds)))
    for number, (total, weight) in enumerate(worlds):
        samples = np.nonzero(chosen == number)[0]
        seeds, sessions = (_counts(rng, n, len(samples)) for n in np.shape(total))
        ratios = ((seeds / len(total) @ total) * sessions).sum(axis=1) / (sessions @ weight)
        np.add.at(out, samples, ratios / len(worlds))
    return out


def p_value(samples: np.ndarray, null: float = 0.0) -> float:
    """Compute the two-sided p-value of a bootstrap: how rarely samples are beyond `null`.

    Args:
      samples: float [draws].
      null: value of the hypothesis.
    """
    beyond = min((samples <= null).sum(), (samples >= null).sum())
    return min(1.0, 2 * (1 + float(beyond)) / (1 + len(samples)))


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm 1979), in the given order."""
    order, out, worst = np.argsort(values), list(values), 0.0
    for place, i in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - place) * values[i]))
        out[i] = worst
    return out


def components(worlds: Sequence[World]) -> Components:
    """Estimate the components of variance by moments; one that comes out negative is 0.

    Args:
      worlds: two or more, with two or more seeds and sessions each.
    """
    ratios = [world.by_seed for world in worlds]
    between_seeds = float(np.mean([ratio.var(ddof=1) for ratio in ratios]))
    # linearised, as the sums of sessions are divided by a sum over the same sessions
    sessions = [((x.total.mean(axis=0) - x.by_seed.mean() * x.weight) / x.weight.mean()).var(ddof=1)
                for x in worlds]
    within = np.mean([between_seeds / len(x.total) + session / len(x.weight)
                      for x, session in zip(worlds, sessions, strict=True)])
    between = np.var([ratio.mean() for ratio in ratios], ddof=1) - within
    return Components(max(0.0, float(between)), between_seeds, float(np.mean(sessions)))


def power(effect: float, variance: float, worlds: int, level: float = 1 - LEVEL) -> float:
    """Compute how often a two-sided t-test over worlds detects an effect.

    Args:
      effect: the true mean.
      variance: of the mean over all worlds, as of `Components.of_mean`.
      worlds: two or more.
      level: of the test.
    """
    from scipy import stats  # takes a second to import

    beyond = stats.t.isf(level / 2, worlds - 1)
    test = stats.nct(worlds - 1, effect / variance ** 0.5)
    return float(test.sf(beyond) + test.cdf(-beyond))


def _drawn(count: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of `count` sessions is drawn: float64 [at most _BLOCK, count] each."""
    rng = np.random.default_rng(seed)
    for begin in range(0, draws, _BLOCK):
        yield _counts(rng, count, min(_BLOCK, draws - begin)).astype(np.float64)


def _counts(rng, count, draws):
    """How often each of `count` is drawn when `count` are drawn: int [draws, count]."""
    chosen = rng.integers(count, size=(draws, count)) + count * np.arange(draws)[:, None]
    return np.bincount(chosen.ravel(), minlength=draws * count).reshape(draws, count)


def _signs(count: int, flips: int, seed: int) -> Iterator[np.ndarray]:
    """Random signs -1 and 1: float64 [at most _BLOCK, count] each."""
    rng = np.random.default_rng(seed)
    for begin in range(0, flips, _BLOCK):
        bits = rng.integers(256, size=(min(_BLOCK, flips - begin), -(-count // 8)), dtype=np.uint8)
        yield 1.0 - 2.0 * np.unpackbits(bits, axis=1, count=count)
