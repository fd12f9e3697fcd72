"""Intervals and paired tests against closed forms, and the comparison of two runs' stored ranks."""

import json
import subprocess
import sys

import numpy as np
import pytest
from scipy.special import ndtr

from tpad_jax.data.sessions import Rows
from tpad_jax.errors import InputError
from tpad_jax.evaluation import compare, metrics, slices, statistics
from tpad_jax.job import results


def clusters(rng, count, p):
    """Sessions of 1 to 5 rows that all hit or all miss: total [S, 1, 1], weight [S, 1]."""
    size = rng.integers(1, 6, count)
    hit = rng.random(count) < p
    return (size * hit)[:, None, None].astype(float), size[:, None].astype(float)


# --- resampling ---------------------------------------------------------------------------------


def test_sums_by_session_and_slice():
    values = np.array([[1., 10.], [2., 20.], [3., 30.], [4., 40.]])
    chosen = [np.ones(4, bool), np.array([True, False, True, False])]
    total, weight = statistics.sliced(values, chosen, np.array([0, 0, 2, 2]))
    assert weight.tolist() == [[2, 1], [0, 0], [2, 1]]
    assert total.tolist() == [[[3, 30], [1, 10]], [[0, 0], [0, 0]], [[7, 70], [3, 30]]]


def test_intervals_cover_as_often_as_they_say():
    """Of correlated rows; an interval that took rows for independent would not."""
    rng = np.random.default_rng(0)
    covered, naive, repeats, p = 0, 0, 300, 0.3
    for seed in range(repeats):
        total, weight = clusters(rng, 150, p)
        low, high = statistics.intervals(total, weight, draws=200, seed=seed)[0, 0]
        covered += low <= p <= high
        rows, mean = weight.sum(), total.sum() / weight.sum()
        naive += abs(mean - p) <= 1.96 * (mean * (1 - mean) / rows) ** 0.5
    error = (0.95 * 0.05 / repeats) ** 0.5
    assert abs(covered / repeats - 0.95) < 3.5 * error
    assert naive / repeats < 0.85


def test_the_bootstrap_spreads_as_the_ratio_estimator():
    total, weight = clusters(np.random.default_rng(1), 4000, 0.3)
    samples = statistics.bootstrap(total, weight, draws=2000)[:, 0, 0]
    ratio = total.sum() / weight.sum()
    spread = ((total[:, 0] - ratio * weight) ** 2).sum() ** 0.5 / weight.sum()  # linearised
    assert samples.std() == pytest.approx(spread, rel=0.06)
    assert samples.mean() == pytest.approx(ratio, abs=4 * spread / 2000 ** 0.5)
    low, high = statistics.intervals(total, weight)[0, 0]
    assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.08)


def test_a_slice_of_one_session_has_no_interval():
    total, weight = np.ones((5, 3, 1)), np.ones((5, 3))
    weight[1:, 1] = total[1:, 1] = 0
    weight[:, 2] = total[:, 2] = 0
    edges = statistics.intervals(total, weight)
    assert edges[0, 0].tolist() == [1, 1]
    assert np.isnan(edges[1:]).all()


@pytest.mark.parametrize('count', [5, 9, 12])
def test_the_sign_flip_equals_scipys_permutation_test(count):
    """Every pattern, where there are few; sessions without a difference change nothing."""
    from scipy import stats  # takes a second to import

    difference = np.random.default_rng(count).normal(0.4, 1, (count, 2)).round(1)
    difference[0] = 0
    for column, p in zip(difference.T, statistics.sign_flip(difference), strict=True):
        found = stats.permutation_test((column,), np.sum, permutation_type='samples',
                                       n_resamples=np.inf, alternative='two-sided')
        assert p == pytest.approx(found.pvalue)


def test_drawn_signs_agree_with_the_normal_law():
    difference = np.random.default_rng(0).normal(0.12, 1, (400, 1))
    p = statistics.sign_flip(difference)[0]
    z = difference.sum() / (difference ** 2).sum() ** 0.5
    expected = 2 * ndtr(-abs(z))
    assert p == pytest.approx(expected, abs=4 * (expected / statistics.FLIPS) ** 0.5)
    assert statistics.sign_flip(difference + 9)[0] == 1 / (statistics.FLIPS + 1)


def test_without_differences_p_is_one():
    assert statistics.sign_flip(np.zeros((300, 2))).tolist() == [1, 1]
    # nor does rounding make one side more extreme than the other
    both = np.array([[0.1, -0.3, 0.2]] * 200).reshape(-1, 1)
    assert statistics.sign_flip(both)[0] > 0.9


def test_the_sign_flip_is_level_under_no_difference():
    rng = np.random.default_rng(2)
    p = statistics.sign_flip(rng.choice([-1., 0, 1], (60, 300)), flips=999)
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.045)


# --- a run's intervals --------------------------------------------------------------------------


def made_rows(count=240, items=50, seed=0):
    rng = np.random.default_rng(seed)
    prefix = rng.integers(1, items + 1, (count, 4)) * (np.arange(4) < rng.integers(1, 5, count)[
        :, None])
    return Rows(prefix.astype(np.int32), np.zeros_like(prefix, np.int32),
                rng.integers(1, items + 1, count).astype(np.int32),
                np.repeat(np.arange(count // 3) * 2, 3).astype(np.int32))  # numbers may have gaps


def rank(seed, count=240, most=49):
    above = np.random.default_rng(seed).integers(0, most, count).astype(np.int32)
    return {'above': above, 'equal': np.ones(count, np.int32)}


def test_intervals_of_a_result():
    rows, warm = made_rows(), np.arange(51) % 5 > 0
    found, result = rank(1), {'slices': {'warm': {}, 'cold': {}}}
    results.add_intervals(result, rows, warm, found)
    hits = metrics.hit(found['above'], found['equal'], 20)
    for part, rows_of in ((result, warm == warm), (result['slices']['cold'], ~warm)):
        assert part['interval'].keys() == {'hit@20', 'mrr@20', 'ndcg@20'}
        mean, (low, high) = hits[rows_of[rows.target]].mean(), part['interval']['hit@20']
        assert low < mean < high
        spread = (mean * (1 - mean) / rows_of[rows.target].sum()) ** 0.5  # rows are independent
        assert (high - low) / (2 * 1.96) == pytest.approx(spread, rel=0.25)
    # rows of a session that all do the same are worth one row
    alike = {name: np.repeat(part[:80], 3) for name, part in found.items()}
    few, hits = {'slices': {'warm': {}, 'cold': {}}}, alike['above'] < 20
    results.add_intervals(few, rows, warm, alike)
    low, high = few['interval']['hit@20']
    assert (high - low) / (2 * 1.96) == pytest.approx(hits.std() / 80 ** 0.5, rel=0.15)
    results.add_intervals(result, rows, np.ones(51, bool), found)
    assert result['slices']['cold']['interval'] == dict.fromkeys(compare.named(compare.BUILT_IN))
    json.dumps(result, allow_nan=False)


# --- two runs -----------------------------------------------------------------------------------


def store(directory, ranks, rows=None, *, items=50, fingerprint='f' * 64, **features):
    """A workdir that holds a ranks.npz as a run leaves it."""
    rows = rows or made_rows()
    warm = np.arange(items + 1) % 5 > 0
    found = {**slices.features(rows, warm, np.arange(items + 1)), **features}
    directory.mkdir()
    np.savez_compressed(directory / compare.FILE, **compare.contents(
        rows.session, rows.target, fingerprint, items, found, ranks))
    return directory


def run(*arguments):
    """-> exit status, what was printed to stdout and stderr."""
    done = subprocess.run([sys.executable, '-W', 'error', '-m', 'tpad_jax.evaluate',
                           *map(str, arguments)], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def compared(a, b, *models):
    models = models or ('tpad', 'tpad')
    return compare.compare([compare.read(p) for p in a], [compare.read(p) for p in b], models)


def test_a_difference_by_hand(tmp_path):
    a, b = rank(1), rank(2)
    found = compared([store(tmp_path / 'a', {'tpad': a})], [store(tmp_path / 'b', {'tpad': b})])
    rows, warm = made_rows(), np.arange(51) % 5 > 0
    first, second = ((1 / (r['above'] + 1)) * (r['above'] < 20) for r in (a, b))
    assert (found['sessions'], found['items'], found['unknown_slices']) == (80, [50], [])
    assert found['slices'].keys() == {'all', 'warm', 'cold', 'repeat', 'new', *slices.LENGTHS,
                                      *slices.QUARTILES}
    for name, mask in (('all', rows.target > 0), ('cold', ~warm[rows.target])):
        part, cell = found['slices'][name], found['slices'][name]['mrr@20']
        assert part['rows'] == mask.sum()
        assert cell['a'] == pytest.approx(first[mask].mean())
        assert cell['b'] == pytest.approx(second[mask].mean())
        assert cell['difference'] == pytest.approx((first - second)[mask].mean())
        assert cell['won'] == pytest.approx((first > second)[mask].mean())
        assert cell['lost'] == pytest.approx((first < second)[mask].mean())
        assert cell['difference_interval'][0] < cell['difference'] < cell['difference_interval'][1]
    cell = found['slices']['all']['mrr@20']
    by_session = (first - second).reshape(80, 3).sum(1)
    z = by_session.sum() / (by_session ** 2).sum() ** 0.5
    assert cell['p'] == pytest.approx(2 * ndtr(-abs(z)), abs=0.05)
    json.dumps(found, allow_nan=False)


def test_a_paired_interval_is_narrower_than_the_figures(tmp_path):
    """B loses every tenth of A's: visible in pairs alone."""
    a = rank(1)
    b = {**a, 'above': np.where(np.arange(240) % 10 == 0, 30, a['above']).astype(np.int32)}
    found = compared([store(tmp_path / 'a', {'tpad': a})], [store(tmp_path / 'b', {'tpad': b})])
    cell = found['slices']['all']['hit@20']
    assert cell['difference_interval'][0] > 0
    assert cell['a_interval'][0] < cell['b'] < cell['a_interval'][1]
    assert (cell['lost'], cell['p'] < 0.05) == (0, True)
    same = compared([tmp_path / 'a'], [tmp_path / 'a'])['slices']['all']['mrr@20']
    assert (same['difference'], same['difference_interval'], same['p']) == (0, [0, 0], 1)
    assert (same['won'], same['lost']) == (0, 0)


def test_seeds_are_paired_in_order_and_share_their_sessions(tmp_path):
    seeds = [store(tmp_path / f'{side}{k}', {'tpad': rank(k + shift)})
             for side, shift in (('a', 0), ('b', 10)) for k in range(3)]
    one = compared(seeds[:1], seeds[3:4])
    many = compared(seeds[:3], seeds[3:])
    each = [compared([a], [b])['slices']['all']['mrr@20']['difference']
            for a, b in zip(seeds[:3], seeds[3:], strict=True)]
    cell = many['slices']['all']['mrr@20']
    assert cell['per_seed'] == pytest.approx(each)
    assert cell['difference'] == pytest.approx(np.mean(each))
    assert (many['sessions'], many['slices']['all']['rows']) == (80, 720)
    # the same seed three times teaches nothing new: neither interval nor p may pretend so
    thrice = compared(seeds[:1] * 3, seeds[3:4] * 3)['slices']['all']['mrr@20']
    once = one['slices']['all']['mrr@20']
    assert thrice['difference_interval'] == pytest.approx(once['difference_interval'])
    assert thrice['p'] == pytest.approx(once['p'])
    with pytest.raises(InputError, match='1 and 2 runs cannot be paired'):
        compared(seeds[:1], seeds[1:3])
    # seeds of other data have sessions of their own
    other = made_rows(seed=5)
    far = [store(tmp_path / side, {'tpad': rank(seed)}, other, fingerprint='g' * 64)
           for side, seed in (('c', 1), ('d', 2))]
    assert compared([seeds[0], far[0]], [seeds[3], far[1]])['sessions'] == 160


def test_slices_that_runs_disagree_on_are_named_and_left_out(tmp_path):
    a = store(tmp_path / 'a', {'tpad': rank(1)})
    b = store(tmp_path / 'b', {'tpad': rank(2)}, length=np.ones(240, np.int32))
    found = compared([a], [b])
    assert found['unknown_slices'] == ['length']
    assert 'length_1' not in found['slices']
    assert 'cold' in found['slices']


def changed(**change):
    rows = made_rows()._asdict()
    return Rows(**{**rows, **{name: what(rows[name]) for name, what in change.items()}})


@pytest.mark.parametrize(('differing', 'told'), [
    (dict(fingerprint='e' * 64), 'the data fingerprint (ffffffffffff and eeeeeeeeeeee)'),
    (dict(fingerprint='f' * 63 + 'e'), 'the data fingerprint ('),
    (dict(items=51), 'the number of items ranked (50 and 51)'),
    (dict(rows=made_rows(60)), 'the number of test rows (240 and 60)'),
    (dict(rows=changed(target=lambda x: np.roll(x, 1))), 'the target of '),
    (dict(rows=changed(session=lambda x: x + (np.arange(240) == 7))),
     'the session of 1 rows (the first: 7)'),
])
def test_other_rows_are_refused_by_what_differs(tmp_path, differing, told):
    count = len(differing.get('rows', made_rows()).target)
    a = store(tmp_path / 'a', {'tpad': rank(1)})
    b = store(tmp_path / 'b', {'tpad': rank(2, count)}, **differing)
    with pytest.raises(InputError) as refused:
        compared([a], [b])
    assert told in str(refused.value)
    assert str(refused.value).count('differ in') == 1
    assert '\n' not in str(refused.value)


def spoilt(path, **change):
    """The ranks.npz of a workdir with some arrays changed or (None) gone."""
    with np.load(path / compare.FILE) as stored:
        arrays = {**stored, **change}
    np.savez(path / compare.FILE, **{n: x for n, x in arrays.items() if x is not None})


@pytest.mark.parametrize(('change', 'told'), [
    ({'fingerprint': None}, 'has no fingerprint'),
    ({'tpad/above': np.full(240, np.nan)}, 'tpad/above is not one whole number per row'),
    ({'tpad/above': np.zeros(239, int)}, 'tpad/above is not one whole number per row'),
    ({'tpad/equal': None}, 'tpad/equal is not one whole number per row'),
    ({'tpad/equal': np.zeros(240, int)}, 'tpad/equal holds a number that is not a rank'),
    ({'tpad/above': np.full(240, 50)}, 'tpad/equal holds a number that is not a rank'),
    ({'tpad/above': np.full(240, -1)}, 'tpad/above holds a number that is not a rank'),
    ({'target': np.full(240, 51)}, 'target holds a number that is not a rank'),
    ({'items': np.array([50, 50])}, 'items is not one whole number'),
    ({'row/warm': np.ones(3, bool)}, 'warm is not one whole number per row'),
    ({'session': np.array([{}] * 240, object)}, 'cannot be read'),  # would have to be unpickled
])
def test_ranks_that_no_ranking_gives_are_refused(tmp_path, change, told):
    path = store(tmp_path / 'a', {'tpad': rank(1)})
    spoilt(path, **change)
    with pytest.raises(InputError, match=told):
        compare.read(path)


def test_files_that_are_no_ranks_are_refused(tmp_path):
    path = store(tmp_path / 'a', {'tpad': rank(1)})
    whole = (path / compare.FILE).read_bytes()
    for content in (b'', b'no archive', whole[:len(whole) // 2], whole[:200] + whole[260:]):
        (path / compare.FILE).write_bytes(content)
        with pytest.raises(InputError, match='cannot be read'):
            compare.read(path)
    with (path / compare.FILE).open('wb') as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match='cannot be read'):
        compare.read(path)
    (path / compare.FILE).unlink()
    with pytest.raises(InputError, match='does not exist'):
        compare.read(path)


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    a = store(tmp_path / 'a', {'tpad': rank(1), 'pop': rank(4)})
    b = store(tmp_path / 'b', {'tpad': rank(2), '[sr]': rank(3)})
    status, out, err = run('--compare', a, b, '--json', tmp_path / 'c.json')
    assert (status, err) == (0, '')
    found = json.loads((tmp_path / 'c.json').read_text())
    cell = found['slices']['all']['hit@20']
    assert f'{100 * cell["difference"]:+.2f}' in out
    for words in (f'A: tpad of {a}', '80 sessions, 240 rows of 1 seed; 50 items', 'popularity_q1'):
        assert words in out
    assert compare.main(['--compare', str(a), str(b), '--model', 'sr_gnn']) == 2
    assert capsys.readouterr() == (
        '', f"tpad_jax.evaluate: {a} has no model 'sr_gnn'. Expected one of tpad, pop\n")


def test_the_commands_sides(tmp_path, capsys):
    a = store(tmp_path / 'a', {'tpad': rank(1), 'pop': rank(4)})
    b = store(tmp_path / 'b', {'tpad': rank(2), '[sr]': rank(3)})
    command = [str(a), str(b)]
    assert compare.main(['--compare', *command, '--models', 'pop', '[sr]']) == 0
    assert 'B: [sr] of' in capsys.readouterr().out
    assert compare.main(['--compare', str(a), '--models', 'tpad', 'pop']) == 0
    assert 'B: pop of' in capsys.readouterr().out
    assert compare.main(['--compare', f'{a},{a}', f'{b},{b}']) == 0
    assert 'A - B by seed:' in capsys.readouterr().out
    for arguments, told in (([str(a)], 'names 1 side'), ([*command, str(a)], 'names 3 side'),
                            ([str(a), f'{b},{b}'], '1 and 2 runs cannot be paired'),
                            ([str(a), str(tmp_path / 'none')], 'does not exist'),
                            ([*command, '--json', str(a)], f'{a}: Is a directory')):
        assert compare.main(['--compare', *arguments]) == 2
        out, err = capsys.readouterr()
        assert (out, told in err, err.count('\n')) == ('', True, 1)


def test_slices_of_few_sessions_are_null_in_the_json(tmp_path, capsys):
    """A slice of one session has no interval, an empty one has no number at all."""
    rows = made_rows()
    warm = np.zeros(240, bool)
    warm[:3] = True  # one session
    paths = [store(tmp_path / name, {'tpad': rank(seed)}, rows, warm=warm,
                   length=np.full(240, 2)) for name, seed in (('a', 1), ('b', 2))]
    assert compare.main(['--compare', *map(str, paths), '--json', str(tmp_path / 'c.json')]) == 0
    capsys.readouterr()

    def refuse(constant):
        raise AssertionError(constant)

    parts = json.loads((tmp_path / 'c.json').read_text(), parse_constant=refuse)['slices']
    assert parts['warm']['hit@20']['difference_interval'] is None
    assert parts['warm']['hit@20']['difference'] is not None
    assert parts['length_6+']['hit@20']['a'] is parts['length_6+']['hit@20']['p'] is None
