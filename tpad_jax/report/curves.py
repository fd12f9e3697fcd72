"""The charts of a run's page: over the steps, over K, and the clouds of its features.

All clouds, before and after alignment, share the plane of the first two principal components of
their rows, scaled to length one: it shows where the features are in relation to each other. A
second plane holds the same clouds without their means. It shows how an item's category is related
to each cloud, which the gaps between the clouds would hide.

A chart is a dict that the macro `chart` reads: ticks, curves as paths, and the numbers they were
drawn from, which the page's script shows under a pointer. Places are in units of an SVG's viewBox.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from tpad_jax.diagnostics.clouds import unit
from tpad_jax.evaluation import compare, metrics
from tpad_jax.report.stored import Run

KS = np.arange(1, 51)
AT = 20
ORDER = 'knowledge', 'teach', 'transfer', 'recommend', 'joint'  # stages that continue each other
ALONE = 'knowledge', 'teach', 'transfer', 'joint'  # stages whose loss has a chart to itself
COLOURS = {'tpad': 0, 'tpad_recommend': 0, 'recommend': 0, 'knowledge': 5, 'teach': 6,
           'transfer': 7, 'knowledge_only': 1, 'id_only': 2, 'true_attributes': 3, 'joint': 4,
           'tpad_joint': 4}
MOST = 8  # curves in a chart
# The features of a snapshot, and the item ids that colour their rows: a position's item, or the
# item that follows it.
FEATURES = {'k_image': 'items', 'k_text': 'items', 'r': 'items', 't': 'at', 'c': 'at', 'p': 'next'}
DOTS = 400  # points of a cloud that are drawn
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
    begin, end = _apart(across)
    bottom, top = _apart([0, *up] if share else up)
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


def scatter(points: dict, reach: float) -> list[tuple]:
    """Draw clouds as paths of dots: {colour: float [n, 2] within ±reach} -> [(colour, path)]."""
    def path(cloud):
        laid = np.round(100 * (1 + np.asarray(cloud) * (1, -1) / reach), 1)
        inside = laid[((laid > 0) & (laid < 200)).all(1)]
        return ''.join(f'M{px:g} {py:g}h0' for px, py in inside)

    return [(colour, path(cloud)) for colour, cloud in points.items()]


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


def _apart(values):
    low, high = min(values), max(values)
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


def colours(names) -> dict[str, int]:
    """Choose a colour, 0..7, for each of some models or stages; known names have fixed ones."""
    known = {name: COLOURS.get(name) for name in names}
    others = [n for n in (0, 5, 6, 7, 2, 3, 4, 1) if n not in known.values()]
    free = itertools.cycle(others or range(MOST))
    return {name: next(free) if colour is None else colour for name, colour in known.items()}


def training(run: Run) -> dict:
    """Draw the learning curves: {'valid', 'loss', 'other' validation metrics, 'terms': charts}.

    Recommenders share a chart, for they learn the same task. Stages that continue each other follow
    each other where they share a chart.
    """
    log = run.log
    trained = [stage for stage in log if 'loss' in log[stage]]
    recommenders = [stage for stage in trained if stage not in ALONE]
    groups = [(stage, [stage]) for stage in trained if stage in ALONE]
    groups += [('recommenders', recommenders[i:i + MOST])
               for i in range(0, len(recommenders), MOST)]
    loss = [_chart(log, 'loss', stages, f'{name}: loss') for name, stages in groups]
    valid, other = [], []
    for name in dict.fromkeys(n for curves in log.values() for n in curves):
        if not (name.startswith('valid/') and name.endswith(f'@{AT}')):
            continue
        metric = name.removeprefix('valid/')
        logged = [stage for stage in log if name in log[stage]]
        for title, stages in (('validation', [s for s in logged if s != 'transfer']),
                              ('transfer, validation', [s for s in logged if s == 'transfer'])):
            wide = (title, metric) == ('validation', f'hit@{AT}')
            if stages:
                (valid if wide else other).append(_chart(log, name, stages[:MOST],
                                                         f'{title}: {metric}', '%', wide))
    # the terms of losses that have several
    terms = {stage: [n for n in log[stage] if '/' not in n and n != 'loss' and n[:3] != 'mi_']
             for stage in trained}
    several = dict.fromkeys(n for names in terms.values() if len(names) > 1 for n in names)
    return {'valid': valid, 'loss': loss, 'other': other, 'terms': [
        _chart(log, n, [s for s in trained if n in terms[s]][:MOST], n) for n in several]}


def information(run: Run) -> list[dict]:
    """Draw every estimate of mutual information with its limit and its held-out values.

    The likelihoods of fitted q follow the estimates.
    """
    held, out = run.results.get('diagnostics', {}), []
    logged = dict.fromkeys(n for curves in run.log.values() for n in curves)
    for name in sorted(logged, key=lambda n: n[:6] == 'log_q/'):
        kind, _, last = name.rpartition('/')
        if last[:3] != 'mi_' and kind != 'log_q':
            continue
        estimate, curves = last.removeprefix('mi_'), []
        stages = [stage for stage in run.log if name in run.log[stage]]
        for curve, stage, since in _curves(run.log, name, stages):
            moments = held.get(stage, {})
            circles = [(x, moments[moment]['held_out'][name], moment) for moment, x in
                       (('before', since), ('after', curve.x[-1]))
                       if name in moments.get(moment, {}).get('held_out', {})]
            curves.append(curve._replace(circles=tuple(p for p in circles if math.isfinite(p[1]))))
            room = dict(zip(*run.log[stage].get(f'room/{estimate}', ((), ())), strict=True))
            limit = [(x, y + room[x - since]) for x, y in zip(curve.x, curve.y, strict=True)
                     if x - since in room]
            if limit:
                curves.append(Curve('log N', *map(list, zip(*limit, strict=True)), curve.colour,
                                    pale=True))
        title = f'{estimate}: ' + ('likelihood of q, nats' if kind == 'log_q' else 'nats')
        out.append(chart(title, curves))
    return out


def hits(run: Run, names: list[str]) -> dict | None:
    """Draw hit@K of some models, and of the oracle where its ranks were stored."""
    known = [n for n in names if run.ranks is not None and n in run.ranks.ranks][:MOST]
    if not known:
        return None
    drawn = colours(known) | ({'oracle': None} if 'oracle' in run.ranks.ranks else {})
    return chart('hit@K', [
        hit_curve(run.ranks, name, name=name, colour=colour, source=name, dashed=name == 'oracle')
        for name, colour in drawn.items()], x='K', unit='%', wide=True, at=AT)


def hit_curve(ranks: compare.Run, model: str, **drawn) -> Curve:
    """Compute the share of rows whose target is among the first K, for K from 1 to 50.

    Args:
      ranks: of the run.
      model: name of a model that it ranked.
      **drawn: other fields of the curve.
    """
    above, equal = ranks.ranks[model]
    ks = KS[KS <= ranks.items]
    share = metrics.hit(above[:, None], equal[:, None], ks).mean(0)
    return Curve(x=ks.tolist(), y=share.tolist(), **drawn)


def clouds(run: Run) -> dict | None:
    """Draw the features before and after alignment as panels of dots in the two planes."""
    if not run.clouds:
        return None
    names = [name for name in FEATURES if all(name in cloud for cloud in run.clouds.values())]
    rows = {(title, name): unit(cloud[name]) for title, cloud in run.clouds.items()
            for name in names}
    mean, basis, share = plane(list(rows.values()))
    whole = {key: (x - mean) @ basis for key, x in rows.items()}
    inner = {key: x - x.mean(0) for key, x in rows.items()}
    _, basis, inside = plane(list(inner.values()))
    inner = {key: x @ basis for key, x in inner.items()}
    # the place of each item's category; the less common ones are grey
    known = (run.gallery or {}).get('colours') or {}
    category = {int(i): min(n, 7) for i, n in known.items()}
    moments = []
    for title, cloud in run.clouds.items():
        panels, dots = [], {}
        for number, name in enumerate(names):
            # the same rows of two clouds of the same size
            drawn = np.sort(np.random.default_rng(0).permutation(len(cloud[name]))[:DOTS])
            colour = np.array([category.get(int(x), 7) for x in cloud[FEATURES[name]][drawn]])
            part = inner[title, name][drawn]
            panels.append((name.replace('_', ' '), scatter(
                {int(n): part[colour == n] for n in np.unique(colour)[::-1]}, _farthest(inner))))
            dots[number] = whole[title, name][drawn]
        moments.append({'title': title, 'panels': panels, 'whole': scatter(dots, _farthest(whole))})
    return {'moments': moments, 'share': share, 'inside': inside, 'coloured': bool(category),
            'names': [name.replace('_', ' ') for name in names]}


def plane(clouds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """Find the plane that all clouds vary most in.

    Every cloud has the same weight, however many rows it has.

    Args:
      clouds: float [n, D] each, of one D.

    Returns:
      The mean float [D], the basis float [D, 2] and the share of the variance in the plane.
    """
    mean = np.mean([x.mean(0) for x in clouds], axis=0)
    # the D x D covariance: a singular value decomposition of all rows takes seconds
    covariance = sum((x - mean).T @ (x - mean) / len(x) for x in clouds)
    variances, axes = np.linalg.eigh(covariance)
    basis = axes[:, [-1, -2]]
    # a fixed sign: else the plot could be mirrored from run to run
    basis *= np.sign(np.take_along_axis(basis, np.abs(basis).argmax(0)[None], axis=0))
    total = variances.sum()
    return mean, basis, float(variances[-2:].sum() / total) if total else 0.0


def _farthest(clouds):
    """Half the side of a square that holds all points except a few outliers."""
    return 1.1 * max(np.quantile(np.abs(x), 0.995) for x in clouds.values()) + 1e-6


def _chart(log, name, stages, title, unit='', wide=False):
    return chart(title, [x for x, _, _ in _curves(log, name, stages)], unit=unit, wide=wide)


def _curves(log, name, stages):
    """List (curve, stage, step after which it begins) of a logged name over some stages."""
    since, out, chosen = 0, [], colours(stages)
    for stage in stages:
        steps, values = log[stage][name]
        begin = since if stage in ORDER else 0
        label = f'{stage}, from {begin}' if begin else stage
        curve = Curve(label, [step + begin for step in steps], values, chosen[stage],
                             source=f'{stage} {name}')
        out.append((curve, stage, begin))
        if stage in ORDER:
            since += max(max(s) for s, _ in log[stage].values())
    return out
