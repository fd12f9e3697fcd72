"""Raw files with damage sown in: no crash, counts that add up, the whole lines as without it."""

import gzip
import json
import re
import string
import zlib
from collections import Counter

import numpy as np
import pytest

from tpad_jax.data import text, untrusted
from tpad_jax.data.sources import amazon, amazon_tables
from tpad_jax.errors import InputError

TIME = 1_529_193_600
FORMS = {'2018': ('meta_X.json', 'X_5.json'), '2023': ('meta_X.jsonl', 'X.jsonl')}
# field -> what it must be, told apart from the reader: (item, user, time, units in a second)
FIELDS = {'2018': ('asin', 'reviewerID', 'unixReviewTime', 1),
          '2023': ('parent_asin', 'user_id', 'timestamp', 1000)}
ABSURD = [None, True, -1, 0, 7, 1e308, -1e308, 10**40, float('nan'), float('inf'), '', ' ', '../x',
          '/etc/passwd', '\x00', '\ud800', 'x' * 5000, [], {}, [[]], [None], ['a', ['b']],
          {'a': {'b': []}}, '&#' + '9' * 5000 + ';', '<script>' * 50, '\u2028\u2029\x85']
SPECIAL = [b'\x00', b'\xff', b'\xfe\xff', b'\xef\xbb\xbf', b'\n', b'\r', b'"', b'\\', b'{', b'}',
           b'\xe9', b'\xc3', b'\xed\xa0\x80', '\u2028'.encode(), b'\x1f\x8b', b' ', b',,', b'NaN']


def item(rng, form, number):
    return {FIELDS[form][0]: f'B{number:06d}', 'title': f'Thing &amp; {number}', 'brand': 'Acme',
            'store': 'Acme', 'category': ['A', 'B'], 'categories': ['A', 'B'],
            'description': [' '.join(rng.choice(list(string.ascii_letters), 20))],
            'price': '$1.50' if form == '2018' else 1.5, 'imageURL': []}


def review(rng, form, items):
    asin, user, time, units = FIELDS[form]
    return {asin: f'B{rng.integers(items):06d}', user: f'U{rng.integers(200)}',
            time: (TIME + int(rng.integers(10**7))) * units, 'overall': 5.0, 'reviewText': 'Güt'}


# --- mutators: (line, rng, form) -> bytes that may be whole, and ones that never are -------------


def flip(line, rng, form):
    line = bytearray(line)
    for place in rng.integers(len(line), size=rng.integers(1, 4)):
        line[place] ^= 1 << int(rng.integers(8))
    return bytes(line)


def insert(line, rng, form):
    place = int(rng.integers(len(line) + 1))
    return line[:place] + SPECIAL[rng.integers(len(SPECIAL))] + line[place:]


def swap(line, rng, form):
    record = json.loads(line)
    for key in rng.choice(sorted(record), rng.integers(1, 4)):
        record[key] = ABSURD[rng.integers(len(ABSURD))]
    return json.dumps(record).encode()


def twice(line, rng, form):
    """A key again; the last one counts."""
    key = str(rng.choice(sorted(json.loads(line))))
    return line[:-1] + b', ' + json.dumps({key: ABSURD[rng.integers(len(ABSURD))]})[1:].encode()


def cut(line, rng, form):
    return line[:rng.integers(1, len(line))]


def nest(line, rng, form):
    return line[:-1] + b', "x": ' + b'[' * 100_000 + b']' * 100_000 + b'}'


def digits(line, rng, form):
    return line[:-1] + b', "x": ' + b'9' * 6000 + b'}'


def other_encoding(line, rng, form):
    return line.decode().replace('{', '{"é": 1, ', 1).encode(
        str(rng.choice(['latin-1', 'utf-16', 'cp1252'])))


def nul(line, rng, form):
    return line.replace(b'"', b'"\x00', 1)


def no_object(line, rng, form):
    return (b'[1]', b'"text"', b'7', b'null', b'NaN', b'<html>', b'\x00' * 40)[rng.integers(7)]


def no_item(line, rng, form):
    record, field = json.loads(line), FIELDS[form][0]
    record[field] = [None, 7, [], {}, True, '', '../../etc/passwd', '/etc/passwd', 'a/b', 'B' * 33,
                     'B\n', '..', '\x00', 'é'][rng.integers(14)]
    return json.dumps(record).encode()


MAYBE = flip, insert, swap, twice
NEVER = cut, nest, digits, other_encoding, nul, no_object, no_item


def whole(line, form, reviews):
    """Whether a line says what its file is of: written apart from the reader."""
    asin, user, time, units = FIELDS[form]
    try:
        record = json.loads(line.decode('utf-8'))
        good = re.fullmatch('[A-Za-z0-9_-]{1,32}', record[asin], re.ASCII)
        if reviews:
            good = good and 1 <= len(record[user]) <= 256 and isinstance(record[user], str)
            good = good and not isinstance(record[time], bool)
            good = good and 1995 <= 1970 + int(record[time] / units) / 31_556_952 < 2100.001
        return bool(good)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return False


def sow(rng, form, lines, bad):
    """`lines` with damaged copies of some between them, and the number of damaged ones."""
    out = [(b, True) for b in lines]
    for _ in range(bad):
        line = lines[rng.integers(len(lines))]
        maybe = rng.random() < 0.6
        mutate = (MAYBE if maybe else NEVER)[rng.integers(len(MAYBE if maybe else NEVER))]
        out.insert(int(rng.integers(1, len(out) + 1)), (mutate(line, rng, form), None if maybe else
                                                       False))
    return out


def write(folder, form, parts, zipped):
    folder.mkdir()
    for name, lines in zip(FORMS[form], parts, strict=True):
        content = b''.join(line + b'\n' for line in lines)
        (folder / (name + '.gz' * zipped)).write_bytes(
            gzip.compress(content, 1) if zipped else content)
    return folder


@pytest.mark.parametrize(('form', 'seed'), [('2018', 0), ('2023', 1)])
def test_damaged_lines_change_nothing_but_counts(tmp_path, form, seed):
    """2,000 damaged lines (of both forms): all counted, and the others give what they give alone.

    What a mutation may leave whole is judged by a reading of its own; what it never leaves whole
    is known beforehand.
    """
    rng = np.random.default_rng(seed)
    made = ([item(rng, form, n) for n in range(300)], [review(rng, form, 300) for _ in range(500)])
    parts = [sow(rng, form, [json.dumps(r, ensure_ascii=False).encode() for r in records], 500)
             for records in made]
    dirty = [[line for mutated, _ in part for line in mutated.split(b'\n')] for part in parts]
    clean = [[line for line in part if whole(line, form, reviews)]
             for part, reviews in zip(dirty, (False, True), strict=True)]
    never = [line for part in parts for mutated, known in part if known is False
             for line in [mutated] if b'\n' not in mutated]
    assert len(never) > 300
    assert not any(whole(line, form, False) for line in never)

    raw = amazon.read(write(tmp_path / 'dirty', form, dirty, zipped=seed % 2))
    alone = amazon.read(write(tmp_path / 'clean', form, clean, zipped=False))
    assert raw.catalogue.equals(alone.catalogue)
    assert raw.interactions.equals(alone.interactions)
    assert raw.lines['kept'] == alone.lines['kept']
    assert raw.lines['unused'] == alone.lines['unused']
    assert raw.lines['read'] == sum(map(len, dirty))
    assert raw.lines['read'] == raw.lines['kept'] + sum(raw.lines['rejected'].values())
    damage = Counter(raw.lines['rejected'])
    damage.subtract(alone.lines['rejected'])
    assert sum(damage.values()) == raw.lines['read'] - alone.lines['read'] > 700
    assert not {reason for reason, n in damage.items() if n} & (untrusted.WHOLE - {'blank_line'})
    assert {'bad_json', 'bad_encoding', 'bad_asin', 'bad_user', 'bad_time'} <= set(damage)


def test_only_the_good_lines_are_there_where_every_mutation_destroys(tmp_path):
    rng = np.random.default_rng(2)
    good = ([json.dumps(item(rng, '2018', n)).encode() for n in range(50)],
            [json.dumps(review(rng, '2018', 50)).encode() for _ in range(80)])
    mixed = [[line for k, own in enumerate(part)
              for line in (NEVER[k % len(NEVER)](own, rng, '2018'), own)] for part in good]
    dirty = amazon.read(write(tmp_path / 'dirty', '2018', mixed, zipped=True))
    clean = amazon.read(write(tmp_path / 'clean', '2018', good, zipped=True))
    assert dirty.catalogue.equals(clean.catalogue)
    assert dirty.interactions.equals(clean.interactions)
    assert dirty.lines['read'] - clean.lines['read'] == 50 + 80
    assert dirty.lines['kept'] == clean.lines['kept']


# --- bounds ---------------------------------------------------------------------------------------


@pytest.mark.parametrize('fields', [
    {'title': '&#' + '9' * 5000 + ';'}, {'brand': 'x' + ' ' * 200_000 + 'y'},
    {'price': 'from ' + ' ' * 200_000 + 'x'}, {'price': '9' * 200_000},
    {'title': '.a{' * 100_000}, {'title': 'function ' * 100_000}, {'title': '&' * 200_000},
    {'category': [['x' * 200_000], 'y']}, {'description': [[['deep']]] * 100_000},
    {'title': {'a': 1}, 'brand': [7], 'category': 7, 'price': {}, 'description': True}],
    ids=lambda fields: '-'.join(fields))
def test_absurd_fields_are_read_at_once(tmp_path, fields):
    """Quadratic patterns would take hours here, and some raised."""
    line = json.dumps(item(np.random.default_rng(0), '2018', 0) | fields).encode()
    raw = amazon.read(write(tmp_path / 'raw', '2018', [[line], [json.dumps(
        review(np.random.default_rng(0), '2018', 1)).encode()]], zipped=False))
    assert raw.lines['kept'] == 2


def test_a_character_of_too_many_digits_is_one_that_does_not_exist():
    for number in ('9' * 5000, '99999999'):
        assert text.clean(f'a&#{number};b&#65;') == 'a\ufffdbA'


def test_a_cut_gzip_keeps_all_its_whole_lines(tmp_path):
    rng = np.random.default_rng(3)
    content = b''.join(json.dumps(review(rng, '2018', 900)).encode() + b'\n' for _ in range(400))
    packed, path = gzip.compress(content), tmp_path / 'a.json.gz'
    for end in (*rng.integers(2, len(packed), 30), len(packed) - 1):
        path.write_bytes(packed[:end])
        there = zlib.decompressobj(31).decompress(packed[:end]).split(b'\n')[:-1]
        lines = untrusted.Lines(path)
        assert list(lines) == [json.loads(line) for line in there]
        assert lines.rejected == {'truncated_file': 1}


def test_what_lies_behind_damage_counts_by_its_bytes(tmp_path):
    rng = np.random.default_rng(4)
    content = b''.join(b'{"x": "%s"}\n' % rng.bytes(300).hex().encode() for _ in range(3000))
    packed, path = gzip.compress(content, 1), tmp_path / 'a.json.gz'
    assert len(packed) > 800_000  # what is read ahead is little beside it
    path.write_bytes(packed + b'no member of a gzip file' + packed)
    lines = untrusted.Lines(path)
    count = sum(1 for _ in lines)
    assert count == 3000
    assert lines.rejected['damaged_file'] == 1
    assert 0.3 < lines.unread < 0.51
    lines.check(0.6)
    with pytest.raises(InputError, match=r'a\.json\.gz: .*of it cannot be unpacked .damaged_file'):
        lines.check(0.2)


@pytest.mark.parametrize('byte', [b'\x00', b'\n', b' '])
def test_a_file_that_unpacks_without_end_is_left(tmp_path, monkeypatch, byte):
    monkeypatch.setattr(untrusted, 'MAX_UNPACKED', 2**16)
    monkeypatch.setattr(untrusted, 'MAX_LINE', 2**14)
    path, given = tmp_path / 'a.json.gz', []
    path.write_bytes(gzip.compress(b'{"a": 1}\n' + byte * 2**20))

    class Counted(gzip.GzipFile):
        def read1(self, size=-1):
            given.append(len(part := super().read1(size)))
            return part
    monkeypatch.setattr(gzip, 'GzipFile', Counted)
    lines = untrusted.Lines(path)
    assert list(lines) == [{'a': 1}]
    assert lines.rejected['file_unpacks_without_end'] == 1
    assert 2**16 < sum(given) < 2**18
    with pytest.raises(InputError, match='file_unpacks_without_end'):
        lines.check(0.99)


def test_another_encoding_is_refused_by_its_name(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / 'raw', '2018', [[json.dumps(item(rng, '2018', 0)).encode()],
                                     [json.dumps(review(rng, '2018', 1)).encode()]], zipped=False)
    path = tmp_path / 'raw' / 'X_5.json'
    path.write_bytes(path.read_text().encode('utf-16'))
    with pytest.raises(InputError, match=r'bad_encoding: 1.*JSON object in UTF-8'):
        amazon.read(tmp_path / 'raw')


# --- the share ------------------------------------------------------------------------------------


def shared(tmp_path, bad_items=0, bad_reviews=0, harmless=0):
    """100 items and 100 reviews, some damaged, and lines that are left out but whole."""
    rng = np.random.default_rng(5)
    items = [json.dumps(item(rng, '2018', n)).encode() for n in range(100)]
    reviews = [json.dumps(review(rng, '2018', 100)).encode() for _ in range(100)]
    items[40:40 + bad_items] = [cut(line, rng, '2018') for line in items[40:40 + bad_items]]
    reviews[60:60 + bad_reviews] = [b'{"asin": "B000001"}'] * bad_reviews
    return write(tmp_path / 'raw', '2018', [
        items + items[:1] * harmless,
        reviews + [*reviews[:1], reviews[0].replace(b'"B', b'"C'), b''] * harmless], zipped=False)


def test_more_damage_than_the_share_is_refused_with_its_place(tmp_path):
    folder = shared(tmp_path, bad_items=4, bad_reviews=7)
    with pytest.raises(InputError) as error:
        amazon.read(folder, 0.05)
    told = str(error.value)
    assert told.startswith(f'{folder / "X_5.json"}: 7 of 100 lines are damaged (missing_reviewerID')
    assert 'first line 61 missing_reviewerID, line 62 missing_reviewerID, line 63' in told
    assert 'at most config.data.bad_share=0.05' in told
    with pytest.raises(InputError, match=r'meta_X\.json: 4 of 100 .*bad_json: 4; first line 41 '):
        amazon.read(folder, 0.03)
    raw = amazon.read(folder, 0.07)
    assert {n: raw.lines['rejected'][n] for n in ('bad_json', 'missing_reviewerID')} == {
        'bad_json': 4, 'missing_reviewerID': 7}


def test_lines_that_are_whole_but_left_out_are_no_damage(tmp_path):
    raw = amazon.read(shared(tmp_path, harmless=900), 0.0)
    assert raw.lines['rejected'] == {
        'blank_line': 900, 'duplicate_item': 900, 'duplicate_review': 900,
        'item_without_metadata': 900}


def test_the_share_reaches_the_reader_and_is_no_part_of_the_tables(tmp_path):
    folder = shared(tmp_path, bad_reviews=7)
    options = dict(gap_hours=1, core=1, min_length=1, valid=0.1, test=0.1, seed=0)
    with pytest.raises(InputError, match=r'most config\.data\.bad_share=0\.05'):
        amazon_tables.prepare(folder, tmp_path / 'data', **options, bad_share=0.05)
    amazon_tables.prepare(folder, tmp_path / 'data', **options, bad_share=0.1)
    before = amazon_tables.read_finished(tmp_path / 'data')
    amazon_tables.prepare(folder, tmp_path / 'data', **options, bad_share=0.2)
    assert amazon_tables.read_finished(tmp_path / 'data') == before
