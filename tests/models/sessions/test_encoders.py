"""The check of session encoders, on those of the package and on faulty ones; GCE-GNN by loops."""

import re
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax.models import tpad
from tpad_jax.models.sessions import ENCODERS, check
from tpad_jax.models.sessions.__main__ import main
from tpad_jax.models.sessions.gce_gnn import NEVER, relations
from tpad_jax.nn.attention import dropout

V, D, N = 9, 8, 5
ITEMS = np.array([[3, 0, 0, 0, 0], [2, 5, 2, 0, 0], [1, 2, 3, 4, 5], [7, 7, 8, 7, 0],
                  [4, 1, 4, 1, 6]], np.int32)
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def model(encoder, **changes):
    return SimpleNamespace(**{**dict(
        features=D, width=D, critics={}, use_id=True, use_side=False, id_dropout=0.0,
        feature_dropout=0.0, encoder=encoder, gnn_steps=1, positions=False, layers=2, heads=2,
        dropout=0.3, item_dropout=0.3, normalise=True, temperature=0.1, repeats=False,
        together=0, lora_alpha=1.0, lora_rank=1,
        form='compressed', block=3, memory=0, lora_by_kind=False, modality_dropout=0.0,
        codes=(), words=False, bottleneck=False, withhold=0.0, word_dropout=0.0,
        session_dropout=0.0, session_layers=0, clusters=0, reread=True, feature_hidden=0,
        event_time=False, event_kind=False, history=False, blend=SimpleNamespace(kind='')),
        **changes})


def catalogue(seed=0):
    rng = np.random.default_rng(seed)
    near = rng.integers(0, V + 1, (V + 1, 3)).astype(np.int32)
    weight = np.where(near > 0, rng.uniform(0.1, 1, near.shape), 0).astype(np.float32)
    return {'warm': jnp.arange(V + 1) > 0, 'side': jnp.zeros((V + 1, 0), jnp.int32),
            'near': jnp.asarray(near), 'near_weight': jnp.asarray(weight)}


def built(encoder, seed=1, **changes):
    """(spec, params with every array random, catalogue)."""
    spec = tpad.build(None, model(encoder, **changes), recommend=(), items=V, max_length=N,
                      side_sizes=())
    shapes = jax.eval_shape(partial(tpad.recommender_init, spec=spec), jax.random.key(0),
                            catalogue=catalogue())
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) * 0.5, jnp.float32),
                          shapes)
    return spec, {'recommender': params}, catalogue()


def encode(parts, items, keys=None, each=False):
    spec, params, rows = parts

    @jit
    def run(params, items):
        return tpad.encode_sessions(spec, params, items, tpad.z_table(spec, params, rows), rows,
                                    keys, each=each)

    return np.asarray(run(params, items))


OPTIONS = dict(gnn_steps=1, positions=False, layers=2, heads=2)


@pytest.mark.parametrize('encoder', [
    'attention', *(pytest.param(name, marks=pytest.mark.slow)
                   for name in ENCODERS if name != 'attention')])
def test_the_check_of_encoders_finds_nothing(encoder):
    found = list(check.check(encoder, **OPTIONS))
    assert [finding for finding in found if not finding.ok] == []
    assert [x.what for x in found] == [
        'parameters', 'shape', 'finite', 'padding', 'rows', 'sessions', 'dropout',
        *['prefixes'] * (encoder == 'attention')]


class Faulty(nn.Module):
    """A mean of the prefix with one fault."""

    fault: str
    max_length: int = 20
    rate: float = 0.0
    item_rate: float = 0.0

    @nn.compact
    def positions(self, z, items, keys=None):
        real = (items > 0)[..., None]
        kind = jnp.float32(1) if self.fault != 'parameters' else jnp.full((), 1.0)
        scale = self.param('scale', lambda key: kind)
        if self.fault == 'rows':
            z -= z.mean(0)
        if self.fault == 'dropout' and keys is not None:
            z *= jax.random.bernoulli(keys[0], 0.5, z.shape)
        if self.fault not in ('dropout', 'no dropout'):
            z = dropout(z, self.rate, keys)
        if self.fault == 'sessions':
            z = jnp.ones_like(z)
        if self.fault != 'padding':
            z = jnp.where(real, z, 0)
        total, count = jnp.cumsum(z, 1), jnp.cumsum(real, 1)
        if self.fault == 'prefixes':
            total = total[:, ::-1]
        mean = total / (count if self.fault == 'finite' else jnp.maximum(count, 1))
        return mean[..., :4] if self.fault == 'shape' else scale * mean

    def __call__(self, z, items, keys=None):
        if self.fault == 'runs':
            raise TypeError('of the encoder')
        each = self.positions(z, items, keys)
        return each[:, 0 if self.fault == 'prefixes' else -1]


def faulty(model, **shared):
    return Faulty(model.fault, **shared)


@pytest.mark.parametrize(('fault', 'ok', 'text'), [
    ('', True, ''), ('parameters', False, 'scale has a weak type'), ('shape', False, 'expected'),
    ('finite', False, 'not finite'), ('padding', False, 'mask by items > 0'),
    ('rows', False, 'other rows'), ('sessions', False, 'the same h'),
    ('dropout', False, 'other rows change the draws'), ('no dropout', None, 'keys change nothing'),
    ('prefixes', False, 'differs from h'), ('runs', False, 'line [0-9]+: TypeError: of the enc')])
def test_the_check_of_encoders_finds_a_fault(fault, ok, text, capsys):
    found = {x.what: x for x in check.check(f'{__name__}:faulty', fault=fault) if not x.ok}
    if not fault:
        assert found == {}
        return
    breach = found[fault.split()[-1]]  # others may follow from it
    assert breach.ok is ok
    assert re.search(text, breach.text)
    if fault == 'shape':  # the command
        assert main(['check', f'{__name__}:faulty', f'--fault={fault}']) == 2
        assert 'NO  shape ' in capsys.readouterr().out
        assert main(['check', f'{__name__}:faulty']) == 2
        assert "it cannot be built (AttributeError: 'types.SimpleN" in capsys.readouterr().out


def test_normalised_scores_are_cosines_over_the_temperature():
    spec, params, rows = built('attention')
    z = tpad.z_table(spec, params, rows)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    h = encode((spec, params, rows), ITEMS)
    heat = np.exp(params['recommender']['log_temperature'])
    np.testing.assert_allclose(np.linalg.norm(h, axis=1), 1 / heat, rtol=1e-5)


def test_attention_answers_in_the_space_of_the_items():
    """h is a weighted mean of the session's item vectors: weights from 0 to 1 that sum to 1."""
    spec, params, rows = built('attention', normalise=False)
    z = tpad.z_table(spec, params, rows)
    h = encode((spec, params, rows), ITEMS)
    for items, out in zip(ITEMS, h, strict=True):
        vectors = np.asarray(z)[np.unique(items[items > 0])]
        system = np.vstack([vectors.T, np.ones(len(vectors))])
        weight = np.linalg.lstsq(system, np.append(out, 1), rcond=None)[0]
        np.testing.assert_allclose(system @ weight, np.append(out, 1), atol=1e-4)
        assert (weight > 0).all()


def test_relations_by_hand():
    same, to, fro, both = 1, 2, 3, 4
    np.testing.assert_array_equal(relations(np.array([[1, 2, 1, 3, 0]]))[0], [
        [same, both, same, to, 0], [both, same, both, 0, 0], [same, both, same, to, 0],
        [fro, 0, fro, same, 0], [0, 0, 0, 0, 0]])


def test_gce_gnn_is_its_equations():
    spec, params, rows = built('gce_gnn', normalise=False)
    p = jax.tree.map(np.asarray, params['recommender']['encoder'])
    table = np.asarray(tpad.z_table(spec, params, rows))
    near, weight = np.asarray(rows['near']), np.asarray(rows['near_weight'])

    def leaky(x):
        return np.where(x > 0, x, 0.2 * x)

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    def linear(name, x):
        return x @ p[name]['kernel'] + p[name].get('bias', 0)

    for row, items in enumerate(ITEMS):
        items = items[items > 0]
        z, n = table[items], len(items)
        tie = np.asarray(relations(items[None]))[0]
        x = np.zeros_like(z)
        for i in range(n):
            e = np.array([leaky((z[i] * z[j]) @ p['relations'][tie[i, j] - 1]) if tie[i, j]
                          else NEVER for j in range(n)])
            x[i] = softmax(e) @ z
            around = np.zeros(D)
            others = [s for s in range(3) if weight[items[i], s] > 0]
            if others:
                e = np.array([linear('q1', leaky(linear('w1', np.append(
                    z.mean(0) * table[near[items[i], s]], weight[items[i], s]))))[0]
                    for s in others])
                around = softmax(e) @ table[near[items[i], others]]
            x[i] += np.maximum(linear('w2', np.append(z[i], around)), 0)
        h = np.zeros(D)
        for i in range(n):
            y = np.tanh(linear('w3', np.append(x[i], p['position'][n - 1 - i])))
            y = linear('w4', y) + linear('w5', x.mean(0))
            h += linear('q2', 1 / (1 + np.exp(-y)))[0] * x[i]
        np.testing.assert_allclose(encode((spec, params, rows), ITEMS)[row], h, atol=1e-4)
