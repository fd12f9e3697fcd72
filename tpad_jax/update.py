"""Add new items and sessions to a finished run: `python -m tpad_jax.update RUN --new DIR`.

DIR holds the same kind of files as those that the run was trained on, with new events, sessions and
items; see docs/updating.md. The result is served from then on, also by a running
`python -m tpad_jax.serve RUN`. `--rollback` serves the artefact before again.

Exit status: 0 done, 1 a number was not finite or a defect, 2 unusable input in one sentence, 75
stopped by SIGINT or SIGTERM. With any status but 0 the artefact before is served.
"""

import json
import sys
from pathlib import Path

from tpad_jax.core import cli, startup
from tpad_jax.errors import refuse_if, refusing

NAME = 'tpad_jax.update'


@cli.command(NAME, 'Adds new items and sessions to a finished run.', {
    'run': dict(type=Path, help='workdir of a finished run'),
    '--new': dict(type=Path, metavar='DIR', help="new files of the run's source"),
    '--rollback': dict(action='store_true', help='serve the artefact before the last update'),
    '--held_out': dict(type=cli.number(float, 0, 1), default=0.1,
                       help='share of the new sessions that measure the update, default 0.1'),
    '--half_life': dict(type=cli.number(float, 0), default=0.0,
                        help='days after which a session weighs half'),
    '--base': dict(default='', metavar='DIR', help="where the run's MLLM is, if it was moved"),
})
def main(args) -> None:
    """Update a run, or undo its last update."""
    refuse_if((args.new is None) != args.rollback, '--new=DIR or --rollback: expected one of them')
    file = args.run / 'config.json'
    with refusing((OSError, ValueError, KeyError, TypeError), f'{file} cannot be read', 'Fix: '
                  'name the workdir of a finished run'):
        flags = json.loads(file.read_text())['config'].get('xla_flags', '')
    stopping = startup.begin(flags)
    # here: --help does not wait for jax
    from tpad_jax.job import updating

    if args.rollback:
        print(f'served from now on: {args.run / updating.rollback(args.run)}')
        return
    drift = updating.update(args.run, args.new, held_out=args.held_out, half_life=args.half_life,
                            base=args.base, stopping=stopping)
    print(updating.line(drift))


if __name__ == '__main__':
    sys.exit(main())
