"""The fields of a raw Amazon line -> values, or the reason why the line cannot be used.

2018 and 2023 differ in the names of their fields. Numbers where a text is expected are read as
their digits. Values that cannot be read in a line that is kept are counted as unused.
"""

import re
from collections import Counter
from functools import lru_cache
from itertools import chain, islice, zip_longest
from types import SimpleNamespace as Fields

from tpad_jax.data.cleaning import clean, clean_all
from tpad_jax.data.untrusted import Reason

MAX_PRICE = 1e7  # dollars
EARLIEST, LATEST = 788_918_400, 4_102_444_800  # seconds: 1995 (Amazon's first year) to 2100
UNITS = {'seconds': 1, 'milliseconds': 10**3, 'microseconds': 10**6, 'nanoseconds': 10**9}
CATEGORY_LEVELS = 4  # of the path; 2018 files list sales arguments after them
CATEGORY_LENGTH = 60  # characters; longer "levels" are sales arguments too
PRICE_LENGTH = 60  # characters; longer "prices" are pages
USER_LENGTH = 256  # characters; genuine ones have some 28
URLS, URL_LENGTH = 3, 2000  # addresses kept of an item's pictures, characters of an address
ABSENT = (None, '', 'None')  # `datasets.to_json` writes 'None' where there is no value

ASIN = re.compile(r'[A-Za-z0-9_-]{1,32}')
# thousands in groups of three, then decimals; or at most two decimals after a comma
_GAP = r"[ '\u2019\u00a0\u202f]"  # between thousands, as in 1 250,00 and 1'250.00
_NUMBER = (rf'(?:\d{{1,3}}(?:{_GAP}\d{{3}})+(?:[.,]\d{{1,2}})?|\d{{1,3}}(?:,\d{{3}})+(?:\.\d+)?'
           r'|\d{1,3}(?:\.\d{3})+,\d{1,2}|\d+,\d{1,2}|\d+\.?\d*|\.\d+)')
_SIGN = r'\s*(?:us\s?\$|[$€£¥₹]|eur|usd|gbp)?\s*'
_PRICE = re.compile(rf'(?:from\s)?{_SIGN}({_NUMBER}){_SIGN}(?:[-\u2013\u2014]{_SIGN}({_NUMBER})'
                    rf'{_SIGN})?(?:\([^()]*\))?', re.IGNORECASE)
_BYLINE = re.compile(r'\Aby\s*\n')  # "by\n    Microsoft", scraped with its label


# Names of a form's fields. units: of `time` in a second. main_category: the fallback where the path
# of categories is empty; features: where `description` is. pictures: the list whose members hold
# the addresses `urls`, the preferred one first; '': the line itself does. 2018's imageURL is a
# thumbnail of 40 pixels; 2023's large has some 500, more than any tower reads, and hi_res several
# times that. imUrl is the address of lines that were converted from the form of 2014.
FIELDS = {
    '2018': Fields(asin='asin', user='reviewerID', time='unixReviewTime', units=1, brand='brand',
                   category='category', main_category='main_cat', features='feature', pictures='',
                   urls=('imageURLHighRes', 'imageURL', 'imUrl')),
    '2023': Fields(asin='parent_asin', user='user_id', time='timestamp', units=1000, brand='store',
                   category='categories', main_category='main_category', features='features',
                   pictures='images', urls=('large', 'hi_res', 'thumb')),
}


def item_id(record: dict, fields: Fields) -> str | Reason:
    """Read an item's asin, which becomes part of a path.

    Args:
      record: a line of either file.
      fields: names of the form.

    Returns:
      The asin, or the reason why it is unusable.
    """
    asin = record.get(fields.asin)
    if asin is None:
        return Reason(f'missing_{fields.asin}')
    return asin if isinstance(asin, str) and ASIN.fullmatch(asin) else Reason('bad_asin')


def event(record: dict, fields: Fields) -> tuple[str, str, int] | Reason:
    """Read who reviewed what and when.

    Args:
      record: a line of the reviews.
      fields: names of the form.

    Returns:
      User, asin and seconds since 1970, or the reason why the line is unusable.
    """
    asin, user, time = item_id(record, fields), record.get(fields.user), record.get(fields.time)
    if isinstance(asin, Reason):
        return asin
    if user is None or time is None:
        return Reason(f'missing_{fields.user if user is None else fields.time}')
    if not isinstance(user, str) or not 0 < len(user) <= USER_LENGTH:
        return Reason('bad_user')
    if isinstance(time, bool) or not isinstance(time, int | float):
        return Reason('bad_time')
    if not EARLIEST <= time // fields.units < LATEST:
        units = [f'time_in_{unit}' for unit, per_second in UNITS.items()
                 if EARLIEST <= time // per_second < LATEST]
        return Reason((*units, 'bad_time')[0])
    return user, asin, int(time // fields.units)


def describe(records: list[dict], fields: Fields) -> tuple[list[list], list[tuple[int, str]]]:
    """Read the words and prices of metadata lines.

    Args:
      records: lines of the metadata.
      fields: names of the form.

    Returns:
      Titles, brands, categories, descriptions (str, '' if none) and prices (dollars, None if none);
      and (row, field) of every value that cannot be used.
    """
    raw_titles, raw_brands, raw_prices, categories, category, main_category, descriptions = (
        [record.get(name) for record in records] for name in (
            'title', fields.brand, 'price', 'categories', fields.category, fields.main_category,
            'description'))
    raw_brands = [_BYLINE.sub('', brand.lstrip()) if isinstance(brand, str) else brand
                  for brand in raw_brands]
    titles = _words(raw_titles)
    brands = ['' if brand in ABSENT else _name(brand) for brand in raw_brands]
    # most prices are numbers that need no further look
    prices = [price if type(price) is float and 0 <= price < MAX_PRICE else amount(price)
              for price in raw_prices]
    unused = [(row, f'{name}_page_code' if isinstance(raw, str) else name)
              for name, raws, values in (('title', raw_titles, titles),
                                         ('brand', raw_brands, brands)) if '' in values
              for row, (raw, value) in enumerate(zip(raws, values, strict=True))
              if raw and not value and raw not in ABSENT]
    if None in prices:
        unused += [(row, 'price') for row, price in enumerate(prices)
                   if price is None and raw_prices[row] not in ABSENT]
    # 2014's path is called as 2023's
    categories = [_category(own or other) or _name(main) for own, other, main in zip(
        category, categories, main_category, strict=True)]
    # many 2023 items have an empty description and put everything into their list of features
    descriptions = _words(descriptions)
    if '' in descriptions:
        empty = [row for row, description in enumerate(descriptions) if not description]
        for row, words in zip(empty, _words([records[row].get(fields.features) for row in empty]),
                              strict=True):
            descriptions[row] = words
    return [titles, brands, categories, descriptions, prices], unused


def urls(records: list[dict], fields: Fields) -> tuple[list[list], list[tuple[int, str]]]:
    """Read the addresses of items' pictures.

    Args:
      records: lines of the metadata.
      fields: names of the form.

    Returns:
      One column: at most URLS different addresses of each item, those of the main picture first;
      and (row, reason) where an address is too long or the pictures have an unknown form.
    """
    unused = [Counter() for _ in records]
    addresses = [_urls(record, fields, counted)
                 for record, counted in zip(records, unused, strict=True)]
    return [addresses], [(row, why) for row, counted in enumerate(unused)
                         for why in counted.elements()]


def _urls(record: dict, fields: Fields, unused: Counter) -> tuple[str, ...]:
    pictures = record.get(fields.pictures) if fields.pictures else [record]
    if isinstance(pictures, dict):  # `datasets.to_json` writes a dict of lists
        columns = [value if isinstance(value, list) else [value] for value in pictures.values()]
        pictures = [dict(zip(pictures, row, strict=True)) for row in zip_longest(*columns)]
    entries = pictures if isinstance(pictures, list) else []
    entries = [entry for entry in entries if isinstance(entry, dict)]
    entries.sort(key=lambda entry: entry.get('variant') != 'MAIN')
    values = [value for entry in entries for name in fields.urls if name in entry
              for value in _strings(entry[name])]
    addresses = [url for url in values if isinstance(url, str) and url not in ABSENT]
    # under other names, or not texts
    other = any(value not in ABSENT for value in values) or (fields.pictures and not values)
    unused['images_of_unknown_form'] += bool(pictures and other and not addresses)
    unused['url_too_long'] += sum(len(url) > URL_LENGTH for url in addresses)
    usable = [url for url in dict.fromkeys(addresses) if len(url) <= URL_LENGTH]
    return tuple(usable[:URLS])


def _strings(value: object) -> list:
    """The values in a field that holds one, a list of them, or lists of them."""
    parts = value if isinstance(value, list) else [value]
    return [leaf for part in parts for leaf in (part if isinstance(part, list) else [part])]


def _texts(value: object) -> list[str]:
    """The texts in a field; a number is its digits."""
    if isinstance(value, str):
        return [value]
    return [str(leaf) for leaf in _strings(value) if isinstance(leaf, str) or _is_number(leaf)]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e15  # which neither nan nor infinity is


def _words(values: list) -> list[str]:
    """Plain text of a field of every record."""
    # most are a text, or a list of one
    texts = [value if isinstance(value, str) else value[0] if isinstance(value, list)
             and len(value) == 1 and isinstance(value[0], str) else None for value in values]
    if None not in texts:
        return clean_all(texts)
    others = {row: _texts(values[row]) for row, text in enumerate(texts) if text is None}
    cleaned = clean_all([text or '' for text in texts])
    parts = iter(clean_all([*chain.from_iterable(others.values())]))
    for row, several in others.items():
        cleaned[row] = ' '.join(filter(None, islice(parts, len(several))))
    return cleaned


def _name(value: object) -> str:
    """Plain text of a field that other items share."""
    return _common(value) if isinstance(value, str) and len(value) <= CATEGORY_LENGTH else (
        _words([value])[0])


def _category(value: object) -> str:
    """The category path "a > b > c", up to the first level that cannot be a category's name."""
    levels = tuple(value[:CATEGORY_LEVELS]) if isinstance(value, list) else ()
    if {*map(type, levels)} != {str}:
        levels = tuple(_texts(value)[:CATEGORY_LEVELS])
    return (_path if sum(map(len, levels)) <= CATEGORY_LEVELS * CATEGORY_LENGTH
            else _path.__wrapped__)(levels)


_common = lru_cache(2**14)(clean)  # many items have equal brands and categories


@lru_cache(2**14)
def _path(levels: tuple[str, ...]) -> str:
    path = []
    for text in levels:
        level = _name(text)
        if not level or len(level) > CATEGORY_LENGTH or level[-1] in '.!':
            break
        if level not in path:
            path.append(level)
    return ' > '.join(path)


def amount(value: object) -> float | None:
    """Read a price; of a range "$5.00 - $9.00" the lower end.

    Args:
      value: of a field.

    Returns:
      The number in the file's currency, None if there is none.
    """
    if isinstance(value, str):
        match = len(value) <= PRICE_LENGTH and _PRICE.fullmatch(value.strip())
        value = min(map(_dollars, filter(None, match.groups()))) if match else None
    return float(value) if _is_number(value) and 0 <= value < MAX_PRICE else None


def _dollars(number: str) -> float:
    """'1,250.00', '1.250,00', '12,99' and '.99' as floats."""
    number = re.sub(_GAP, '', number)
    if re.search(r',\d{1,2}$', number):  # the comma is the decimal point
        number = number.replace('.', '').replace(',', '.')
    return float(number.replace(',', ''))
