"""Console output: progress bars and the header of a run, printed by the first process only."""

import contextlib
from collections.abc import Callable, Iterator

import jax
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tpad_jax.core import progress as progress_lib


@contextlib.contextmanager
def progress(stage: str, total: int, start: int = 0,
             console: Console | None = None) -> Iterator[Callable[..., None]]:
    """Show how much of a stage is done, in the first process only; see `core.progress`.

    Args:
      stage: its name.
      total: number of steps.
      start: steps that are done already.
      console: where to print; None: standard error.

    Yields:
      `update(step, note='')`.
    """
    if jax.process_index() != 0:
        yield lambda step, note='': None
        return
    with progress_lib.progress(stage, total, start, console) as update:
        yield update


def print_header(title: str, facts: dict, console: Console | None = None) -> None:
    """Print a title and facts in a frame.

    Args:
      title: on the frame.
      facts: {name: anything}, one line each.
      console: where to print; None: standard output.
    """
    if jax.process_index() != 0:
        return
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(Text(name, 'dim'), Text(str(value)))
    panel = Panel(grid, title=Text(title, 'bold'), title_align='left', expand=False)
    (console or Console()).print(panel)
