"""Ready-made sessions: what is read, how validation is held out, and every refusal."""

import numpy as np
import pytest

from tpad_jax import config
from tpad_jax.data import item_graphs, sessions, sources
from tpad_jax.data.sources import ids as ids_lib
from tpad_jax.errors import InputError


def arrays(count=40, seed=0):
    rng = np.random.default_rng(seed)
    out = {}
    for part, number in (('train', count), ('test', 10)):
        lengths = rng.integers(2, 6, number)
        out[f'{part}_items'] = rng.integers(1, 13, lengths.sum()).astype(np.int32)
        out[f'{part}_offsets'] = np.append(0, np.cumsum(lengths)).astype(np.int32)
    out['test_items'][-1] = 13  # an item training never saw
    return out


def write(path, **changes):
    np.savez(path, **{**arrays(), **changes})
    return path


def whole(part):
    return [tuple(x) for x in np.split(part.items, part.offsets[1:-1])]


def test_the_last_sessions_validate_where_order_is_time(tmp_path):
    data = ids_lib.load(write(tmp_path / 'a.npz'), ordered=True, valid=0.25, seed=0)
    a = arrays()
    every = np.split(a['train_items'], a['train_offsets'][1:-1])
    assert whole(data.train) + whole(data.valid) == [tuple(x) for x in every]
    assert len(data.valid.start) == len(data.test.start) == 10
    assert data.num_items == 13
    assert not data.warm[[0, 13]].any()
    assert data.lines == {'read': 50, 'kept': 50, 'rejected': {}}


def test_a_seeded_draw_validates_where_it_is_not(tmp_path):
    path = write(tmp_path / 'a.npz')
    one, same, other = (ids_lib.load(path, ordered=False, valid=10, seed=s) for s in (1, 1, 2))
    assert whole(one.valid) == whole(same.valid) != whole(other.valid)
    assert one.fingerprint == same.fingerprint != other.fingerprint
    assert sorted(whole(one.train) + whole(one.valid)) == sorted(
        whole(other.train) + whole(other.valid))


def test_test_sessions_change_nothing_that_is_trained_on(tmp_path):
    path = write(tmp_path / 'a.npz')
    other = write(tmp_path / 'b.npz', test_items=arrays()['test_items'][::-1].copy())
    one, two = (ids_lib.load(p, ordered=True, valid=0.1, seed=0) for p in (path, other))
    assert whole(one.train) == whole(two.train)
    np.testing.assert_array_equal(one.warm, two.warm)


@pytest.mark.parametrize(('changes', 'told'), [
    (dict(test_items=np.array([1.5])), 'test_items is float64'),
    (dict(train_offsets=np.array([0, 5, 3])), 'train_offsets: .* rise from 0'),
    (dict(train_items=np.array([1, 0, 2]), train_offsets=np.array([0, 3])),
     r'train_items\[1\]=0: not an item id'),
    (dict(test_items=np.array([[1]], object)), 'is not a usable')])
def test_refusals_name_file_and_array(tmp_path, changes, told):
    path = write(tmp_path / 'a.npz', **changes)
    with pytest.raises(InputError, match=told) as error:
        ids_lib.load(path, ordered=True, valid=0.1, seed=0)
    assert str(path) in str(error.value)


def test_a_missing_array_a_cut_file_and_no_file(tmp_path):
    path = tmp_path / 'a.npz'
    np.savez(path, train_items=np.array([1]))
    with pytest.raises(InputError, match='has no array train_offsets'):
        ids_lib.read(path)
    write(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match='is not a usable'):
        ids_lib.read(path)
    with pytest.raises(InputError, match='is not a usable'):
        ids_lib.read(tmp_path / 'none.npz')
    with pytest.raises(InputError, match=r'config\.data\.valid=40'):
        ids_lib.load(write(path), ordered=True, valid=40, seed=0)


def test_the_global_graph_counts_both_ways_within_the_window():
    train = sessions.Sessions(np.array([1, 2, 3, 2, 4, 1, 2], np.int32), np.array([0, 5, 7]),
                              np.zeros(2, np.int64))
    ids, weights = item_graphs.neighbours(train, 5, window=2, most=2)
    # by hand: 1-2 twice, 1-3 once, 2-3 twice (2 2 are one item), 2-4, 3-4 once
    np.testing.assert_array_equal(ids, [[0, 0], [2, 3], [1, 3], [2, 1], [2, 3], [0, 0]])
    np.testing.assert_allclose(weights, [[0, 0], [2 / 3, 1 / 3], [.5, .5], [2 / 3, 1 / 3],
                                         [.5, .5], [0, 0]], rtol=1e-6)


def test_places_are_the_positions_that_hold_items():
    from tpad_jax.data import batches
    items = np.array([[1, 0, 0], [2, 3, 0], [4, 5, 6], [7, 0, 0]], np.int32)
    np.testing.assert_array_equal(batches._places(items, 2, 4), [0, 3, 4, -1, 0, 1, 2, 3])
    rng = np.random.default_rng(0)
    length = rng.integers(1, 6, 50)
    width = batches.places_width(length, 5, batches.Cut(8, 0, processes=2, shards=2), 30)
    most = 0
    for step in range(31):
        row = batches.positions(0, step, 8, 50)
        for process in range(2):
            most = max(most, *(length[part].sum() for part in np.split(row[process::2], 2)))
    assert width == min(10, -(-most // 32) * 32)


def empty(part):
    return {f'{part}_items': np.zeros(0, int), f'{part}_offsets': np.zeros(1, int)}


def singles(part):
    return {f'{part}_items': np.arange(1, 9), f'{part}_offsets': np.arange(9)}


@pytest.mark.parametrize('part', ['train', 'test'])
@pytest.mark.parametrize(('damage', 'message'), [
    (empty, 'offsets: they do not cut 0 events'),
    (lambda part: {**empty(part), f'{part}_offsets': np.zeros(0, int)}, 'offsets: they do not cut'),
    (lambda part: {**empty(part), f'{part}_offsets': np.zeros(9, int)}, 'has two items'),
    (singles, ': none of its 8 sessions has two items'),
    (lambda part: {f'{part}_offsets': np.array([0, 9, 5, 12], np.uint64)}, 'offsets: they do not'),
    (lambda part: {f'{part}_offsets': np.array([2, 9])}, 'offsets: they do not cut'),
])
def test_a_split_that_nothing_can_be_counted_on_is_named(tmp_path, part, damage, message):
    path = write(tmp_path / 'a.npz', **damage(part))
    with pytest.raises(InputError, match=f'{path}: {part}.*{message}'):
        ids_lib.load(path, ordered=True, valid=0.25, seed=0)


def test_a_validation_of_single_items_is_named(tmp_path):
    c = config.get_config()
    items = np.append(np.tile([1, 2], 30), np.arange(1, 11))
    offsets = np.append(np.arange(0, 61, 2), np.arange(61, 71))
    c.data.npz = str(write(tmp_path / 'a.npz', train_items=items, train_offsets=offsets))
    c.data.valid = 10
    with pytest.raises(InputError, match=r'a\.npz: valid: none of its 10 sessions has two items'):
        sources.load(c, tmp_path)


def test_sessions_without_items_are_dropped_and_counted(tmp_path):
    plain = arrays()
    path = write(tmp_path / 'a.npz')
    padded = write(tmp_path / 'b.npz', **{
        f'{part}_offsets': np.repeat(plain[f'{part}_offsets'], 2) for part in ('train', 'test')})
    one, two = (ids_lib.load(p, ordered=True, valid=0.25, seed=0) for p in (path, padded))
    for split in ('train', 'valid', 'test'):
        assert whole(getattr(one, split)) == whole(getattr(two, split))
    assert two.lines == {'read': 102, 'kept': 50, 'rejected': {'empty_session': 52}}


def test_fields_of_events_stay_with_them(tmp_path):
    """A seeded draw and a dropped empty session move them with their items."""
    items = np.arange(1, 13, dtype=np.int32)
    arrays = {f'{part}_{name}': array for part in ('train', 'test') for name, array in {
        'items': items, 'offsets': [0, 3, 3, 6, 9, 12], 'time': 1000 * items, 'kind': items % 2,
        'visitor': [1, 0, 4, 7, 10]}.items()}
    np.savez(tmp_path / 'x.npz', **arrays)
    data = ids_lib.load(tmp_path / 'x.npz', ordered=False, valid=1, seed=3)
    for part in (data.train, data.valid, data.test):
        assert part.time.tolist() == (1000 * part.items).tolist()
        assert part.kind.tolist() == (part.items % 2).tolist()
        assert part.visitor.tolist() == part.items[part.offsets[:-1]].tolist()
    np.savez(tmp_path / 'x.npz', **{**arrays, 'test_time': items[1:]})
    with pytest.raises(InputError, match=r'test_time is int32 \[11\]. Expected 12 integers'):
        ids_lib.load(tmp_path / 'x.npz', ordered=True, valid=1, seed=0)
