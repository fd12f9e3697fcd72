"""Batches as a pure function of (seed, step), their content rows, and decoding once into a file."""

import io
import itertools
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import tokenizers
from PIL import Image

from tpad_jax.data import batches, catalogue, sessions as sessions_lib
from tpad_jax.data.sessions import Sessions
from tpad_jax.data.sources import amazon_tables, tf_examples
from tpad_jax.errors import InputError

V, N = 30, 4  # items; longest prefix, shorter than most sessions


@pytest.fixture(scope='module')
def data():
    """Forty random sessions of 2 to 8 of the items 1..V."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, 9, 40)
    sessions = Sessions(rng.integers(1, V + 1, lengths.sum()).astype(np.int32),
                        np.append(0, np.cumsum(lengths)).astype(np.int64), np.arange(40))
    names = [''] + [f'A{item}' for item in range(1, V + 1)]
    return catalogue.Data(asins=names, titles=names, texts=names, image_bytes=None,
                         has_image=np.arange(V + 1) > 0, side=np.zeros((V + 1, 3), np.int32),
                         side_sizes=(1, 1, 1), train=sessions, valid=sessions, test=sessions,
                         warm=np.arange(V + 1) > 0, lines={}, audit={}, fingerprint='f',
                         form='2023')


@pytest.fixture(scope='module')
def content():
    """Every pixel and token of item i is i."""
    item = np.arange(V + 1)
    return catalogue.Content(
        image=np.broadcast_to(item[:, None, None, None], (V + 1, 2, 2, 3)).astype(np.uint8),
        has_image=item % 2 == 1, tokens=np.repeat(item[:, None], 5, axis=1).astype(np.int32),
        broken=0)


def take(iterator, count):
    out = list(itertools.islice(iterator, count))
    iterator.close()
    return out


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


def unrolled(data):
    """(prefix, target) of every row, by loops."""
    sessions = np.split(data.train.items, data.train.offsets[1:-1])
    return [(list(part[max(0, end - N):end]), part[end])
            for part in sessions for end in range(1, len(part))]


def test_an_epoch_is_every_row_once_then_shuffled_anew(data):
    rows = unrolled(data)
    got = take(batches.session_batches(data, batch_size=7, seed=1, max_length=N),
               2 * len(rows) // 7 + 1)
    order = np.concatenate([batch['row'] for batch in got])
    first, second = order[:len(rows)], order[len(rows):2 * len(rows)]
    assert sorted(first) == sorted(second) == list(range(len(rows)))
    assert (first != second).any()
    assert (first != np.arange(len(rows))).any()
    for batch in got:
        for place, row in enumerate(batch['row']):
            prefix, target = rows[row]
            assert [item for item in batch['items'][place] if item] == prefix
            assert list(batch['items'][place][:len(prefix)]) == prefix  # left aligned
            assert list(batch['next'][place][:len(prefix)]) == [*prefix[1:], target]
            assert not batch['next'][place][len(prefix):].any()
            assert batch['target'][place] == target
        assert batch['valid'].all()


def test_shapes_and_dtypes(data, content):
    batch, = take(batches.session_batches(data, batch_size=6, seed=0, max_length=N,
                                          content=content, shards=2), 1)
    width = 2 * (min(3 * (N + 1), V) + 1)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        'items': ((6, N), np.int32), 'next': ((6, N), np.int32), 'target': ((6,), np.int32),
        'valid': ((6,), np.bool_), 'row': ((6,), np.int32), 'slots': ((6, N), np.int32),
        'next_slots': ((6, N), np.int32), 'ids': ((width,), np.int32),
        'image': ((width, 2, 2, 3), np.uint8), 'has_image': ((width,), np.bool_),
        'tokens': ((width, 5), np.int32)}
    batch, = take(batches.item_batches(data, batch_size=6, seed=0, content=content, shards=2), 1)
    assert {key: (value.shape, value.dtype) for key, value in batch.items()} == {
        'items': ((6, 1), np.int32), 'next': ((6, 1), np.int32), 'target': ((6,), np.int32),
        'valid': ((6,), np.bool_), 'row': ((6,), np.int32), 'slots': ((6, 1), np.int32),
        'next_slots': ((6, 1), np.int32), 'ids': ((8,), np.int32),
        'image': ((8, 2, 2, 3), np.uint8), 'has_image': ((8,), np.bool_),
        'tokens': ((8, 5), np.int32)}


@pytest.mark.parametrize('start', [1, 7, 61])
def test_starting_late_is_skipping(data, content, start):
    """Also past the end of an epoch, which has fewer than 61 batches of 16."""
    def stream(step):
        return batches.session_batches(data, batch_size=16, seed=3, start_step=step, max_length=N,
                                       content=content)
    for late, skipped in zip(take(stream(start), 2), take(stream(0), start + 2)[start:],
                             strict=True):
        assert_equal(late, skipped)
    late, = take(batches.item_batches(data, batch_size=4, seed=3, start_step=start,
                                      content=content), 1)
    assert_equal(late, take(batches.item_batches(data, batch_size=4, seed=3, content=content),
                            start + 1)[start])


def test_seed_decides(data):
    one, two, three = (take(batches.session_batches(data, batch_size=16, seed=seed, max_length=N),
                            1)[0] for seed in (0, 0, 1))
    assert_equal(one, two)
    assert (one['row'] != three['row']).any()


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_share_a_step(data, content, processes):
    for stream in (
        lambda **kw: batches.session_batches(data, batch_size=16, seed=0, max_length=N, **kw),
        lambda **kw: batches.item_batches(data, batch_size=16, seed=0, content=content, **kw),
    ):
        whole = take(stream(), 20)
        parts = [take(stream(processes=processes, process=process), 20)
                 for process in range(processes)]
        for step, batch in enumerate(whole):
            together = np.concatenate([part[step]['row'] for part in parts])
            assert len(parts[0][step]['row']) == 16 // processes
            assert sorted(together) == sorted(batch['row'])


@pytest.mark.parametrize('shards', [1, 2, 4])
def test_slots_point_at_the_content(data, content, shards):
    for batch in take(batches.session_batches(data, batch_size=8, seed=0, max_length=N,
                                              content=content, shards=shards), 12):
        ids = np.split(batch['ids'], shards)
        for key, slots in (('items', 'slots'), ('next', 'next_slots')):
            for part, slot, own in zip(np.split(batch[key], shards),
                                       np.split(batch[slots], shards), ids, strict=True):
                np.testing.assert_array_equal(own[slot], part)
        for own, items, following in zip(ids, np.split(batch['items'], shards),
                                         np.split(batch['next'], shards), strict=True):
            present = sorted({0, *items.ravel().tolist(), *following.ravel().tolist()})
            assert own[:len(present)].tolist() == present  # distinct, ascending, nothing else
            assert not own[len(present):].any()
            assert set(batch['target']) <= set(batch['next'].ravel())
        check_content(batch)


def check_content(batch):
    np.testing.assert_array_equal(batch['image'], np.broadcast_to(
        batch['ids'][:, None, None, None], batch['image'].shape))
    np.testing.assert_array_equal(batch['tokens'], np.repeat(batch['ids'][:, None], 5, axis=1))
    np.testing.assert_array_equal(batch['has_image'], batch['ids'] % 2 == 1)


def test_widest_batch_fits(content):
    """All rows full and all items different: the content rows are exactly used up."""
    items = np.arange(1, V + 1, dtype=np.int32)
    starts = np.arange(0, V + 1, N + 1)
    wide = Sessions(items, starts, np.arange(len(starts) - 1))
    data = catalogue.Data([''] * (V + 1), [], [], None, None, None, (1, 1, 1), wide, wide, wide,
                         None, {}, {}, '', '2023')
    batch, = take(batches.session_batches(data, batch_size=6, seed=0, max_length=N, shards=2,
                                          every_prefix=False, content=content), 1)
    assert len(batch['ids']) == 2 * (3 * (N + 1) + 1)
    for own in np.split(batch['ids'], 2):
        assert len(set(own.tolist())) == len(own)
    check_content(batch)


def test_whole_sessions_only(data):
    batch, = take(batches.session_batches(data, batch_size=40, seed=0, max_length=N,
                                          every_prefix=False), 1)
    assert sorted(batch['row']) == list(range(40))
    last = data.train.items[data.train.offsets[1:] - 1]
    np.testing.assert_array_equal(batch['target'], last[batch['row']])


def test_item_batches_visit_the_catalogue(data, content):
    got = take(batches.item_batches(data, batch_size=10, seed=0, content=content, shards=2), 6)
    for epoch in (got[:3], got[3:]):
        assert sorted(np.concatenate([batch['row'] for batch in epoch])) == list(range(1, V + 1))
    for batch in got:
        np.testing.assert_array_equal(batch['items'][:, 0], batch['row'])
        ids = np.split(batch['ids'], 2)
        assert ids[0][0] == ids[1][0] == 0
        for own, slots, items in zip(ids, np.split(batch['slots'], 2),
                                     np.split(batch['items'], 2), strict=True):
            np.testing.assert_array_equal(own[slots], items)
        assert not batch['next'].any()
        assert not batch['next_slots'].any()
        assert not batch['target'].any()
        check_content(batch)


def test_pictures_of_side_0_are_none(data, content):
    """Each part of a step has the items' words, for devices and for parts in turn."""
    texts = replace(content, image=content.image[:, :0, :0])
    batch, = take(batches.item_batches(data, batch_size=4, seed=0, content=texts, shards=2), 1)
    assert batch['image'].shape == (6, 0, 0, 3)
    np.testing.assert_array_equal(batch['tokens'], content.tokens[batch['ids']])


def test_item_batches_without_content_have_the_same_items(data, content):
    cut = dict(batch_size=10, seed=0, shards=2)
    batch, = take(batches.item_batches(data, content=None, **cut), 1)
    full, = take(batches.item_batches(data, content=content, **cut), 1)
    assert batch.keys() == {'items', 'next', 'target', 'valid', 'row'}
    assert_equal(batch, {name: full[name] for name in batch})


def test_positions_of_a_batch_larger_than_an_epoch():
    place = batches.positions(0, 0, 25, 10)
    assert sorted(place[:10]) == sorted(place[10:20]) == list(range(10))
    np.testing.assert_array_equal(batches.positions(0, 2, 10, 10)[:5], place[20:])


def test_indivisible_batch_is_refused(data, content):
    with pytest.raises(InputError, match=r'batch_size=12: .* multiple of 8'):
        batches.session_batches(data, batch_size=12, seed=0, max_length=N, processes=2, shards=4)
    with pytest.raises(InputError, match='batch_size=3'):
        batches.item_batches(data, batch_size=3, seed=0, content=content, shards=2)


def test_nothing_to_train_on_is_refused():
    none = Sessions(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64))
    data = catalogue.Data([''], [], [], None, None, None, (1, 1, 1), none, none, none, None, {}, {},
                         '', '2023')
    with pytest.raises(InputError, match='no training session has two items'):
        batches.session_batches(data, batch_size=2, seed=0, max_length=N)


def encoded(colour):
    file = io.BytesIO()
    Image.new('RGB', (16, 16), colour).save(file, 'PNG')
    return file.getvalue()


def test_content_is_decoded_once(tmp_path, monkeypatch):
    """Item 1 red, 2 without a file, 3 broken, 4 blue; read back through the table of images."""
    pictures = [encoded('red'), b'', b'no image', encoded('blue')]
    amazon_tables.write_table(tmp_path, 'images', {'images': tf_examples.serialized(
        pl.DataFrame({'image': pictures})).to_pylist()})
    vocabulary = {'[PAD]': 0, '[UNK]': 1, 'red': 2, 'toy': 3}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token='[UNK]'))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    (tmp_path / 'words').mkdir()
    tokenizer.save(str(tmp_path / 'words' / 'tokenizer.json'))
    (tmp_path / 'words' / 'tokenizer_config.json').write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}')
    none = Sessions(np.zeros(0, np.int32), np.zeros(1, np.int64), np.zeros(0, np.int64))
    data = catalogue.Data(asins=['', 'a', 'b', 'c', 'd'], titles=[],
                         texts=['', 'red toy', 'toy toy toy toy', 'unheard', ''],
                         image_bytes=amazon_tables.ImageBytes(tmp_path),
                         has_image=np.array([False, True, False, True, True]), side=None,
                         side_sizes=(1, 1, 1), train=none, valid=none, test=none, warm=None,
                         lines={}, audit={}, fingerprint='f' * 64, form='2023')

    def content(size=8):
        return catalogue.content(data, tmp_path, image_size=size, text_length=3,
                                tokenizer_dir=tmp_path / 'words')
    first = content()
    colours = np.zeros((5, 3), np.uint8)
    colours[1], colours[4] = (255, 0, 0), (0, 0, 255)
    assert isinstance(first.image, np.memmap)
    pixels = np.broadcast_to(colours[:, None, None], (5, 8, 8, 3))
    np.testing.assert_array_equal(first.image, pixels)
    assert first.has_image.tolist() == [False, True, False, False, True]
    assert first.broken == 1
    assert first.tokens.tolist() == [[-1] * 3, [2, 3, -1], [3] * 3, [1, -1, -1], [-1] * 3]
    assert (tmp_path / 'bad_images.txt').read_text() == 'c\timage_of_unknown_format\n'
    assert first.pictures == {'read': 3, 'kept': 2, 'rejected': {'image_of_unknown_format': 1}}
    assert not list(tmp_path.glob('*.partial')) + list(tmp_path.glob('*.list'))

    assert content(size=4).image.shape == (5, 4, 4, 3)

    def read(encoded, size):
        raise AssertionError('decoded again')
    monkeypatch.setattr(catalogue.images, 'read', read)
    assert content(size=0).image.shape == (5, 0, 0, 3)
    again = content()
    np.testing.assert_array_equal(again.image, first.image)
    np.testing.assert_array_equal(again.has_image, first.has_image)
    assert again.broken == 1
    assert again.pictures == first.pictures


def test_rows_are_those_of_evaluation(data):
    """Training and evaluation unroll sessions by one function."""
    rows = sessions_lib.rows(data.train, N)
    batch, = take(batches.session_batches(data, batch_size=8, seed=0, max_length=N), 1)
    for key in ('items', 'next', 'target'):
        np.testing.assert_array_equal(batch[key], getattr(rows, key)[batch['row']])
