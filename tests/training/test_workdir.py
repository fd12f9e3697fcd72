"""Whose run a workdir is, which paths it may have, and that only one run uses it at a time."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from tests.training.test_checkpoint import assert_same, opened
from tpad_jax.errors import InputError
from tpad_jax.training.checkpoint import abstract
from tpad_jax.training.workdir import claim, enter, locked

CONFIG = {'seed': 1, 'devices': 1, 'log_every': 10, 'optim': {'lr': 0.1},
          'data': {'raw_dir': '/a', 'ready': '', 'features': ''},
          'mllm': {'base': '', 'checkpoint': '', 'teacher': ''}}


def changed(part, **values):
    return CONFIG | {part: CONFIG[part] | values}


def test_claim_takes_the_same_run_again_and_free_keys_may_change(tmp_path):
    claim(tmp_path / 'run', CONFIG, None)
    other = changed('data', raw_dir='/b') | {'devices': 8, 'log_every': 1, 'save_every': 3}
    claim(tmp_path / 'run', other, 'abc')
    claim(tmp_path / 'run', CONFIG, None)
    record = json.loads((tmp_path / 'run' / 'config.json').read_text())
    assert record == {'format': 2, 'config': CONFIG, 'fingerprint': 'abc', 'inputs': {}}
    assert [path.name for path in (tmp_path / 'run').iterdir()] == ['config.json']


def test_claim_names_every_difference(tmp_path):
    claim(tmp_path, CONFIG | {'widths': (1, 2)}, 'abc')
    claim(tmp_path, CONFIG | {'widths': [1, 2]}, 'abc')
    other = CONFIG | {'seed': 2, 'optim': {'lr': 0.2}, 'logits': True, 'widths': (1, 2)}
    with pytest.raises(InputError) as caught:
        claim(tmp_path, other, 'abd')
    for words in (
        'seed was 1 and is now 2',
        'optim.lr was 0.1 and is now 0.2',
        'logits was absent and is now true',
        'the content of data.raw_dir was "abc" and is now "abd"',
    ):
        assert words in str(caught.value)
    assert 'widths' not in str(caught.value)


def test_a_trained_baseline_may_be_added_but_not_changed(tmp_path):
    mine = {'mine': {'recommend': 'k'}}
    claim(tmp_path, CONFIG, 'abc')
    for fingerprint in (None, 'abc'):
        claim(tmp_path, CONFIG | {'rivals': mine}, fingerprint)
    with pytest.raises(InputError, match=r'rivals\.mine\.recommend was "k" and is now "r"'):
        claim(tmp_path, CONFIG | {'rivals': {'mine': {'recommend': 'r'}}}, 'abc')
    with pytest.raises(InputError, match=r'rivals\.mine\.recommend was "k" and is now absent'):
        claim(tmp_path, CONFIG, 'abc')


@pytest.mark.parametrize('text', ['', '{"config": {', '[]', '{"config": [], "fingerprint": ""}'])
def test_claim_refuses_a_file_that_is_not_a_config(tmp_path, text):
    (tmp_path / 'config.json').write_text(text)
    with pytest.raises(InputError, match=re.escape(str(tmp_path / 'config.json'))
                       + r': not a config .*restore the file, or delete it'):
        claim(tmp_path, CONFIG)
    assert (tmp_path / 'config.json').read_text() == text


def test_a_workdir_of_another_format_is_refused_by_name(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps({'config': CONFIG, 'fingerprint': 'abc'}))
    with pytest.raises(InputError, match=r'has format 1, .* this version reads format 2'):
        claim(tmp_path, CONFIG)


@pytest.mark.parametrize('key', ['data.features', 'mllm.base', 'mllm.checkpoint', 'mllm.teacher'])
def test_an_input_may_move_but_its_content_may_not_change(tmp_path, key):
    part, name = key.split('.')
    before, after = tmp_path / 'before', tmp_path / 'after'
    before.mkdir()
    (before / 'params.safetensors').write_bytes(bytes(range(100)))
    file = 'params.safetensors' if part == 'data' else ''
    claim(tmp_path / 'run', changed(part, **{name: str(before / file)}), 'abc')
    shutil.move(before, after)
    moved = changed(part, **{name: str(after / file)})
    claim(tmp_path / 'run', moved, 'abc')
    (after / 'params.safetensors').write_bytes(bytes(100))
    with pytest.raises(InputError, match=f'{re.escape(key)} was content .* and is now content'):
        claim(tmp_path / 'run', moved, 'abc')
    with pytest.raises(InputError, match=f'{re.escape(key)} was content .* and is now ""'):
        claim(tmp_path / 'run', CONFIG, 'abc')


def test_ready_made_sessions_may_move_but_not_change(tmp_path):
    claim(tmp_path, changed('data', raw_dir='', ready='/a'), 'abc')
    claim(tmp_path, changed('data', raw_dir='', ready='/b'), 'abc')
    with pytest.raises(InputError, match=r'the content of data\.ready was "abc" and is now "abd"'):
        claim(tmp_path, changed('data', raw_dir='', ready='/b'), 'abd')


def test_a_bucket_is_refused_as_a_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=r'not a directory.*--mirror=gs://bucket/run for'):
        enter(Path('gs://bucket/run'), None)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('name', ['a b', '50%', 'a#b', 'é', "it's", '{x}', '$HOME'])
def test_other_special_characters_in_a_path_work(tmp_path, name):
    enter(tmp_path / name, ConfigDict())
    state = {'w': jnp.arange(3.0)}
    with opened(tmp_path / name / 'stage') as checkpoints:
        checkpoints.save(1, state, {}, wait=True)
        assert_same(checkpoints.latest(abstract(state))[1], state)


HOLD = """
import sys, time
from tpad_jax.training.workdir import locked
with locked(sys.argv[1]):
    print('locked', flush=True)
    time.sleep(600)
"""


def test_a_second_run_in_a_workdir_is_refused_until_the_first_ends(tmp_path):
    first = subprocess.Popen([sys.executable, '-c', HOLD, tmp_path], stdout=subprocess.PIPE,
                             text=True, env=os.environ | {'JAX_PLATFORMS': 'cpu'})
    try:
        assert first.stdout.readline() == 'locked\n'
        words = rf'another run uses it \(host \S+, process {first.pid}, since \d{{4}}-\d\d-\d\d '
        for _ in range(2):  # the refused run does not take the lock
            with pytest.raises(InputError, match=words), locked(tmp_path):
                pass
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
        first.stdout.close()
    for _ in range(2):  # a killed process holds nothing, and neither does a run that ended
        with locked(tmp_path):
            assert f'process {os.getpid()},' in (tmp_path / 'run.lock').read_text()
