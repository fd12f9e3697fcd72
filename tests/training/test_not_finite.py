"""A number that is not finite: the run ends with the batch kept, or leaves the update out."""

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tiny_stages import draw, make_config, model
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.losses import LossSpec
from tpad_jax.training import loop as loop_lib, step as step_lib
from tpad_jax.training.checkpoint import Checkpoints

STEPS, BAD = 6, 3  # the step whose batch holds the row that spoils it
# numbers of rows that spoil it
MARKS = {'value': 10**6, 'slope': 10**6 + 1, 'sum': 10**6 + 2, 'always': 10**6}


@lru_cache
def one_device():
    return devices_lib.choose('jit', 1)


def bad_row():
    """A training row of step BAD alone."""
    drawn = draw('recommend')
    rows = [next(drawn)['row'] for _ in range(STEPS + 1)]
    drawn.close()
    others = np.concatenate([x for i, x in enumerate(rows) if i != BAD - 1])
    return int(np.setdiff1d(rows[BAD - 1], others)[0])


def spoiled(out, batch, *, axis=None, x='h'):
    """A loss that a marked row spoils: its value and so its gradient, or one of them alone."""
    value, slope, added = ((batch.row == MARKS[how]).astype(jnp.float32)
                           for how in ('value', 'slope', 'sum'))
    # the root of 0 is 0, with an endless slope
    return jnp.sqrt((out[x] ** 2).mean(-1) * (1 - slope)) / (1 - value) + 1 / (1 - added) - 1


def marked(how, start=0):
    """The batches, in which the bad row, or every one, has another number: one program for all."""
    bad, drawn = bad_row(), draw('recommend', start)
    try:
        for batch in drawn:
            hit = (batch['row'] == bad) | (how == 'always')
            yield {**batch, 'row': np.where(hit, MARKS[how], batch['row']).astype(np.int32)}
    finally:
        drawn.close()


def run(tmp_path, how, skip):
    """What `fit` returns, the log {step: values}, and the step's spec."""
    spec, params, catalogue = model()
    config = make_config().copy_and_resolve_references()
    config.skip_not_finite = skip
    step = step_lib.make_spec(config, 'recommend', spec, seed=5)
    step = replace(step, losses=(*step.losses, LossSpec('spoiled', spoiled)))
    logged = {}
    writer = SimpleNamespace(rewind=lambda *_: None, scalars=lambda _, n, x: logged.update({n: x}))
    checkpoints = Checkpoints(tmp_path / 'stage')
    loop = loop_lib.Loop(
        name='recommend', total=STEPS, devices=one_device(),
        checkpoints=checkpoints,
        batches=partial(marked, how), writer=writer, log_every=2, save_every=100,
        progress=lambda *_: nullcontext(lambda *_: None), broken=tmp_path / 'not_finite')
    first = step_lib.start(step, params, config.stage.recommend.train)
    try:
        return loop_lib.fit(loop, step, first, catalogue), logged, step
    finally:
        checkpoints.close()


@pytest.mark.parametrize(('how', 'told'), [
    ('value', r'step 3: loss, .*, spoiled not finite .*of the training rows: spoiled in row'),
    pytest.param('slope', r'step 3: optim/grad_norm not finite .*while every loss is',
                 marks=pytest.mark.slow)])
def test_the_run_ends_and_keeps_the_batch(tmp_path, how, told):
    with pytest.raises(FloatingPointError, match=told) as error:
        run(tmp_path, how, skip=0)
    file = tmp_path / 'not_finite' / f'recommend-{BAD}.npz'
    assert str(file) in str(error.value)
    drawn = marked(how, BAD - 1)
    expected = next(drawn)
    drawn.close()
    with np.load(file) as kept:
        assert set(kept) == {name for name, x in expected.items() if x is not None}
        for name in kept:
            np.testing.assert_array_equal(kept[name], expected[name])
    assert MARKS[how] in expected['row']


@pytest.mark.slow
@pytest.mark.parametrize('how', ['value', 'slope', 'sum'])
def test_an_update_is_left_out_and_the_rest_is_as_if_it_had_not_been(tmp_path, how, capsys):
    (params, _, _), logged, step = run(tmp_path, how, skip=2)
    assert [logged[n]['optim/skipped'] for n in (2, 4, 6)] == [0, 1, 1]
    assert all(np.isfinite(list(values.values())).all() for values in logged.values())
    told = capsys.readouterr().err
    assert told.count('its update was left out (updates left out in this stage: 1)') == 1
    assert f'stage recommend, step {BAD}: ' in told
    state = step_lib.start(step, model()[1], make_config().stage.recommend.train)
    shared = {'catalogue': model()[2], 'frozen': state.frozen}
    state, drawn = state.replace(frozen={}), marked(how)
    lifted = loop_lib.lifted(one_device(), step)  # compiled by `run`
    for number in range(1, STEPS + 1):
        batch = one_device().place(next(drawn))
        after, _ = lifted(jax.tree.map(jnp.copy, state), batch, shared)
        # the draws of a step go by its number
        state = state.replace(step=state.step + 1) if number == BAD else after
    drawn.close()
    for path, x in params.items():
        np.testing.assert_allclose(x, state.params[path], rtol=1e-5, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r'step [13]: loss, optim/grad_norm, spoiled not'):
        run(tmp_path, 'always', skip=2)
