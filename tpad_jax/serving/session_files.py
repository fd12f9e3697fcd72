"""Files of millions of sessions and of the lists that answer them, in batches and flat memory.

Input:

- .jsonl, .jsonl.gz or '-' (standard input): {"session": [item ids]} per line, optionally "id",
  "seen", item ids that the list must not hold, and the keys of `calls.KEYS`
- .parquet: column session (a list of texts or whole numbers), optionally id, seen (such a list) and
  these keys

Output:

- .jsonl or '-' (standard output): {"id" or "line": ..., "items": [...]} per line
- .parquet: columns line, id, items, scores, unknown, empty

An answer gives the id of its session, or its line (row of a table) from 1 on if it has no id.
Rejected lines have no answer.
"""

import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tpad_jax.core import files
from tpad_jax.data.untrusted import Lines, Reason
from tpad_jax.errors import refuse_if, refusing
from tpad_jax.serving.calls import KEYS, usable

STREAM = '-'
FLUSH = 8192  # sessions of a parquet file's row group
ANSWER = pa.schema({
    'line': pa.int64(), 'id': pa.string(), 'items': pa.list_(pa.string()),
    'scores': pa.list_(pa.float32()), 'unknown': pa.list_(pa.string()), 'empty': pa.bool_()})


class Asked(NamedTuple):
    """A session to answer: its line or row from 1 on, its id or None, its and the seen item ids.

    `events` is what is known of its events, see `calls.with_events`.
    """

    line: int
    id: object
    session: list[str]
    seen: list[str]
    events: dict


class Source(Lines):
    """The sessions of a file or of standard input, in order. Iterate once; see `Lines`."""

    def __init__(self, path: str, on_reject=lambda line, reason: None):
        """Open the source.

        Args:
          path: path of the file, or STREAM.
          on_reject: called with (line, reason) for every rejected line.

        Raises:
          InputError: the file does not exist.
        """
        super().__init__(Path(path), on_reject)
        refuse_if(path != STREAM and not self.path.is_file(), f'{path} does not exist. Expected a '
                  'file of sessions, or - for standard input')

    def __iter__(self) -> Iterator[Asked]:
        for record in self._rows() if self.path.suffix == '.parquet' else super().__iter__():
            session, seen = record.get('session'), record.get('seen') or []
            events = {key: record[key] for key in KEYS if key in record}
            if isinstance(earlier := events.get('earlier'), list):  # ids may be numbers, as above
                events['earlier'] = [str(x) if type(x) is int else x for x in earlier]
            if not isinstance(session, list):
                self.reject(Reason('no_session'))
            elif not isinstance(seen, list) or not all(
                    type(name) in (str, int) for name in (*session, *seen)):
                self.reject(Reason('session_of_no_item_ids'))
            elif not usable(events, session):
                self.reject(Reason('unusable_times_kinds_now_or_earlier'))
            else:
                yield Asked(self.number, record.get('id'), [str(name) for name in session],
                            [str(name) for name in seen], events)

    def in_batches(self, size: int) -> Iterator[list[Asked]]:
        """Yield lists of `size` sessions, the last one shorter."""
        sessions = iter(self)
        while part := list(islice(sessions, size)):
            yield part

    def _rows(self):
        with (refusing((OSError, pa.ArrowException), f'{self.path} cannot be read as parquet',
                       'Fix: write it again'), pq.ParquetFile(self.path) as file):
            names = file.schema_arrow.names
            refuse_if('session' not in names, f'{self.path} has the columns {", ".join(names)}. '
                      'Expected a column session, lists of item ids')
            wanted = [name for name in ('session', 'id', 'seen', *KEYS) if name in names]
            for part in file.iter_batches(FLUSH, columns=wanted):
                for record in part.to_pylist():
                    self.number += 1
                    yield record


class Sink:
    """Writes answers as they arrive; a context manager.

    Args:
      path: path of the file; '-' for standard output. The file is <path>.partial until the block
        ends without an error.
      ids: item ids by row.
      scores: whether lines contain scores (a table always does).
    """

    def __init__(self, path: str, ids: list[str], scores: bool):
        self._path, self._ids, self._scores, self._waiting = path, ids, scores, []
        self.partial = None if path == STREAM else Path(f'{path}{files.PARTIAL}')
        with refusing(OSError, f'{self.partial} cannot be written', 'Fix: choose another --out'):
            self._file = self.partial.open('wb') if self.partial else sys.stdout.buffer
        self._table = pq.ParquetWriter(self._file, ANSWER) if path.endswith('.parquet') else None

    def write(self, asked: list[Asked], unknown: list[list[str]], items: np.ndarray,
              scores: np.ndarray, why: list[dict] | None = None) -> None:
        """Write the answers of S sessions.

        Args:
          asked: the S sessions.
          unknown: S lists of unknown ids.
          items: int32 [S, K]. Lists, best first, 0 after the last item.
          scores: float32 [S, K]. NaN there and in the row of an empty session.
          why: S reasons for lines, or None.
        """
        rows = []
        for session, names, row, values, more in zip(asked, unknown, items.tolist(),
                                                     scores.tolist(), why or [None] * len(asked),
                                                     strict=True):
            best = [self._ids[n] for n in row if n]
            values, empty = values[:len(best)], len(names) == len(session.session)
            if self._table is not None:
                rows.append(dict(line=session.line, id=column_id(session.id), items=best,
                                 scores=values, unknown=names, empty=empty))
                continue
            answer = {'line': session.line} if session.id is None else {'id': session.id}
            answer['items'] = best
            if self._scores:
                answer['scores'] = None if empty else [float(f'{x:.6g}') for x in values]
            answer |= ({'unknown': names} if names else {}) | ({'empty': True} if empty else {})
            answer |= {'why': more} if more else {}
            self._file.write(json.dumps(answer).encode() + b'\n')
        if rows:  # columns take less memory than rows until they are written
            self._waiting.append(pa.RecordBatch.from_pylist(rows, ANSWER))
        if sum(part.num_rows for part in self._waiting) >= FLUSH:
            self._flush()

    def __enter__(self) -> 'Sink':
        return self

    def __exit__(self, kind, error, traceback):
        if self._table is not None:
            self._flush()
            self._table.close()
        if self.partial is None:
            self._file.flush()
            return
        self._file.close()
        if kind is None:
            self.partial.replace(self._path)
        else:
            error.add_note(f'the answers so far are in {self.partial}')

    def _flush(self):
        if self._waiting:
            self._table.write_table(pa.Table.from_batches(self._waiting, ANSWER))
            self._waiting = []


def column_id(name) -> str | None:
    """Return an id for a table: a text or None as it is, any other value as JSON."""
    return name if name is None or isinstance(name, str) else json.dumps(name)
