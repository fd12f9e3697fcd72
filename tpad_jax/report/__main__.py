"""Write the page of one or several finished runs: `python -m tpad_jax.report RUN [RUN ...]`.

The page of one run is made again from its workdir. The page of several runs compares them. Nothing
is trained, and no network is used. Exit status: 0, or 2 after one sentence on unusable input.
"""

import sys
from pathlib import Path

from tpad_jax.core import cli

NAME = 'tpad_jax.report'


@cli.command(NAME, 'Writes the page of a finished run, or one that compares several.', {
    'runs': dict(nargs='+', metavar='RUN', help='workdir of a finished run'),
    '--out': dict(type=Path, metavar='FILE', help='default: RUN/report/index.html for one run, '
                  'comparison.html for several'),
})
def main(args) -> None:
    """Write the page and print its path."""
    from tpad_jax.report import page, stored  # here: --help does not wait for jax
    runs = [stored.read(path) for path in args.runs]
    for sentence in (sentence for run in runs for sentence in run.absent):
        cli.say(NAME, sentence)
    if len(runs) == 1:
        print(page.save(args.out or runs[0].path / page.FILE, 'run.html', page.context(runs[0])))
    else:
        print(page.save(args.out or Path('comparison.html'), 'compare.html', page.compared(runs)))


if __name__ == '__main__':
    sys.exit(main())
