"""The command of benchmarks/systems: runs the cells that are missing and prints the tables."""

import os
import sys
from pathlib import Path

from absl import app, flags
from rich.console import Console

from benchmarks import systems
from tpad_jax.core.cli import STOPPED
from tpad_jax.core.startup import begin
from tpad_jax.errors import Stopped

FLAGS = flags.FLAGS


def main(argv):
    """Run and print the named systems, or all."""
    known = systems.names()
    if unknown := set(argv[1:]) - set(known):
        sys.exit(f'benchmarks.systems: {", ".join(sorted(unknown))} has no benchmark. Expected '
                 f'some of {", ".join(known)}')
    # cells are many and alike: programs that one compiles are found by the others
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(
        Path(FLAGS.workdir, 'compiled').absolute()))
    stopping = begin('')
    for name in argv[1:] or known:
        try:
            if not FLAGS.show:
                systems.run(name, Path(FLAGS.workdir), stopping,
                            dict(entry.split('=', 1) for entry in FLAGS.data))
        except Stopped as stopped:
            print(f'benchmarks.systems: {stopped}; the same command resumes', file=sys.stderr)
            sys.exit(STOPPED)
        systems.show(name, Console(width=180))


if __name__ == '__main__':
    flags.DEFINE_string('workdir', 'runs/systems', 'where the runs live')
    flags.DEFINE_list('data', '', 'directories of data sets, NAME=DIR')
    flags.DEFINE_bool('show', False, 'print the tables of the finished cells, run nothing')
    app.run(main)
