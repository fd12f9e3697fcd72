"""A metric of the config's: in results, tables and comparisons; what cannot be one is refused."""

import json

import numpy as np
import pytest
from rich.console import Console

from tests import tiny_report
from tpad_jax import config
from tpad_jax.errors import InputError
from tpad_jax.evaluation import compare, metrics, tables
from tpad_jax.job import results, validate
from tpad_jax.report import page


def precision(place, k):
    """One relevant item among the first k."""
    return np.full(len(place), 1 / k)


def late(place, k):
    return place / k


def first(place, k):
    return place == 1


def short(place, k):
    return place[1:]


def broken(place, k):
    return 1 / (place - 1)


HERE = 'tests.evaluation.test_added_metrics'


def test_a_metric_is_one_line_of_the_config(tmp_path):
    job = tiny_report.fake_job(tmp_path)
    job.config.metrics.precision = f'{HERE}:precision'
    job.config.metrics.late = f'{HERE}:late'
    models, ranks = results.score_models(job, {'a': tiny_report.scorer_of(0),
                                               'b': tiny_report.scorer_of(1)}, {}, {})
    test = models['a']['test']
    for k in (5, 10, 20):
        assert test[f'precision@{k}'] == pytest.approx(test[f'hit@{k}'] / k)
    above, equal = ranks['a']['above'], ranks['a']['equal']
    assert (equal == 1).all()
    assert test['late@20'] == pytest.approx(np.where(above < 20, (above + 1) / 20, 0).mean())
    assert test['expected_precision@10'] == pytest.approx(test['expected_hit@10'] / 10)
    assert test['slices']['warm']['precision@20'] == pytest.approx(
        test['slices']['warm']['hit@20'] / 20)
    assert models['a']['valid']['precision@20'] == pytest.approx(
        models['a']['valid']['hit@20'] / 20)
    low, high = test['interval']['precision@20']
    assert low < test['precision@20'] < high
    assert results.oracle_scores(job)[0]['late@20'] > 0

    found = {'models': models, 'data': {}}
    results.write(job, found, ranks)
    with (console := Console(width=150)).capture() as printed:
        console.print(tables.table(found))
    assert 'precision@20' in printed.get()
    assert f'{100 * test["late@20"]:.2f}' in printed.get()
    # the comparison reads the values that the run stored, and imports nothing
    run = compare.read(tmp_path)
    compared = compare.compare([run], [run], ('a', 'b'))
    assert compared['metrics'] == ['hit@20', 'mrr@20', 'ndcg@20', 'late@20', 'precision@20']
    cell = compared['slices']['all']
    assert cell['late@20']['a'] == pytest.approx(test['late@20'])
    assert cell['precision@20']['difference'] == pytest.approx(cell['hit@20']['difference'] / 20)
    # runs that mean different things by a name are compared without it
    other = run._replace(gains={**run.gains, 'late': run.gains['late'] / 2})
    assert 'late@20' not in compare.compare([run], [other], ('a', 'b'))['metrics']
    with (console := Console(width=150)).capture() as printed:
        compare.show(compared, console)
    assert 'late@20, %' in printed.get()


def test_the_page_shows_it(tmp_path):
    tiny_report.write(tmp_path / 'run', metrics={'late': f'{HERE}:late'})
    page.write(tmp_path / 'run')
    assert tiny_report.check(tmp_path / 'run') > 120
    assert 'late@20' in (tmp_path / 'run' / 'report' / 'index.html').read_text()


def test_a_metric_of_booleans_is_stored_as_numbers(tmp_path):
    job = tiny_report.fake_job(tmp_path)
    job.config.metrics.first = f'{HERE}:first'
    models, ranks = results.score_models(job, {'a': tiny_report.scorer_of(0)}, {}, {})
    results.write(job, {'models': models}, ranks)
    gain = compare.read(tmp_path).gains['first']
    assert gain.dtype == np.float64
    np.testing.assert_array_equal(gain, np.eye(compare.AT)[0])
    assert models['a']['test']['first@20'] == pytest.approx((ranks['a']['above'] == 0).mean())


@pytest.mark.parametrize(('name', 'path', 'told'), [
    ('hit', f'{HERE}:precision', 'the name cannot be used'),
    ('expected_hit', f'{HERE}:precision', 'the name cannot be used'),
    ('a@b', f'{HERE}:precision', 'the name cannot be used'),
    ('mine', 'no_such_module:precision', 'No module named'),
    ('mine', f'{HERE}:no_such', 'no_such'),
    ('mine', f'{HERE}:HERE', 'not callable'),
    ('mine', f'{HERE}:short', r'returned float64 \[19\]'),
    ('mine', f'{HERE}:broken', 'divide by zero|20 finite numbers'),
])
def test_what_is_not_a_metric_is_refused_before_a_run(name, path, told):
    c = config.get_config()
    c.metrics[name] = path
    with pytest.raises(InputError, match=told):
        validate.check(c)


def test_a_damaged_metric_of_a_run_is_refused(tmp_path):
    job = tiny_report.fake_job(tmp_path)
    _, ranks = results.score_models(job, {'a': tiny_report.scorer_of(0)}, {}, {})
    results.write(job, {}, ranks)
    with np.load(tmp_path / compare.FILE) as stored:
        arrays = dict(stored)
    for damaged in (np.ones(19), np.full(20, np.nan), np.ones(20, int)):
        np.savez(tmp_path / compare.FILE, **arrays, **{'metric/late': damaged})
        with pytest.raises(InputError, match='metric/late is not 20 finite numbers'):
            compare.read(tmp_path)


# --- which baselines are compared with ----------------------------------------------------------


@pytest.mark.parametrize(('named', 'expected'), [('', []), ('sr,pop', ['sr', 'pop'])])
def test_baselines_are_chosen_by_the_config(tmp_path, named, expected):
    job = tiny_report.fake_job(tmp_path)
    job.config.baselines, job.config.search.trials = named, 1
    job.source = type('Source', (), {'timed': True})
    assert list(results.tune_baselines(job, None, refit=False)) == expected


def test_an_unknown_baseline_is_refused_with_the_nearest_name():
    c = config.get_config()
    c.baselines = 'pop,marko'
    with pytest.raises(InputError, match=r"config.baselines='pop,marko'.*mean 'markov'"):
        validate.check(c)
    c.baselines = ''
    validate.check(c)


def test_results_without_baselines_have_a_page(tmp_path):
    tiny_report.write(tmp_path / 'run', baselines=())
    page.write(tmp_path / 'run')
    assert tiny_report.check(tmp_path / 'run') > 60
    found = json.loads((tmp_path / 'run' / 'results.json').read_text())
    assert not any('search' in model for model in found['models'].values())
    assert metrics.registry({}) == metrics.GAINS
