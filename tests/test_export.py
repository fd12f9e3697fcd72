"""`python -m tpad_jax.export`: files that need no tpad_jax, and the same lists from them."""

import json
import re
import subprocess
import sys

import jax
import numpy as np
import polars as pl
import pytest
from safetensors.numpy import load_file

import tpad_jax
from tests import tiny_served
from tests.tiny_served import V
from tpad_jax import export
from tpad_jax.core import startup
from tpad_jax.data.sources import external_features
from tpad_jax.models.sessions import ENCODERS
from tpad_jax.serving import ann

pytestmark = pytest.mark.slow

OURS = ('tpad_jax', 'flax', 'safetensors', 'polars', 'pyarrow', 'optax', 'orbax', 'ml_collections',
        'transformers', 'tensorflow_datasets', 'absl', 'einops')  # what the artefact must not need
ALONE = f'''
import sys
class Alone:
    def find_spec(self, name, path=None, target=None):
        root = name.split('.')[0]
        if root in {OURS!r}:
            raise ModuleNotFoundError(root)
sys.meta_path.insert(0, Alone())
'''


@pytest.fixture(scope='module')
def run(served_run):
    return served_run


def sessions_of(rows):
    return [[f'I{n}' for n in row if n] for row in rows]


def written(run, tmp_path, monkeypatch, *argv):
    """The run's object and the directory of its export."""
    monkeypatch.setattr(startup, 'prepare', lambda: None)
    assert export.main([str(run), str(tmp_path / 'out'), '--k', '7', '--rows', '16',
                        *map(str, argv)]) == 0
    return tpad_jax.load(run), tmp_path / 'out'


@pytest.mark.parametrize('model', [
    None, dict(encoder='gce_gnn', together=3, mixed=True, partner=dict(model=dict(
        encoder='attention', width=24, repeats=True)))],
    ids=['default', 'graph, companions, partner, repeats, experts'])
def test_the_readme_alone_gives_the_same_lists(base_dir, run, tmp_path, monkeypatch, model):
    """Its code, where nothing but jax can be imported."""
    if model:
        run = tmp_path / 'run'
        tiny_served.write(run, base_dir, **model)
    shop, out = written(run, tmp_path, monkeypatch)
    artefact = bytearray((out / 'recommender.jax').read_bytes())
    program = jax.export.deserialize(artefact).mlir_module()
    products = re.findall(r'stablehlo\.dot_general.*', program)
    assert products
    assert all('[HIGHEST, HIGHEST]' in product for product in products)  # on any device
    code = re.search(r'```python\n(.*?)```', (out / 'README.md').read_text(), re.S)[1]
    rows = tiny_served.prefixes(16)
    asked = f'{code}\nprint(recommend(weights, np.array({rows.tolist()}, np.int32))[1].tolist())'
    done = subprocess.run([sys.executable, '-c', ALONE + asked], cwd=out, text=True,
                          capture_output=True, check=True)
    first, *lists = done.stdout.splitlines()
    assert json.loads(first.replace("'", '"')) == shop.recommend([['I1', 'I2']], k=7).items[0]
    np.testing.assert_array_equal(json.loads(lists[0]), shop.first(rows, 7)[0])


def test_tables_and_vectors(run, tmp_path, monkeypatch):
    asked = sessions_of(tiny_served.prefixes(9))
    file = tmp_path / 'sessions.jsonl'
    file.write_text(''.join(json.dumps({'session': s, 'id': n}) + '\n'
                            for n, s in enumerate([*asked, ['no']])))
    shop, out = written(run, tmp_path, monkeypatch, '--sessions', file)
    table = pl.read_parquet(out / 'items.parquet')
    assert table['item_id'].to_list() == json.loads((out / 'item_ids.json').read_text())
    assert table['item_id'].to_list() == [f'I{n}' for n in range(1, V + 1)]
    np.testing.assert_array_equal(np.array(table['vector'].to_list(), np.float32),
                                  shop.embed_items())
    found = external_features.read(out / 'item_vectors.safetensors', shop.ids)
    np.testing.assert_array_equal(found.rows[1:], shop.embed_items())
    vectors = pl.read_parquet(out / 'sessions.parquet')
    assert vectors['id'].to_list() == [str(n) for n in range(10)]
    np.testing.assert_array_equal(np.array(vectors['vector'].to_list(), np.float32),
                                  shop.embed_sessions([*asked, []]))


def test_a_scalar_parameter_stays_a_scalar(base_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(ENCODERS, 'decay', lambda model, **shared: tiny_served.Decay(**shared))
    tiny_served.write(tmp_path / 'run', base_dir, mllm=False, recommend='', encoder='decay')
    shop, out = written(tmp_path / 'run', tmp_path, monkeypatch)
    weights = load_file(out / 'weights.safetensors')
    program = jax.export.deserialize(bytearray((out / 'recommender.jax').read_bytes()))
    rows = tiny_served.prefixes(16)
    np.testing.assert_array_equal(program.call(weights, rows)[1], shop.first(rows, 7)[0])


def test_approximate_lists(base_dir, tmp_path, monkeypatch, capsys):
    tiny_served.write(run := tmp_path / 'run', base_dir, mixed=True)
    faiss = pytest.importorskip('faiss')
    file = tmp_path / 'sessions.jsonl'
    asked = sessions_of(tiny_served.prefixes(40))
    file.write_text(''.join(json.dumps({'session': s}) + '\n' for s in asked))
    shop, out = written(run, tmp_path, monkeypatch, '--sessions', file, '--ann')
    assert 'recall@7 of items.faiss on 40 sessions: 1.0000' in capsys.readouterr().out
    assert json.loads((out / 'export.json').read_text())['ann']['recall'] == 1
    rows, _ = shop.rows(asked)
    found, _ = ann.search(faiss.read_index(str(out / 'items.faiss')), shop.embed_sessions(asked), 7,
                          shop.shifts(rows))
    np.testing.assert_array_equal(found, shop.first(rows, 7)[0])


def test_a_small_catalogue_lowers_the_default_length_only(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(startup, 'prepare', lambda: None)
    monkeypatch.setattr(export, 'K', V + 1)
    assert export.main([str(run), str(tmp_path / 'out')]) == 0
    assert json.loads((tmp_path / 'out' / 'export.json').read_text())['k'] == V
    assert export.main([str(run), str(tmp_path / 'out'), '--k', str(V + 1)]) == 2
    assert f'k={V + 1} is out of bounds' in capsys.readouterr().err


def test_sessions_that_measure_nothing_are_refused(run, tmp_path, monkeypatch, capsys):
    """No recall is NaN, and the share of bad lines is the user's."""
    monkeypatch.setattr(startup, 'prepare', lambda: None)
    file = tmp_path / 'sessions.jsonl'
    file.write_text('{"session": ["no"]}\nnot JSON\n')
    argv = [str(run), str(tmp_path / 'out'), '--sessions', str(file), '--ann']
    assert export.main(argv) == 2
    assert '1 of 2 lines are damaged' in capsys.readouterr().err
    assert export.main([*argv, '--bad_share=0.5']) == 2
    assert 'none of them names an item of the run' in capsys.readouterr().err
    assert not (tmp_path / 'out' / 'export.json').exists()


def test_recall():
    exact = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert ann.recall(np.array([[4, 3, 9, 0], [8, 7, 6, 5]]), exact) == 0.75


@pytest.mark.parametrize(('argv', 'said'), [
    (['--ann'], '--ann needs sessions'), (['--k', '0'], 'k=0 is out of bounds'),
    (['--rows', '0'], '--rows: 0: out of range. Expected from 1 to 4096'),
    (['--sessions', '/nowhere.jsonl'], '/nowhere.jsonl does not exist')])
def test_unusable_arguments(run, tmp_path, monkeypatch, capsys, argv, said):
    monkeypatch.setattr(startup, 'prepare', lambda: None)
    assert export.main([str(run), str(tmp_path / 'out'), *argv]) == 2
    assert said in capsys.readouterr().err


def test_a_directory_that_cannot_be_made(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(startup, 'prepare', lambda: None)
    (tmp_path / 'file').write_text('')
    assert export.main([str(run), str(tmp_path / 'file')]) == 2
    assert f'{tmp_path}/file: File exists; finished work is kept' in capsys.readouterr().err
