"""The one error a person causes and a person can mend."""


class InputError(ValueError):
    """Unusable input or config.

    The message is one sentence that names the file, line, field or key and the remedy; `launch.py`
    prints it and leaves with status 2 before anything is computed.
    """
