"""Encode the items of a run together with it: `python -m tpad_jax.encode RUN` on further hosts.

Start the run as always, and this command on any number of other hosts that share its workdir. It
waits until a stage of the run is trained, and then makes parts of that stage's rows, see
features/store.py. A host may come, go or be lost at any time, that of the run included: the others
make its parts. The command ends when the run needs no more rows.

Exit status: 0 done, 1 a number was not finite or a defect, 2 unusable input in one sentence, 75
stopped by SIGINT or SIGTERM.
"""

import json
import sys
import time
from pathlib import Path

from tpad_jax.core import cli, startup
from tpad_jax.errors import Stopped, refusing

NAME = 'tpad_jax.encode'
LOOK = 5.0  # seconds between two looks at the files of the run


@cli.command(NAME, 'Encodes the items of a run together with its own process.', {
    'run': dict(type=Path, help='workdir of a run that has begun, which the hosts share'),
})
def main(args) -> None:
    """Help a run until all its rows are made."""
    file = args.run / 'config.json'
    with refusing((OSError, ValueError, KeyError, TypeError), f'{file} cannot be read', 'Fix: '
                  'start the run first, and name its workdir when it trains'):
        flags = json.loads(file.read_text())['config'].get('xla_flags', '')
    stopping = startup.begin(flags)
    # here: --help does not wait for jax
    from rich.console import Console

    from tpad_jax.config import MAKES, STAGES
    from tpad_jax.job import fitting, validate
    from tpad_jax.job.job import Job
    from tpad_jax.training.workdir import config_of

    config, job, first = config_of(args.run), None, {}
    stages = [stage for stage in STAGES if stage in validate.check(config)]
    for stage in [stage for stage in stages if stage in MAKES]:
        folder = args.run / 'features' / stage
        print(f'{NAME}: waits for the rows of stage {stage}', flush=True)
        while not (begun := _is_begun(folder, MAKES[stage])) and not (
                args.run / 'results.json').exists():
            if stopping():
                raise Stopped('stopped while the run trains')
            time.sleep(LOOK)
        if not begun or all((folder / f'{name}.npy').exists() for name in MAKES[stage]):
            continue
        if job is None:
            job = Job(config, args.run, stopping)
            job.build(stages, Console(quiet=True))
            first = job.params
        job.params = fitting.restored(job, first, stages[:stages.index(stage) + 1])
        job.encoders[stage].fill(job.nested(), **fitting.store_of(job, stage))
    print(f'{NAME}: the run needs no more rows')


def _is_begun(folder, names) -> bool:
    """Whether a run has begun to fill a store in parts, or has finished it."""
    from tpad_jax.features import store

    return all((folder / f'{name}.npy').exists() or (
        (folder / f'{name}.manifest.json').exists() and store.manifest(folder, name)['parts'])
               for name in names)


if __name__ == '__main__':
    sys.exit(main())
