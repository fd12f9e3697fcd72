"""Files of millions of sessions and of the lists that answer them, in batches and flat memory.

Input:

- .jsonl, .jsonl.gz or '-' (standard input): {"session": [item ids]} per line, optionally "id"
- .parquet: column session (a list of texts or whole numbers), optionally id

Output:

- .jsonl or '-' (standard output): {"id" or "line": ..., "items": [...]} per line
- .parquet: columns line, id, items, scores, unknown, empty

An answer gives the id of its session, or its line (row of a table) from 1 on if it has no id.
Rejected lines have no answer.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tpad_jax.core import files
from tpad_jax.data.untrusted import Lines, Reason
from tpad_jax.errors import InputError

STREAM = '-'
FLUSH = 8192  # sessions of a parquet file's row group
ANSWER = pa.schema([('line', pa.int64()), ('id', pa.string()), ('items', pa.list_(pa.string())),
                    ('scores', pa.list_(pa.float32())), ('unknown', pa.list_(pa.string())),
                    ('empty', pa.bool_())])


class Asked(NamedTuple):
    """A session to answer: its line or row from 1 on, its id or None, its item ids."""

    line: int
    id: object
    session: list[str]


class Source:
    """The sessions of a file or of standard input, in order. Iterate once.

    Attributes:
      number: lines or rows read so far.
      rejected: {reason: count}.
    """

    def __init__(self, path: str, on_reject=lambda line, reason: None):
        """Open the source.

        Args:
          path: path of the file, or STREAM.
          on_reject: called with (line, reason) for every rejected line.

        Raises:
          InputError: the file does not exist.
        """
        self._path = Path(path)
        self._lines = Lines(self._path, on_reject)
        if path != STREAM and not self._path.is_file():
            raise InputError(f'{path} does not exist. Expected a file of sessions, or - for '
                             'standard input')

    @property
    def number(self) -> int:
        """Lines or rows read so far."""
        return self._lines.number

    @property
    def rejected(self) -> Counter:
        """{reason: count} of the rejected lines."""
        return self._lines.rejected

    def __iter__(self) -> Iterator[Asked]:
        packed = self._path.suffix == '.parquet'
        return self._rows() if packed else self._json()

    def check(self, bad_share: float) -> None:
        """Refuse a file with too many rejected lines, see `Lines.check`.

        Args:
          bad_share: the largest share of rejected lines.
        """
        self._lines.check(bad_share, '--bad_share')

    def _json(self):
        for record in self._lines:
            session = record.get('session')
            reason = _why(session)
            if reason is None:
                yield Asked(self._lines.number, record.get('id'), _texts(session))
            else:
                self._lines.reject(reason)

    def _rows(self):
        try:
            with pq.ParquetFile(self._path) as file:
                names = file.schema_arrow.names
                if 'session' not in names:
                    raise InputError(f'{self._path} has the columns {", ".join(names)}. Expected '
                                     'a column session, lists of item ids')
                wanted = [name for name in ('session', 'id') if name in names]
                for part in file.iter_batches(FLUSH, columns=wanted):
                    columns = part.to_pydict()
                    ids = columns.get('id') or [None] * part.num_rows
                    for name, session in zip(ids, columns['session'], strict=True):
                        self._lines.number += 1
                        reason = _why(session)
                        if reason is None:
                            yield Asked(self._lines.number, name, _texts(session))
                        else:
                            self._lines.reject(reason)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f'{self._path} cannot be read as parquet: '
                             f'{str(error).splitlines()[0]}. Fix: write it again') from error


class Sink:
    """Writes answers as they arrive.

    Args:
      path: path of the file, which is <path>.partial until `finish`; '-' for standard output.
      ids: item ids by row.
      scores: whether lines contain scores (a table always does).
    """

    def __init__(self, path: str, ids: list[str], scores: bool):
        self._path, self._scores, self._table = path, scores, None
        self._words = [json.dumps(name).encode() for name in ids]
        self.partial = None if path == STREAM else Path(f'{path}{files.PARTIAL}')
        try:
            if path.endswith('.parquet'):
                self._ids = pa.array(ids, pa.string())
                self._table, self._waiting = pq.ParquetWriter(self.partial, ANSWER), []
            elif path == STREAM:
                self._file = sys.stdout.buffer
            else:
                self._file = self.partial.open('wb')
        except OSError as error:
            raise InputError(f'{self.partial} cannot be written ({error.strerror}). Fix: choose '
                             'another --out') from error

    def write(self, asked: list[Asked], unknown: list[list[str]], items: np.ndarray,
              scores: np.ndarray) -> None:
        """Write the answers of S sessions.

        Args:
          asked: the S sessions.
          unknown: S lists of unknown ids.
          items: int32 [S, K]. Lists, best first.
          scores: float32 [S, K]. NaN in the row of an empty session.
        """
        if self._table is not None:
            self._waiting.append(self._batch(asked, unknown, items, scores))
            if sum(part.num_rows for part in self._waiting) >= FLUSH:
                self._flush()
            return
        values, words, out = scores.tolist(), self._words, []
        empty = np.isnan(scores[:, 0]).tolist()
        for n, (session, row) in enumerate(zip(asked, items.tolist(), strict=True)):
            key = b'"line": %d' % session.line if session.id is None else (
                b'"id": ' + json.dumps(session.id).encode())
            more = b''
            if self._scores:
                listed = ', '.join(f'{x:.6g}' for x in values[n])
                more = b', "scores": ' + (b'null' if empty[n] else f'[{listed}]'.encode())
            if unknown[n]:
                more += b', "unknown": ' + json.dumps(unknown[n]).encode()
            if empty[n]:
                more += b', "empty": true'
            out.append(b'{%s, "items": [%s]%s}\n' % (
                key, b', '.join([words[i] for i in row]), more))
        self._file.write(b''.join(out))

    def finish(self) -> None:
        """Rename the complete file."""
        self.close()
        if self.partial is not None:
            self.partial.replace(self._path)

    def close(self) -> None:
        """Write the buffered answers; the file stays <path>.partial."""
        if self._table is not None:
            self._flush()
            self._table.close()
        elif self.partial is None:
            self._file.flush()
        else:
            self._file.close()

    def _batch(self, asked, unknown, items, scores):
        size, k = items.shape
        edges = pa.array(np.arange(size + 1, dtype=np.int32) * k)
        ids = [column_id(session.id) for session in asked]
        return pa.record_batch([
            pa.array([session.line for session in asked], pa.int64()), pa.array(ids, pa.string()),
            pa.ListArray.from_arrays(edges, self._ids.take(pa.array(items.ravel()))),
            pa.ListArray.from_arrays(edges, pa.array(scores.ravel(), pa.float32())),
            pa.array(unknown, pa.list_(pa.string())), pa.array(np.isnan(scores[:, 0]))],
            schema=ANSWER)

    def _flush(self):
        if self._waiting:
            self._table.write_table(pa.Table.from_batches(self._waiting, ANSWER))
            self._waiting = []


def in_batches(source: Source, size: int) -> Iterator[list[Asked]]:
    """Yield lists of `size` sessions, the last one shorter.

    Args:
      source: the sessions.
      size: sessions of a list.
    """
    sessions = iter(source)
    while part := list(islice(sessions, size)):
        yield part


def column_id(name) -> str | None:
    """Return an id for a table: a text or None as it is, any other value as JSON."""
    return name if name is None or isinstance(name, str) else json.dumps(name)


def _why(session) -> Reason | None:
    if not isinstance(session, list):
        return Reason('no_session')
    if not all(type(x) in (str, int) for x in session):
        return Reason('session_of_no_item_ids')
    return None


def _texts(session):
    return [x if type(x) is str else str(x) for x in session]
