"""Raw Amazon files (UCSD 2018 and 2023, one JSON object per line) -> catalogue and interactions.

A folder holds one category: reviews, metadata and, optionally, `images/<asin>.jpg` or `.png`, which
data/download/ gets from the addresses that the metadata hold.
2018: `X_5.json[.gz]` or `X.json[.gz]`, and `meta_X.json[.gz]`. 2023: `X.jsonl[.gz]` and
`meta_X.jsonl[.gz]`. The files are read line by line; every line is kept or counted as rejected.
Sources: Ni, Li and McAuley, EMNLP 2019 (2018 form); Hou et al., arXiv 2403.03952 (2023 form).
"""

import re
from array import array
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl

from tpad_jax.data import images as images_lib
from tpad_jax.data.text import clean
from tpad_jax.data.untrusted import Lines, Reason, reasons, stay_inside
from tpad_jax.errors import InputError, Stopped

MAX_PRICE = 1e7  # dollars
EARLIEST, LATEST = 788_918_400, 4_102_444_800  # seconds: 1995 (Amazon's first year) to 2100
CATEGORY_LEVELS = 4  # of the path; what 2018 files list beyond are sales arguments
CATEGORY_LENGTH = 60  # characters; longer "levels" are sales arguments too
PRICE_LENGTH = 60  # characters; longer "prices" are pages
USER_LENGTH = 256  # characters; genuine ones have some 28
URLS, URL_LENGTH = 3, 2000  # of an item's pictures, how many are kept; characters

_ASIN = re.compile(r'[A-Za-z0-9_-]{1,32}')
_METADATA = re.compile(r'meta_(.+)\.(jsonl?)(\.gz)?')
_REVIEWS = re.compile(r'(?!meta_)(.+?)(?:_5\.json|\.jsonl)(\.gz)?')
_PRICE = re.compile(r'(?:from\s)?\s*\$?\s*(\d[\d,]*(?:\.\d+)?)(?:\s*-\s*\$?\s*\d[\d,.]*)?',
                    re.IGNORECASE)
# a rule of a style sheet ends in sight, or the time would be quadratic in the text's length
_PAGE_CODE = re.compile(r'getTime\(|function\s*\(|\bvar\s+\w+\s*=|[.#][\w-]+\s*\{[^}]{0,99}:')
_BYLINE = re.compile(r'by\s*\n')  # "by\n    Microsoft", scraped with its label


class _Fields(NamedTuple):
    """How a form calls its fields."""

    asin: str
    user: str
    time: str
    units: int  # of time in a second
    brand: str
    category: str
    main_category: str
    features: str
    pictures: str  # the list whose members hold addresses of pictures; '' if the line itself does
    urls: tuple[str, ...]  # of these, the one to take first


# 2018's imageURL is a thumbnail of 40 pixels; 2023's large has some 500, more than any tower reads,
# and hi_res several times that
_FIELDS = {
    '2018': _Fields('asin', 'reviewerID', 'unixReviewTime', 1, 'brand', 'category', 'main_cat',
                    'feature', '', ('imageURLHighRes', 'imageURL')),
    '2023': _Fields('parent_asin', 'user_id', 'timestamp', 1000, 'store', 'categories',
                    'main_category', 'features', 'images', ('large', 'hi_res', 'thumb')),
}


class Found(NamedTuple):
    """The raw files of a folder."""

    reviews: Path
    metadata: Path
    form: str  # '2018' or '2023'


class Raw(NamedTuple):
    """What the raw files hold.

    catalogue: V rows sorted by asin (row k is item id k + 1): asin, title, brand, category,
      description (str, '' if none), price (f32 dollars, null if none), image (path or null).
    interactions: user (int64, anonymous number), item (int32 id), time (int64 seconds), sorted.
    lines: over all lines of both files, 'read' = 'kept' + sum of 'rejected' {reason: count}; and
      'unused' {what: count}, parts of kept lines (and images) that could not be used.
    form: '2018' or '2023'. files: reviews, metadata, and every image in use.
    """

    catalogue: pl.DataFrame
    interactions: pl.DataFrame
    lines: dict
    form: str
    files: tuple[Path, ...]


class Pictures(NamedTuple):
    """Where the items' pictures are said to be.

    urls: {asin: at most URLS addresses as they are written, the one to take first}, of every item.
    reviewed: the asins that a usable review names. lines: as of `Raw`; a review that is there
      twice is kept twice.
    """

    urls: dict[str, tuple[str, ...]]
    reviewed: set[str]
    lines: dict


def find(raw_dir: str | Path) -> Found:
    """Finds the one category's files in `raw_dir`.

    Raises:
      InputError: no such folder, no metadata or no reviews, or more than one candidate.
    """
    raw_dir = Path(raw_dir)
    if not raw_dir.is_dir():
        raise InputError(f'{raw_dir}: no such directory; give the folder that holds X_5.json.gz '
                         'and meta_X.json.gz (2018) or X.jsonl.gz and meta_X.jsonl.gz (2023)')
    names = sorted(path.name for path in raw_dir.iterdir() if path.is_file())
    metadata = [match for match in map(_METADATA.fullmatch, names) if match]
    if not metadata:
        raise InputError(f'{raw_dir}: no meta_X.json[.gz] (2018) or meta_X.jsonl[.gz] (2023) file; '
                         'put the metadata of the category there, beside its reviews')
    category, extension = metadata[0][1], metadata[0][2]
    others = {match[1] for match in map(_REVIEWS.fullmatch, names) if match} - {category}
    others |= {match[1] for match in metadata} - {category}
    if others:
        raise InputError(f'{raw_dir}: files of several categories ({category}, '
                         f'{", ".join(sorted(others))}); give each category a folder of its own')
    cores = ('', '_5') if extension == 'json' else ('',)
    wanted = {f'{category}{core}.{extension}{gz}' for core in cores for gz in ('', '.gz')}
    reviews = [name for name in names if name in wanted]
    for several in ([match[0] for match in metadata], reviews):
        if len(several) > 1:
            raise InputError(f'{raw_dir}: {" and ".join(several)} may be the same data; keep one')
    if not reviews:
        raise InputError(f'{raw_dir}: no reviews for {metadata[0][0]}; put one of '
                         f'{", ".join(sorted(wanted))} there')
    for name in (metadata[0][0], reviews[0]):
        stay_inside(raw_dir / name, raw_dir)
    return Found(raw_dir / reviews[0], raw_dir / metadata[0][0],
                 '2018' if extension == 'json' else '2023')


def read(raw_dir: str | Path, bad_share: float = 1.0) -> Raw:
    """Reads a category's reviews, metadata and image names.

    Of several metadata lines with one asin the first usable counts ('duplicate_item'); so of
    several reviews of one user for one item at one second ('duplicate_review'). A review of an
    item the metadata do not have is rejected ('item_without_metadata').
    2023's milliseconds are cut to seconds. An item without reviews stays in the catalogue.

    Args:
      raw_dir: the folder.
      bad_share: of a file's lines that may be damaged, see `files.Lines.check`.

    Raises:
      InputError: as `find`; a file that is not what its name says, without a usable line, or with
        more damaged ones than `bad_share`.
    """
    found = find(raw_dir)
    unused = Counter()
    items, item_lines = _read_items(found.metadata, _FIELDS[found.form], unused, bad_share)
    images = _images(Path(raw_dir), unused)
    unused['image_without_item'] = len(images.keys() - items.keys())
    asins = sorted(items)
    catalogue = pl.DataFrame(
        [(asin, *items[asin], str(images[asin]) if asin in images else None) for asin in asins],
        schema={'asin': pl.String, 'title': pl.String, 'brand': pl.String, 'category': pl.String,
                'description': pl.String, 'price': pl.Float32, 'image': pl.String}, orient='row')
    ids = {asin: number for number, asin in enumerate(asins, start=1)}
    interactions, review_lines = _read_reviews(found.reviews, _FIELDS[found.form], ids,
                                               bad_share)
    lines = {'read': item_lines.total() + review_lines.total(),
             'kept': item_lines.pop('kept') + review_lines.pop('kept'),
             'rejected': dict(sorted((item_lines + review_lines).items())),
             'unused': {what: count for what, count in sorted(unused.items()) if count}}
    files = (found.reviews, found.metadata, *(images[asin] for asin in asins if asin in images))
    return Raw(catalogue, interactions, lines, found.form, files)


def pictures(raw_dir: str | Path, bad_share: float = 1.0,
             stopping: Callable[[], bool] = lambda: False) -> Pictures:
    """Reads the addresses of pictures that the metadata hold; no picture is asked for.

    Args:
      raw_dir, bad_share: as in `read`.
      stopping: asked at every line whether to leave off.

    Raises:
      InputError: as `read`. Stopped: `stopping` answered True.
    """
    found = find(raw_dir)
    fields, unused, urls, reviewed = _FIELDS[found.form], Counter(), {}, set()
    items, reviews = Lines(found.metadata), Lines(found.reviews)
    for lines in (items, reviews):
        for record in lines:
            if stopping():
                raise Stopped(f'line {lines.number} of {lines.path} was being read')
            asin = _asin(record, fields) if lines is items else _event(record, fields, urls)
            if isinstance(asin, Reason):
                lines.reject(asin)
            elif lines is reviews:
                reviewed.add(record[fields.asin])
            elif asin in urls:
                lines.reject('duplicate_item')
            else:
                urls[asin] = _urls(record, fields, unused)
        if lines.number == lines.rejected.total():
            raise _nothing_usable(lines, fields.asin)
        lines.check(bad_share)
    read, rejected = items.number + reviews.number, items.rejected + reviews.rejected
    return Pictures(urls, reviewed, {
        'read': read, 'kept': read - rejected.total(), 'rejected': dict(sorted(rejected.items())),
        'unused': {what: count for what, count in sorted(unused.items()) if count}})


def _urls(record: dict, fields: _Fields, unused: Counter) -> tuple[str, ...]:
    """The addresses of a metadata line's pictures, the main picture's first, none twice."""
    images = record.get(fields.pictures) if fields.pictures else [record]
    images = [one for one in images if isinstance(one, dict)] if isinstance(images, list) else []
    images.sort(key=lambda one: one.get('variant') != 'MAIN')  # where it says which is
    found = [url for one in images for name in fields.urls for url in _strings(one.get(name))]
    usable = [url for url in dict.fromkeys(found) if 0 < len(url) <= URL_LENGTH]
    unused['url_too_long'] += sum(len(url) > URL_LENGTH for url in found)
    return tuple(usable[:URLS])


def _read_items(path: Path, fields: _Fields, unused: Counter, bad_share) -> tuple[dict, Counter]:
    """-> {asin: (title, brand, category, description, price)}, lines by outcome."""
    items, lines = {}, Lines(path)
    for record in lines:
        asin = _asin(record, fields)
        if isinstance(asin, Reason):
            lines.reject(asin)
        elif asin in items:
            lines.reject('duplicate_item')
        else:
            items[asin] = _describe(record, fields, unused)
    if not items:
        raise _nothing_usable(lines, fields.asin)
    lines.check(bad_share)
    return items, lines.rejected + Counter(kept=len(items))


def _read_reviews(path: Path, fields: _Fields, ids: dict[str, int], bad_share
                  ) -> tuple[pl.DataFrame, Counter]:
    """-> interactions, lines by outcome."""
    users, lines = {}, Lines(path)
    user, item, time = array('q'), array('i'), array('q')
    for record in lines:
        event = _event(record, fields, ids)
        if isinstance(event, Reason):
            lines.reject(event)
        else:
            user.append(users.setdefault(event[0], len(users)))
            item.append(event[1])
            time.append(event[2])
    if not user:
        raise _nothing_usable(lines, f'{fields.asin}, {fields.user} and {fields.time}')
    lines.check(bad_share)
    # users are numbered by their sorted names, so that no number depends on the order of lines
    number = np.empty(len(users), np.int64)
    number[[users[name] for name in sorted(users)]] = np.arange(len(users))
    events = pl.DataFrame({'user': number[np.frombuffer(user, np.int64)],
                           'item': np.frombuffer(item, np.int32),
                           'time': np.frombuffer(time, np.int64)})
    interactions = events.unique().sort('user', 'time', 'item')
    return interactions, lines.rejected + Counter(
        kept=len(interactions), duplicate_review=len(events) - len(interactions))


def _asin(record: dict, fields: _Fields) -> str:
    """The item's asin, or the reason it is unusable; an asin becomes part of a path."""
    asin = record.get(fields.asin)
    if asin is None:
        return Reason(f'missing_{fields.asin}')
    return asin if isinstance(asin, str) and _ASIN.fullmatch(asin) else Reason('bad_asin')


def _event(record: dict, fields: _Fields, ids: dict[str, int]) -> tuple[str, int, int] | Reason:
    """-> (user, item id, seconds), or why not."""
    asin, user, time = _asin(record, fields), record.get(fields.user), record.get(fields.time)
    if isinstance(asin, Reason):
        return asin
    if user is None or time is None:
        return Reason(f'missing_{fields.user if user is None else fields.time}')
    if not isinstance(user, str) or not 0 < len(user) <= USER_LENGTH:
        return Reason('bad_user')
    if isinstance(time, bool) or not isinstance(time, int | float):
        return Reason('bad_time')
    if not EARLIEST <= time // fields.units < LATEST:
        return Reason('bad_time')
    if asin not in ids:
        return Reason('item_without_metadata')
    return user, ids[asin], int(time // fields.units)


def _describe(record: dict, fields: _Fields, unused: Counter) -> tuple:
    """-> (title, brand, category, description, price) of a metadata line."""
    title = _words(record.get('title'))
    unused['title'] += bool(record.get('title')) and not title
    brand = record.get(fields.brand)
    if isinstance(brand, str) and (label := _BYLINE.match(brand := brand.lstrip())):
        brand = brand[label.end():]
    brand = _words(brand)
    category = _category(record.get(fields.category)) or _words(record.get(fields.main_category))
    # many 2023 items have an empty description and say everything in their list of features
    description = _words(record.get('description')) or _words(record.get(fields.features))
    price = _price(record.get('price'))
    unused['price'] += record.get('price') not in (None, '') and price is None
    return title, brand, category, description, price


def _strings(value: object) -> list[str]:
    """The texts in a field that holds a text, a list of texts, or lists of them."""
    parts = value if isinstance(value, list) else [value]
    parts = [text for part in parts for text in (part if isinstance(part, list) else [part])]
    return [text for text in parts if isinstance(text, str)]


def _words(value: object) -> str:
    """Plain text of a field, without the parts that are a web page's program or style sheet."""
    parts = (clean(text) for text in _strings(value) if not _PAGE_CODE.search(text))
    return ' '.join(part for part in parts if part)


def _category(value: object) -> str:
    """The category path "a > b > c", up to the first level that is no name of a category."""
    path = []
    for text in _strings(value)[:CATEGORY_LEVELS]:
        level = clean(text)
        if not level or len(level) > CATEGORY_LENGTH or level[-1] in '.!':
            break
        if level not in path:
            path.append(level)
    return ' > '.join(path)


def _price(value: object) -> float | None:
    """Dollars; of a range "$5.00 - $9.00" the lower end; None if there is no price."""
    if isinstance(value, str):
        match = len(value) <= PRICE_LENGTH and _PRICE.fullmatch(value.strip())
        value = float(match[1].replace(',', '')) if match else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value < MAX_PRICE else None


def _images(raw_dir: Path, unused: Counter) -> dict[str, Path]:
    """-> {asin: image file}; of a JPEG and a PNG the JPEG."""
    folder = raw_dir / 'images'
    stay_inside(folder, raw_dir)
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f'{folder} is no folder; put the pictures into one of this name')
        return {}
    images = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in ('.jpg', '.png') or not _ASIN.fullmatch(path.stem):
            continue
        why = images_lib.unusable(path, raw_dir)
        if why:
            unused[why] += 1
        else:
            images.setdefault(path.stem, path)
    return images


def _nothing_usable(lines: Lines, fields: str) -> InputError:
    return InputError(f'{lines.path}: none of its {lines.number} lines is usable '
                      f'({reasons(lines.rejected)}); every line must be a JSON object in UTF-8 '
                      f'with {fields}')
