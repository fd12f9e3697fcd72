"""Damaged checkpoints, file by file: what is used instead, and what is an error."""

import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_checkpoint import assert_same, make_state, opened
from tpad_jax.distributed import devices
from tpad_jax.errors import InputError
from tpad_jax.training import loop as loop_lib
from tpad_jax.training.checkpoint import abstract, chosen_parameters
from tpad_jax.types import State


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


def flip(file):
    """Change one bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """A folder of checkpoints 1 and 2, both ranked, and the states."""
    where, saved = tmp_path_factory.mktemp('two') / 'stage', {
        step: make_state(step, width=2000) for step in (1, 2)}
    with opened(where) as checkpoints:
        for step, state in saved.items():
            checkpoints.save(step, state, {'step': step}, float(step))
    return where, saved


@pytest.mark.parametrize('damage', [halve, os.remove, empty, flip])
def test_damage_to_any_file_of_the_newest_is_reported_and_the_one_before_is_used(
        two, tmp_path, capsys, damage):
    source, saved = two
    files = sorted(f.relative_to(source) for f in (source / '2').rglob('*') if f.stat().st_size
                   and f.is_file())
    like = abstract(saved[1])
    assert {f.name for f in files} >= {'meta.json', 'checksums.json', '_CHECKPOINT_METADATA',
                                       '_METADATA', 'manifest.ocdbt'}
    assert sum(f.parent.name == 'd' for f in files) >= 1  # array data
    for number, file in enumerate(files):
        where = tmp_path / str(number)
        shutil.copytree(source, where)
        damage(where / file)
        with opened(where) as checkpoints:
            step, state, meta = checkpoints.latest(like)
            assert (step, meta) == (1, {'step': 1}), file
            assert_same(state, saved[1])
            report = capsys.readouterr().err
            assert f'checkpoint 2 is damaged ({file.relative_to("2").as_posix()}' in report or (
                'checksums.json' in file.name), file
            assert 'step 1 is used instead' in report
            assert (where / 'damaged-2').is_dir()
            assert checkpoints.best(like)[0] == 1
    checkpoints = tmp_path / '0'
    with opened(checkpoints) as again:
        again.save(2, saved[2], {'step': 2}, 2.0, wait=True)
        assert again.latest(like)[0] == again.best(like)[0] == 2
    with opened(checkpoints) as again:  # what was moved is not read again
        assert_same(again.latest(like)[1], saved[2])
    assert 'is damaged' not in capsys.readouterr().err


@pytest.mark.parametrize('name', ['meta.json', 'state/_METADATA'])
def test_the_only_one_is_damaged(two, tmp_path, name):
    where = tmp_path / 'stage'
    shutil.copytree(two[0] / '2', where / '2')
    halve(where / '2' / name)
    for _ in range(2):
        with (pytest.raises(InputError, match=f'{where}: every checkpoint is damaged .*{name}.*'
                                              'delete it to start this stage again'),
              opened(where) as checkpoints):
            checkpoints.latest(abstract(two[1][1]))
        assert [f.name for f in where.iterdir()] == ['2']


def test_what_was_moved_aside_is_not_forgotten(two, tmp_path):
    shutil.copytree(two[0] / '2', tmp_path / 'stage' / 'damaged-2')
    with (opened(tmp_path / 'stage') as checkpoints,
          pytest.raises(InputError, match=r'every checkpoint is damaged .*damaged-2')):
        checkpoints.latest(abstract(two[1][1]))


def fit(directory, monkeypatch, scores=(5.2, 4.9, 5.3, 5.0), total=8, **more):
    """A stage of trivial steps, validated every other step with these scores."""
    def step(state, batch, shared):
        params = {'w': state.params['w'] * 0.9 + batch.row.sum() * shared['catalogue']['one']}
        return state.replace(step=state.step + 1, params=params), {'loss': params['w'].sum()}

    def batches(first):
        for number in range(first, total + 1):
            yield dict.fromkeys(('items', 'next', 'target', 'valid', 'row'), np.full(2, number))

    monkeypatch.setattr(loop_lib, 'lifted', lambda devices, spec: jax.jit(step))
    remaining = list(scores)
    writer = SimpleNamespace(rewind=lambda *_: None, scalars=lambda *_: None)
    state = State(jnp.int32(0), {'w': jnp.arange(6.0)}, {}, {}, {})
    with opened(directory) as checkpoints:
        loop = loop_lib.Loop(
            name='recommend', total=total, devices=devices.choose('jit', 1), writer=writer,
            batches=batches, checkpoints=checkpoints,
            progress=lambda *_: nullcontext(lambda *_: None), log_every=2, save_every=100,
            eval_every=2, validate=lambda *_: {'nll': remaining.pop(0)}, **more)
        return loop_lib.fit(loop, SimpleNamespace(skip=0, losses=()), state,
                            {'one': jnp.float32(1)})


def test_the_state_before_the_first_step_is_chosen_where_no_step_is_better(tmp_path, monkeypatch):
    """It is a checkpoint as others are, for resumed runs and for those that begin from this one."""
    more = dict(validates_first=True, patience=2)
    params, _, record = fit(tmp_path / 'kept', monkeypatch, (4.0, 5.2, 4.9, 5.3, 4.8), **more)
    assert (record['chosen'], record['valid']) == (0, {'step': 0, 'nll': 4.0})
    assert len(record['history']) == 5
    np.testing.assert_array_equal(params['w'], np.arange(6.0))
    again, _, record = fit(tmp_path / 'kept', monkeypatch, (), **more)
    assert record['chosen'] == 0
    for found in again, chosen_parameters(tmp_path / 'kept'):
        np.testing.assert_array_equal(found['w'], np.arange(6.0))
    assert fit(tmp_path / 'left', monkeypatch, (6.0, 5.2, 4.9, 5.3, 5.0), **more)[2]['chosen'] == 4


def test_a_stage_resumes_from_the_one_before_and_never_takes_a_worse_one(tmp_path, monkeypatch):
    params, _, record = fit(tmp_path / 'stage', monkeypatch)
    assert (record['chosen'], record['best']) == (4, 4.9)
    assert sorted(f.name for f in (tmp_path / 'stage').iterdir()) == ['4', '6', '8']
    halve(tmp_path / 'stage' / '8' / 'state' / 'manifest.ocdbt')
    again, _, record = fit(tmp_path / 'stage', monkeypatch, (5.0,))
    assert (record['chosen'], [h['step'] for h in record['history']]) == (4, [2, 4, 6, 8])
    for path, x in params.items():
        np.testing.assert_array_equal(again[path], x)
    os.remove(tmp_path / 'stage' / '4' / 'meta.json')
    with pytest.raises(InputError, match=r'chose a step of nll 4\.9, whose checkpoint is .* '
                                         r'missing \(the best remaining .* step 8\).*delete that'):
        fit(tmp_path / 'stage', monkeypatch)
