"""The figure of knowledge and transfer features, before alignment and after it.

All clouds of both moments are laid into one plane: the first two principal components of the rows,
scaled to length one, of all of them together. The first row of panels shows where the features lie
to each other. The small panels show what an item's category has to do with each: there every cloud
is without its mean, else the gaps between clouds would be all one sees, and again in one plane.
"""

from typing import NamedTuple

import numpy as np

from tpad_jax.diagnostics.clouds import unit

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
    mean = np.mean([x.mean(0) for x in clouds], axis=0)
    joint = np.concatenate([(x - mean) / len(x) ** 0.5 for x in clouds])
    _, values, axes = np.linalg.svd(joint, full_matrices=False)
    for axis in axes[:2]:  # a sign of its own, or the figure might be mirrored from run to run
        axis *= np.sign(axis[np.abs(axis).argmax()])
    whole = (values ** 2).sum()
    return mean, axes[:2].T, float((values[:2] ** 2).sum() / whole) if whole else 0.0


class Laid(NamedTuple):
    """The clouds of two moments, 0 and 1, in two planes.

    names: of the features that both have. whole: {(moment, name): float [n, 2]}, all in one plane,
    which holds `share` of their variance; inner: the same without each cloud's mean, in a plane of
    their own, and `inside` the share there.
    """

    names: list[str]
    whole: dict[tuple[int, str], np.ndarray]
    share: float
    inner: dict[tuple[int, str], np.ndarray]
    inside: float


def lay(before: dict, after: dict) -> Laid:
    """Both moments' clouds {name: float [n, D]} of `FEATURES` in their planes."""
    names = [name for name in FEATURES if name in before and name in after]
    rows = {(side, name): unit(clouds[name]) for side, clouds in enumerate((before, after))
            for name in names}
    mean, basis, share = plane(list(rows.values()))
    whole = {key: (x - mean) @ basis for key, x in rows.items()}
    inner = {key: x - x.mean(0) for key, x in rows.items()}
    _, basis, inside = plane(list(inner.values()))
    return Laid(names, whole, share, {key: x @ basis for key, x in inner.items()}, inside)


def draw(first: str, before: dict, last: str, after: dict, label: np.ndarray, out_png) -> None:
    """Before on the left, after on the right.

    Args:
      first, last: what the two moments are called.
      before, after: {name: float [n, D]} of `FEATURES`, and item ids int [n] of 'items', 'at' and
        'next' (see snapshots.py).
      label: int [V] of items 1..V, a category each, below 0 where it is unknown.
      out_png: file to write.
    """
    from tpad_jax.report.figures import (  # only here: matplotlib takes a second to import
        COLOURS,
        framed,
    )

    names, whole, share, inner, inside = lay(before, after)
    moments = ((first, before), (last, after))
    with framed(out_png, (11.0, 9.6)) as figure:
        for side, (half, (title, clouds)) in enumerate(
                zip(figure.subfigures(1, 2), moments, strict=True)):
            half.suptitle(title, weight='bold', size=12)
            axes = half.subplot_mosaic([['all'] * 3, names[:3], names[3:]],
                                       height_ratios=[2.2, 1, 1])
            for name, axis in axes.items():
                reach = farthest(whole if name == 'all' else inner)
                axis.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect='equal')
                axis.tick_params(labelleft=False, labelbottom=False, length=0)
            for number, name in enumerate(names):
                some = some_of(len(clouds[name]))
                axes['all'].scatter(*whole[side, name][some].T, s=9, marker=MARKS[name], lw=0,
                                    alpha=0.55, color=COLOURS[number],
                                    label=NAMES.get(name, name))
                axes[name].scatter(*inner[side, name][some].T, s=8, lw=0, alpha=0.8, c=_colours(
                    label, label[clouds[FEATURES[name]] - 1][some]))
                axes[name].set_title(NAMES.get(name, name), size=9)
            axes['all'].set_xlabel('\n'.join(
                (f'one plane for all: {100 * share:.0f} % of the variance',
                 f'below, without their means, another: {100 * inside:.0f} %') if side == 0 else
                ('colours below: the most common categories, grey the others, of an item',
                 '(k, r), of the last item read (t, c), of the item that follows (p)')))
            if side == 0:
                axes['all'].legend(loc='upper left', handletextpad=0.1, frameon=True,
                                   framealpha=0.8, edgecolor='none', markerscale=1.6)


def farthest(laid: dict) -> float:
    """Half the side of a square that holds all points but a few far out."""
    return 1.1 * max(np.quantile(np.abs(x), 0.995) for x in laid.values()) + 1e-6


def _colours(label, own):
    """A colour for each of the most common labels, grey for the others."""
    from tpad_jax.report.figures import COLOURS, GREY

    common, counts = np.unique(label[label >= 0], return_counts=True)
    common = common[np.argsort(-counts, kind='stable')[:len(COLOURS) - 1]]
    of = dict(zip(common, COLOURS, strict=False))
    return [of.get(value, GREY) for value in own]


def some_of(count: int) -> np.ndarray:
    """Which rows are drawn, the same for a cloud of the same size."""
    return np.sort(np.random.default_rng(0).permutation(count)[:MOST])
