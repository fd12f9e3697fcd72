"""The journal of a download: one line per answer, so that nothing is asked twice.

A line is written after the event that it records. A picture with a name and without a line counts
as fetched; a partial body without a line is fetched again from its first byte.
"""

import fcntl
import json
import re
from pathlib import Path
from typing import NamedTuple

from tpad_jax.core.files import drop_partial_line
from tpad_jax.data.untrusted import Lines
from tpad_jax.errors import InputError, refuse_if

# what If-Range may hold: a strong entity tag, or a date; it becomes part of a request's head
VALIDATOR = re.compile(r'"[\x21\x23-\x7e]{0,200}"|[A-Z][a-z]{2}, [0-9A-Za-z: ]{20,30}')


class Begun(NamedTuple):
    """A body of which a part is on the disk.

    Attributes:
      url: its address.
      validator: tells this body from others of its address; None: unknown.
      size: bytes of the whole body; None: unknown.
    """

    url: str
    validator: str | None
    size: int | None


class Journal:
    """`images/download.jsonl`, open for one process at a time.

    Attributes:
      failed: {(asin, address): reason} of final failures.
      begun: {asin: Begun} of the body begun last.
      rejected: {reason: lines} that cannot be read.
    """

    def __init__(self, path: Path):
        """Open or make the file.

        Args:
          path: of the file.

        Raises:
          InputError: another process has it open, or the path is not a plain file.
        """
        self.failed, self.begun = {}, {}
        refuse_if(path.is_symlink() or (path.exists() and not path.is_file()),
                  f'{path}: not a plain file. Expected the journal. Fix: move it away.')
        self._file = path.open('ab', buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.close()
            raise InputError(f'{path}: another download runs in this directory. Expected one at a '
                             'time. Fix: wait for its end or stop it.') from error
        drop_partial_line(path)
        lines = Lines(path)
        for line in lines:
            if not self._apply(line):
                lines.reject('bad_line')
        self.rejected = dict(lines.rejected)

    def close(self) -> None:
        """Close the file, so that another process may open it."""
        self._file.close()

    def record(self, asin: str, url: str, **answer) -> None:
        """Record an answer.

        Args:
          asin: of the item.
          url: the address.
          **answer: `failed`, the reason, which would be the same again; or `file` and `size` of a
            picture that has its name now; or `validator` and `size` of a body that is about to be
            written from its first byte on.
        """
        line = {'asin': asin, 'url': url, **answer}
        self._apply(line)
        left = json.dumps(line).encode() + b'\n'
        while left:  # a disk that fills up takes less than the whole, and raises at the next call
            left = left[self._file.write(left):]

    def _apply(self, line: dict) -> bool:
        """Bring the attributes up to date with a line; False if it is none of the journal's."""
        asin, url, failed = line.get('asin'), line.get('url'), line.get('failed')
        if not (isinstance(asin, str) and isinstance(url, str)):
            return False
        if isinstance(failed, str):
            self.failed[asin, url] = failed
        elif 'file' in line:
            self.failed.pop((asin, url), None)
        else:
            validator, size = line.get('validator'), line.get('size')
            usable = isinstance(validator, str) and VALIDATOR.fullmatch(validator)
            self.begun[asin] = Begun(url, validator if usable else None,
                                     size if isinstance(size, int) else None)
        return True
