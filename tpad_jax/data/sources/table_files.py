"""Rows of CSV and Parquet files as records, bounded and counted like lines of JSON.

CSV: the first line names the columns. Cells are separated by commas, semicolons, tabs or bars, and
quoted by double quotes, which may hold line breaks. `.gz` files are unpacked while they are read.
"""

import csv
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tpad_jax.data.untrusted import DAMAGE, Lines, Reason, shown
from tpad_jax.errors import refuse_if, refusing

SEPARATORS = ',;\t|'
NAMED = {',': 'commas', ';': 'semicolons', '\t': 'tabs', '|': 'bars'}
PARQUET = b'PAR1'  # the first bytes of a Parquet file
BATCH = 4096  # rows of a Parquet file in memory
ABSENT = frozenset({'', 'null', 'none', 'nan', '\\n'})  # what programs write for no value
ID_LENGTH = 256  # characters of an id
_ESCAPED = re.compile('[\ud800-\udfff\0]')  # bytes that the encoding does not know, and zero
HINTS = {
    'bad_encoding': 'set config.data.encoding to the encoding of the file, such as latin-1 or '
                    'cp1252, or save it in UTF-8',
    'bad_quotes': 'write a quote inside a quoted cell twice, and close every quoted cell',
    'wrong_number_of_cells': 'quote cells that hold the separator or a line break',
}


class Rows(Lines):
    """The rows of a file as {column: value}, and why others are rejected.

    Iterate once. A value of a CSV file is a text. One of a Parquet file is what it holds, and times
    are integers, milliseconds since 1970.

    Attributes:
      columns: names of the columns in the order of the file.
      form: in words, such as 'CSV with commas'.
    """

    FORM = 'a row'

    def __init__(self, path: Path, encoding: str = 'utf-8'):
        """Read the names of the columns.

        Args:
          path: of the file.
          encoding: of a CSV file.

        Raises:
          InputError: there is no such file, or its columns cannot be read.
        """
        super().__init__(Path(path))
        refuse_if(not self.path.is_file(), f'{path}: not a file. Expected a CSV or Parquet file. '
                  'Fix: correct the path.')
        self._encoding, self._reader = encoding, None
        self.form, self.columns = 'Parquet', []
        with self.path.open('rb') as file:
            parquet = file.read(len(PARQUET)) == PARQUET
        self._rows = self._parquet() if parquet else self._csv()
        self.columns = [str(name) for name in next(self._rows, [])]
        refuse_if(len(self.columns) < 2, f'{path}: its first line names {len(self.columns)} '
                  f'column(s) {self.columns}. Expected the names of all columns, separated by '
                  f'{", ".join(NAMED.values())}. Fix: write that line.')
        refuse_if(_ESCAPED.search(''.join(self.columns)), f'{path}: its first line is not text in '
                  f'config.data.encoding={encoding!r}. Expected the names of the columns. Fix: '
                  'name the encoding, or save the file in UTF-8.')

    @property
    def line(self) -> int:
        """The line of a CSV file, or the row of a Parquet file, that was read last."""
        return self._reader.line_num if self._reader else self.number

    def __iter__(self) -> Iterator[dict]:
        for row in self._rows:
            if isinstance(row, Reason):
                self.reject(row)
            else:
                yield row

    def check_name(self, name: str) -> None:
        """Refuse a column that the file does not have exactly once.

        Args:
          name: of the column.

        Raises:
          InputError: it is absent or repeated.
        """
        count = self.columns.count(name)
        refuse_if(count != 1, f'{self.path}: {count} columns are called {name!r}. Expected one; '
                  f'the file ({self.form}) has {shown(self.columns, 20)}. Fix: rename the column, '
                  'or correct config.data.columns.')

    def _csv(self) -> Iterator:
        """The names of the columns, then a row or the reason why there is none."""
        lines = self._text()
        head = next(lines, '')
        separator = max(SEPARATORS, key=head.count)
        self.form = f'CSV with {NAMED[separator]}'
        # the head, too, may hold quoted line breaks
        reader = self._reader = csv.reader(chain([head], lines), delimiter=separator, strict=True)
        columns = None
        while True:
            begun = reader.line_num
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error:
                cells = Reason('bad_quotes')
            if columns is None:
                columns = [] if isinstance(cells, Reason) else [cell.strip() for cell in cells]
                yield columns
                continue
            self.number += 1
            # all lines up to the end of an unclosed quote are lost
            lost = reader.line_num - begun - 1 if isinstance(cells, Reason) else 0
            self.number += lost
            self.rejected['bad_quotes'] += lost
            yield self._record(columns, cells)

    def _record(self, columns, cells) -> dict | Reason:
        if isinstance(cells, Reason):
            return cells
        if not any(cells):
            return Reason('blank_line')
        if len(cells) != len(columns):
            return Reason('wrong_number_of_cells')
        if _ESCAPED.search(''.join(cells)):
            return Reason('bad_encoding')
        return dict(zip(columns, cells, strict=True))

    def _text(self) -> Iterator[str]:
        for line in self._lines():
            if isinstance(line, Reason):
                self.number += 1
                self.reject(line)
            else:
                yield line.decode(self._encoding, 'surrogateescape')

    def _parquet(self) -> Iterator:
        """The names of the columns, then the rows."""
        with refusing((OSError, *DAMAGE, pa.ArrowException), f'{self.path} cannot be read as '
                      'Parquet', 'Expected an undamaged file. Fix: write it again.'):
            with pq.ParquetFile(self.path) as file:
                yield file.schema_arrow.names
                for batch in file.iter_batches(BATCH):
                    columns = [_plain(column) for column in batch.columns]
                    for row in zip(*columns, strict=True):
                        self.number += 1
                        yield dict(zip(self.columns, row, strict=True))


def _plain(column: pa.Array) -> list:
    """The values of a column; times as milliseconds since 1970."""
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        column = column.cast(pa.timestamp('ms'), safe=False).cast(pa.int64())
    return column.to_pylist()


def text_of(value) -> str:
    """Read a cell as text: numbers without a fraction have no point, and no value is ''."""
    if isinstance(value, list):
        return ', '.join(filter(None, map(text_of, value)))
    if isinstance(value, bytes):
        value = value.decode(errors='replace')
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = '' if value is None else str(value).strip()
    return '' if text.lower() in ABSENT else text


def id_of(value) -> str | Reason:
    """Read an id: '' for none, a Reason where it is too long or not printable."""
    text = text_of(value)
    return text if len(text) <= ID_LENGTH and text.isprintable() else Reason('bad_id')
