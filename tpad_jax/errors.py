"""Exceptions that end a command and are not defects: unusable input, and a signal."""

import contextlib
import errno
from collections.abc import Iterator


class InputError(ValueError):
    """Unusable input or config.

    The message is one sentence that names the file, line, field or key, the rule and the fix. A
    command prints it and exits with status 2 before anything is computed.
    """


def refuse_if(broken, message: str) -> None:
    """Raise InputError with a message if a rule is broken.

    Args:
      broken: whether it is.
      message: see `InputError`.

    Raises:
      InputError: it is.
    """
    if broken:
        raise InputError(message)


# Error numbers of a disk or directory that takes no more data: full, too large or read-only.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class Stopped(Exception):
    """A signal asked the run to stop, and its state is saved. A command exits with status 75."""


@contextlib.contextmanager
def refusing(kinds: type[Exception] | tuple[type[Exception], ...], problem: str,
             fix: str) -> Iterator[None]:
    """Turn the errors of a block into one InputError; an InputError of the block stays as it is.

    Args:
      kinds: types of the errors. Errors of other types are defects and pass.
      problem: what is wrong. The error's type and first line follow in brackets.
      fix: sentences after that.

    Raises:
      InputError: the block raised one of `kinds`.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        reason = str(error).partition('\n')[0]
        raise InputError(f'{problem} ({type(error).__name__}: {reason}). {fix}') from error
