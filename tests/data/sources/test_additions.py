"""New files of a source and their merge with known data: numbers, refusals, weights of sessions."""

import json

import numpy as np
import pytest

from tests.data.sources import test_amazon as raw, test_event_files as tables
from tpad_jax import config
from tpad_jax.data import item_graphs, sessions as sessions_lib, sources
from tpad_jax.data.catalogue import Data
from tpad_jax.data.sources import additions
from tpad_jax.errors import InputError

DAY = 86_400


def amazon(folder, first, users, more=()):
    """Reviews of three items a day and user, of the items A..F and of `more`, all later first."""
    names = ('A', 'B', 'C', 'D', 'E', 'F')[first:] + tuple(more)
    folder.mkdir(parents=True)
    raw.write23(folder, [{'parent_asin': name, 'title': f'thing {name}', 'store': 'acme',
                          'price': 3.0} for name in names],
                [raw.review23(f'U{user}', (*'ABCDEF', *more)[(user + step) % (6 + len(more))],
                              1000 * (raw.TIME + DAY * user + 60 * step))
                 for user in users for step in range(3)])
    return str(folder)


def csv(folder, items, users):
    folder.mkdir(exist_ok=True)
    events = [('user_id', 'item_id', 'time')] + [
        (f'U{user}', f'{(user + step) % items + 1:03d}', 1000 * (tables.START + DAY * user) + step)
        for user in users for step in range(3)]
    described = [tables.ITEMS[0], *((f'{n:03d}', f'thing {n}', '2', '') for n in
                                    (range(1, 7) if items == 6 else range(7, items + 1)))]
    return [tables.write(folder / f'{name}.csv', rows)
            for name, rows in (('events', events), ('items', described))]


def ready(folder, numbers, count):
    """Sessions of two items each, every item followed by the next one."""
    folder.mkdir()
    offsets = 2 * np.arange(count + 1)
    items = np.stack([np.arange(count), 1 + np.arange(count)], 1).ravel() % len(numbers) + 1
    np.savez(folder / 'sessions.npz', train_items=items, train_offsets=offsets,
             test_items=items[:4], test_offsets=offsets[:3], catalog_item=np.array([0, *numbers]))
    (folder / 'items.jsonl').write_text(''.join(
        json.dumps({'item': n, 'title': f'thing {n}'}) + '\n' for n in numbers))
    return str(folder)


def made(tmp_path, kind):
    """The config of a run on six items, its data, and the directory of files with one more."""
    c, new = config.get_config(), tmp_path / 'new'
    c.data.update(core=1, valid=2.0, test=2.0)
    if kind == 'raw_dir':
        c.data.raw_dir = amazon(tmp_path / 'old', 0, range(8))
        amazon(new, 6, range(8, 15), more=['0new'])
    elif kind == 'tables':
        c.data.event_file, c.data.item_file = csv(tmp_path / 'old', 6, range(8))
        csv(new, 7, range(8, 15))
    elif kind == 'ready':
        c.data.ready = ready(tmp_path / 'old', [9, 5, 7, 3, 1, 2], 12)
        ready(new, [8, 5, 7, 3], 8)
    else:
        for folder, items, count in (('old', 6, 12), ('new', 7, 8)):
            ready(tmp_path / folder, range(1, items + 1), count)
        c.data.npz = str(tmp_path / 'old' / 'sessions.npz')
    return c, sources.load(c, tmp_path / 'run'), new


@pytest.mark.parametrize('kind', ['raw_dir', 'tables', 'ready', 'npz'])
def test_known_items_keep_their_numbers_and_the_newest_sessions_are_held_out(tmp_path, kind):
    """New files describe the new item alone, where the form allows it."""
    c, known, directory = made(tmp_path, kind)
    new = additions.read(c, directory, known)
    data, kept = additions.merge(c, known, new, 0.2)
    assert kept.tolist() == [0]
    assert data.asins[:7] == known.asins
    assert data.asins[7] == {'raw_dir': '0new', 'tables': '007', 'ready': '8', 'npz': '7'}[kind]
    assert len(data.titles) == len(data.texts) == len(data.side) == len(data.attributes['price'])
    if kind != 'npz':
        assert data.texts[7]
        assert new.lines['read'] == new.lines['kept'] + sum(new.lines['rejected'].values())
    old, count = additions.history(known), len(new.sessions.start)
    assert len(old.start) == sum(len(x.start) for x in (known.train, known.valid, known.test))
    np.testing.assert_array_equal(data.train.items[:len(old.items)], old.items)
    held = max(1, round(0.2 * count))
    assert len(data.valid.start) == held
    np.testing.assert_array_equal(
        data.valid.items, sessions_lib.take(new.sessions, np.arange(count - held, count)).items)
    again = data
    for n in range(2):  # an update of an update: what is stored is what was merged
        additions.save(again, tmp_path / f'{n}')
        again = additions.restore(tmp_path / f'{n}')
    for name in Data.__dataclass_fields__:
        was, now = getattr(data, name), getattr(again, name)
        if name in ('train', 'valid', 'test'):
            for a, b in zip(was, now, strict=True):
                np.testing.assert_array_equal(a, b)
        elif name == 'attributes':
            assert {x: v[1:] for x, v in was.items()} == {x: v[1:] for x, v in now.items()}
        elif isinstance(was, np.ndarray):
            np.testing.assert_array_equal(was, now)
        elif name != 'lines':
            assert was == now, name


def test_only_items_that_are_sold_join_a_catalogue_of_those(tmp_path):
    c, known, directory = made(tmp_path, 'raw_dir')
    with (directory / 'meta_Gift_Cards.jsonl').open('a') as file:
        file.write(json.dumps({'parent_asin': '00', 'title': 'never sold'}) + '\n')
    new = additions.read(c, directory, known)
    assert additions.merge(c, known, new, 0.2)[0].asins[7:] == ['00', '0new']
    c.data.catalogue = 'sessions'
    data, kept = additions.merge(c, known, new, 0.2)
    assert (data.asins[7:], kept.tolist()) == (['0new'], [1])
    assert data.train.items.max() == 7


def test_files_of_another_catalogue_or_known_ones_are_refused(tmp_path):
    c, known, directory = made(tmp_path, 'raw_dir')
    foreign = tmp_path / 'foreign'
    foreign.mkdir()
    raw.write23(foreign, [{'parent_asin': name, 'title': name} for name in 'XYZ'],
                [raw.review23('U1', name, 1000 * (raw.TIME + 10**7)) for name in 'XYZ'])
    for path, reason in ((foreign, 'none of its 3 events is of an item of the run'),
                         (c.data.raw_dir, 'none of its sessions begins after the newest'),
                         (tmp_path / 'absent', 'not a directory'), (tmp_path, 'no meta_X.json')):
        with pytest.raises(InputError, match=reason):
            additions.read(c, type(tmp_path)(path), known)
    c.data.raw_dir, c.data.source = '', 'somewhere:SOURCE'
    with pytest.raises(InputError, match='have a form for new files'):
        additions.read(c, directory, known)


def test_sessions_that_are_known_do_not_count_twice(tmp_path):
    c, known, _ = made(tmp_path, 'raw_dir')
    amazon(tmp_path / 'every', 0, range(15), more=['0new'])  # days 0 to 7 are known
    new = additions.read(c, tmp_path / 'every', known)
    assert len(new.sessions.start) == 7
    assert new.sessions.start.min() > max(part.start.max() for part in (known.train, known.test))
    assert new.lines['unused']['session_not_after_the_known_ones'] == 8
    # a number of another file is another visitor
    assert new.sessions.visitor.min() > additions.history(known).visitor.max()
    (tmp_path / 'ids').mkdir()
    c, known, directory = made(tmp_path / 'ids', 'npz')  # without times
    data, _ = additions.merge(c, known, additions.read(c, directory, known), 0.2)
    with pytest.raises(InputError, match='name files that were not added before'):
        additions.read(c, directory, data)


def test_a_session_of_weight_three_counts_as_three_sessions():
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 7, 30)
    train = sessions_lib.Sessions(rng.integers(1, 11, lengths.sum()).astype(np.int32),
                                  np.append(0, np.cumsum(lengths)), np.arange(30))
    share = rng.integers(1, 4, 30)
    repeated = sessions_lib.take(train, np.repeat(np.arange(30), share))
    found = item_graphs.rules(train, 10, share=share.astype(float))
    like = item_graphs.rules(repeated, 10)
    for name in ('near', 'weight', 'events'):
        np.testing.assert_allclose(found[name], like[name], rtol=1e-6)
