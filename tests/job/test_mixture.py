"""Scores of several recommenders added: the sum and its ranks. Whole runs: test_ready_made.py."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax import config as base
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.evaluation import metrics
from tpad_jax.evaluation.scorers import scorer
from tpad_jax.job import recommenders
from tpad_jax.models import tpad

V, N = 30, 5


def part(encoder, width, seed, repeats, **model):
    c = base.get_config().model
    c.update(encoder=encoder, width=width, normalise=True, repeats=repeats, near=3, **model)
    spec = tpad.build(None, c, recommend=(), items=V, max_length=N, side_sizes=())
    rng = np.random.default_rng(seed)
    rows = {'warm': jnp.ones(V + 1, bool), 'side': jnp.zeros((V + 1, 0), jnp.int32),
            'near': jnp.asarray(rng.integers(0, V + 1, (V + 1, 3)), jnp.int32),
            'near_weight': jnp.asarray(rng.random((V + 1, 3)), jnp.float32)}
    params = jax.jit(lambda key: tpad.recommender_init(key, spec, rows))(jax.random.key(seed))
    if repeats:
        params['repeat'] = rng.normal(size=N).astype(np.float32)
    return spec, {'recommender': params}, rows


@pytest.mark.slow
def test_scores_and_ranks_are_those_of_the_sum():
    parts = [part('gce_gnn', 4, 0, repeats=True), part('attention', 6, 1, repeats=False)]
    devices = devices_lib.choose('jit', 1)
    rng = np.random.default_rng(5)
    items = rng.integers(1, V + 1, (16, N)) * (np.arange(N) < rng.integers(1, N + 1, (16, 1)))
    items = items.astype(np.int32)
    target = rng.integers(1, V + 1, 16).astype(np.int32)
    specs, params, rows = zip(*parts, strict=True)
    both = scorer(specs, devices)(params, rows)
    each = [scorer(spec, devices)(own, row)(items) for spec, own, row in parts]
    np.testing.assert_allclose(both(items), sum(each), rtol=1e-5, atol=1e-5)
    assert min(np.abs(both(items) - one).max() for one in each) > 0.1
    above, equal = metrics.counts(both(items), target)
    found = both.ranks(items, target, rows=8)
    np.testing.assert_array_equal(found[0], above)
    np.testing.assert_array_equal(found[1], equal)


def test_a_trained_baseline_on_rows_as_wide_as_the_runs_own_takes_their_place():
    """One compilation serves both; what it learns from are its own rows."""
    c = base.get_config()
    spec = tpad.build(None, c.model, recommend=('r',), items=V, max_length=N, side_sizes=())
    rows = {'k': jnp.arange(V * 6.).reshape(V, 2, 3), 'r': jnp.zeros((V, 6)),
            'true': jnp.zeros((V, 5))}
    made = SimpleNamespace(config=c, spec=spec, catalogue=rows, blank={},
                           data=SimpleNamespace(side_sizes=()),
                           stage_spec=lambda stage: SimpleNamespace(needs=frozenset({'h', 'z'})))
    other = recommenders._rival_job(made, 'knowledge_only')
    assert other.spec == spec
    np.testing.assert_array_equal(other.catalogue['r'], rows['k'].reshape(V, 6))
    assert made.catalogue is rows
    assert not rows['r'].any()
    other = recommenders._rival_job(made, 'true_attributes')
    assert (other.spec.recommend, other.catalogue) == (('true',), rows)
    made.stage_spec = lambda stage: SimpleNamespace(needs=frozenset({'h', 'r'}))
    assert recommenders._rival_job(made, 'knowledge_only').spec.recommend == ('k',)
