"""The table of outputs and the registry of encoders: one entry is enough, all else is derived."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tests import tiny_stages
from tests.tiny_stages import DATA, N, V
from tpad_jax.errors import InputError
from tpad_jax.losses import Out, check
from tpad_jax.models import output_table, outputs, sessions, tpad
from tpad_jax.training import step as step_lib
from tpad_jax.types import Batch

PAGE = Path(__file__).parents[2] / 'docs' / 'add_a_loss.md'


def test_the_page_lists_every_output_with_its_shape():
    rows = re.findall(r'^\| (`.*`) \| (.+?) \| (.+) \|$', PAGE.read_text(), re.MULTILINE)
    rows = {name.strip('`'): (form, doc) for name, form, doc in rows}
    for name, entry in outputs.OUTPUTS.items():
        if name[0] != '_':
            form = f'{entry.dtype} [{entry.shape}]' if entry.shape else 'function'
            assert rows.get(name) == (form, entry.doc)


@pytest.fixture
def added():
    """`output`, whose entries are removed after the test."""
    before = dict(outputs.OUTPUTS)
    yield outputs.output
    outputs.OUTPUTS.clear()
    outputs.OUTPUTS.update(before)


@pytest.fixture
def session(added):
    """An output `session`, made of t, and one that reads content."""
    @added('session', 'B, D', needs=('t',))
    def _session(inputs, t):
        """The session at the prefix's last item."""
        return t[inputs.rows, inputs.batch.last]

    @added('length', 'B', needs=('content',))
    def _length(inputs):
        """Number of words."""
        return (inputs.batch.tokens >= 0).sum(axis=1)


def small(out, batch, *, x: Out = Out('session')):
    return (out[x] ** 2).mean(-1)


@pytest.mark.slow
@pytest.mark.usefixtures('session')
def test_one_entry_makes_an_output_that_stages_compute_and_losses_are_checked_on():
    model, params, catalogue = tiny_stages.model()
    batch = Batch.of(next(tiny_stages.draw('recommend')))
    out = outputs.forward(model, tiny_stages.unflatten_dict(params, sep='/'), batch, catalogue,
                          frozenset({'session', 't'}), frozenset())
    assert out.keys() == {'session', 't'}
    np.testing.assert_array_equal(out['session'], out['t'][np.arange(len(batch.items)), batch.last])
    assert not [finding for finding in check.check(small) if finding.ok is False]

    c = tiny_stages.make_config().copy_and_resolve_references()
    c.unlock()
    c.losses.mine = ConfigDict(dict(fn=f'{__name__}:small', weight=1.0, stages='recommend'))
    assert 'session' in step_lib.make_spec(c, 'recommend', model, 0).needs
    c.losses.mine.x = 'length'
    with pytest.raises(InputError, match=r'length, which stage recommend does not compute \(stage '
                                         'recommend reads no content'):
        step_lib.stage_losses(c, 'recommend')


@pytest.mark.parametrize('name', ['r', 'warm', 'h', 'z'])  # made by a tuple, partials, a lambda
def test_a_name_that_another_module_took_is_refused(name):
    with pytest.raises(InputError, match=(f"output '{name}' of {__name__} is there already, in "
                                          r'tpad_jax\.models\.outputs\. Fix')):
        outputs.output(name, 'B, D')(partial(lambda inputs: None))


@pytest.mark.parametrize(('shape', 'dtype', 'returned', 'told'), [
    ('B, D', 'float32', lambda t: jnp.zeros(len(t)),
     r'float32 \[16\]. Expected float32 \[B, D\] as declared, B=16'),
    ('B, N, D', 'float32', lambda t: t[:, 0], r'float32 \[16, 16\].*B=16, N=4'),
    ('B, N, D', 'float32', lambda t: t[:, :2], r'float32 \[16, 2, 16\]'),
    ('B, D, D', 'float32', lambda t: t, r'float32 \[16, 4, 16\]'),
    ('B', 'bool', lambda t: jnp.ones(len(t)), r'float32 \[16\]. Expected bool \[B\]'),
    ('B', 'float32', lambda t: jnp.arange(len(t)), r'int32 \[16\]. Expected float32 \[B\]'),
    ('V+1', 'float32', lambda t: jnp.ones(3), r'float32 \[3\]. Expected float32 \[V\+1\]'),
    ('B, D', 'float32', lambda t: None, 'NoneType. Expected'),
    ('B, D', 'float32', lambda t: t[:, 0].astype(jnp.bfloat16), '')])
def test_a_maker_that_returns_another_shape_than_declared_is_refused(added, shape, dtype, returned,
                                                                     told):
    added('mine', shape, ('t',), dtype=dtype, is_table=shape[0] != 'B')(
        lambda inputs, t: returned(t))
    model, params, catalogue = tiny_stages.model()
    batch = Batch.of(next(tiny_stages.draw('recommend')))
    run = partial(jax.eval_shape, lambda p: outputs.forward(
        model, p, batch, catalogue, frozenset({'mine'}), frozenset()),
        tiny_stages.unflatten_dict(params, sep='/'))
    if not told:
        run()
        return
    with pytest.raises(InputError, match=f"output 'mine' of {__name__} is .*{told}"):
        run()


@pytest.mark.parametrize(('shape', 'options', 'told'), [
    ('B, Q', {}, "shape='B, Q'. Expected some of B, N, V.1, D"),
    ('V+1, D', {}, 'is_table=True for what is the same'),
    ('B, D', dict(is_table=True), 'is_table=True. Expected B'),
    ('', {}, 'Expected B, the rows, first'), ('B', dict(dtype='float64'), "dtype='float64'")])
def test_what_no_output_can_be_is_refused_when_it_is_added(added, shape, options, told):
    with pytest.raises(InputError, match=f"output 'mine': .*{told}"):
        added('mine', shape, **options)


def test_an_unknown_need_is_refused_by_name_in_a_run_and_by_the_check(added):
    """Not when it is added: the output that it needs may come later."""
    added('session', 'B, D', needs=('hh',))(lambda inputs, hh: hh)
    told = r"output 'session': its needs name hh\. Expected outputs, "
    with pytest.raises(InputError, match=told):
        step_lib.stage_losses(tiny_stages.make_config(), 'recommend')
    assert [re.match(told, text) for ok, _, text in check.check(small) if ok is False] != [None]
    added('hh', 'B, D')(lambda inputs: inputs.batch.items)
    step_lib.stage_losses(tiny_stages.make_config(), 'recommend')


def test_outputs_that_need_one_another_are_refused(added):
    added('mine', 'B, D', needs=('h', 'yours'))(lambda inputs, h, yours: yours)
    added('yours', 'B, D', needs=('mine',))(lambda inputs, mine: mine)
    plan = outputs.Plan('full', ('k',), False, frozenset())
    assert 'mine' not in output_table.required(['h'], plan)
    with pytest.raises(InputError, match=r'(mine|yours) needs (mine|yours) needs'):
        output_table.required(['yours'], plan)


@pytest.mark.parametrize('fresh', [frozenset(), frozenset('kr')])
def test_every_output_has_the_shape_that_it_declares(fresh):
    """`forward` refuses others; only what the tiny model lacks is left out."""
    model, params, catalogue = tiny_stages.model()
    catalogue = catalogue | {'popularity': jnp.ones(V + 1)}
    batch = jax.tree.map(jnp.asarray, Batch.of(next(tiny_stages.draw('joint'))))
    lacks = {'teacher', 'clusters', 'prefixes', 'bottleneck'}
    plan = outputs.Plan(model.form, model.recommend, model.reread, fresh)
    names = frozenset(name for name in outputs.names()
                      if not output_table.required([name], plan) & lacks)
    out = jax.eval_shape(lambda p: {
        n: x for n, x in outputs.forward(model, p, batch, catalogue, names, fresh,
                                         jax.random.key(0)).items() if n != 'club'},
        tiny_stages.unflatten_dict(params, sep='/'))
    assert len(out) > 25


def test_only_what_is_needed_is_computed():
    """Without content and without rows r, a stage still reads sessions of stored k."""
    model, params, catalogue = tiny_stages.model()
    batch = Batch.of(next(tiny_stages.draw('recommend')))
    rows = {name: catalogue[name] for name in ('k', 'warm')}
    out = jax.eval_shape(lambda p: outputs.forward(
        model, p, batch, rows, frozenset({'p', 'warm'}), frozenset()),
        tiny_stages.unflatten_dict(params, sep='/'))
    assert out.keys() == {'p', 'warm'}
    with pytest.raises(InputError, match='output r: the catalogue has no rows of it'):
        outputs.forward(model, {}, batch, rows, frozenset({'r'}), frozenset())


def test_a_bottleneck_draws_p_in_training_and_has_its_mean_in_evaluation():
    """By row, so that neither order nor padding changes a draw; the deviation gets a gradient."""
    model, params, catalogue = tiny_stages.model()
    model = replace(model, disentangle=model.disentangle.clone(bottleneck=True))
    width = model.disentangle.features
    heads = jax.jit(model.disentangle.init)(jax.random.key(1), jnp.ones((1, 1, width)))['params']
    params = tiny_stages.unflatten_dict(params, sep='/') | {'disentangle': heads}
    batch = Batch.of(next(tiny_stages.draw('recommend')))
    turned = jax.tree.map(lambda x: x[::-1], batch)
    names = frozenset({'c', 'p', 'p.mean', 'p.log_variance'})

    @jax.jit
    def forward(heads, batch, key):
        return outputs.forward(model, params | {'disentangle': heads}, batch, catalogue, names,
                               frozenset(), key)

    still = forward(heads, batch, None)
    np.testing.assert_array_equal(still['p'], still['p.mean'])
    drawn, other, again = (forward(heads, rows, jax.random.key(seed))
                           for rows, seed in ((batch, 0), (batch, 1), (turned, 0)))
    noise = (drawn['p'] - drawn['p.mean']) / np.exp(drawn['p.log_variance'] / 2)
    assert np.abs([noise.mean(), noise.std() - 1]).max() < 0.1
    assert np.abs(np.corrcoef(noise.ravel(), (other['p'] - drawn['p']).ravel())[0, 1]) > 0.5
    np.testing.assert_allclose(again['p'][::-1], drawn['p'], atol=1e-5)
    np.testing.assert_allclose(drawn['p.log_variance'], -4, atol=1e-6)  # a deviation of e^-2 first
    grads = jax.jit(jax.grad(lambda heads: forward(heads, batch, jax.random.key(0))['p'].sum()))(
        heads)
    np.testing.assert_allclose(grads['spread']['out']['bias'],
                               (noise * np.exp(-2) / 2).sum((0, 1)), rtol=1e-3, atol=1e-4)


def test_what_needs_content_is_derived():
    compressed = outputs.Plan('compressed', ('r',), True, frozenset())
    assert 'content' not in output_table.required(['t', 'h', 'k', 'r'], compressed)
    assert 'content' in output_table.required(['t'], compressed._replace(form='full'))
    assert 'content' in output_table.required(['h'], compressed._replace(fresh=frozenset({'r'})))
    for name in ('describe', 'foretell.tokens', 'r.image', 'text.there'):
        assert 'content' in output_table.required([name], compressed)


class Mean(nn.Module):
    """The smallest session encoder."""

    max_length: int = 20
    rate: float = 0.0
    item_rate: float = 0.0

    @nn.compact
    def __call__(self, z, items, keys=None):
        real = (items > 0)[..., None]
        mean = jnp.where(real, z, 0).sum(1) / jnp.maximum(real.sum(1), 1)
        return nn.Dense(z.shape[-1])(mean)


def test_one_entry_makes_an_encoder_that_is_built_and_trained(monkeypatch):
    monkeypatch.setitem(sessions.ENCODERS, 'mean', lambda model, **shared: Mean(**shared))
    c = tiny_stages.make_config().copy_and_resolve_references()
    c.model.update(encoder='mean', recommend='')
    model = tpad.build(None, c.model, recommend=(), items=V, max_length=N,
                       side_sizes=DATA.side_sizes)
    assert not sessions.reads_graph(model.encoder)
    catalogue = {'warm': jnp.asarray(DATA.warm), 'side': jnp.asarray(DATA.side)}
    params = tpad.recommender_init(jax.random.key(0), model, catalogue)
    params = flatten_dict({'recommender': params}, sep='/')
    spec = step_lib.make_spec(c, 'recommend', model, 0)
    first = step_lib.start(spec, params, c.stage.recommend.train)
    step = jax.jit(partial(step_lib.train_step, spec=spec, axis=None))
    state, logged = step(first, Batch.of(next(tiny_stages.draw('recommend'))), catalogue)
    assert np.isfinite(logged['loss'])
    path = 'recommender/encoder/Dense_0/kernel'
    assert np.abs(state.params[path] - first.params[path]).max() > 1e-4
    c.losses.next_item.h = 'h_each'
    with pytest.raises(InputError, match='encoder=mean does not read all prefixes'):
        step_lib.stage_losses(c, 'recommend')


def test_what_an_encoder_reads_is_derived_from_its_module():
    c = tiny_stages.make_config().model
    read = {}
    for name in sessions.ENCODERS:
        encoder = sessions.build(ConfigDict({**c.to_dict(), 'encoder': name}), N)
        read[name] = sessions.reads_graph(encoder), sessions.reads_prefixes(encoder)
    assert read == {'attention': (False, True), 'sr_gnn': (False, False), 'gce_gnn': (True, False)}
