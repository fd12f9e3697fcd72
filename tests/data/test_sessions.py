"""Sessions: cut, split, k-core and rows against plain loops."""

from collections import Counter, defaultdict

import numpy as np
import polars as pl
import pytest

from tpad_jax.data import sessions as lib
from tpad_jax.errors import InputError


def interactions(seed=0, events=400, users=12, items=30, span=20 * lib.DAY, step=60):
    rng = np.random.default_rng(seed)
    return pl.DataFrame({
        'user': rng.integers(0, users, events),
        'item': rng.integers(1, items + 1, events).astype(np.int32),
        'time': 1_500_000_000 + rng.integers(0, span // step, events) * step}).unique()


def csr(lists, start=None):
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    items = np.concatenate([np.asarray(part, np.int32) for part in lists])
    start = np.arange(len(lists)) if start is None else np.asarray(start)
    return lib.Sessions(items, offsets, start.astype(np.int64))


def lists(sessions):
    return [part.tolist() for part in np.split(sessions.items, sessions.offsets[1:-1])]


def plain_cut(frame, apart):
    users = defaultdict(list)
    for user, item, time in frame.select('user', 'item', 'time').iter_rows():
        users[user].append((time, item))
    found = []
    for events in users.values():
        events.sort()
        for k, event in enumerate(events):
            if k == 0 or apart(events[k - 1][0], event[0]):
                found.append([])
            found[-1].append(event)
    return [part for part in found if len(part) >= 2]


@pytest.mark.parametrize('by_day', [True, False])
def test_cut_equals_a_plain_loop(by_day):
    frame, gap = interactions(), 6 * 3600
    sessions = lib.cut(frame, by_day=by_day, gap_seconds=gap, seed=0)
    expected = plain_cut(
        frame, lambda a, b: a // lib.DAY != b // lib.DAY if by_day else b - a > gap)
    # the order among equal times is drawn, so sets of items are compared, with their start
    assert Counter((start, tuple(sorted(items))) for start, items in
                   zip(sessions.start.tolist(), lists(sessions), strict=True)) == Counter(
        (part[0][0], tuple(sorted(item for _, item in part))) for part in expected)
    assert (np.diff(sessions.start) >= 0).all()
    assert [a.dtype for a in sessions[:4]] == [np.int32, np.int64, np.int64, np.int64]
    assert (sessions.time[sessions.offsets[:-1]] == 1000 * sessions.start).all()


def test_cut_keeps_the_order_of_time_and_a_gap_of_exactly_the_limit():
    frame = pl.DataFrame({'user': [1] * 4, 'item': [4, 2, 3, 1], 'time': [10, 70, 130, 191]})
    sessions = lib.cut(frame, by_day=False, gap_seconds=60, seed=0, min_length=1)
    assert lists(sessions) == [[4, 2, 3], [1]]
    assert sessions.start.tolist() == [10, 191]


def test_equal_times_are_ordered_by_the_seed_and_not_by_the_file():
    frame = interactions(span=4 * lib.DAY, step=lib.DAY)
    first = lib.cut(frame, by_day=True, gap_seconds=0, seed=1)
    again = lib.cut(frame.sample(fraction=1, shuffle=True, seed=3), by_day=True, gap_seconds=0,
                    seed=1)
    other = lib.cut(frame, by_day=True, gap_seconds=0, seed=2)
    assert lists(first) == lists(again)
    assert lists(first) != lists(other)
    # a fair order: the smaller of the first two items comes first about as often as not
    starts = np.array([part[0] < part[1] for part in lists(first) if part[0] != part[1]])
    assert 0.2 < starts.mean() < 0.8


def test_time_ties():
    frame = pl.DataFrame({'user': [1, 1, 1, 2, 2], 'item': [1, 2, 3, 1, 2],
                          'time': [5, 5, 9, 5, 5]})
    assert lib.time_ties(frame, by_day=False, gap_seconds=10) == pytest.approx(2 / 3)
    assert lib.time_ties(frame[:1], by_day=False, gap_seconds=10) == 0.0


def test_split_shares_counts_and_order():
    sessions = csr([[k + 1, k + 2] for k in range(20)])
    for sizes in [(0.1, 0.25), (2, 5)]:
        train, valid, test = lib.split(sessions, *sizes)
        assert [len(part.start) for part in (train, valid, test)] == [13, 2, 5]
        assert lists(train) + lists(valid) + lists(test) == lists(sessions)
        assert train.start.max() < valid.start.min() <= valid.start.max() < test.start.min()


def test_split_never_tears_equal_starts_apart():
    days = np.repeat([0, 1, 2, 3], [10, 7, 4, 6]) * lib.DAY
    sessions = csr([[1, 2]] * len(days), days)
    train, valid, test = lib.split(sessions, 5, 5)  # wanted at 17 and 22; the days change at 17, 21
    assert [len(part.start) for part in (train, valid, test)] == [17, 4, 6]


@pytest.mark.parametrize('sizes', [(0, 0.1), (0.1, -1), (0.5, 0.5), (30, 1)])
def test_split_refuses_empty_parts(sizes):
    with pytest.raises(InputError, match='valid='):
        lib.split(csr([[1, 2]] * 20), *sizes)


def test_split_refuses_a_single_start():
    with pytest.raises(InputError, match='1 different start'):
        lib.split(csr([[1, 2]] * 20, np.zeros(20)), 0.1, 0.1)


def plain_core(parts, core, min_length):
    while True:
        counts = Counter(item for part in parts for item in part)
        kept = [[item for item in part if counts[item] >= core] for part in parts]
        kept = [part for part in kept if len(part) >= min_length]
        if kept == parts:
            return kept
        parts = kept


@pytest.mark.parametrize('min_length', [1, 2, 3])
def test_k_core_equals_a_plain_loop(min_length):
    rng = np.random.default_rng(4)
    parts = [rng.zipf(1.5, rng.integers(2, 7)).clip(1, 60).tolist() for _ in range(120)]
    core = lib.k_core(csr(parts), 5, min_length)
    assert lists(core) == plain_core(parts, 5, min_length)
    assert 0 < len(core.items) < sum(map(len, parts))  # some dropped, some left
    assert lists(lib.k_core(csr(parts), 1)) == parts


def test_k_core_refuses_to_leave_nothing():
    with pytest.raises(InputError, match='core=9'):
        lib.k_core(csr([[1, 2], [2, 3]]), 9)


@pytest.mark.parametrize(('width', 'every'), [(3, True), (10, True), (3, False), (1, True)])
def test_rows_equal_a_plain_loop(width, every):
    rng = np.random.default_rng(5)
    parts = [rng.integers(1, 50, n).tolist() for n in [2, 1, 7, 4, 12, 2]]
    rows = lib.rows(csr(parts), width, every)
    expected = []
    for number, part in enumerate(parts):
        for n in range(1, len(part)) if every else [len(part) - 1] * (len(part) > 1):
            prefix, following = part[:n][-width:], part[1:n + 1][-width:]
            pad = [0] * (width - len(prefix))
            expected.append((prefix + pad, following + pad, part[n], number))
    assert rows.items.tolist() == [row[0] for row in expected]
    assert rows.next.tolist() == [row[1] for row in expected]
    assert rows.target.tolist() == [row[2] for row in expected]
    assert rows.session.tolist() == [row[3] for row in expected]
    assert {array.dtype for array in rows[:4]} == {np.dtype(np.int32)}


def test_warm_items():
    assert lib.warm_items(csr([[1, 3], [3, 3]]), 4).tolist() == [False, True, False, True, False]


def test_take_reorders_and_repeats():
    assert lists(lib.take(csr([[1, 2], [3], [4, 5, 6]]), np.array([2, 0, 2]))) == [
        [4, 5, 6], [1, 2], [4, 5, 6]]


@pytest.mark.parametrize(('options', 'message'), [
    (dict(gap_seconds=0), 'gap_hours: 0 seconds are not a pause'),
    (dict(gap_seconds=60, min_length=99), 'min_length=99')])
def test_cut_refuses(options, message):
    with pytest.raises(InputError, match=message):
        lib.cut(interactions(), by_day=False, seed=0, **options)


def test_items_that_are_not_ranked_are_misses_and_leave_prefixes():
    """Items 0 of a test session; without any, the rows are those of before."""
    sessions = lib.Sessions(np.array([3, 0, 1, 2, 0, 1, 0, 2], np.int32), np.array([0, 4, 8]),
                            np.arange(2))
    rows = lib.rows(sessions, 3)
    assert rows.items.tolist() == [[3, 0, 0], [3, 0, 0], [3, 1, 0],
                                   [1, 0, 0], [1, 0, 0], [1, 0, 0]]
    assert rows.target.tolist() == [0, 1, 2, 0, 0, 2]  # the fourth has no prefix to rank from
    assert rows.next[2].tolist() == [1, 2, 0]
    kept = lib.known(sessions)
    assert kept.items.tolist() == [3, 1, 2, 1, 2]
    assert kept.offsets.tolist() == [0, 3, 5]


def test_drawn_sessions_follow_the_model():
    """Lengths as asked, first items by popularity, each later one as the model's row says."""
    law = np.array([[0, 0.7, 0.2, 0.1], [0, 0.1, 0.3, 0.6], [0, 0.3, 0.3, 0.4]])  # after 1, 2, 3
    lengths, shapes = np.tile([2, 5, 3], 4000), set()

    def score(items):
        shapes.add(items.shape)
        last = items[np.arange(len(items)), (items > 0).sum(axis=1) - 1]
        with np.errstate(divide='ignore'):
            return np.log(law[last - 1])

    out = lib.drawn(score, lengths, np.array([0, 6.0, 0, 3]), seed=0)
    lib.check(out, 'drawn', 3)
    np.testing.assert_array_equal(out.lengths, lengths)
    assert shapes == {(len(lengths), 5)}
    # three standard errors of shares
    np.testing.assert_allclose(np.bincount(out.items[out.offsets[:-1]])[1:] / len(lengths),
                               np.array([9, 3, 6]) / 18, atol=0.014)
    inside = np.setdiff1d(np.arange(1, len(out.items)), out.offsets)
    for item in 1, 2, 3:
        after = out.items[inside[out.items[inside - 1] == item]]
        np.testing.assert_allclose(np.bincount(after, minlength=4) / len(after), law[item - 1],
                                   atol=0.025)
    again = lib.drawn(score, lengths, np.array([0, 6.0, 0, 3]), seed=1)
    assert (again.items != out.items).any()
