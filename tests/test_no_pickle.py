"""No program of this tree reads a pickle or runs a text: told from the source."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def calls(tree):
    """(name, keywords) of every call: np.load(x, a=1) -> ('np.load', {'a': '1'})."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}


PICKLES = {'pickle', '_pickle', 'cPickle', 'dill', 'cloudpickle', 'joblib', 'shelve', 'marshal',
           'yaml'}


def unsafe(tree):
    """What in a program could read a pickle or run a text; every np.load must say it does not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [*(alias.name for alias in node.names), getattr(node, 'module', '') or '']
            if PICKLES & {name.split('.')[0] for name in names}:
                yield ast.unparse(node)
    for name, keywords in calls(tree):
        loads = name in ('np.load', 'numpy.load')
        safe = ('False',) if loads else ('False', None)
        if (name in ('eval', 'exec', 'pl.read_pickle', 'pd.read_pickle')
                or keywords.get('allow_pickle') not in safe
                or keywords.get('trust_remote_code') not in ('False', None)
                or (name == 'torch.load' and keywords.get('weights_only') != 'True')):
            yield f'{name}({keywords})'


def test_no_pickle_is_read_and_no_text_is_run():
    found = [(str(path.relative_to(ROOT)), what) for place in ('tpad_jax', 'configs', 'benchmarks')
             for path in (ROOT / place).rglob('*.py')
             for what in unsafe(ast.parse(path.read_text()))]
    assert not found


@pytest.mark.parametrize('program', [
    'np.load(a)', 'f(np.load(a, allow_pickle=True))', 'import pickle', 'from pickle import load',
    'def f():\n    import numpy, dill', 'eval(a)', 'np.save(a, b, allow_pickle=True)',
    'torch.load(a)', 'A.from_pretrained(a, trust_remote_code=True)'])
def test_the_walk_finds_what_it_looks_for(program):
    assert list(unsafe(ast.parse(program)))
