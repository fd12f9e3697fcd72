"""Where everything of a chart stands, in the units of an SVG's viewBox; templates write it out.

A chart is a dict that `chart.html` reads: ticks, curves as paths, and beside them the numbers they
were drawn from, which a pointer reads off.
"""

import math
from typing import NamedTuple

import numpy as np

POINTS = 250  # of a curve at most: more are not told apart on a page
LEFT, RIGHT, TOP, BOTTOM = 40, 10, 10, 28  # room around the axes


class Curve(NamedTuple):
    """x, y: numbers, nan is a gap. colour: 0..7, or None for ink. source: (stage, name) of the log,
    or a model. pale: dotted and without a line of the legend. circles: (x, y, which moment it
    is of), drawn open.
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
          low: float | None = None, at: float | None = None) -> dict:
    """A line chart.

    Args:
      title, x, unit: what it is called, its axis across, and what its numbers are in.
      wide: for a column of its own. low: where the axis up begins; None: by the numbers.
      at: of x, where the legend reads the curves first; None: at their ends.
    """
    width, height = (640, 330) if wide else (240, 170)
    curves = [curve._replace(**dict(zip('xy', _thin(curve.x, curve.y), strict=True)))
              for curve in curves]
    across = [v for c in curves for v in (*c.x, *(p[0] for p in c.circles))]
    up = [v for c in curves for v in (*c.y, *(p[1] for p in c.circles)) if math.isfinite(v)] or [0]
    begin, end = _apart(min(across), max(across))
    bottom, top = _apart(min(up) if low is None else min(low, *up), max(up))
    margin = 0.06 * (top - bottom)
    bottom, top = bottom - margin * (low is None), top + margin

    def place(px, py):
        return (round(LEFT + (px - begin) / (end - begin) * (width - LEFT - RIGHT), 1), round(
            height - BOTTOM - (py - bottom) / (top - bottom) * (height - TOP - BOTTOM), 1))

    return {'title': title, 'xlabel': x, 'unit': unit, 'wide': wide, 'width': width,
            'height': height, 'box': (LEFT, TOP, width - RIGHT, height - BOTTOM),
            'xticks': [(place(t, bottom)[0], f'{t:g}')
                       for t in _ticks(begin, end, 5 if wide else 4, whole=True)],
            'yticks': [(place(begin, t)[1], f'{t:g}') for t in _ticks(bottom, top, 5)],
            'zero': place(begin, 0)[1] if bottom < 0 < top else None,
            'curves': [_drawn(curve, place, at) for curve in curves],
            'range': (begin, end), 'at': at, 'digits': 2 if unit == '%' else None}


def scatter(points: dict, reach: float, size: int = 200) -> list[tuple]:
    """Clouds as paths of dots: {colour: float [n, 2] within ±reach} -> [(colour, path)]."""
    out = []
    for colour, cloud in points.items():
        laid = np.round(size / 2 * (1 + np.asarray(cloud) * (1, -1) / reach), 1)
        inside = laid[((laid > 0) & (laid < size)).all(1)]
        out.append((colour, ''.join(f'M{px:g} {py:g}h0' for px, py in inside)))
    return out


def shown(value: float, digits: int | None) -> str:
    """A number of a legend, as page.js writes it too."""
    return f'{value:.{digits}f}' if digits is not None else f'{value:.4g}'


def points(curves: list[dict]) -> list[dict]:
    """What a pointer reads off a chart's curves, those with a line of the legend."""
    return [{'x': c['x'], 'y': c['y'], 'source': c['source'],
             'held': [(moment, y) for _, y, moment in c['circles']]} for c in curves
            if not c['pale'] and c['read']]


def _drawn(curve, place, at):
    """A curve's fields and where they stand; few points are dots, too."""
    laid = [place(*p) for p in zip(curve.x, curve.y, strict=True)]
    known = [p for p in laid if math.isfinite(p[1])]
    return {**curve._asdict(), 'path': _path(laid),
            'dots': known if len(known) < 4 and not curve.pale else [],
            'rings': [place(*p[:2]) for p in curve.circles],
            'y': [v if math.isfinite(v) else None for v in curve.y], 'read': _read(curve, at)}


def _read(curve, at):
    """(x, y) that the legend shows first: the last one, or that at `at`."""
    known = [(px, py) for px, py in zip(curve.x, curve.y, strict=True) if math.isfinite(py)]
    if not known:
        return None
    return known[-1] if at is None else min(known, key=lambda p: abs(p[0] - at))


def _thin(x, y):
    some = np.unique(np.linspace(0, len(x) - 1, min(len(x), POINTS)).round().astype(int))
    return [x[i] for i in some], [y[i] for i in some]


def _apart(low, high):
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _path(points):
    out, pen = [], 'M'
    for px, py in points:
        if math.isfinite(py):
            out.append(f'{pen}{px:g} {py:g}')
            pen = 'L'
        else:
            pen = 'M'
    return ''.join(out)


def _ticks(low, high, most, whole=False):
    """Round numbers from `low` to `high`, at most `most` steps apart; `whole`: integers."""
    rough = max((high - low) / most, float(whole))
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough - 1e-9)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
