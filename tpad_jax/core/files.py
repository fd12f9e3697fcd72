"""Files that are written completely or not at all."""

import json
import math
import os
from pathlib import Path


def write_json(path, value):
    """Writes `value` to `path` at once or not at all.

    Floats are rounded to 6 digits after the point, integers stay integers, what is not finite
    becomes null, numpy and jax scalars become numbers, tuples and arrays lists.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_plain(value), indent=1, allow_nan=False) + '\n')


def write_text(path, text):
    """Writes `text` to `path` at once or not at all."""
    part = path.with_name(path.name + '.part')
    part.write_text(text)
    os.replace(part, path)


def _plain(value):
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, 'tolist'):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else None
    return value
