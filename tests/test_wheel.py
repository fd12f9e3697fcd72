"""The wheel has everything that a run needs outside of a checkout, its configs included."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PARTS = ('tpad_jax', 'configs', 'setup.py', 'setup.cfg', 'pyproject.toml', 'README.md', 'LICENSE')


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    """A directory with the unpacked wheel."""
    pytest.importorskip('setuptools')
    source, out = tmp_path_factory.mktemp('source'), tmp_path_factory.mktemp('installed')
    for part in PARTS:  # building writes into the source
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part,
                            ignore=shutil.ignore_patterns('__pycache__'))
        else:
            shutil.copy(ROOT / part, source)
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--no-build-isolation', '-q',
                    '-w', out, source], check=True)
    wheel, = out.glob('*.whl')
    with zipfile.ZipFile(wheel) as file:
        file.extractall(out / 'site')
    return out / 'site'


def ran(installed, directory, *argv):
    return subprocess.run([sys.executable, '-m', 'tpad_jax.train', *argv], cwd=directory, text=True,
                          capture_output=True, check=False,
                          env={**os.environ, 'PYTHONPATH': str(installed)})


def test_every_data_file_of_the_package_is_in_the_wheel(installed):
    tracked = subprocess.run(['git', 'ls-files', 'tpad_jax'], cwd=ROOT, text=True, check=False,
                             capture_output=True).stdout.split()
    if not tracked:
        pytest.skip('not a checkout')
    assert [name for name in tracked if not (installed / name).is_file()] == []


@pytest.mark.parametrize(('config', 'text'), [
    ('amazon', "no such key: nam. Did you mean name"), ('movielens', 'no such key: nam'),
    ('sessions:grocery', 'no such key: nam'), ('ablations:full', 'no such key: nam'),
    ('amazn', "--config='amazn': there is no such config. Expected a file, or one of ablations, "
              'amazon, movielens, sessions')])
def test_the_name_of_a_config_is_enough(installed, tmp_path, config, text):
    run = ran(installed, tmp_path, f'--config={config}', '--config.nam=x')
    assert run.returncode == 2, run.stderr
    assert text in run.stderr
    assert run.stderr.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_the_installed_command_is_this_wheel(installed, tmp_path):
    run = ran(installed, tmp_path, '--help')
    assert run.returncode == 0
    assert '--config=amazon' in run.stdout
    where = subprocess.run([sys.executable, '-c', 'import tpad_jax; print(tpad_jax.__file__)'],
                           cwd=tmp_path, text=True, capture_output=True, check=True,
                           env={**os.environ, 'PYTHONPATH': str(installed)}).stdout
    assert Path(where.strip()) == installed / 'tpad_jax' / '__init__.py'
