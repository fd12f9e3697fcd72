"""Prepare tables: `python -m tpad_jax.data.prepare RAW_DIR WORKDIR/data [--runner=DirectRunner]`.

A run with that WORKDIR, that raw folder and the same options finds its tables finished. The tables
of any runner of Apache Beam equal, byte for byte, those that are made without it. After a stop or a
kill no table is there that a run would read; the same command starts over.

Exit status: 0 done, 1 a defect, 2 unusable input, in one sentence, 75 stopped by a signal.
"""

import sys
import uuid
from functools import partial
from pathlib import Path

from tpad_jax import config
from tpad_jax.core import cli
from tpad_jax.errors import refuse_if, refusing

NAME = 'tpad_jax.data.prepare'
LOCAL = 'local'
OPTIONS = 'gap_hours', 'core', 'min_length', 'valid', 'test', 'seed', 'bad_share'
PLACES = {'raw_url': 'the folder of raw files as workers reach it, default RAW_DIR',
          'temp_url': 'a folder that workers write to and this machine reads, default in TABLES'}
ARGUMENTS = {
    'raw_dir': dict(metavar='RAW_DIR', type=Path, help='folder of one category\'s raw files'),
    'tables': dict(metavar='TABLES', type=Path, help='folder to write to: data in a workdir'),
    '--runner': dict(default=LOCAL, help='local (no Beam, the default) or a runner of Apache Beam, '
                     'such as DirectRunner, FlinkRunner, SparkRunner or DataflowRunner'),
    '--beam_option': dict(action='append', default=[], metavar='NAME=VALUE',
                          help='an option of Beam or its runner; may be repeated'),
    **{f'--{name}': dict(default='', help=text) for name, text in PLACES.items()},
    **{f'--{name}': dict(type=cli.number(type(value), 0), default=value,
                         help=f'as config.data.{name}, default %(default)s')
       for name, value in config.get_config().data.items() if name in OPTIONS},
}


@cli.command(NAME, 'Prepares the raw files of an Amazon category.', ARGUMENTS)
def main(args) -> None:
    """Prepare the tables and print the counts of lines."""
    beamed = ('beam_option', *PLACES)
    refuse_if(args.runner == LOCAL and any(getattr(args, name) for name in beamed),
              f'--runner={LOCAL}: no Beam runs. Expected none of --{", --".join(beamed)}. Fix: '
              'leave them out, or name a runner')
    if args.runner != LOCAL:
        with refusing((ImportError, ValueError, AttributeError), f'--runner={args.runner!r}: no '
                      'such runner', f'Expected {LOCAL} or a runner of Apache Beam. Fix: pip '
                      'install "tpad_jax[beam]", or correct the name'):
            import apache_beam
            apache_beam.runners.create_runner(args.runner)
    # here: --help and a wrong flag do not wait for the readers of raw files
    from tpad_jax.data.sources import amazon_tables
    read = None
    if args.runner != LOCAL:
        from tpad_jax.data.prepare import pipeline
        own = args.tables.resolve() / amazon_tables.Amazon.name
        flags = [f'--{option}' for option in (f'runner={args.runner}', *args.beam_option)]
        read = partial(
            pipeline.read, args.raw_dir, own / amazon_tables.TEXTS, args.bad_share, flags,
            args.raw_url.rstrip('/') or str(args.raw_dir.resolve()),
            f'{args.temp_url.rstrip("/") or own}/{uuid.uuid4().hex}')
    amazon_tables.prepare(args.raw_dir, args.tables, read=read,
                          **{name: getattr(args, name) for name in OPTIONS})
    lines = amazon_tables.read_finished(args.tables)['lines']
    print(f'read: {lines["read"]} lines\nkept: {lines["kept"]} lines')
    for reason, count in lines['rejected'].items():
        print(f'rejected, {reason}: {count} lines')


if __name__ == '__main__':
    sys.exit(main())
