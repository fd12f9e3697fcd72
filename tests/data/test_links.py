"""Raw folders with links, pipes and folders where files should be: not followed, not waited for."""

import io
import json
import os

import pytest
from PIL import Image

from tpad_jax.data import images
from tpad_jax.data.sources import amazon, amazon_tables
from tpad_jax.errors import InputError


def picture():
    file = io.BytesIO()
    Image.new('RGB', (4, 4), 'red').save(file, 'PNG')
    return file.getvalue()


def raw(folder, asins='ABCDEF'):
    (folder / 'images').mkdir(parents=True)
    (folder / 'meta_X.jsonl').write_text(''.join(
        json.dumps({'parent_asin': asin, 'title': asin}) + '\n' for asin in asins))
    (folder / 'X.jsonl').write_text(''.join(
        json.dumps({'parent_asin': asin, 'user_id': f'U{k}', 'timestamp': 10**12 + 10**8 * k})
        + '\n' for k in range(6) for asin in 'AB'))
    return folder


def test_pictures_that_are_none_of_the_folder_are_counted(tmp_path, monkeypatch):
    """A pipe that nobody writes to, links in a circle and to nowhere, folders, links out."""
    folder = raw(tmp_path / 'raw')
    place = folder / 'images'
    monkeypatch.setattr(images, 'MAX_BYTES', 1000)
    (tmp_path / 'outside.jpg').write_bytes(picture())
    os.mkfifo(place / 'A.jpg')
    (place / 'B.jpg').symlink_to(place / 'B.png')
    (place / 'B.png').symlink_to(place / 'B.jpg')
    (place / 'C.jpg').mkdir()
    (place / 'D.jpg').symlink_to('/nowhere/D.jpg')
    (place / 'E.jpg').symlink_to('../../outside.jpg')
    (place / 'F.jpg').write_bytes(bytes(1001))
    (place / 'F.png').write_bytes(picture())  # the other is as good as not there
    (place / os.fsdecode(b'\xff\xe9.jpg')).write_bytes(picture())
    amazon_tables.prepare(folder, tmp_path / 'data',
                          gap_hours=1, core=1, min_length=1, valid=1, test=1,
                    seed=0)
    data = amazon_tables.load(tmp_path / 'data')
    assert data.lines['unused'] == {'image_not_a_file': 5, 'image_link_outside': 1,
                                    'image_too_large': 1, 'image_without_item': 1}
    assert [bool(one) for one in data.image_bytes] == [False] * 6 + [True]


@pytest.mark.parametrize(('name', 'told'), [
    ('images', 'leads out of'), ('X.jsonl', 'leads out of'), ('meta_X.jsonl', 'leads out of')])
def test_a_link_out_of_the_folder_is_refused(tmp_path, name, told):
    folder = raw(tmp_path / 'raw')
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(InputError, match=told):
        amazon.read(folder)


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda path: os.symlink(path, path)],
                         ids=['pipe', 'folder', 'circle'])
def test_what_is_no_file_is_not_waited_for(tmp_path, make):
    folder = raw(tmp_path / 'raw')
    (folder / 'X.jsonl').unlink()
    make(folder / 'X.jsonl')
    with pytest.raises(InputError, match='no reviews for meta_X'):
        amazon.read(folder)
    (folder / 'images').rmdir()
    make(folder / 'images')
    (folder / 'X.jsonl').rename(tmp_path / 'away')
    (folder / 'X.jsonl').write_text('{"parent_asin": "A", "user_id": "U", "timestamp": 1e12}\n')
    if make is os.mkdir:
        assert not amazon.read(folder).catalogue['image'].count()
    else:
        with pytest.raises(InputError, match=r'images(: not a directory|: a link that leads out)'):
            amazon.read(folder)


def test_pictures_without_access_are_not_no_pictures(tmp_path, monkeypatch):
    folder = raw(tmp_path / 'raw')

    def denied(path):
        raise PermissionError(path)
    for name in ('listdir', 'scandir'):
        monkeypatch.setattr(os, name, denied)
    with pytest.raises(PermissionError):
        images.by_stem(folder / 'images')
