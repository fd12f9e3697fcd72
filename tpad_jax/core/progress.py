"""A progress bar on a terminal, sparse plain lines elsewhere; without jax."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

QUIET_SECONDS = 30  # between two progress lines where the output is not a terminal


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
    if not console.is_terminal:
        yield _plain_lines(name, total, start, console)
        return
    with _BARS.shown(console) as bar:
        task = bar.add_task(name, total=total, completed=start, note='')

        def update(step, note=''):
            bar.update(task, completed=step, note=note or bar.tasks[task].fields['note'])

        yield update


class _Bars:
    """The bars of all tasks that run now: a terminal has one live display, and threads share it."""

    def __init__(self):
        self._lock, self._users = threading.Lock(), 0
        self._progress: Progress | None = None

    @contextlib.contextmanager
    def shown(self, console: Console) -> Iterator[Progress]:
        with self._lock:
            if self._progress is None:
                self._progress = _bar(console)
                self._progress.start()
            bar = self._progress
            self._users += 1
        try:
            yield bar
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    bar.stop()
                    self._progress = None


_BARS = _Bars()


def _bar(console):
    return Progress(
        TextColumn('[bold]{task.description}'),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn('left'),
        TimeRemainingColumn(),
        TextColumn('{task.fields[note]}'),
        console=console,
        refresh_per_second=4,
    )


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
