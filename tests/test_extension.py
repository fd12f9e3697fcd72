"""Losses from outside the tree: their entries, own parameters, schedules, refusals and check."""

import contextlib
import re
from functools import lru_cache, partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import unflatten_dict
from ml_collections import ConfigDict

from configs import amazon
from tests import tiny_stages
from tests.job import test_job
from tpad_jax import config, losses
from tpad_jax.diagnostics import snapshots
from tpad_jax.errors import InputError, Stopped
from tpad_jax.job import job, memory_plan, validate
from tpad_jax.losses import LossSpec, Out, __main__ as command, check
from tpad_jax.models import outputs, sessions
from tpad_jax.training import loop as loop_lib, step as step_lib
from tpad_jax.training.stages import ENTRIES, Entry
from tpad_jax.types import Batch, Loss

HERE = __name__
small = test_job.config
B, N, D = 8, 2, 4


class Head(nn.Module):
    width: int = 3

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width)(x)


class Counting(nn.Module):
    @nn.compact
    def __call__(self, x):
        return x + self.variable('seen', 'count', jnp.zeros, ()).value


def headed(out, batch, *, head=None, x: Out = Out('r')):
    return Loss((head(out[x]) ** 2).mean(-1), batch.mask.astype(jnp.float32))


def silent(out, batch, *, head=None, x: Out = Out('r')):
    return (out[x] ** 2).mean(-1)[:, 0]


def pull(out, batch, *, x: Out = Out('r')):
    return (out[x] ** 2).mean(-1)[:, 0]


def whole(out, batch, *, x: Out = Out('r')):
    return (out[x] ** 2).mean(-1)


def unmasked(out, batch, *, x: Out = Out('r')):
    return (out[x] ** 2).mean((-1, -2))


def contrast(out, batch, *, x: Out = Out('r'), y: Out = Out('t'),
             critic: Out = Out('critic.distil')):
    """Against this replica's positions only, repeats of an item among them."""
    a, b = (out[n].reshape(-1, out[n].shape[-1]) for n in (x, y))
    scores = jnp.where(batch.mask.reshape(-1), out[critic](a, b), -1e9)
    value = jax.nn.logsumexp(scores, axis=1) - jnp.diagonal(scores)
    return Loss(value.reshape(batch.items.shape), batch.mask.astype(jnp.float32))


def noisy(out, batch, *, key=None, x: Out = Out('r')):
    return (out[x] ** 2).mean(-1)[:, 0] * jax.random.uniform(key, batch.valid.shape)


def noisy_by_row(out, batch, *, key=None, x: Out = Out('r')):
    drawn = jax.vmap(lambda row: jax.random.uniform(jax.random.fold_in(key, row)))(batch.row)
    return (out[x] ** 2).mean(-1)[:, 0] * drawn


def counted(out, batch, *, state=None, x: Out = Out('r')):
    value = (out[x] ** 2).mean(-1)[:, 0]
    return Loss(value, jnp.ones_like(value), state=state + 1)


counted.initial_state = lambda: jnp.int32(0)


def root(out, batch, *, x: Out = Out('r')):
    return jnp.sqrt(out[x][:, 0, 0])


def negative(out, batch, *, x: Out = Out('r')):
    value = (out[x] ** 2).mean(-1)[:, 0]
    return Loss(value, jnp.where(batch.row % 4 == 0, -0.5, 1.0))


def settled(out, batch, *, x: Out = Out('t'), mode='t', widths=(), options=None, end=None):
    assert (mode, widths, options['a']['b'], end) == ('t', (0.5, 1.0), (1,), None)
    return (out[x] ** 2).mean(-1)[:, 0] * widths[1]


def old(out, batch, *, axis=None, x='r', mode='cosine'):
    assert mode == 'cosine'
    return (out[x] ** 2).mean(-1)[:, 0]


def unnamed(out, batch, *, x: Out = Out('r')):
    return jnp.where(out['warm'][batch.target], out[x].mean((1, 2)), 0)


def hidden(out, batch):
    return out['r'].mean((1, 2))


def swapped(batch, out):
    return out


def wanting(out, batch, *, x: Out, scale):
    return out[x] * scale


def headless(out, batch, *, head):
    return head(out)


def entry(fn, **keywords):
    return ConfigDict(dict(fn=f'{HERE}:{fn}', weight=1.0, stages='recommend', **keywords))


def chosen(**entries):
    c = config.get_config()
    c.losses.update(entries)
    return step_lib.stage_losses(c, 'recommend')


# --- what a config may say of a loss --------------------------------------------------------------


@pytest.mark.parametrize(('entry', 'told'), [
    (entry('pul'), f"fn='{HERE}:pul': it cannot be found .*has no attribute 'pul'"),
    (entry('B'), f"fn='{HERE}:B': it is not a function but a int"),
    (entry('pull', y='t'), "called as a loss .*got an unexpected keyword argument 'y'"),
    (entry('pull', x=3), r'mine.x=3: x names an output. Expected a string'),
    (entry('pull', x='q'), 'reads q, which no stage computes. Expected c, '),
    (entry('swapped'), r'swapped\(batch, out\) does not begin with \(out, batch\)'),
    (entry('wanting', x='r'), 'cannot be called as a loss .*scale'),
    (entry('headless'), "missing a required argument: 'head'"),
    (entry('pull', module=f'{HERE}:Head'), "got an unexpected keyword argument 'head'"),
    (entry('headed', module=f'{HERE}:Hea'), f"module='{HERE}:Hea': it cannot be found"),
    (entry('headed', module=f'{HERE}:headed'), 'it is not a flax.linen.Module but headed'),
    (entry('headed', module=f'{HERE}:Head', fields=dict(wide=1)), "fields={'wide': 1}"),
    (entry('pull', schedule=((5, 1.0), (5, 0.0))), 'pairs with rising steps'),
    (entry('pull', schedule=(0, 1.0)), 'pairs with rising steps'),
])
def test_a_wrong_entry_is_one_sentence(entry, told):
    with pytest.raises(InputError, match=told):
        chosen(mine=entry)


def test_what_a_stage_comes_too_early_for_is_refused_before_it():
    c = config.get_config()
    c.losses.mine = ConfigDict(dict(fn=f'{HERE}:pull', weight=1.0, stages='transfer', x='h'))
    with pytest.raises(InputError, match=r'it reads h, which stage transfer does not compute \(the '
                                         'recommender reads r, which a later stage makes'):
        step_lib.stage_losses(c, 'transfer')
    c.model.recommend = 'k'  # that is there
    assert 'mine' in [spec.name for spec in step_lib.stage_losses(c, 'transfer')]
    c.losses.mine.stages = 'knowledge'
    with pytest.raises(InputError, match='the recommender reads k, which a later stage makes'):
        step_lib.stage_losses(c, 'knowledge')


@pytest.mark.parametrize(('x', 'form', 'refused'), [
    ('foretell', 'compressed', True), ('t', 'full', True), ('t', 'compressed', False)])
def test_the_recommend_stage_reads_no_content(x, form, refused):
    c = config.get_config()
    c.model.form = form
    c.losses.mine = entry('pull', x=x)
    told = f'it reads {x}, which stage recommend does not compute .stage recommend reads no content'
    with pytest.raises(InputError, match=told) if refused else contextlib.nullcontext():
        step_lib.stage_losses(c, 'recommend')


def test_outputs_of_a_file_of_losses_are_added_before_a_name_is_checked(tmp_path, monkeypatch):
    """Also for the old form, and for a loss of this package that comes before the file."""
    (tmp_path / 'added_outputs.py').write_text(
        "from tpad_jax.losses import Out\nfrom tpad_jax.models.outputs import output\n"
        "output('added', 'B, N, D', needs=('t',))(lambda at, t: t)\n"
        "def mine(out, batch, *, x: Out = Out('added')):\n    return out[x].mean((1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    c = config.get_config()
    c.losses.gen_transfer.x = 'added'
    c.losses.mine = ConfigDict(dict(fn='added_outputs:mine', weight=1.0, stages='transfer'))
    c.losses.old = ConfigDict(dict(fn=f'{HERE}:old', weight=1.0, stages='joint', x='added'))
    try:
        # the file is read for a stage that has no loss of it
        assert 'added' in reads(c, 'joint')['gen_transfer']
        assert reads(c, 'joint')['old'] == {'added'}
        assert reads(c, 'transfer')['mine'] == {'added'}
    finally:
        outputs.OUTPUTS.pop('added', None)


def reads(c, stage):
    return {spec.name: spec.needs for spec in step_lib.stage_losses(c, stage)}


@pytest.mark.parametrize(('stage', 'x', 'row'), [('knowledge', 'k', 'k'), ('transfer', 'r', 'r')])
def test_a_row_that_no_earlier_stage_makes_is_refused_or_fresh(stage, x, row):
    c = config.get_config()
    c.losses.mine = ConfigDict(dict(fn=f'{HERE}:pull', weight=1.0, stages=stage, x=x))
    assert 'mine' in reads(c, stage)
    assert step_lib.stored_rows(c, stage) == (('k',) if stage == 'transfer' else ())
    c.stage[stage].fresh = ''
    with pytest.raises(InputError, match=(
            f'it reads .*which stage {stage} does not compute .no earlier stage makes the rows '
            f"{row}, and config.stage.{stage}.fresh='' does not name {row}")):
        reads(c, stage)


def test_a_row_of_a_stage_that_does_not_run_is_refused():
    c = config.get_config()
    c.model.recommend, c.rivals = '', {}
    validate.check_inputs(c, ('recommend',), set())
    c.losses.mine = entry('pull', x='k')
    with pytest.raises(InputError, match="stage recommend reads the rows 'k', which stage know"):
        validate.check_inputs(c, ('recommend',), set())


@pytest.mark.parametrize(('makes', 'stages', 'reader'), [
    ((), 'knowledge,refine,recommend', 'recommend'), ((), 'knowledge,refine,transfer', 'transfer'),
    (('k',), 'knowledge,refine,recommend', ''), ((), 'knowledge,refine', '')])
def test_a_stage_whose_rows_no_later_stage_reads_is_remarked(makes, stages, reader, monkeypatch):
    monkeypatch.setitem(ENTRIES, 'refine', Entry(batches='items'))
    config.STAGES.insert(config.STAGES.index('transfer'), 'refine')
    config.MAKES.update({'refine': makes} if makes else {})
    c = config.get_config()
    c.model.recommend = 'k'
    c.stage.refine = config.stage(train='^lora/knowledge/', fresh='k')
    c.losses.gen_knowledge.stages = 'knowledge,refine'
    c.stages = stages
    try:
        found = validate.remarks(c, validate.check(c))
        plan = memory_plan.lines(c, 'runs/none', 'v5e-1', 10) if reader == 'recommend' else found
    finally:
        config.STAGES.remove('refine')
        config.MAKES.pop('refine', None)
    assert [line[:len('stage refine computes')] for line in found] == [
        'stage refine computes'] * bool(reader)
    assert all(f"stage {reader} reads the rows from before. To write it: config.MAKES['refine'] = "
               "('k',)" in line for line in found)
    assert not found or plan[-1].endswith(found[0])


def test_no_built_in_stage_is_remarked():
    for make in (config.get_config, amazon.get_config):
        c = make()
        assert validate.remarks(c, validate.check(c)) == []


@pytest.mark.parametrize('key', ['stages', 'losses.align.stages'])
def test_a_stage_that_is_not_registered_is_explained(key):
    c = config.get_config()
    c.update_from_flattened_dict({key: 'warmup'})
    with pytest.raises(InputError, match=f'{key}=.warmup.*; another stage is registered first'):
        validate.check(c)


@pytest.mark.parametrize(('train', 'stages', 'refused'), [
    ('^recommender', 'recommend,polish', True), ('', 'recommend,polish', True),
    ('^recommender/encoder/', 'polish', True), ('^lora/', 'recommend,polish', False),
    ('^recommender', 'recommend,polish,joint', False)])
def test_a_stage_whose_recommender_no_evaluation_reads_is_refused(train, stages, refused):
    config.STAGES.insert(config.STAGES.index('joint'), 'polish')
    ENTRIES['polish'] = Entry(recommends=True)
    c = config.get_config()
    c.stages, c.stage.polish = stages, config.stage(train=train)
    c.losses.next_item.stages = 'recommend,polish,joint'
    refusal = pytest.raises(InputError, match='evaluated after the stages recommend and joint only')
    try:
        with refusal if refused else contextlib.nullcontext():
            validate.check(c)
    finally:
        config.STAGES.remove('polish')
        del ENTRIES['polish']


def test_an_encoder_that_is_not_registered_is_named():
    with pytest.raises(InputError, match=r"config.model.encoder='last': it is not registered"):
        sessions.build(ConfigDict(dict(encoder='last')), 3)


def test_a_module_that_does_not_import_says_why(tmp_path, monkeypatch):
    (tmp_path / 'broken_losses.py').write_text('def f(:\n')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match=r'cannot be found .SyntaxError.*line 1'):
        losses.resolve('mine', 'broken_losses:f')


@pytest.mark.parametrize(('result', 'told'), [
    (jnp.ones((B, N)), r'float32 \[8, 2\]'), (jnp.float32(1), r'float32 \[\]'), (None, 'NoneType'),
    (jnp.ones(B, jnp.int32), r'int32 \[8\]'),
    (Loss(jnp.ones((B, N)), jnp.ones(B)), r'Loss.value float32 \[8, 2\], weight float32 \[8\]'),
    (Loss(jnp.ones((N, B)), jnp.ones((N, B))), r'value float32 \[2, 8\]'),
    (Loss(jnp.ones(B), jnp.ones(B), metrics={'m': jnp.ones(3)}), r"metric 'm' of .* float32 \[3\]"),
])
def test_a_wrong_shape_says_what_came_and_what_the_contract_is(result, told):
    def fn(out, batch):
        return result

    with pytest.raises(InputError, match=told):
        losses.combine((LossSpec('mine', fn),), {}, batch_of(), {})


def test_an_output_that_no_keyword_names_is_explained():
    with pytest.raises(InputError, match=r"reads out\['r'\], which no keyword names"):
        losses.combine((LossSpec('mine', hidden),), {}, batch_of(), {})


def batch_of(row=None):
    return Batch(items=jnp.ones((B, N), jnp.int32), next=None, target=None,
                 valid=jnp.ones(B, bool), row=jnp.arange(B) if row is None else row)


def test_a_schedule_is_numpys_interpolation_logged_and_under_jit():
    points = ((2, 0.0), (6, 1.0), (8, 0.5))
    spec = LossSpec('mine', pull, 3.0, schedule=points)
    out = {'r': jnp.full((B, N, D), 2.0)}
    run = jax.jit(lambda step: losses.combine((spec,), out, batch_of(), {}, step=step)[::2])
    for step in (0, 2, 3, 6, 7, 50):
        total, logged = run(jnp.int32(step))
        expected = 3 * np.interp(step, *np.transpose(points))
        assert float(logged['weight/mine']) == pytest.approx(expected)
        assert float(total) == pytest.approx(4 * expected)
        assert float(logged['mine']) == pytest.approx(4)
    assert LossSpec('mine', pull, 3.0).weight_at(7) == 3.0


def test_an_output_is_marked_by_its_type_and_any_other_string_is_a_setting():
    assert LossSpec('mine', settled, 1.0, {'mode': 'r'}).reads == {'x': 't'}
    assert LossSpec('mine', settled, 1.0, {'x': 'h'}).reads == {'x': 'h'}


def test_the_old_form_still_runs_and_names_outputs_by_their_names():
    assert LossSpec('mine', old).reads == {'x': 'r'}
    assert LossSpec('mine', old, 1.0, {'x': 'q'}).needs == {'q'}  # refused as no stage computes it
    total, _, _ = losses.combine((LossSpec('mine', old),), {'r': jnp.full((B, N, D), 2.0)},
                                 batch_of(), {})
    assert float(total) == pytest.approx(4)
    form, = (finding for finding in check.check(old) if finding.what == 'form')
    assert "x: Out = Out('r')" in form.text


def test_settings_of_any_type_are_hashable_and_measured_on_held_out_sessions():
    """The diagnostics compile a function per set of losses, which they look up by its hash."""
    model, params, _ = tiny_stages.model()
    c = tiny_stages.make_config().copy_and_resolve_references()
    c.unlock()
    for name in c.losses:
        c.losses[name].weight = 0.0
    settings = dict(mode='t', widths=[0.5, 1.0], options=dict(a=dict(b=[1])), end=None)
    c.losses.mine = ConfigDict(dict(fn=f'{HERE}:settled', weight=1.0, stages='transfer',
                                    **settings))
    spec = step_lib.make_spec(c, 'transfer', model, 0)
    assert spec.losses[0] == LossSpec('mine', settled, 1.0, settings)
    assert hash(spec) == hash(step_lib.make_spec(c, 'transfer', model, 0))
    items = np.ones((3, tiny_stages.N), np.int32)
    rows = Batch(items, items, items[:, 0], items[:, 0] > 0, items[:, 0])
    features = {name: np.full((3, tiny_stages.N, 16), 2.0, np.float32) for name in snapshots.READ}
    measured, _ = snapshots._held_out(spec, unflatten_dict(params, sep='/'), rows, np.arange(5),
                                     features, 3)
    assert measured['mine'] == pytest.approx(4)


def test_a_setting_that_is_not_hashable_is_refused():
    with pytest.raises(InputError, match=r'losses.mine.widths=.*ndarray is not hashable'):
        LossSpec('mine', settled, 1.0, {'widths': np.ones(2)})


# --- parameters of a loss's own -------------------------------------------------------------------


@lru_cache
def started():
    """A stage of one loss with a head on a made-up recommender, and its first parameters."""
    specs = chosen(next_item=dict(weight=0.0),
                   mine=entry('headed', module=f'{HERE}:Head', fields=dict(width=5)))
    spec = step_lib.StepSpec(None, specs, frozenset(), optax.sgd(0.1), 3)
    params = {'a/w': jnp.ones((2, 2)), 'b': jnp.ones(3)}

    def outputs(params, batch):
        return {'r': jnp.ones((B, N, D)) * params['b'].sum()}, batch

    return spec, params, losses.first_parameters(specs, outputs, (params, batch_of()), 3)


def test_own_parameters_come_from_the_seed_and_the_name_alone():
    _, params, own = started()
    assert {path: x.shape for path, x in own.items()} == {
        'loss/mine/Dense_0/kernel': (D, 5), 'loss/mine/Dense_0/bias': (5,)}

    def again(name, seed):
        spec = LossSpec(name, headed, module=Head(5))
        drawn = losses.first_parameters((spec,), lambda p, b: (
            {'r': jnp.zeros((B, N, D))}, b), (params, batch_of()), seed)
        return drawn[f'loss/{name}/Dense_0/kernel']

    kernel = own['loss/mine/Dense_0/kernel']
    np.testing.assert_array_equal(again('mine', 3), kernel)
    assert np.abs(again('yours', 3) - kernel).max() > 0.01
    assert np.abs(again('mine', 4) - kernel).max() > 0.01


def test_own_parameters_train_whatever_the_pattern_and_others_do_not():
    spec, params, own = started()
    others = {'loss/other/w': jnp.ones(2)}
    state = step_lib.start(spec, {**params, **own, **others}, '^(a|loss)')
    assert state.params.keys() == {'a/w', *own}
    assert state.frozen.keys() == {'b', *others}


def test_a_head_gets_its_parameters_and_a_gradient():
    spec, _, own = started()
    out, x = {'r': jnp.ones((B, N, D))}, np.float32(0.5)

    def objective(kernel):
        tree = {'loss': {'mine': {'Dense_0': {'kernel': kernel, 'bias': jnp.full(5, x)}}}}
        return losses.combine(spec.losses, out, batch_of(), {},
                              heads=losses.bound(spec.losses, tree))[0]

    kernel = own['loss/mine/Dense_0/kernel']
    value, slope = jax.value_and_grad(objective)(kernel)
    assert float(value) == pytest.approx(float(((np.asarray(kernel).sum(0) + x) ** 2).mean()),
                                         rel=1e-5)
    np.testing.assert_allclose(slope, np.tile(2 * (kernel.sum(0) + x) / 5, (D, 1)), rtol=1e-4)


@pytest.mark.parametrize(('fn', 'module', 'told'), [
    (headed, Counting(), 'it has seen. Expected parameters alone'),
    (silent, Head(), 'the function never calls head')])
def test_a_module_that_cannot_be_trained_is_refused(fn, module, told):
    with pytest.raises(InputError, match=told):
        losses.first_parameters((LossSpec('mine', fn, module=module),), lambda b: (
            {'r': jnp.ones((B, N, D))}, b), (batch_of(),), 0)


# --- what is not finite ---------------------------------------------------------------------------


@pytest.mark.parametrize('replicas', [1, 4])
def test_a_value_that_is_not_finite_is_told_with_its_rows(replicas):
    value = jnp.where(jnp.isin(jnp.arange(B), jnp.array([1, 6, 7])), jnp.nan, 1.0)
    batch = batch_of(10 * jnp.arange(B)).replace(valid=jnp.arange(B) < 7)

    def bad(out, batch, *, x: Out = Out('v')):
        return out[x]

    def step(value, batch, axis):
        specs = LossSpec('fine', bad, 1.0, {'x': 'w'}), LossSpec('bad', bad)
        return losses.combine(specs, {'v': value, 'w': jnp.ones_like(value)}, batch, {}, axis=axis,
                              rows=True)[2]

    if replicas == 1:
        logged = step(value, batch, None)
    else:
        parts = jax.tree.map(lambda x: x.reshape(replicas, -1, *x.shape[1:]), (value, batch))
        logged = jax.tree.map(lambda x: x[0], jax.vmap(
            partial(step, axis='data'), axis_name='data')(*parts))
    np.testing.assert_array_equal(logged['not_finite'][:, 0], -1)
    np.testing.assert_array_equal(logged['not_finite'][:, 1], [-1, 10, -1, -1, -1, -1, 60, -1])

    clean = {**logged, 'bad': 1.0, 'loss': 1.0}
    wrote = SimpleNamespace(scalars=lambda *_: pytest.fail('wrote what is not finite'))
    loop = SimpleNamespace(name='transfer', log_every=4, writer=wrote, shown=(), broken=None)
    specs = SimpleNamespace(name='fine'), SimpleNamespace(name='bad')
    spec = SimpleNamespace(losses=specs, skip=0)
    recent = [(2, clean), (3, logged), (4, {**logged, 'fine': np.nan})]
    with pytest.raises(FloatingPointError, match=(
            'stage transfer, step 3: bad, loss not finite; of the training rows: bad in rows 10, 60'
            )):
        loop_lib._log(loop, spec, None, recent, {})
    slope = {**clean, 'optim/grad_norm': np.inf, 'not_finite': np.full((B, 2), -1)}
    with pytest.raises(FloatingPointError, match='step 4: optim/grad_norm not finite, while every'):
        loop_lib._log(loop, spec, None, [(4, slope)], {})
    many = {**logged, 'not_finite': np.stack([np.full(B, -1), np.arange(B)], axis=1)}
    with pytest.raises(FloatingPointError, match=f'bad in rows 0, 1, 2, 3, 4 and {B - 5} more'):
        loop_lib._log(loop, spec, None, [(4, many)], {})


# --- losses check ---------------------------------------------------------------------------------


def breaches(fn, keywords=(), module=None):
    return {finding.what: finding.text for finding in check.check(fn, keywords, module)
            if finding.ok is False}


@pytest.mark.slow
def test_check_finds_nothing_wrong_with_a_good_loss(capsys):
    assert command.main(['check', f'{HERE}:headed', f'--module={HERE}:Head', '--fields.width=3',
                         '--x=t']) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines} == {'ok'}
    assert {line.split()[1] for line in lines} >= {
        'signature', 'names', 'shape', 'finite', 'slope', 'padding', 'rows', 'no', 'replicas',
        'repeats'}
    assert 'reads t' in lines[1]


@pytest.mark.parametrize(('fn', 'breach', 'told'), [
    (swapped, 'contract', 'does not begin with'), (whole, 'contract', r'float32 \[16, 3\]'),
    (root, 'finite', r'the value is nan in rows \d'),
    (negative, 'finite', 'nan in rows 0, .*; a row weight below 0 counts as nan'),
    (hidden, 'contract', 'which no keyword names'),
    (unnamed, 'contract', r"out\['warm'\], which no keyword names"),
    (headed, 'runs', r'test_extension.py, line \d+: TypeError'),
])
def test_check_ends_where_nothing_can_follow(fn, breach, told):
    (what, found), = breaches(fn).items()
    assert what == breach
    assert re.search(told, found)


@pytest.mark.slow
@pytest.mark.parametrize(('fn', 'what'), [
    (unmasked, {'padding'}), (contrast, {'replicas', 'repeats'})])
def test_check_finds_what_is_not_masked_gathered_or_apart(fn, what):
    assert breaches(fn).keys() == what


@pytest.mark.slow
def test_check_says_how_draws_and_states_are_kept():
    rows = breaches(noisy)['rows']
    assert rows.endswith('by jax.random.fold_in(key, row), its row being of batch.row')
    assert not breaches(noisy_by_row)
    assert breaches(counted)['no rows'].endswith('a state stays as it is if no row counts')


def test_the_command_refuses_in_words(capsys):
    assert command.main(['check', f'{HERE}:pul']) == 2
    assert "has no attribute 'pul'" in capsys.readouterr().err
    assert command.main(['chekc', 'x']) == 2
    assert command.main(['--help']) == 0


# --- a whole run ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_own_parameters_are_resumed_bit_by_bit_and_go_on_in_the_next_stage(small, tmp_path):
    c = test_job.changed(small, rivals={}, diagnostics=0, baselines='pop', experts='', save_every=3,
                         stage__knowledge__steps=6, stage__recommend__steps=6,
                         model__recommend='k', losses__gen_knowledge__weight=0.0)
    c.unlock()
    c.losses.mine = ConfigDict(dict(
        fn=f'{HERE}:headed', module=f'{HERE}:Head', weight=0.5, stages='knowledge,recommend',
        schedule=((0, 0.0), (5, 1.0)), x='k'))
    ended = {}

    def ran(workdir, stages, stopping=lambda: False):
        c.stages = stages
        fit = loop_lib.fit
        with pytest.MonkeyPatch.context() as patch:
            def recorded(loop, *args):
                out = ended[workdir, loop.name] = fit(loop, *args)
                return out
            patch.setattr(loop_lib, 'fit', recorded)
            return job.run(c, tmp_path / workdir, stopping)

    found = ran('whole', 'knowledge,recommend')['losses']
    with pytest.raises(Stopped):
        ran('parts', 'knowledge', (tmp_path / 'parts' / 'stages' / 'knowledge' / '3').exists)
    assert ran('parts', 'knowledge')['losses']['knowledge'] == found['knowledge']
    assert found['knowledge']['weight/mine'] == pytest.approx(0.5)
    params = {key: out[0] for key, out in ended.items()}
    own = sorted(path for path in params['whole', 'recommend'] if path.startswith('loss/'))
    assert own == ['loss/mine/Dense_0/bias', 'loss/mine/Dense_0/kernel']
    for path, x in params['whole', 'knowledge'].items():
        np.testing.assert_array_equal(x, params['parts', 'knowledge'][path], path)
    kernel = [params['whole', stage][own[1]] for stage in ('knowledge', 'recommend')]
    assert 0 < np.abs(kernel[0] - kernel[1]).max() < 0.1  # on from where it was, not anew
