"""A CSV or Parquet file of events and one of items -> catalogue and interactions.

An event is a row with a session or a user, an item and a time. An item is a row with an id and a
title, and optionally a picture, a price, a category, a brand and further texts. Columns are found
by their usual names (`USUAL`) or named by `config.data.columns`. Sessions are those of the session
column. Without one, a pause longer than `config.data.gap_hours` ends a user's session. Where all
times are dates, a session is one user's day.
"""

import contextlib
import datetime
import re
from array import array
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from tpad_jax.config import data as data_options, names
from tpad_jax.data import images, text
from tpad_jax.data.catalogue import Data
from tpad_jax.data.sessions import DAY
from tpad_jax.data.sources import Source, amazon, amazon_fields, amazon_tables, table_files
from tpad_jax.data.sources.amazon import Raw
from tpad_jax.data.sources.table_files import Rows, id_of, text_of
from tpad_jax.data.untrusted import Reason, shown
from tpad_jax.errors import refuse_if

UNUSED = '-'  # names a column that is not to be read
# Names of columns that are found without an option, in lower case without other characters than
# letters and digits.
_ITEM = 'item itemid product productid article articleid sku asin parentasin'
USUAL = {
    'session': 'session sessionid', 'user': 'user userid customer customerid visitor visitorid',
    'item': _ITEM, 'time': 'time timestamp eventtime datetime date createdat',
    'kind': 'kind event eventtype type action', 'id': f'id {_ITEM}',
    'title': 'title name producttitle productname itemname',
    'image': 'image imageurl imagepath picture', 'price': 'price', 'brand': 'brand store vendor',
    'category': 'category categories', 'text': 'description text'}
# the columns of a file, and those of which it needs at least one
EVENT = ('session', 'user', 'item', 'time', 'kind'), (('item',), ('time',), ('session', 'user'))
ITEM = (('id', 'title', 'image', 'price', 'category', 'brand', 'text'),
        (('id',), ('title', 'text')))
MILLISECONDS = 1000
EXAMPLE = 50  # characters of a printed value
LONGEST = 10**9  # seconds of a pause that never ends a session
_NUMBER = re.compile(r'0*(\d+)(?:\.0*)?')  # an id that programs may write in several ways
_URL = re.compile(r'https?://', re.IGNORECASE)
HINTS = table_files.HINTS | {
    'bad_time': 'write every time as seconds or milliseconds since 1970, or as 2024-05-31 or '
                '2024-05-31T18:30:00+02:00, between 1995 and 2100',
    'bad_id': f'write every id as a printable text of at most {table_files.ID_LENGTH} characters'}


def open_file(file: str, config, wanted: tuple) -> tuple[Rows, dict[str, str]]:
    """Open a file and choose its columns.

    Args:
      file: its path.
      config: `config.data` of the run.
      wanted: EVENT or ITEM.

    Returns:
      Its rows, and {key of USUAL: column} of the columns that it has. 'text' may name several
      columns, separated by commas.

    Raises:
      InputError: the file or a column is absent, or several columns have a usual name.
    """
    rows, chosen = Rows(Path(file), config.encoding), {}
    plain = {name: re.sub(r'[^a-z0-9]', '', name.lower()) for name in rows.columns}
    for key in wanted[0]:
        option, usual = config.columns[key], USUAL[key].split()
        fitting = [name for name in rows.columns if plain[name] in usual]
        refuse_if(not option and key != 'text' and len(fitting) > 1, f'{file}: {shown(fitting)} '
                  f'may all be the {key}. Expected one column. Fix: set config.data.columns.{key} '
                  f'to its name, or to {UNUSED!r}.')
        if option != UNUSED and (option or fitting):
            chosen[key] = option or ','.join(fitting)
            for name in names(chosen[key]) if key == 'text' else (chosen[key],):
                rows.check_name(name)
    for keys in wanted[1]:
        options = ' or '.join(f'config.data.columns.{key}' for key in keys)
        refuse_if(not {*keys} & {*chosen}, f'{file}: no column has a usual name of the '
                  f'{" or ".join(keys)}; the file ({rows.form}) has {shown(rows.columns, 20)}. '
                  f'Expected one. Fix: set {options} to the name of the column.')
    return rows, chosen


class Items(NamedTuple):
    """The file of items, read.

    Attributes:
      rows: of the file.
      columns: of `open_file`.
      catalogue: as of `Raw`.
      unused: {what: count}, as of `Raw.lines`.
    """

    rows: Rows
    columns: dict[str, str]
    catalogue: pl.DataFrame
    unused: Counter


def read_items(config) -> Items:
    """Read the file of items and find their pictures.

    Args:
      config: `config.data` of the run.

    Returns:
      The items.

    Raises:
      InputError: the file or a column is absent, no row is usable, or more are damaged than
        `config.bad_share`.
    """
    unused = Counter()
    rows, columns = open_file(config.item_file, config, ITEM)
    items = _described(rows, columns, unused)
    rows.check(config.bad_share, fields=columns['id'], hints=HINTS)
    pictures = _pictures(rows.path, items, unused)
    catalogue = pl.DataFrame(
        [(item, *items[item][:-1], pictures.get(item)) for item in sorted(items)],
        schema={'asin': pl.String, 'title': pl.String, 'brand': pl.String, 'category': pl.String,
                'description': pl.String, 'price': pl.Float32, 'image': pl.String}, orient='row')
    return Items(rows, columns, catalogue, unused)


def read_urls(file: Path, bad_share: float) -> amazon.PictureUrls:
    """Read the addresses of the pictures of a file of items; no picture is requested.

    Args:
      file: the file. Its columns are found by their usual names.
      bad_share: as in the config.

    Returns:
      Addresses of items whose id can name a file; every item counts as reviewed.

    Raises:
      InputError: as `read_items`, or the file has no column of pictures.
    """
    unused, urls = Counter(), {}
    rows, columns = open_file(str(file), data_options(), (ITEM[0], (('id',), ('image',))))
    for item, (*_, name) in _described(rows, columns, unused).items():
        fits = amazon_fields.ASIN.fullmatch(item) is not None
        unused['id_cannot_name_a_file'] += not fits
        urls |= {item: (name,) if _URL.match(name) else ()} if fits else {}
    rows.check(bad_share, fields=columns['id'], hints=HINTS)
    none = Rows(file)  # no events are read
    return amazon.PictureUrls(urls, set(urls), amazon.counts(rows, none, unused))


def read_events(config, items: Items) -> Raw:
    """Read the file of events.

    Ids are compared as texts. An id that is found only as a number (7, '007', '7.0') is counted as
    'id_matched_as_a_number'.

    Args:
      config: `config.data` of the run.
      items: of `read_items`.

    Returns:
      As of `amazon.read`; times are in milliseconds.

    Raises:
      InputError: as `read_items`.
    """
    rows, columns = open_file(config.event_file, config, EVENT)
    unused = Counter(items.unused)
    events, unit, kinds = _events(rows, columns, items.catalogue['asin'], names(config.kinds),
                                  unused)
    rows.check(config.bad_share, fields=', '.join(columns[key] for key in columns if key != 'kind'),
               hints=HINTS)
    rows.rejected['duplicate_event'] = rows.number - rows.rejected.total() - len(events)
    if 'session' in columns:
        cutting = {'gap_seconds': LONGEST}
    else:
        cutting = {'by_day': bool((events['time'] % (DAY * MILLISECONDS) == 0).all())}
    return Raw(items.catalogue, events, amazon.counts(items.rows, rows, unused),
               f'{rows.form}, times in {unit}', {'per_second': MILLISECONDS, **cutting}, kinds)


def _described(rows: Rows, columns: dict[str, str], unused: Counter) -> dict[str, tuple]:
    """-> {id: title, brand, category, description, price, name of the picture}."""
    items = {}

    def cell(row, key):
        return text_of(row[columns[key]]) if key in columns else ''

    for row in rows:
        item = id_of(row[columns['id']])
        if not item:
            item = Reason(f'missing_{columns["id"]}')
        elif item in items:
            item = Reason('duplicate_item')
        if isinstance(item, Reason):
            rows.reject(item)
            continue
        raw_price, texts = cell(row, 'price'), names(columns.get('text', ''))
        price = amazon_fields.amount(raw_price)
        unused['price'] += bool(raw_price) and price is None
        items[item] = (*(text.words_of(cell(row, key)) for key in ('title', 'brand', 'category')),
                       text.joined(text_of(row[name]) for name in texts), price, cell(row, 'image'))
    return items


def _pictures(file: Path, items: dict[str, tuple], unused: Counter) -> dict[str, str]:
    """Find the picture of every item: the named file, else images/<id>.jpg next to `file`.

    Args:
      file: of the items; named pictures are relative to its folder and inside it.
      items: of `_items`.
      unused: increased by the reasons why pictures are not used.

    Returns:
      {id: path}.
    """
    by_id = amazon.find_images(file.parent, items, unused)
    pictures = {}
    for item, (*_, name) in items.items():
        if name and not _URL.match(name):
            path, why = file.parent / name, Reason(images.NOT_THERE)
            with contextlib.suppress(OSError):  # a name may be too long for the file system
                why = images.unusable(path, file.parent) if path.exists() else why
            unused[why] += why is not None
            if why is None:
                pictures[item] = str(path)
        elif item in by_id:
            pictures[item] = str(by_id[item])
        else:
            unused[images.NOT_THERE] += bool(name)  # an address that was not downloaded
    return pictures


def _events(rows: Rows, columns: dict[str, str], asins: pl.Series, kinds: tuple[str, ...],
            unused: Counter) -> tuple[pl.DataFrame, str, tuple[str, ...]]:
    """Read the events.

    Args:
      rows: of the file.
      columns: of `open_file`.
      asins: ids of the items, sorted.
      kinds: of the events that are read; (): all.
      unused: increased by ids that are matched as numbers.

    Returns:
      Columns user (number of the session or user), item, time (milliseconds), kind and visitor
      (-1: not known), sorted, of equal events the first kind; the unit of the times in the file;
      and the names of the kinds.
    """
    exact = {asin: place for place, asin in enumerate(asins, start=1)}
    times_used = Counter(map(_number, exact))
    by_number = {_number(asin): place for asin, place in exact.items()
                 if _number(asin) and times_used[_number(asin)] == 1}
    groups, known_kinds, unit, users = {}, {}, '', {}
    user, item, time, kind = array('q'), array('i'), array('q'), array('i')
    for row in rows:
        event = _event(row, columns, kinds)
        if not isinstance(event, Reason):
            who, its_user, name, when, its_unit, its_kind = event
            unit = unit or its_unit
            place = exact.get(name) or by_number.get(_number(name))
            if its_unit != unit:  # a file has one unit, that of its first usable row
                event = Reason(f'time_in_{its_unit}')
            elif place is None:
                event = Reason('event_of_unknown_item')
        if isinstance(event, Reason):
            rows.reject(event)
            continue
        unused['id_matched_as_a_number'] += name not in exact
        user.append(groups.setdefault(who, len(groups)))
        users[who] = users.get(who) or its_user  # the first name: a guest may sign in
        item.append(place)
        time.append(when)
        kind.append(known_kinds.setdefault(its_kind, len(known_kinds)))
    # numbered by sorted names, so that no number depends on the order of lines
    number, kind_number = (np.argsort(np.array([seen[name] for name in sorted(seen)], int))
                           for seen in (groups, known_kinds))
    visitors = {name: place for place, name in enumerate(sorted({*users.values()} - {''}))}
    visitor = np.array([visitors.get(users[who], -1) for who in sorted(groups)], int)
    table = pl.DataFrame({'user': number[user], 'item': np.asarray(item), 'time': np.asarray(time),
                          'kind': kind_number[kind], 'visitor': visitor[number[user]]})
    every = ['user', 'time', 'item', 'kind']
    table = table.sort(every).unique(every[:3], keep='first', maintain_order=True)
    if 'kind' not in columns:
        return table.drop('kind'), unit, ()
    return table, unit, tuple(sorted(known_kinds))


def _event(row: dict, columns: dict[str, str], kinds: tuple[str, ...]) -> tuple | Reason:
    """-> session, user, item, milliseconds, unit and kind, or why the row cannot be used.

    Without a session column the user is the session, which is cut by time.
    """
    ids = {key: id_of(row[columns[key]]) for key in ('item', 'session', 'user') if key in columns}
    cell = text_of(row[columns['time']])
    needed = {'item': ids['item'], 'time': cell,
              'session' if 'session' in ids else 'user': ids.get('session', ids.get('user'))}
    for key, value in needed.items():
        if not value:
            return Reason(f'missing_{columns[key]}')
    for value in ids.values():
        if isinstance(value, Reason):
            return value
    kind = text_of(row[columns['kind']]) if 'kind' in columns else ''
    if kinds and kind not in kinds:
        return Reason('other_kind')
    when, unit = time_of(cell)
    if when is None:
        return Reason('bad_time')
    user = ids.get('user', '')
    return ids.get('session', user), user, ids['item'], when, unit, kind


def _number(name: str) -> str:
    """The digits of an id that is a number, else ''."""
    match = _NUMBER.fullmatch(name)
    return match[1] if match else ''


def time_of(cell: str) -> tuple[int | None, str]:
    """Read a time.

    Args:
      cell: a number since 1970 in a unit of `amazon_fields.UNITS`, or an ISO date with or without
        time. A time without zone is in UTC.

    Returns:
      Milliseconds, None if it is not a time between 1995 and 2100; and the unit, 'dates' if the
      cell is not such a number.
    """
    with contextlib.suppress(ValueError, OverflowError):
        number = float(cell)
        for unit, per_second in amazon_fields.UNITS.items():
            if amazon_fields.EARLIEST <= number / per_second < amazon_fields.LATEST:
                return round(number * MILLISECONDS / per_second), unit
    with contextlib.suppress(ValueError, OverflowError):
        moment = datetime.datetime.fromisoformat(cell.removesuffix(' UTC'))
        seconds = moment.replace(tzinfo=moment.tzinfo or datetime.UTC).timestamp()
        if amazon_fields.EARLIEST <= seconds < amazon_fields.LATEST:
            return round(seconds * MILLISECONDS), 'dates'
    return None, 'dates'


def _load(config, workdir: Path) -> Data:
    c = config.data
    items = read_items(c)
    return amazon_tables.prepared(
        config, Path(c.item_file).parent, workdir, core=c.core, valid=c.valid, test=c.test,
        read=partial(read_events, c, items),
        inputs=[Path(c.event_file), Path(c.item_file),
                *map(Path, items.catalogue['image'].drop_nulls())],
        reading={'columns': c.columns.to_dict(), 'kinds': c.kinds, 'encoding': c.encoding})


def _check(config) -> None:
    c = config.data
    refuse_if(not c.item_file or not c.event_file, f'config.data.event_file={c.event_file!r} and '
              f'config.data.item_file={c.item_file!r}: one is empty. Expected two CSV or Parquet '
              'files. Fix: set both.')
    open_file(c.item_file, c, ITEM)
    _, columns = open_file(c.event_file, c, EVENT)
    refuse_if(c.kinds and 'kind' not in columns, f'config.data.kinds={c.kinds!r}: {c.event_file} '
              'has no column of kinds. Expected one. Fix: set config.data.columns.kind.')


def _columns(config) -> list[str]:
    """Each column of both files with what it is read as and its first value."""
    out = []
    for file, wanted in ((config.data.event_file, EVENT), (config.data.item_file, ITEM)):
        rows, columns = open_file(file, config.data, wanted)
        used = {name: key for key, value in columns.items() for name in names(value)}
        first = next(iter(rows), {})
        out += [f'{file} ({rows.form}): {name} is {used.get(name, "not read")}, such as '
                f'{text_of(first.get(name))[:EXAMPLE]!r}' for name in rows.columns]
    return out


SOURCE = Source(load=_load, check=_check, columns=_columns, sizes=amazon_tables.prepared_sizes)
