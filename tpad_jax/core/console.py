"""Console output: a bar on a terminal, sparse plain lines elsewhere, and the header of a run.

Only the first process prints. A process that has not imported jax is the only one.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import rich.progress as bars
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

QUIET_SECONDS = 30  # between two progress lines where the output is not a terminal
# the display of the tasks that run now, once for each: a terminal has one, which threads share
_SHARED: list[bars.Progress] = []
_LOCK = threading.Lock()


@contextlib.contextmanager
def progress(name: str, total: int, start: int = 0, console: Console | None = None
             ) -> Iterator[Callable[..., None]]:
    """Show how much of a task is done.

    Args:
      name: of the task.
      total: number of steps.
      start: steps that are done already.
      console: where to print; None: standard error.

    Yields:
      `update(step, note='')`: `step` steps are done; the note, if any, is shown after the bar. It
      is cheap enough for every step.
    """
    console = console or Console(stderr=True)
    if not _first_process():
        yield lambda step, note='': None
        return
    if not console.is_terminal:
        yield _plain_lines(name, total, start, console)
        return
    with _LOCK:
        bar = _SHARED[0] if _SHARED else bars.Progress(
            '[bold]{task.description}', bars.BarColumn(bar_width=24), bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(), 'left', bars.TimeRemainingColumn(), '{task.fields[note]}',
            console=console, refresh_per_second=4)
        _SHARED.append(bar)
        bar.start()  # once; later calls do nothing
    task = bar.add_task(name, total=total, completed=start, note='')

    def update(step, note=''):
        bar.update(task, completed=step, note=note or bar.tasks[task].fields['note'])

    try:
        yield update
    finally:
        with _LOCK:
            _SHARED.pop()
            if not _SHARED:
                bar.stop()


def say(console: Console, text: str) -> None:
    """Print a line as it is, without line breaks at the console's width."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def print_header(title: str, facts: dict, console: Console | None = None) -> None:
    """Print a title and facts in a frame.

    Args:
      title: on the frame.
      facts: {name: anything}, one line each.
      console: where to print; None: standard output.
    """
    if not _first_process():
        return
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(Text(name, 'dim'), Text(str(value)))
    panel = Panel(grid, title=Text(title, 'bold'), title_align='left', expand=False)
    (console or Console()).print(panel)


def table(title: str, heads: Iterable[str], rows: Iterable[Sequence] = (), **options) -> Table:
    """Make a table without lines, whose first column is left aligned and the others right.

    Args:
      title: above it.
      heads: of the columns.
      rows: of cells; more can be added.
      **options: of rich.
    """
    out = Table(title=title, title_justify='left', box=None, **options)
    for head in heads:
        out.add_column(head, justify='right' if out.columns else 'left', no_wrap=True)
    for row in rows:
        out.add_row(*row)
    return out


def _first_process():
    return 'jax' not in sys.modules or sys.modules['jax'].process_index() == 0


def _plain_lines(name, total, start, console):
    began = last = time.monotonic()

    def update(step, note=''):
        nonlocal last
        now = time.monotonic()
        if step < total and now - last < QUIET_SECONDS:
            return
        last = now
        left = (now - began) / max(step - start, 1) * (total - step)
        console.print(f'{name}  {step}/{total}  {note}  {left:.0f} s left', markup=False,
                      highlight=False, soft_wrap=True)

    return update
