"""`tpad_jax.load`: the lists evaluation ranked, new items, and what is refused."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import tpad_jax
from tests import tiny_served
from tests.tiny_served import N, V
from tpad_jax.data.events import NOW, columns
from tpad_jax.errors import InputError
from tpad_jax.evaluation.metrics import top
from tpad_jax.models.sessions import ENCODERS
from tpad_jax.serving import artifact, calls, recommender, session_files, topk


@pytest.fixture(scope='module')
def made(base_dir, tmp_path_factory):
    """A run's workdir, its job, scorer, and the recommender."""
    workdir = tmp_path_factory.mktemp('served') / 'run'
    job, scores = tiny_served.write(workdir, base_dir, reads=True)
    return workdir, job, scores, tpad_jax.load(workdir)


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made[0], tmp_path / 'run')
    return tmp_path / 'run'


# --- the lists ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('model', [
    dict(mllm=False, recommend='', normalise=False, repeats=True, mixed=True),
    dict(encoder='gce_gnn', id_dropout=0.0, use_side=False, mixed=True),
    dict(partner=dict(model=dict(encoder='attention', width=24, repeats=True)))],
    ids=['ids', 'graph', 'partner'])
def test_lists_are_those_evaluation_ranks(base_dir, tmp_path, model):
    _, scores = tiny_served.write(tmp_path / 'run', base_dir, **model)
    shop = tpad_jax.load(tmp_path / 'run')
    rows = tiny_served.prefixes(calls.SIZES[1] + 5)
    items, found = shop.first(rows, 7)
    whole = scores(rows)
    np.testing.assert_array_equal(items, top(whole, 7))
    np.testing.assert_allclose(found, np.take_along_axis(whole, items, 1), rtol=1e-4, atol=1e-5)


def test_an_encoder_from_outside_with_a_scalar_is_served_once_it_is_registered(
        base_dir, tmp_path, monkeypatch):
    with monkeypatch.context() as registered:
        registered.setitem(ENCODERS, 'decay', lambda model, **shared: tiny_served.Decay(**shared))
        _, scores = tiny_served.write(tmp_path / 'run', base_dir, mllm=False, recommend='',
                                      encoder='decay')
        rows = tiny_served.prefixes(3)
        items, _ = tpad_jax.load(tmp_path / 'run').first(rows, 7)
        np.testing.assert_array_equal(items, top(scores(rows), 7))
    with pytest.raises(InputError, match=r"config\.model\.encoder='decay': it is not registered.*"
                       r'import the module that adds it to tpad_jax\.models\.sessions\.ENCODERS'):
        tpad_jax.load(tmp_path / 'run')


def test_an_encoder_that_a_config_names_by_its_module_is_served_while_its_code_fits(
        base_dir, tmp_path, monkeypatch):
    name = 'tests.tiny_served:decay'
    _, scores = tiny_served.write(tmp_path / 'run', base_dir, mllm=False, recommend='',
                                  encoder=name)
    rows = tiny_served.prefixes(3)
    items, _ = tpad_jax.load(tmp_path / 'run').first(rows, 7)
    np.testing.assert_array_equal(items, top(scores(rows), 7))
    monkeypatch.setattr(tiny_served, 'Decay', tiny_served.Other)
    with pytest.raises(InputError, match=f"config.model.encoder='{name}' does not take the "
                       'parameters of the run .ScopeParamNotFoundError'):
        tpad_jax.load(tmp_path / 'run')
    monkeypatch.delattr(tiny_served, 'decay')
    with pytest.raises(InputError, match=f"encoder='{name}': it cannot be built .AttributeError"):
        tpad_jax.load(tmp_path / 'run')


@pytest.mark.parametrize(('total', 'chunk', 'k'), [(700, 64, 5), (700, 64, 50), (64, 64, 60),
                                                   (1000, 1024, 10), (5000, 1024, 1)])
def test_top_k_is_exact_and_ties_go_by_item(total, chunk, k):
    rng = np.random.default_rng(k)
    # products are whole numbers: many are tied
    h = rng.integers(-3, 4, (300, 6)).astype(np.float32)
    z = rng.integers(-2, 3, (topk.rounded(total + 1, chunk), 6)).astype(np.float32)
    z[total + 1:] = 100  # no items, however high they would score
    scores, items = topk.top_k(h, z, total + 1, k, chunk=chunk)
    whole = h @ z[:total + 1].T
    np.testing.assert_array_equal(items, top(whole, k))
    np.testing.assert_array_equal(scores, np.take_along_axis(whole, np.asarray(items), 1))


def test_lists_of_a_run_with_content(made):
    *_, scores, shop = made
    rows = tiny_served.prefixes(40)
    np.testing.assert_array_equal(shop.first(rows, 20)[0], top(scores(rows), 20))


def test_sessions_of_ids(made):
    *_, scores, shop = made
    long = [f'I{n}' for n in range(1, N + 4)]
    found = shop.recommend([['I3', 'no such', 'I4'], long, [], ['nor this']], k=5)
    rows = np.zeros((2, N), np.int32)
    rows[0, :2], rows[1] = (3, 4), np.arange(4, N + 4)  # the last N items of a longer session
    assert found.items[:2] == [[f'I{n}' for n in row] for row in top(scores(rows), 5)]
    assert found.unknown == [['no such'], [], [], ['nor this']]
    assert found.empty.tolist() == [False, False, True, True]
    events = np.bincount(made[1].data.train.items, minlength=V + 1)[1:]
    popular = [f'I{n + 1}' for n in np.argsort(-events, kind='stable')[:5]]
    assert found.items[2] == found.items[3] == popular
    assert np.isnan(found.scores[2:]).all()
    assert np.isfinite(found.scores[:2]).all()
    assert shop.recommend([], k=5).items == []


def test_times_kinds_and_earlier_items_are_read_and_may_be_missing(base_dir, made, tmp_path):
    _, scores = tiny_served.write(tmp_path / 'run', base_dir, mllm=False, recommend='',
                                  event_time=True, event_kind=True, history=True)
    about = tmp_path / 'run' / artifact.FOLDER / artifact.ABOUT
    about.write_text(json.dumps(json.loads(about.read_text()) | {'kinds': ['view', 'buy']}))
    shop = tpad_jax.load(tmp_path / 'run')
    sessions = [['I3', 'no such', 'I4'], ['I5']]
    events = [{'times': [0, 2000, 5000], 'kinds': ['buy', 'buy', 'other'], 'now': 9000,
               'earlier': ['I1', 'nor this', 'I2']}, {'kinds': None}]
    where = columns(('gap', 'date', 'kind', 'past'), N)
    rows = np.zeros((2, N + where['past'].stop), np.int32)
    rows[0, :2], rows[1, 0] = (3, 4), 5
    context = rows[:, N:]
    context[:, where['date']] = NOW
    context[0, where['gap']][:2] = 3, 3  # 5 s between the two that are known, then 4 s
    context[0, where['kind']][0] = 2
    context[0, where['past']][:2] = 2, 1
    given = calls.with_events(shop, rows[:, :N], sessions, events)
    np.testing.assert_array_equal(given, rows)
    found = shop.recommend(sessions, k=5, events=events)
    np.testing.assert_array_equal(
        found.items, [[f'I{n}' for n in row] for row in top(scores(rows), 5)])
    np.testing.assert_array_equal(  # without any, they are not known
        shop.recommend(sessions, k=5).items,
        [[f'I{n}' for n in row] for row in top(scores(rows[:, :N]), 5)])
    best = found.items[0][0]
    why = shop.recommend(sessions, 5, {'not_items': [best]}, events=events, explain=True).why[0]
    assert why['missing'] == [{'item': best, 'by': ['not_items']}]  # of the list with these events
    file = tmp_path / 'sessions.jsonl'
    file.write_text(''.join(json.dumps({'session': session, **event}) + '\n' for session, event in
                            [*zip(sessions, events, strict=True), (['I5'], {'times': [1, 2]})]))
    source = session_files.Source(str(file))
    assert [asked.events for asked in source] == events
    file.write_text('{"session": [3], "earlier": [1, 2]}\n')  # ids that are numbers
    assert [asked.events for asked in session_files.Source(str(file))] == [{'earlier': ['1', '2']}]
    assert source.rejected == {'unusable_times_kinds_now_or_earlier': 1}
    for bad in [[{}]], [{'times': [1]}, {}], [{'times': [1, 2, float('nan')]}, {}], [{'x': 1}, {}]:
        with pytest.raises(InputError, match='not one for each session'):
            shop.recommend(sessions, events=bad)
    with pytest.raises(InputError, match='reads item ids alone'):
        made[3].recommend(sessions, events=events)


def test_more_sessions_than_a_call_holds_and_one_compilation_per_size(made):
    shop = recommender.load(made[0])
    rows = tiny_served.prefixes(calls.SIZES[-1] + 3)
    items, _ = shop.first(rows, 5)
    for begin in range(0, len(rows), 50):
        np.testing.assert_array_equal(shop.first(rows[begin:begin + 50], 4)[0],
                                      items[begin:begin + 50, :4])
    shop.first(rows[:2], 6), shop.first(rows[:1], 7)
    assert shop._search._cache_size() == len(calls.SIZES)


def test_vectors_score(made):
    *_, scores, shop = made
    rows = tiny_served.prefixes(9)
    sessions = [[f'I{n}' for n in row if n] for row in rows]
    h, z = shop.embed_sessions([*sessions, []]), shop.embed_items()
    assert z.shape == (V, h.shape[1])
    assert np.isnan(h[-1]).all()
    np.testing.assert_allclose(h[:-1] @ z.T, scores(rows)[:, 1:], rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(shop.embed_items(['I7', 'I2']), z[[6, 1]])
    with pytest.raises(InputError, match=r"1 of 2 ids are not in the catalogue, 'x'"):
        shop.embed_items(['I1', 'x'])


@pytest.mark.parametrize('k', [0, V + 1, True, 2.0, '5'])
def test_k_out_of_bounds(made, k):
    with pytest.raises(InputError, match=f'Expected a whole number from 1 to {V}'):
        made[-1].recommend([['I1']], k=k)


def test_the_default_k_is_at_most_the_catalogue(made, monkeypatch):
    shop = made[-1]
    assert len(shop.recommend([['I1']]).items[0]) == 20
    monkeypatch.setattr(shop, 'table', shop.table._replace(count=6))
    assert sorted(shop.recommend([['I1']]).items[0]) == [f'I{n}' for n in range(1, 6)]


@pytest.mark.parametrize('session', ['I1', [1], None, {'I1': 0}])
def test_what_is_no_session(made, session):
    with pytest.raises(InputError, match='session 1 is not a list of item ids'):
        made[-1].recommend([['I1'], session])


# --- new items ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize('model', [
    dict(reread=False, partner=dict(model=dict(encoder='attention', width=24))),
    dict(recommend='k,r', id_dropout=0.0, mixed='lasso'), dict(recommend='given', mixed='lasso')],
    ids=['adapter, partner', 'k and r', 'given'])
def test_a_new_item_is_read_as_the_catalogue_was(base_dir, tmp_path, model):
    """The cold items once more under other names: with pictures and without."""
    tiny_served.write(tmp_path / 'run', base_dir, reads=True, **model)
    shop = tpad_jax.load(tmp_path / 'run')
    cold = range(V - 4, V + 1)
    assert shop._reader is None, 'an MLLM was loaded before there was a new item'
    given = model.get('recommend') == 'given'
    brought = {n: {'features': tiny_served.GIVEN[n].tolist()} if given else {} for n in cold}
    vectors = shop.add_items([{'id': f'new {n}', **tiny_served.fields(n), **brought[n]}
                              for n in cold])
    read_on = {x.device for x in jax.tree.leaves(shop._reader._recommenders)}
    assert shop._z.device not in read_on, 'a list waits while an item is read'
    like = shop.embed_items([f'I{n}' for n in cold])
    assert np.abs(like).max() > 0.01
    np.testing.assert_allclose(vectors, like, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(shop.embed_items([f'new {n}' for n in cold]), vectors)
    assert shop.titles[-1] == f'item {V}'


def test_adding_an_item_copies_no_table(copy):
    """The vector is written into free rows of the device's table, and snapshots stay valid."""
    shop = recommender.load(copy)
    shop.first(shop.rows([['I1']])[0], 5)
    where, ids, before = shop._z.unsafe_buffer_pointer(), shop.ids, shop.table
    shop.add_items([{'id': 'new', **tiny_served.fields(V)}])
    assert shop._z.unsafe_buffer_pointer() == where
    assert shop.ids is ids
    assert (before.count, shop.table.count) == (V + 1, V + 2)
    assert shop.rows([['new', 'I1']], before)[1] == [['new']]
    with pytest.raises(InputError):
        shop.first(shop.rows([['I1']])[0], V + 1, before)


def test_a_new_item_is_recommended_and_clicked(made, copy):
    shop = recommender.load(copy)
    rows = tiny_served.prefixes(20)
    sessions = [[f'I{n}' for n in row if n] for row in rows]
    before = shop.recommend(sessions, k=V)
    size = shop._search._cache_size()
    shop.add_items([{'id': 'new', **tiny_served.fields(V)}])
    after = shop.recommend(sessions, k=V)
    assert shop._search._cache_size() == size, 'one item more was compiled for'
    assert sum('new' in items for items in after.items) > 10
    for old, new in zip(before.items, after.items, strict=True):  # its twin stands before it
        assert [x for x in new if x != 'new'] == old[:V - ('new' in new)]
    both = shop.recommend([['I1', 'new'], ['I1', f'I{V}']], k=5)
    assert both.items[0] == both.items[1]
    assert both.unknown == [[], []]


@pytest.mark.parametrize(('change', 'said'), [
    (dict(id='I3'), "item id 'I3' exists"),
    (dict(id=''), 'new item 0 has no id'),
    (dict(colour='red'), "item new has the field 'colour'. Expected"),
    (dict(image=b'GIF', title='x'), 'item new: its picture cannot be used'),
    (dict(image='/nowhere.png'), 'item new: /nowhere.png is not read'),
    (dict(image=b'', title='', brand='', category='', description=''), 'neither a text nor a pict'),
    (dict(price='cheap'), "its price 'cheap' is not a number"),
    (dict(image=3), 'its image is neither bytes nor a path'),
    (dict(features=[1.0]), 'brings features, but the run computes those of an item'),
    (dict(brand='x' * 70_000), 'its brand has more than 65536 characters'),
    (dict(text=3), 'its text is not a text')])
def test_unusable_new_items(made, change, said):
    shop = made[-1]
    with pytest.raises(InputError, match=said):
        shop.add_items([{'id': 'whole', 'title': 'x'},
                        {'id': 'new', **tiny_served.fields(3), **change}][::-1])
    assert len(shop.ids) == V + 1, 'a part of the items was added'


def test_a_run_of_ids_alone_reads_no_items(base_dir, tmp_path):
    tiny_served.write(tmp_path / 'run', base_dir, mllm=False, recommend='')
    with pytest.raises(InputError, match='the run has item ids only'):
        tpad_jax.load(tmp_path / 'run').add_items([{'id': 'new', 'text': 'a thing'}])


@pytest.mark.parametrize('features', [
    None, [1.0], ['x'] * 12, ['1'] * 12, [True] * 12, [[1.0] * 12], [float('inf')] * 12,
    [1e39] * 12, 'x', {}])
def test_unusable_features_of_a_new_item(given_run, features):
    with pytest.raises(InputError, match='item new has no usable features'):
        given_run.add_items([{'id': 'new', 'title': 'x', 'features': features}])


@pytest.fixture(scope='module')
def given_run(base_dir, tmp_path_factory):
    """A run that recommends from features computed elsewhere."""
    workdir = tmp_path_factory.mktemp('given') / 'run'
    tiny_served.write(workdir, base_dir, recommend='given')
    return tpad_jax.load(workdir)


def test_a_base_that_moved(made, copy, base_dir, tmp_path):
    moved = shutil.copytree(base_dir, tmp_path / 'moved')
    about = json.loads((copy / 'served/served.json').read_text())
    about['mllm']['base'] = str(tmp_path / 'gone')
    for name in ('memory', 'lora_by_kind', 'modality_dropout'):  # an artefact older than these
        del about['models'][0][name]
    (copy / 'served/served.json').write_text(json.dumps(about))
    item = {'id': 'new', **tiny_served.fields(V)}
    with pytest.raises(InputError, match=r'cannot be read .*give its directory, base=DIR'):
        recommender.load(copy).add_items([item])
    found = recommender.load(copy, base=moved).add_items([item])
    np.testing.assert_allclose(found, made[-1].embed_items([f'I{V}']), rtol=1e-4, atol=1e-5)
    (moved / 'config.json').write_text((moved / 'config.json').read_text() + '\n')
    with pytest.raises(InputError, match='is not the base of the run'):
        recommender.load(copy, base=moved).add_items([item])


# --- what is refused ----------------------------------------------------------------------------


def test_no_run_and_an_unfinished_one(copy, tmp_path):
    with pytest.raises(InputError, match=r'does not hold a run: config\.json is missing'):
        tpad_jax.load(tmp_path / 'nowhere')
    (copy / 'results.json').unlink()
    with pytest.raises(InputError, match=r'is not finished: results\.json is missing'):
        tpad_jax.load(copy)


@pytest.mark.parametrize('name', ['served.json', 'model.safetensors', 'items.parquet',
                                  'reader.safetensors'])
@pytest.mark.parametrize('damage', ['cut', 'bit', 'gone'])
def test_damaged_files(copy, name, damage):
    file = copy / 'served' / name
    data = bytearray(file.read_bytes())
    if damage == 'gone':
        file.unlink()
    else:
        data[len(data) // 2] ^= 255
        file.write_bytes(data[:len(data) // 2] if damage == 'cut' else data)
    said = 'does not exist|is missing' if damage == 'gone' else 'damaged'
    with pytest.raises(InputError, match=said) as error:
        tpad_jax.load(copy)
    assert 'delete results.json' in str(error.value)


def test_the_package_itself_imports_nothing():
    code = 'import sys, tpad_jax; sys.exit(bool({"jax", "numpy", "flax"} & set(sys.modules)))'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


def test_serving_imports_no_training():
    code = ('import sys, tpad_jax.serving; sys.exit(bool({"optax", "orbax", "transformers", '
            '"tensorflow_datasets"} & set(sys.modules)))')
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0
