"""The item-feature store: named rows per item, [V+1, ...], each an .npy file with a manifest."""

import json
import os
from pathlib import Path

import numpy as np


def write(directory, name: str, rows: np.ndarray, made_by: dict) -> None:
    """Store rows float32 [V+1, ...] as directory/name.npy; a file appears when it is whole.

    The manifest name.json beside it holds the shape and `made_by`, which is JSON-able.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    part = directory / f'.{name}.{os.getpid()}.part'
    with part.open('wb') as file:
        np.save(file, np.asarray(rows, np.float32))
    os.replace(part, directory / f'{name}.npy')
    part.write_text(json.dumps({'shape': list(rows.shape), **made_by}, indent=1) + '\n')
    os.replace(part, directory / f'{name}.json')
