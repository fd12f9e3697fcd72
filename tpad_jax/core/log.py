"""The log of a run: log.jsonl and TensorBoard event files, written by the first process only."""

import contextlib
import json
import math
import os
import socket
import threading
import time
from pathlib import Path
from typing import IO

from tensorboard.compat.proto import event_pb2, summary_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from tpad_jax.core import files
from tpad_jax.errors import refuse_if, refusing

# protobuf makes these classes at import, so type checkers do not know them
Event, SessionLog = vars(event_pb2)['Event'], vars(event_pb2)['SessionLog']
Summary = vars(summary_pb2)['Summary']


class Writer:
    """Append scalars to `workdir/log.jsonl` and to event files in `workdir/events/<stage>`.

    The last line is removed at the start if a killed run did not finish it. Threads may share a
    writer: one of them at a time writes.
    """

    def __init__(self, workdir: str | Path):
        """Open the log of a run; other processes than the first write nothing."""
        import jax  # here: reading a log, as the report does, needs no jax
        self._path = Path(workdir) / 'log.jsonl'
        self._events_dir = Path(workdir) / 'events'
        self._events: dict[str, RecordWriter] = {}
        self._purge: dict[str, int] = {}  # stage -> first step that its next event file replaces
        self._lock = threading.Lock()
        self._file: IO[bytes] | None = None
        if jax.process_index() == 0:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            files.drop_partial_line(self._path)
            self._file = open(self._path, 'a+b')

    def scalars(self, stage: str, step: int, values: dict) -> None:
        """Write the numbers of one step.

        Args:
          stage: folder of the event files.
          step: of the stage.
          values: {name: number} of Python, numpy or jax; numbers of jax are fetched. Integers stay
            integers, other numbers are rounded to 6 significant digits. A number that is not
            finite is null in the log and absent from the event file.
        """
        if self._file is None:
            return
        values = {name: _significant(value) for name, value in values.items()}
        line = {'stage': stage, 'step': int(step)} | values
        with self._lock:
            self._file.write(json.dumps(line, allow_nan=False).encode() + b'\n')
            self._file.flush()
            if stage not in self._events:
                self._events[stage] = _event_file(self._events_dir / stage, self._purge.get(stage))
            scalars = [Summary.Value(tag=name, simple_value=value)
                       for name, value in values.items() if value is not None]
            _append(self._events[stage], int(step), summary=Summary(value=scalars))
            self._events[stage].flush()

    def rewind(self, stage: str, step: int) -> None:
        """Remove the entries of a stage after a step, so a resumed run has each step once.

        Log lines are removed. A new event file hides the later steps of earlier ones.

        Args:
          stage: folder of the event files.
          step: last step to keep.

        Raises:
          InputError: a line of log.jsonl is not JSON.
        """
        if self._file is None:
            return
        with self._lock:
            lines = [json.dumps(line) + '\n' for line in read_log(self._path)
                     if line['stage'] != stage or line['step'] <= step]
            self._file.close()
            files.write_text(self._path, ''.join(lines))
            self._file = open(self._path, 'a+b')
            if stage in self._events:
                self._events.pop(stage).close()
            self._purge[stage] = int(step) + 1

    def close(self) -> None:
        """Close the files; nothing can be written afterwards."""
        events, self._events = self._events, {}
        with contextlib.ExitStack() as stack:  # closes all of them, even if one raises
            for file in filter(None, (self._file, *events.values())):
                stack.callback(file.close)


def _event_file(directory, purge):
    """Open a new event file; it hides the steps of earlier files from `purge` on.

    TensorBoard's writer hands events to another thread, which a full disk ends. Then its queue
    fills up, and the run waits forever. So events are written here.
    """
    directory.mkdir(parents=True, exist_ok=True)
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'
    file = RecordWriter(open(directory / name, 'xb'))
    _append(file, purge or 0, file_version='brain.Event:2')
    if purge is not None:
        _append(file, purge, session_log=SessionLog(status=SessionLog.START))
    return file


def _append(file, step, **content):
    file.write(Event(wall_time=time.time(), step=step, **content).SerializeToString())


def read_log(path: str | Path) -> list[dict]:
    """Read a log.jsonl.

    Args:
      path: of the file.

    Returns:
      Its lines, dicts `{"stage": str, "step": int, name: number or None}`.

    Raises:
      InputError: the file does not exist, or a line is not one of a log.
    """
    path = Path(path)
    refuse_if(not path.exists(), f'{path} does not exist. Fix: give the log.jsonl of a run')
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        with refusing((ValueError, KeyError, TypeError),
                      f'{path}, line {number} is not a line of a log',
                      'Expected a JSON object with stage and step. Fix: remove the line'):
            line = json.loads(text)
            lines.append({'stage': line['stage'], 'step': line['step'], **line})
    return lines


def curves_of(path: str | Path) -> dict[str, dict[str, tuple[list[int], list[float]]]]:
    """Read the curves of a log.jsonl.

    Args:
      path: of the file.

    Returns:
      {stage: {name: (steps, values)}} of every number; null becomes nan, a gap.
    """
    stages = {}
    for line in read_log(path):
        curves = stages.setdefault(line['stage'], {})
        for name, value in line.items():
            if name in ('stage', 'step') or isinstance(value, str):
                continue
            steps, values = curves.setdefault(name, ([], []))
            steps.append(line['step'])
            values.append(math.nan if value is None else value)
    return stages


def _significant(value):
    value = value.item() if hasattr(value, 'item') else value
    if not isinstance(value, float):
        return value
    return float(f'{value:.6g}') if math.isfinite(value) else None
