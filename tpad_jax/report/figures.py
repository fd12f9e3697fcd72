"""Figures of a run, in one look: learning curves, hit@K, mutual information, a contact sheet.

Colours are Okabe and Ito's (2008), told apart with every common colour blindness. Figures are made
without pyplot, so nothing global is touched and no display is needed.
"""

import contextlib
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from tpad_jax.core.log import curves_of

INK, GREY, PALE = '#222222', '#777777', '#dddddd'
GREEN = '#009e73'  # the true next item, everywhere
COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#8c6d31', '#000000')
STYLE = {
    'figure.dpi': 150,
    'figure.facecolor': 'white',
    'font.size': 9,
    'text.color': INK,
    'axes.edgecolor': GREY,
    'axes.labelcolor': INK,
    'axes.titlesize': 10,
    'axes.titleweight': 'bold',
    'axes.titlelocation': 'left',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'axes.axisbelow': True,
    'grid.color': PALE,
    'grid.linewidth': 0.6,
    'lines.linewidth': 1.6,
    'lines.solid_capstyle': 'round',
    'legend.frameon': False,
    'legend.fontsize': 8,
    'xtick.color': GREY,
    'ytick.color': GREY,
    'xtick.labelcolor': INK,
    'ytick.labelcolor': INK,
    'axes.prop_cycle': mpl.cycler(color=COLOURS),
}


def learning_curves(log_path, out_png):
    """One row per stage: the whole loss, its terms, and what validation says, over the steps.

    A term is any name without a slash but `loss` and `mi_*`; validation is `valid/*`.

    Returns:
      False, and no file, where no stage trained.
    """
    logged = curves_of(log_path)
    if not logged:
        return False
    with framed(out_png, (10.5, 2.6 * len(logged))) as figure:
        axes = figure.subplots(len(logged), 3, squeeze=False)
        for row, (stage, curves) in zip(axes, logged.items(), strict=True):
            valid = {n.removeprefix('valid/'): c for n, c in curves.items() if n[:6] == 'valid/'}
            terms = {n: c for n, c in curves.items() if '/' not in n and n[:3] != 'mi_'}
            whole = {n: terms.pop(n) for n in ('loss',) if n in terms}
            _curves(row[0], f'{stage}: loss', whole)
            _curves(row[1], 'loss terms, unweighed', terms)
            _curves(row[2], 'validation', valid, markers=True)
    return True


def mutual_information(log_path, out_png, held=None):
    """The estimates of mutual information, `mi_*`, in nats, over the steps of each stage with any.

    A dotted line of the same colour is the most that an InfoNCE estimate can say, the log of its
    candidates' number (the estimate and its `room/*`). Below, where a q is fitted, is its
    likelihood, `log_q/*`: a vCLUB figure is a bound only while that is well above 0.

    Args:
      log_path: log.jsonl. out_png: file to write.
      held: {stage: {'before' | 'after': {name: number}}}, the same on sessions the stage does not
        train on: open circles at its beginning and end.

    Returns:
      False, and no file, where no stage logs one.
    """
    logged = {
        stage: curves
        for stage, curves in curves_of(log_path).items()
        if any(_name(name)[:3] == 'mi_' for name in curves)
    }
    if not logged:
        return False
    parts = [('mi_', 'mutual information, nats')]
    if any(name.startswith('log_q/') for curves in logged.values() for name in curves):
        parts.append(('log_q/', 'log-likelihood of q'))
    with framed(out_png, (1.2 + 4.2 * len(logged), 0.6 + 2.9 * len(parts))) as figure:
        rows = figure.subplots(len(parts), len(logged), squeeze=False, sharey='row')
        for axes, (kind, title) in zip(rows, parts, strict=True):
            for axis, (stage, curves) in zip(axes, logged.items(), strict=True):
                own = {n: c for n, c in curves.items() if kind in (_name(n)[:3], n[:6])}
                _curves(axis, f'{stage}: {title}', {_short(n): c for n, c in own.items()})
                for line, (name, (steps, values)) in zip(axis.lines[:], own.items(), strict=False):
                    _mark(axis, line.get_color(), name, steps, values, curves,
                          (held or {}).get(stage, {}))
                axis.axhline(0, color=GREY, lw=0.8)
        rows[0, 0].set_ylabel('dotted: log N; circles: held out')
        if len(parts) > 1:
            rows[1, 0].set_ylabel('nats per dimension above\nthe mean and variances alone')
    return True


def hit_curves(curves, oracle, out_png):
    """hit@K of every model over K = 1..len, with the oracle's as the ceiling.

    Args:
      curves: {model: float array [K] of shares in 0..1}.
      oracle: float array [K], or None where the truth is unknown.
      out_png: file to write.
    """
    with framed(out_png, (6.4, 4.2)) as figure:
        axis = figure.subplots()
        ends = {}
        for number, (name, curve) in enumerate(curves.items()):
            values = 100 * np.asarray(curve)
            style = '-' if number < len(COLOURS) else '--'
            axis.plot(np.arange(1, len(values) + 1), values, style)
            ends[name] = (len(values), values[-1], axis.lines[-1].get_color())
        if oracle is not None:
            values = 100 * np.asarray(oracle)
            axis.plot(np.arange(1, len(values) + 1), values, ':', color=INK)
            ends['oracle'] = (len(values), values[-1], INK)
        last = max(length for length, _, _ in ends.values())
        axis.set(title='Hit@K', xlabel='K', ylabel='% of rows whose next item is in the top K')
        axis.set_xlim(1, last)
        axis.set_ylim(0, None)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label_ends(axis, ends)


def contact_sheet(rows, out_png):
    """What the models recommend, in pictures, a line per session.

    Args:
      rows: list of dicts: `prefix` list of images, `target` image, `models` {name: list of images,
        best first}, `hits` {name: place of the target in that list, from 0, or None}, `titles`
        {'prefix': list of str, 'target': str, 'models': {name: list of str}}. An image is uint8
        [H, W, 3], or None for an item without one. All rows have the same models; of a longer
        prefix than 5 the last 5 items are shown.
      out_png: file to write.
    """
    models = list(rows[0]['models'])
    width = min(5, max(len(row['prefix']) for row in rows))
    tops = {name: max(len(row['models'][name]) for row in rows) for name in models}
    gap = 0.35
    starts, at = {}, width + gap
    starts['target'], at = at, at + 1 + gap
    for name in models:
        starts[name], at = at, at + tops[name] + gap
    wide, tall = at - gap, 1.36
    inch = 0.82
    size = (inch * (wide + 0.35), inch * (tall * len(rows) + 0.5))
    with framed(out_png, size, layout=None) as figure:
        axis = figure.add_axes((0, 0, 1, 1))
        axis.set(xlim=(-0.3, wide + 0.05), ylim=(tall * len(rows), -0.5), aspect='equal')
        axis.set_axis_off()
        head = dict(weight='bold', size=10, parse_math=False)
        axis.text(width - 0.04, -0.16, 'session so far', ha='right', **head)
        axis.text(starts['target'] + 0.04, -0.16, 'true next', color=GREEN, **head)
        for name in models:
            axis.text(starts[name] + 0.04, -0.16, f'{name}: top {tops[name]}', **head)
        for number, row in enumerate(rows):
            y = tall * number
            titles = row['titles']
            cut = max(len(row['prefix']) - width, 0)
            first = width - min(len(row['prefix']), width)
            shown = zip(row['prefix'][cut:], titles['prefix'][cut:], strict=True)
            for place, (image, title) in enumerate(shown):
                _tile(axis, first + place, y, image, title)
            if cut:
                axis.text(0, y + 0.46, f'+{cut}', size=7, color=GREY, ha='right', va='center')
            _tile(axis, starts['target'], y, row['target'], titles['target'], GREEN)
            for name in models:
                shown = zip(row['models'][name], titles['models'][name], strict=True)
                for place, (image, title) in enumerate(shown):
                    frame = GREEN if row['hits'][name] == place else None
                    _tile(axis, starts[name] + place, y, image, title, frame)
            if number:
                axis.plot([0, wide], [y - 0.1, y - 0.1], color=PALE, lw=0.6)


@contextlib.contextmanager
def framed(out_png, size, layout='constrained'):
    """A figure of `size` inches in the house's style, written to `out_png` at the end."""
    Path(out_png).parent.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=size, layout=layout)
        yield figure
        figure.savefig(out_png, metadata={'Software': None})


def _name(key):
    return key.rsplit('/', 1)[-1]


def _short(name):
    return name.split('mi_', 1)[-1].removeprefix('log_q/')


def _mark(axis, color, name, steps, values, curves, held):
    """An estimate's ceiling, where it has one, and what it is on held-out sessions."""
    room = dict(zip(*curves.get(f'room/{_short(name)}', ((), ())), strict=True))
    ceiling = [(s, v + room[s]) for s, v in zip(steps, values, strict=True) if s in room]
    if ceiling:
        axis.plot(*zip(*ceiling, strict=True), ':', color=color, lw=1)
    for moment, step in (('before', 0), ('after', steps[-1])):
        if name in held.get(moment, {}):
            axis.plot(step, held[moment][name], 'o', color=color, mfc='white', ms=5)


def _curves(axis, title, curves, markers=False):
    axis.set_title(title)
    if not curves:
        axis.set_axis_off()
        axis.text(0, 0.9, 'nothing logged', color=GREY, transform=axis.transAxes)
        return
    for number, (name, (steps, values)) in enumerate(curves.items()):
        few = markers or len(steps) < 3
        style = ('-', '--', ':')[number // len(COLOURS) % 3]
        axis.plot(steps, values, style, marker='o' if few else None, markersize=3, label=name)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel('step')
    if len(curves) > 3:  # beside the axis, where it hides no curve
        axis.legend(handlelength=1.2, loc='center left', bbox_to_anchor=(1, 0.5))
    elif len(curves) > 1 or markers:
        axis.legend(handlelength=1.2)


def _label_ends(axis, ends):
    """Writes every curve's name and last value at its end, as near to it as all can be read."""
    low, high = axis.get_ylim()
    order = sorted(ends, key=lambda name: ends[name][1])
    steps = 0.055 * (high - low) * np.arange(len(order))
    # Least squares over places at least one step apart is an isotonic regression.
    places = isotonic_regression([ends[name][1] for name in order] - steps).x + steps
    for name, place in zip(order, places, strict=True):
        x, y, color = ends[name]
        axis.annotate(
            f'{name}  {y:.1f}',
            (x, place),
            (8, 0),
            textcoords='offset points',
            color=color,
            va='center',
            parse_math=False,
            annotation_clip=False,
        )


def _tile(axis, x, y, image, title, frame=None):
    box = (x + 0.04, x + 0.96, y + 0.92, y)
    if image is None:
        axis.fill_between(box[:2], box[3], box[2], color='#f2f2f2', lw=0)
        axis.text(x + 0.5, y + 0.46, 'no image', size=6, color=GREY, ha='center', va='center')
    else:
        axis.imshow(image, extent=box, aspect='equal', interpolation='lanczos')
    if frame:
        axis.plot(
            [box[0], box[1], box[1], box[0], box[0]],
            [box[3], box[3], box[2], box[2], box[3]],
            color=frame,
            lw=3,
            solid_joinstyle='miter',
        )
    for line, text in enumerate(_two_lines(title)):
        axis.text(x + 0.05, y + 1.06 + 0.13 * line, text, size=5.5, va='center', parse_math=False)


def _two_lines(title, width=17):
    """The beginning of a title; a square stands for a letter the font does not have."""
    lines = ['', '']
    font = get_font(findfont(FontProperties()))
    words = ''.join(c if c.isspace() or font.get_char_index(ord(c)) else '□' for c in title).split()
    for line in (0, 1):
        while words and len(lines[line]) + len(words[0]) < width:
            lines[line] = f'{lines[line]} {words.pop(0)}'.strip()
        if words and not lines[line]:
            lines[line], words[0] = words[0][: width - 1], words[0][width - 1 :]
    if words:
        lines[1] = lines[1][: width - 2] + '…'
    return lines
