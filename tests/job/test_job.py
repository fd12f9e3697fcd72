"""The whole job on a very small planted catalogue: results, resume bit by bit, refusals."""

import contextlib
import json
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import amazon
from tests import tiny_report
from tests.tiny_base import SIDE, WIDTH
from tpad_jax import config as base, encode, load
from tpad_jax.core import console as console_lib, log as log_lib
from tpad_jax.data import sessions
from tpad_jax.data.sources import amazon_tables
from tpad_jax.data.synthetic import planted
from tpad_jax.errors import InputError, Stopped
from tpad_jax.evaluation import compare, slices
from tpad_jax.features import store
from tpad_jax.job import fitting, job, mirror
from tpad_jax.training import loop as loop_lib

STAGES = ('knowledge', 'transfer', 'recommend', 'joint')
MIXED = 'tpad_model', 'experts_only'
RIVALS = ('true_attributes',)  # `finished` trains the others, and recommends by the features k
BASELINES = ('content_knn', 'content_rules', 'pop', 'repeat_last', 'markov', 'sr', 'ar', 'item_knn',
             'vsknn', 'stan', 'vstan')


def make_config(base_dir):
    """The default config in the paper's form, made smaller than `tiny`."""
    c = base.get_config()
    base.tiny(c)
    c.parallel, c.save_every, c.log_every = 'jit', 2, 1
    c.skip_not_finite = 0  # as plain steps, for these programs are compiled more than they run
    c.workers = 2
    c.rivals = {name: amazon.get_config().rivals[name].to_dict()
                for name in (*RIVALS, 'lexical_only')}
    # the other losses of stage joint train in stage transfer
    for name in ('gen_transfer', 'align', 'disentangle', 'club_fit', 'discrepancy'):
        c.stage.joint.weights[name] = 0.0
    c.mllm.update(base=str(base_dir), image_size=SIDE, text_length=8)
    c.model.update(features=WIDTH, width=WIDTH, lora_rank=2)
    c.data.planted.update(items=40, train=120, valid=20, test=30)
    for name, steps in dict(knowledge=5, transfer=5, recommend=8, joint=5).items():
        c.stage[name].update(steps=steps, batch_size=16, optimiser='sgd')
    c.stage.transfer.eval_every = c.stage.recommend.eval_every = 3
    c.stage.joint.update(eval_every=2, refresh_every=3)
    return c.lock()


@pytest.fixture(scope='module')
def config(base_dir):
    """With experts that are quickly fitted; `finished` has all. What it resumes has moments."""
    moments = {f'stage__{name}__optimiser': 'adamw' for name in STAGES}
    return changed(make_config(base_dir), experts='model,cold,transitions,content',
                   skip_not_finite=base.get_config().skip_not_finite, **moments)


def changed(config, **changes):
    """A copy with some keys set, by dotted name."""
    c = ConfigDict(config).copy_and_resolve_references()
    c.update_from_flattened_dict({name.replace('__', '.'): x for name, x in changes.items()})
    return c


class Recorded(dict):
    """{run of steps: parameters it ended with} of every `fit` that came to its end."""

    def __enter__(self):
        self._patch = pytest.MonkeyPatch()
        fit = loop_lib.fit

        def recorded(loop, *args):
            out = fit(loop, *args)
            self[loop.name] = out[0]
            return out

        self._patch.setattr(loop_lib, 'fit', recorded)
        return self

    def __exit__(self, *_):
        self._patch.undo()


class Killed(Exception):
    """Stands for a kill: nothing is saved on its account."""


@contextlib.contextmanager
def stops(when):
    """A `stopping` that answers 'stop' or 'kill' after the given step of a stage, each once.

    when: {run of steps: (step, 'stop' | 'kill')}; what was done is removed.
    """
    at, original = [None, 0], console_lib.progress

    @contextlib.contextmanager
    def progress(stage, total, start=0, console=None):
        at[:] = stage, start
        with original(stage, total, start, console) as bar:
            yield bar
        at[0] = None

    def stopping():
        at[1] += 1
        step, how = when.get(at[0], (None, None))
        if step != at[1]:
            return False
        del when[at[0]]
        if how == 'kill':
            raise Killed
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(console_lib, 'progress', progress)
        yield stopping


def log_of(workdir):
    """{(run of steps, step, what): values}, each step once."""
    found = {}
    for line in log_lib.read_log(workdir / 'log.jsonl'):
        what = 'valid' if any(name.startswith('valid/') for name in line) else 'train'
        key = line['stage'], line['step'], what
        assert key not in found, f'{key} stands twice'
        found[key] = line
    return found


@pytest.fixture(scope='module')
def whole(config, tmp_path_factory):
    """An uninterrupted run: its workdir, results and every stage's final parameters."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    with Recorded() as params:
        results = job.run(changed(config, workers=0), workdir)
    return workdir, results, params


@pytest.fixture(scope='module')
def finished(base_dir, tmp_path_factory):
    """A shorter run, on raw files without images: its config, workdir, results and parameters."""
    root, config = tmp_path_factory.mktemp('finished'), make_config(base_dir)
    planted.write(root / 'raw', **config.data.planted)
    shutil.rmtree(root / 'raw' / 'images')
    before = times(root / 'raw')
    c = changed(config, data__raw_dir=str(root / 'raw'), data__core=1, data__valid=20,
                data__test=30, data__gap_hours=0.1, data__max_length=7, workers=0,
                stages='knowledge,recommend', model__recommend='k', diagnostics=0)
    c.rivals = {name: entry.to_dict() for name, entry in amazon.get_config().rivals.items()
                if name != 'knowledge_only'}
    with Recorded() as params:
        results = job.run(c, root / 'run')
    assert times(root / 'raw') == before
    return c, root / 'run', results, params


def times(directory):
    return sorted((path, path.stat().st_mtime_ns) for path in directory.rglob('*'))


# --- what a run leaves behind -------------------------------------------------------------------


@pytest.mark.slow
def test_results_hold_what_the_interface_promises(whole, config):
    workdir, returned, _ = whole
    results = json.loads((workdir / 'results.json').read_text())
    assert results.keys() == returned.keys()
    assert results.keys() >= {'data', 'audit', 'models', 'oracle', 'provenance', 'seconds'}
    data, lines = results['data'], results['data']['lines']
    assert lines['read'] == lines['kept'] + sum(lines['rejected'].values()) > 0
    assert data['sessions'] == {'train': 120, 'valid': 20, 'test': 30}
    assert (data['items'], data['items_without_image']) == (40, 0)
    assert data['images'] == {'read': 40, 'kept': 40, 'rejected': {}}
    assert 0 < data['cold_items'] < 40 < len(data['fingerprint']) == 64
    assert set(results['models']) == {'tpad', 'tpad_recommend', 'tpad_joint', *RIVALS, *BASELINES,
                                      *MIXED}
    for scores in [*results['models'].values(), {'test': results['oracle']}]:
        test = scores['test']
        for name in ('hit', 'mrr', 'ndcg', 'expected_hit'):
            assert 0 <= test[f'{name}@5'] <= test[f'{name}@10'] <= test[f'{name}@20'] <= 1
        assert test['slices'].keys() == {'warm', 'cold', 'length_1', 'length_2', 'length_3-5',
                                         'length_6+', 'repeat', 'new', *slices.QUARTILES}
        assert {'hit@20', 'mrr@20', 'ndcg@20'} <= test['slices']['cold'].keys()
        assert test['expected_hit@20'] <= results['oracle']['expected_hit@20'] + 1e-6
    for scores in results['models'].values():
        assert {'hit@20', 'mrr@20', 'ndcg@20', 'slices'} <= scores['valid'].keys()
    assert set(results['seconds']) >= {*STAGES, *RIVALS, 'knowledge_encode', 'total'}
    assert all(seconds > 0 for seconds in results['seconds'].values())
    assert results['provenance'].items() >= {'stages': list(STAGES), 'seed': config.seed}.items()


@pytest.mark.slow
def test_tpad_is_the_better_of_both_on_validation(whole):
    models = whole[1]['models']
    both = {name: models[name]['valid']['hit@20'] for name in ('tpad_recommend', 'tpad_joint')}
    assert models['tpad_model']['valid']['hit@20'] == max(both.values())
    assert models['tpad_model']['test'] == models[models['tpad']['is']]['test']


@pytest.mark.slow
def test_it_is_served_as_it_was_ranked(whole, config):
    """The chosen model, its parameters, the catalogue's rows: by every test row's first items."""
    workdir, results, _ = whole
    shop = load(workdir)
    assert shop.model == results['models']['tpad']['is']
    rows = sessions.rows(amazon_tables.load(workdir / 'data').test, config.data.max_length)
    items, _ = shop.first(rows.items[:, :shop.max_length], 10)
    above, equal = compare.read(workdir).ranks['tpad']
    found = items == rows.target[:, None]
    place = np.where(found.any(1), found.argmax(1), 10)
    # items that rules alone tell apart may have equal scores
    assert (equal == 1).mean() > 0.5
    assert (np.minimum(above, 10) <= place).all()
    assert (place <= np.minimum(above + equal - 1, 10)).all()


@pytest.mark.slow
def test_files_of_a_run(whole):
    workdir, results, _ = whole
    log = log_of(workdir)
    for stage, steps in dict(knowledge=5, transfer=5, recommend=8, joint=5).items():
        assert [s for name, s, what in log if (name, what) == (stage, 'train')] == [
            *range(1, steps + 1)]
        assert any((workdir / 'events' / stage).iterdir())
    assert [s for name, s, what in log if (name, what) == ('joint', 'valid')] == [2, 4, 5]
    assert [s for name, s, what in log if (name, what) == ('transfer', 'valid')] == [3, 5]
    assert [f.name for f in (workdir / 'figures').iterdir()] == ['contact_sheet.png']
    found = results['diagnostics']['joint']['after']
    assert found['features'].keys() == {'k_image', 'k_text', 't', 'c', 'p', 'r'}
    assert 'mi_distil' in found['held_out']
    held_out = results['diagnostics']['transfer']['after']['held_out']
    assert held_out.keys() >= {'mi_align', 'mi_distil', 'mi_disentangle'}
    assert 0 < results['diagnostics']['cka_k_r'] <= 1
    assert tiny_report.check(workdir) > 200  # every number of the page, against these files
    with np.load(workdir / 'ranks.npz') as ranks:
        rows = results['models']['tpad']['test']['rows']
        for name in results['models']:
            assert ranks[f'{name}/above'].shape == ranks[f'{name}/equal'].shape == (rows,)
        hits = (ranks['pop/above'] < 20).mean()
        assert abs(hits - results['models']['pop']['test']['hit@20']) < 0.15  # but for ties
    for name, width in (('k', (2, WIDTH)), ('r', (2 * WIDTH,))):
        rows = store.read(workdir / 'features' / 'joint', name)
        assert rows.shape == (41, *width)
        assert not rows[0].any()
        assert np.isfinite(rows).all()
        assert np.unique(rows[1:].reshape(40, -1), axis=0).shape[0] == 40


@pytest.mark.slow
def test_a_finished_run_returns_at_once(finished, monkeypatch):
    config, workdir, results, _ = finished
    monkeypatch.setattr(job.Job, 'build', lambda self: pytest.fail('built a model'))
    before = (workdir / 'results.json').read_bytes()
    assert job.run(config, workdir)['models'].keys() == results['models'].keys()
    free = changed(config, save_every=7, log_every=3, stages='recommend', parallel='shard_map')
    job.run(free, workdir)
    assert (workdir / 'results.json').read_bytes() == before


@pytest.mark.slow
@pytest.mark.parametrize(('key', 'value'), [
    ('seed', 1), ('data__planted__seed', 1), ('stage__joint__steps', 6),
    ('losses__align__stages', 'joint'), ('losses__align__weight', 0.2)])
def test_another_config_is_refused_by_the_keys_that_differ(finished, key, value):
    config, workdir, *_ = finished
    before = times(workdir)
    with pytest.raises(InputError, match=key.replace('__', r'\.') + r' was .* and is now') as told:
        job.run(changed(config, **{key: value}), workdir)
    assert str(told.value).count(' was ') == 1
    assert times(workdir) == before


@pytest.mark.slow
def test_other_data_are_refused(finished, tmp_path):
    config, workdir, *_ = finished
    shutil.copytree(workdir, tmp_path / 'run')
    raw = shutil.copytree(config.data.raw_dir, tmp_path / 'raw')
    with open(raw / 'meta_Planted.jsonl', 'a', encoding='utf-8') as file:
        file.write('\n')
    with pytest.raises(InputError, match='other raw files'):
        job.run(changed(config, data__raw_dir=str(raw)), tmp_path / 'run')


# --- resume -------------------------------------------------------------------------------------


def run_through(config, workdir, when):
    """Run again and again until it ends.

    Returns:
      Final parameters, how often the run was stopped, and how many steps it computed.
    """
    stopped, steps, lifted = 0, 0, loop_lib.lifted

    def counting(devices, spec):
        compiled = lifted(devices, spec)

        def count(*args):
            nonlocal steps
            steps += 1
            return compiled(*args)
        return count

    with stops(when) as stopping, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_lib, 'lifted', counting)
        while True:
            try:
                with Recorded() as params:  # one run of steps after the other: `stops` counts them
                    job.run(changed(config, workers=0), workdir, stopping)
                return params, stopped, steps
            except (Stopped, Killed):
                stopped += 1


@pytest.mark.slow
def test_a_run_goes_on_bit_by_bit(whole, config, tmp_path):
    """Stopped or killed in every stage; the first two by themselves first, then from a mirror."""
    workdir, where = tmp_path / 'run', str(tmp_path / 'mirror')
    when = dict(knowledge=(3, 'stop'), transfer=(4, 'kill'))
    with mirror.kept(workdir, where):
        _, stopped, steps = run_through(changed(config, stages='knowledge,transfer'), workdir, when)
    assert (stopped, when) == (2, {})
    assert 10 < steps <= 10 + 2 * config.save_every
    found = json.loads((workdir / 'results.json').read_text())
    assert set(found['models']) == set(BASELINES)
    when = dict(recommend=(5, 'kill'), joint=(3, 'stop'))
    rest, workdir = changed(config, stages='recommend,joint'), tmp_path / 'elsewhere'
    with mirror.kept(workdir, where):
        params, stopped, steps = run_through(rest, workdir, when)
    assert (stopped, when) == (2, {})
    assert 2 * 8 + 5 < steps <= 2 * 8 + 5 + 2 * config.save_every

    assert params.keys() == whole[2].keys()
    for run, final in whole[2].items():
        assert params[run].keys() == final.keys()
        for path, x in final.items():
            np.testing.assert_array_equal(params[run][path], x, err_msg=f'{run}: {path}')
    assert log_of(workdir) == log_of(whole[0])
    stored, expected = ({path.relative_to(root): path.read_bytes()
                         for path in (root / 'features').glob('*/*')}
                        for root in (workdir, whole[0]))
    assert stored == expected
    assert len(stored) == 8  # k of knowledge, r of transfer, both of joint, their manifests
    found, expected = (json.loads((d / 'results.json').read_text()) for d in (workdir, whole[0]))
    assert all(found[name] == expected[name] for name in ('models', 'diagnostics'))
    assert found['provenance']['stages'] == list(STAGES)


@pytest.mark.slow
def test_another_process_makes_the_rows_of_a_run(whole, tmp_path):
    """From the run's files alone: the same parameters, else the store refuses them."""
    workdir = shutil.copytree(whole[0], tmp_path / 'run')
    store_ = workdir / 'features' / 'knowledge'
    before = [(file.name, file.read_bytes()) for file in sorted(store_.iterdir())]
    (workdir / 'results.json').unlink()
    (store_ / 'k.npy').unlink()
    assert encode.main([str(workdir)]) == 0
    assert [(file.name, file.read_bytes()) for file in sorted(store_.iterdir())] == before


@pytest.mark.slow
def test_trainings_that_run_at_once_stop_and_resume_together(finished, tmp_path):
    """In threads, which `finished` has none of; a trained baseline is stopped."""
    config, single, expected, trained = finished
    config, workdir = changed(config, workers=2), tmp_path / 'run'
    with pytest.raises(Stopped):
        job.run(config, workdir, (workdir / 'stages' / 'id_only' / '2').is_dir)
    with Recorded() as params:
        found = job.run(config, workdir)
    for run, final in trained.items():
        for path, x in final.items():
            np.testing.assert_array_equal(params[run][path], x, err_msg=f'{run}: {path}')
    assert log_of(workdir) == log_of(single)
    assert json.loads((workdir / 'results.json').read_text())['models'] == json.loads(
        (single / 'results.json').read_text())['models']
    assert found['seconds'].keys() == expected['seconds'].keys()


@pytest.mark.slow
def test_results_without_a_provenance_are_refused(finished, tmp_path):
    config, workdir, *_ = finished
    shutil.copytree(workdir, tmp_path / 'run')
    (tmp_path / 'run' / 'results.json').write_text('{"models": {}}')
    with pytest.raises(InputError, match=r"results.json is damaged \(KeyError: 'provenance'\)"):
        job.run(config, tmp_path / 'run')


def test_a_stop_between_stages_is_heeded(config, tmp_path):
    with pytest.raises(Stopped, match='between stages'):
        job.run(changed(config, workers=0), tmp_path / 'run', lambda: True)
    assert not (tmp_path / 'run' / 'stages').exists()


# --- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(('changes', 'told'), [
    (dict(stages='transfer'), "stage transfer reads the rows 'k', which stage knowledge makes"),
    (dict(stages='knowledge,recommend'), "stage recommend reads the rows 'r'"),
    (dict(stages='knowledge,joint'), "stage joint reads the rows 'r', which stage transfer makes"),
    (dict(stages='recommend,transfer'), 'each once and in this order'),
    (dict(stages=''), 'Expected one or more of'),
    (dict(losses__align__fn='infonse'), "config.losses.align.fn='infonse': it cannot be found"),
    (dict(losses__align__x='kk'), 'config.losses.align: it reads kk, which no stage computes'),
    (dict(stage__transfer__batch_size=0), 'config.stage.transfer.batch_size=0 is not usable'),
    (dict(stage__joint__batch_size=12, parallel='pmap'), 'must be a multiple of 8'),
    (dict(stage__joint__accumulate=5), 'must be a multiple of .* times 5 part'),
    (dict(stage__transfer__rates=(('^club/', 0),)), 'rates=.* Expected pairs'),
    (dict(stage__transfer__train='^adapter/'), 'no stage trains the Transfer-MLLM'),
    (dict(losses__distil__weight=0.0), 'no loss of the stage trains critic.distil'),
    (dict(model__form='full'), "config.model.form is 'full'. Fix: set it to 0"),
    (dict(parallel='threads'), "config.parallel='threads' is not usable"),
    (dict(devices=9), 'config.devices=9: 8 devices are available'),
    (dict(data__raw_dir='/no/such/place'), '/no/such/place: no such directory'),
    (dict(mllm__base='/no/such/base'), "/no/such/base/config.json: not the config of a base"),
    (dict(mllm__image_size=64), f'image_size=64: the small base .* Expected {SIDE}'),
])
def test_refused_before_anything_is_made(config, tmp_path, changes, told):
    with pytest.raises(InputError, match=told):
        job.run(changed(config, **changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_workdir_that_cannot_be_made_is_refused(config, tmp_path):
    (tmp_path / 'file').write_text('not a directory')
    for workdir in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        with pytest.raises(InputError, match='cannot be created'):
            job.run(config, workdir)
    assert (tmp_path / 'file').read_text() == 'not a directory'


def test_unusable_data_leave_the_workdir_free(config, tmp_path):
    with pytest.raises(InputError, match=r'config\.data\.min_length=50: all '):
        job.run(changed(config, data__min_length=50), tmp_path / 'run')
    assert not (tmp_path / 'run' / 'config.json').exists()
    assert not (tmp_path / 'run' / 'data' / amazon_tables.FINISHED).exists()


# --- seeds and raw files ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_seed_draws_parameters_and_order_but_not_the_catalogue(whole, config, tmp_path):
    workdir = tmp_path / 'run'
    with Recorded() as params, pytest.raises(Stopped):
        job.run(changed(config, seed=config.seed + 1, workers=0), workdir,
                (workdir / 'stages' / 'knowledge' / fitting.DONE).is_file)
    for path, x in params['knowledge'].items():
        assert not np.array_equal(x, whole[2]['knowledge'][path]), path
    raw = (directory / 'raw' / 'Planted.jsonl' for directory in (workdir, whole[0]))
    assert len({file.read_bytes() for file in raw}) == 1


@pytest.mark.slow
def test_raw_files_without_images_are_read_where_they_lie(finished):
    _, workdir, results, _ = finished
    assert 'oracle' not in results
    assert set(results['models']) == {'tpad', 'tpad_recommend', 'id_only', 'lexical_only',
                                      'id_only_experts', *BASELINES, *MIXED}
    assert not any('expected_hit@20' in scores['test'] for scores in results['models'].values())
    data = results['data']
    assert not data['planted']
    assert (data['items'], data['items_without_image']) == (40, 40)
    assert data['sessions'] == {'train': 120, 'valid': 20, 'test': 30}
    assert data['images'] == {'read': 0, 'kept': 0, 'rejected': {}}
    assert not (workdir / 'raw').exists()


@pytest.mark.slow
def test_raw_files_are_the_sessions_that_were_planted(whole, finished):
    found, expected = finished[2]['data'], whole[1]['data']
    assert found == {**expected, 'planted': False, 'items_without_image': 40,
                     'images': {'read': 0, 'kept': 0, 'rejected': {}},
                     'fingerprint': found['fingerprint']}
