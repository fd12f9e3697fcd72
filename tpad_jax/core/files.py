"""Files that are written completely or not at all."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path

PARTIAL = '.partial'  # suffix of a file that is not finished; nothing reads or copies one


@contextlib.contextmanager
def replacing(path: str | Path, token: str = '') -> Iterator[Path]:
    """Write a file completely or not at all.

    Args:
      path: the file to create or replace. Its directory is created if absent.
      token: of this process, where several may write the same file.

    Yields:
      The path to write to, `path` with the suffix PARTIAL in the same directory. It replaces `path`
      when the block ends without an error and is removed otherwise.
    """
    path = Path(path)
    partial = path.with_name(path.name + (token and f'.{token}') + PARTIAL)
    path.parent.mkdir(parents=True, exist_ok=True)
    if partial.is_symlink():  # it would be written through
        partial.unlink()
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file in hex."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


def drop_partial_line(path: str | Path) -> None:
    """Cut the last line of a file if a kill or a full disk left it unfinished."""
    if Path(path).is_file():
        with Path(path).open('r+b') as file:
            file.truncate(file.read().rfind(b'\n') + 1)


def write_json(path, value):
    """Write a JSON file completely or not at all.

    Integers stay integers, NumPy and JAX scalars become numbers, tuples and arrays become lists,
    and a float that is not finite becomes null. Other floats keep 6 decimals, and below 0.001
    they keep 6 significant digits, so that 1e-7 does not read 0.

    Args:
      path: the file to create or replace. Its directory is created if absent.
      value: nested dicts, lists, arrays, numbers and strings.

    Raises:
      TypeError: JSON cannot hold `value`.
    """
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + '\n')


def write_text(path, text):
    """Write `text` to `path` at once or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding='utf-8')


def write_tensors(path, arrays, metadata=None):
    """Write a .safetensors file completely or not at all.

    Args:
      path: the file to create or replace.
      arrays: {name: array of numpy or jax}.
      metadata: {name: anything that JSON can hold}, or None.
    """
    import numpy as np  # here: a command sets up memory before numpy is imported
    from safetensors.numpy import save_file
    # np.ascontiguousarray would give a scalar the shape (1,)
    arrays = {name: np.asarray(array, order='C') for name, array in arrays.items()}
    with replacing(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode  # safetensors writes files that only the owner can read
        save_file(arrays, partial, metadata and {n: json.dumps(x) for n, x in metadata.items()})
        partial.chmod(mode)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, 'tolist'):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return None
    return round(value, 6) if abs(value) >= 1e-3 else float(f'{value:.6g}')
