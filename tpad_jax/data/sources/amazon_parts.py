"""Parts of raw Amazon files: ranges of bytes that processes read independently of each other."""

from collections.abc import Callable, Iterator
from gzip import GzipFile
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

from tpad_jax.data.untrusted import MAX_LINE, Lines, Reason


class Part(NamedTuple):
    """The lines of a file that begin in a range of its bytes.

    Attributes:
      kind: 'items' or 'events'.
      url: of the file, for workers.
      begin: number of the first byte.
      end: and after the last one. A packed file has one part.
    """

    kind: str
    url: str
    begin: int
    end: int


class PartLines(Lines):
    """The lines of a part, numbered from its beginning."""

    def __init__(self, part: Part, opened: Callable[[str], Any] = FileIO):
        """Prepare to read a part.

        Args:
          part: of a file.
          opened: opens the file by its URL.
        """
        super().__init__(Path(part.url))
        self._part, self._opened = part, opened
        self.BOM = b'' if part.begin else Lines.BOM

    def _pieces(self) -> Iterator[bytes | Reason]:
        with self.refusing(), self._opened(self._part.url) as file:
            if self.path.suffix == '.gz':
                with GzipFile(fileobj=file) as unpacked:
                    yield from self._unpacked(unpacked, file)
                return
            _, _, begin, end = self._part
            position = max(begin - 1, 0)  # a line begins at `begin` if another ends before it
            file.seek(position)
            inside = not begin
            while piece := file.read(MAX_LINE // 4):
                if not inside:
                    skipped = piece.find(b'\n') + 1
                    position += skipped or len(piece)
                    if position >= end:  # no line begins in the part
                        return
                    if not skipped:
                        continue
                    inside, piece = True, piece[skipped:]
                stop = piece.find(b'\n', max(end - 1 - position, 0)) + 1
                yield piece[:stop or len(piece)]
                if stop:
                    return
                position += len(piece)


def parts(kind: str, path: Path, url: str, step: int) -> list[Part]:
    """Divide a file.

    Args:
      kind: 'items' or 'events'.
      path: of the file, here.
      url: of the same file, for workers.
      step: bytes of a part; a packed file has one part.
    """
    size = path.stat().st_size
    step = max(size, 1) if path.suffix == '.gz' else step
    return [Part(kind, url, begin, begin + step) for begin in range(0, size, step)]
