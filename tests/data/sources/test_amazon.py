"""Raw Amazon files of both forms: lines kept or counted, quirks survived, no link followed."""

import gzip
import json

import polars as pl
import pytest

from tpad_jax.data import untrusted
from tpad_jax.data.sources import amazon
from tpad_jax.errors import InputError

TIME = 1_529_193_600  # 17 June 2018, midnight


def item18(asin, **fields):
    return {'asin': asin, 'title': f'title {asin}', 'brand': '', 'category': ['Gifts'],
            'description': [], 'price': '', 'imageURL': [], **fields}


def review18(user, asin, time=TIME, **fields):
    return {'overall': 5.0, 'verified': True, 'reviewerID': user, 'asin': asin,
            'unixReviewTime': time, **fields}


def review23(user, asin, time=TIME * 1000):
    return {'rating': 5.0, 'asin': 'VARIANT', 'parent_asin': asin, 'user_id': user,
            'timestamp': time, 'verified_purchase': True}


def lines(records):
    return b''.join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b'\n'
                    for r in records)


def write18(folder, items, reviews, category='Gift_Cards'):
    with gzip.open(folder / f'meta_{category}.json.gz', 'wb') as file:
        file.write(lines(items))
    with gzip.open(folder / f'{category}_5.json.gz', 'wb') as file:
        file.write(lines(reviews))


def write23(folder, items, reviews, category='Gift_Cards'):
    (folder / f'meta_{category}.jsonl').write_bytes(lines(items))
    (folder / f'{category}.jsonl').write_bytes(lines(reviews))


def balanced(raw):
    return raw.lines['read'] == raw.lines['kept'] + sum(raw.lines['rejected'].values())


def test_2018_quirks(tmp_path):
    page = ('\n\t\t \n<div class="a-section a-spacing-none"', '.a-box-inner{background:#fff}')
    write18(tmp_path, [
        item18('B2', title='Dave &amp; Busters <b>Card</b>', price='$12.34',
               brand='by\n    \n    Microsoft', description=['<p>One</p>', 'two &lt;br&gt;three']),
        item18('B1', price='$1,250.00', category=['Gifts', 'Gifts', 'No expiration, no fees.']),
        item18('B3', price=page[0], title='var aPageStart = (new Date()).getTime();'),
        item18('B4', price=page[1], category=[], main_cat='<img alt="FASHION"/>'),
        item18('B5', price='$5.00 - $9.00', category=['Gifts', '</span></span>', 'Starbucks'],
               description='plain &quot;text&quot;'),
        item18('B6', price='', category=[['Gifts', 'Tins']], image=['https://x/y.jpg'],
               feature=['Said in', 'features']),
    ], [review18('U2', 'B1', verified=False), review18('U1', 'B2', time=float(TIME), style={}),
        review18('U1', 'B6', vote='2')])
    raw = amazon.read(tmp_path)
    table = {row['asin']: row for row in raw.catalogue.to_dicts()}
    assert list(table) == ['B1', 'B2', 'B3', 'B4', 'B5', 'B6']
    assert table['B2']['title'] == 'Dave & Busters Card'
    assert table['B2']['brand'] == 'Microsoft'
    assert table['B2']['description'] == 'One two three'
    assert table['B5']['description'] == 'plain "text"'
    assert table['B6']['description'] == 'Said in features'
    assert [table[asin]['category'] for asin in table] == [
        'Gifts', 'Gifts', 'Gifts', '', 'Gifts', 'Gifts > Tins']
    assert raw.catalogue['price'].to_list() == pytest.approx([1250.0, 12.34, None, None, 5.0, None])
    assert table['B3']['title'] == ''
    assert raw.lines == {'read': 9, 'kept': 9, 'rejected': {},
                         'unused': {'price': 2, 'title_page_code': 1}}
    assert raw.interactions.rows() == [(0, 2, TIME), (0, 6, TIME), (1, 1, TIME)]
    assert raw.interactions.schema == {'user': pl.Int64, 'item': pl.Int32, 'time': pl.Int64}
    assert raw.catalogue.schema['price'] == pl.Float32
    assert raw.form == '2018'


def test_2023_form(tmp_path):
    write23(tmp_path, [
        {'parent_asin': 'B2', 'title': 'Two', 'store': 'Shop', 'categories': ['A', 'B'],
         'description': ['words'], 'features': ['f'], 'price': 9.5,
         'images': [{'hi_res': None, 'large': 'https://x/y.jpg', 'thumb': 'z'}]},
        {'parent_asin': 'B1', 'title': 'One', 'store': None, 'categories': [],
         'main_category': 'All Beauty', 'description': [], 'features': ['f', 'g'], 'price': None},
        {'parent_asin': 'B3', 'title': None, 'price': 'from 12.99'},
        {'parent_asin': 'B4', 'price': float('nan')},
    ], [review23('U', 'B2', TIME * 1000 + 999), review23('U', 'B1')])
    raw = amazon.read(tmp_path)
    assert raw.form == '2023'
    assert raw.catalogue.drop('image').rows() == [
        ('B1', 'One', '', 'All Beauty', 'f g', None), ('B2', 'Two', 'Shop', 'A > B', 'words', 9.5),
        ('B3', '', '', '', '', pytest.approx(12.99)), ('B4', '', '', '', '', None)]
    assert raw.interactions.rows() == [(0, 1, TIME), (0, 2, TIME)]
    assert amazon.find_files(tmp_path)[:2] == (
        tmp_path / 'Gift_Cards.jsonl', tmp_path / 'meta_Gift_Cards.jsonl')
    assert raw.catalogue['image'].null_count() == raw.catalogue.height
    assert raw.lines['unused'] == {'price': 1}


def test_every_line_is_kept_or_counted_by_reason(tmp_path):
    write18(tmp_path, [
        b'\xef\xbb\xbf' + json.dumps(item18('B1')).encode(), item18('B2'),
        b"{'asin': 'B3', 'title': 'a Python dict'}", b'{"asin": "B4", "title": "cut o',
        b'[1, 2]', b'', b'   ', b'\xff\xfe{"asin": "B5"}', {'title': 'nameless'},
        item18('../../etc/passwd'), item18('B' * 33), item18(7), item18('B1', title='later'),
        b'[' * 200_000, b'{"asin": "B6", "x": ' + b'9' * 5000 + b'}',
        b'{"asin": "B7", "x": "' + b'x' * untrusted.MAX_LINE * 2 + b'"}',
        item18('B8', title='half \ud800 a pair'),
    ], [
        review18('U', 'B1'), review18('U', 'B1'), review18('U', 'B1', TIME + 1),
        review18('V', 'B1'), review18('U', 'B404'), {'asin': 'B1', 'unixReviewTime': TIME},
        {'asin': 'B1', 'reviewerID': 'U'}, review18('', 'B1'), review18(['U'], 'B1'),
        *(review18('U', 'B2', time) for time in
          (TIME * 1000, 0, -1, True, '06 17, 2018', float('nan'), float('inf'), 10**30)),
        review18('U', 'B 1'), review18('U', None),
    ])
    raw = amazon.read(tmp_path)
    assert raw.catalogue['title'].to_list() == ['title B1', 'title B2', 'half a pair']
    assert raw.lines['rejected'] == {
        'bad_asin': 4, 'bad_encoding': 1, 'bad_json': 4, 'bad_time': 7, 'bad_user': 2,
        'blank_line': 2, 'duplicate_item': 1, 'duplicate_review': 1, 'item_without_metadata': 1,
        'line_too_long': 1, 'missing_asin': 2, 'missing_reviewerID': 1,
        'missing_unixReviewTime': 1, 'python_dict': 1, 'time_in_milliseconds': 1}
    assert (raw.lines['read'], raw.lines['kept']) == (17 + 19, 3 + 3)
    assert balanced(raw)


def test_numbers_do_not_depend_on_the_order_of_lines(tmp_path):
    reviews = [review18(user, asin, TIME + k) for k, (user, asin) in enumerate(
        [('U9', 'B1'), ('U1', 'B2'), ('U5', 'B1'), ('U9', 'B2')])]
    for name, step in (('forth', 1), ('back', -1)):
        (tmp_path / name).mkdir()
        write18(tmp_path / name, [item18('B1'), item18('B2')][::step], reviews[::step])
    forth, back = amazon.read(tmp_path / 'forth'), amazon.read(tmp_path / 'back')
    assert forth.interactions.equals(back.interactions)
    assert forth.catalogue.equals(back.catalogue)


@pytest.mark.parametrize(('damage', 'reason'), [
    (lambda data: data[:-200], 'truncated_file'),
    (lambda data: data[:-8] + bytes(8), 'damaged_file')])
def test_damaged_gzip_keeps_the_lines_before(tmp_path, damage, reason):
    # asins without a pattern, so that the compressed stream is long
    write18(tmp_path, [item18('B1')],
            [review18(f'U{k * 7919 % 100_003}', 'B1', x=k * 104_729 % 99_991) for k in range(3000)])
    path = tmp_path / 'Gift_Cards_5.json.gz'
    path.write_bytes(damage(path.read_bytes()))
    raw = amazon.read(tmp_path)
    assert raw.lines['rejected'] == {reason: 1}
    assert balanced(raw)
    assert 2500 < len(raw.interactions) <= 3000


def test_images_inside_are_found_and_links_out_are_not_followed(tmp_path):
    raw_dir, outside = tmp_path / 'raw', tmp_path / 'secret.jpg'
    (raw_dir / 'images').mkdir(parents=True)
    outside.write_bytes(b'x')
    write23(raw_dir, [{'parent_asin': asin} for asin in ('B1', 'B2', 'B3', 'B4')],
            [review23('U', 'B1')])
    for name in ('B1.jpg', 'B1.png', 'B2.png', 'B9.jpg', 'no asin.jpg', 'B3.txt'):
        (raw_dir / 'images' / name).write_bytes(b'x')
    (raw_dir / 'images' / 'B3.jpg').symlink_to(outside)
    (raw_dir / 'images' / 'B4.jpg').symlink_to(raw_dir / 'images' / 'B1.jpg')
    raw = amazon.read(raw_dir)
    names = [path and path.removeprefix(str(raw_dir)) for path in raw.catalogue['image']]
    assert names == ['/images/B1.jpg', '/images/B2.png', None, '/images/B4.jpg']
    assert raw.lines['unused'] == {
        'image_link_outside': 1, 'image_of_unknown_ending': 1, 'image_repeated': 1,
        'image_without_item': 2}


def test_folders_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(InputError, match='no such directory'):
        amazon.read(tmp_path / 'absent')
    with pytest.raises(InputError, match='no meta_X'):
        amazon.read(tmp_path)
    (tmp_path / 'meta_A.jsonl').write_bytes(lines([{'parent_asin': 'B1'}]))
    with pytest.raises(InputError, match=r'put one of A\.jsonl, A\.jsonl\.gz'):
        amazon.read(tmp_path)
    (tmp_path / 'A.jsonl').write_bytes(lines([review23('U', 'B1')]))
    assert balanced(amazon.read(tmp_path))
    (tmp_path / 'B.jsonl').write_bytes(b'')
    with pytest.raises(InputError, match=r'several categories \(A, B\)'):
        amazon.read(tmp_path)
    (tmp_path / 'B.jsonl').rename(tmp_path / 'A.jsonl.gz')
    with pytest.raises(InputError, match='keep one'):
        amazon.read(tmp_path)


@pytest.mark.parametrize(('name', 'content', 'message'), [
    ('A.jsonl', b'', 'A.jsonl: none of its 0 lines'),
    ('A.jsonl', b'<html>\n<p>404\n', r'bad_json: 2; first line 1 .* user_id and timestamp'),
    ('meta_A.jsonl', b'{"asin": "B1"}\n', 'missing_parent_asin: 1'),
    ('A.jsonl.gz', b'<html>', 'A.jsonl.gz: not a gzip file')])
def test_files_without_a_usable_line_are_refused(tmp_path, name, content, message):
    write23(tmp_path, [{'parent_asin': 'B1'}], [review23('U', 'B1')], 'A')
    (tmp_path / name.removesuffix('.gz')).unlink()
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        amazon.read(tmp_path)


def test_a_data_file_that_links_out_is_refused(tmp_path):
    (tmp_path / 'raw').mkdir()
    write23(tmp_path, [{'parent_asin': 'B1'}], [review23('U', 'B1')], 'A')
    (tmp_path / 'meta_A.jsonl').rename(tmp_path / 'raw' / 'meta_A.jsonl')
    (tmp_path / 'raw' / 'A.jsonl').symlink_to(tmp_path / 'A.jsonl')
    with pytest.raises(InputError, match='leads out of'):
        amazon.read(tmp_path / 'raw')


CASES = [
    ('12,99', 12.99), ('19,5', 19.5), ('3,50 - 4,50', 3.5), ('1,2,3', None), ('$.99', 0.99),
    ('$12.99 ($0.43 / Ounce)', 12.99), ('1,250', 1250), ('$1,250,000.50', 1250000.5),
    ('1.250,00', 1250), ('12.345.678,9', None), ('$9.00 - $5.00', 5), ('from $12', 12), ('5.', 5),
    ('1,23,456', None), ('12,9999', None), ('$', None), ('5 (', None), ('.', None), (1e3, 1000),
    ('1.234.567,89', 1234567.89), ('US$5.00 \u2013 7,50 \u20ac', 5), ("1'299.50 USD", 1299.5),
    ('1\u00a0299,00 \u20ac', 1299), ('1 2 3', None)]


def test_prices_in_every_spelling(tmp_path):
    write18(tmp_path, [item18(f'B{k:02d}', price=price) for k, (price, _) in enumerate(CASES)],
            [review18('U', 'B00')])
    raw = amazon.read(tmp_path)
    assert raw.catalogue['price'].to_list() == pytest.approx([value for _, value in CASES])
    assert raw.lines['unused'] == {'price': sum(value is None for _, value in CASES)}


def test_no_price_and_no_brand_of_the_datasets_library(tmp_path):
    write23(tmp_path, [{'parent_asin': 'B1', 'title': 't', 'price': 'None', 'store': 'None'}],
            [review23('U', 'B1')])
    raw = amazon.read(tmp_path)
    assert raw.catalogue.select('brand', 'price').rows() == [('', None)]
    assert not raw.lines['unused']


def test_numbers_are_read_as_their_digits_and_other_values_counted(tmp_path):
    write23(tmp_path, [
        {'parent_asin': 'B1', 'title': 1984, 'store': 7, 'categories': [[1, 'x']],
         'description': [2.5, True, None, 'words']},
        {'parent_asin': 'B2', 'title': {'en': 'x'}, 'store': [True]},
        {'parent_asin': 'B3', 'title': 10**30, 'store': []}], [review23('U', 'B1')])
    raw = amazon.read(tmp_path)
    assert raw.catalogue.select('title', 'brand', 'category', 'description').rows() == [
        ('1984', '7', '1 > x', '2.5 words'), ('', '', '', ''), ('', '', '', '')]
    assert raw.lines['unused'] == {'brand': 1, 'title': 2}


def test_picture_files_may_end_in_any_case(tmp_path):
    names = ('B1.JPG', 'B2.jpeg', 'B3.webp', 'B4.PNG', 'B5.GIF', 'B6.bmp', 'B7.jpg.partial',
             'B7.partial', 'B1.png', 'notes.txt')
    write23(tmp_path, [{'parent_asin': f'B{k}'} for k in range(1, 8)], [review23('U', 'B1')])
    (tmp_path / 'images').mkdir()
    for name in names:
        (tmp_path / 'images' / name).write_bytes(b'x')
    raw = amazon.read(tmp_path)
    assert raw.catalogue['image'].drop_nulls().to_list() == [
        str(tmp_path / 'images' / name) for name in names[:5]]
    assert raw.lines['unused'] == {'image_of_unknown_ending': 1, 'image_repeated': 1}


@pytest.mark.parametrize(('form', 'changes', 'message'), [
    ('2023', {'timestamp': TIME}, r'look like seconds: convert them to .* milliseconds .2023'),
    ('2018', {'unixReviewTime': TIME * 1000}, r'look like milliseconds: convert them to seconds'),
    ('2023', {'timestamp': TIME * 10**9}, r'look like nanoseconds: convert'),
    ('2018', {'unixReviewTime': str(TIME)}, 'write every time as a number'),
    ('2018', {'reviewerID': 7}, 'user as a text of at most 256 characters, a number in quotes'),
    ('2023', {'parent_asin': 'B.1'}, r'letters, digits, - and _ \(no dot'),
    ('2023', {'user_id': None}, r'\.jsonl file have parent_asin, user_id, timestamp.*or rename')])
@pytest.mark.parametrize('good', [0, 1])
def test_a_misread_unit_or_id_is_named(tmp_path, form, changes, message, good):
    """Where no line is usable, and where more than the share is not."""
    write, item, review = {'2018': (write18, item18('B1'), review18('U', 'B1')),
                           '2023': (write23, {'parent_asin': 'B1'}, review23('U', 'B1'))}[form]
    write(tmp_path, [item], [review] * good + [{**review, **changes}] * 9)
    with pytest.raises(InputError, match=message):
        amazon.read(tmp_path, 0.05)


def test_the_form_of_2014_is_named(tmp_path):
    write18(tmp_path, [repr(item18('B1')).encode()], [review18('U', 'B1')])
    with pytest.raises(InputError, match=r'meta_Gift_Cards.*python_dict: 1.*Python dictionaries, '
                                         r'as in the 2014 form.*ast\.literal_eval'):
        amazon.read(tmp_path)
    (tmp_path / 'Gift_Cards_5.json.gz').rename(tmp_path / 'reviews_Gift_Cards_5.json.gz')
    with pytest.raises(InputError, match=r'reviews_Gift_Cards_5\.json\.gz is a name of the 2014 '):
        amazon.find_files(tmp_path)


def test_lines_of_2014_that_were_written_as_json_keep_path_and_picture(tmp_path):
    item = {'asin': 'B1', 'title': 't', 'categories': [['Shop', 'shoe']], 'imUrl': 'http://a/1'}
    write18(tmp_path, [item], [review18('U', 'B1')])
    assert amazon.read(tmp_path).catalogue['category'].to_list() == ['Shop > shoe']
    assert amazon.read_urls(tmp_path).urls == {'B1': ('http://a/1',)}
