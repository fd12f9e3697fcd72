"""Imports run strictly downward, read from the source: the floors of the house."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. 'data' and 'models' do not know each other.
FLOORS = (
    {'config', 'errors', 'types', 'collectives', 'memory', 'softmax', 'table'},
    {'process'},  # how a command begins, and data/ has one
    {'data', 'models'},
    {'losses', 'metrics', 'optim', 'accumulation', 'probes', 'kmeans', 'bundle', 'trials',
     'resampling', 'slices', 'mutual_information', 'diagnostics'},
    {'session_knn'},  # of floor 2, on metrics
    {'baselines'},  # of floor 2, on these
    {'parallel', 'processes', 'checkpoint', 'features', 'writers', 'bases', 'merge', 'activations'},
    {'figures', 'compare', 'ranking', 'profiling', 'mirror'},  # of floor 3, on writers or parallel
    {'training', 'evaluate', 'encode', 'scoring', 'pretrain', 'handover', 'snapshots',
     'feature_figure'},
    {'fitting', 'report'},  # of floor 4, on training and on snapshots
    {'recommenders'},  # of floor 4, on evaluate and scoring
    {'served'},  # of floor 4, on recommenders
    {'results', 'newcomers', 'topk', 'ann'},
    {'serving', 'pictures'},
    {'batching'},
    {'check'},
    {'plan'},
    {'job', 'ahead'},
    {'train', 'search', 'recommend', 'export', 'service'},
    {'serve'},
    {'launch', 'tpad_jax'},
)
PACKAGES = 'data', 'models', 'losses', 'report'
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
FILES = sorted(p.relative_to(ROOT) for p in
               (*ROOT.glob('tpad_jax/**/*.py'), *ROOT.glob('configs/*.py'), ROOT / 'launch.py'))


def tree(file):
    return ast.parse((ROOT / file).read_text())


def module(file):
    """tpad_jax/nn/linear.py -> tpad_jax.nn.linear."""
    return '.'.join(file.with_suffix('').parts).removesuffix('.__init__')


MODULES = {module(file) for file in FILES}


def imported(file):
    """Full names of all a file imports, inside functions too; of ours, the module itself."""
    return modules(tree(file), file)


def modules(tree, file):
    """What the nodes of a file import, see `imported`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{file}:{node.lineno} imports relatively'
            for alias in node.names:
                whole = f'{node.module}.{alias.name}'
                found.add(whole if whole in MODULES or node.module == 'tpad_jax' else node.module)
    return found


def room(name):
    """tpad_jax.nn.linear -> models; None for what is not ours."""
    parts = name.split('.')
    return parts[1] if parts[0] == 'tpad_jax' and len(parts) > 1 else None


def own(file):
    """The room of a file; None for configs/."""
    return {'launch.py': 'launch', 'tpad_jax/__init__.py': 'tpad_jax'}.get(
        str(file), room(module(file)))


def used(file):
    """Every name and attribute of a file's code; strings and comments are not code."""
    names = {node.id for node in ast.walk(tree(file)) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)}


def roots(file):
    return {name.split('.')[0] for name in imported(file)}


def test_every_file_stands_on_a_floor():
    assert {own(file) for file in FILES} - {None} == set(FLOOR)


@pytest.mark.parametrize('file', FILES, ids=str)
def test_imports_run_strictly_downward(file):
    here = own(file)
    ours = {name: room(name) for name in imported(file) if room(name)}
    if here is None:
        assert set(ours) <= {'tpad_jax.config'}, f'{file} changes what config.py says, no more'
        return
    for name, there in ours.items():
        assert there in FLOOR, f'{file} imports {name}, which is not there'
        assert FLOOR[there] < FLOOR[here] or there == here in PACKAGES, f'{file}: {name}'


@pytest.mark.parametrize('package', PACKAGES)
def test_no_circle_inside_a_package(package):
    inside = {module(f): {n for n in imported(f) if room(n) == package} for f in FILES
              if own(f) == package}
    while inside:
        ground = [name for name, below in inside.items() if not below & inside.keys()]
        assert ground, f'a circle among {sorted(inside)}'
        for name in ground:
            del inside[name]


def test_data_knows_neither_jax_nor_models():
    """And so not `types` or `collectives`, which import jax."""
    for file in FILES:
        if own(file) == 'data':
            assert not roots(file) & {'jax', 'jaxlib', 'flax', 'optax', 'orbax'}, file
            command = {'process'} if file.name == '__main__.py' else set()
            assert {room(n) for n in imported(file)} <= {None, 'data', 'errors', *command}, file


def test_models_know_no_config_and_no_optimiser():
    for file in FILES:
        if own(file) == 'models':
            assert not roots(file) & {'optax', 'orbax', 'ml_collections', 'configs', 'grain'}, file


def test_a_config_imports_no_jax():
    """A config is read before the compiler's flags are set."""
    for file in FILES:
        if own(file) in (None, 'config'):
            assert roots(file) <= {'ml_collections', 'tpad_jax'}, file


@pytest.mark.parametrize(('file', 'ours'), [
    ('launch.py', {'tpad_jax.train'}),
    ('tpad_jax/__init__.py', set()),
    *((f'tpad_jax/{name}.py', {'tpad_jax.errors', 'tpad_jax.core.startup'})
      for name in ('recommend', 'export', 'serve')),
    ('tpad_jax/train.py', {'tpad_jax.errors', 'tpad_jax.core.startup'})])
def test_jax_arrives_late(file, ours):
    """A wrong flag or --help should not wait for jax: it is imported inside functions."""
    top = ast.Module([node for node in tree(file).body
                      if isinstance(node, ast.Import | ast.ImportFrom)], [])
    names = modules(top, file)
    assert not {n.split('.')[0] for n in names} & {'jax', 'flax'}
    assert {n for n in names if n.startswith('tpad_jax')} == ours


@pytest.mark.parametrize(('place', 'says'), [
    ('tpad_jax/training/checkpoint.py', lambda file: 'orbax' in roots(file)),
    ('tpad_jax/distributed/devices.py', lambda file: bool(used(file) & {'pmap', 'shard_map'})),
], ids=['orbax', 'pmap'])
def test_one_place(place, says):
    assert [str(file) for file in FILES if says(file)] == [place]
