"""Pictures of a run's items for the demo page: their files, else the pixels the MLLM read."""

import json
from pathlib import Path

import numpy as np

from tpad_jax.data import catalogue, images

ENDINGS = {'.jpg': 'image/jpeg', '.png': 'image/png'}
SIDE = 128  # pixels, both sides of the stored picture of an added item


class Pictures:
    """Bytes and media type of an item's picture, read on demand.

    Args:
      workdir: directory of the run.
    """

    def __init__(self, workdir: Path):
        self._added, self._stored = {}, None
        try:
            raw = json.loads((workdir / 'config.json').read_text())['config']['data']['raw_dir']
        except (OSError, ValueError, KeyError, TypeError):
            raw = ''
        folder = Path(raw or workdir / 'raw') / 'images'
        self._folder = folder if folder.is_dir() else None
        self._outcomes = sorted((workdir / 'data').glob('pixels-*.outcome.npy'))[:1]

    def add(self, name: str, data: bytes) -> None:
        """Store a small picture of an added item.

        Args:
          name: id of the item.
          data: bytes of the picture.
        """
        with images.quiet():
            pixels = images.decode(data, SIDE)
        if pixels is not None:
            self._added[name] = images.encode(pixels, 'PNG')

    def get(self, name: str, number: int) -> tuple[bytes, str] | None:
        """Return (bytes, media type) of an item's picture, or None.

        Args:
          name: id of the item.
          number: its row.
        """
        if name in self._added:
            return self._added[name], 'image/png'
        for ending, media in ENDINGS.items() if self._folder else ():
            file = self._folder / f'{name}{ending}'
            if file.parent == self._folder and images.unusable(file, self._folder) is None:
                return file.read_bytes(), media
        for file in self._outcomes:
            self._stored = self._stored or [np.load(x, mmap_mode='r', allow_pickle=False) for x in (
                file.with_name(file.name.replace('.outcome', '')), file)]
            pixels, outcome = self._stored
            if number < len(pixels) and outcome[number] == catalogue.DECODED:
                return images.encode(np.asarray(pixels[number]), 'PNG'), 'image/png'
        return None
