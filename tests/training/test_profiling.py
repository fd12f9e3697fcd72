"""Counted operations against closed forms and the compiler, steps compiled again, a trace."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax.distributed import devices as devices_lib
from tpad_jax.training import profiling


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def scanned(x, w):
    return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, None, length=5)[0]


def branched(x, w):
    return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)


CASES = {
    'product': (jnp.matmul, (shape(3, 5), shape(5, 7)), 2 * 3 * 5 * 7),
    'batched': (lambda a, b: jnp.einsum('bnd,bmd->bnm', a, b), (shape(2, 3, 4), shape(2, 5, 4)),
                2 * 2 * 3 * 5 * 4),
    'scan': (scanned, (shape(3, 4), shape(4, 4)), 5 * 2 * 3 * 4 * 4),
    'branches': (branched, (shape(3, 4), shape(4, 4)), 2 * 2 * 3 * 4 * 4),
    # forward, and twice that for the slopes in x and w
    'slopes': (lambda x, w: jax.grad(lambda x, w: jnp.sum(scanned(x, w)), (0, 1))(x, w),
               (shape(3, 4), shape(4, 4)), 3 * 5 * 2 * 3 * 4 * 4),
    # what is computed again counts again
    'again': (lambda x, w: jax.grad(
        lambda x: jnp.sum(jax.checkpoint(lambda x: jnp.tanh(jnp.tanh(x @ w) @ w))(x)))(x),
        (shape(3, 4), shape(4, 4)), 6 * 2 * 3 * 4 * 4),
    'jit': (jax.jit(jnp.matmul), (shape(3, 5), shape(5, 7)), 2 * 3 * 5 * 7),
}


@pytest.mark.parametrize('case', CASES)
def test_operations_are_those_of_the_products(case):
    fn, given, expected = CASES[case]
    assert profiling.operations(fn, *given) == expected


@pytest.mark.parametrize('groups', [1, 2])
def test_convolutions_count_as_the_compiler_counts_them(groups):
    def fn(x, w):
        return jax.lax.conv_general_dilated(x, w, (1, 1), 'VALID', feature_group_count=groups,
                                            dimension_numbers=('NHWC', 'HWIO', 'NHWC'))

    given = shape(2, 9, 9, 4), shape(3, 3, 4 // groups, 6)
    counted = profiling.operations(fn, *given)
    assert counted == 2 * (2 * 7 * 7 * 6) * 3 * 3 * 4 // groups
    assert counted == jax.jit(fn).lower(*given).compile().cost_analysis()['flops']


def test_a_step_compiled_again_is_told_with_the_field_that_changed(capsys):
    fn = jax.jit(lambda batch: batch['items'] * 2)
    first = {'items': np.zeros((4, 3), np.int32), 'valid': np.ones(4, bool), 'image': None}
    watched = profiling.CompileWatch('transfer', first)
    for number, batch in enumerate((first, first, {**first, 'items': np.zeros((2, 3), np.int32)}),
                                   1):
        with watched.step(number, batch, new=number == 1):
            fn(batch)
        told = capsys.readouterr().err
        assert ('step 3' in told) == (number == 3) == bool(told)
    assert 'stage transfer' in told
    assert 'items is int32[2, 3], was int32[4, 3];' not in told
    assert told.rstrip().endswith('items is int32[2, 3], was int32[4, 3]')


def test_what_is_compiled_between_steps_is_none_of_their_affair(capsys):
    batch = {'items': np.zeros((4, 3), np.int32)}
    watched = profiling.CompileWatch('joint', batch)
    jax.jit(lambda x: x + 17)(batch['items'])
    with watched.step(2, batch, new=False):
        pass
    assert not capsys.readouterr().err


def test_a_profile_is_of_the_steps_asked_for(tmp_path, capsys):
    devices = devices_lib.choose('jit', 1)
    one = profiling.Profile(tmp_path, 3, 'recommend', devices)
    one.count(jnp.matmul, shape(8, 16), shape(16, 4))
    for number in range(11, 20):  # a sitting that goes on from step 10
        one.after(number, 12, jnp.zeros(()), last=number == 19)
    found = json.loads((tmp_path / 'recommend.json').read_text())
    assert found['steps'] == [13, 15]
    assert found['operations'] == 2 * 8 * 16 * 4
    assert found['share'] == pytest.approx(
        found['operations'] / found['seconds'] / found['peak'], abs=1e-5)
    assert list((tmp_path / 'recommend').rglob('*.xplane.pb'))
    assert 'recommend, steps 13 to 15' in capsys.readouterr().out


@pytest.mark.slow
def test_a_stage_that_ends_early_ends_its_profile(tmp_path, capsys):
    one = profiling.Profile(tmp_path, 50, 'joint', devices_lib.choose('jit', 1))
    for number in (1, 2, 3, 4):
        one.after(number, 2, jnp.zeros(()), last=number == 4)
    assert json.loads((tmp_path / 'joint.json').read_text())['steps'] == [3, 4]
    assert 'joint, steps 3 to 4' in capsys.readouterr().out
