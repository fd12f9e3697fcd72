"""The search: resumable, pure in its seed, never on test; and the command that searches configs."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from rich.console import Console

from configs import sessions as public
from tpad_jax import config as base, search as search_lib
from tpad_jax.baselines.tune import search
from tpad_jax.errors import InputError, Stopped

SPACE = {'x': ('float', -2.0, 2.0), 'rate': ('log', 1e-4, 1.0), 'n': ('int', 1, 5),
         'kind': ('choice', ('a', 'b'))}
DEFAULTS = {'x': 0.0, 'rate': 1e-2, 'n': 1, 'kind': 'b'}


def quality(params, number=0):
    del number
    value = -(params['x'] - 1) ** 2 - (np.log10(params['rate']) + 3) ** 2 + params['n'] / 9
    return {'hit@20': value + (params['kind'] == 'a'), 'mrr@20': 0.5}


def test_the_defaults_come_first_and_the_best_wins():
    best, record = search(quality, SPACE, DEFAULTS, trials=25, seed=0)
    tried = record['tried']
    assert tried[0]['params'] == DEFAULTS
    assert [one['trial'] for one in tried] == list(range(25))
    values = [one['values']['hit@20'] for one in tried]
    assert best == tried[record['best']]['params'] == tried[int(np.argmax(values))]['params']
    # random search leaves the better half of its trials about as good as the worse
    assert np.median(values[15:]) > np.median(values[:5]) + 1
    for one in tried:
        params = one['params']
        assert -2 <= params['x'] <= 2
        assert 1e-4 <= params['rate'] <= 1
        assert params['n'] in range(1, 6)
        assert params['kind'] in 'ab'
    assert {one['params']['n'] for one in tried} == set(range(1, 6))
    assert min(one['params']['rate'] for one in tried) < 1e-3  # a log axis reaches small values
    json.dumps(record, allow_nan=False)


def test_a_seed_is_a_search():
    first = search(quality, SPACE, DEFAULTS, trials=8, seed=1)
    assert search(quality, SPACE, DEFAULTS, trials=8, seed=1) == first
    assert search(quality, SPACE, DEFAULTS, trials=8, seed=2)[1]['tried'][1:] != first[1][
        'tried'][1:]


@pytest.mark.parametrize('stop', [0, 3, 8])
def test_a_stopped_search_goes_on_as_if_it_had_not_been(tmp_path, stop):
    asked = []

    def stopping(params, number):
        asked.append((number, params))
        if number == stop and len(asked) == stop + 1:
            raise Stopped
        return quality(params)

    stored = dict(storage=tmp_path / 'deep' / 'search.journal', seed=0)
    with pytest.raises(Stopped):
        search(stopping, SPACE, DEFAULTS, trials=10, **stored)
    found = search(stopping, SPACE, DEFAULTS, trials=10, **stored)
    assert found == search(quality, SPACE, DEFAULTS, trials=10, seed=0)
    assert [number for number, _ in asked] == [*range(stop + 1), *range(stop, 10)]
    assert asked[stop] == asked[stop + 1]  # the very trial that was stopped

    assert search(stopping, SPACE, DEFAULTS, trials=10, **stored) == found
    assert len(asked) == 11  # nothing was measured again
    more = search(quality, SPACE, DEFAULTS, trials=12, **stored)
    assert more == search(quality, SPACE, DEFAULTS, trials=12, seed=0)


@pytest.mark.parametrize('stop', [0, 2])
def test_a_killed_trial_is_measured_again(tmp_path, stop):
    """A kill runs no handler: the journal shows a trial that is still running."""
    code = ('import os, sys; from tests import test_search as t; '
            'from tpad_jax.baselines.tune import search; '
            f'search(lambda p, n: os._exit(9) if n == {stop} else t.quality(p), t.SPACE, '
            'defaults=t.DEFAULTS, trials=8, seed=0, storage=sys.argv[1])')
    journal = tmp_path / 'search.journal'
    done = subprocess.run([sys.executable, '-c', code, str(journal)], check=False)
    assert done.returncode == 9
    numbers = []
    found = search(lambda p, n: numbers.append(n) or quality(p), SPACE, DEFAULTS, trials=8, seed=0,
                   storage=journal)
    assert numbers == [*range(stop, 8)]
    assert found == search(quality, SPACE, DEFAULTS, trials=8, seed=0)


def test_a_search_killed_at_any_line_ends_as_if_it_had_not_been(tmp_path):
    def run(journal):
        return search(lambda params, _: {'score': -abs(params['x'] - 3)}, {'x': ('int', 0, 9)},
                      {'x': 1}, trials=3, seed=0, storage=journal)
    whole, lines = run(tmp_path / 'whole'), (tmp_path / 'whole').read_bytes().splitlines(True)
    for number, line in enumerate(lines):
        journal = tmp_path / f'{number}.journal'
        journal.write_bytes(b''.join(lines[:number]) + line[:20])
        assert run(journal) == whole, line


def test_searches_share_a_journal_by_name(tmp_path):
    stored = dict(trials=3, storage=tmp_path / 'search.journal')
    one = search(quality, SPACE, DEFAULTS, seed=0, name='one', **stored)
    assert search(quality, SPACE, DEFAULTS, seed=5, name='two', **stored) != one
    assert search(quality, SPACE, DEFAULTS, seed=0, name='one', **stored) == one
    with pytest.raises(InputError, match='one was searched with another seed in the same journal'):
        search(quality, SPACE, DEFAULTS, seed=1, name='one', **stored)
    narrow = SPACE | {'x': ('float', -1.0, 1.0)}
    with pytest.raises(InputError, match='one was searched with another space'):
        search(quality, narrow, DEFAULTS, seed=0, name='one', **stored)


def test_equals_are_told_apart_by_the_second_metric_then_by_the_first_trial():
    space, defaults = {'n': ('choice', (0, 1, 2, 3))}, {'n': 0}

    def objective(params, number):
        del number
        return {'hit@20': float(params['n'] > 0), 'mrr@20': float(params['n'] == 2)}

    for seed in range(4):
        best, record = search(objective, space, defaults, trials=15, seed=seed)
        assert best == {'n': 2}
        assert record['best'] == next(one['trial'] for one in record['tried']
                                      if one['params'] == best)


def test_a_proposal_tried_before_is_not_measured_again():
    measured = []

    def objective(params, number):
        measured.append((number, params['n']))
        return {'hit@20': 0.0}

    _, record = search(objective, {'n': ('choice', (0, 1))}, {'n': 1}, trials=12, seed=0)
    assert sorted(value for _, value in measured) == [0, 1]
    assert len(record['tried']) == record['trials'] == 12


def test_nothing_to_search_is_one_trial():
    measured = []
    best, record = search(lambda params, n: measured.append(n) or {'hit@20': 1.0}, {}, {},
                          trials=9, seed=0)
    assert (best, record['trials'], measured) == ({}, 1, [0])


def test_a_trial_that_diverges_counts_and_never_wins(tmp_path):
    def objective(params, number):
        if number in (0, 2):
            raise FloatingPointError('loss is nan')
        return quality(params)

    stored = dict(seed=0, storage=tmp_path / 'search.journal')
    best, record = search(objective, SPACE, DEFAULTS, trials=5, **stored)
    assert [one.get('failed') for one in record['tried']] == ['loss is nan', None, 'loss is nan',
                                                              None, None]
    assert record['best'] in (1, 3, 4)
    assert search(objective, SPACE, DEFAULTS, trials=5, **stored) == (best, record)

    def never(params, number):
        raise FloatingPointError('loss is nan')

    with pytest.raises(FloatingPointError, match=r'sr: all 3 trials failed, .* loss is nan'):
        search(never, SPACE, DEFAULTS, trials=3, seed=0, name='sr')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_a_metric_that_is_not_finite_is_a_failed_trial(value):
    """JSON has no nan, and a nan that came first would win."""
    def objective(params, number):
        return {'hit@20': 0.5, 'mrr@20': value} if number == 1 else quality(params)

    best, record = search(objective, SPACE, DEFAULTS, trials=4, seed=0)
    assert [('failed' in trial) for trial in record['tried']] == [False, True, False, False]
    assert best == record['tried'][record['best']]['params'] != record['tried'][1]['params']
    json.dumps(record, allow_nan=False)


@pytest.mark.parametrize(('axis', 'default', 'message'), [
    (('float', 1.0), 1.0, 'not an axis'),
    (('float', 2.0, 1.0), 1.0, 'not an axis'),
    (('log', 0.0, 1.0), 0.5, 'not an axis'),
    (('log', 1e-3, float('inf')), 0.5, 'not an axis'),
    (('choice', ()), 1, 'not an axis'),
    (('normal', 0, 1), 1, 'not an axis'),
    (('int', 1, 3), 4, 'excludes its default 4'),
    (('choice', ('a', 'b')), 'c', "excludes its default 'c'"),
])
def test_an_unusable_space_is_refused(axis, default, message):
    with pytest.raises(InputError, match=f'knn: x of .*{message}'):
        search(quality, {'x': axis}, {'x': default}, trials=2, seed=0, name='knn')
    with pytest.raises(InputError, match='trials=0: too few'):
        search(quality, SPACE, DEFAULTS, trials=0, seed=0)


def searched_config():
    config = base.get_config()
    config.search.space = ConfigDict(dict(
        stage=dict(recommend=dict(learning_rate=('log', 1e-4, 1e-2))),
        model=dict(dropout=('float', 0.0, 0.5), use_side=('choice', (True, False)))))
    return config


@pytest.fixture
def runs(monkeypatch):
    """Stands in for job.run: {trial's directory: configs it was run with}."""
    seen = {}

    def run(config, workdir, stopping=lambda: False, until=''):
        assert until == 'validation'
        seen.setdefault(workdir.name, []).append(config)
        if stopping():
            raise Stopped('stopped between stages')
        hit = 0.5 - abs(np.log10(config.stage.recommend.learning_rate) + 3) / 10
        return {'valid': {'hit@20': hit + config.model.use_side / 10, 'mrr@20': 0.1, 'ndcg@20': 0}}

    monkeypatch.setattr('tpad_jax.job.job.run', run)
    return seen


def test_a_config_is_searched_trial_by_trial(tmp_path, runs):
    config = searched_config()
    found = search_lib.search_config(config, tmp_path, trials=6)
    assert list(runs) == [f'trial_{n:03d}' for n in range(6)]
    assert runs['trial_000'][0] == config  # as it stands
    assert config == searched_config()
    for one, (tried,) in zip(found['tried'], runs.values(), strict=True):
        assert tried.stage.recommend.learning_rate == one['params']['stage.recommend.learning_rate']
        assert tried.model.dropout == one['params']['model.dropout']
        assert tried.model.use_side is one['params']['model.use_side']
        assert tried.stage.knowledge == config.stage.knowledge
    best = max(found['tried'], key=lambda one: one['values']['hit@20'])
    assert found['overrides'] == best['params']
    assert found['valid'] == best['values']
    assert list(found['valid']) == ['hit@20', 'mrr@20']
    written = json.loads((tmp_path / 'best.json').read_text())
    assert written['overrides'] == found['overrides']  # to the last digit
    assert written['trials'] == 6
    with (console := Console(width=120)).capture() as shown:
        console.print(search_lib.table(found))
    for said in ('6 trials', 'hit@20', 'learning_rate', f'{100 * found["valid"]["hit@20"]:.2f}'):
        assert said in shown.get()


def test_a_stopped_config_search_takes_its_trial_up_again(tmp_path, runs):
    config = searched_config()
    with pytest.raises(Stopped):
        search_lib.search_config(config, tmp_path, trials=4, stopping=lambda: len(runs) == 3)
    assert not (tmp_path / 'best.json').exists()
    search_lib.search_config(config, tmp_path, trials=4)
    assert {name: len(configs) for name, configs in runs.items()} == {
        'trial_000': 1, 'trial_001': 1, 'trial_002': 2, 'trial_003': 1}
    assert runs['trial_002'][0] == runs['trial_002'][1]


def test_the_workdir_of_another_search_is_refused(tmp_path, runs):
    config = searched_config()
    search_lib.search_config(config, tmp_path, trials=1)
    config.model.width = 32
    with pytest.raises(InputError, match=r'model.width was'):
        search_lib.search_config(config, tmp_path, trials=1)


def test_a_workdir_that_reads_as_a_pattern_is_refused(tmp_path, runs):
    with pytest.raises(InputError, match=r'has the character \['):
        search_lib.search_config(searched_config(), tmp_path / 'search[1]', trials=1)
    assert list(tmp_path.iterdir()) == []


def test_unusable_config_spaces_are_refused(tmp_path, runs):
    with pytest.raises(InputError, match=r'config.search.space is empty'):
        search_lib.search_config(base.get_config(), tmp_path, trials=1)
    config = searched_config()
    config.search.space.model = ConfigDict(dict(widht=('int', 8, 64)))
    with pytest.raises(InputError, match=r'names model\.widht, which'):
        search_lib.search_config(config, tmp_path, trials=1)
    config.search.space.model = ConfigDict(dict(width=('float', 8, 150)))
    with pytest.raises(InputError, match=r'model.width proposes .* another type'):
        search_lib.search_config(config, tmp_path, trials=9)


def test_the_command_refuses_in_one_sentence(tmp_path):
    done = subprocess.run([sys.executable, '-m', 'tpad_jax.search', '--config=configs/amazon.py',
                           f'--workdir={tmp_path}'], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith('tpad_jax.search: config.search.space is empty')
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize('name', public.FOUND)
def test_a_config_that_was_found_is_the_best_trial(name):
    """To three digits, and nothing else of the config is changed."""
    kept = Path(__file__).parents[1] / f'benchmarks/search/{name.replace(",", "_")}.json'
    found = json.loads(kept.read_text())
    best = max(found['tried'], key=lambda one: one['values']['hit@20'])
    assert public.FOUND[name] == pytest.approx(best['params'], rel=2e-3)
    changed = dict(base.flat(public.get_config(f'{name},found')))
    assert changed == {**dict(base.flat(public.get_config(name))), **public.FOUND[name],
                       'name': changed['name']}


def test_what_was_not_searched_is_refused():
    with pytest.raises(ValueError, match=r'may follow grocery,attention'):
        public.get_config('grocery,found')
