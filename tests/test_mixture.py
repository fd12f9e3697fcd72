"""Two recommenders whose scores are added: the sum, its ranks, how the second one is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from configs import sessions as configs
from tests.test_ready_made import config, file  # noqa: F401 (a fixture)
from tpad_jax import job, metrics, mixture, parallel
from tpad_jax.errors import InputError, Stopped
from tpad_jax.models import tpad
from tpad_jax.recommend import scorer

V, N = 30, 5


def part(encoder, width, seed, repeats):
    c = base.get_config().model
    c.update(encoder=encoder, width=width, normalise=True, repeats=repeats, near=3)
    spec = tpad.build(None, c, recommend=(), items=V, max_length=N, side_sizes=())
    rng = np.random.default_rng(seed)
    rows = {'warm': jnp.ones(V + 1, bool), 'side': jnp.zeros((V + 1, 0), jnp.int32),
            'near': jnp.asarray(rng.integers(0, V + 1, (V + 1, 3)), jnp.int32),
            'near_weight': jnp.asarray(rng.random((V + 1, 3)), jnp.float32)}
    params = jax.jit(lambda key: tpad.recommender_init(key, spec, rows))(jax.random.key(seed))
    if repeats:
        params['repeat'] = rng.normal(size=N).astype(np.float32)
    return spec, {'recommender': params}, rows


@pytest.mark.parametrize('kinds', [('gce_gnn', 'attention', 'sr_gnn')])
def test_scores_and_ranks_are_those_of_the_sum(kinds):
    parts = [part(kind, 4 + 2 * i, i, repeats=i % 2 == 0) for i, kind in enumerate(kinds)]
    devices = parallel.choose('jit', 1)
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


@pytest.mark.slow
def test_a_mixture_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path, file):  # noqa: F811
    """Both are refitted, each for its own steps, and the partner sees its own config alone."""
    c = config(file, 'mixture')
    whole = job.run(c, tmp_path / 'whole')
    lines = (tmp_path / 'whole/log.jsonl').read_text().splitlines()
    last = {}
    for line in map(json.loads, lines):
        last[line['stage']] = line['step']
    chosen = {name: whole['models'][name]['valid']['step'] for name in ('attention', 'sr_gnn')}
    assert last == {'recommend': 12, 'partner': 8, 'refit': chosen['attention'],
                    'partner_refit': chosen['sr_gnn']}
    for most in (15, 12, 14, 10):  # a step, or a pause between parts, is asked once
        asked = iter(range(most))
        with pytest.raises(Stopped):
            job.run(c, tmp_path / 'cut', lambda asked=asked: next(asked, None) is None)
    assert (tmp_path / 'cut/stages/partner_refit').is_dir()
    cut = job.run(c, tmp_path / 'cut')
    assert cut['models'] == whole['models']


@pytest.mark.parametrize(('changes', 'told'), [
    (dict(model=dict(depth=3)), 'config.partner does not fit the config'),
    (dict(model=dict(encoder='gru')), 'choose from attention, sr_gnn, gce_gnn'),
    (dict(stage=dict(recommend=dict(batch_size=0))), 'must be a multiple of')])
def test_a_partner_that_cannot_be_is_refused(tmp_path, file, changes, told):  # noqa: F811
    c = config(file, 'attention')
    c.partner = changes
    with pytest.raises(InputError, match=told):
        job.run(c, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_partner_keeps_what_it_does_not_change():
    c = configs.get_config('grocery')
    other = mixture.partnered(c)
    assert other.model.encoder == 'sr_gnn'
    assert not other.partner
    assert (other.seed, other.data.to_dict()) == (c.seed, c.data.to_dict())
    assert c.model.encoder == 'attention'
    c.rivals, c.refit, c.data.npz = dict(id_only=dict(recommend='')), False, __file__
    with pytest.raises(InputError, match=r'config\.partner and config\.rivals'):
        job.run(c, 'nowhere')
