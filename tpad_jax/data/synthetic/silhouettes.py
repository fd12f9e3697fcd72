"""Twelve filled silhouettes, one per planted category, as signed distance fields.

A distance field gives sharp, antialiased edges, outlines and soft shadows at any size and position.
So `rendering` can draw thousands of jittered pictograms at once.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt

from tpad_jax.data.synthetic.wording import CATEGORIES

MARGIN = 0.2  # width of the field around the unit square of the silhouettes
GRID = 140  # samples per side of the stored field
_OVERSAMPLING = 4


class _Pen:
    """Draws in the unit square, y down: 1 is inside, `cut=True` makes holes."""

    def __init__(self):
        self.side = GRID * _OVERSAMPLING
        self.image = Image.new('L', (self.side, self.side), 0)
        self.canvas = ImageDraw.Draw(self.image)

    def _scale(self, numbers):
        return [(number + MARGIN) / (1 + 2 * MARGIN) * self.side for number in numbers]

    def polygon(self, *numbers, cut=False):
        self.canvas.polygon(self._scale(numbers), fill=0 if cut else 1)

    def box(self, *corners, radius=0.0, cut=False):
        self.canvas.rounded_rectangle(
            self._scale(corners), radius / (1 + 2 * MARGIN) * self.side, fill=0 if cut else 1)

    def oval(self, *corners, cut=False):
        self.canvas.ellipse(self._scale(corners), fill=0 if cut else 1)

    def pie(self, *corners, start, end):
        self.canvas.pieslice(self._scale(corners), start, end, fill=1)


def _mug(pen):
    pen.oval(0.52, 0.28, 0.98, 0.74)
    pen.oval(0.62, 0.38, 0.88, 0.64, cut=True)
    pen.box(0.08, 0.14, 0.70, 0.88, radius=0.10)


def _bottle(pen):
    pen.box(0.39, 0.01, 0.61, 0.34, radius=0.03)
    pen.polygon(0.39, 0.24, 0.61, 0.24, 0.78, 0.44, 0.22, 0.44)
    pen.box(0.22, 0.40, 0.78, 0.99, radius=0.08)


def _shirt(pen):
    pen.polygon(0.34, 0.10, 0.66, 0.10, 0.98, 0.34, 0.86, 0.54, 0.73, 0.45, 0.73, 0.92, 0.27, 0.92,
                0.27, 0.45, 0.14, 0.54, 0.02, 0.34)
    pen.oval(0.38, -0.02, 0.62, 0.22, cut=True)


def _trousers(pen):
    pen.polygon(0.24, 0.04, 0.76, 0.04, 0.88, 0.96, 0.60, 0.96, 0.50, 0.38, 0.40, 0.96, 0.12, 0.96)


def _boot(pen):
    pen.box(0.16, 0.04, 0.56, 0.80, radius=0.05)
    pen.box(0.16, 0.48, 0.94, 0.86, radius=0.16)
    pen.box(0.16, 0.66, 0.48, 0.96, radius=0.02)
    pen.box(0.58, 0.78, 0.96, 0.92, radius=0.05)


def _hat(pen):
    pen.polygon(0.28, 0.16, 0.72, 0.16, 0.78, 0.74, 0.22, 0.74)
    pen.oval(0.28, 0.08, 0.72, 0.24)
    pen.oval(0.00, 0.62, 1.00, 0.90)


def _chair(pen):
    pen.box(0.10, 0.02, 0.40, 0.60, radius=0.06)
    pen.box(0.10, 0.40, 0.92, 0.74, radius=0.06)
    pen.box(0.12, 0.60, 0.26, 0.98, radius=0.02)
    pen.box(0.76, 0.60, 0.90, 0.98, radius=0.02)


def _lamp(pen):
    pen.polygon(0.34, 0.04, 0.66, 0.04, 0.94, 0.54, 0.06, 0.54)
    pen.box(0.44, 0.50, 0.56, 0.92)
    pen.box(0.26, 0.86, 0.74, 0.97, radius=0.05)


def _umbrella(pen):
    pen.pie(0.00, 0.06, 1.00, 1.06, start=180, end=360)
    for left in (0.0, 1 / 3, 2 / 3):
        pen.oval(left + 0.02, 0.49, left + 1 / 3 - 0.02, 0.65, cut=True)
    pen.box(0.46, 0.50, 0.54, 0.90)
    pen.oval(0.46, 0.78, 0.72, 1.00)
    pen.oval(0.54, 0.80, 0.64, 0.92, cut=True)
    pen.box(0.54, 0.76, 0.74, 0.86, cut=True)


def _bag(pen):
    pen.oval(0.26, 0.04, 0.74, 0.64)
    pen.oval(0.35, 0.13, 0.65, 0.60, cut=True)
    pen.polygon(0.12, 0.36, 0.88, 0.36, 0.98, 0.94, 0.02, 0.94)


def _clock(pen):
    pen.oval(0.02, 0.02, 0.44, 0.44)
    pen.oval(0.56, 0.02, 0.98, 0.44)
    pen.oval(0.08, 0.08, 0.92, 0.92, cut=True)
    pen.polygon(0.10, 0.99, 0.24, 0.99, 0.40, 0.78, 0.24, 0.74)
    pen.polygon(0.90, 0.99, 0.76, 0.99, 0.60, 0.78, 0.76, 0.74)
    pen.oval(0.14, 0.14, 0.86, 0.86)
    pen.box(0.46, 0.02, 0.54, 0.18)


def _kite(pen):
    pen.polygon(0.50, 0.00, 0.96, 0.36, 0.50, 0.86, 0.04, 0.36)
    pen.polygon(0.50, 0.84, 0.70, 0.84, 0.70, 1.00, 0.50, 0.92, 0.30, 1.00, 0.30, 0.84)


_SHAPES = {
    'mug': _mug, 'bottle': _bottle, 'shirt': _shirt, 'trousers': _trousers, 'boot': _boot,
    'hat': _hat, 'chair': _chair, 'lamp': _lamp, 'umbrella': _umbrella, 'bag': _bag,
    'clock': _clock, 'kite': _kite}


@lru_cache(maxsize=1)
def distance_fields():
    """Compute the signed distances to the edge of every silhouette, negative inside.

    Returns:
      float32 [12, GRID, GRID], rows y, columns x, in units of the unit square's side. The samples
      span -MARGIN..1 + MARGIN. It is made once and cannot be written to.
    """
    fields = []
    for name in CATEGORIES:
        pen = _Pen()
        _SHAPES[name](pen)
        inside = np.asarray(pen.image, bool)
        signed = distance_transform_edt(~inside) - distance_transform_edt(inside)
        blocks = signed.reshape(GRID, _OVERSAMPLING, GRID, _OVERSAMPLING).mean((1, 3))
        fields.append(blocks * (1 + 2 * MARGIN) / pen.side)
    fields = np.stack(fields).astype(np.float32)
    fields.flags.writeable = False
    return fields
