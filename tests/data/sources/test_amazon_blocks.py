"""Lines that are read fast give what the careful reader gives."""

import json

import numpy as np
import pytest

from tpad_jax.data.sources import amazon, amazon_blocks
from tpad_jax.data.untrusted import record_of

TIME = 1_600_000_000_000
ODD = [b'{"parent_asin": "A1", "user_id": "\\ud83d\\ude00", "timestamp": 1600000000000}',
       b'{"parent_asin": "A1", "user_id": "\\ud800", "timestamp": 1600000000000}',
       b'{"parent_asin": "A1", "user_id": "\xc3\xa9", "timestamp": 1.6e12, "x": 1e999}',
       b'{"parent_asin": "A1", "user_id": "u", "timestamp": 1600000000000, "x": "\xff"}',
       b'{"parent_asin": "A1", "user_id": "u", "timestamp": 1e12, "x": ' + b'7' * 5000 + b'}',
       b'{"parent_asin": "A1", "user_id": "u", "timestamp": 1600000000000, "x": NaN}',
       b'{"parent_asin": "A1", "user_id": "v", "timestamp": 0, "timestamp": 1600000000000}',
       b'{"parent_asin": "A1", "user_id": "u", "timestamp": 1e12, "x": ' + b'[' * 10**5 + b'}',
       b'{"parent_asin": "A\\n", "user_id": "u", "timestamp": 1600000000000}',
       b'{"parent_asin": "A1", "user_id": "w", "timestamp": 1600000000000}\r', b'', b' ', b'{}',
       b'{"parent_asin": "A1", "user_id": "u", "timestamp": 1600000000000} {"parent_asin": "A1"}',
       b'{"parent_asin": "A1", "user_id": "u",', b'"timestamp": 1600000000000}',
       b'{"parent_asin": "B", "user_id": "u", "timestamp": 1600000000000}',
       b'{"parent_asin": "A1", "title": ["<b>x</b>", 3], "price": "$1.50", "categories": {"a": 1}}',
       b'{"parent_asin": "A2", "title": "\\ud800", "price": NaN, "store": 7}']


@pytest.fixture
def folder(tmp_path):
    """Lines in order, more than a chunk of them, and odd ones between them."""
    rng = np.random.default_rng(0)
    reviews, items = ([json.dumps({'parent_asin': f'A{rng.integers(60)}', **fields(k)}).encode()
                       for k in range(count)] for count, fields in (
        (900, lambda k: {'user_id': f'u{k % 90}', 'timestamp': TIME + 1000 * k, 'text': 'x' * 99}),
        (150, lambda k: {'title': f'Mug &amp; {k}', 'price': k / 7, 'store': 'é', 'features': [
            'a', ['b']]})))
    for lines in (reviews, items):
        for line in ODD:
            lines.insert(int(rng.integers(len(lines))), line)
    (tmp_path / 'X.jsonl').write_bytes(b'\n'.join(reviews))
    (tmp_path / 'meta_X.jsonl').write_bytes(b'\n'.join(items) + b'\n')
    return tmp_path


def content(folder):
    raw, urls = amazon.read(folder), amazon.read_urls(folder)
    return raw.catalogue.rows(), raw.interactions.rows(), raw.lines, urls


@pytest.mark.parametrize('end', [b'\n', b'\r\n'])
def test_what_is_read_fast_is_what_the_careful_reader_reads(folder, monkeypatch, end):
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes().replace(b'\n', end))
    careful = []
    monkeypatch.setattr(amazon_blocks, 'record_of',
                        lambda line: careful.append(line) or record_of(line))
    fast = content(folder)
    assert fast[2]['kept'] > 700
    assert len(careful) <= 2 * 2 * len(ODD)  # alone: an odd line costs no other line the fast way
    monkeypatch.setattr(amazon_blocks, '_decoded', lambda *_: None)
    careful.clear()
    assert content(folder) == fast
    assert len(careful) == 2 * fast[2]['read']
