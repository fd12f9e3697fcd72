"""The log of a run: log.jsonl and TensorBoard event files, written by the first process only."""

import contextlib
import json
import math
import os
import socket
import time
from pathlib import Path

import jax
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from tpad_jax.core import files
from tpad_jax.errors import InputError

FLUSH_SECONDS = 10  # between two flushes of an event file


class Writer:
    """Appends scalars to `workdir/log.jsonl` and to event files in `workdir/events/<stage>`.

    A last line that a killed run left unfinished is removed when the writer is made.
    """

    def __init__(self, workdir):
        self._path = Path(workdir) / 'log.jsonl'
        self._events_dir = Path(workdir) / 'events'
        self._events, self._purge = {}, {}
        self._file = None
        if jax.process_index() == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._path, 'a+b')
            self._drop_unfinished_line()

    def scalars(self, stage, step, values):
        """Writes one step's numbers.

        Args:
          stage: str, the folder of the event files.
          step: int.
          values: {name: number}, numbers of Python, numpy or jax (which are fetched). Integers stay
            integers, others are rounded to 6 significant digits; one that is not finite is null
            in the log and absent from the event file.
        """
        if self._file is None:
            return
        values = {name: _significant(value) for name, value in values.items()}
        line = {'stage': stage, 'step': int(step)} | values
        self._file.write(json.dumps(line, allow_nan=False).encode() + b'\n')
        self._file.flush()
        if stage not in self._events:
            self._events[stage] = _Events(self._events_dir / stage, self._purge.get(stage))
        self._events[stage].scalars(int(step), {
            name: value for name, value in values.items() if value is not None})

    def rewind(self, stage, step):
        """Forgets what `stage` wrote after `step`, so that each step stands once after a resume.

        Log lines are removed; event files are told to show nothing from there on.

        Raises:
          InputError: a line of log.jsonl is not JSON.
        """
        if self._file is None:
            return
        kept = [
            json.dumps(line) + '\n'
            for line in read_log(self._path)
            if line['stage'] != stage or line['step'] <= step
        ]
        self._file.close()
        files.write_text(self._path, ''.join(kept))
        self._file = open(self._path, 'a+b')
        if stage in self._events:
            self._events.pop(stage).close()
        self._purge[stage] = int(step) + 1

    def close(self):
        """Closes the files; nothing more can be written."""
        events, self._events = self._events, {}
        with contextlib.ExitStack() as stack:  # all of them, whatever one raises
            if self._file is not None:
                stack.callback(self._file.close)
            for file in events.values():
                stack.callback(file.close)

    def _drop_unfinished_line(self):
        self._file.seek(0)
        text = self._file.read()
        if not text.endswith(b'\n'):
            self._file.truncate(text.rfind(b'\n') + 1)


class _Events:
    """One event file, written here and now.

    TensorBoard's own writer hands everything to a thread, which a full disk ends; then its queue
    fills up and the run stands still.
    """

    def __init__(self, directory, purge):
        directory.mkdir(parents=True, exist_ok=True)
        name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'
        self._file, self._flushed = RecordWriter(open(directory / name, 'xb')), 0.0
        self._write(purge or 0, file_version='brain.Event:2')
        if purge is not None:
            self._write(purge, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step, values):
        for name, value in values.items():
            self._write(step, summary=Summary(value=[Summary.Value(tag=name, simple_value=value)]))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self):
        self._file.close()

    def _write(self, step, **what):
        self._file.write(Event(wall_time=time.time(), step=step, **what).SerializeToString())


def read_log(path):
    """The lines of a log.jsonl, dicts `{"stage": str, "step": int, name: number or None}`.

    Raises:
      InputError: there is no such file, or a line is not one of a log.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f'{path} does not exist; give the log.jsonl of a run')
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            line = json.loads(text)
            line['stage'], line['step']
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{path}, line {number} is not a log line (a JSON object with stage and step); '
                'remove the line'
            ) from error
        lines.append(line)
    return lines


def curves_of(log_path):
    """{stage: {name: (steps, values)}} of every number in a log.jsonl; null becomes nan, a gap."""
    found = {}
    for line in read_log(log_path):
        curves = found.setdefault(line['stage'], {})
        for name, value in line.items():
            if name in ('stage', 'step') or isinstance(value, str):
                continue
            steps, values = curves.setdefault(name, ([], []))
            steps.append(line['step'])
            values.append(math.nan if value is None else value)
    return found


def _significant(value):
    value = value.item() if hasattr(value, 'item') else value
    if not isinstance(value, float):
        return value
    return float(f'{value:.6g}') if math.isfinite(value) else None
