"""Item texts, tokens, side features and decoded images."""

import io
import json
import struct
import zlib

import numpy as np
import polars as pl
import pytest
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tpad_jax.data import images, text
from tpad_jax.errors import InputError
from tpad_jax.models.builtin import files


@pytest.mark.parametrize(('raw', 'plain'), [
    ('Dave &amp; Busters', 'Dave & Busters'),
    (' Maggiano&#39;s\n\n  Card ', "Maggiano's Card"),
    ('&lt;b&gt;bold&lt;/b&gt; and<br/>broken', 'bold and broken'),
    ('size < 5 and > 3 <3', 'size < 5 and > 3 <3'),
    ('Warranty &gt;&gt;&gt; THT', 'Warranty >>> THT'),
    ('a<script type="x">if (a < b) {}</script>b<style>p{}</style>c', 'a b c'),
    ('a<!-- hidden <b> -->b<script>unclosed', 'a b'),
    ('half\ud800pair\x00null\xa0space', 'half pair null space'),
    ('', '')])
def test_clean(raw, plain):
    assert text.clean(raw) == plain


@pytest.mark.parametrize('piece', ['<script', '<!--', '<a', '</', '&lt;', '<style>'])
def test_clean_takes_linear_time(piece):
    # a quadratic pattern would take minutes here
    assert len(text.clean(piece * 200_000)) <= len(piece) * 200_000


def catalogue(rows):
    return pl.DataFrame(rows, orient='row', schema={
        'asin': pl.String, 'title': pl.String, 'brand': pl.String, 'category': pl.String,
        'description': pl.String, 'price': pl.Float32, 'image': pl.String})


def test_item_texts_join_what_there_is():
    table = catalogue([('B1', 'Mug', 'Acme', 'Cups', 'Blue', None, None),
                       ('B2', 'Pot', '', 'Cups', '', None, None),
                       ('B3', '', '', '', '', None, None)])
    assert text.item_texts(table) == ['', 'Mug. Acme. Cups. Blue', 'Pot. Cups', '']


def test_side_features_are_counted_on_warm_items_alone():
    rows = [(f'B{k}', '', brand, category, '', price, None) for k, (brand, category, price) in
            enumerate([('a', 'x', 1.0), ('a', 'x', 2.0), ('b', 'x', 3.0), ('b', '', None),
                       ('c', 'y', 4.0), ('c', 'y', 99.0), ('a', 'z', 0.5)])]
    warm = np.array([False, True, True, True, True, True, False, False])  # the last two are cold
    ids, sizes = text.side_features(catalogue(rows), warm)
    assert sizes == (3, 2, 11)  # brands 0, a, b (c: one warm item); categories 0, x (y: one)
    assert ids[:, 0].tolist() == [0, 1, 1, 2, 2, 0, 0, 1]
    assert ids[:, 1].tolist() == [0, 1, 1, 1, 0, 0, 0, 0]
    assert ids[:, 2].tolist()[0] == ids[4, 2] == 0
    assert ids[6, 2] == 10  # dearer than every warm item
    assert ids[7, 2] == 1
    assert ids.dtype == np.int32


def test_price_levels_are_the_tenths_of_the_warm_prices():
    prices = np.random.default_rng(0).lognormal(3, 1, 1000)
    ids, _ = text.side_features(
        catalogue([(f'B{k}', '', '', '', '', p, None) for k, p in enumerate(prices)]),
        np.append(False, np.ones(1000, bool)))
    rank = prices.argsort().argsort()
    assert (ids[1:, 2] == 1 + rank // 100).all()


def test_side_features_without_any_warm_price():
    ids, sizes = text.side_features(catalogue([('B1', '', '', '', '', 5.0, None)]),
                                    np.zeros(2, bool))
    assert ids.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert sizes == (1, 1, 11)


def save_tokenizer(folder, **special):
    words = Tokenizer(models.WordLevel({'[PAD]': 0, '[UNK]': 1, 'blue': 2, 'mug': 3}, '[UNK]'))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)


def test_tokenize(tmp_path, monkeypatch):
    save_tokenizer(tmp_path, pad_token='[PAD]', unk_token='[UNK]', padding_side='left')
    monkeypatch.setattr(text, 'TOKENIZER_CHUNK', 2)
    tokens = text.tokenize(['', 'blue mug', 'red mug blue blue mug', 'mug'], tmp_path, 4)
    assert tokens.tolist() == [[-1] * 4, [2, 3, -1, -1], [1, 3, 2, 2], [3, -1, -1, -1]]
    assert tokens.dtype == np.int32


def test_the_bases_own_tokens_are_those_of_transformers(monkeypatch):
    """It is read without the latter; long texts, odd characters, special tokens spelled out."""
    rng = np.random.default_rng(0)
    texts = ['', '<pad> Red <pad>', 'a<pad>b', 'x' * 500, ' ünïcödé ﬁ ½ 🙂 汉字\ttab ',
             *(''.join(map(chr, row)) for row in rng.integers(32, 0x2FFF, (200, 30))),
             *(' '.join(row) for row in rng.choice(['shoe', 'Brand', "it's", '$5.00'], (200, 9)))]
    with monkeypatch.context() as patch:
        patch.setattr(text, 'read_tokenizer', None)
        found = text.tokenize(texts, files.DEFAULT, 24)
    monkeypatch.setattr(text, 'PLAIN', set())
    np.testing.assert_array_equal(found, text.tokenize(texts, files.DEFAULT, 24))


def test_tokenizers_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match='no such directory'):
        text.tokenize(['a'], 'bert-base-uncased', 4)
    with pytest.raises(InputError, match='no usable tokenizer'):
        text.tokenize(['a'], tmp_path, 4)


@pytest.mark.parametrize('damage', [lambda file: file.unlink(), lambda file: file.write_text('{')])
def test_a_damaged_file_is_named(tmp_path, damage):
    text.train_tokenizer(['a mug'], tmp_path, 300)
    damage(tmp_path / 'tokenizer.json')
    with pytest.raises(InputError, match=r'tokenizer\.json is not a usable tokenizer .*copy it'):
        text.tokenize(['a'], tmp_path, 4)


def test_a_tokenizer_brings_no_program(tmp_path):
    (tmp_path / 'tokenizer_config.json').write_text(json.dumps(
        {'tokenizer_class': 'Mine', 'auto_map': {'AutoTokenizer': ['mine.Mine', None]}}))
    (tmp_path / 'mine.py').write_text(f'import os\nos.mkdir({str(tmp_path / "run")!r})\n')
    with pytest.raises(InputError, match='no usable tokenizer'):
        text.read_tokenizer(tmp_path)
    assert not (tmp_path / 'run').exists()


def encoded(image, form='PNG', **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def noise(height=24, width=24, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_an_image_of_the_size_keeps_its_pixels():
    assert (images.decode(encoded(Image.fromarray(noise())), 24) == noise()).all()


@pytest.mark.parametrize('form', images.FORMATS)
def test_the_whole_picture_fills_the_square(form):
    pixels = np.zeros((300, 900, 3), np.uint8)  # red left half, blue right half
    pixels[:, :450, 0] = pixels[:, 450:, 2] = 255
    square = images.decode(encoded(Image.fromarray(pixels), form), 32)
    assert square.shape == (32, 32, 3)
    assert square.dtype == np.uint8
    assert (abs(square[:, :15].astype(int) - [255, 0, 0]) < 12).all()
    assert (abs(square[:, 17:].astype(int) - [0, 0, 255]) < 12).all()


@pytest.mark.parametrize('side', [44, 64, 69, 71, 76, 128, 281, 300])
def test_a_large_jpeg_is_nearly_what_decoding_all_of_it_gives(side):
    """And one of less than 1.1 times the size, halved, exactly that."""
    coarse = Image.fromarray(noise(9, 9)).resize((side, side), Image.Resampling.BICUBIC)
    data = encoded(coarse, 'JPEG', quality=95)
    whole = Image.open(io.BytesIO(data)).resize((32, 32), Image.Resampling.BICUBIC)
    error = np.asarray(whole).astype(float) - images.decode(data, 32)
    assert (error**2).mean() < (20 if side > 69 else 1e-9)  # 35 dB


def test_grey_palette_cmyk_and_sixteen_bits_become_rgb():
    grey = Image.fromarray(noise()[..., 0])
    expected = np.repeat(noise()[..., :1], 3, axis=2)
    assert (images.decode(encoded(grey), 24) == expected).all()
    assert (images.decode(encoded(grey.convert('P')), 24) == expected).all()
    deep = Image.fromarray(noise()[..., 0].astype(np.uint16) * 257)
    assert (images.decode(encoded(deep), 24) == expected).all()
    flat = Image.new('CMYK', (24, 24), (0, 255, 255, 0))
    assert images.decode(encoded(flat, 'JPEG'), 24)[0, 0, 0] > 200


def test_transparent_parts_are_white():
    image = Image.new('RGBA', (8, 8), (0, 0, 0, 0))
    image.putpixel((0, 0), (10, 20, 30, 255))
    pixels = images.decode(encoded(image), 8)
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert (pixels[1:] == 255).all()


def bomb(side):
    """A PNG that says it has side x side pixels."""
    def chunk(kind, data):
        return (struct.pack('>I', len(data)) + kind + data
                + struct.pack('>I', zlib.crc32(kind + data)))
    header = struct.pack('>IIBBBBB', side, side, 8, 2, 0, 0, 0)
    return (b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header)
            + chunk(b'IDAT', zlib.compress(bytes(1000))) + chunk(b'IEND', b''))


@pytest.mark.parametrize('side', [7_000, 10_000, 60_000])  # under, at and over Pillow's own limits
def test_huge_images_are_not_decoded(side):
    assert images.decode(bomb(side), 16) is None


def test_broken_bytes_give_none_and_never_raise():
    assert images.decode(b'', 16) is None
    assert images.decode(b'<html>404</html>', 16) is None
    assert images.decode(encoded(Image.fromarray(noise()), 'BMP'), 16) is None
    rng = np.random.default_rng(1)
    outcomes = set()
    for form in images.FORMATS:
        good = encoded(Image.fromarray(noise(40, 50)), form)
        for _ in range(60):
            bad = bytearray(good[:rng.integers(1, len(good) + 1)])
            bad[rng.integers(len(bad))] = rng.integers(256)
            pixels = images.decode(bytes(bad), 16)
            outcomes.add(None if pixels is None else pixels.shape)
    assert outcomes == {None, (16, 16, 3)}


@pytest.mark.parametrize('form', ['JPEG', 'PNG', 'WEBP'])
@pytest.mark.parametrize('orientation', range(10))
def test_a_picture_is_turned_as_its_exif_says(form, orientation):
    """Corners in four colours, against Pillow's own turning of the whole picture."""
    coarse = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], np.uint8)
    image = Image.fromarray(coarse.repeat(150, axis=0).repeat(200, axis=1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert('RGB')
    expected = np.asarray(upright.resize((32, 32), Image.Resampling.BICUBIC)).astype(int)
    found = images.decode(data, 32).astype(int)
    np.testing.assert_allclose(found[3::25, 3::25], expected[3::25, 3::25], atol=8)
