"""Blocks of raw Amazon lines -> values, on all cores.

A fast parser, msgspec, reads the lines that it and Python's json read alike. Other lines are handed
back with their position, and `untrusted.record_of` reads them, or finds the reason to reject them.
"""

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypedDict

import msgspec
import numpy as np
import polars as pl

from tpad_jax.data.sources import amazon_fields
from tpad_jax.data.sources.amazon_fields import FIELDS, Fields
from tpad_jax.data.untrusted import Lines, Reason, record_of
from tpad_jax.errors import refusing

PARALLEL = 32 * 2**20  # bytes of a file for whose sake processes are started
CHUNK = 2**16  # bytes that are parsed at once; an odd line costs its chunk the fast way
# msgspec skips the fields that are not needed, and sees neither of these there. Python's json
# refuses integers of more than 4300 digits and, by the depth of calls, some 900 nested brackets.
NESTED, DIGITS = 700, 4300
EVENTS = pl.Schema({'user': pl.String, 'asin': pl.String, 'time': pl.Int64})
LONGEST = 4 * amazon_fields.USER_LENGTH  # bytes of a user in UTF-8
_SURROGATE = re.compile('[\ud800-\udfff]')
_ASINS = re.compile('[A-Za-z0-9_-]*')


class Parsed(NamedTuple):
    """The lines of a block.

    Attributes:
      number: how many there are.
      values: of the lines that could be read fast: a table of events, or a list of
        (position in the block, asin, value, {what: count of unused parts}).
      odd: (position, line) of the others.
    """

    number: int
    values: Any
    odd: list[tuple[int, bytes]]


def parse_all(parse: Callable[[bytes, str], Parsed], blocks: Iterable[bytes | Reason], path: Path,
              form: str) -> Iterator[Parsed | Reason]:
    """Parse blocks in their order, those of a large file in other processes.

    Args:
      parse: picklable, such as `events`.
      blocks: of `untrusted.Lines.blocks`.
      path: of their file.
      form: '2018' or '2023'.

    Yields:
      What became of each block; a Reason as it is.

    Raises:
      InputError: a process was killed, as by the system for want of memory.
    """
    if path.stat().st_size < PARALLEL // (8 if path.suffix == '.gz' else 1):
        yield from (block if isinstance(block, Reason) else parse(block, form) for block in blocks)
        return
    import loky  # its processes do not run the main module again, unlike those of multiprocessing

    # it stays for the next file, and goes after some idle seconds
    cores, waiting = loky.cpu_count(), deque()
    with refusing(BrokenProcessPool, f'{path}: a process that read it was killed',
                  'Expected memory for a process on every core. Fix: free memory, and repeat'):
        pool = loky.get_reusable_executor(cores)
        for block in blocks:
            waiting.append(block if isinstance(block, Reason) else pool.submit(parse, block, form))
            if len(waiting) > 2 * cores:
                yield _outcome(waiting.popleft())
        yield from map(_outcome, waiting)


def events(block: bytes, form: str) -> Parsed:
    """Read users, asins and times (seconds) of the lines of reviews that are in order.

    Args:
      block: whole lines.
      form: '2018' or '2023'.
    """
    fields, decoder = FIELDS[form], _event_decoder(form)
    records, odd, begin, number = [], [], 0, 0
    while begin < len(block):
        end = block.rfind(b'\n', begin, begin + CHUNK) + 1 or block.find(b'\n', begin) + 1
        chunk = block[begin:end or len(block)]
        begin += len(chunk)
        lines = chunk.count(b'\n') + (not end)
        if (read := _objects(chunk, lines, decoder, fields.asin)) is not None:
            records += read
        else:
            for position, line in enumerate(chunk.removesuffix(b'\n').split(b'\n'), start=number):
                record = _fast(line, decoder)
                if record is not None and amazon_fields.ASIN.fullmatch(record[fields.asin]):
                    records.append(record)
                else:
                    odd.append((position, line))
        number += lines
    columns = [[record[name] for record in records] for name in
               (fields.user, fields.asin, fields.time)]
    table = pl.DataFrame(dict(zip(EVENTS, columns, strict=True)), EVENTS)
    return Parsed(number, table.with_columns(pl.col('time') // fields.units), odd)


def items(block: bytes, form: str, parse: Callable) -> Parsed:
    """Read the asins of the lines of metadata, and what `parse` makes of the lines.

    Args:
      block: whole lines.
      form: '2018' or '2023'.
      parse: `amazon_fields.describe` or `amazon_fields.urls`.
    """
    fields, decoder = FIELDS[form], _item_decoder(form)
    lines = block.removesuffix(b'\n').split(b'\n')
    values, odd, unused = [], [], Counter()
    for position, line in enumerate(lines):
        record = _fast(line, decoder)
        asin = Reason('') if record is None else amazon_fields.item_id(record, fields)
        if isinstance(asin, Reason):
            odd.append((position, line))
        else:
            value = parse(record, fields, unused)
            values.append((position, asin, value, unused or {}))
            unused = Counter() if unused else unused
    return Parsed(len(lines), values, odd)


def item_values(lines: Lines, parsed: Parsed | Reason, form: str,
                parse: Callable[[dict, Fields, Counter], tuple]) -> list[tuple]:
    """Count the lines of a block of metadata, and return what its usable lines hold.

    Args:
      lines: of the file; lines that cannot be used are rejected.
      parsed: the next block of it, by `items`.
      form: '2018' or '2023'.
      parse: what the block was parsed by.

    Returns:
      (position in the block, asin, what `parse` made of the line, {what: count of unused parts}).
    """
    def read_odd(record):
        asin, counted = amazon_fields.item_id(record, FIELDS[form]), Counter()
        return asin if isinstance(asin, Reason) else (
            asin, parse(record, FIELDS[form], counted), counted)

    odd = _odd(lines, parsed, read_odd)
    values = [] if isinstance(parsed, Reason) else parsed.values
    return sorted((*values, *odd)) if odd else values


def event_table(lines: Lines, parsed: Parsed | Reason, form: str) -> pl.DataFrame:
    """Count the lines of a block of reviews, and return what its usable lines hold.

    Args:
      lines: as in `item_values`.
      parsed: the next block of it, by `events`.
      form: '2018' or '2023'.

    Returns:
      Users, asins and times (seconds), of items without metadata too.
    """
    def read_odd(record):
        event = amazon_fields.event(record, FIELDS[form])
        return event if isinstance(event, Reason) else (_storable(event[0]), *event[1:])

    odd = pl.DataFrame([event for _, *event in _odd(lines, parsed, read_odd)],
                       EVENTS, orient='row')
    return odd if isinstance(parsed, Reason) else pl.concat([parsed.values, odd])


def _odd(lines: Lines, parsed: Parsed | Reason, read_odd: Callable[[dict], object]) -> list[tuple]:
    """Count a block's lines -> (position, what `read_odd` makes) of the odd ones.

    Those are rejected for the Reason that `read_odd` returns.
    """
    begin, values = lines.number, []
    if isinstance(parsed, Reason):
        lines.number += 1
        lines.reject(parsed)
        return values
    for position, line in parsed.odd:
        lines.number = begin + position + 1
        record = record_of(line)
        value = record if isinstance(record, Reason) else read_odd(record)
        if isinstance(value, Reason):
            lines.reject(value)
        else:
            values.append((position, *value))
    lines.number = begin + parsed.number
    return values


def genuine(user: pl.Expr) -> pl.Expr:
    """Return users of `event_table` as the bytes whose order numbers them."""
    return pl.when(user.str.len_bytes() > LONGEST).then(
        user.str.strip_chars().str.decode('hex', strict=False)).otherwise(user.cast(pl.Binary))


def _storable(user: str) -> str:
    """A user as text that tables can hold; halves of surrogate pairs only in a longer code."""
    return (user.encode(errors='surrogatepass').hex().rjust(LONGEST + 1)
            if _SURROGATE.search(user) else user)


def _outcome(block) -> Parsed | Reason:
    return block if isinstance(block, Reason) else block.result()


@cache
def _event_decoder(form: str) -> msgspec.json.Decoder:
    """A decoder that accepts no line of reviews that `amazon_fields.event` would reject."""
    fields, meta = FIELDS[form], msgspec.Meta
    return msgspec.json.Decoder(TypedDict('Event', {
        fields.asin: Annotated[str, meta(min_length=1, max_length=32)],
        fields.user: Annotated[str, meta(min_length=1, max_length=amazon_fields.USER_LENGTH)],
        fields.time: Annotated[int, meta(ge=amazon_fields.EARLIEST * fields.units,
                                         lt=amazon_fields.LATEST * fields.units)]}))


@cache
def _item_decoder(form: str) -> msgspec.json.Decoder:
    """A decoder of the fields that items are made of."""
    names = {'title', 'price', 'description', 'categories', *FIELDS[form].urls}
    names.update(value for value in vars(FIELDS[form]).values() if isinstance(value, str) and value)
    return msgspec.json.Decoder(TypedDict('Item', dict.fromkeys(names, Any), total=False))


def _objects(chunk: bytes, lines: int, decoder, asin: str) -> list[dict] | None:
    """The objects of a chunk of lines if each of the lines is one, and in order."""
    # an object that ends with a line and one that begins with the next are never parts of another
    if (chunk.count(b'}\n{') != lines - 1 or chunk[:1] != b'{'
            or _brackets(chunk) - lines > NESTED or _long_number(chunk)):
        return None
    try:
        chunk.decode()  # what is skipped is not checked otherwise
        records = decoder.decode_lines(chunk)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return None
    return records if len(records) == lines and _ASINS.fullmatch(
        ''.join([record[asin] for record in records])) else None


def _fast(line: bytes, decoder) -> dict | None:
    """A line's object, or None where the careful reader has to look at it."""
    if len(line) > NESTED and (_brackets(line) > NESTED or _long_number(line)):
        return None
    try:
        line.decode()
        return decoder.decode(line)
    except (UnicodeDecodeError, msgspec.DecodeError, RecursionError):
        return None


def _brackets(text: bytes) -> int:
    """How many [ and { there are; the two differ in one bit."""
    return np.count_nonzero((np.frombuffer(text, np.uint8) | 32) == ord('{'))


def _long_number(text: bytes) -> bool:
    """Whether a number may be so long that Python does not read it."""
    return len(text) > DIGITS and bool(re.search(rb'[0-9]{4}', text[::DIGITS // 5]))
