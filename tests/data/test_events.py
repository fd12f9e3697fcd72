"""What rows read of events: gaps, periods, kinds and earlier sessions, without the future."""

from contextlib import closing
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace

import numpy as np
import pytest

from tpad_jax.data import catalogue, events, sessions
from tpad_jax.data.batches import session_batches
from tpad_jax.data.sessions import Sessions
from tpad_jax.errors import InputError


def one(number, items, seconds, kind, visitor):
    """A session as a list of its events."""
    return [(number, item, 1000 * second, k, visitor)
            for item, second, k in zip(items, seconds, kind, strict=True)]


def split(*parts):
    """Sessions of lists of events."""
    offsets = np.append(0, np.cumsum([len(part) for part in parts]))
    _, item, time, kind, _ = (np.array(x) for x in zip(*chain(*parts), strict=True))
    return Sessions(item.astype(np.int32), offsets, time[offsets[:-1]] // 1000, time, kind,
                    np.array([part[0][-1] for part in parts]))


TRAIN = split(one(0, [1, 2], [0, 3], [0, 1], 7), one(1, [3, 4, 5], [100, 107, 108], [0, 0, 1], 8),
              one(2, [4, 1], [500, 1200], [1, 1], 7))
TEST = split(one(0, [5, 0, 3, 2], [2000, 2001, 2005, 2005], [0, 1, 1, 0], 7),
             one(1, [1, 2], [2100, 2101], [0, 0], 9))


@pytest.fixture
def data():
    size = 6
    side = np.zeros((size, 0), np.int32)
    return catalogue.Data(
        ['', *'abcde'], [''] * size, [''] * size, None, np.zeros(size, bool), side, (), TRAIN,
        TEST, TEST, np.ones(size, bool), {}, {}, 'x', 'x', kinds=('view', 'buy'))


def config(target='', **model):
    off = dict(event_time=False, event_kind=False, history=False)
    return SimpleNamespace(model=SimpleNamespace(**off | model),
                           data=SimpleNamespace(target_events=target))


def test_nothing_is_read_by_default(data):
    assert events.attached(data, config()) is data
    assert sessions.rows(TEST, 3).context is None


def test_columns_of_rows(data):
    made = events.attached(data, config(event_time=True, event_kind=True, history=True)).events
    rows = sessions.rows(TEST, 3, events=made)
    where = events.columns(made.reads, 3)
    known = {name: rows.context[:, part] for name, part in where.items()}
    # prefixes: 5 | 5 | 5 3 | 1, as item 0 is not ranked; the second target is not ranked either
    np.testing.assert_array_equal(rows.items, [[5, 0, 0], [5, 0, 0], [5, 3, 0], [1, 0, 0]])
    # 1 s, 5 s, then 5 s and 0 s, then 1 s: 1 + floor(log2(1 + s))
    np.testing.assert_array_equal(known['gap'], [[2, 0, 0], [3, 0, 0], [3, 1, 0], [2, 0, 0]])
    np.testing.assert_array_equal(known['kind'], [[1, 0, 0], [1, 0, 0], [1, 2, 0], [1, 0, 0]])
    assert (known['date'] == events.NOW).all()
    past = np.zeros((4, events.PAST), int)
    past[:3, :4] = 1, 4, 2, 1  # of visitor 7, the newest first; visitor 9 has none
    np.testing.assert_array_equal(known['past'], past)
    # nothing later is read: in training the first session has no past, and the third the first's
    train = sessions.rows(TRAIN, 3, events=made)
    np.testing.assert_array_equal(train.context[:, where['past']][:, :3],
                                  [[0] * 3, [0] * 3, [0] * 3, [2, 1, 0]])
    share = np.array([3, 107, 108, 1200]) / 1200
    np.testing.assert_array_equal(train.context[:, where['date']][:, 0],
                                  1 + np.round(share * (events.NOW - 1)))
    wide = rows.read_by(SimpleNamespace(reads='context'))
    np.testing.assert_array_equal(wide, np.column_stack([rows.items, rows.context]))
    assert rows.read_by(SimpleNamespace()) is rows.items


def test_targets_of_some_kinds(data):
    made = events.attached(data, config('buy')).events
    rows = sessions.rows(TRAIN, 3, events=made)
    np.testing.assert_array_equal(rows.target, [2, 5, 1])
    assert rows.context is None
    with pytest.raises(InputError, match=r'no event is cart\. Expected some of view, buy'):
        events.attached(data, config('buy,cart'))
    views = TEST._replace(kind=np.zeros_like(TEST.kind))
    with pytest.raises(InputError, match='no event of these kinds follows another in test'):
        events.attached(replace(data, test=views), config('buy'))


def test_batches_hold_the_context_and_whole_sessions_are_not_limited_to_kinds(data):
    data = events.attached(data, config('buy', history=True))
    rows = sessions.rows(TRAIN, 3, events=data.events)
    with closing(session_batches(data, max_length=3, batch_size=3, seed=0)) as drawn:
        batch = next(drawn)
    assert sorted(batch['row']) == [0, 1, 2]
    np.testing.assert_array_equal(batch['context'], rows.context[batch['row']])
    data = events.attached(replace(data, events=None), config('view'))
    with closing(session_batches(data, max_length=3, batch_size=3, seed=0, every_prefix=False)
                 ) as drawn:
        assert sorted(next(drawn)['target']) == [1, 2, 5]


def test_data_that_lack_it_are_refused(data):
    bare = Sessions(*TRAIN[:3])
    bare = replace(data, train=bare, valid=bare, test=bare, kinds=())
    for name, words in (('event_time', 'no times'), ('event_kind', 'no kinds'),
                        ('history', 'two sessions')):
        with pytest.raises(InputError, match=words):
            events.attached(bare, config(**{name: True}))
    # without times nothing is earlier
    timeless = TRAIN._replace(time=None, start=np.zeros(3, int))
    timeless = replace(data, train=timeless, valid=timeless, test=timeless)
    with pytest.raises(InputError, match='two sessions at known times'):
        events.attached(timeless, config(history=True))


def test_a_window_trains_on_what_is_before_its_days(data):
    hours = np.arange(240)  # a session every hour of ten days; the source's split does not matter
    parts = [split(*(one(0, [1, 2], [3600 * h, 3600 * h + 60], [0, 0], 1) for h in hours[cut]))
             for cut in (slice(0, 100), slice(100, 150), slice(150, None))]
    data = replace(data, train=parts[0], valid=parts[1], test=parts[2], fingerprint='x')
    options = SimpleNamespace(window=2, window_days=3, valid=0.1)
    made = catalogue.windowed(data, options, True)
    np.testing.assert_array_equal(made.test.start, 3600 * hours[96:168])  # days 4 to 6
    np.testing.assert_array_equal(np.append(made.train.start, made.valid.start), 3600 * hours[:96])
    other = catalogue.windowed(data, window_of(options, 1), True)
    assert made.fingerprint != other.fingerprint
    with pytest.raises(InputError, match='0 before them, of 10 days'):
        catalogue.windowed(data, window_of(options, 4), True)
    bare = replace(data, **{n: getattr(data, n)._replace(time=None)
                            for n in ('train', 'valid', 'test')})
    with pytest.raises(InputError, match='no times'):
        catalogue.windowed(bare, options, False)


def window_of(options, window):
    return SimpleNamespace(**vars(options) | {'window': window})
