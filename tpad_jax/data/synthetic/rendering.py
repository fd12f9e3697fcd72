"""Images of the planted catalogue: small product pictograms.

The shape is the category, its colour the colour, the pattern on it the style; brand and material
cannot be seen. Everything else (place, size, pattern phase, background, noise) is random.

A shape is stored as a signed distance field. It gives sharp, antialiased edges, outlines and soft
shadows at any size and position, so that thousands of jittered pictograms are drawn at once.
"""

import re
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt

from tpad_jax.data.synthetic.wording import CATEGORIES

SIDE, NOISE = 64, 0.12  # pixels; standard deviation
# In the order of wording.COLOURS: hues about 45 degrees apart, similar saturation.
PALETTE = np.array([
    (0.86, 0.14, 0.16), (0.96, 0.52, 0.08), (0.95, 0.84, 0.12), (0.22, 0.64, 0.22),
    (0.06, 0.70, 0.72), (0.12, 0.34, 0.86), (0.50, 0.22, 0.74), (0.96, 0.42, 0.68)], np.float32)

_SHAPE_SIDE = 52.0  # pixels of the unit square at scale 1
_SCALE = (0.90, 1.08)
_SHIFT, _OUTLINE = 3.0, 1.5  # pixels, in each direction and inside the edge
_SHADOW = (1.0, 2.0, 3.0, 0.22)  # right, down, softness in pixels, strength
_CHUNK = 256

MARGIN = 0.2  # width of the field around the unit square of the silhouettes
GRID, _OVERSAMPLING = 140, 4  # samples per side of the stored field, and pixels per sample
# Filled shapes in the unit square, in hundredths, y down, drawn in this order; 'cut' makes a hole.
# A box may have a radius of its corners after them; a dome is the upper half of an oval.
_SILHOUETTES = {
    'mug': 'oval 52 28 98 74, cut oval 62 38 88 64, box 8 14 70 88 10',
    'bottle': 'box 39 1 61 34 3, box 22 40 78 99 8, polygon 39 24 61 24 78 44 22 44',
    'shirt': 'polygon 34 10 66 10 98 34 86 54 73 45 73 92 27 92 27 45 14 54 2 34, '
             'cut oval 38 -2 62 22',
    'trousers': 'polygon 24 4 76 4 88 96 60 96 50 38 40 96 12 96',
    'boot': 'box 16 4 56 80 5, box 16 48 94 86 16, box 16 66 48 96 2, box 58 78 96 92 5',
    'hat': 'polygon 28 16 72 16 78 74 22 74, oval 28 8 72 24, oval 0 62 100 90',
    'chair': 'box 10 2 40 60 6, box 10 40 92 74 6, box 12 60 26 98 2, box 76 60 90 98 2',
    'lamp': 'polygon 34 4 66 4 94 54 6 54, box 44 50 56 92, box 26 86 74 97 5',
    'umbrella': 'dome 0 6 100 106, cut oval 2 49 31.3333 65, cut oval 35.3333 49 64.6667 65, '
                'cut oval 68.6667 49 98 65, box 46 50 54 90, oval 46 78 72 100, '
                'cut oval 54 80 64 92, cut box 54 76 74 86',
    'bag': 'oval 26 4 74 64, cut oval 35 13 65 60, polygon 12 36 88 36 98 94 2 94',
    'clock': 'oval 2 2 44 44, oval 56 2 98 44, cut oval 8 8 92 92, oval 14 14 86 86, '
             'box 46 2 54 18, polygon 10 99 24 99 40 78 24 74, polygon 90 99 76 99 60 78 76 74',
    'kite': 'polygon 50 0 96 36 50 86 4 36, polygon 50 84 70 84 70 100 50 92 30 100 30 84',
}


@lru_cache(maxsize=1)
def distance_fields():
    """Compute the signed distances to the edge of every silhouette, negative inside.

    Returns:
      float32 [12, GRID, GRID], rows y, columns x, in units of the unit square's side. The samples
      span -MARGIN..1 + MARGIN. It is made once and cannot be written to.
    """
    fields = []
    for category in CATEGORIES:
        inside = _drawn(_SILHOUETTES[category])
        signed = distance_transform_edt(~inside) - distance_transform_edt(inside)
        blocks = signed.reshape(GRID, _OVERSAMPLING, GRID, _OVERSAMPLING).mean((1, 3))
        fields.append(blocks * (1 + 2 * MARGIN) / len(inside))
    fields = np.stack(fields).astype(np.float32)
    fields.flags.writeable = False
    return fields


def _drawn(shapes):
    """Draw a silhouette of _SILHOUETTES -> bool [side, side], True inside."""
    side = GRID * _OVERSAMPLING
    image = Image.new('L', (side, side), 0)
    canvas = ImageDraw.Draw(image)
    for shape in shapes.split(', '):
        kind, numbers = re.fullmatch(r'(\D+) (.+)', shape).groups()
        fill, numbers = int('cut' not in kind), [float(x) / 100 for x in numbers.split()]
        scaled = [(number + MARGIN) / (1 + 2 * MARGIN) * side for number in numbers]
        if kind == 'polygon':
            canvas.polygon(scaled, fill)
        elif kind == 'dome':
            canvas.pieslice(scaled, 180, 360, fill)
        elif kind.endswith('oval'):
            canvas.ellipse(scaled, fill)
        else:
            canvas.rounded_rectangle(scaled[:4], sum(numbers[4:]) / (1 + 2 * MARGIN) * side, fill)
    return np.asarray(image, bool)


def _sample(fields, category, x, y):
    """Bilinear look-up at x [M, 1, W], y [M, H, 1], category [M, 1, 1] -> [M, H, W]."""
    column, row = (np.clip((place + MARGIN) / (1 + 2 * MARGIN) * GRID - 0.5, 0, GRID - 1.001)
                   for place in (x, y))
    left, top = column.astype(np.int32), row.astype(np.int32)
    right, down = column - left, row - top
    corner = (category * GRID + top) * GRID + left
    flat = fields.reshape(-1)
    above = flat[corner] * (1 - right) + flat[corner + 1] * right
    corner += GRID
    return above * (1 - down) + (flat[corner] * (1 - right) + flat[corner + 1] * right) * down


def _wave(phase):
    """A soft-edged square wave between 0 and 1, of period 1."""
    return 0.5 + 0.5 * np.clip(3 * np.sin(2 * np.pi * phase), -1, 1)


def _pattern(style, x, y):
    """The share of the second tone, 0..1, at x [M, 1, W], y [M, H, 1] pixels -> [M, H, W].

    Periods of 11 to 14 pixels are still visible under the noise after a halving to 32 x 32.
    """
    if style == 0:  # plain
        return np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32)
    if style == 1:  # striped
        return _wave((x + y) / 15.6)
    if style == 2:  # dotted
        to_dot = np.hypot(np.mod(x, 13) - 6.5, np.mod(y, 13) - 6.5)
        return np.clip(3.6 - to_dot + 0.5, 0, 1)
    if style == 3:  # checked
        return 0.5 + 0.5 * np.clip(4 * np.sin(np.pi * x / 7.5) * np.sin(np.pi * y / 7.5), -1, 1)
    return _wave(np.hypot(x, y) / 11.0)  # ringed


def _paint(attributes, uniforms, fields):
    """Noiseless pictograms. int32 [M, 5], float32 [M, 9] in [0, 1) -> float32 [M, 64, 64, 3]."""
    u = uniforms[:, :, None, None]
    pixels = np.arange(SIDE, dtype=np.float32) + 0.5
    size = _SHAPE_SIDE * (_SCALE[0] + (_SCALE[1] - _SCALE[0]) * u[:, 0])
    x = pixels[None, None, :] - SIDE / 2 - _SHIFT * (2 * u[:, 1] - 1)  # from the shape's centre
    y = pixels[None, :, None] - SIDE / 2 - _SHIFT * (2 * u[:, 2] - 1)
    category = attributes[:, 0, None, None]
    edge = size * _sample(fields, category, x / size + 0.5, y / size + 0.5)
    right, down, softness, strength = _SHADOW
    shadow = size * _sample(fields, category, (x - right) / size + 0.5, (y - down) / size + 0.5)
    shadow = strength * np.clip(0.5 - shadow / (2 * softness), 0, 1)

    second = np.empty_like(edge)
    for style in np.unique(attributes[:, 2]):
        rows = np.flatnonzero(attributes[:, 2] == style)
        # Rings stay about the centre; the other patterns start anywhere.
        reach = 3.0 if style == 4 else 16.0
        second[rows] = _pattern(style, x[rows] + reach * (u[rows, 3] - 0.5),
                                y[rows] + reach * (u[rows, 4] - 0.5))

    base = PALETTE[attributes[:, 3]][:, None, None]
    light = 1.04 - 0.10 * (y / size + 0.5)  # a touch of light from above
    tone = base + (1 - base) * 0.86 * second[..., None]
    outlined = np.clip(0.5 + edge + _OUTLINE, 0, 1)[..., None]
    shape = tone * light[..., None] * (1 - outlined) + base * 0.5 * outlined
    background = 0.84 + 0.12 * u[:, 5, ..., None] + 0.05 * (2 * uniforms[:, None, None, 6:9] - 1)
    inside = np.clip(0.5 - edge, 0, 1)[..., None]
    return background * (1 - shadow[..., None]) * (1 - inside) + shape * inside


def render(attributes, rng, noise=NOISE):
    """Draw the items' images.

    Args:
      attributes: int32 [M, 5]. Category, brand, style, colour, material.
      rng: numpy generator. The noise is drawn last, so that two levels of it show the same
        pictograms.
      noise: standard deviation of the pixel noise, per channel, in the range 0..1.

    Returns:
      uint8 [M, 64, 64, 3] RGB.
    """
    uniforms = rng.random((len(attributes), 9), np.float32)
    fields = distance_fields()
    images = np.empty((len(attributes), SIDE, SIDE, 3), np.uint8)
    for begin in range(0, len(attributes), _CHUNK):
        part = slice(begin, begin + _CHUNK)
        painted = _paint(attributes[part], uniforms[part], fields)
        painted += np.float32(noise) * rng.standard_normal(painted.shape, np.float32)
        images[part] = np.clip(painted * 255 + 0.5, 0, 255)
    return images
