"""The data audit on sessions whose faults are known by construction."""

import json

import numpy as np
import pytest

from tpad_jax.data import audit as lib, shuffle_test
from tpad_jax.data.sessions import DAY, Sessions, take, warm_items


def csr(parts, start=None):
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    start = 7 + 61 * np.arange(len(parts)) if start is None else np.asarray(start)
    return Sessions(np.concatenate(parts).astype(np.int32), offsets, start.astype(np.int64))


def drawn(seed, count, items=40, order=None):
    """Sessions of different items; sorted by `order` when given."""
    rng = np.random.default_rng(seed)
    parts = [1 + rng.choice(items, rng.integers(3, 7), replace=False) for _ in range(count)]
    return csr(parts if order is None else [part[np.argsort(order[part])] for part in parts])


def report(train, test, *, ties=0.0, form='2023', items=40, **options):
    return lib.audit(train, test, test, warm_items(train, items), form=form, ties=ties, **options)


def test_one_way_share_by_hand():
    train = csr([[1, 2]] * 6 + [[3, 4]] * 5 + [[4, 3]] * 3 + [[5, 6]] * 5 + [[7, 7]] * 9)
    found = lib.order_artefact(train, csr([[1, 2], [2, 1], [1, 2], [8, 9]]))
    assert found['order_pairs'] == 2  # 5-6 is too rare, 7-7 has no direction
    assert found['one_way_share'] == 0.5
    assert found['one_way_by_chance'] == pytest.approx((2 / 2**6 + 2 / 2**8) / 2)
    assert found['fixed_order_share'] == pytest.approx(2 / 3)  # 8 and 9 are not in train


def test_a_file_order_is_told_from_no_order_and_from_directed_behaviour():
    order = np.random.default_rng(9).permutation(41)
    listed = report(drawn(0, 4000, order=order), drawn(1, 500, order=order))
    assert listed['one_way_share'] == 1.0
    assert listed['fixed_order_share'] > 0.95
    assert any('looks like that of a file' in line for line in listed['warnings'])
    assert 'cannot be made' in listed['verdict']
    assert 'looks like that of a file' in listed['verdict']

    free = report(drawn(0, 4000), drawn(1, 500))
    assert free['one_way_share'] == pytest.approx(free['one_way_by_chance'], abs=0.01)
    assert free['fixed_order_share'] == pytest.approx(0.5, abs=0.05)
    assert free['warnings'] == []
    assert 'cannot be made' in free['verdict']
    assert 'does not lower the metrics' in free['verdict']

    def cycle(seed, count):  # 1-2-3-1, 4-5-6-4 ...: directed, and no order of all items fits
        first = np.random.default_rng(seed).integers(0, 39, count)
        return csr([1 + k // 3 * 3 + (k + np.arange(2)) % 3 for k in first])

    directed = report(cycle(0, 4000), cycle(1, 500))
    assert directed['one_way_share'] == 1.0
    assert directed['fixed_order_share'] < 0.7  # two of three steps at best
    assert 'strongly directed' in directed['warnings'][0]
    assert 'Claims about transitions can be made' in directed['verdict']
    assert 'by direction. But 100.0 % of the frequent pairs occur in' in directed['verdict']


def test_shares_by_hand():
    train = csr([[1, 2], [1, 2], [2, 3, 1], [4, 1]])
    test = csr([[1, 2], [2, 2, 5], [3, 1, 3, 3]])
    found = report(train, test, items=6)
    assert found['overlap_share'] == pytest.approx(1 / 3)
    assert found['duplicate_share'] == pytest.approx(1 / 4)
    assert found['repeat_share'] == pytest.approx(3 / 6)
    assert found['cold_target_share'] == pytest.approx(1 / 6)
    assert found['sessions'] == {'train': 4, 'valid': 3, 'test': 3}
    assert (found['items'], found['warm_items'], found['events']) == (6, 4, 27)
    assert found['lengths'] == {'2': 3, '3': 1, '4': 0, '5': 0, '6-10': 0, '11+': 0}
    text = ' '.join(found['warnings'])
    for sentence in ('33.3 % of the test sessions are identical', '25.0 % of the training sessions',
                     '50.0 % of the test targets are already'):
        assert sentence in text
    assert 'no training session' not in text  # 16.7 % cold is below the threshold


def test_only_what_is_scored_is_counted_and_histories_are_warned_of():
    train = csr([[1, 2, 3, 4], [4, 2, 3, 1], [5, 6]])
    test = csr([[1, 2, 3, 7], [2, 3, 1, 2], [6, 2, 4, 4], [4, 4], [3]])
    found = report(train, test, items=7, every_prefix=False)
    assert found['repeat_share'] == pytest.approx(3 / 4)  # of the targets 7, 2, 4 and 4
    assert found['cold_target_share'] == pytest.approx(1 / 4)
    assert found['shuffle']['rows'] == 4
    assert found['history_share'] == pytest.approx(2 / 3)  # the first two; 6, 2, 4 is new
    assert '66.7 % of the test prefixes' in ' '.join(found['warnings'])
    every = report(train, test, items=7)
    assert every['repeat_share'] == pytest.approx(3 / 10)
    assert every['shuffle']['rows'] == 10
    # the advice is given where the protocol is accepted, and not followed yet
    advised = [any('data.published_last_only=True' in text for text in some['warnings'])
               for some in (found, every, report(train, test, items=7, timed=False))]
    assert advised == [False, False, True]


def test_order_is_tested_on_the_latest_events(monkeypatch):
    train, test = walks(0, 300), walks(1, 100)
    latest = take(train, np.arange(200, 300))
    names = {*lib.order_artefact(train, test), 'shuffle'}
    every, expected = report(train, test), report(latest, test)
    monkeypatch.setattr(lib, 'RECENT', int(latest.lengths.sum()))
    found = report(train, test)
    assert all(found[name] == (expected if name in names else every)[name]
               for name in every.keys() - {'warnings', 'verdict'})
    assert found['shuffle'] != every['shuffle']
    monkeypatch.setattr(lib, 'RECENT', 1)  # one session is more
    assert report(train, test)['shuffle']['rows'] == found['shuffle']['rows']


def test_a_shuffled_history_keeps_its_target():
    sessions = drawn(3, 50)
    mixed = shuffle_test.shuffled(sessions, np.random.default_rng(0), whole=False)
    last = sessions.offsets[1:] - 1
    np.testing.assert_array_equal(mixed.items[last], sessions.items[last])
    assert (mixed.items != sessions.items).any()


def test_equal_keys_need_equal_bounds():
    assert report(csr([[1, 2, 3], [4, 5]]), csr([[1, 2], [3, 4, 5]]))['overlap_share'] == 0


def test_length_bins():
    lengths = [2, 3, 4, 5, 6, 10, 11, 30, 2, 1]
    sessions = csr([np.arange(1, n + 1) for n in lengths])
    assert lib.length_histogram(sessions) == {'2': 2, '3': 1, '4': 1, '5': 1, '6-10': 2, '11+': 2}


def test_day_granular_times_and_ties_are_warned_of_in_words():
    sessions = drawn(0, 50)
    days = report(sessions._replace(start=np.arange(50) * DAY),
                  sessions._replace(start=np.arange(50, 100) * DAY), ties=1.0, form='2018')
    assert days['day_granular']
    assert 'the times are days, not moments' in days['warnings'][0]
    assert 'cannot be made' in days['verdict']
    assert 'the times are days' in days['verdict']
    tied = report(sessions, sessions, ties=0.25)
    assert not tied['day_granular']
    assert '25.0 % of neighbouring events in a session have equal times' in tied['warnings'][0]
    assert '75.0 % of neighbouring events' in report(sessions, sessions, ties=0.75)['verdict']


def test_report_is_json_and_words_without_nan():
    found = report(csr([[1, 2]]), csr([[1], [2]]), ties=float('nan'))
    json.dumps(found, allow_nan=False)
    words = lib.describe(found)
    assert 'Equal times among neighbours in a session: not known.' in words
    assert words[-1] == f'Verdict: {found["verdict"]}'
    assert words[-2].startswith('Warning: ') == bool(found['warnings'])
    assert found['repeat_share'] is None


def walks(seed, count, items=400, steps=(-1, 1)):
    """Random walks on a ring: near items follow each other, in either direction by default."""
    rng = np.random.default_rng(seed)
    parts = [rng.integers(items) + np.cumsum(rng.choice(steps, rng.integers(6, 10)) *
                                             rng.integers(1, 6)) for _ in range(count)]
    return csr([1 + part % items for part in parts])


def test_times_that_are_not_known_are_no_all_clear():
    """Neither as nan nor as one moment for all, which is midnight of no day."""
    train, test = (part._replace(start=np.zeros(len(part.start), np.int64))
                   for part in (walks(0, 2500), walks(1, 400)))
    found = report(train, test, ties=float('nan'), items=400, form='npz')
    assert found['day_granular'] is None
    assert found['tie_share'] is None
    assert not any('midnight' in line for line in found['warnings'])
    assert found['verdict'].endswith(
        'But the times are not known, so that this holds for the sessions as they are.')
    known = report(walks(0, 2500), walks(1, 400), items=400)
    assert known['day_granular'] is False
    assert 'not known' not in known['verdict']


@pytest.mark.parametrize(('unit', 'step', 'words'), [
    ('minute', 60_000, 'whole minutes'), ('day', 1000 * DAY, 'whole days'), ('moment', 0, 'same')])
def test_times_of_events_are_read_where_a_source_counts_no_ties(unit, step, words):
    # two events at a time: every second neighbour in a session of four is a tie
    sessions = csr([[1, 2, 3, 4]] * 30)
    timed = sessions._replace(start=np.zeros(30, np.int64), time=np.arange(120) // 2 * step)
    found = report(timed, timed, ties=float('nan'))
    assert found['time_unit'] == unit
    assert found['tie_share'] == pytest.approx(2 / 3 if step else 1)
    assert found['day_granular'] is {'minute': False, 'day': True, 'moment': None}[unit]
    assert any(words in line for line in lib.describe(found))


def test_closeness_is_told_from_direction():
    near = report(walks(0, 2500), walks(1, 400), items=400)
    assert 'Claims about transitions can be made' in near['verdict']
    assert 'more by closeness than by direction' in near['verdict']
    found = near['shuffle']['markov']['hit@20']
    assert found['before'] > found['after'] + 0.1


def test_too_few_rows_promise_nothing():
    found = report(walks(0, 2500), walks(1, 3), items=400)
    assert found['shuffle']['rows'] < 30
    assert 'cannot be made' in found['verdict']
    assert f'on {found["shuffle"]["rows"]} test rows, shuffling the sess' in found['verdict']


# --- the shuffle test ---------------------------------------------------------------------------


def by_loops(train, test, rule, size):
    """hit@20 and mrr@20 of a rule of `shuffle.RULES` on every prefix, in plain loops."""
    longest, decay, both = shuffle_test.RULES[rule]
    table = np.zeros((size, size))
    for session in np.split(train.items, train.offsets[1:-1]):
        for a in range(len(session)):
            for b in range(a + 1, min(a + longest, len(session) - 1) + 1):
                table[session[a], session[b]] += 1 / (b - a)
                if both:
                    table[session[b], session[a]] += 1 / (b - a)
    hits = []
    for session in np.split(test.items, test.offsets[1:-1]):
        for end in range(1, len(session)):
            scores = sum(decay ** d * table[session[end - 1 - d]] for d in range(end)).round(9)[1:]
            own = scores[session[end] - 1]
            above, equal = (scores > own).sum(), (scores == own).sum()
            places = np.arange(above + 1, above + equal + 1)
            hits.append([np.mean(places <= 20), np.mean((places <= 20) / places)])
    return np.mean(hits, axis=0)


@pytest.mark.parametrize('rule', shuffle_test.RULES)
def test_rules_equal_plain_loops(rule):
    train, test = walks(0, 150, items=60), walks(1, 40, items=60)
    found = shuffle_test.shuffle_test(train, test)
    size = 1 + int(max(train.items.max(), test.items.max()))
    assert found['rows'] == len(test.items) - len(test.start)
    assert [found[rule][metric]['before'] for metric in ('hit@20', 'mrr@20')] == pytest.approx(
        by_loops(train, test, rule, size).tolist())


def test_shuffling_keeps_sessions_and_loses_their_order():
    sessions = walks(0, 300)
    mixed = shuffle_test.shuffled(sessions, np.random.default_rng(0))
    same = 0
    for begin, end in zip(sessions.offsets, sessions.offsets[1:], strict=False):
        old, new = sessions.items[begin:end], mixed.items[begin:end]
        assert sorted(old) == sorted(new)
        same += np.array_equal(old, new)
    assert same < 15
    firsts = [list(mixed.items[b:e]).index(sessions.items[b]) for b, e in
              zip(sessions.offsets, sessions.offsets[1:], strict=False)
              if np.count_nonzero(sessions.items[b:e] == sessions.items[b]) == 1 and e - b == 6]
    assert np.mean(firsts) == pytest.approx(2.5, abs=0.8)  # no place is likelier


def test_the_sample_is_seeded_and_bounded(monkeypatch):
    train, test = walks(0, 400), walks(1, 200)
    monkeypatch.setattr(shuffle_test, 'SAMPLE', 70)
    found = shuffle_test.shuffle_test(train, test)
    assert found['rows'] == 70
    assert found == shuffle_test.shuffle_test(train, test)
    assert found != shuffle_test.shuffle_test(train, test, seed=1)
    # the error of a mean falls as the root of rows
    monkeypatch.setattr(shuffle_test, 'SAMPLE', 280)
    errors = [found['markov']['hit@20']['error'] for found in
              (found, shuffle_test.shuffle_test(train, test))]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.35)
