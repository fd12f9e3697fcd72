"""Pictures with damage: no crash, every one counted, the whole ones as without the others."""

import io
import json
import struct
import subprocess
import sys
import zlib
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tpad_jax.data import catalogue, images
from tpad_jax.data.sources import amazon_tables
from tpad_jax.errors import InputError

SIDE = 16  # pixels
# pixels a side, more than we decode, but let through, warned of and refused by Pillow
GIANTS = 7_000, 10_000, 16_000


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def whole(rng):
    """{kind: bytes} of whole pictures, in every form and mode that shops have."""
    pixels = rng.integers(0, 256, (24, 36, 3), dtype=np.uint8)
    rgb = Image.fromarray(pixels)
    grey, turned, exif = rgb.convert('L'), rgb.transpose(Image.Transpose.ROTATE_180), Image.Exif()
    exif[0x0112] = int(rng.integers(1, 9))  # which side is up
    fine = dict(quality=95, subsampling=0)
    more = dict(save_all=True, append_images=[turned])
    plain = encoded(rgb, 'PNG')
    return {
        'jpeg': encoded(rgb, 'JPEG', **fine), 'jpeg grey': encoded(grey, 'JPEG'),
        'jpeg progressive': encoded(rgb, 'JPEG', progressive=True),
        'jpeg cmyk': encoded(rgb.convert('CMYK'), 'JPEG'),
        'jpeg turned': encoded(rgb, 'JPEG', exif=exif),
        'jpeg bad exif': encoded(
            rgb, 'JPEG', exif=b'Exif\0\0II*\0\x08\0\0\0\xff\xff\x0f\x01', **fine),
        'mpo': encoded(rgb, 'MPO', **fine, **more), 'png': plain,
        'png bad frames': plain[:33] + chunk(b'acTL', bytes(8)) + plain[33:],
        'png 16 bit': encoded(Image.fromarray(pixels[..., 0].astype(np.uint16) * 257), 'PNG'),
        'png palette': encoded(rgb.convert('P'), 'PNG', transparency=bytes(range(256))),
        'png alpha': encoded(rgb.convert('RGBA'), 'PNG'), 'png grey alpha': encoded(
            rgb.convert('LA'), 'PNG'), 'png 1 bit': encoded(rgb.convert('1'), 'PNG'),
        'png animated': encoded(rgb, 'PNG', **more), 'gif': encoded(rgb, 'GIF'),
        'gif animated': encoded(rgb, 'GIF', **more), 'webp': encoded(rgb, 'WEBP'),
        'webp lossless': encoded(rgb.convert('RGBA'), 'WEBP', lossless=True),
        'webp animated': encoded(rgb, 'WEBP', **more)}


def foreign(rng):
    """What stands in a file called .jpg and is none of the forms that are read."""
    rgb = Image.fromarray(rng.integers(0, 256, (24, 36, 3), dtype=np.uint8))
    return [b'\xff', b'GIF', b'<html>404 not found</html>', bytes(200), rng.bytes(300),
            b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', b'%PDF-1.7\n',
            b'PK\x03\x04' + rng.bytes(50), b'\x80\x04\x95' + rng.bytes(20),
            *(encoded(rgb, form) for form in ('TIFF', 'BMP', 'ICO', 'PPM', 'TGA', 'EPS'))]


def giant(pictures, side):
    """Whole pictures but for their headers, which say side x side pixels."""
    short = struct.pack('>H', side)
    jpeg, gif, webp = pictures['jpeg'], pictures['gif'], pictures['webp lossless']
    frame = jpeg.index(b'\xff\xc0') + 5
    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    bits = struct.pack('<I', (side - 1) << 14 | side - 1)
    place = webp.index(b'VP8L') + 9
    return {'jpeg': jpeg[:frame] + short * 2 + jpeg[frame + 4:],
            'png': b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + pictures['png'][33:],
            'gif': gif[:6] + short[::-1] * 2 + gif[10:],
            'webp': webp[:place] + bits + webp[place + 4:]}


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):  # half of them where the headers are
        data[int(rng.integers(min(len(data), 64 if rng.random() < 0.5 else 10**9)))] = int(
            rng.integers(256))
    return bytes(data)


def insert(data, rng):
    place = int(rng.integers(len(data)))
    return data[:place] + rng.bytes(int(rng.integers(1, 9))) + data[place:]


def drop(data, rng):
    place = int(rng.integers(len(data)))
    return data[:place] + data[place + int(rng.integers(1, 9)):]


def shorten(data, rng):
    return data[:rng.integers(1, len(data))]


def mutants(rng, count):
    """`count` of (kind, bytes, outcome): None if decoded, a reason, or '' if either may be."""
    kinds, others = whole(rng), foreign(rng)
    giants = [one for side in GIANTS for one in giant(kinds, side).items()]
    for number in range(count):
        name = list(kinds)[number // 5 % len(kinds)]
        data = kinds[name]
        if number % 5 == 0:
            yield name, data, None
        elif number % 25 == 1:
            yield 'empty', b'', images.EMPTY
        elif number % 5 == 1:
            yield 'foreign', others[number // 5 % len(others)], images.UNKNOWN
        elif number % 25 == 2:
            form, data = giants[number // 25 % len(giants)]
            yield f'giant {form}', data, images.TOO_MANY_PIXELS
        elif number % 5 == 2 and name in ('jpeg', 'png', 'gif', 'webp'):
            yield f'{name} half', data[:len(data) // 2], images.DAMAGED
        else:
            mutate = (flip, insert, drop, shorten)[rng.integers(4)]
            yield f'{name} {mutate.__name__}', mutate(data, rng), ''


def write(folder, pictures):
    """A raw folder with an item for every one of `pictures`."""
    (folder / 'images').mkdir(parents=True)
    names = [f'B{number:04d}' for number in range(len(pictures))]
    for name, data in zip(names, pictures, strict=True):
        (folder / 'images' / f'{name}.jpg').write_bytes(data)
    (folder / 'meta_X.jsonl').write_text(''.join(
        json.dumps({'parent_asin': name, 'title': name}) + '\n' for name in names))
    (folder / 'X.jsonl').write_text(''.join(
        json.dumps({'parent_asin': name, 'user_id': f'U{k % 50}', 'timestamp': 16 * 10**11
                    + 10**8 * (k % 50) + k}) + '\n' for k, name in enumerate(names)))
    return folder


@pytest.fixture
def read(tmp_path, monkeypatch):
    """-> the data of a list of pictures, and a function that reads their content."""
    monkeypatch.setattr(catalogue.text, 'tokenize', lambda texts, *_: np.zeros((len(texts), 1)))

    def found(pictures):
        folder = write(tmp_path / 'raw', pictures)
        amazon_tables.prepare(folder, tmp_path / 'data',
                              gap_hours=1, core=1, min_length=1, valid=0.2,
                        test=0.2, seed=0)
        return amazon_tables.load(tmp_path / 'data'), content

    def content(data, bad_share=1.0):
        return catalogue.content(data, tmp_path / 'data', image_size=SIDE, tokenizer_dir='',
                                text_length=1, bad_share=bad_share)
    return found


def sown(read, tmp_path, count, seed):
    made = list(mutants(np.random.default_rng(seed), count))
    data, content = read([picture for _, picture, _ in made])
    found = content(data)
    listed = dict(line.split('\t') for line in
                  (tmp_path / 'data' / catalogue.BAD_IMAGES).read_text().splitlines())
    counts = Counter()
    for number, (kind, picture, outcome) in enumerate(made, 1):
        with images.quiet():
            alone = images.read(picture, SIDE)
        bad = isinstance(alone, str)
        assert outcome == '' or (alone if bad else None) == outcome, (kind, alone)
        assert found.has_image[number] != bad, kind
        np.testing.assert_array_equal(found.image[number], 0 if bad else alone)
        assert listed.get(data.asins[number]) == (alone if bad else None), kind
        counts[alone if bad else 'kept'] += 1
    assert found.pictures == {'read': count, 'kept': counts.pop('kept'), 'rejected': counts}
    assert found.broken == sum(counts.values()) == len(listed)
    # without the damaged ones, as if their items had never had any
    clean = content(replace(data, has_image=found.has_image.copy(), fingerprint='clean' * 13))
    np.testing.assert_array_equal(clean.image, found.image)
    np.testing.assert_array_equal(clean.has_image, found.has_image)
    assert clean.pictures == {'read': clean.pictures['kept'], 'kept': found.pictures['kept'],
                              'rejected': {}}
    return found.pictures['rejected']


def test_damaged_images_are_items_without_image(read, tmp_path):
    assert set(sown(read, tmp_path, 125, 0)) == set(images.REASONS)


@pytest.mark.slow
@pytest.mark.parametrize('seed', [1, 2])
def test_many_damaged_images_are_items_without_image(read, tmp_path, seed):
    assert set(sown(read, tmp_path, 500, seed)) == set(images.REASONS)


def test_every_kind_of_whole_picture_is_read(read):
    """And what Pillow thinks of their metadata is no warning that the run shows."""
    made = whole(np.random.default_rng(0))
    data, content = read(list(made.values()))
    found = content(data)
    assert found.has_image[1:].all(), found.pictures
    kinds = list(made)
    colour = found.image[1 + kinds.index('png')].astype(int)
    for kind in ('jpeg', 'jpeg bad exif', 'mpo', 'png bad frames', 'png animated', 'webp lossless'):
        assert abs(found.image[1 + kinds.index(kind)] - colour).mean() < 12, kind
    assert abs(found.image[1 + kinds.index('png alpha')] - colour).max() <= 1


def test_more_damage_than_the_share_is_refused_and_can_be_allowed(read, tmp_path):
    good = whole(np.random.default_rng(0))['png']
    data, content = read([good] * 17 + [b'', b'<html>', good[:90]])
    for _ in range(2):  # also when everything was decoded before
        with pytest.raises(InputError) as error:
            content(data, 0.1)
    told = str(error.value)
    assert told.startswith('3 of 20 images cannot be used (image_damaged: 1, image_empty')
    assert 'first B0017 image_empty_or_unreadable, B0018 image_of_unknown_format, B0019' in told
    assert 'at most config.data.bad_share=0.1' in told
    assert str(tmp_path / 'data' / catalogue.BAD_IMAGES) in told
    assert content(data, 0.15).pictures == {
        'read': 20, 'kept': 17, 'rejected': {'image_damaged': 1, 'image_empty_or_unreadable': 1,
                                             'image_of_unknown_format': 1}}


def test_images_not_among_the_bytes_are_counted_with_the_others(read):
    data, content = read([whole(np.random.default_rng(0))['png']] * 4)
    unused = {'price': 7, 'image_link_outside': 1, 'image_without_item': 50}
    data = replace(data, lines=data.lines | {'unused': unused})
    assert content(data, 0.2).pictures == {  # an image of no item is no damage
        'read': 55, 'kept': 4, 'rejected': {'image_link_outside': 1, 'image_without_item': 50}}
    with pytest.raises(InputError, match=r'1 of 5 .* used \(image_link_outside: 1'):
        content(data, 0.19)


def test_a_jpeg_of_endless_scans_is_not_decoded():
    data = whole(np.random.default_rng(0))['jpeg progressive']
    first = data.index(b'\xff\xda')
    scan = data[first:data.index(b'\xff\xda', first + 2)]
    assert isinstance(images.read(data, SIDE), np.ndarray)
    for count, wanted in ((9, np.ndarray), (images.MAX_SCANS + 1, images.Reason)):
        assert isinstance(images.read(data[:first] + scan * count + b'\xff\xd9', SIDE), wanted)


def bounded(program, megabytes):
    """Runs a program in a process that may have so much more memory than it begins with."""
    limit = f"""
import io, os, resource, sys
from concurrent.futures import ThreadPoolExecutor
from PIL import Image
from tpad_jax.data import images
Image.preinit(); images.decode(b'x', 4)
with open('/proc/self/statm') as file:
    now = int(file.read().split()[0]) * os.sysconf('SC_PAGE_SIZE')
resource.setrlimit(resource.RLIMIT_AS, 2 * (now + {megabytes} * 2**20,))
"""
    return subprocess.run([sys.executable, '-c', limit + program], capture_output=True, text=True,
                          check=False)


linux = pytest.mark.skipif(sys.platform != 'linux', reason='reads /proc')


@linux
def test_what_a_header_says_takes_no_memory(tmp_path):
    for side in GIANTS:
        for name, data in giant(whole(np.random.default_rng(0)), side).items():
            assert images.read(data, SIDE) == images.TOO_MANY_PIXELS, name
    # an animated WebP reserves what it may need when it is opened, though it does not touch it
    for name, data in giant(whole(np.random.default_rng(0)), GIANTS[0]).items():
        (tmp_path / name).write_bytes(data)
    ran = bounded(f"""
for name in ('jpeg', 'png', 'gif'):
    found = images.read(open({str(tmp_path)!r} + '/' + name, 'rb').read(), 16)
    assert found == images.TOO_MANY_PIXELS, (name, found)
""", 64)
    assert ran.returncode == 0, ran.stderr


@linux
@pytest.mark.slow
def test_the_largest_pictures_are_decoded_one_at_a_time(tmp_path):
    """Four of 39 million pixels with transparency: each takes some 500 MB while it is decoded."""
    image = Image.new('P', (6000, 6500))
    image.putpalette(bytes(range(256)) * 3)
    (tmp_path / 'a.png').write_bytes(encoded(image, 'PNG', transparency=bytes(256),
                                             compress_level=1))
    ran = bounded(f"""
data = open({str(tmp_path / 'a.png')!r}, 'rb').read()
with ThreadPoolExecutor(4) as pool:
    found = list(pool.map(lambda _: images.read(data, 16), range(4)))
assert not {{*map(str, found)}} & {{*images.REASONS}}, found
assert all((one == 255).all() for one in found), [one.min() for one in found]
""", 1100)
    assert ran.returncode == 0, ran.stderr
