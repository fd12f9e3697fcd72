"""New files of the source of a finished run, merged with the data that it knows.

Known items keep their numbers and what was read of them; new ones follow. A folder of new files
holds the same kind of files as at the start: raw Amazon files (also for the planted catalogue),
tables with the names of `config.data.event_file` and `item_file`, a directory as of
`config.data.ready`, or an .npz with the name of `config.data.npz`.
"""

import hashlib
import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from tpad_jax.config import names
from tpad_jax.core import files
from tpad_jax.data import sessions as sessions_lib, sources, text
from tpad_jax.data.catalogue import Data
from tpad_jax.data.sessions import Sessions
from tpad_jax.data.sources import amazon, event_files, folder, ids
from tpad_jax.errors import refuse_if

ITEMS, SESSIONS, ABOUT = 'items.parquet', 'sessions.npz', 'about.json'
COLUMNS = ('asin', 'title', 'text', 'has_image', 'side', 'brand', 'category', 'price')
KEPT = 'side_sizes', 'vocabulary', 'kinds', 'form', 'fingerprint', 'lines'  # of Data, as JSON


class New(NamedTuple):
    """New items and sessions.

    Attributes:
      items: n rows of asin, title, text, brand, category, price, the items that were not known.
      pictures: of these, a path or the encoded bytes, or None.
      sessions: in the order of time, of known items and, after them, the new ones.
      kinds: names of the kinds of their events.
      lines: as of `catalogue.Data`.
    """

    items: pl.DataFrame
    pictures: Sequence
    sessions: Sessions
    kinds: tuple[str, ...]
    lines: dict


def read(config, directory: Path, known: Data) -> New:
    """Read the new files of a run's source.

    Args:
      config: of the run.
      directory: of the new files.
      known: the data of the run.

    Raises:
      InputError: the directory does not exist, it holds no files of this source, they belong to
        another catalogue or were added before, or the source has no form for new files.
    """
    name, option = sources.selected(config), f'--new={directory}'
    refuse_if(name not in READERS, f'config.data.source={name!r}: only {", ".join(READERS)} have '
              'a form for new files. Fix: train again on all data')
    refuse_if(not directory.is_dir(), f'{option}: not a directory. Expected new files of the '
              "run's source. Fix: correct the path")
    new = READERS[name](config.data, directory, known)
    refuse_if(not (new.sessions.items <= known.num_items).any(), f'{option}: none of its '
              f'{len(new.sessions.items)} events is of an item of the run. Expected new files of '
              'the same catalogue. Fix: correct the path')
    old, sessions = history(known), new.sessions
    later = sessions.start > old.start.max()
    if not sessions.start.any():  # there are no times
        last = old.items[-len(sessions.items):]
        later = np.full(len(later), not np.array_equal(last, sessions.items))
    refuse_if(not later.any(), f'{option}: none of its sessions begins after the newest one of the '
              'run. Expected new ones. Fix: name files that were not added before')
    if not later.all():  # they would count twice
        new.lines['unused']['session_not_after_the_known_ones'] = int((~later).sum())
    sessions = sessions_lib.take(sessions, np.flatnonzero(later))
    if sessions.visitor is not None and old.visitor is not None:  # they are numbered per file
        sessions = sessions._replace(visitor=np.where(
            sessions.visitor < 0, -1, sessions.visitor + 1 + old.visitor.max()))
    return new._replace(sessions=sessions)


def merge(config, known: Data, new: New, held_out: float) -> tuple[Data, np.ndarray]:
    """Join known and new data; the newest sessions are held out.

    Args:
      config: of the run.
      known: the data of the run.
      new: of `read`.
      held_out: share of the new sessions that becomes `valid` and `test`, at least one.

    Returns:
      The data, without pictures, and the rows of `new.items` that `config.data.catalogue` keeps.

    Raises:
      InputError: there are fewer than two new sessions, or no item of a held-out one can be ranked.
    """
    last, total = known.num_items, len(new.sessions.start)
    held = max(1, round(held_out * total))
    refuse_if(held >= total, f'--held_out={held_out}: {held} of {total} new sessions. Expected '
              'some to train on. Fix: lower it, or give more sessions')
    kinds = (*known.kinds, *(kind for kind in new.kinds if kind not in known.kinds))
    sessions = new.sessions
    if sessions.kind is not None and new.kinds:
        sessions = sessions._replace(kind=np.array(
            [kinds.index(kind) for kind in new.kinds], np.int32)[sessions.kind])
    fresh, newest = (sessions_lib.take(sessions, part)
                     for part in np.split(np.arange(total), [total - held]))
    used = np.unique((sessions if config.data.catalogue == 'reviewed' else fresh).items)
    kept = (np.arange(new.items.height) if config.data.catalogue == 'all'
            else used[used > last] - last - 1)
    number = np.zeros(1 + last + new.items.height, np.int32)
    number[:last + 1] = np.arange(last + 1)
    number[last + 1 + kept] = last + 1 + np.arange(len(kept))
    fresh, newest = (part._replace(items=number[part.items]) for part in (fresh, newest))
    train = sessions_lib.join(history(known), sessions_lib.known(fresh))
    newest = sessions_lib.known(newest)
    sessions_lib.check(newest, f'--held_out={held_out}: held-out', last + len(kept))
    items = new.items[kept]
    side = (text.side_ids(items, known.vocabulary) if known.vocabulary
            else np.zeros((len(kept), len(known.side_sizes)), np.int32))
    digest = hashlib.sha256(f'{known.fingerprint} {held_out}'.encode())
    digest.update(repr((items['asin'].to_list(), items['text'].to_list())).encode())
    for array in new.sessions[:3]:
        digest.update(np.ascontiguousarray(array).tobytes())
    pictures = np.array([new.pictures[row] is not None for row in kept], bool)
    data = Data(
        *([*getattr(known, f'{name}s'), *items[name]] for name in ('asin', 'title', 'text')),
        image_bytes=None, has_image=np.append(known.has_image, pictures),
        side=np.concatenate([known.side, side]), side_sizes=known.side_sizes, train=train,
        valid=newest, test=newest, warm=sessions_lib.warm_items(train, last + len(kept)),
        lines=new.lines, audit={}, fingerprint=digest.hexdigest(), form=known.form,
        vocabulary=known.vocabulary, kinds=kinds, attributes={
            name: [*known.attributes.get(name, [None] * (last + 1)), *items[name]]
            for name in ('brand', 'category', 'price')})
    return data, kept


def history(data: Data) -> Sessions:
    """All sessions of a run's data in the order of time, without items that are not ranked."""
    parts = sessions_lib.join(data.train, data.valid)
    if data.test is not data.valid:  # of an update they are one
        parts = sessions_lib.join(parts, sessions_lib.known(data.test))
    return parts


def save(data: Data, directory: Path) -> None:
    """Write merged data for the next update.

    Args:
      data: of `merge`.
      directory: created if absent.
    """
    columns = {'asin': data.asins, 'title': data.titles, 'text': data.texts,
               'has_image': data.has_image, 'side': data.side.tolist(), **data.attributes}
    table = pl.DataFrame({name: columns[name][1:] for name in COLUMNS}, schema_overrides={
        'side': pl.List(pl.Int32), 'price': pl.Float32, 'brand': pl.String, 'category': pl.String})
    with files.replacing(directory / ITEMS) as partial:
        table.write_parquet(partial)
    with files.replacing(directory / SESSIONS) as partial, partial.open('wb') as file:
        np.savez(file, **{f'{part}_{name}': array for part in ('train', 'valid')
                          for name, array in getattr(data, part)._asdict().items()
                          if array is not None})
    files.write_text(directory / ABOUT, json.dumps({key: getattr(data, key) for key in KEPT}))


def restore(directory: Path) -> Data:
    """Read the data that `save` wrote; `valid` and `test` are the held-out sessions.

    Args:
      directory: of the files.

    Raises:
      InputError: a file is damaged.
    """
    about = json.loads((directory / ABOUT).read_text())
    table = pl.read_parquet(directory / ITEMS)
    arrays, _ = ids.unpack(directory / SESSIONS)
    train, valid = (Sessions(**{name: arrays.get(f'{part}_{name}') for name in Sessions._fields})
                    for part in ('train', 'valid'))
    about |= {key: tuple(about[key]) for key in ('side_sizes', 'kinds')}
    side = np.array(table['side'].to_list(), np.int32).reshape(table.height, -1)
    return Data(
        *(['', *table[name]] for name in COLUMNS[:3]), image_bytes=None,
        has_image=np.append(False, table['has_image'].to_numpy()),
        side=np.pad(side, ((1, 0), (0, 0))), train=train, valid=valid, test=valid,
        warm=sessions_lib.warm_items(train, table.height), audit={}, **about,
        attributes={name: [None, *table[name]] for name in COLUMNS[5:]})


def _raw(c, directory, known) -> New:
    return _cut(c, amazon.read(directory, c.bad_share, known.asins[1:]))


def _tables(c, directory, known) -> New:
    c = deepcopy(c)
    for option in ('event_file', 'item_file'):
        c[option] = str(directory / Path(c[option]).name)
    items = event_files.read_items(c)
    table = items.catalogue.filter(~pl.col('asin').is_in(known.asins))
    every = pl.concat([pl.DataFrame({'asin': known.asins[1:]}), table], how='diagonal')
    return _cut(c, event_files.read_events(c, items._replace(catalogue=every))._replace(
        catalogue=table))


def _cut(c, raw: amazon.Raw) -> New:
    sessions = sessions_lib.cut(
        raw.interactions, **{'gap_seconds': round(c.gap_hours * 3600), **raw.cutting}, seed=c.seed,
        min_length=c.min_length)
    items = raw.catalogue.with_columns(
        pl.Series('text', text.item_texts(raw.catalogue)[1:], pl.String))
    return New(items, raw.catalogue['image'].to_list(), sessions, raw.kinds, raw.lines)


def _ready(c, directory, known) -> New:
    return _renumbered(folder.load(directory, words=names(c.words), sides=(), ordered=c.ordered,
                                   valid=1, seed=c.seed), known)


def _npz(c, directory, known) -> New:
    return _renumbered(ids.load(directory / Path(c.npz).name, ordered=c.ordered, valid=1,
                                seed=c.seed), known)


def _renumbered(data: Data, known: Data) -> New:
    """Number the items of loaded files as the known ones, and the new ones after them."""
    place = {asin: item for item, asin in enumerate(known.asins)}
    rows = np.array([item for item, asin in enumerate(data.asins) if asin not in place], int)
    place |= {data.asins[row]: known.num_items + 1 + n for n, row in enumerate(rows)}
    number = np.array([place[asin] for asin in data.asins], np.int32)
    sessions = history(data)
    items = pl.DataFrame({
        'asin': [data.asins[row] for row in rows], 'title': [data.titles[row] for row in rows],
        'text': [data.texts[row] for row in rows],
        **{name: [data.attributes[name][row] if data.attributes else None for row in rows]
           for name in ('brand', 'category', 'price')}},
        schema_overrides={'asin': pl.String, 'title': pl.String, 'text': pl.String,
                          'brand': pl.String, 'category': pl.String, 'price': pl.Float32})
    pictures = [data.image_bytes[row] or None if data.image_bytes else None for row in rows]
    return New(items, pictures, sessions._replace(items=number[sessions.items]), data.kinds,
               data.lines)


READERS = {'raw_dir': _raw, 'planted': _raw, 'event_file': _tables, 'ready': _ready, 'npz': _npz}
