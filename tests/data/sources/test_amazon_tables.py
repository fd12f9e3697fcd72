"""Raw files -> tables: the round trip through TFDS, what is reused and what is refused."""

import gzip
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tpad_jax.data import sessions as sessions_lib, text
from tpad_jax.data.sources import amazon_tables
from tpad_jax.errors import InputError

HOUR = 3600
OPTIONS = dict(gap_hours=1, core=1, min_length=2, valid=2, test=2, seed=0)


def write_raw(raw_dir, reviews, items, images=None):
    """A 2023 folder: reviews = (user, asin, seconds), items = {asin: fields}, {asin: bytes}."""
    (raw_dir / 'images').mkdir(parents=True)
    for asin, data in (images or {}).items():
        (raw_dir / 'images' / f'{asin}.jpg').write_bytes(data)
    lines = [dict(user_id=user, parent_asin=asin, timestamp=time * 1000, rating=5.0)
             for user, asin, time in reviews]
    (raw_dir / 'Toys.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    with gzip.open(raw_dir / 'meta_Toys.jsonl.gz', 'wt') as file:
        for asin, fields in items.items():
            file.write(json.dumps(dict(parent_asin=asin) | fields) + '\n')


def jpeg(colour):
    file = io.BytesIO()
    Image.new('RGB', (20, 10), colour).save(file, 'JPEG')
    return file.getvalue()


@pytest.fixture
def raw(tmp_path):
    """Five items, C never in training, D without a review; eight sessions an hour and more apart.

    User u of session k buys at hours 10 k; the last two pairs of sessions are valid and test.
    """
    baskets = ['AB', 'BA', 'ABE', 'EA', 'CA', 'BC', 'CB', 'ACB']
    start = 1_600_000_000
    reviews = [(f'u{k % 3}', f'B00{letter}', start + 10 * HOUR * k + 60 * place)
               for k, basket in enumerate(baskets) for place, letter in enumerate(basket)]
    items = {f'B00{letter}': dict(title=f'Toy &amp; {letter}', store='Acme', price=price,
                                  categories=['Toys', 'Small'], description=['Fun.'])
             for letter, price in zip('ABCDE', [1.5, None, 2.5, 3.0, 4.0], strict=True)}
    folder = tmp_path / 'raw'
    write_raw(folder, reviews[::-1], items, {'B00A': jpeg('red'), 'B00C': b'no image'})
    return folder, baskets, start


def letters(data, sessions):
    return [''.join(data.asins[item][-1] for item in part)
            for part in np.split(sessions.items, sessions.offsets[1:-1])]


def test_round_trip(raw, tmp_path):
    folder, baskets, start = raw
    amazon_tables.prepare(folder, tmp_path / 'data', **OPTIONS)
    data = amazon_tables.load(tmp_path / 'data')

    assert data.asins == ['', 'B00A', 'B00B', 'B00C', 'B00D', 'B00E']
    assert data.num_items == 5
    assert data.titles[2] == 'Toy & B'
    assert data.texts[0] == ''
    assert data.texts[1] == 'Toy & A. Acme. Toys > Small. Fun.'
    assert [letters(data, split) for split in (data.train, data.valid, data.test)] == [
        baskets[:4], baskets[4:6], baskets[6:]]
    np.testing.assert_array_equal(data.train.start, start + 10 * HOUR * np.arange(4))
    np.testing.assert_array_equal(data.test.start, start + 10 * HOUR * np.arange(6, 8))
    assert data.warm.tolist() == [False, True, True, False, False, True]
    assert data.has_image.tolist() == [False, True, False, True, False, False]
    assert data.form == '2023'
    assert data.lines['read'] == data.lines['kept'] == 5 + sum(map(len, baskets))
    assert isinstance(data.audit['warnings'], list)
    # price of E, 4.0, is the dearest warm one; B has none
    assert data.side.shape == (6, 3)
    assert data.side[5, 2] > data.side[1, 2] > 0 == data.side[2, 2]
    assert data.train.items.dtype == np.int32
    assert data.train.offsets.dtype == data.train.start.dtype == np.int64


def test_image_bytes_are_the_files(raw, tmp_path):
    folder = raw[0]
    amazon_tables.prepare(folder, tmp_path / 'data', **OPTIONS)
    images = amazon_tables.load(tmp_path / 'data').image_bytes
    assert len(images) == 6
    assert images[1] == (folder / 'images/B00A.jpg').read_bytes()
    assert [images[k] for k in (0, 3, 2, 1)] == [b'', b'no image', b'', images[1]]
    for outside in (6, -1):
        with pytest.raises(IndexError):
            images[outside]


def test_sessions_are_those_of_the_pure_functions(tmp_path, monkeypatch):
    """On many random events, with a core: nothing is lost or reordered on the way to disk."""
    monkeypatch.setattr(amazon_tables, 'SESSIONS_PER_RECORD', 7)
    rng = np.random.default_rng(5)
    asins = [f'I{k:03d}' for k in range(40)]
    reviews = sorted({(f'u{rng.integers(30)}', asins[min(rng.geometric(0.08) - 1, 39)],
                       int(1_500_000_000 + rng.integers(400) * 900)) for _ in range(1500)})
    write_raw(tmp_path / 'raw', reviews, {asin: dict(title=asin) for asin in asins})
    options = dict(gap_hours=2, core=8, min_length=3, valid=0.2, test=0.1, seed=3)
    amazon_tables.prepare(tmp_path / 'raw', tmp_path / 'data', **options)
    data = amazon_tables.load(tmp_path / 'data')

    raw = amazon_tables.amazon.read(tmp_path / 'raw')
    every = sessions_lib.cut(raw.interactions, by_day=False, gap_seconds=7200, seed=3, min_length=3)
    train, valid, test = sessions_lib.split(every, 0.2, 0.1)
    train = sessions_lib.k_core(train, 8, 3)
    for got, wanted in zip((data.train, data.valid, data.test), (train, valid, test), strict=True):
        for one, other in zip(got, wanted, strict=True):
            np.testing.assert_array_equal(one, other)
    assert len(amazon_tables.read_table(tmp_path / 'data', 'sessions', 'train')) > 3
    assert np.bincount(data.train.items)[np.unique(data.train.items)].min() >= 8
    assert data.texts == text.item_texts(raw.catalogue)


def test_2018_sessions_are_days(tmp_path):
    """Times of the 2018 form are midnights: a gap of hours must not join two days."""
    folder = tmp_path / 'raw'
    folder.mkdir()
    day = 1_400_025_600
    lines = [dict(reviewerID='u', asin=asin, unixReviewTime=day + 86_400 * number)
             for number in range(6) for asin in ('A', 'B')]
    (folder / 'Toys_5.json').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    (folder / 'meta_Toys.json').write_text(
        ''.join(json.dumps(dict(asin=asin, title=asin)) + '\n' for asin in 'AB'))
    amazon_tables.prepare(folder, tmp_path / 'data', **OPTIONS | dict(gap_hours=72))
    data = amazon_tables.load(tmp_path / 'data')
    assert data.form == '2018'
    assert [len(split.start) for split in (data.train, data.valid, data.test)] == [2, 2, 2]
    assert np.diff(data.train.offsets).tolist() == [2, 2]


def test_finished_data_is_reused(raw, tmp_path, monkeypatch):
    folder = raw[0]
    amazon_tables.prepare(folder, tmp_path / 'data', **OPTIONS)

    def read(raw_dir):
        raise AssertionError('read again')
    monkeypatch.setattr(amazon_tables.amazon, 'read', read)
    amazon_tables.prepare(folder, tmp_path / 'data', **OPTIONS | dict(valid=2.0))


def test_unfinished_data_is_rebuilt(raw, tmp_path, monkeypatch):
    folder, data_dir = raw[0], tmp_path / 'data'

    def stop(path, content):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(amazon_tables.files, 'write_text', stop)
        with pytest.raises(KeyboardInterrupt):
            amazon_tables.prepare(folder, data_dir, **OPTIONS | dict(valid=1))
    with pytest.raises(InputError, match=r'prepared\.json does not exist'):
        amazon_tables.load(data_dir)
    (data_dir / 'mine.txt').write_text('keep')
    amazon_tables.prepare(folder, data_dir, **OPTIONS)
    assert len(amazon_tables.load(data_dir).valid.start) == 2
    assert (data_dir / 'mine.txt').read_text() == 'keep'


def test_other_data_is_refused(raw, tmp_path):
    folder, data_dir = raw[0], tmp_path / 'data'
    amazon_tables.prepare(folder, data_dir, **OPTIONS)
    with pytest.raises(InputError, match=r'data was prepared with another core \(1 there, 2 now\)'):
        amazon_tables.prepare(folder, data_dir, **OPTIONS | dict(core=2))
    (folder / 'images' / 'B00B.jpg').write_bytes(jpeg('blue'))
    with pytest.raises(InputError, match='prepared with other raw files'):
        amazon_tables.prepare(folder, data_dir, **OPTIONS)


def test_another_layout_is_refused(raw, tmp_path, monkeypatch):
    amazon_tables.prepare(raw[0], tmp_path / 'data', **OPTIONS)
    monkeypatch.setattr(amazon_tables.Amazon, 'VERSION', '9.0.0')
    with pytest.raises(InputError, match=r'version 1\.2\.0\. Expected 9\.0\.0'):
        amazon_tables.load(tmp_path / 'data')


def test_fingerprint_is_of_bytes_and_options(raw, tmp_path):
    folder = raw[0]
    first = amazon_tables.fingerprint(folder, OPTIONS)
    folder.rename(tmp_path / 'moved')
    folder = tmp_path / 'moved'
    assert amazon_tables.fingerprint(folder, OPTIONS) == first
    others = [amazon_tables.fingerprint(folder, OPTIONS | dict(seed=1))]
    (folder / 'images/B00A.jpg').rename(folder / 'images/B00B.jpg')
    others.append(amazon_tables.fingerprint(folder, OPTIONS))
    with (folder / 'Toys.jsonl').open('a') as file:
        file.write('\n')
    others.append(amazon_tables.fingerprint(folder, OPTIONS))
    assert len({first, *others}) == 4


def test_link_out_of_the_folder_is_not_read(raw, tmp_path):
    folder = raw[0]
    before = amazon_tables.fingerprint(folder, OPTIONS)
    (tmp_path / 'secret.jpg').write_bytes(jpeg('green'))
    (folder / 'images/B00B.jpg').symlink_to(tmp_path / 'secret.jpg')
    assert amazon_tables.fingerprint(folder, OPTIONS) == before
    amazon_tables.prepare(folder, tmp_path / 'data', **OPTIONS)
    assert amazon_tables.load(tmp_path / 'data').image_bytes[2] == b''


def test_needs_no_tensorflow_and_says_nothing(raw, tmp_path):
    """In a process of its own, where nothing else has imported anything."""
    program = f"""
import sys
from tpad_jax.data import batches
from tpad_jax.data.sources import amazon_tables
amazon_tables.prepare({str(raw[0])!r}, {str(tmp_path / 'data')!r}, **{OPTIONS!r})
data = amazon_tables.load({str(tmp_path / 'data')!r})
next(batches.session_batches(data, batch_size=2, seed=0, max_length=3))
import tensorflow_datasets as tfds
by_name = tfds.data_source('amazon/items', split='items', data_dir={str(tmp_path / 'data')!r})
assert by_name[1]['title'] == b'Toy & B'
assert not {{'tensorflow', 'torch', 'transformers'}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, '-W', 'error', '-c', program], capture_output=True,
                          text=True, cwd=Path(__file__).parents[3], timeout=120)
    assert (done.stdout, done.stderr, done.returncode) == ('', '', 0)


def test_data_can_be_moved(raw, tmp_path):
    amazon_tables.prepare(raw[0], tmp_path / 'data', **OPTIONS)
    (tmp_path / 'data').rename(tmp_path / 'moved')
    data = amazon_tables.load(str(tmp_path / 'moved'))
    assert data.asins[1] == 'B00A'
    assert data.image_bytes[3] == b'no image'


def test_missing_price_is_null(raw, tmp_path):
    amazon_tables.prepare(raw[0], tmp_path / 'data', **OPTIONS)
    records = amazon_tables.read_table(tmp_path / 'data', 'items', 'items')
    prices = [float(record['price']) for record in records]
    assert prices[0] == 1.5
    assert [math.isnan(price) for price in prices] == [False, True, False, False, False]
