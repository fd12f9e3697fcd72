"""Processes that parse lines of raw Amazon files, for files of which one core would take long.

msgspec and Python's own code hold the interpreter's lock, so that threads parse on one core. A
process reads a range of a file's bytes, or gets unpacked lines, and returns a table in Arrow's
format. It is not forked, imports neither jax nor tensorflow_datasets, and ends when its standard
input does.
"""

import contextlib
import gc
import io
import json
import os
import queue
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path

import polars as pl

from tpad_jax.core import startup
from tpad_jax.data.sources import amazon_blocks
from tpad_jax.data.sources.amazon_blocks import Parsed
from tpad_jax.data.sources.amazon_parts import Part, PartLines, parts
from tpad_jax.data.untrusted import Lines, Reason
from tpad_jax.errors import InputError, refuse_if

PART = 8 * 2**20  # bytes of a plain file that a process reads at once: they are in memory parsed
# bytes of a category's files from which on processes are started: they take a second to start
LARGE, LARGE_PACKED = 128 * 2**20, 16 * 2**20
MEMORY = '150 MB'
MOST = 16  # processes: one that joins their tables keeps no more of them busy
# of a process, which is one of as many as there are cores
ENVIRONMENT = {'POLARS_MAX_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1'}
PROGRAM = f'from {__name__} import serve; serve()'


class Processes:
    """Processes that parse, each one block or part at a time."""

    def __init__(self, count: int):
        """Start them.

        Args:
          count: how many.
        """
        self.count, self._idle = count, queue.SimpleQueue()
        environment = {**os.environ, **ENVIRONMENT, 'PYTHONPATH': os.pathsep.join(sys.path)}
        self._all = [subprocess.Popen([sys.executable, '-c', PROGRAM], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, env=environment)
                     for _ in range(count)]
        for process in self._all:
            self._idle.put(process)

    def __enter__(self) -> 'Processes':
        return self

    def __exit__(self, *_) -> None:
        self.end()

    def end(self) -> None:
        """End them; they are not used any more."""
        for process in self._all:
            process.kill()
            with contextlib.suppress(OSError, ValueError):  # a pipe is broken or closed
                process.communicate()

    def work(self, kind: str, lines: Lines) -> Iterable[Part | bytes | Reason]:
        """Divide a file into what `parse` takes.

        Args:
          kind: 'items' or 'events'.
          lines: of the file.
        """
        if lines.path.suffix == '.gz':
            return _ahead(lines.blocks(), self.count)
        return parts(kind, lines.path, str(lines.path), PART)

    def parse(self, work: Part | bytes | Reason, kind: str, form: str) -> Parsed:
        """Let a process parse lines, as `amazon_blocks.parse` does here.

        Args:
          work: of `work`.
          kind: 'items' or 'events'.
          form: '2018' or '2023'.

        Raises:
          InputError: the file cannot be read, or the process was killed.
        """
        if isinstance(work, Reason):
            return amazon_blocks.parse(work, kind, form)
        block = isinstance(work, bytes)
        process = self._idle.get()
        try:
            process.stdin.write(json.dumps([kind, form, len(work) if block else work]).encode()
                                + b'\n')
            process.stdin.write(work if block else b'')
            process.stdin.flush()
            told = json.loads(process.stdout.readline())
            table = process.stdout.read(told['bytes'])
            refuse_if(told['refused'], told['refused'])
            table = pl.read_ipc(table)
        except (OSError, ValueError, pl.exceptions.PolarsError) as error:
            if isinstance(error, InputError):
                raise
            for pipe in (process.stdin, process.stdout):  # so that it ends in any case
                with contextlib.suppress(OSError):
                    pipe.close()
            status = process.wait()
            refuse_if(status < 0, f'a process that read {kind} of raw files was killed by signal '
                      f'{-status}. Expected none, and {MEMORY} of memory for it. Fix: free memory '
                      'and start again.')
            # its own words are on standard error
            raise RuntimeError(f'a process that read raw files ended with {status}') from error
        finally:
            self._idle.put(process)
        values = (table, told['unused']) if kind == 'items' else table
        return Parsed(told['number'], values,
                      [(position, Reason(reason)) for position, reason in told['rejected']])


def started(paths: Iterable[Path]) -> contextlib.AbstractContextManager[Processes | None]:
    """Start processes if files are large and there are several cores.

    Args:
      paths: of the files.

    Returns:
      A context with the processes, which end with it; with None, where this process reads.
    """
    large = sum(path.stat().st_size / (LARGE_PACKED if path.suffix == '.gz' else LARGE)
                for path in paths) >= 1
    cores = startup.cores()
    return Processes(min(cores, MOST)) if large and cores > 1 else contextlib.nullcontext()


def serve() -> None:
    """Parse what standard input names, until it ends, and write tables to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal; who started this one decides
    gc.disable()  # records have no circles
    answers = sys.stdout.buffer
    for line in sys.stdin.buffer:
        kind, form, work = json.loads(line)
        table, told = io.BytesIO(), {'refused': ''}
        try:
            blocks = ([sys.stdin.buffer.read(work)] if isinstance(work, int)
                      else PartLines(Part(*work)).blocks())
            told |= _parsed(blocks, kind, form, table)
        except InputError as error:
            told['refused'] = str(error)
        told['bytes'] = table.tell()
        answers.write(json.dumps(told).encode() + b'\n')
        answers.write(table.getbuffer())
        answers.flush()


def _parsed(blocks: Iterable[bytes | Reason], kind: str, form: str, file: io.BytesIO) -> dict:
    """Parse blocks into one table, which is written to a file, and the counts of their lines."""
    number, rows, tables, rejected, unused = 0, 0, [], [], []
    for block in chain([b''], blocks):  # a part in which no line begins has no block
        parsed = amazon_blocks.parse(block, kind, form)
        table, missing = parsed.values if kind == 'items' else (parsed.values, [])
        rejected += [(number + position, reason) for position, reason in parsed.rejected]
        unused += [(rows + row, what) for row, what in missing]
        tables.append(table)
        number, rows = number + parsed.number, rows + len(table)
    pl.concat(tables).write_ipc(file)
    return {'number': number, 'rejected': rejected, 'unused': unused}


def _ahead(values: Iterable, most: int) -> Iterator:
    """Yield values, which are not None and which a thread makes some steps ahead."""
    with ThreadPoolExecutor(1) as pool:
        steps = partial(pool.submit, next, iter(values), None)
        waiting = deque(steps() for _ in range(most))
        while (value := waiting.popleft().result()) is not None:
            waiting.append(steps())
            yield value
