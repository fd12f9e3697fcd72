"""CSV and Parquet files of events and items: one content in many forms, and damage by reason."""

import csv
import gzip
import io
import re
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tpad_jax import config
from tpad_jax.data import sources
from tpad_jax.data.sources import event_files
from tpad_jax.errors import InputError

START = 1_600_000_000  # 13 September 2020, seconds
ITEMS = [('item_id', 'title', 'price', 'description')] + [
    (f'{n:03d}', f'thé {n}', f'{n},50 €', f'a "{n}",\nof; two | lines') for n in range(1, 7)]
# eight users with a session each: 1 2 3, 2 3 4, ...; half a second apart
EVENTS = [('user_id', 'item_id', 'time')] + [
    (f'U{user}', f'{(user + step) % 6 + 1:03d}', 1000 * (START + 86_400 * user) + 500 * step)
    for user in range(8) for step in range(3)]


def write(file, rows, separator=',', encoding='utf-8', end='\n', pack=bytes):
    text = io.StringIO(newline='')
    csv.writer(text, delimiter=separator, lineterminator=end).writerows(rows)
    file.write_bytes(pack(text.getvalue().encode(encoding)))
    return str(file)


def write_parquet(file, rows, convert):
    columns = zip(*rows[1:], strict=True)
    pq.write_table(pa.table({name: convert.get(name, list)(column)
                             for name, column in zip(rows[0], columns, strict=True)}), file)
    return str(file)


def load(tmp_path, events=EVENTS, items=ITEMS, **options):
    tmp_path.mkdir(exist_ok=True)
    c = config.get_config()
    c.data.update(core=1, valid=2.0, test=2.0)
    for name, rows in {'event_file': events, 'item_file': items}.items():
        c.data[name] = rows if isinstance(rows, str) else write(tmp_path / f'{name}.csv', rows)
    c.data.update_from_flattened_dict(options)
    sources.chosen(c).check(c)
    return sources.load(c, tmp_path / 'run')


def content(data):
    return (data.asins, data.titles, data.texts, data.side.tolist(), data.train.items.tolist(),
            data.train.start.tolist(), data.test.items.tolist())


def with_times(convert):
    return [EVENTS[0], *((user, item, convert(time)) for user, item, time in EVENTS[1:])]


def iso(time):
    return datetime.fromtimestamp(time / 1000, UTC).isoformat()


def floats(column):
    return pa.array([float(x) for x in column])


@pytest.mark.parametrize('form', [
    dict(separator=';', encoding='utf-8-sig', end='\r\n'), dict(separator='\t', pack=gzip.compress),
    dict(separator='|', encoding='cp1252')], ids=['semicolon, BOM', 'tab, gz', 'bar, cp1252'])
def test_one_content_in_every_form(tmp_path, form):
    expected = load(tmp_path)
    assert expected.train.items.reshape(-1, 3).tolist() == [
        [1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 6]]
    assert expected.texts[1] == 'thé 1. a "1", of; two | lines'
    assert expected.lines['rejected'] == {}
    name = 'items.csv' + '.gz' * ('pack' in form)
    named = write(tmp_path / name, ITEMS, **form)
    other = load(tmp_path / 'other', items=named, encoding='cp1252' if form.get(
        'encoding') == 'cp1252' else 'utf-8')
    assert content(other) == content(expected)


@pytest.mark.parametrize(('rows', 'unit'), [
    (with_times(lambda time: time * 10**6), 'nanoseconds'), (with_times(iso), 'dates'),
    (with_times(lambda time: iso(time).replace('T', ' ').replace('+00:00', ' UTC')), 'dates')])
def test_times_are_recognised(tmp_path, rows, unit):
    expected = load(tmp_path)
    data = load(tmp_path / 'run', events=rows)
    assert content(data) == content(expected)
    assert data.form == f'CSV with commas, times in {unit}'


def test_parquet_with_numbers_for_ids(tmp_path):
    """As a data frame with a missing value writes them: 7.0 in place of 007."""
    expected = load(tmp_path)
    data = load(tmp_path / 'run', items=write_parquet(tmp_path / 'items.parquet', ITEMS, {}),
                events=write_parquet(tmp_path / 'events.parquet', EVENTS, {
                    'item_id': floats, 'time': lambda column: pa.array(
                        column, pa.timestamp('ms', tz='UTC'))}))
    assert content(data) == content(expected)
    assert data.lines['unused'] == {'id_matched_as_a_number': 24}


def test_sessions_of_a_column_kinds_and_days(tmp_path):
    rows = [('session', 'kind', 'sku', 'date')] + [
        (f'S{s}', kind, f'{(s + step) % 6 + 1:03d}', f'2024-05-{1 + s + 2 * step:02d}')
        for s in range(8) for step, kind in enumerate(('view', 'view', 'buy'))]
    data = load(tmp_path, events=rows, kinds='view')
    assert np.diff(data.train.offsets).tolist() == [2, 2, 2, 2]  # two days apart, one session
    assert data.train.items[:2].tolist() == [1, 2]
    assert data.lines['rejected'] == {'other_kind': 8}


def test_every_bad_row_is_counted(tmp_path):
    rows = [*EVENTS, ('U1', '404', START * 1000), ('', '001', START * 1000), ('U1', '001', ''),
            ('U1', '', START), ('U1', '001', '31.05.2024'), ('U1', '001', START), EVENTS[1], ('x',),
            ('U1', '001', START * 1000, 'more'), (), ('U' * 300, '001', START * 1000)]
    named = write(tmp_path / 'events.csv', rows)
    with open(named, 'ab') as file:
        file.write(b'U\xe9,001,1600000000000\n"U1,001,1\nU2,002,2\n')  # latin-1; an open quote
    items = [*ITEMS, ITEMS[1], ('', 'nameless', '', ''), ('9', '', 'cheap', '')]
    data = load(tmp_path, events=named, items=items, bad_share=0.5)
    assert data.lines['rejected'] == {
        'bad_encoding': 1, 'bad_id': 1, 'bad_quotes': 2, 'bad_time': 1, 'blank_line': 1,
        'duplicate_event': 1, 'duplicate_item': 1, 'event_of_unknown_item': 1,
        'missing_item_id': 2, 'missing_time': 1, 'missing_user_id': 1, 'time_in_seconds': 1,
        'wrong_number_of_cells': 2}
    assert data.lines['read'] == data.lines['kept'] + sum(data.lines['rejected'].values())
    assert data.lines['kept'] == 24 + 7
    with pytest.raises(InputError, match=r'events.csv: 11 of 38 lines .* first line 27 missing_'):
        load(tmp_path / 'again', events=named, items=items, bad_share=0.2)


@pytest.mark.parametrize(('change', 'message'), [
    (dict(events=[('who', 'item', 'time'), *EVENTS[1:]]), r'no column .* session or user; .* who,'),
    (dict(events=[('user', 'item', 'sku', 'time')]), r'item, sku may all be the item'),
    (dict(events=[('user',)]), r'names 1 column'),
    (dict(events=with_times(lambda time: time % 1000)), r'Fix: write every time as seconds'),
    ({'columns.title': 'caption'}, r"0 columns are called 'caption'"),
    (dict(kinds='buy'), 'no column of kinds')])
def test_refusals(tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        load(tmp_path, **change)


def test_pictures_of_a_column_and_of_a_folder(tmp_path):
    (tmp_path / 'images').mkdir()
    for name in ('a.png', 'images/2.jpg'):
        (tmp_path / name).write_bytes(b'picture')
    pictures = ('a.png', 'https://x.example/2.jpg', 'absent.jpg', '../out.png')
    items = [('id', 'title', 'image'), *((str(n), f'tea {n}', picture)
                                         for n, picture in enumerate(pictures, start=1))]
    c = config.get_config().data
    c.item_file = write(tmp_path / 'items.csv', items)
    (tmp_path.parent / 'out.png').write_bytes(b'picture')
    read = event_files.read_items(c)
    assert read.catalogue['image'].to_list() == [
        str(tmp_path / 'a.png'), str(tmp_path / 'images/2.jpg'), None, None]
    assert {reason: n for reason, n in read.unused.items() if n} == {
        'image_not_there': 1, 'image_link_outside': 1}
    assert event_files.read_urls(tmp_path / 'items.csv', 0.0).urls == {
        '1': (), '2': ('https://x.example/2.jpg',), '3': (), '4': ()}


def test_the_page_is_read_as_it_says(tmp_path, monkeypatch):
    """The program of docs/bring_your_data.md, and the options of its commands."""
    page = (Path(__file__).parents[3] / 'docs' / 'bring_your_data.md').read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r'^```python\n(.*?)^```$', page, re.DOTALL | re.MULTILINE)[1], {})
    commands = re.findall(r'^python -m tpad_jax.train (.*)$', page, re.MULTILINE)
    assert len(commands) == 2
    for command in commands:
        options = re.findall(r'--config\.data\.(\w+)=(\S+)', command)
        assert dict(options) == {'event_file': 'clicks.csv', 'item_file': 'items.csv'}
    c = config.get_config()
    config.tiny(c)
    c.data.update(dict(options))
    source = sources.chosen(c)
    source.check(c)
    data = sources.load(c, tmp_path / 'run')
    assert [len(part.start) for part in (data.train, data.valid, data.test)] == [480, 60, 60]
    assert data.lines['rejected'] == {}
    assert data.num_items == 120
    assert data.kinds == ('view',)
    assert len(np.unique(data.train.visitor)) == 200
    assert (data.train.time[data.train.offsets[:-1]] == 1000 * data.train.start).all()
    assert [line.split(': ')[1].split(',')[0] for line in source.columns(c)][:3] == [
        'visitor_id is user', 'event_time is time', 'event_type is kind']
    assert '"0003", "0007"' in page
    assert {'0003', '0007'} <= {*data.asins}
