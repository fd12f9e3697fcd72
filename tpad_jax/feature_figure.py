"""The figure of knowledge and transfer features, before alignment and after it.

All clouds of both moments are laid into one plane: the first two principal components of the rows,
scaled to length one, of all of them together. The first row of panels shows where the features lie
to each other; the second, one small panel for each, what an item's category has to do with it.
"""

import numpy as np
from matplotlib.lines import Line2D

from tpad_jax.diagnostics import unit
from tpad_jax.figures import COLOURS, GREY, PALE, framed

# The features of a snapshot and whose items colour their rows: a position's own, or what follows.
FEATURES = {'k_image': 'items', 'k_text': 'items', 'r': 'items', 't': 'at', 'c': 'at', 'p': 'next'}
NAMES = {'k_image': 'k image', 'k_text': 'k text'}
MARKS = dict(zip(FEATURES, 'os^vDP', strict=True))
MOST = 400  # points of a cloud that are drawn


def plane(clouds: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, float]:
    """The plane that all clouds vary most in.

    Every cloud has the same say, however many rows it has.

    Args:
      clouds: float [n, D] each, of one D.

    Returns:
      mean float [D], basis float [D, 2] and the share of the variance that lies in the plane.
    """
    rows = [unit(x) for x in clouds]
    mean = np.mean([x.mean(0) for x in rows], axis=0)
    joint = np.concatenate([(x - mean) / len(x) ** 0.5 for x in rows])
    _, values, axes = np.linalg.svd(joint, full_matrices=False)
    for axis in axes[:2]:  # a sign of its own, or the figure might be mirrored from run to run
        axis *= np.sign(axis[np.abs(axis).argmax()])
    whole = (values ** 2).sum()
    return mean, axes[:2].T, float((values[:2] ** 2).sum() / whole) if whole else 0.0


def draw(first: str, before: dict, last: str, after: dict, label: np.ndarray, out_png) -> None:
    """Before on the left, after on the right.

    Args:
      first, last: what the two moments are called.
      before, after: {name: float [n, D]} of `FEATURES`, and item ids int [n] of 'items', 'at' and
        'next' (see snapshots.py).
      label: int [V] of items 1..V, a category each, below 0 where it is unknown.
      out_png: file to write.
    """
    names = [name for name in FEATURES if name in before and name in after]
    moments = ((first, before), (last, after))
    mean, basis, share = plane([clouds[name] for _, clouds in moments for name in names])
    common, counts = np.unique(label[label >= 0], return_counts=True)
    common = common[np.argsort(-counts, kind='stable')[:len(COLOURS) - 1]]
    laid = {(side, name): (unit(clouds[name]) - mean) @ basis
            for side, (_, clouds) in enumerate(moments) for name in names}
    reach = 1.05 * max(np.abs(x).max() for x in laid.values()) + 1e-6
    with framed(out_png, (11.0, 9.4)) as figure:
        halves = figure.subfigures(1, 2)
        for side, (half, (title, clouds)) in enumerate(zip(halves, moments, strict=True)):
            half.suptitle(title, weight='bold', size=12)
            axes = half.subplot_mosaic([['all'] * 3, names[:3], names[3:]] if len(names) > 3
                                       else [['all'] * len(names), names],
                                       height_ratios=[2.2, 1, 1][:2 + (len(names) > 3)])
            for axis in axes.values():
                axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect='equal')
                axis.tick_params(labelleft=False, labelbottom=False, length=0)
            for number, name in enumerate(names):
                points = laid[side, name][_some(len(laid[side, name]))]
                axes['all'].scatter(*points.T, s=9, marker=MARKS[name], lw=0, alpha=0.55,
                                    color=COLOURS[number])
                own = label[clouds[FEATURES[name]] - 1][_some(len(laid[side, name]))]
                colours = np.full(len(own), GREY, object)
                for place, value in enumerate(common):
                    colours[own == value] = COLOURS[place]
                axis = axes[name]
                every = np.concatenate([laid[side, n][_some(len(laid[side, n]))] for n in names])
                axis.scatter(*every.T, s=2, lw=0, color=PALE)
                axis.scatter(*points.T, s=7, lw=0, c=list(colours))
                axis.set_title(NAMES.get(name, name), size=9)
            if side == 0:
                half.axes[0].legend(handles=[
                    Line2D([], [], ls='', marker=MARKS[n], ms=5, mew=0, color=COLOURS[i],
                           label=NAMES.get(n, n)) for i, n in enumerate(names)],
                    loc='upper left', handletextpad=0.1, frameon=True, framealpha=0.8,
                    edgecolor='none')
                half.axes[0].set_xlabel(f'one plane for all: {100 * share:.0f} % of the variance')
            else:
                half.axes[0].set_xlabel(
                    f'below: the {len(common)} most common categories (grey: others) of an item '
                    '(k, r),\nof the last item read (t, c), of the item that follows (p)')


def _some(count):
    """Which rows are drawn, the same for a cloud of the same size."""
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST])
