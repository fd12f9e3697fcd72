"""Console output: progress bars and the header of a run, printed by the first process only."""

import contextlib

import jax
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tpad_jax.core import progress as progress_lib


@contextlib.contextmanager
def progress(stage, total, start=0, console=None):
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


def print_header(title, facts, console=None):
    """Prints `title` and, one line each, the pairs of `facts` ({name: anything}) in a frame."""
    if jax.process_index() != 0:
        return
    grid = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        grid.add_row(Text(name, 'dim'), Text(str(value)))
    panel = Panel(grid, title=Text(title, 'bold'), title_align='left', expand=False)
    (console or Console()).print(panel)
