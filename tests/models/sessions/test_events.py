"""Reading events next to an encoder: what is unknown, and one reading of training and scoring."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax import config
from tpad_jax.data import events as columns
from tpad_jax.distributed import devices
from tpad_jax.evaluation.scorers import scorer
from tpad_jax.models import outputs, tpad
from tpad_jax.types import Batch

V, N = 12, 4
ITEMS = np.array([[3, 5, 2, 0], [1, 0, 0, 0], [7, 7, 9, 4]], np.int32)


def built(encoder, **reads):
    """A recommender whose reading of events is not zero, and its catalogue."""
    model = config.model()
    model.update(width=8, encoder=encoder, recommend='', **reads)
    spec = tpad.build(None, model, recommend=(), items=V, max_length=N, side_sizes=())
    catalogue = {'warm': jnp.arange(V + 1) > 0, 'side': jnp.zeros((V + 1, 0), jnp.int32),
                 'popularity': jnp.ones(V + 1)}
    params = tpad.recommender_init(jax.random.key(0), spec, catalogue)
    if spec.events:
        params['events']['outer']['kernel'] = jax.random.normal(jax.random.key(1), (16, 8))
    return spec, {'recommender': params}, catalogue


def context(spec, rng):
    """Known codes of every column."""
    where, out = columns.columns(spec.events.reads, N), []
    for name, part in where.items():
        most = {'gap': columns.GAPS, 'kind': 3, 'date': columns.NOW // 2, 'past': V + 1}[name]
        out.append(rng.integers(1, most, (len(ITEMS), part.stop - part.start)))
    return np.concatenate(out, axis=1).astype(np.int32)


@pytest.mark.parametrize('encoder', ['sr_gnn', 'attention'])
def test_each_column_counts_and_none_is_required(encoder):
    off, params, catalogue = built(encoder)
    assert off.events is None
    assert 'events' not in params['recommender']
    reads = dict(event_time=True, event_kind=True, history=True)
    spec, params, catalogue = built(encoder, **reads)
    score = scorer(spec, devices.choose('jit', 1, 1))(params, catalogue)
    assert score.reads == 'context'
    known = context(spec, np.random.default_rng(0))
    whole = score(np.column_stack([ITEMS, known]))
    where = columns.columns(spec.events.reads, N)
    # rows without context are those of which nothing is known, now
    blank = np.zeros_like(known)
    blank[:, where['date']] = columns.NOW
    np.testing.assert_allclose(score(ITEMS), score(np.column_stack([ITEMS, blank])), atol=1e-5)
    for part in where.values():
        less = known.copy()
        less[:, part] = blank[:, part]
        assert (abs(score(np.column_stack([ITEMS, less])) - whole).max(axis=1) > 1e-3).all()
    # ranks and training's h read the same
    above, _ = score.ranks(np.column_stack([ITEMS, known]), ITEMS[:, 0])
    own = whole[np.arange(3), ITEMS[:, 0], None]
    np.testing.assert_array_equal(above, (whole[:, 1:] > own).sum(axis=1))
    batch = Batch(ITEMS, np.zeros_like(ITEMS), ITEMS[:, 0], np.ones(3, bool), np.arange(3), known)
    names = {'h', 'z', 'h_each'} if encoder == 'attention' else {'h', 'z'}
    out = outputs.forward(spec, params, batch, catalogue, frozenset(names), frozenset())
    np.testing.assert_allclose((out['h'] @ out['z'].T)[:, 1:], whole[:, 1:], atol=1e-4)
    if encoder == 'attention':
        np.testing.assert_allclose(out['h_each'][np.arange(3), batch.last], out['h'], atol=1e-5)


def test_in_training_some_rows_are_read_without_context():
    spec, params, catalogue = built('sr_gnn', event_kind=True)
    items = np.tile(ITEMS[:1], (200, 1))
    wide = np.column_stack([items, np.full((200, N), 2)])
    z = tpad.z_table(spec, params, catalogue)
    still = replace(spec, encoder=spec.encoder.clone(rate=0.0, item_rate=0.0))
    h = tpad.encode_sessions(still, params, wide, z, catalogue,
                             jax.random.split(jax.random.key(3), 200))
    unknown = tpad.encode_sessions(spec, params, items[:1], z, catalogue)
    share = float((abs(h - unknown).max(axis=1) < 1e-4).mean())
    assert 0.03 < share < 0.2
