"""The frame of every command: arguments, refusals, signals and exit statuses."""

import argparse
import errno
import functools
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from tpad_jax.errors import UNWRITABLE, InputError, Stopped

BROKEN, UNUSABLE, STOPPED = 1, 2, 75  # exit statuses
# how jax begins to complain of its environment variables
ENVIRONMENT = ('Unable to initialize backend', 'Invalid value', 'invalid truth value')
RULE = '-' * 20  # begins the note by which jax explains the traceback of what is raised in a trace
# error numbers of a path that the user must change: UNWRITABLE, or another file is in the way
BLOCKED = (*UNWRITABLE, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


class Parser(argparse.ArgumentParser):
    """A parser that refuses a wrong command line in one sentence, as every other input."""

    def __init__(self, module: str, description: str, arguments: dict[str, dict] | None = None):
        """Make a parser for `python -m MODULE`.

        Args:
          module: its name.
          description: one line.
          arguments: {name or flag: options of `add_argument`}.
        """
        super().__init__(prog=f'python -m {module}', description=description, allow_abbrev=False)
        for name, options in (arguments or {}).items():
            self.add_argument(name, **options)

    def error(self, message):
        """Raise InputError in place of the usage text on several lines."""
        raise InputError(f'{message}. Fix: see {self.prog} --help')


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """Make the `type` of an argument with a range.

    Args:
      kind: int or float.
      least: the smallest value.
      most: the largest value.

    Returns:
      A function that reads the text of the argument. It refuses nan and values out of range.
    """
    def read(text):
        value = kind(text)
        if not least <= value <= most:
            limit = f'{least} or more' if most == math.inf else f'from {least} to {most}'
            raise argparse.ArgumentTypeError(f'{text}: out of range. Expected {limit}')
        return value

    read.__name__ = {int: 'integer', float: 'number'}[kind]  # argparse names it: "invalid integer"
    return read


def command(name: str, description: str = '', arguments: dict[str, dict] | None = None
            ) -> Callable[[Callable[[Any], int | None]], Callable[..., int]]:
    """Turn the errors of a main function into one sentence on stderr and an exit status.

    The function gets the parsed arguments, or all of them as a list where none are declared, and
    may return a status. InputError and places that cannot be written are status 2, a number that is
    not finite is 1, and a signal is 75. A reader that closes the pipe ends the command quietly.
    Other errors are defects; they keep their traceback.

    Args:
      name: first word of every message.
      description: one line for --help; '': the function parses the arguments.
      arguments: as in `Parser`.

    Returns:
      A decorator. The decorated function takes the arguments, by default those of the process, and
      optionally another name; it returns the status.
    """
    def decorate(main: Callable[[Any], int | None]) -> Callable[..., int]:
        @functools.wraps(main)
        def run(argv: Sequence[str] | None = None, name: str = name) -> int:
            if argv is None:
                argv = sys.argv[1:]
                # a command that does not poll for signals ends at the first one, like Ctrl-C
                signal.signal(signal.SIGTERM, signal.default_int_handler)
            try:
                parser = description and Parser(name, description, arguments)
                status = main(parser.parse_args(argv) if parser else list(argv))
                sys.stdout.flush()  # here, where a closed pipe is handled
                return status or 0
            except (InputError, FloatingPointError) as error:
                return say(name, error, UNUSABLE if isinstance(error, InputError) else BROKEN)
            except (RuntimeError, ValueError) as error:
                if not str(error).startswith(ENVIRONMENT) or 'jax' not in str(error).lower():
                    raise
                return say(name, f'{error}. Fix: correct or unset that variable', UNUSABLE)
            except Stopped as error:
                error.add_note('run the same command again to resume')
                return say(name, error, STOPPED)
            except KeyboardInterrupt:
                return say(name, 'stopped by a signal', STOPPED)
            except BrokenPipeError:
                # Python would report the pipe again when it flushes stdout at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 0
            except OSError as error:
                if error.errno not in BLOCKED:
                    raise
                path = error.filename2 or error.filename or 'the output'
                return say(name, f'{path}: {error.strerror}; finished work is kept. Fix: make room '
                           'or choose another place, then run the same command again', UNUSABLE)

        return run

    return decorate


def say(name: str, text: object, status: int = 0) -> int:
    """Print one line on stderr.

    Args:
      name: of the command.
      text: the message, or an error, whose notes follow. Line breaks become spaces.
      status: passed through.

    Returns:
      `status`.
    """
    notes = [note for note in getattr(text, '__notes__', []) if RULE not in note]
    text = '; '.join([str(text), *notes])
    print(f'{name}: ' + ' '.join(text.split()), file=sys.stderr, flush=True)
    return status
