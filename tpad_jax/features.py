"""The item-feature store: named rows per item, [V+1, ...], each an .npy file with a manifest.

A file appears when it is whole. Its manifest says what made it; rows made by anything else are not
read but made anew by their stage.
"""

import json
import os
from pathlib import Path

import numpy as np

from tpad_jax.errors import InputError


class Store:
    """Rows by name under a directory: 'k', 'r' and whatever else stages leave behind."""

    def __init__(self, directory):
        self._directory = Path(directory)

    def write(self, name: str, rows: np.ndarray, made_by: dict) -> None:
        """Store rows float32 [V+1, ...] under `name`; `made_by`, JSON-able, says by what."""
        self._directory.mkdir(parents=True, exist_ok=True)
        part = self._directory / f'.{name}.{os.getpid()}.part'
        with part.open('wb') as file:
            np.save(file, np.asarray(rows, np.float32))
        os.replace(part, self._directory / f'{name}.npy')
        part.write_text(json.dumps({'shape': list(rows.shape), **made_by}, indent=1) + '\n')
        os.replace(part, self._directory / f'{name}.json')

    def holds(self, name: str, made_by: dict) -> bool:
        """Whether rows of that name, made by exactly this, are there."""
        manifest = self._directory / f'{name}.json'
        if not manifest.is_file():
            return False
        found = json.loads(manifest.read_text())
        found.pop('shape')
        return found == made_by and (self._directory / f'{name}.npy').is_file()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Rows begin..end of `name`, float32; only these are read from disk.

        Raises:
          InputError: there are none.
        """
        file = self._directory / f'{name}.npy'
        if not file.is_file():
            raise InputError(f'{file} does not exist; run the stage that makes rows {name!r} first')
        return np.array(np.load(file, mmap_mode='r')[begin:end])
