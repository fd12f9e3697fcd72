"""The hierarchical bootstrap against simulated worlds whose components of variance are known."""

import numpy as np
import pytest

from benchmarks import hierarchical as lib

TRUE = lib.Components(world=0.05 ** 2, seed=0.03 ** 2, session=0.8 ** 2)


def simulated(rng, worlds, seeds, sessions, mean=0.0):
    """Worlds of one row a session, the sum of three independent effects; sessions are shared."""
    world, seed, session = (component ** 0.5 for component in TRUE)
    return [lib.World(
        mean + world * rng.standard_normal() + seed * rng.standard_normal((seeds, 1))
        + session * rng.standard_normal(sessions), np.ones(sessions)) for _ in range(worlds)]


def test_components_and_power_of_simulated_worlds():
    rng = np.random.default_rng(0)
    found = np.mean([lib.components(simulated(rng, 30, 4, 500)) for _ in range(40)], axis=0)
    # 1160, 3600 and many degrees of freedom; that between worlds is a difference
    assert (abs(found / TRUE - 1) < [0.25, 0.06, 0.02]).all()
    variance = TRUE.of_mean(12, 4, 500)
    assert variance == pytest.approx((0.0025 + 0.0009 / 4 + 0.64 / 500) / 12)
    detected = 0
    for _ in range(500):  # t-tests over worlds
        means = np.array([world.by_seed.mean() for world in simulated(rng, 12, 4, 500, 0.06)])
        detected += abs(means.mean() / (means.std(ddof=1) / 12 ** 0.5)) > 2.201
    assert lib.power(0.06, variance, 12) == pytest.approx(detected / 500, abs=0.06)


def test_the_hierarchical_bootstrap_spreads_as_known_and_covers():
    rng = np.random.default_rng(1)
    shape = worlds, seeds, sessions = 12, 4, 60
    variances, covered, repeats = [], 0, 150
    for repeat in range(repeats):
        samples = lib.hierarchical(simulated(rng, *shape, 0.1), draws=300, seed=repeat)
        low, high = np.quantile(samples, [0.025, 0.975])
        variances.append(samples.var())
        covered += low <= 0.1 <= high
    seed, session = TRUE.seed / seeds, TRUE.session / sessions
    within = (1 - 1 / seeds) * seed + (1 - 1 / sessions) * session
    expected = ((1 - 1 / worlds) * (TRUE.world + seed + session) + within) / worlds
    assert np.mean(variances) == pytest.approx(expected, rel=0.08)
    assert expected > TRUE.of_mean(*shape)
    assert covered / repeats > 0.92


def test_ratios_are_of_sums_and_p_values_are_corrected():
    world = lib.World(np.array([[1., 3.], [1., 5.]]), np.array([2., 8.]))
    assert world.by_seed.tolist() == [0.4, 0.6]
    # two sessions: drawn (1, 1), (1, 2) or (2, 2)
    samples = lib.hierarchical([world], draws=500)
    assert {round(x, 6) for x in samples} <= {
        round((a * x[0] + (2 - a) * x[1]) / (a * 2 + (2 - a) * 8), 6)
        for a in range(3) for x in ([1, 3], [1, 4], [1, 5])}
    assert lib.p_value(np.arange(1, 200)) == pytest.approx(2 / 200)
    assert lib.p_value(np.arange(1, 200), null=100) == 1
    assert lib.holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
