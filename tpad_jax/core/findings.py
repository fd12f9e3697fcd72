"""The findings of a check of somebody's code, and the command line by which it is started."""

import ast
import inspect
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from tpad_jax.core import cli
from tpad_jax.errors import InputError

SIGNS = {True: 'ok', False: 'NO', None: '--'}


class Finding(NamedTuple):
    """One line.

    Attributes:
      ok: False for a breach of the contract, None for a remark.
      what: the check.
      text: what it found.
    """

    ok: bool | None
    what: str
    text: str


def raised(error: Exception, code: Callable) -> Finding:
    """Make the finding of an exception of the code under test, with its last line in that file."""
    file, frames = inspect.getsourcefile(code), traceback.extract_tb(error.__traceback__)
    lines = [f'{file}, line {frame.lineno}: ' for frame in frames if frame.filename == file]
    first, *_ = traceback.format_exception_only(error)[0].splitlines()
    return Finding(False, 'runs', ''.join(lines[-1:]) + first)


def show(findings: Iterable[Finding]) -> int:
    """Print findings as they come; return the exit status."""
    status = 0
    for finding in findings:
        print(f'{SIGNS[finding.ok]}  {finding.what:<10}  {finding.text}', flush=True)
        status = cli.UNUSABLE if finding.ok is False else status
    return status


def arguments(argv: list[str], module: str, form: str) -> tuple[str, dict[str, Any]]:
    """Read `check NAME [--KEY=VALUE ...]`.

    Args:
      argv: the arguments.
      module: of the command, for the message.
      form: of NAME, likewise.

    Returns:
      NAME, and the value of every KEY: a Python literal, or else text.

    Raises:
      InputError: they have another form.
    """
    flags = [arg.removeprefix('--').partition('=') for arg in argv if arg.startswith('--')]
    words = [arg for arg in argv if not arg.startswith('--')]
    if len(words) != 2 or words[0] != 'check' or not all(equals for _, equals, _ in flags):
        raise InputError(f'expected: check {form} [--KEY=VALUE ...]. Fix: see python -m {module} '
                         '--help')
    return words[1], {name: _literal(text) for name, _, text in flags}


def _literal(text):
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text  # usually a name
