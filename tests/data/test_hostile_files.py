"""Ready-made directories and arrays made to harm: refused or counted, never followed or run."""

import io
import json
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import polars as pl
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tpad_jax.data import catalogue, images, text, untrusted
from tpad_jax.data.sources import external_features, folder as folder_lib, ids as ids_lib
from tpad_jax.errors import InputError

OPTIONS = dict(ordered=True, valid=0.1, seed=0)


def picture():
    file = io.BytesIO()
    Image.new('RGB', (4, 4), 'red').save(file, 'PNG')
    return file.getvalue()


class Mark:
    """Unpickled, it leaves a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# --- ready-made directories -----------------------------------------------------------------------


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {f'{part}_{what}': value for part, count in (('train', 20), ('test', 5)) for what, value
            in (('items', rng.integers(1, 5, 3 * count)), ('offsets', np.arange(count + 1) * 3))}
    made['test_items'][:4] = 1, 2, 3, 4
    return made | changes


def directory(folder, lines=None, **changes):
    folder.mkdir(exist_ok=True)
    np.savez(folder / 'sessions.npz', **arrays(**changes))
    if lines is None:
        lines = [json.dumps({'item': k, 'title': f'thing {k}', 'image': f'{k}.png'}).encode()
                 for k in range(1, 5)]
    (folder / 'items.jsonl').write_bytes(b''.join(line + b'\n' for line in lines))
    return folder


def load(folder):
    return folder_lib.load(folder, words=('title',), sides=(), **OPTIONS)


@pytest.mark.parametrize(('line', 'told'), [
    (b'[' * 100_000, r'line 5 cannot be read \(bad_json\)'),
    (b'{"item": 5, "title": "\xe9"}', r'line 5 cannot be read \(bad_encoding\)'),
    (b'{"item": 5, "x": ' + b'9' * 5000 + b'}', 'line 5 cannot be read'),
    (b'{"item": 5, "x": "' + b'x' * untrusted.MAX_LINE + b'"}', r'line 5 .*\(line_too_long\)'),
    (b'{"item": NaN}', 'line 5: .item. is'), (b'{"item": "1"}', 'line 5: .item. is'),
    (b'{"item": 4}', 'line 5: .item. is'), (b'\x00', r'line 5 cannot be read')])
def test_a_line_that_says_no_item_is_refused(tmp_path, line, told):
    folder = directory(tmp_path / 'a')
    with (folder / 'items.jsonl').open('ab') as file:
        file.write(line + b'\n')
    with pytest.raises(InputError, match=told) as error:
        load(folder)
    assert str(folder / 'items.jsonl') in str(error.value)


def test_absurd_fields_of_an_item_are_words_or_nothing(tmp_path):
    deep = '[' * 700 + '"deep"' + ']' * 700
    folder = directory(tmp_path / 'a', [
        b'{"item": 1, "title": %s, "image": {"a": 1}}' % deep.encode(),
        b'{"item": 2, "title": {"a": 1}, "image": 7, "image": "../../2.png"}',
        b'{"item": 3, "title": [1e999, -1, true, null, [["x"]]], "image": "/etc/passwd"}',
        b'{"item": 4, "title": "&#%s; \\ud800", "image": "4.png"}' % (b'9' * 5000)])
    (folder / 'images').mkdir()
    data = load(folder)
    assert data.titles == ['', '', '', 'inf -1 True x', '']
    assert data.lines['unused'] == {'image_not_there': 4, 'title_page_code': 1}


def test_pictures_of_a_folder_are_read_inside_it_alone(tmp_path):
    folder = directory(tmp_path / 'a')
    (folder / 'images').mkdir()
    (tmp_path / 'secret.png').write_bytes(picture())
    os.mkfifo(folder / 'images' / '1.png')
    (folder / 'images' / '2.png').symlink_to(tmp_path / 'secret.png')
    (folder / 'images' / '3.png').symlink_to(folder / 'images' / '3.png')
    (folder / 'images' / '4.png').write_bytes(picture())
    data = load(folder)
    assert data.lines['unused'] == {'image_link_outside': 1, 'image_not_a_file': 2}
    assert list(data.image_bytes)[:5] == [b'', b'', b'', b'', picture()]


@pytest.mark.parametrize('name', ['sessions.npz', 'items.jsonl', 'images.zip', 'images'])
def test_no_part_of_a_directory_leads_out_of_it(tmp_path, name):
    folder = directory(tmp_path / 'a')
    if name == 'images':
        (folder / name).mkdir()
    elif name == 'images.zip':
        zipfile.ZipFile(folder / name, 'w').close()
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match='leads out of'):
        load(folder)


@pytest.mark.parametrize(('name', 'told'), [
    ('sessions.npz', r'sessions\.npz is not a usable'), ('items.jsonl', r'holds no items\.jsonl'),
    ('images.zip', '')])
def test_a_pipe_in_a_directory_is_not_waited_for(tmp_path, name, told):
    folder = directory(tmp_path / 'a')
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    if told:
        with pytest.raises(InputError, match=told):
            load(folder)
    else:
        assert not load(folder).has_image.any()


def patched(data, name, offset, form, value):
    """A zip file whose central directory says something else of a member than is true."""
    place = data.rindex(b'PK\x01\x02', 0, data.rindex(name)) + offset
    size = struct.calcsize(form)
    return data[:place] + struct.pack(form, value) + data[place + size:]


def test_members_of_a_zip_that_lie_or_burst_are_items_without_image(tmp_path, monkeypatch):
    monkeypatch.setattr(images, 'MAX_BYTES', 100_000)
    folder = directory(tmp_path / 'a', [
        json.dumps({'item': k, 'title': 'a', 'image': f'{k}.png'}).encode() for k in range(1, 10)],
        test_items=np.array([*range(1, 10), 1, 2, 3, 4, 5, 6]))
    with zipfile.ZipFile(folder / 'images.zip', 'w', zipfile.ZIP_DEFLATED) as file:
        file.writestr('../../../1.png', picture())  # a name, and nothing more
        file.writestr('2.png', bytes(10_000_000))  # says what it unpacks to
        file.writestr('3.png', bytes(10_000_000))  # says it is small
        file.writestr('4.png', bytes(10_000_000), zipfile.ZIP_BZIP2)  # and cannot be cut short
        file.writestr('5.png', picture())  # encrypted, it says
        file.writestr('6.png', picture())  # of another checksum
        file.writestr('7.png/', b'')
        file.writestr('/etc/8.png', picture())
    data = (folder / 'images.zip').read_bytes()
    data = patched(data, b'3.png', 24, '<I', 99)
    data = patched(data, b'4.png', 24, '<I', 99)
    data = patched(data, b'5.png', 8, '<H', 1)
    data = patched(data, b'6.png', 16, '<I', 7)
    (folder / 'images.zip').write_bytes(data)
    unpacked = []

    class Counted:
        def __init__(self):
            self.own = zlib.decompressobj(-15)

        def decompress(self, *args):
            unpacked.append(len(out := self.own.decompress(*args)))
            return out

        def __getattr__(self, name):
            return getattr(self.own, name)
    monkeypatch.setattr(zipfile, '_get_decompressor', lambda _: Counted())
    found = load(folder)
    assert found.lines['unused'] == {'image_not_a_file': 1, 'image_not_there': 1,
                                     'image_packed_otherwise': 2, 'image_too_large': 1}
    assert [len(one) > 0 for one in found.image_bytes] == [k in (1, 8) for k in range(10)]
    assert 1000 < max(unpacked) <= 100_000
    assert not list(tmp_path.rglob('*.png'))  # nothing is unpacked to the disk
    monkeypatch.setattr(text, 'tokenize', lambda texts, *_: np.zeros((len(texts), 1)))
    content = catalogue.content(found, tmp_path / 'data', image_size=4, tokenizer_dir='',
                               text_length=1)
    assert content.pictures == {'read': 9, 'kept': 2, 'rejected': {
        **found.lines['unused'], 'image_empty_or_unreadable': 2}}


def test_a_damaged_zip_gives_what_is_whole(tmp_path):
    """Bytes flipped in its members, and then anywhere: refused or read, and no crash."""
    folder = directory(tmp_path / 'a')
    with zipfile.ZipFile(folder / 'images.zip', 'w') as file:
        for k in range(1, 5):
            file.writestr(f'{k}.png', picture())
    whole, rng = (folder / 'images.zip').read_bytes(), np.random.default_rng(0)
    outcomes, refused = set(), []
    for _ in range(30):
        data = bytearray(whole)
        for _ in range(3):
            data[rng.integers(len(data))] = rng.integers(256)
        (folder / 'images.zip').write_bytes(data)
        try:
            outcomes |= {one in (b'', picture()) for one in load(folder).image_bytes}
        except InputError as error:
            refused.append(str(error))
            outcomes.add('refused')
    assert outcomes <= {True, 'refused'}
    assert all('images.zip is not a usable zip file' in told for told in refused)
    assert True in outcomes


# --- arrays ---------------------------------------------------------------------------------------


def array_of(shape, dtype='<i8', data=b''):
    """A .npy that says it has a shape."""
    head = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    head += b' ' * (63 - (10 + len(head)) % 64) + b'\n'
    return b'\x93NUMPY\x01\x00' + struct.pack('<H', len(head)) + head + data


def packed(path, members):
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def members(**changes):
    made = {}
    for name, value in arrays().items():
        file = io.BytesIO()
        np.save(file, value)
        made[f'{name}.npy'] = file.getvalue()
    return made | {f'{name}.npy': data for name, data in changes.items()}


@pytest.mark.parametrize(('changes', 'told'), [
    (dict(train_items=array_of((10**14,))), 'is not a usable'),
    (dict(train_items=array_of((-1,))), 'is not a usable'),
    (dict(train_items=array_of((60,), data=bytes(8))), 'is not a usable'),
    (dict(train_items=b'no array'), 'train_items in it is not an array'),
    (dict(train_items=array_of((60,), '|O', pickle.dumps([1]))), 'is not a usable .*allow_pickle'),
    (dict(train_items=array_of("'(")), 'is not a usable'),
    (dict(train_items=array_of((60,), '<m8[s]', bytes(480))), 'train_items is timedelta64'),
    (dict(train_items=array_of((60,), '<c16', bytes(960))), 'train_items is complex128')])
def test_arrays_that_are_none_are_refused(tmp_path, changes, told):
    path = packed(tmp_path / 'a.npz', members(**changes))
    with pytest.raises(InputError, match=told) as error:
        ids_lib.load(path, **OPTIONS)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(('changes', 'told'), [
    (dict(train_offsets=np.array([0, 2**63 - 1, -2**63, -1, 60])), 'rise from 0 to 60'),
    (dict(train_offsets=np.array([0, 2**64 - 1, 60], np.uint64)), 'rise from 0 to 60'),
    (dict(train_offsets=np.array([-3, 60])), 'rise from 0'),
    (dict(train_offsets=np.array([0, 61])), 'rise from 0'),
    (dict(train_offsets=np.array(60)), r'train_offsets is int64 \[\]'),
    (dict(test_items=np.full(15, 2**31)), r'test_items\[0\]=-?\d+: not an item id'),
    (dict(test_items=np.full(15, -1)), r'test_items\[0\]=-?\d+: not an item id'),
    (dict(test_items=np.full(15, 2**64 - 1, np.uint64)), r'test_items\[0\]=-?\d+: not an item id'),
    (dict(test_items=np.full(15, 2**31 - 2)), 'the largest item id is 2147483646, but only 5 ids'),
    (dict(catalog_item=np.array([{}] * 5, object)), 'is not a usable'),
    (dict(catalog_item=np.ones((5, 5), int)), r'catalog_item is int64 \[5, 5\]')])
def test_offsets_and_ids_out_of_range_are_refused(tmp_path, changes, told):
    folder = directory(tmp_path / 'a', **changes)
    with pytest.raises(InputError, match=told):
        load(folder)


def test_an_npz_that_bursts_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(ids_lib, 'MAX_ARRAYS', 10**7)
    path = packed(tmp_path / 'a.npz', members(train_items=array_of((10**7,), '<i1', bytes(10**7))))
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(np, 'load', None)
    with pytest.raises(InputError, match='its arrays would take'):
        ids_lib.load(path, **OPTIONS)


@pytest.mark.parametrize('content', [b'', b'PK\x05\x06', array_of((2,), data=bytes(16)),
                                     pickle.dumps(1)], ids=['empty', 'cut', 'npy', 'pickle'])
def test_what_is_no_npz_is_refused(tmp_path, content):
    (tmp_path / 'a.npz').write_bytes(content)
    with pytest.raises(InputError, match=r'a\.npz is not a usable'):
        ids_lib.load(tmp_path / 'a.npz', **OPTIONS)


ASINS = ['', 'A', 'B']


def features(tmp_path, kind):
    """A file of features that harms."""
    good, ids = np.ones((2, 3), np.float32), np.frombuffer(b'A\nB', np.uint8)
    file = tmp_path / f'a.{kind.split()[0]}'
    file.with_name(file.name + '.ids').write_bytes(b'A\nB\n')
    if kind == 'npy of objects':
        np.save(file, np.array([[Mark(tmp_path / 'run')]] * 2, object))
    elif kind == 'npy that is a pickle':
        file.write_bytes(pickle.dumps(Mark(tmp_path / 'run')))
    elif kind == 'npy that is an npz':
        np.savez(tmp_path / 'a.npz', good)
        (tmp_path / 'a.npz').rename(file)
    elif kind == 'npy of absurd shape':
        file.write_bytes(array_of((2, 10**15), '<f4'))
    elif kind == 'npy of absurd width':
        file.write_bytes(array_of((2, 10**9), '<f4'))
        os.truncate(file, 128 + 8 * 10**9)  # takes no room on the disk
    elif kind == 'npy of a program':
        file.write_bytes(array_of("(2, __import__('os').mkdir('run'))"))
    elif kind == 'npy of ids in latin-1':
        np.save(file, good)
        file.with_name(file.name + '.ids').write_bytes(b'A\n\xe9\n')
    elif kind == 'npy of infinity':
        np.save(file, good * np.inf)
    elif kind == 'safetensors of endless head':
        file.write_bytes(struct.pack('<Q', 2**60) + b'{}')
    elif kind == 'safetensors out of range':
        head = json.dumps({'features': dict(dtype='F32', shape=[2, 3], data_offsets=[0, 10**9]),
                           'ids': dict(dtype='U8', shape=[3], data_offsets=[0, 3])}).encode()
        file.write_bytes(struct.pack('<Q', len(head)) + head + bytes(24))
    elif kind == 'safetensors of deep ids':
        save_file({'features': good}, file, metadata={'ids': '[' * 100_000})
    elif kind == 'safetensors that is a pickle':
        file.write_bytes(pickle.dumps(Mark(tmp_path / 'run')))
    elif kind == 'safetensors of eight bits':
        head = json.dumps({'features': dict(dtype='F8_E5M2', shape=[2, 3], data_offsets=[3, 9]),
                           'ids': dict(dtype='U8', shape=[3], data_offsets=[0, 3])}).encode()
        file.write_bytes(struct.pack('<Q', len(head)) + head + ids.tobytes() + bytes(6))
    elif kind == 'parquet of texts':
        pl.DataFrame({'item_id': ['A', 'B'], 'features': [['x'], ['y']]}).write_parquet(file)
    elif kind == 'parquet of numbers':
        pl.DataFrame({'item_id': ['A', 'B'], 'features': [1.0, 2.0]}).write_parquet(file)
    else:  # cut short
        pl.DataFrame({'item_id': ['A', 'B'], 'features': good.tolist()}).write_parquet(file)
        file.write_bytes(file.read_bytes()[:-40])
    return file


@pytest.mark.parametrize('kind', [
    'npy of objects', 'npy that is a pickle', 'npy that is an npz', 'npy of absurd shape',
    'npy of absurd width', 'npy of a program', 'npy of ids in latin-1', 'npy of infinity',
    'safetensors of endless head', 'safetensors out of range', 'safetensors of deep ids',
    'safetensors that is a pickle', 'safetensors of eight bits', 'parquet of texts',
    'parquet of numbers', 'parquet cut short'])
def test_features_that_harm_are_refused(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    file = features(tmp_path, kind)
    with pytest.raises(InputError, match=r'a\.\w+'):
        external_features.read(file, ASINS)
    assert not (tmp_path / 'run').exists()


def test_a_byte_order_mark_is_no_part_of_the_first_id(tmp_path):
    np.save(tmp_path / 'f.npy', np.eye(2))
    (tmp_path / 'f.npy.ids').write_bytes('B1\r\nB2\r\n'.encode('utf-8-sig'))
    found = external_features.read(tmp_path / 'f.npy', ['', 'B2', 'B1'])
    np.testing.assert_array_equal(found.rows[1:], np.eye(2)[::-1])
    assert not found.unknown
