"""What a run says: log.jsonl and event files, a progress bar, tables, results.json.

Of several processes only the first writes and speaks.
"""

import contextlib
import json
import math
import os
import socket
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from tpad_jax.errors import InputError

FLUSH_SECONDS = 10  # between two of an event file
QUIET_SECONDS = 30  # between two lines of progress where the output is no terminal


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
        _replace(self._path, ''.join(kept))
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


def write_json(path, value):
    """Writes `value` to `path` at once or not at all.

    Floats are rounded to 6 digits after the point, integers stay integers, what is not finite
    becomes null, numpy and jax scalars become numbers, tuples and arrays lists.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace(path, json.dumps(_plain(value), indent=1, allow_nan=False) + '\n')


@contextlib.contextmanager
def progress(stage, total, start=0, console=None):
    """A progress bar over steps `start`..`total`, or sparse plain lines where there is no terminal.

    Yields:
      `update(step, losses="")`: says that `step` steps are done, with a short text behind the bar.
      Cheap enough for every step.
    """
    console = console or Console(stderr=True)
    if jax.process_index() != 0:
        yield lambda step, losses='': None
    elif console.is_terminal:
        with _bar(console) as bar:
            task = bar.add_task(stage, total=total, completed=start, losses='')

            def update(step, losses=''):
                bar.update(task, completed=step, losses=losses or bar.tasks[task].fields['losses'])

            yield update
    else:
        yield _plain_lines(stage, total, start, console)


def shares(results):
    """Each model's share of what the oracle can hit: {model: {"all" | "warm" | "cold": share}}.

    A share is expected_hit@20 over the oracle's; NaN where either is missing or the oracle has 0.
    """
    oracle = _expected(results.get('oracle') or {})
    return {
        name: {
            key: value / oracle[key] if oracle[key] > 0 else math.nan
            for key, value in _expected(model.get('test', {})).items()
        }
        for name, model in results['models'].items()
    }


def table(results):
    """All models of `results` (as in results.json) on the test rows, a rich Table, in percent.

    hit, mrr, ndcg at 20; where the catalogue is planted, expected hit and shares of the oracle over
    all, warm and cold targets; else hit at 20 of warm and cold targets. The best of a column but
    the oracle's is bold.
    """
    tests = {name: model.get('test', {}) for name, model in results['models'].items()}
    planted = any('expected_hit@20' in test for test in tests.values())
    rows = {name: _row(test, planted) for name, test in tests.items()}
    if planted:
        for name, share in shares(results).items():
            rows[name] += [100 * share[key] for key in ('all', 'warm', 'cold')]
    heads = ['hit@20', 'mrr@20', 'ndcg@20']
    if planted:
        heads += ['expected', 'of oracle', 'warm', 'cold']
    else:
        heads += ['hit warm', 'hit cold']
    made = Table(title='Test rows, %', title_justify='left', header_style='bold', box=None)
    made.add_column('model', no_wrap=True)
    for head in heads:
        made.add_column(head, justify='right', no_wrap=True)
    best = [
        max((f'{value:.2f}' for value in column if math.isfinite(value)), key=float, default=None)
        for column in zip(*rows.values(), strict=True)
    ]
    for name, row in rows.items():
        cells = [_cell(value) for value in row]
        bold = [f'[bold]{c}[/]' if c == b else c for c, b in zip(cells, best, strict=True)]
        made.add_row(escape(name), *bold)
    if planted and results.get('oracle'):
        row = [*_row(results['oracle'], planted), 100.0, 100.0, 100.0]
        made.add_row('oracle', *[_cell(value) for value in row], style='dim')
    return made


def print_header(title, facts, console=None):
    """Prints `title` and, one line each, the pairs of `facts` ({name: anything}) in a frame."""
    if jax.process_index() != 0:
        return
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(Text(name, 'dim'), Text(str(value)))
    panel = Panel(grid, title=Text(title, 'bold'), title_align='left', expand=False)
    (console or Console()).print(panel)


def _bar(console):
    return Progress(
        TextColumn('[bold]{task.description}'),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
        TextColumn('{task.fields[losses]}'),
        console=console,
        refresh_per_second=4,
    )


def _plain_lines(stage, total, start, console):
    began = spoke = time.monotonic()

    def update(step, losses=''):
        nonlocal spoke
        now = time.monotonic()
        if step < total and now - spoke < QUIET_SECONDS:
            return
        spoke = now
        left = (now - began) / max(step - start, 1) * (total - step)
        text = f'{stage}  {step}/{total}  {losses}  {left:.0f} s left'
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    return update


def _expected(scores):
    slices = scores.get('slices') or {}
    parts = {'all': scores, 'warm': slices.get('warm') or {}, 'cold': slices.get('cold') or {}}
    return {key: _or_nan(part.get('expected_hit@20')) for key, part in parts.items()}


def _row(scores, planted):
    row = [_or_nan(scores.get(key)) for key in ('hit@20', 'mrr@20', 'ndcg@20')]
    if planted:
        row.append(_or_nan(scores.get('expected_hit@20')))
    else:
        slices = scores.get('slices') or {}
        row += [_or_nan((slices.get(key) or {}).get('hit@20')) for key in ('warm', 'cold')]
    return [100 * value for value in row]


def _or_nan(value):
    return math.nan if value is None else value


def _cell(value):
    return f'{value:.2f}' if math.isfinite(value) else '-'


def _significant(value):
    value = value.item() if hasattr(value, 'item') else value
    if not isinstance(value, float):
        return value
    return float(f'{value:.6g}') if math.isfinite(value) else None


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, 'tolist'):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value


def _replace(path, text):
    part = path.with_name(path.name + '.part')
    part.write_text(text)
    os.replace(part, path)
