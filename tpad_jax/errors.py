"""What ends a run before its time and is no defect: unusable input, and a signal."""


class InputError(ValueError):
    """Unusable input or config.

    The message is one sentence that names the file, line, field or key and the remedy; `launch.py`
    prints it and leaves with status 2 before anything is computed.
    """


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved. `launch.py` leaves with status 75."""
