"""Damaged checkpoints, file by file: what is used instead, and what is an error."""

import gc
import os
import shutil
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from tests import tiny_stages
from tests.training.test_checkpoint import LEFT_BEHIND, assert_same, make_state, opened
from tpad_jax.distributed import devices
from tpad_jax.errors import InputError
from tpad_jax.training import loop as loop_lib
from tpad_jax.training import step as step_lib
from tpad_jax.training.checkpoint import abstract, claim

pytestmark = LEFT_BEHIND


@pytest.fixture(autouse=True)
def collected():
    yield
    gc.collect()  # here, and not in the tests of another file


def halve(file):
    os.truncate(file, file.stat().st_size // 2)


def empty(file):
    os.truncate(file, 0)


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    """A folder of checkpoints 1 and 2, both ranked, and the states."""
    where, saved = tmp_path_factory.mktemp('two') / 'stage', {
        step: make_state(step, width=2000) for step in (1, 2)}
    with opened(where) as checkpoints:
        for step, state in saved.items():
            checkpoints.save(step, state, {'step': step}, float(step))
    return where, saved


@pytest.mark.parametrize('damage', [halve, os.remove, pytest.param(empty, marks=pytest.mark.slow)])
def test_any_file_of_the_newest(two, tmp_path, capsys, damage):
    """Either it is not read, and all is as it was; or this is told, and the one before is used."""
    source, saved = two
    files = sorted(f.relative_to(source) for f in (source / '2').rglob('*') if f.is_file())
    like, told = abstract(saved[1]), []
    for number, file in enumerate(files):
        where = tmp_path / str(number)
        shutil.copytree(source, where)
        damage(where / file)
        with opened(where) as checkpoints:
            step, state, meta = checkpoints.latest(like)
            assert meta == {'step': step}
            assert_same(state, saved[step])
            assert checkpoints.best(like)[0] == step
            report = capsys.readouterr().err
            if step == 1:
                told.append(file)
                assert 'checkpoint 2 is damaged' in report, file
                assert 'step 1 is used instead' in report, file
                assert (where / 'damaged-2').is_dir()
            if step == 2 or len(told) > 1:
                continue
            checkpoints.save(2, saved[2], {'step': 2}, 2.0, wait=True)  # once: it takes a while
            assert checkpoints.latest(like)[0] == checkpoints.best(like)[0] == 2
        with opened(where) as checkpoints:  # and it is not looked at again
            assert_same(checkpoints.latest(like)[1], saved[2])
        assert 'is damaged' not in capsys.readouterr().err
    names = {file.name for file in told}
    assert {'_CHECKPOINT_METADATA', '_METADATA', 'metrics', 'manifest.ocdbt'} <= names
    assert len(told) >= 6  # those and both files of numbers


@pytest.mark.parametrize('name', ['metrics/metrics', 'state/_METADATA'])
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


def fit(directory, scores=(0.2, 0.9, 0.1, 0.3), total=8):
    """A small recommender's stage, validated every other step with these scores."""
    spec, params, catalogue = tiny_stages.model()
    c, left = tiny_stages.make_config(), list(scores)
    step = step_lib.make_spec(c, 'recommend', spec, seed=5)
    writer = SimpleNamespace(rewind=lambda *_: None, scalars=lambda *_: None)
    with opened(directory) as checkpoints:
        loop = loop_lib.Loop(
            name='recommend', total=total, devices=devices.choose('jit', 1), writer=writer,
            batches=lambda start: tiny_stages.draw('recommend', start), checkpoints=checkpoints,
            progress=lambda *_: nullcontext(lambda *_: None), log_every=2, save_every=100,
            eval_every=2, validate=lambda *_: {'hit@20': left.pop(0)})
        return loop_lib.fit(loop, step, step_lib.start(step, params, c.stage.recommend.train),
                           catalogue)


@pytest.mark.slow
def test_a_stage_goes_on_from_the_one_before_and_never_takes_a_worse_one(tmp_path):
    params, _, record = fit(tmp_path / 'stage')
    assert (record['chosen'], record['best']) == (4, 0.9)
    assert sorted(f.name for f in (tmp_path / 'stage').iterdir()) == ['4', '6', '8']
    halve(tmp_path / 'stage' / '8' / 'state' / 'manifest.ocdbt')
    again, _, record = fit(tmp_path / 'stage', (0.3,))
    assert (record['chosen'], [h['step'] for h in record['history']]) == (4, [2, 4, 6, 8])
    for path, x in params.items():
        np.testing.assert_array_equal(again[path], x)
    os.remove(tmp_path / 'stage' / '4' / 'metrics' / 'metrics')
    with pytest.raises(InputError, match=r'chose a step of hit@20 0\.9, whose checkpoint is .*gone '
                                         r'\(the best that is left is step 8\).*delete that'):
        fit(tmp_path / 'stage')


@pytest.mark.parametrize('text', ['', '{"config": {', '[]'])
def test_a_config_that_was_cut(tmp_path, text):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(InputError, match=r'is not a config .*restore the file, or delete it'):
        claim(tmp_path, {'seed': 1})
    assert (tmp_path / 'config.json').read_text() == text
