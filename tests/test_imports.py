"""Imports that the contract in setup.cfg cannot express: what is imported late, and one place each.

`lint-imports` checks the floors.
"""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(p.relative_to(ROOT) for p in
               (*ROOT.glob('tpad_jax/**/*.py'), *ROOT.glob('configs/*.py'), ROOT / 'launch.py'))


def tree(file):
    return ast.parse((ROOT / file).read_text())


def imported(nodes):
    """Full names of the modules that nodes import."""
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'line {node.lineno} imports relatively'
            found |= {node.module, *(f'{node.module}.{alias.name}' for alias in node.names)}
    return found


def test_modules_and_packages_are_small():
    package = [file for file in FILES if file.parts[0] == 'tpad_jax']
    assert {file for file in package if len((ROOT / file).read_text().splitlines()) > 400} == set()
    modules = Counter(file.parent for file in package if file.name != '__init__.py')
    assert max(modules.values()) <= 14, modules


def roots(file):
    return {name.split('.')[0] for name in imported(ast.walk(tree(file)))}


def used(file):
    """Every name and attribute of a file's code; strings and comments are not code."""
    names = {node.id for node in ast.walk(tree(file)) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}


def test_a_config_changes_the_defaults_only():
    """A config is read before the compiler's flags are set, so it must not import jax."""
    for file in FILES:
        if file.parts[0] == 'configs':
            assert roots(file) <= {'ml_collections', 'tpad_jax'}, file
            ours = {name for name in imported(ast.walk(tree(file))) if name.startswith('tpad_jax.')}
            assert all(name.startswith('tpad_jax.config') for name in ours), file


@pytest.mark.parametrize('file', ['launch.py', 'tpad_jax/__init__.py', *(
    f'tpad_jax/{name}.py' for name in ('train', 'recommend', 'export', 'serve'))])
def test_jax_arrives_late(file):
    """A wrong flag or --help must not wait for jax: it is imported inside functions."""
    top = imported(node for node in tree(file).body
                   if isinstance(node, ast.Import | ast.ImportFrom))
    ours = {name.split('.')[1] for name in top if name.startswith('tpad_jax.')}
    assert not {name.split('.')[0] for name in top} & {'jax', 'flax'}
    assert ours <= {'errors', 'core', 'train', 'config'}, file


@pytest.mark.parametrize(('place', 'says'), [
    ('tpad_jax/training/checkpoint.py', lambda file: 'orbax' in roots(file)),
    ('tpad_jax/distributed/devices.py', lambda file: bool(used(file) & {'pmap', 'shard_map'})),
], ids=['orbax', 'pmap'])
def test_one_place(place, says):
    assert [str(file) for file in FILES if says(file)] == [place]


def test_benchmarks_import_no_circle():
    """Each benchmark imports those that share its work, never the other way round."""
    files = {f'benchmarks.{path.stem}': path for path in (ROOT / 'benchmarks').glob('*.py')}
    below = {name: imported(ast.walk(ast.parse(path.read_text()))) & files.keys() - {name}
             for name, path in files.items()}
    while below:
        ground = [name for name, names in below.items() if not names & below.keys()]
        assert ground, f'a circle among {sorted(below)}'
        for name in ground:
            del below[name]


def test_serving_imports_what_it_needs_only():
    """A service starts without the libraries that only training and reports use."""
    program = '''
import sys
import tpad_jax.serve
from tpad_jax.serving import http, recommender
unneeded = {'orbax', 'grain', 'tensorflow_datasets', 'optuna', 'matplotlib', 'tensorboard'}
print(*unneeded & {name.split('.')[0] for name in sys.modules})
'''
    done = subprocess.run([sys.executable, '-c', program], text=True, capture_output=True,
                          check=True)
    assert done.stdout == '\n'
