"""The page of a finished run, or of several: `python -m tpad_jax.report RUN [RUN ...]`.

Of one run its own page is made anew, from what lies in its workdir; of several one page lays them
side by side. Nothing is trained and nothing is asked of any network. Exit status: 0, or 2 after one
sentence on what cannot be used.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tpad_jax.core.startup import UNUSABLE
from tpad_jax.errors import InputError


def main(arguments: Sequence[str]) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog='python -m tpad_jax.report', allow_abbrev=False,
                                     description=__doc__.split('\n\n')[1])
    parser.add_argument('runs', nargs='+', metavar='RUN', help='workdir of a finished run')
    parser.add_argument('--out', type=Path, metavar='FILE', help='where the page is written; '
                        'default RUN/report/index.html, of several runs comparison.html here')
    given = parser.parse_args(arguments)
    from tpad_jax.report import comparison, page, stored  # here: --help needs no jax
    try:
        runs = [stored.read(path) for path in given.runs]
        for sentence in (sentence for run in runs for sentence in run.absent):
            print(f'tpad_jax.report: {sentence}', file=sys.stderr)
        if len(runs) == 1:
            file = given.out or runs[0].path / page.FILE
            page.save(file, 'run.html', **page.context(runs[0]))
        else:
            file = given.out or Path('comparison.html')
            page.save(file, 'compare.html', **comparison.context(runs))
    except InputError as error:
        print(f'tpad_jax.report: {error}', file=sys.stderr)
        return UNUSABLE
    except OSError as error:
        print(f'tpad_jax.report: {error.filename}: {error.strerror}; mend that, or choose another '
              '--out', file=sys.stderr)
        return UNUSABLE
    print(file)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
