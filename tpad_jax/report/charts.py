"""Computes where every part of a chart is, in the units of an SVG's viewBox; templates write it.

A chart is a dict that the macro `chart` reads: ticks, curves as paths, and the numbers they were
drawn from, which the page's script shows under a pointer.
"""

import math
from typing import NamedTuple

import numpy as np

POINTS = 250  # of a curve at most: more cannot be distinguished on a page
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 28  # room around the axes


class Curve(NamedTuple):
    """A curve of a chart.

    Attributes:
      name: in the legend.
      x: numbers.
      y: as many numbers; nan is a gap.
      colour: 0..7, or None for ink.
      source: 'stage name' of the log, or a model.
      pale: whether it is dotted and absent from the legend.
      dashed: whether it is dashed.
      circles: (x, y, moment) of open circles.
    """

    name: str
    x: list
    y: list
    colour: int | None
    source: str = ''
    pale: bool = False
    dashed: bool = False
    circles: tuple = ()


def chart(title: str, curves: list[Curve], *, x: str = 'step', unit: str = '', wide: bool = False,
          at: float | None = None) -> dict:
    """Lay out a line chart.

    Args:
      title: heading.
      curves: one or more curves.
      x: name of the horizontal axis.
      unit: of the values. '%': they are shares, and the vertical axis begins at 0.
      wide: whether the chart fills the page's width.
      at: x at which the legend reads the curves first, if they reach it; None: their ends.
    """
    width, height = (640, 330) if wide else (240, 170)
    share, kept = unit == '%', []
    for curve in curves:
        some = np.linspace(0, len(curve.x) - 1, min(len(curve.x), POINTS)).round().astype(int)
        kept.append(curve._replace(x=[curve.x[i] for i in some],
                                   y=[(100 if share else 1) * curve.y[i] for i in some]))
    across = [v for c in kept for v in (*c.x, *(p[0] for p in c.circles))]
    up = [v for c in kept for v in (*c.y, *(p[1] for p in c.circles)) if math.isfinite(v)] or [0]
    begin, end = _apart(min(across), max(across))
    bottom, top = _apart(min(0, *up) if share else min(up), max(up))
    margin = 0.06 * (top - bottom)
    bottom, top = bottom - margin * (not share), top + margin
    at = None if at is None else min(at, max(across))

    def place(px, py):
        return (round(LEFT + (px - begin) / (end - begin) * (width - LEFT - RIGHT), 1), round(
            height - BOTTOM - (py - bottom) / (top - bottom) * (height - TOP - BOTTOM), 1))

    return {'title': title, 'xlabel': x, 'unit': unit, 'wide': wide, 'width': width,
            'height': height, 'box': (LEFT, TOP, width - RIGHT, height - BOTTOM),
            'xticks': [(place(t, bottom)[0], f'{t:g}')
                       for t in _ticks(begin, end, 5 if wide else 4, whole=True)],
            'yticks': [(place(begin, t)[1], f'{t:g}') for t in _ticks(bottom, top, 5)],
            'zero': place(begin, 0)[1] if bottom < 0 < top else None,
            'curves': [_drawn(curve, place, at) for curve in kept],
            'range': (begin, end), 'at': at, 'digits': 2 if share else None}


def scatter(points: dict, reach: float, size: int = 200) -> list[tuple]:
    """Draw clouds as paths of dots: {colour: float [n, 2] within ±reach} -> [(colour, path)]."""
    out = []
    for colour, cloud in points.items():
        laid = np.round(size / 2 * (1 + np.asarray(cloud) * (1, -1) / reach), 1)
        inside = laid[((laid > 0) & (laid < size)).all(1)]
        out.append((colour, ''.join(f'M{px:g} {py:g}h0' for px, py in inside)))
    return out


def shown(value: float, digits: int | None) -> str:
    """Format a number of a legend, as page.js does."""
    return f'{value:.{digits}f}' if digits is not None else f'{value:.4g}'


def points(curves: list[dict]) -> list[dict]:
    """List the numbers that the page's script reads off the curves of a legend."""
    return [{'x': c['x'], 'y': c['y'], 'source': c['source'],
             'held': [(moment, y) for _, y, moment in c['circles']]} for c in curves
            if not c['pale'] and c['read']]


def _drawn(curve, place, at):
    """A curve's fields, its path, dots where its points are few, and what the legend reads."""
    known = [(px, py) for px, py in zip(curve.x, curve.y, strict=True) if math.isfinite(py)]
    read = min(known, key=lambda p: abs(p[0] - at)) if known and at is not None else None
    return {**curve._asdict(), 'path': _path(curve, place),
            'dots': [place(*p) for p in known] if len(known) < 4 and not curve.pale else [],
            'rings': [place(*p[:2]) for p in curve.circles],
            'y': [v if math.isfinite(v) else None for v in curve.y],
            'read': read or (known[-1] if known else None)}


def _apart(low, high):
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _path(curve, place):
    out, pen = [], 'M'
    for px, py in zip(curve.x, curve.y, strict=True):
        if math.isfinite(py):
            out.append('{}{:g} {:g}'.format(pen, *place(px, py)))
        pen = 'L' if math.isfinite(py) else 'M'
    return ''.join(out)


def _ticks(low, high, most, whole=False):
    """Round numbers from `low` to `high`, at most `most` steps apart; `whole`: integers."""
    rough = max((high - low) / most, float(whole))
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough - 1e-9)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
