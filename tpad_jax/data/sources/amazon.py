"""Raw Amazon files (UCSD 2018 and 2023, one JSON object per line) -> catalogue and interactions.

A folder holds one category: reviews, metadata and, optionally, pictures as `images/<asin>.jpg` (or
.jpeg, .png, .webp, .gif), which data/download/ fetches from the addresses in the metadata.
2018: `X_5.json[.gz]` or `X.json[.gz]`, and `meta_X.json[.gz]`. 2023: `X.jsonl[.gz]` and
`meta_X.jsonl[.gz]`. The files are read in blocks; every line is kept or counted as rejected.
Sources: Ni, Li and McAuley, EMNLP 2019 (2018 form); Hou et al., arXiv 2403.03952 (2023 form).
"""

import mmap
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from tpad_jax.core.files import PARTIAL
from tpad_jax.data import images as images_lib
from tpad_jax.data.sources import amazon_blocks, amazon_fields, amazon_processes
from tpad_jax.data.sources.amazon_blocks import CATALOGUE, THREADS
from tpad_jax.data.sources.amazon_fields import FIELDS
from tpad_jax.data.sources.amazon_processes import Processes
from tpad_jax.data.untrusted import Lines, stay_inside
from tpad_jax.errors import Stopped, refuse_if

_METADATA = re.compile(r'meta_(.+)\.(jsonl?)(\.gz)?')
_REVIEWS = re.compile(r'(?!meta_)(.+?)(?:_5\.json|\.jsonl)(\.gz)?')
_OF_2014 = re.compile(r'reviews_.+\.json(\.gz)?')
WITH_IMAGES = pl.Schema(CATALOGUE | {'image': pl.String})
ROWS = 16_384  # items in memory at once while they are sorted in a file
NEEDED = {'items': '{asin}', 'events': '{asin}, {user} and {time}'}  # in each line
# what to do about lines that most of a file is rejected for
HINTS = {
    'python_dict': 'these are Python dictionaries, as in the 2014 form of the data: write every '
                   'line as JSON, for example by json.dumps(ast.literal_eval(line))',
    'bad_time': 'write every time as a number, in seconds (2018) or milliseconds (2023) since 1970',
    **{f'time_in_{unit}': f'the times look like {unit}: convert them to seconds (2018 form) or '
                          'milliseconds (2023 form)' for unit in amazon_fields.UNITS},
    **{f'missing_{name}': f'lines of a {ending} file have {", ".join(names)}: add them, or rename '
       'the file if it is of the other form' for ending, names in (
           ('.json', ('asin', 'reviewerID', 'unixReviewTime')),
           ('.jsonl', ('parent_asin', 'user_id', 'timestamp'))) for name in names},
    'bad_user': f'write every user as a text of at most {amazon_fields.USER_LENGTH} characters, a '
                'number in quotes',
    'bad_asin': 'write every item id as a text of at most 32 letters, digits, - and _ (no dot: the '
                'id names the picture file)',
}


class RawFiles(NamedTuple):
    """The raw files of a folder.

    Attributes:
      reviews: path.
      metadata: path.
      form: '2018' or '2023'.
    """

    reviews: Path
    metadata: Path
    form: str


class Raw(NamedTuple):
    """The content of the raw files.

    Attributes:
      catalogue: V rows sorted by asin (row k is item id k + 1): asin, title, brand, category,
        description (str, '' if none), price (f32 dollars, null if none), image (path or null).
      interactions: user (int64, anonymous number), item (int32 id), time (int64 seconds, if not
        otherwise in `cutting`), sorted; optionally more columns that `sessions.cut` reads.
      lines: over all lines of both files, 'read' = 'kept' + sum of 'rejected' {reason: count}; and
        'unused' {what: count}, parts of kept lines (and images) that could not be used.
      form: '2018', '2023' or other words.
      cutting: arguments of `sessions.cut` that the files decide.
      kinds: names of the kinds of events.
    """

    catalogue: pl.DataFrame
    interactions: pl.DataFrame
    lines: dict
    form: str
    cutting: dict
    kinds: tuple[str, ...] = ()


class PictureUrls(NamedTuple):
    """Addresses of the items' pictures.

    Attributes:
      urls: {asin: at most URLS addresses as they are written, the preferred one first}.
      reviewed: the asins that a usable review names.
      lines: as of `Raw`; a repeated review counts as kept.
    """

    urls: dict[str, tuple[str, ...]]
    reviewed: set[str]
    lines: dict


def find_files(raw_dir: str | Path) -> RawFiles:
    """Find the files of one category.

    Args:
      raw_dir: the folder.

    Returns:
      The paths and the form.

    Raises:
      InputError: no such folder, no metadata or no reviews, more than one candidate, or files in
        the form of 2014.
    """
    raw_dir = Path(raw_dir)
    expected = ('Expected X_5.json[.gz] and meta_X.json[.gz] (2018) or X.jsonl[.gz] and '
                'meta_X.jsonl[.gz] (2023), X being the category. Fix: ')
    refuse_if(not raw_dir.is_dir(),
              f'{raw_dir}: no such directory. {expected}give the folder that holds them.')
    names = sorted(path.name for path in raw_dir.iterdir() if path.is_file())
    old = [name for name in names if _OF_2014.fullmatch(name)]
    refuse_if(old, f'{raw_dir}: {", ".join(old)} is a name of the 2014 form of the data, which is '
              f'not read. {expected}download the 2018 or 2023 files of the category; or take '
              f'"reviews_" off the name, and {HINTS["python_dict"]}.')
    metadata = [match for match in map(_METADATA.fullmatch, names) if match]
    refuse_if(not metadata, f'{raw_dir}: no meta_X.json[.gz] or meta_X.jsonl[.gz]. {expected}put '
              'the metadata into the directory of the reviews.')
    description, category, extension = metadata[0].group(0, 1, 2)
    named = {match[1] for match in (*metadata, *map(_REVIEWS.fullmatch, names)) if match}
    refuse_if(named != {category}, f'{raw_dir}: files of several categories '
              f'({", ".join(sorted(named))}). {expected}give each category a separate folder.')
    cores = ('', '_5') if extension == 'json' else ('',)
    wanted = {f'{category}{core}.{extension}{gz}' for core in cores for gz in ('', '.gz')}
    reviews = [name for name in names if name in wanted]
    refuse_if(not reviews, f'{raw_dir}: no reviews for {description}. {expected}put one of '
              f'{", ".join(sorted(wanted))} there.')
    for several in ([match[0] for match in metadata], reviews):
        refuse_if(len(several) > 1, f'{raw_dir}: {" and ".join(several)} may be the same data. '
                  f'{expected}keep one.')
        stay_inside(raw_dir / several[0], raw_dir)
    return RawFiles(raw_dir / reviews[0], raw_dir / description,
                    '2018' if extension == 'json' else '2023')


def read(raw_dir: str | Path, bad_share: float = 1.0, known: Sequence[str] = (),
         store: Path | None = None) -> Raw:
    """Read a category's reviews, metadata and image names.

    Of several metadata lines with one asin the first usable one counts ('duplicate_item'), and so
    of several reviews of one user for one item at one second ('duplicate_review'). A review of an
    item without metadata is rejected ('item_without_metadata').
    2023's milliseconds are cut to seconds. An item without reviews stays in the catalogue.

    Args:
      raw_dir: the folder.
      bad_share: share of a file's lines that may be damaged, see `untrusted.Lines.check`.
      known: asins of items with the ids 1.. that need no metadata; they are not in the catalogue,
        whose rows have the ids after them.
      store: a file that the catalogue is written to and mapped from; None: it stays in memory.

    Returns:
      Catalogue, interactions and counts.

    Raises:
      InputError: as `find_files`; a file whose content does not fit its name, without a usable
        line, or with more damaged ones than `bad_share`.
    """
    paths, unused, asins = find_files(raw_dir), Counter(), set()
    item_lines, events = Lines(paths.metadata), Lines(paths.reviews)
    with amazon_processes.started(paths[:2]) as processes:
        texts = joined(_read_texts(item_lines, paths.form, unused, asins, bad_share, processes),
                       CATALOGUE, store and store.with_suffix('.unsorted'))
        images = find_images(Path(raw_dir), asins, unused)
        del asins
        before = pl.Series('asin', list(known), pl.String)
        order = texts.select(row=pl.arg_sort_by('asin')).filter(
            ~texts['asin'].sort().is_in(before.implode()))
        catalogue = joined((with_images(texts[rows['row']], images)
                            for rows in order.iter_slices(ROWS)), WITH_IMAGES, store)
        if store:
            del texts
            store.with_suffix('.unsorted').unlink()
        interactions = _interactions(events, paths.form, pl.concat([before, catalogue['asin']]),
                                     bad_share, processes)
    events.rejected['duplicate_review'] = (
        events.number - events.rejected.total() - len(interactions))
    return Raw(catalogue, interactions, counts(item_lines, events, unused), paths.form,
               {'by_day': paths.form == '2018'})


def with_images(items: pl.DataFrame, images: dict[str, Path]) -> pl.DataFrame:
    """Add the column image to a table of CATALOGUE: the path that `find_images` found, or null."""
    paths = [str(images[asin]) if asin in images else None for asin in items['asin'].to_list()]
    return items.with_columns(image=pl.Series(paths, dtype=pl.String))


def joined(tables: Iterable[pl.DataFrame], schema: pl.Schema, store: Path | None) -> pl.DataFrame:
    """Concatenate tables.

    Args:
      tables: of the schema.
      schema: columns and types.
      store: a file to write them to, one by one, and to map; None: they stay in memory.
    """
    if store is None:
        return pl.concat([pl.DataFrame(schema=schema), *tables])
    store.parent.mkdir(parents=True, exist_ok=True)
    oldest = pl.CompatLevel.oldest()  # newer types hold the texts of other rows, too
    with pa.ipc.new_file(str(store), pl.DataFrame(schema=schema).to_arrow(
            compat_level=oldest).schema) as out:
        for table in tables:
            out.write_table(table.to_arrow(compat_level=oldest))
    with store.open('rb') as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    table = pl.from_arrow(pa.ipc.open_file(pa.py_buffer(pages)).read_all())
    pages.madvise(mmap.MADV_DONTNEED)  # all was read to check the encoding
    return table


def read_urls(raw_dir: str | Path, bad_share: float = 1.0,
              stopping: Callable[[], bool] = lambda: False) -> PictureUrls:
    """Read the addresses of pictures in the metadata; no picture is requested.

    Args:
      raw_dir: the folder.
      bad_share: as in `read`.
      stopping: called at every block of lines; True stops.

    Returns:
      Addresses, reviewed items and counts.

    Raises:
      InputError: as `read`, or the pictures have a form that is not known.
      Stopped: `stopping` returned True.
    """
    paths, unused, urls = find_files(raw_dir), Counter(), {}
    item_lines, events = Lines(paths.metadata), Lines(paths.reviews)
    seen, reviewed = set(), set()

    def parsed(lines, parse):
        for block in amazon_blocks.parse_all(partial(parse, form=paths.form), lines.blocks()):
            if stopping():
                raise Stopped(f'line {lines.number + 1} of {lines.path} was being read')
            yield amazon_blocks.counted(lines, block)

    for (asins, addresses), missing in parsed(item_lines, partial(
            amazon_blocks.items, parse=amazon_fields.urls)):
        urls.update((asins[row], addresses[row])
                    for row in _new_rows(item_lines, asins, seen, missing, unused))
    check(item_lines, 'items', paths.form, bad_share)
    unknown, fields = unused['images_of_unknown_form'], FIELDS[paths.form]
    refuse_if(unknown and not any(urls.values()),
              f'{paths.metadata}: `{fields.pictures or fields.urls[0]}` of {unknown} items has an '
              f'unknown form. Expected {"objects with " * bool(fields.pictures)}'
              f'{" or ".join(fields.urls)}. Fix: write the addresses so.')
    for table in parsed(events, amazon_blocks.events):
        known = [asin for asin in table['asin'] if asin in urls]
        events.rejected['item_without_metadata'] += len(table) - len(known)
        reviewed.update(known)
    check(events, 'events', paths.form, bad_share)
    return PictureUrls(urls, reviewed, counts(item_lines, events, unused))


def image_folder(raw_dir: Path) -> Path:
    """Name the folder of pictures, which need not exist.

    Args:
      raw_dir: the folder that may hold it.

    Returns:
      `raw_dir / 'images'`.

    Raises:
      InputError: it leads out of `raw_dir` or is not a folder.
    """
    folder = raw_dir / 'images'
    stay_inside(folder, raw_dir)
    refuse_if(folder.exists() and not folder.is_dir(),
              f'{folder}: not a directory. Expected one with pictures. Fix: move the file away.')
    return folder


def find_images(raw_dir: Path, items, unused: Counter) -> dict[str, Path]:
    """Find the picture of every item; the case of its ending does not matter.

    Args:
      raw_dir: the folder that may hold `images/`.
      items: asins, for `in`.
      unused: increased by the reasons why other files are not used.

    Returns:
      {asin: path}; of several pictures the one whose ending comes first in `images.ENDINGS`.

    Raises:
      InputError: as `image_folder`.
    """
    folder, usable = image_folder(raw_dir), {}
    for asin, paths in images_lib.by_stem(folder).items():
        for path in paths:
            why = (images_lib.unusable(path, raw_dir)
                   or (asin not in items and images_lib.WITHOUT_ITEM)
                   or (asin in usable and images_lib.REPEATED))
            if why:
                unused[why] += 1
            else:
                usable[asin] = path
    unused['image_of_unknown_ending'] += sum(
        path.stem in items and path.suffix.lower() not in (*images_lib.ENDINGS, PARTIAL)
        for path in folder.glob('*'))
    return usable


def _read(lines: Lines, kind: str, form: str, bad_share: float, processes: Processes | None
          ) -> Iterator:
    """Yield what `amazon_blocks.parse` makes of a file, by processes if there are any."""
    parse, work, threads = ((processes.parse, processes.work(kind, lines), processes.count)
                            if processes else (amazon_blocks.parse, lines.blocks(), THREADS))
    for parsed in amazon_blocks.parse_all(partial(parse, kind=kind, form=form), work, threads):
        yield amazon_blocks.counted(lines, parsed)
    check(lines, kind, form, bad_share)


def _read_texts(lines: Lines, form: str, unused: Counter, asins: set[str], bad_share: float,
                processes: Processes | None) -> Iterator[pl.DataFrame]:
    """Yield tables of items whose asin is not in `asins`, which they are added to."""
    for table, missing in _read(lines, 'items', form, bad_share, processes):
        rows = _new_rows(lines, table['asin'].to_list(), asins, missing, unused)
        yield table if len(rows) == len(table) else table[rows]


def _new_rows(lines: Lines, names: list[str], asins: set[str], missing: list[tuple[int, str]],
              unused: Counter) -> Sequence[int]:
    """The rows whose name is not in `asins`, which they are added to, and count what they lack."""
    if asins.isdisjoint(names) and len({*names}) == len(names):  # most blocks
        rows = range(len(names))
        asins.update(names)
    else:
        rows = [row for row, name in enumerate(names) if not (name in asins or asins.add(name))]
    lines.rejected.update(['duplicate_item'] * (len(names) - len(rows)))
    if missing:
        new = set(rows)
        unused.update(what for row, what in missing if row in new)
    return rows


def check(lines: Lines, kind: str, form: str, bad_share: float) -> None:
    """Refuse a file, read to its end, as `untrusted.Lines.check` does.

    Args:
      lines: of the file.
      kind: 'items' or 'events'.
      form: '2018' or '2023'.
      bad_share: as in `read`.

    Raises:
      InputError: it has too few usable lines.
    """
    lines.check(bad_share, fields=NEEDED[kind].format(**vars(FIELDS[form])), hints=HINTS)


def _interactions(lines: Lines, form: str, asins: pl.Series, bad_share: float,
                  processes: Processes | None) -> pl.DataFrame:
    """Events as a sorted table, none of them twice, of the items with these asins."""
    # a category is a text's number in the order of first occurrence: of an item its id less 1.
    # polars forgets the texts once no column of the type is left, therefore `_held`.
    item, user = (pl.Categorical(pl.Categories.random()) for _ in range(2))
    _held, tables = (asins.cast(item), pl.Series(dtype=user)), []
    for table in _read(lines, 'events', form, bad_share, processes):
        known = table.with_columns(pl.col('asin').cast(item).to_physical().cast(pl.Int32) + 1
                                   ).filter(pl.col('asin') <= len(asins))
        lines.rejected['item_without_metadata'] += len(table) - len(known)
        tables.append(known.select(pl.col('user').cast(user).to_physical(), item='asin',
                                   time='time'))
    if processes:
        processes.end()  # sorting needs their memory
    # users are numbered by their sorted names, so that no number depends on the order of lines
    table, name = pl.concat(tables), pl.col('name').cast(pl.String)
    codes = pl.Series('name', np.arange(1 + table['user'].max(), dtype=np.uint32))
    names = pl.DataFrame(codes.cat.to(user)).select(amazon_blocks.genuine(name))
    ranks = pl.Series(np.argsort(names.to_series().arg_sort().to_numpy()))
    table = table.with_columns(user=ranks.gather(table['user'])).sort('user', 'time', 'item')
    return table.filter(pl.any_horizontal(pl.all() != pl.all().shift()).fill_null(True))


def counts(items: Lines, events: Lines, unused: Counter) -> dict:
    """Sum up the lines of two files, as `Raw.lines` has them.

    Args:
      items: read to its end.
      events: read to its end.
      unused: {what: count} of parts of kept lines.
    """
    total, rejected = items.number + events.number, items.rejected + events.rejected
    return {'read': total, 'kept': total - rejected.total(),
            'rejected': dict(sorted(rejected.items())),
            'unused': {what: count for what, count in sorted(unused.items()) if count}}
