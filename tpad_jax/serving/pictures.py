"""Pictures of a run's items for the demo page: their files, else the pixels the MLLM read."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from tpad_jax.data import images

DECODED = 1  # an outcome of data/catalogue.py
ENDINGS = {'.jpg': 'image/jpeg', '.png': 'image/png'}
SIDE = 128  # pixels, both sides of the stored picture of an added item


class Pictures:
    """Bytes and media type of an item's picture, read on demand.

    Args:
      workdir: directory of the run.
    """

    def __init__(self, workdir: Path):
        self._folder, self._pixels, self._outcome, self._added = None, None, None, {}
        try:
            raw = json.loads((workdir / 'config.json').read_text())['config']['data']['raw_dir']
        except (OSError, ValueError, KeyError, TypeError):
            raw = ''
        folder = Path(raw or workdir / 'raw') / 'images'
        self._folder = folder if folder.is_dir() else None
        outcomes = sorted((workdir / 'data').glob('pixels-*.outcome.npy'))
        self._files = [(p.with_name(p.name.replace('.outcome', '')), p) for p in outcomes][:1]

    def add(self, name: str, data: bytes) -> None:
        """Store a small picture of an added item.

        Args:
          name: id of the item.
          data: bytes of the picture.
        """
        with images.quiet():
            pixels = images.decode(data, SIDE)
        if pixels is not None:
            self._added[name] = _png(pixels)

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
        if not self._files:
            return None
        if self._pixels is None:
            self._pixels, self._outcome = (np.load(file, mmap_mode='r', allow_pickle=False)
                                         for file in self._files[0])
        if number >= len(self._pixels) or self._outcome[number] != DECODED:
            return None
        return _png(self._pixels[number]), 'image/png'


def _png(pixels) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(pixels)).save(out, 'PNG')
    return out.getvalue()
