"""Run TPAD: `python -m tpad_jax.train --config=FILE [--workdir=DIR] [--config.KEY=VALUE ...]`.

FILE defines get_config(), which starts from tpad_jax.config; what it names is looked for on the
import path and in the current directory.

Exit status: 0 done, 1 a number was not finite or a defect, 2 unusable input or config in one
sentence, 75 stopped by SIGINT or SIGTERM with its state saved (the same command goes on).
"""

import os
import re
import sys
from pathlib import Path

from absl import app, flags

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's C++ remarks
os.environ.setdefault('TRANSFORMERS_VERBOSITY', 'error')

from ml_collections import config_flags

from tpad_jax.core.startup import BROKEN, STOPPED, UNUSABLE, begin
from tpad_jax.errors import UNWRITABLE, InputError, Stopped

CONFIG = config_flags.DEFINE_config_file('config', None, 'File of get_config(), ":variant" behind.')
# a value is optional, which absl allows of booleans alone
PLAN = flags.DEFINE_flag(flags.Flag(
    flags.ArgumentParser(), flags.ArgumentSerializer(), 'plan', None,
    'Print what memory every stage will take and stop: on the devices here, or on those named, '
    'as --plan=v5e-8, --plan=v6e-8 or --plan=24gib-8.', boolean=True))
PLAN_ITEMS = flags.DEFINE_integer('plan_items', None, 'With --plan: for so many items, no data '
                                  'read.')
PROFILE = flags.DEFINE_integer('profile', 0, 'Trace and time so many steps of every stage, into '
                               'WORKDIR/profile.', lower_bound=0)
# Where a run has several processes: each is started with the same command but for its number.
COORDINATOR = flags.DEFINE_string('coordinator', '', 'HOST:PORT, where process 0 of several '
                                  'listens; the hosts of a TPU slice find each other without.')
PROCESSES = flags.DEFINE_integer('processes', 0, 'How many processes there are.')
PROCESS = flags.DEFINE_integer('process', -1, 'The number of this one, from 0.')
MIRROR = flags.DEFINE_string('mirror', '', 'Where a copy of the workdir is kept while it runs, as '
                             'gs://BUCKET/RUN or a directory; an empty workdir begins with it.')
WORKDIR = flags.DEFINE_string('workdir', None, 'Where the run lives; default runs/<config name>.')


def command() -> str:
    """What a sentence about this process begins with: the file or the module that was started."""
    started = Path(sys.argv[0]).name
    return 'tpad_jax.train' if started == Path(__file__).name else started


def parse(argv):
    """The flags, or one sentence and status 2; `--help` leaves with 0."""
    if os.getcwd() not in sys.path and '' not in sys.path:
        sys.path.append(os.getcwd())  # a loss may stand beside the config
    try:
        rest = flags.FLAGS(argv)
        # a file that could not be read says so only when it is looked into
        name = None if CONFIG.value is None else CONFIG.value.name
    except SystemExit:  # absl printed the help and left, with 1
        sys.exit(0)
    except (AttributeError, KeyError) as error:
        told = re.sub(r'[\\\'"]', '', str(error.args[0]).replace('\\n', '. '))  # a repr of a repr
        refuse(f'the config has no such key: {told}')
    except (flags.Error, ImportError, OSError, SyntaxError, TypeError, ValueError) as error:
        refuse(error)
    if len(rest) > 1:
        refuse(f'unknown argument {rest[1]!r}; every setting is a flag, --config.KEY=VALUE')
    if name is None:
        refuse('name a config, for example --config=configs/amazon.py')
    return rest


def refuse(error):
    """Say what cannot be used, in one line, and leave with status 2."""
    lead, traceback, text = str(error).strip().partition('Traceback (most recent call last)')
    if traceback:  # the config raised it: its last line says why
        lead, text = '', text.splitlines()[-1]
    say(lead + text)
    sys.exit(UNUSABLE)


def say(text):
    """One line on stderr."""
    print(f'{command()}: ' + ' '.join(str(text).split()), file=sys.stderr)


def main(argv):
    """Run the job, or plan it; turn signals and refusals into exit statuses."""
    del argv
    stopping = begin(CONFIG.value.get('xla_flags', ''))
    workdir = WORKDIR.value or f'runs/{CONFIG.value.name}'
    try:
        if PLAN.value not in (None, 'false'):
            from tpad_jax.job import ahead  # here: --help and a wrong flag need no jax
            print(*ahead.lines(CONFIG.value, workdir, PLAN.value, PLAN_ITEMS.value), sep='\n')
            return
        from tpad_jax.distributed import hosts
        from tpad_jax.job import job, mirror
        hosts.join(COORDINATOR.value, PROCESSES.value, PROCESS.value)
        with mirror.kept(workdir, MIRROR.value):
            job.run(CONFIG.value, workdir, hosts.together(stopping), profile=PROFILE.value)
    except InputError as error:
        refuse(error)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        refuse(f'{error.filename or "the workdir"}: {error.strerror}; what is finished is kept: '
               'mend that, and the same command goes on from there')
    except FloatingPointError as error:
        say(error)
        sys.exit(BROKEN)
    except Stopped as stopped:
        say(f'{stopped}; the same command goes on from there')
        sys.exit(STOPPED)


if __name__ == '__main__':
    app.run(main, flags_parser=parse)
