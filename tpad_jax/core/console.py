"""Console output: progress bars and the header of a run, printed by the first process only."""

import contextlib
import time

import jax
from rich.console import Console
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

QUIET_SECONDS = 30  # between two progress lines where the output is not a terminal


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
