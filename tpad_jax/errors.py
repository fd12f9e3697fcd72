"""What ends a run before its time and is no defect: unusable input, and a signal."""

import errno


class InputError(ValueError):
    """Unusable input or config.

    The message is one sentence that names the file, line, field or key and the remedy; `launch.py`
    prints it and leaves with status 2 before anything is computed.
    """


# What the system calls a place that nothing more can be written to: full, too large, or read-only.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved. `launch.py` leaves with status 75."""
