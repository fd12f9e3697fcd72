"""Run TPAD: `python -m tpad_jax.train --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...]`.

FILE is a Python file that defines get_config(), such as configs/amazon.py. The name of a config of
this package also works, as in --config=amazon or --config=amazon:tiny. Modules that the config
names, such as one with a loss, are imported from the import path or the current directory.

Exit status: 0 done, 1 a number was not finite or a defect, 2 unusable input or config in one
sentence, 75 stopped by SIGINT or SIGTERM with the state saved; run the same command to resume.
"""

import os
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from tpad_jax.core import cli, startup
from tpad_jax.errors import InputError, refuse_if

# the configs of this package: in a checkout, and in an installed wheel
CONFIGS = (Path(__file__).parents[1] / 'configs', Path(__file__).parent / 'configs')


@cli.command('tpad_jax.train')
def main(argv: list[str]) -> None:
    """Run the job that argv describes, or plan its memory."""
    values = parse(argv, str(__doc__), _flags)
    config, workdir = values.config, values.workdir or f'runs/{values.config.name}'
    stopping = startup.begin(config.get('xla_flags', ''))
    # imported here: --help and a wrong flag do not wait for jax
    if values.plan not in (None, 'false'):
        from tpad_jax.job import memory_plan
        print(*memory_plan.lines(config, workdir, values.plan, values.plan_items), sep='\n')
        return
    if values['dry-run'].value:
        from tpad_jax.job import dry_run
        print(*dry_run.lines(config), sep='\n')
        return
    from tpad_jax.distributed import hosts
    from tpad_jax.job import job, mirror
    hosts.join(values.coordinator, values.processes, values.process)
    with mirror.kept(workdir, values.mirror):
        if values.windows:
            from tpad_jax.job import windows
            windows.run(config, workdir, values.windows, hosts.together(stopping))
            return
        job.run(config, workdir, hosts.together(stopping), profile=values.profile)


def parse(argv: Sequence[str], doc: str, define: Callable[[flags.FlagValues], None]):
    """Parse the flags of a command that runs a config.

    Args:
      argv: arguments of the command.
      doc: text that --help prints above the flags.
      define: adds the flags of the command, in addition to --config and --workdir.

    Returns:
      The absl flag values: `config` is the locked ConfigDict with all overrides.

    Raises:
      InputError: a flag, the config or a key of it is not usable.
      SystemExit: --help was printed.
    """
    if not {os.getcwd(), ''} & set(sys.path):
        sys.path.append(os.getcwd())  # for a module with a loss in the same directory as the config
    argv = ['', *_resolved(argv)]
    values = flags.FlagValues()  # not absl's global ones, which other libraries fill
    config_flags.DEFINE_config_file('config', None, 'File or name of the config; ":VARIANT" may '
                                    'follow.', flag_values=values, sys_argv=argv)
    flags.DEFINE_string('workdir', None, 'Directory of the run. Default: runs/<config.name>.',
                        flag_values=values)
    define(values)
    if {'--help', '-h', '--helpfull'} & set(argv):
        print(doc, values.get_help(), sep='\n')
        raise SystemExit(0)
    try:
        rest = values(argv)
        # a file that cannot be read raises at the first access
        name = None if values.config is None else values.config.name
    except (AttributeError, KeyError) as error:
        text = re.sub(r'[\\\'"]', '', str(error.args[0]).replace('\\n', '. '))  # a repr of a repr
        raise InputError(f'the config has no such key: {text}') from error
    except (flags.Error, ImportError, OSError, SyntaxError, TypeError, ValueError) as error:
        text, traceback, lines = str(error).strip().partition('Traceback (most recent call last)')
        # a config that raised: the last line of its traceback is the reason
        raise InputError(lines.splitlines()[-1] if traceback else text) from error
    if len(rest) > 1:
        raise InputError(f'unknown argument {rest[1]!r}. Expected flags only, such as '
                         '--config.KEY=VALUE')
    refuse_if(name is None, 'name a config, for example --config=configs/amazon.py')
    return values


def _resolved(argv):
    """Replace the bare name of a config by its file: 'amazon:tiny' -> '.../amazon.py:tiny'."""
    argv = list(argv)
    for i, argument in enumerate(argv):
        match = re.fullmatch(r'(--?config=|)(\w+)(:.*|)', argument)
        second = i > 0 and argv[i - 1] in ('-config', '--config')  # --config NAME, two arguments
        if match is None or bool(match[1]) == second or Path(match[2]).is_file():
            continue
        configs = {file.stem: file for folder in CONFIGS for file in folder.glob('[!_]*.py')}
        refuse_if(match[2] not in configs, f'--config={match[2]!r}: there is no such config. '
                  f'Expected a file, or one of {", ".join(sorted(configs))}')
        argv[i] = f'{match[1]}{configs[match[2]]}{match[3]}'
    return argv


def _flags(values):
    text, integer = (partial(define, flag_values=values)
                     for define in (flags.DEFINE_string, flags.DEFINE_integer))
    # absl allows a flag without a value for booleans only
    flags.DEFINE_flag(flags.Flag(
        flags.ArgumentParser(), flags.ArgumentSerializer(), 'plan', None,
        'Print the memory that every stage takes, and stop. --plan is for the devices of this '
        'machine; --plan=v5e-8, --plan=v6e-8 or --plan=24gib-8 name others.', boolean=True), values)
    flags.DEFINE_boolean('dry-run', False, 'Read the data, print columns, counts, examples and the '
                         'estimated time, and stop.', flag_values=values)
    integer('plan_items', None, 'With --plan: the number of items. No data are read.', 1)
    integer('windows', 0, 'Train and test so many times, each on later days: job/windows.py.', 0)
    integer('profile', 0, 'Trace and time this many steps of every stage, into WORKDIR/profile.', 0)
    # a run of several processes: each gets the same command with another --process
    text('coordinator', '', 'HOST:PORT where process 0 of several listens; none on a TPU slice.')
    integer('processes', 0, 'Number of processes.', 0)
    integer('process', -1, 'Number of this process, from 0.')
    text('mirror', '', 'Directory or gs://BUCKET/RUN that gets a copy of the workdir during the '
         'run. An empty workdir starts from it.')


if __name__ == '__main__':
    sys.exit(main())
