"""`launch.py` as a person meets it: exit status, one clear sentence, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIG = f'--config={ROOT / "configs" / "amazon.py"}'


def start(directory, *flags):
    """`python launch.py` with flags, run in `directory`."""
    return subprocess.Popen([sys.executable, ROOT / 'launch.py', *flags], cwd=directory, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def contents(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob('*'))


def assert_refused(run, told, limit=300):
    out, err = run.communicate(timeout=limit)
    assert run.returncode == 2, err
    assert out == ''
    assert err.count('\n') == 1, err
    assert err.startswith('launch.py: ')
    assert told in err
    assert 'Traceback' not in err


def test_help_explains_and_is_no_failure(tmp_path):
    run = subprocess.run([sys.executable, '-X', 'importtime', ROOT / 'launch.py', '--help'],
                         cwd=tmp_path, text=True, capture_output=True, check=False)
    out, imported = run.stdout, {line.split('|')[-1].strip() for line in run.stderr.splitlines()}
    assert run.returncode == 0
    assert 'absl' in imported
    assert not imported & {'jax', 'flax', 'numpy'}
    for word in ('--config', '--workdir', 'configs/amazon.py', '75'):
        assert word in out


@pytest.mark.parametrize('how', [[str(ROOT / 'launch.py')], ['-m', 'tpad_jax.train']], ids=len)
def test_configs_and_modules_of_the_directory_are_found(tmp_path, how):
    """From anywhere, beside a folder that is named like ours; the module is launch.py's equal."""
    (tmp_path / 'configs').mkdir()
    (tmp_path / 'configs' / '__init__.py').write_text('')
    (tmp_path / 'configs' / 'mine.py').write_text(
        'import standing_here\nfrom tpad_jax import config\n\ndef get_config():\n'
        '    c = config.get_config()\n    config.tiny(c)\n    c.name = standing_here.NAME\n'
        '    return c\n')
    (tmp_path / 'standing_here.py').write_text('NAME = "mine"\n')
    run = subprocess.run([sys.executable, *how, '--config=configs/mine.py', '--config.nam=x'],
                         cwd=tmp_path, text=True, capture_output=True, check=False,
                         env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert run.returncode == 2, run.stderr
    name = 'launch.py' if len(how) == 1 else 'tpad_jax.train'
    assert run.stderr.startswith(f'{name}: the config has no such key: nam. Did you mean name')
    assert run.stderr.count('\n') == 1


@pytest.mark.parametrize(('flags', 'told'), [
    ([], 'name a config, for example --config=configs/amazon.py'),
    (['--configs=x'], "Unknown command line flag 'configs'"),
    (['--config=configs/nowhere.py'], 'configs/nowhere.py'),
    (['--config='], 'empty'),
    ([CONFIG + ':huge'], "no variant 'huge': leave it out or name one of tiny"),
    ([CONFIG, '--config.sed=1'], 'the config has no such key: sed. Did you mean seed'),
    ([CONFIG, '--config.losses.align.temprature=1'], 'no such key: temprature'),
    ([CONFIG, '--config.seed=one'], "flag --config.seed=one: invalid literal for int()"),
    ([CONFIG, '--config.model.use_id=perhaps'], 'Non-boolean argument'),
    ([CONFIG, 'configs/amazon.py'], "unknown argument 'configs/amazon.py'"),
])
def test_a_wrong_command_line_is_refused(tmp_path, flags, told):
    assert_refused(start(tmp_path, *flags), told, limit=120)
    assert contents(tmp_path) == []


def test_a_config_that_is_broken_is_refused(tmp_path):
    (tmp_path / 'broken.py').write_text('def get_config(:\n')
    assert_refused(start(tmp_path, '--config=broken.py'), 'broken.py, line 1')
    assert contents(tmp_path) == [Path('broken.py')]


@pytest.mark.slow
def test_what_the_job_refuses_is_one_sentence_too(tmp_path):
    (tmp_path / 'empty').mkdir()
    assert_refused(start(tmp_path, CONFIG, '--config.data.raw_dir=empty'), 'empty: no meta_X.json')
    assert contents(tmp_path) == [Path('empty')]


@pytest.mark.slow
def test_an_interrupt_saves_and_says_so(tmp_path):
    run = start(tmp_path, CONFIG + ':tiny', '--config.devices=1', '--config.log_every=1',
                '--config.stage.knowledge.steps=100000', '--config.stages=knowledge',
                '--config.mllm.text_length=8', '--config.baselines=pop', '--workdir=run')
    log = tmp_path / 'run' / 'log.jsonl'
    try:
        deadline = time.monotonic() + 240
        while not (log.exists() and log.read_text()):
            assert run.poll() is None, run.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 75, err
    last = err.splitlines()[-1]
    assert last.startswith('launch.py: stopped in stage knowledge after step ')
    assert last.endswith('; run the same command again to resume')
    assert 'Traceback' not in err
    step = int(last.split('after step ')[1].split(';')[0])
    saved = tmp_path / 'run' / 'stages' / 'knowledge'
    assert (saved / str(step)).is_dir()
    assert not (tmp_path / 'run' / 'results.json').exists()
