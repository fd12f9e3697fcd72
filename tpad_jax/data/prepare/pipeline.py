"""Raw Amazon files -> catalogue and interactions by Apache Beam, on this or on many machines.

All that reads texts is spread over workers: parsing lines, keeping the first line of an item,
finding the item of a review, numbering users, dropping repeated reviews. The elements of the
collections are tables of many lines. Those of one range of sorted ids meet at one worker, so that
the files of all ranges, one after the other, are in the order that numbers items and users.

Integers come back, 20 bytes per review. `amazon_tables.prepare` cuts, splits and filters sessions
from them in memory, by the functions that it uses without Beam [ours]. The seeded order among equal
times, the boundaries of the split and each pass of the k-core depend on all events before them: in
Beam each would be one more shuffle of all events, for a fraction of the time that reading takes.
"""

import io
import json
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tpad_jax.data.sources import amazon, amazon_blocks, amazon_fields
from tpad_jax.data.sources.amazon import CATALOGUE, Raw
from tpad_jax.data.sources.amazon_parts import Part, PartLines, parts
from tpad_jax.data.untrusted import SHOWN, Lines

PART = 64 * 2**20  # bytes of a plain file that one worker reads
ROWS = 2**18  # lines in a table; of a packed file one worker reads them all
RANGES = 256  # of ids, at most: a worker holds the lines of one
SAMPLES = 64  # ids of a table, of all of which the ends of the ranges are chosen
BITS = 32  # of an item's number in its range; the bits above are the range's
_ITEMS = CATALOGUE | {'unused': pl.List(pl.String)}
_LINES = _ITEMS | {'begin': pl.Int64, 'line': pl.Int64}  # in the order of the file
_EVENTS = amazon_blocks.EVENTS | {'user': pl.Binary}
COUNTS = 'counts.json'


def read_part(part: Part, form: str) -> Iterator[tuple[str, Any]]:
    """Parse the lines of a part.

    Args:
      part: of a file.
      form: '2018' or '2023'.

    Yields:
      ('items' or 'events', a table), and ('counts', of the part's lines).
    """
    lines, held = PartLines(part, _opened), []
    parse = (amazon_blocks.events if part.kind == 'events'
             else partial(amazon_blocks.items, parse=amazon_fields.describe))
    for block in lines.blocks():
        before = lines.number
        values = amazon_blocks.counted(lines, parse(block, form))
        if part.kind == 'events':
            held.append(values.with_columns(user=amazon_blocks.genuine(pl.col('user'))))
        else:
            columns, missing = values
            unused = [[] for _ in columns[0]]
            for row, what in missing:
                unused[row].append(what)
            held.append(pl.DataFrame([*columns, unused], _ITEMS).with_columns(
                begin=pl.lit(part.begin, pl.Int64), line=before + pl.int_range(pl.len())))
        if sum(map(len, held)) >= ROWS:
            yield part.kind, pl.concat(held)
            held = []
    if held:
        yield part.kind, pl.concat(held)
    yield 'counts', dict(kind=part.kind, order=part.begin, number=lines.number,
                         rejected=lines.rejected, damaged=lines.damaged, unread=lines.unread)


def sampled(table: pl.DataFrame, column: str) -> list:
    """Choose some ids of a table."""
    return table[column].gather_every(max(1, len(table) // SAMPLES)).to_list()


def ends(samples: list[list], ranges: int) -> list:
    """Choose the first id of every range but the first, so that ranges have about equal sizes."""
    names = sorted(name for sample in samples for name in sample)
    return sorted({names[len(names) * k // ranges] for k in range(1, ranges)} if names else ())


def slices(table: pl.DataFrame, column: str, firsts: list) -> Iterator[tuple[int, pl.DataFrame]]:
    """Divide a table by the ranges that its ids in a column are in.

    Args:
      table: any.
      column: of text or bytes.
      firsts: sorted, see `ends`.

    Yields:
      Number of a range, the rows in it.
    """
    table = table.sort(column)
    stops = table[column].search_sorted(pl.Series(firsts, dtype=table.schema[column])).to_list()
    for number, (start, stop) in enumerate(zip([0, *stops], [*stops, len(table)], strict=True)):
        if stop > start:
            yield number, table[start:stop]


def join(group: tuple[int, dict[str, Iterable[pl.DataFrame]]], place: str
         ) -> Iterator[tuple[str, Any]]:
    """Keep the first line of every item in a range of asins, and number the items of the events.

    Args:
      group: number of the range; its tables of 'items' and of 'events'.
      place: URL of the folder to write to.

    Yields:
      ('events', users, items, times) of items with metadata; ('counts', of the range).
    """
    number, tables = group
    lines = pl.concat([pl.DataFrame(schema=_LINES), *tables['items']])
    items = lines.sort('asin', 'begin', 'line').unique('asin', keep='first', maintain_order=True)
    events = pl.concat([pl.DataFrame(schema=_EVENTS), *tables['events']])
    known = events.join(items.select('asin', item=pl.int_range(pl.len()) + (number << BITS)),
                        on='asin').select('user', 'item', 'time')
    unused = Counter(items['unused'].explode().drop_nulls())
    yield 'events', known
    yield 'counts', dict(kind='catalogue', order=number, size=len(items), unused=unused,
                         file=_written(items.select(CATALOGUE.names()), place),
                         duplicate_item=len(lines) - len(items),
                         item_without_metadata=len(events) - len(known))


def number_users(group: tuple[int, Iterable[pl.DataFrame]], place: str) -> dict:
    """Number the users in a range by their sorted names, and sort their events, none twice.

    Args:
      group: number of the range; its tables of users, items, times.
      place: URL of the folder to write to.

    Returns:
      Counts, and the file.
    """
    number, tables = group
    events = pl.concat(tables).sort('user').with_columns(
        pl.col('user').rle_id().cast(pl.Int64)).unique().sort('user', 'time', 'item')
    return dict(kind='interactions', order=number, size=1 + events['user'].max(),
                file=_written(events, place))


def build(pipeline, every: list[Part], form: str, place: str) -> None:
    """Add the transforms to a pipeline, which writes tables and COUNTS.

    Args:
      pipeline: of Beam.
      every: part of both files.
      form: '2018' or '2023'.
      place: URL of an empty folder that all workers write to.
    """
    import apache_beam as beam

    def tagged(function):
        return lambda *args: (beam.pvalue.TaggedOutput(*pair) for pair in function(*args))

    def by(column, name, tables, sample):
        firsts = (sample | f'{name}: sample {column}' >> beam.Map(sampled, column)
                  | f'{name}: list' >> beam.combiners.ToList()
                  | f'{name}: ends' >> beam.Map(ends, min(RANGES, len(every))))
        return tables | f'{name}: by {column}' >> beam.FlatMap(
            slices, column, beam.pvalue.AsSingleton(firsts))

    read = (pipeline | beam.Create(every) | beam.Reshuffle()
            | 'read' >> beam.FlatMap(tagged(read_part), form).with_outputs())
    joined = ({name: by('asin', name, read[name], read['items']) for name in ('items', 'events')}
              | beam.CoGroupByKey()
              | 'join' >> beam.FlatMap(tagged(join), place).with_outputs())
    numbered = (by('user', 'users', joined['events'], joined['events']) | beam.GroupByKey()
                | 'number users' >> beam.Map(number_users, place))
    _ = ((read['counts'], joined['counts'], numbered) | beam.Flatten()
         | 'all' >> beam.combiners.ToList()
         | 'write' >> beam.Map(_write_counts, f'{place}/{COUNTS}'))


def read(raw_dir: Path, store: Path, bad_share: float, flags: list[str], raw_url: str,
         place: str) -> Raw:
    """Read as `amazon.read` does, and return the same.

    Args:
      raw_dir: the folder of raw files and pictures, here.
      store: a file that the catalogue is written to.
      bad_share: as of `amazon.read`.
      flags: Beam's, the runner among them.
      raw_url: of the folder of raw files, for workers.
      place: URL of an empty folder that workers and this process read and write.

    Returns:
      Catalogue, interactions and counts.

    Raises:
      InputError: as `amazon.read`.
    """
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    paths = amazon.find_files(raw_dir)
    files = {'items': paths.metadata, 'events': paths.reviews}
    for path in files.values():  # what is not a file of its form is refused here
        next(Lines(path).blocks(), None)
    with beam.Pipeline(options=PipelineOptions(flags)) as pipeline:
        build(pipeline, [part for kind, path in files.items()
                         for part in parts(kind, path, f'{raw_url}/{path.name}', PART)],
              paths.form, place)
    counts = {kind: [] for kind in (*files, 'catalogue', 'interactions')}
    with _opened(f'{place}/{COUNTS}') as file:
        for entry in sorted(json.load(file), key=lambda entry: entry['order']):
            counts[entry['kind']].append(entry)
    lines = {kind: _merged(path, counts[kind]) for kind, path in files.items()}
    unused = sum((Counter(entry['unused']) for entry in counts['catalogue']), Counter())
    again, unknown = (sum(entry[reason] for entry in counts['catalogue'])
                      for reason in ('duplicate_item', 'item_without_metadata'))
    lines['items'].rejected += Counter(duplicate_item=again)
    lines['events'].rejected['item_without_metadata'] += unknown
    for kind in files:
        amazon.check(lines[kind], kind, paths.form, bad_share)
    catalogue = _catalogue(raw_dir, [f'{place}/{entry["file"]}' for entry in counts['catalogue']],
                           unused, store)
    interactions = _interactions(counts, place)
    events = lines['events']
    events.rejected['duplicate_review'] = (
        events.number - events.rejected.total() - len(interactions))
    # a bucket's folder is one by its last character
    beam.io.filesystems.FileSystems.delete([place + '/' * ('://' in place)])
    return Raw(catalogue, interactions, amazon.counts(lines['items'], events, unused), paths.form,
               {'by_day': paths.form == '2018'})


def _write_counts(counts: list[dict], url: str) -> None:
    with _opened(url, 'create') as file:
        file.write(json.dumps(counts).encode())


def _merged(path: Path, counts: list[dict]) -> Lines:
    """Add up the counts of a file's parts, which are in their order."""
    lines = Lines(path)
    for entry in counts:
        lines.damaged += [(lines.number + line, reason) for line, reason in entry['damaged']]
        lines.number += entry['number']
        lines.rejected.update(entry['rejected'])
        lines.unread = max(lines.unread, entry['unread'])
    del lines.damaged[SHOWN:]
    return lines


def _catalogue(raw_dir: Path, urls: list[str], unused: Counter, store: Path) -> pl.DataFrame:
    """Join tables of items, one in memory at a time, in a file that is mapped."""
    asins = {asin for url in urls for asin in _table(url)['asin']}
    images = amazon.find_images(raw_dir, asins, unused)
    return amazon.joined((amazon.with_images(_table(url), images) for url in urls),
                         amazon.WITH_IMAGES, store)


def _interactions(counts: dict[str, list[dict]], place: str) -> pl.DataFrame:
    """Join tables of events, and number users and items from the first range on."""
    sizes = np.zeros(1 + max(entry['order'] for entry in counts['catalogue']), np.int64)
    for entry in counts['catalogue']:
        sizes[entry['order']] = entry['size']
    before, tables, users = np.cumsum(sizes) - sizes, [], 0
    for entry in counts['interactions']:
        table = _table(f'{place}/{entry["file"]}')
        code = table['item'].to_numpy()
        tables.append(table.with_columns(
            pl.col('user') + users,
            item=pl.Series(before[code >> BITS] + (code & (1 << BITS) - 1) + 1, dtype=pl.Int32)))
        users += entry['size']
    return pl.concat(tables)


def _table(url: str) -> pl.DataFrame:
    with _opened(url) as file:
        return pl.read_ipc(io.BytesIO(file.read()))


def _written(table: pl.DataFrame, place: str) -> str:
    """Write a table under a name that no other attempt at it has, and return the name."""
    buffer, name = io.BytesIO(), f'{uuid.uuid4().hex}.arrow'
    table.write_ipc(buffer)
    with _opened(f'{place}/{name}', 'create') as file:
        file.write(buffer.getvalue())
    return name


def _opened(url: str, how: str = 'open'):
    """Open or create a file anywhere that Beam knows; a packed one is not unpacked."""
    from apache_beam.io.filesystems import CompressionTypes, FileSystems
    return getattr(FileSystems, how)(url, compression_type=CompressionTypes.UNCOMPRESSED)
