"""Blocks of raw Amazon lines -> tables, or the reasons why lines cannot be used.

A fast parser, msgspec, reads chunks of lines that it and Python's json read alike. A chunk with any
other line is halved until that line is alone, which `untrusted.record_of` then reads.
"""

import gc
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from operator import attrgetter, itemgetter
from typing import Annotated, Any, NamedTuple, Required, TypedDict

import msgspec
import numpy as np
import polars as pl

from tpad_jax.data.sources import amazon_fields
from tpad_jax.data.sources.amazon_fields import FIELDS
from tpad_jax.data.untrusted import Lines, Reason, record_of

THREADS = 2  # that parse; msgspec holds the interpreter's lock, polars and unpacking do not
CHUNK = 64  # lines that are parsed at once
# msgspec skips the fields that are not needed, and sees neither of these there. Python's json
# refuses integers of more than 4300 digits and, by the depth of calls, some 900 nested brackets.
NESTED, DIGITS = 700, 4300
LONGEST = 4 * amazon_fields.USER_LENGTH  # bytes of a user in UTF-8
_SURROGATE = re.compile('[\ud800-\udfff]')
EVENTS = pl.Schema({'user': pl.String, 'asin': pl.String, 'time': pl.Int64})
CATALOGUE = pl.Schema({'asin': pl.String, 'title': pl.String, 'brand': pl.String,
                       'category': pl.String, 'description': pl.String, 'price': pl.Float32})
_ASINS = re.compile('[A-Za-z0-9_-]*')


class Parsed(NamedTuple):
    """The lines of a block.

    Attributes:
      number: how many there are.
      values: what became of the usable ones, in their order.
      rejected: (position, reason) of the others.
    """

    number: int
    values: Any
    rejected: list[tuple[int, Reason]]


def parse_all(parse: Callable[[Any], Parsed], blocks: Iterable, threads: int = THREADS
              ) -> Iterator[Parsed]:
    """Parse blocks in threads, in their order.

    Args:
      parse: such as `events`.
      blocks: of `untrusted.Lines.blocks`, or what else `parse` takes.
      threads: how many.

    Yields:
      What became of each block.
    """
    waiting, collects = deque(), gc.isenabled()
    gc.disable()  # it would look at the records of a block again and again, which have no circles
    try:
        with ThreadPoolExecutor(threads) as pool:
            for block in blocks:
                waiting.append(pool.submit(parse, block))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            yield from (parsed.result() for parsed in waiting)
    finally:
        if collects:
            gc.enable()


def events(block: bytes | Reason, form: str) -> Parsed:
    """Read users, asins and times (seconds) of lines of reviews.

    Args:
      block: whole lines, or the reason why a line could not be read.
      form: '2018' or '2023'.
    """
    fields, decoder = FIELDS[form], _event_decoder(form)

    def careful(record):
        event = amazon_fields.event(record, fields)
        return event if isinstance(event, Reason) else decoder.type(
            _storable(event[0]), event[1], event[2] * fields.units)

    parsed = _parse(block, decoder, attrgetter('asin'), careful)
    columns = [list(map(attrgetter(name), parsed.values)) for name in EVENTS]
    return parsed._replace(values=pl.DataFrame(columns, EVENTS).with_columns(
        pl.col('time') // fields.units))


def items(block: bytes | Reason, form: str, parse: Callable) -> Parsed:
    """Read the asins of lines of metadata, and what `parse` makes of the lines.

    Args:
      block: whole lines, or the reason why a line could not be read.
      form: '2018' or '2023'.
      parse: `amazon_fields.describe` or `amazon_fields.urls`.

    Returns:
      Values are the columns, asins first, and (row, part that cannot be used).
    """
    fields = FIELDS[form]

    def careful(record):
        asin = amazon_fields.item_id(record, fields)
        return asin if isinstance(asin, Reason) else record

    parsed = _parse(block, _item_decoder(form, parse), itemgetter(fields.asin), careful)
    columns, unused = parse(parsed.values, fields)
    asins = [record[fields.asin] for record in parsed.values]
    return parsed._replace(values=([asins, *columns], unused))


def described(block: bytes | Reason, form: str) -> Parsed:
    """Read lines of metadata; values are a table of CATALOGUE, and (row, unused field).

    Args:
      block: whole lines, or the reason why a line could not be read.
      form: '2018' or '2023'.
    """
    parsed = items(block, form, amazon_fields.describe)
    columns, unused = parsed.values
    return parsed._replace(values=(pl.DataFrame(columns, CATALOGUE), unused))


def parse(block: bytes | Reason, kind: str, form: str) -> Parsed:
    """Read lines of a kind of file: 'events' by `events`, 'items' by `described`."""
    return (events if kind == 'events' else described)(block, form)


def counted(lines: Lines, parsed: Parsed) -> Any:
    """Count the lines of a block, reject some of them, and return what became of the others.

    Args:
      lines: of the file.
      parsed: the next block of it.
    """
    begin = lines.number
    for position, reason in parsed.rejected:
        lines.number = begin + position + 1
        lines.reject(reason)
    lines.number = begin + parsed.number
    return parsed.values


def _parse(block: bytes | Reason, decoder, asin: Callable, careful: Callable) -> Parsed:
    """The records of a block by `decoder`, and by `careful` (record -> record or Reason)."""
    if isinstance(block, Reason) or not block:
        return Parsed(len(block) and 1, [], [(0, block)][:len(block)])
    data = np.frombuffer(block + b'\n' * (not block.endswith(b'\n')), np.uint8)
    stops = np.flatnonzero(data == ord('\n'))
    starts = np.append(0, stops[:-1] + 1)
    # an object that ends with a line and one that begins with the next are never parts of another
    last = stops - 1 - (data[stops - 1] == ord('\r'))
    odd = (data[starts] != ord('{')) | (data[last] != ord('}'))
    for line in np.flatnonzero(stops - starts > 2 * NESTED):
        odd[line] |= _unreadable(block[starts[line]:stops[line]])
    starts, stops, records, rejected = starts.tolist(), stops.tolist(), [], []
    ranges = [(first, min(first + CHUNK, len(stops)))
              for first in range(0, len(stops), CHUNK)][::-1]
    while ranges:
        first, last = ranges.pop()
        found = None if odd[first:last].any() else _decoded(
            block[starts[first]:stops[last - 1]], last - first, decoder, asin)
        if found is not None:
            records += found
        elif last - first > 1:
            middle = (first + last) // 2
            ranges += [(middle, last), (first, middle)]
        else:
            record = record_of(block[starts[first]:stops[first]])
            record = record if isinstance(record, Reason) else careful(record)
            if isinstance(record, Reason):
                rejected.append((first, record))
            else:
                records.append(record)
    return Parsed(len(stops), records, rejected)


def _decoded(chunk: bytes, lines: int, decoder, asin: Callable) -> list | None:
    """The objects of a chunk if each of its lines is one, and in order."""
    try:
        if not chunk.isascii():
            chunk.decode()  # what is skipped is not checked otherwise
        records = decoder.decode_lines(chunk)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return None
    return records if len(records) == lines and _ASINS.fullmatch(
        ''.join(map(asin, records))) else None


def _unreadable(line: bytes) -> bool:
    """Whether Python's json may refuse what msgspec skips: deep brackets, or a long number."""
    return line.count(b'[') + line.count(b'{') > NESTED or (
        len(line) > DIGITS and bool(re.search(rb'[0-9]{4}', line[::DIGITS // 5])))


@cache
def _event_decoder(form: str) -> msgspec.json.Decoder:
    """A decoder that accepts no line of reviews that `amazon_fields.event` would reject."""
    fields, meta = FIELDS[form], msgspec.Meta
    time = meta(ge=amazon_fields.EARLIEST * fields.units, lt=amazon_fields.LATEST * fields.units)
    return msgspec.json.Decoder(msgspec.defstruct('Event', [
        ('user', Annotated[str, meta(min_length=1, max_length=amazon_fields.USER_LENGTH)]),
        ('asin', Annotated[str, meta(min_length=1, max_length=32)]),
        ('time', Annotated[int, time])], gc=False, rename=vars(fields)))


@cache
def _item_decoder(form: str, parse: Callable) -> msgspec.json.Decoder:
    """A decoder of the fields that `parse` reads."""
    fields = FIELDS[form]
    names = ((fields.pictures, *fields.urls) if parse is amazon_fields.urls else
             ('title', 'price', 'description', 'categories', fields.brand, fields.category,
              fields.main_category, fields.features))
    return msgspec.json.Decoder(TypedDict('Item', dict.fromkeys(names, Any) | {
        fields.asin: Required[Annotated[str, msgspec.Meta(min_length=1, max_length=32)]]},
        total=False))


def genuine(user: pl.Expr) -> pl.Expr:
    """Return users of `events` as the bytes whose order numbers them."""
    return pl.when(user.str.len_bytes() > LONGEST).then(
        user.str.strip_chars().str.decode('hex', strict=False)).otherwise(user.cast(pl.Binary))


def _storable(user: str) -> str:
    """A user as text that tables can hold; halves of surrogate pairs only in a longer code."""
    return (user.encode(errors='surrogatepass').hex().rjust(LONGEST + 1)
            if _SURROGATE.search(user) else user)
