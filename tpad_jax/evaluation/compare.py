"""Compare two models on the same test rows by the ranks that their runs stored.

The command is `python -m tpad_jax.evaluate --compare RUN_A RUN_B`. A metric is a mean over rows.
Intervals and p-values are over sessions. Differences are paired row by row.
"""

import zipfile
import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape

from tpad_jax.core import cli, console as console_lib, files, ties
from tpad_jax.errors import refuse_if, refusing
from tpad_jax.evaluation import metrics, slices, statistics

AT = metrics.TOP
BUILT_IN = {name: metrics.gain_table(gain, AT) for name, gain in metrics.GAINS.items()}
FILE = 'ranks.npz'
ROW, METRIC = 'row/', 'metric/'  # prefixes, in FILE, of row features and of a config's metrics
WIDTH = 112  # characters of the tables
_NOTHING = 1e-12  # a smaller difference of two gains is rounding
_AGAIN = 'Fix: delete the results.json next to it and run the command of the run again'
# what np.load raises of a file that is cut short, damaged, pickled or one array alone
UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


class Run(NamedTuple):
    """One run's test rows, and every model's ranks on them.

    Attributes:
      path: workdir.
      session: int [R]. The session of each row.
      target: int [R]. The next item of each row.
      fingerprint: of the data.
      items: V.
      features: {name: [R]} of `slices.features`.
      ranks: {model: (above, equal)}, int [R] each.
      gains: {metric: float64 [AT]}, the value of a target at places 1, 2, .. AT.
    """

    path: Path
    session: np.ndarray
    target: np.ndarray
    fingerprint: str
    items: int
    features: dict[str, np.ndarray]
    ranks: dict[str, tuple[np.ndarray, np.ndarray]]
    gains: dict[str, np.ndarray] = BUILT_IN


def earned(gains: dict[str, np.ndarray], above: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """Compute what each row's target earns at AT in every metric.

    Args:
      gains: as in `Run`, M metrics.
      above: int [R]. Items with a higher score than the target.
      equal: int [R]. Items with the same score, the target among them.

    Returns:
      float64 [R, M].
    """
    return np.stack([ties.mean_gain(gain, above, equal, AT) for gain in gains.values()], axis=1)


def named(gains: dict) -> list[str]:
    """Names of the metrics at AT, as in results.json: 'hit@20', ..."""
    return [f'{name}@{AT}' for name in gains]


def mean(values: np.ndarray) -> float | None:
    """Average values for JSON: None of no values, for JSON has no nan."""
    return float(values.mean()) if len(values) else None


def interval(edges: np.ndarray) -> list[float] | None:
    """Convert an interval [2] for JSON: [low, high], or None of nan."""
    return None if np.isnan(edges).any() else edges.tolist()


def contents(session: np.ndarray, target: np.ndarray, fingerprint: str, items: int,
             features: dict[str, np.ndarray], ranks: dict[str, dict[str, np.ndarray]],
             gains: dict[str, metrics.Gain] = metrics.GAINS) -> dict:
    """Collect the arrays of a run's ranks.npz by name, as `read` expects them.

    A metric of the config is stored as the value of a target at each place. A comparison therefore
    needs no module of the run's.
    """
    tables = {METRIC + n: metrics.gain_table(x, AT) for n, x in gains.items() if n not in BUILT_IN}
    counts = {f'{model}/{part}': x for model, rank in ranks.items() for part, x in rank.items()}
    return {'session': session, 'target': target, 'fingerprint': np.array(fingerprint),
            'items': np.array(items), **tables, **counts,
            **{ROW + name: values for name, values in features.items()}}


def read(path: str | Path) -> Run:
    """Read a run's ranks.npz.

    Args:
      path: the run's workdir, or the file.

    Raises:
      InputError: the file is absent or unreadable, or it holds numbers that are not ranks.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    refuse_if(not file.is_file(), f'{file} does not exist. Expected the workdir of a finished run')
    with (refusing(UNREADABLE, f'{file} cannot be read', _AGAIN), file.open('rb') as opened,
          np.load(opened, allow_pickle=False) as stored):
        arrays = {name: stored[name] for name in stored.files}
    absent = [n for n in ('session', 'target', 'fingerprint', 'items') if n not in arrays]
    refuse_if(absent, f'{file} has no {", ".join(absent)}: another version wrote it. {_AGAIN}')

    def part(prefix):
        return {n.removeprefix(prefix): x for n, x in arrays.items() if n.startswith(prefix)}

    def check(name, shape, least, most=np.inf):
        """Return an array if it is one whole number in a range per row."""
        array = arrays.get(name, np.array(None))
        refuse_if(array.shape != shape or array.dtype.kind not in 'iub',
                  f'{file}: {name} is not one whole number per row. {_AGAIN}')
        refuse_if(not ((array >= least) & (array <= most)).all(),
                  f'{file}: {name} holds a number that is not a rank. {_AGAIN}')
        return array

    rows = np.size(arrays['target']),
    items = int(check('items', (), 1))
    session, target = check('session', rows, 0), check('target', rows, 0, items)
    features, gains, ranks = part(ROW), part(METRIC), {}
    for name in features:
        check(ROW + name, rows, 0)
    for name, gain in gains.items():
        refuse_if(gain.shape != (AT,) or gain.dtype.kind != 'f' or not np.isfinite(gain).all(),
                  f'{file}: {METRIC}{name} is not {AT} finite numbers. {_AGAIN}')
    for name in (n.removesuffix('/above') for n in arrays if n.endswith('/above')):
        above = check(f'{name}/above', rows, 0)
        most = np.where(target > 0, items - above, 1)  # a target that is not ranked is below all
        ranks[name] = above, check(f'{name}/equal', rows, 1, most)
    return Run(file.parent, session, target, str(arrays['fingerprint']), items, features, ranks,
               {**BUILT_IN, **gains})


def compare(first: Sequence[Run], second: Sequence[Run], models: tuple[str, str], *,
            sliced: bool = True) -> dict:
    """Compare model A of `first` with model B of `second`.

    The k-th run of both is the k-th seed: rows are paired within it. A metric is the mean over the
    rows of all seeds. Seeds of one data set share its sessions. A session that is drawn, or whose
    sign changes, is so in every seed at once. Only 'per_seed' shows how seeds differ.

    Args:
      first: runs of A.
      second: as many runs of B, on the same data, each with the rows of the other.
      models: names of A and B in these runs.
      sliced: whether slices are compared, too; without them it takes a tenth of the time.

    Returns:
      A dict for JSON: 'runs', 'models', 'items', 'sessions', 'level', 'metrics', 'unknown_slices'
      and 'slices' {'all' or a slice: {'rows', and per metric 'a', 'b', 'difference' (a - b) with
      '*_interval', 'p', 'won' and 'lost' (share of rows), 'per_seed' (differences)}}. A number
      over no rows is None.

    Raises:
      InputError: a model is unknown, the numbers of seeds differ, or rows differ.
    """
    refuse_if(len(first) != len(second), f'{len(first)} and {len(second)} runs cannot be paired. '
              'Expected as many seeds on both sides, in the same order')
    # metrics that every run has, with the same values
    gains = {name: gain for name, gain in first[0].gains.items() if all(
        np.array_equal(gain, run.gains.get(name)) for run in (*first, *second))}
    session, seed, rows_earned, first_seed = [], [], [], {}
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        _same_rows(a, b)
        for run, model in zip((a, b), models, strict=True):
            refuse_if(model not in run.ranks, f'{run.path} has no model {model!r}. Expected one of '
                      f'{", ".join(run.ranks)}')
        pair = [earned(gains, *run.ranks[n]) for run, n in zip((a, b), models, strict=True)]
        difference = pair[0] - pair[1]
        difference[np.abs(difference) < _NOTHING] = 0
        rows_earned.append(np.stack([*pair, difference], axis=1))  # [R, 3, M]
        seed.append(np.full(len(a.target), number))
        # runs on the same rows have their sessions in common
        data = first_seed.setdefault(
            (a.fingerprint, a.session.tobytes(), a.target.tobytes()), number)
        session.append(np.stack([np.full(len(a.target), data), a.session]))
    session = np.unique(np.concatenate(session, axis=1), axis=1, return_inverse=True)[1].ravel()
    seed, rows_earned = np.concatenate(seed), np.concatenate(rows_earned)
    features, unknown = _common(first, second)
    chosen = {'all': np.ones(len(seed), bool), **(slices.chosen(features) if sliced else {})}
    return {'runs': [[str(run.path) for run in side] for side in (first, second)],
            'models': list(models), 'items': sorted({run.items for run in first}),
            'sessions': int(session.max()) + 1, 'level': statistics.LEVEL,
            'metrics': named(gains), 'unknown_slices': unknown,
            'slices': _measured(named(gains), rows_earned, chosen, session, seed)}


def show(result: dict, console: Console) -> None:
    """Print the result of `compare` in percent."""
    say = partial(console.print, highlight=False, markup=False)
    for side, model, runs in zip('AB', result['models'], result['runs'], strict=True):
        say(f'{side}: {model} of {", ".join(runs)}')
    seeds, all_rows = len(result['runs'][0]), result['slices']['all']
    say(f'{result["sessions"]} sessions, {all_rows["rows"]} rows of {seeds} seed'
        f'{"s" * (seeds > 1)}; {" and ".join(map(str, result["items"]))} items ranked')
    for metric in result['metrics']:
        console.print(console_lib.table(
            f'{metric}, %', ('rows of', 'number', 'A', 'B', 'A - B', 'p', 'A won', 'B won'),
            ((name, str(part['rows']), *_cells(part[metric]))
             for name, part in result['slices'].items() if part['rows']), pad_edge=False))
    if seeds > 1:
        for metric in result['metrics']:
            by_seed = ', '.join(f'{100 * x:+.2f}' for x in all_rows[metric]['per_seed'])
            say(f'{metric}, A - B by seed: {by_seed}')
    say(f'[low, high]: {100 * result["level"]:.0f} % by bootstrap over sessions; p: sign flips of '
        'whole sessions, two-sided; won: share of the rows')
    if result['unknown_slices']:
        say('without slices, because runs differ in them or lack them: '
            + ', '.join(result['unknown_slices']))


@cli.command('tpad_jax.evaluate', 'Compares two models by the ranks of their test rows.', {
    '--compare': dict(nargs='+', required=True, metavar='RUN',
                      help='workdirs of A and of B, several seeds separated by commas; one '
                      'side alone compares two of its models'),
    '--model': dict(default='tpad', help='the model on both sides'),
    '--models': dict(nargs=2, metavar=('A', 'B'), help='the model of each side'),
    '--json': dict(type=Path, metavar='FILE', help='also write the result to FILE'),
})
def main(args) -> None:
    """Compare the runs and print the tables."""
    refuse_if(len(args.compare) > 2 or (len(args.compare) == 1 and not args.models), '--compare '
              f'names {len(args.compare)} side(s). Expected two, or one and two --models of it')
    sides = [[read(path) for path in side.split(',')] for side in args.compare]
    result = compare(sides[0], sides[-1], tuple(args.models or (args.model, args.model)))
    if args.json is not None:
        files.write_json(args.json, result)
    show(result, Console(width=None if Console().is_terminal else WIDTH))


def _same_rows(a, b):
    """Refuse two runs with different rows."""
    pair = f'{a.path} and {b.path} cannot be compared row by row: they'
    refuse_if(not len(a.target) + len(b.target), f'{pair} have no test rows')
    facts = {'data fingerprint': [a.fingerprint, b.fingerprint],
             'number of items ranked': [a.items, b.items],
             'number of test rows': [len(a.target), len(b.target)]}
    differ = [f'the {name} ({x!s:.12} and {y!s:.12})' for name, (x, y) in facts.items() if x != y]
    for name in ('session', 'target') if len(a.target) == len(b.target) else ():
        rows = np.flatnonzero(getattr(a, name) != getattr(b, name))
        differ += [f'the {name} of {len(rows)} rows (the first: {row})' for row in rows[:1]]
    refuse_if(differ, f'{pair} differ in {", ".join(differ)}')


def _common(first, second):
    """Row features of all seeds that every run has and each pair agrees on; names of the others."""
    names = dict.fromkeys(name for run in (*first, *second) for name in run.features)
    known = {name: np.concatenate([run.features[name] for run in first]) for name in names
             if all(name in a.features and np.array_equal(a.features[name], b.features.get(name))
                    for a, b in zip(first, second, strict=True))}
    return known, [name for name in names if name not in known]


def _measured(names, rows_earned, chosen, session, seed):
    """Compute the 'slices' of `compare`.

    Args:
      names: of M metrics.
      rows_earned: float [R, 3, M], of A, B and A - B.
      chosen: {slice: bool [R]}.
      session: int [R].
      seed: int [R].
    """
    total, weight = statistics.sliced(rows_earned.reshape(len(seed), -1), chosen.values(), session)
    shape = len(chosen), *rows_earned.shape[1:]
    edges = statistics.intervals(total, weight).reshape(*shape, 2)
    differences = total.reshape(len(total), *shape)[:, :, 2]
    p = statistics.sign_flip(differences.reshape(len(total), -1)).reshape(shape[0], shape[2])

    def cell(rows, place, m):
        part, apart = rows_earned[rows, :, m], rows_earned[rows, 2, m]
        out = {}
        for row, key in enumerate(('a', 'b', 'difference')):
            out |= {key: mean(part[:, row]), f'{key}_interval': interval(edges[place, row, m])}
        return {**out, 'p': float(p[place, m]) if len(part) else None,
                'won': mean(apart > 0), 'lost': mean(apart < 0),
                'per_seed': [mean(apart[seed[rows] == k]) for k in range(seed.max() + 1)]}

    return {name: {'rows': int(rows.sum()),
                   **{metric: cell(rows, place, m) for m, metric in enumerate(names)}}
            for place, (name, rows) in enumerate(chosen.items())}


def _cells(cell):
    """A table's cells of one metric."""
    out = []
    for key, form in (('a', '.2f'), ('b', '.2f'), ('difference', '+.2f')):
        edges = cell[f'{key}_interval']
        shown = '' if edges is None else f' [{", ".join(f"{100 * x:{form}}" for x in edges)}]'
        out.append(escape(f'{100 * cell[key]:{form}}{shown}'))
    p = '< .001' if cell['p'] < 0.001 else f'{cell["p"]:.3f}'
    return (*out, p, f'{100 * cell["won"]:.1f}', f'{100 * cell["lost"]:.1f}')
