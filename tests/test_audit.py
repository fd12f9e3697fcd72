"""The data audit on sessions whose faults are known by construction."""

import json

import numpy as np
import pytest

from tpad_jax.data import audit as lib
from tpad_jax.data.sessions import DAY, Sessions, warm_items


def csr(parts, start=None):
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    start = 7 + 61 * np.arange(len(parts)) if start is None else np.asarray(start)
    return Sessions(np.concatenate(parts).astype(np.int32), offsets, start.astype(np.int64))


def drawn(seed, count, items=40, order=None):
    """Sessions of different items; sorted by `order` when given."""
    rng = np.random.default_rng(seed)
    parts = [1 + rng.choice(items, rng.integers(3, 7), replace=False) for _ in range(count)]
    return csr(parts if order is None else [part[np.argsort(order[part])] for part in parts])


def report(train, test, *, ties=0.0, form='2023', items=40):
    return lib.audit(train, test, test, warm_items(train, items), form=form, ties=ties)


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

    free = report(drawn(0, 4000), drawn(1, 500))
    assert free['one_way_share'] == pytest.approx(free['one_way_by_chance'], abs=0.01)
    assert free['fixed_order_share'] == pytest.approx(0.5, abs=0.05)
    assert free['warnings'] == []

    def cycle(seed, count):  # 1-2-3-1, 4-5-6-4 ...: directed, and no order of all items fits
        first = np.random.default_rng(seed).integers(0, 39, count)
        return csr([1 + k // 3 * 3 + (k + np.arange(2)) % 3 for k in first])

    directed = report(cycle(0, 4000), cycle(1, 500))
    assert directed['one_way_share'] == 1.0
    assert directed['fixed_order_share'] < 0.7  # two of three steps at best
    assert 'strongly directed' in directed['warnings'][0]


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
    tied = report(sessions, sessions, ties=0.25)
    assert not tied['day_granular']
    assert '25.0 % of neighbouring events in a session have equal times' in tied['warnings'][0]


def test_report_is_json_and_words_without_nan():
    found = report(csr([[1, 2]]), csr([[1], [2]]), ties=float('nan'))
    json.dumps(found, allow_nan=False)
    words = lib.describe(found)
    assert 'Equal times among neighbours in a session: unknown.' in words
    assert words[-1].startswith('Warning: ') == bool(found['warnings'])
    assert found['repeat_share'] is None
