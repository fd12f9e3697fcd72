"""Files of unknown origin: lines of JSON, bounded and counted, and links out of a folder."""

import contextlib
import gzip
import io
import json
import lzma
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from tpad_jax.errors import InputError, refuse_if, refusing

MAX_LINE = 4 * 2**20  # bytes; the longest genuine metadata lines have some hundred thousand
# a .gz file that unpacks to more than this many bytes, and to more than this many times what was
# read of it, is a bomb: JSON packs to a tenth, and genuine files never to a hundredth
MAX_UNPACKED, MAX_PACKING = 64 * 2**20, 100
SHOWN = 3  # damaged lines an error names
# how members of a zip file may be packed: of others one cannot unpack a part only
PACKINGS = frozenset({zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED})
# raised by zipfile and numpy on damaged bytes, in addition to OSError; MemoryError on absurd sizes,
# TokenError where numpy parses the head of an array
DAMAGE = (ValueError, EOFError, KeyError, TypeError, RuntimeError, MemoryError,
          zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, tokenize.TokenError)
# Reasons to drop a line that is not damaged
WHOLE = frozenset({'blank_line', 'duplicate_item', 'duplicate_review', 'item_without_metadata',
                   'duplicate_event', 'event_of_unknown_item', 'other_kind'})


class Reason(str):
    """Why something is rejected; a separate type, so that no text of a file is taken for one."""

    __slots__ = ()


class Lines:
    """The JSON objects of a file, plain or .gz, one per line, and why other lines are rejected.

    Iterate once. Little more than MAX_LINE bytes are in memory. Of two equal keys in an object the
    later counts. Of a .gz file that is cut short, damaged or a bomb, the lines before are read.

    Attributes:
      FORM: of a usable line, for messages.
      BOM: what is dropped where it begins the file.
      path: of the file; '-' is standard input.
      number: of the line last read, from 1.
      rejected: {reason: lines}, those of `reject` among them.
      damaged: the first few lines that are rejected for a reason outside WHOLE, as (number,
        reason).
      unread: share of the file's bytes after the position where it could not be unpacked any more;
        1 for a bomb.
    """

    FORM = 'a JSON object in UTF-8'
    BOM = b'\xef\xbb\xbf'

    def __init__(self, path: Path, tell=lambda number, reason: None):
        """Prepare to read a file.

        Args:
          path: of the file.
          tell: called with number and reason of every line that is damaged.
        """
        self.path, self.number, self.unread, self._tell = path, 0, 0.0, tell
        self.rejected, self.damaged = Counter(), []

    @property
    def line(self) -> int:
        """The line of the file that was read last, from 1."""
        return self.number

    def __iter__(self) -> Iterator[dict]:
        for line in self._lines():
            self.number += 1
            record = line if isinstance(line, Reason) else record_of(line)
            if isinstance(record, Reason):
                self.reject(record)
            else:
                yield record

    def reject(self, reason: str) -> None:
        """Count the line last read as rejected."""
        self.rejected[reason] += 1
        if reason in WHOLE:
            return
        self._tell(self.line, reason)
        if len(self.damaged) < SHOWN:
            self.damaged.append((self.line, reason))

    def check(self, bad_share: float, option: str = 'config.data.bad_share',
              fields: str = '', hints: dict[str, str] | None = None) -> None:
        """Refuse the file where more than a share of it is damaged; call it at the end.

        Args:
          bad_share: of the lines, in 0..1. Those rejected for a reason in WHOLE are not damaged;
            what could not be unpacked counts by its bytes.
          option: the option that sets it.
          fields: names of fields; if given, a file without a usable line is refused, too.
          hints: {reason: what to do about it}, in place of the general advice.

        Raises:
          InputError: with the counts by reason and the first damaged lines.
        """
        bad = Counter({reason: n for reason, n in self.rejected.items() if reason not in WHOLE})
        share = bad.total() / max(self.number, 1)
        fix = 'get the file again or correct it'
        if fields and self.number == self.rejected.total():
            wrong = f'none of its {self.number} lines is usable'
            expected = f'{self.FORM} with {fields} in every line'
        elif share + (1 - share) * self.unread > bad_share:
            cut = f', and {self.unread:.0%} of it cannot be unpacked' if self.unread else ''
            wrong = f'{bad.total()} of {self.number} lines are damaged{cut}'
            expected = f'a share of at most {option}={bad_share}'
            fix += ', or raise that option to drop these lines'
        else:
            return
        for reason, _ in bad.most_common(1):
            fix = (hints or {}).get(reason, fix)
        counts = reasons(bad or self.rejected)
        first = ', '.join(f'line {number} {reason}' for number, reason in self.damaged)
        facts = '; first '.join(filter(None, (counts, first)))
        raise InputError(f'{self.path}: {wrong} ({facts or "no line"}). Expected {expected}. '
                         f'Fix: {fix}.')

    def refusing(self) -> contextlib.AbstractContextManager:
        """Turn an OSError of a block into an InputError that names the file."""
        return refusing(OSError, f'{self.path} cannot be read',
                        'Expected a readable file. Fix: check its owner and its disk.')

    def blocks(self) -> Iterator[bytes | Reason]:
        """Yield the file as blocks of whole lines; a Reason replaces a line that cannot be read.

        `number` and `rejected` stay as they are.
        """
        rest, bom, long = b'', self.BOM, False
        for piece in self._pieces():
            if isinstance(piece, Reason):  # an unfinished line before it is lost
                yield piece
                return
            data = rest + piece
            end = data.find(b'\n') + 1
            if not end:
                long = long or len(data) >= MAX_LINE
                rest = b'' if long else data
                continue
            if long or end >= MAX_LINE:
                yield Reason('line_too_long')
                data, long, bom = data[end:], False, b''
            end = data.rfind(b'\n') + 1
            if end:
                yield data[:end].removeprefix(bom)
                bom = b''  # only at the beginning of the file it is a byte order mark
            rest = data[end:]
        if long or rest:
            yield Reason('line_too_long') if long else rest.removeprefix(bom)

    def _lines(self) -> Iterator[bytes | Reason]:
        for block in self.blocks():
            if isinstance(block, Reason):
                yield block
            else:
                yield from io.BytesIO(block)

    def _pieces(self) -> Iterator[bytes | Reason]:
        """The unpacked bytes of the file, MAX_LINE or less at once."""
        with self.refusing(), open(0 if str(self.path) == '-' else self.path, 'rb') as file:
            if self.path.suffix != '.gz':
                yield from iter(lambda: file.read1(MAX_LINE), b'')
                return
            refuse_if(file.read(2) != b'\x1f\x8b', f'{self.path}: not a gzip file. Expected one, '
                      'as its name ends in .gz. Fix: download it again, or rename it.')
            file.seek(0)
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield from self._unpacked(unpacked, file)

    def _unpacked(self, unpacked, packed) -> Iterator[bytes | Reason]:
        parts, held, total, reason = [], 0, 0, ''
        while not reason:
            part = b''
            try:
                part = unpacked.read1(min(io.DEFAULT_BUFFER_SIZE, MAX_LINE // 4))
                reason = '' if part else 'end'
            except EOFError:  # the end of the compressed stream is missing
                reason = Reason('truncated_file')
            except (gzip.BadGzipFile, zlib.error):
                self.unread = 1 - packed.tell() / packed.seek(0, 2)
                reason = Reason('damaged_file')
            room = max(MAX_UNPACKED, MAX_PACKING * packed.tell()) - total
            if len(part) > room:
                self.unread = 1.0  # the lines before are a vanishing part of it
                part, reason = part[:room], Reason('file_unpacks_without_end')
            parts.append(part)
            held, total = held + len(part), total + len(part)
            if held and (reason or held >= MAX_LINE - io.DEFAULT_BUFFER_SIZE):
                yield b''.join(parts)
                parts, held = [], 0
        if isinstance(reason, Reason):
            yield reason


def reasons(counts: dict) -> str:
    """Format counts by reason, as in 'bad_json: 2, blank_line: 1'."""
    return ', '.join(f'{reason}: {count}' for reason, count in sorted(counts.items()))


def shown(names: Iterable[str], most: int = 5) -> str:
    """List names, as in 'a, b, ...'; at most `most` of them."""
    names = list(names)
    return ', '.join(names[:most]) + (', ...' if len(names) > most else '')


def inside(path: Path, folder: Path) -> bool:
    """Check whether `path`, every link followed, is in `folder`."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError):  # links in a circle
        return False


def stay_inside(path: Path, folder: Path) -> None:
    """Refuse a path that leads out of its folder.

    Args:
      path: to check.
      folder: that must hold it.

    Raises:
      InputError: it leads out.
    """
    refuse_if(not inside(path, folder), f'{path}: a link that leads out of {folder}. Expected a '
              'file in that folder. Fix: copy the data there, or name the folder it points to.')


def record_of(line: bytes) -> dict | Reason:
    """Read the JSON object in a line, or the reason why there is none."""
    if not line.strip():
        return Reason('blank_line')
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError:
        return Reason('bad_encoding')
    except (ValueError, RecursionError):  # the latter from brackets nested by the thousand
        return Reason('python_dict' if line.lstrip().startswith((b"{'", b'{u')) else 'bad_json')
    return record if isinstance(record, dict) else Reason('bad_json')
