"""The job on ready-made sessions of ids: selection, refit, resume, and what is refused."""

import json
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest

from benchmarks import sessions as table
from configs import sessions as configs
from tpad_jax.errors import InputError, Stopped
from tpad_jax.job import job, recommenders, results
from tpad_jax.training import handover


def write(path):
    """240 sessions over 30 items: an item is mostly followed by the next but two."""
    rng, parts = np.random.default_rng(0), {}
    for name, count in (('train', 200), ('test', 40)):
        lengths = rng.integers(2, 9, count)
        steps = np.where(rng.random(lengths.sum()) < 0.8, 2, rng.integers(0, 30, lengths.sum()))
        offsets = np.append(0, np.cumsum(lengths))
        items = [1 + (rng.integers(30) + np.cumsum(steps[a:b])) % 30
                 for a, b in pairwise(offsets)]
        parts |= {f'{name}_items': np.concatenate(items), f'{name}_offsets': offsets}
    np.savez(path, **parts)
    return path


@pytest.fixture(scope='module')
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp('ready') / 'made.npz')


def config(file, encoder='attention', **changes):
    c = configs.get_config(f'diginetica,{encoder}')
    c.parallel, c.data.npz, c.search.trials = 'jit', str(file), 1
    c.model.update(width=8, features=8)
    c.losses.next_item.chunk = 8
    c.stage.recommend.update(steps=12, eval_every=4, batch_size=16, learning_rate=1e-2,
                             optimiser='sgd')
    c.save_every, c.log_every, c.skip_not_finite = 5, 1, 0
    if c.partner:
        c.partner.model.update(width=6, features=8)
        c.partner.stage.recommend.update(steps=8, eval_every=4, batch_size=16)
    c.update_from_flattened_dict(changes)
    return c


@pytest.fixture(scope='module')
def runs(tmp_path_factory, file):
    """Encoder -> workdir and results of its run, each made once."""
    @lru_cache
    def made(encoder):
        workdir = tmp_path_factory.mktemp(encoder)
        return workdir, job.run(config(file, encoder), workdir)
    return made


@pytest.mark.parametrize('encoder', [  # sr_gnn is the mixture's partner
    'attention', *(pytest.param(name, marks=pytest.mark.slow) for name in ('gce_gnn', 'mixture'))])
def test_chosen_on_validation_refitted_and_tested_once(runs, file, encoder):
    tmp_path, results = runs(encoder)
    own = config(file, encoder).model.encoder
    model = results['models'][own]
    history = [json.loads(line) for line in (tmp_path / 'log.jsonl').read_text().splitlines()]
    scores = {line['step']: line['valid/nll'] for line in history
              if 'valid/nll' in line and line['stage'] == 'recommend'}
    assert sorted(scores) == [4, 8, 12]
    best = model['valid']['step']
    assert scores[best] == min(scores.values())
    assert max(line['step'] for line in history if line['stage'] == 'refit') == best
    assert results['data']['refit']
    assert results['data']['protocol'] == 'ours'
    encoder = 'mixture' if encoder == 'mixture' else own
    model = results['models'][encoder]
    assert results['models'].keys() >= {own, encoder, 'pop', 'vsknn', 'stan', 'vstan', 'sr'}
    ranks = np.load(tmp_path / 'ranks.npz', allow_pickle=False)
    hit = np.clip((20 - ranks[f'{encoder}/above']) / ranks[f'{encoder}/equal'], 0, 1).mean()
    np.testing.assert_allclose(model['test']['hit@20'], hit, atol=1e-6)
    gap = table.cell(tmp_path)['difference']['hit@20']
    best = max(m['test']['hit@20'] for name, m in results['models'].items() if name != encoder)
    np.testing.assert_allclose(gap['difference'], model['test']['hit@20'] - best, atol=1e-5)


def test_until_validation_never_looks_at_test(tmp_path, file, monkeypatch):
    monkeypatch.setattr(results, 'report', None)
    monkeypatch.setattr(recommenders, '_refit', None)
    found = job.run(config(file), tmp_path, until='validation')
    assert found['valid'].keys() >= {'step', 'hit@20', 'mrr@20', 'nll'}
    assert not (tmp_path / 'results.json').exists()


@pytest.mark.slow
def test_the_published_protocol_may_score_last_items_only(tmp_path, runs, file):
    _, ours = runs('attention')
    theirs = job.run(config(file, **{'data.published_last_only': True, 'refit': False,
                                     'experts': '', 'data.protocol': 'published'}), tmp_path)
    assert theirs['models']['pop']['test']['rows'] == 40
    assert ours['models']['pop']['test']['rows'] > 100
    assert theirs['data']['protocol'] == 'published'
    assert not theirs['data']['refit']


@pytest.mark.parametrize(('changes', 'told'), [
    ({'stages': 'knowledge,recommend'}, 'item ids without content'),
    ({'model.recommend': 'k'}, 'item ids without content'),
    ({'data.raw_dir': 'somewhere'}, 'two sources'),
    ({'data.npz': 'nowhere.npz'}, 'not a file'),
    ({'model.heads': 3}, 'must be a multiple of'),
    ({'losses.next_item.dtype': 'float8'}, 'dtype')])
def test_refusals(tmp_path, file, changes, told):
    with pytest.raises(InputError, match=told):
        job.run(config(file, **changes), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_only_attention_reads_every_prefix_at_once(tmp_path, file):
    changes = {'losses.next_item.h': 'h_each'}
    with pytest.raises(InputError, match='reads h_each, which stage recommend does not'):
        job.run(config(file, 'sr_gnn', **changes), tmp_path)


@pytest.mark.parametrize('variant', ['tmall', 'diginetica,gru', ''])
def test_unknown_variants_are_named(variant):
    if variant:
        with pytest.raises(ValueError, match='has no variant'):
            configs.get_config(variant)
    else:
        assert configs.get_config().name == 'sessions_attention'


# --- two recommenders whose scores are added ----------------------------------------------------


@pytest.mark.slow
def test_a_mixture_stopped_anywhere_ends_as_if_it_had_not_been(tmp_path, runs, file):
    """Both are refitted, each for its own steps, and the partner sees its own config alone."""
    c = config(file, 'mixture')
    workdir, whole = runs('mixture')
    lines = (workdir / 'log.jsonl').read_text().splitlines()
    last = {}
    for line in map(json.loads, lines):
        last[line['stage']] = line['step']
    chosen = {name: whole['models'][name]['valid']['step'] for name in ('attention', 'sr_gnn')}
    assert last == {'recommend': 12, 'partner': 8, 'refit': chosen['attention'],
                    'partner_refit': chosen['sr_gnn']}
    told = ''
    c.workers = 0  # one after the other, so that the stops fall at the same steps everywhere
    for most in (15, 12, 14, 10):  # a step, or a pause between parts, is asked once
        asked = iter(range(most))
        with pytest.raises(Stopped) as stopped:
            job.run(c, tmp_path / 'cut', lambda asked=asked: next(asked, None) is None)
        told += f'{stopped.value}; '
    assert 'in stage refit after' in told, told
    assert (tmp_path / 'cut/stages/partner_refit').is_dir()
    cut = job.run(c, tmp_path / 'cut')
    assert cut['models'] == whole['models']


@pytest.mark.parametrize(('changes', 'told'), [
    (dict(model=dict(depth=3)), 'config.partner does not fit the config'),
    (dict(model=dict(encoder='gru')), 'Expected one of attention, sr_gnn, gce_gnn'),
    (dict(stage=dict(recommend=dict(batch_size=0))), 'a whole number from 1'),
    (dict(model=dict(features=32)), r'changes model\.features, which both recommenders share'),
    (dict(data=dict(valid=0.2)), r'changes data\.valid, which both recommenders share')])
def test_a_partner_that_cannot_be_is_refused(tmp_path, file, changes, told):
    c = config(file, 'attention')
    c.partner = changes
    with pytest.raises(InputError, match=told):
        job.run(c, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_a_partner_keeps_what_it_does_not_change():
    c = configs.get_config('grocery')
    other = handover.partnered(c)
    assert other.model.encoder == 'sr_gnn'
    assert not other.partner
    assert (other.seed, other.data.to_dict()) == (c.seed, c.data.to_dict())
    assert c.model.encoder == 'attention'
    c.stages, c.refit = 'recommend,joint', False
    with pytest.raises(InputError, match=r'config\.partner adds .* joint does not train'):
        job.run(c, 'nowhere')
