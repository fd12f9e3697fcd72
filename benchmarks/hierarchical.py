"""Intervals and tests for claims about other catalogues and other seeds.

Rows come in sessions, sessions are tested under seeds of training, and both belong to a world, such
as a catalogue. Sessions and seeds are drawn within worlds, and worlds are drawn (`hierarchical`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tpad_jax.evaluation import statistics


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


def hierarchical(worlds: Sequence[World], *, draws: int = statistics.DRAWS, seed: int = 0
                 ) -> np.ndarray:
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
        seeds, sessions = (statistics.drawn_counts(rng, n, len(samples)) for n in np.shape(total))
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


def power(effect: float, variance: float, worlds: int, level: float = 1 - statistics.LEVEL
          ) -> float:
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
