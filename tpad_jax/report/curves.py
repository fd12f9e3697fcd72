"""The charts of a run's page: over the steps, over K, and the clouds of its features."""

import math

import numpy as np

from tpad_jax.report import charts, planes
from tpad_jax.report.stored import Run, hit_curve

KS = np.arange(1, 51)
AT = 20
ORDER = 'knowledge', 'transfer', 'recommend', 'joint'  # stages that go on from each other
COLOURS = {'tpad': 0, 'tpad_recommend': 0, 'recommend': 0, 'knowledge': 5, 'transfer': 7,
           'knowledge_only': 1, 'id_only': 2, 'true_attributes': 3, 'joint': 4, 'tpad_joint': 4}
MOST = 8  # curves in a chart


def colours(names) -> dict[str, int]:
    """A colour, 0..7, for each of some models or stages; the known ones have their own."""
    free = [n for n in (0, 5, 6, 7, 2, 3, 4, 1) if n not in {COLOURS.get(x) for x in names}]
    out, given = {}, 0
    for name in names:
        if name in COLOURS:
            out[name] = COLOURS[name]
        else:
            out[name] = free[given % len(free)] if free else given % MOST
            given += 1
    return out


def training(run: Run) -> dict:
    """Learning curves: {'valid', 'loss', 'other' metrics of validation, 'terms': charts}.

    Recommenders, which learn the same, share a chart. Stages that go on from each other lie behind
    each other where they share one.
    """
    log = run.log
    trained = {stage: curves for stage, curves in log.items() if 'loss' in curves}
    beside = [stage for stage in trained if stage not in ORDER or stage == 'recommend']
    groups = [[s] for s in ('knowledge', 'transfer') if s in trained]
    groups += [beside[i:i + MOST] for i in range(0, len(beside), MOST)]
    groups += [['joint']] if 'joint' in trained else []
    loss = [_chart(log, 'loss', group, f'{group[0] if len(group) == 1 else "recommenders"}: loss')
            for group in groups]
    valid, other = [], []
    for metric in dict.fromkeys(n for curves in log.values() for n in curves if n[:6] == 'valid/'):
        if metric.endswith(f'@{AT}'):
            name = metric.removeprefix('valid/')
            own = [s for s in log if metric in log[s]]
            for group, what in (([s for s in own if s != 'transfer'], 'validation'),
                                ([s for s in own if s == 'transfer'], 'transfer, validation')):
                if group:
                    wide = name == f'hit@{AT}' and what == 'validation'
                    (valid if wide else other).append(_chart(
                        log, metric, group[:MOST], f'{what}: {name}', unit='%', wide=wide))
    names = dict.fromkeys(n for s in trained for n in trained[s]
                          if '/' not in n and n != 'loss' and n[:3] != 'mi_')
    several = [n for n in names if any(
        sum('/' not in m and m[:3] != 'mi_' for m in trained[s]) > 2 for s in trained
        if n in trained[s])]
    terms = [_chart(log, n, [s for s in trained if n in trained[s]][:MOST], n) for n in several]
    return {'valid': valid, 'loss': loss, 'other': other, 'terms': terms}


def information(run: Run) -> list[dict]:
    """Every estimate of mutual information over the steps, what it cannot exceed, held-out values.

    Behind them the likelihood of every q that is fitted.
    """
    held, out = run.results.get('diagnostics', {}), []
    logged = dict.fromkeys(n for curves in run.log.values() for n in curves)
    for name in sorted(logged, key=lambda n: n[:6] == 'log_q/'):
        kind, _, last = name.rpartition('/')
        if last[:3] != 'mi_' and kind != 'log_q':
            continue
        stages = [s for s in run.log if name in run.log[s]]
        title = f'{last.removeprefix("mi_")}: ' + (
            'likelihood of q, nats' if kind == 'log_q' else 'nats')
        curves = []
        for curve, stage, since in _curves(run.log, name, stages):
            found = held.get(stage, {})
            rings = [(x, found[moment]['held_out'][name], moment) for moment, x in
                     (('before', since), ('after', curve.x[-1]))
                     if name in found.get(moment, {}).get('held_out', {})]
            room = dict(zip(*run.log[stage].get(f'room/{last.removeprefix("mi_")}', ((), ())),
                            strict=True))
            most = [(x, y + room[x - since]) for x, y in zip(curve.x, curve.y, strict=True)
                    if x - since in room]
            curves.append(curve._replace(circles=tuple(p for p in rings if math.isfinite(p[1]))))
            if most:
                curves.append(charts.Curve('log N', *map(list, zip(*most, strict=True)),
                                           curve.colour, pale=True))
        out.append(charts.chart(title, curves))
    return out


def hits(run: Run, names: list[str]) -> dict | None:
    """hit@K of some models, and of the oracle where its ranks were stored."""
    known = [n for n in names if run.ranks is not None and n in run.ranks.ranks][:MOST]
    if not known:
        return None
    ks = KS[KS <= run.ranks.items]
    curves = [charts.Curve(n, ks.tolist(), (100 * hit_curve(run.ranks, n, ks)).tolist(), colour,
                           source=n) for n, colour in colours(known).items()]
    if 'oracle' in run.ranks.ranks:
        curves.append(charts.Curve('oracle', ks.tolist(), (
            100 * hit_curve(run.ranks, 'oracle', ks)).tolist(), None, source='oracle', dashed=True))
    return charts.chart('hit@K', curves, x='K', unit='%', wide=True, low=0,
                        at=min(AT, len(ks)))


def clouds(run: Run) -> dict | None:
    """Features before alignment and after it, see `planes`: panels of dots by colour."""
    if run.clouds is None:
        return None
    first, before, last, after = run.clouds
    names, whole, share, inner, inside = planes.lay(before, after)
    place = {int(i): n for i, n in ((run.gallery or {}).get('colours') or {}).items()}
    moments = []
    for side, (title, found) in enumerate(((first, before), (last, after))):
        some = {name: planes.drawn_rows(len(found[name])) for name in names}
        panels = []
        for name in names:
            of = found[planes.FEATURES[name]][some[name]]
            own = np.array([place.get(int(item), 7) for item in of])
            own[own > 6] = 7  # the less common ones, in grey
            cloud = inner[side, name][some[name]]
            panels.append((planes.NAMES.get(name, name), charts.scatter(
                {int(n): cloud[own == n] for n in np.unique(own)[::-1]},
                planes.farthest(inner))))
        moments.append({'title': title, 'panels': panels, 'whole': charts.scatter(
            {n: whole[side, name][some[name]] for n, name in enumerate(names)},
            planes.farthest(whole))})
    return {'moments': moments, 'share': share, 'inside': inside, 'coloured': bool(place),
            'names': [planes.NAMES.get(name, name) for name in names]}


def _chart(log, name, stages, title, unit='', wide=False):
    curves = [curve for curve, _, _ in _curves(log, name, stages, 100 if unit else 1)]
    return charts.chart(title, curves, unit=unit, wide=wide, low=0 if unit else None)


def _curves(log, name, stages, scale=1):
    """(curve, stage, step it begins behind) of a logged name over some stages."""
    behind, out, own = 0, [], colours(stages)
    for stage in stages:
        steps, values = log[stage][name]
        since = behind if stage in ORDER else 0
        label = f'{stage}, from {since}' if since else stage
        out.append((charts.Curve(label, [s + since for s in steps],
                                 [scale * v for v in values], own[stage],
                                 source=f'{stage} {name}'), stage, since))
        if stage in ORDER:
            behind += max(max(s) for s, _ in log[stage].values())
    return out
