"""What a download was answered, a line per answer, so that nothing is asked twice.

A line is written behind what it tells: a picture that has its name and no line is there all the
same, and a part without a line is fetched from its beginning.
"""

import fcntl
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from tpad_jax.data.untrusted import Lines
from tpad_jax.errors import InputError

# what If-Range may say: a strong entity tag, or a date; it goes into a request's head
VALIDATOR = re.compile(r'"[\x21\x23-\x7e]{0,200}"|[A-Z][a-z]{2}, [0-9A-Za-z: ]{20,30}')


class Begun(NamedTuple):
    """The body of which a part lies on the disk: its address, what tells it, its size in bytes."""

    url: str
    validator: str | None
    size: int | None


class Journal:
    """`images/download.jsonl`, open for one process at a time.

    Attributes:
      failed: {(asin, address): reason} of what would be answered again as it was.
      begun: {asin: Begun} of what was begun last. rejected: {reason: lines} that tell nothing.
    """

    def __init__(self, path: Path):
        """Opens or makes the file, and takes off a last line that was cut short.

        Raises:
          InputError: another process has it open, or it is no file of its own.
        """
        self.failed, self.begun = {}, {}
        try:
            number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
                             | os.O_NONBLOCK, 0o666)
            self._file = os.fdopen(number, 'a+b', buffering=0)
        except OSError as error:
            if path.exists() or path.is_symlink():
                raise InputError(f'{path} cannot be opened as a file of its own '
                                 f'({error.strerror}); move it away') from error
            raise
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise InputError(f'{path}: another download runs in this directory; wait for its '
                             'end or stop it') from error
        self._drop_unfinished_line()
        lines = Lines(path)
        for line in lines:
            if not self._read(line):
                lines.reject('bad_line')
        self.rejected = dict(lines.rejected)

    def begin(self, asin: str, begun: Begun) -> None:
        """A body is about to be written from its first byte on."""
        self.begun[asin] = begun
        self._write(asin=asin, **{key: value for key, value in begun._asdict().items()
                                  if value is not None})

    def fail(self, asin: str, url: str, reason: str) -> None:
        """An answer that would be the same again."""
        self.failed[asin, url] = reason
        self._write(asin=asin, url=url, failed=reason)

    def keep(self, asin: str, url: str, file: str, size: int) -> None:
        """A picture has its name now."""
        self.failed.pop((asin, url), None)
        self._write(asin=asin, url=url, file=file, size=size)

    def close(self) -> None:
        """Closes the file; another process may have it."""
        self._file.close()

    def _write(self, **line):
        left = json.dumps(line).encode() + b'\n'
        while left:  # a disk that fills up takes less than the whole, and raises at the next
            left = left[self._file.write(left):]

    def _read(self, line: dict) -> bool:
        asin, url, failed = line.get('asin'), line.get('url'), line.get('failed')
        if not (isinstance(asin, str) and isinstance(url, str)):
            return False
        if isinstance(failed, str):
            self.failed[asin, url] = failed
        elif 'file' in line:
            self.failed.pop((asin, url), None)
        else:
            validator, size = line.get('validator'), line.get('size')
            told = isinstance(validator, str) and VALIDATOR.fullmatch(validator)
            self.begun[asin] = Begun(url, validator if told else None,
                                     size if isinstance(size, int) else None)
        return True

    def _drop_unfinished_line(self):
        end = self._file.seek(0, os.SEEK_END)
        while end:  # from behind: a line is short, the file may be long
            start = max(end - 65536, 0)
            self._file.seek(start)
            newline = self._file.read(end - start).rfind(b'\n')
            if newline >= 0:
                self._file.truncate(start + newline + 1)
                return
            end = start
        self._file.truncate(0)
