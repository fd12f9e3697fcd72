"""Two models on the same test rows, from the ranks that their runs left behind.

`python -m tpad_jax.evaluate --compare RUN_A RUN_B` is the command. A figure is a mean over rows, an
interval and a p-value are over sessions, and a difference is always paired row by row.
"""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tpad_jax.core import cli, files
from tpad_jax.errors import InputError
from tpad_jax.evaluation import metrics, slices, statistics

AT = 20
METRICS = tuple(f'{name}@{AT}' for name in metrics.GAINS)
FILE, ROW = 'ranks.npz', 'row/'  # ROW: what begins the name of a row feature in FILE
WIDTH = 112  # characters of the tables
_NOTHING = 1e-12  # a smaller difference of two gains is rounding
_AGAIN = 'delete results.json beside it and give the command of the run once more'
# what np.load raises of a file that is cut short, damaged, pickled or one array alone
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)


class Run(NamedTuple):
    """One run's test rows and every model's ranks on them.

    session, target: int [R]. fingerprint: of the data. items: V. features: {name: [R]} of `slices`.
    ranks: {model: (above, equal)}, int [R] each.
    """

    path: Path
    session: np.ndarray
    target: np.ndarray
    fingerprint: str
    items: int
    features: dict[str, np.ndarray]
    ranks: dict[str, tuple[np.ndarray, np.ndarray]]


def gains(above: np.ndarray, equal: np.ndarray) -> np.ndarray:
    """What each row's target earned in METRICS: int [R] twice -> float64 [R, M]."""
    return np.stack([metrics.mean_gain(name, above, equal, AT) for name in metrics.GAINS], axis=1)


def mean(values: np.ndarray) -> float | None:
    """The mean, or None of nothing, which JSON can say."""
    return float(values.mean()) if len(values) else None


def pair(edges: np.ndarray) -> list[float] | None:
    """An interval [2] as JSON: [low, high], or None where it is nan."""
    return None if np.isnan(edges).any() else edges.tolist()


def contents(session: np.ndarray, target: np.ndarray, fingerprint: str, items: int,
             features: dict[str, np.ndarray], ranks: dict[str, dict[str, np.ndarray]]) -> dict:
    """The arrays of a run's ranks.npz, by name: what `read` expects."""
    return {'session': session, 'target': target, 'fingerprint': np.array(fingerprint),
            'items': np.array(items), **{ROW + name: found for name, found in features.items()},
            **{f'{name}/{part}': found for name, rank in ranks.items()
               for part, found in rank.items()}}


def read(path: str | Path) -> Run:
    """Reads a run's ranks.npz.

    Args:
      path: the run's workdir, or the file.

    Raises:
      InputError: there is none, it cannot be read, or it holds what no ranking gives.
    """
    path = Path(path)
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise InputError(f'{file} does not exist; give the workdir of a finished run')
    try:
        with file.open('rb') as opened, np.load(opened, allow_pickle=False) as stored:
            found = {name: stored[name] for name in stored.files}
    except _UNREADABLE as error:
        raise InputError(f'{file} cannot be read ({error}); {_AGAIN}') from error
    absent = [n for n in ('session', 'target', 'fingerprint', 'items') if n not in found]
    if absent:
        raise InputError(f'{file} holds no {", ".join(absent)}, so another version wrote it; '
                         f'{_AGAIN}')
    rows = found['target'].shape
    _check(file, 'items', found['items'], (), 1)
    items = int(found['items'])
    _check(file, 'target', found['target'], (rows[0],) if rows else (0,), 1, items)
    features = {n.removeprefix(ROW): x for n, x in found.items() if n.startswith(ROW)}
    for name, array in {'session': found['session'], **features}.items():
        _check(file, name, array, rows, 0)
    ranks = {}
    for name in (n.removesuffix('/above') for n in found if n.endswith('/above')):
        above, equal = ranks[name] = found[f'{name}/above'], found.get(f'{name}/equal')
        _check(file, f'{name}/above', above, rows, 0)
        _check(file, f'{name}/equal', equal, rows, 1, items - above)
    return Run(file.parent, found['session'], found['target'], str(found['fingerprint']), items,
               features, ranks)


def compare(first: Sequence[Run], second: Sequence[Run], models: tuple[str, str], *,
            sliced: bool = True) -> dict:
    """Compares model A of `first` with model B of `second`.

    The k-th run of both is the k-th seed: rows are paired within it. Figures are means over the
    rows of all seeds. Seeds of one data set share its sessions, so a session drawn, or whose sign
    changes, is so in every seed at once: the spread that seeds cause shows in 'per_seed' alone.

    Args:
      first: runs of A. second: as many of B, on the same data, each with the other's rows.
      models: names of A and B in these runs.
      sliced: whether slices are compared, too; without them it takes a tenth of the time.

    Returns:
      JSON-able: 'runs', 'models', 'items', 'sessions', 'level', 'unknown_slices', and 'slices'
      {'all' or a slice: {'rows', and per METRICS 'a', 'b', 'difference' (a - b) with '*_interval',
      'p', 'won' and 'lost' (share of rows), 'per_seed' (differences)}}; None where nothing counts.

    Raises:
      InputError: an unknown model, another number of seeds, or rows that differ.
    """
    if len(first) != len(second):
        raise InputError(f'{len(first)} and {len(second)} runs cannot be paired: name as many '
                         'seeds on both sides, in the same order')
    session, seed, earned, where = [], [], [], {}
    for number, (a, b) in enumerate(zip(first, second, strict=True)):
        _same_rows(a, b)
        both = [gains(*_ranks(run, name)) for run, name in zip((a, b), models, strict=True)]
        difference = both[0] - both[1]
        difference[np.abs(difference) < _NOTHING] = 0
        earned.append(np.stack([*both, difference], axis=1))  # [R, 3, M]
        seed.append(np.full(len(a.target), number))
        # runs on the same rows have their sessions in common
        known = where.setdefault((a.fingerprint, a.session.tobytes(), a.target.tobytes()), number)
        session.append(np.stack([np.full(len(a.target), known), a.session]))
    session = np.unique(np.concatenate(session, axis=1), axis=1, return_inverse=True)[1].ravel()
    seed, earned = np.concatenate(seed), np.concatenate(earned)
    known, unknown = _common(first, second)
    chosen = {'all': np.ones(len(seed), bool), **(slices.chosen(known) if sliced else {})}
    return {'runs': [[str(run.path) for run in side] for side in (first, second)],
            'models': list(models), 'items': sorted({run.items for run in first}),
            'sessions': int(session.max()) + 1, 'level': statistics.LEVEL,
            'unknown_slices': unknown,
            'slices': _measured(earned, chosen, session, seed)}


def show(found: dict, console: Console) -> None:
    """Prints what `compare` found, in percent."""
    for side, model, runs in zip('AB', found['models'], found['runs'], strict=True):
        console.print(f'{side}: {model} of {", ".join(runs)}', highlight=False, markup=False)
    seeds = len(found['runs'][0])
    console.print(f'{found["sessions"]} sessions, {found["slices"]["all"]["rows"]} rows of '
                  f'{seeds} seed{"s" * (seeds > 1)}; {" and ".join(map(str, found["items"]))} '
                  'items ranked', highlight=False)
    for metric in METRICS:
        table = Table(title=f'{metric}, %', title_justify='left', box=None, pad_edge=False)
        for name in ('rows of', 'number', 'A', 'B', 'A - B', 'p', 'A won', 'B won'):
            table.add_column(name, justify='left' if name == 'rows of' else 'right', no_wrap=True)
        for name, part in found['slices'].items():
            if part['rows']:
                table.add_row(name, str(part['rows']), *_cells(part[metric]))
        console.print(table)
    if seeds > 1:
        for metric in METRICS:
            shown = ', '.join(f'{100 * x:+.2f}' for x in found['slices']['all'][metric]['per_seed'])
            console.print(f'{metric}, A - B by seed: {shown}', highlight=False)
    console.print(f'[low, high]: {100 * found["level"]:.0f} % by bootstrap over sessions; p: '
                  'sign flips of whole sessions, two-sided; won: share of the rows',
                  highlight=False, markup=False)
    if found['unknown_slices']:
        console.print('not the same, or not known, in all runs, so without slices: '
                      + ', '.join(found['unknown_slices']), highlight=False)


@cli.command('tpad_jax.evaluate')
def main(argv: list[str]) -> None:
    """Compare the runs and print the tables."""
    parser = cli.Parser('tpad_jax.evaluate', 'Compares two models on the same test rows by the '
                        'ranks that their runs stored.')
    parser.add_argument('--compare', nargs='+', required=True, metavar='RUN',
                        help='workdirs of A and of B, several seeds separated by commas; one side '
                             'alone compares two of its models')
    parser.add_argument('--model', default='tpad', help='the model on both sides')
    parser.add_argument('--models', nargs=2, metavar=('A', 'B'), help='the model of each side')
    parser.add_argument('--json', type=Path, metavar='FILE', help='also write the result to FILE')
    args = parser.parse_args(argv)
    if len(args.compare) > 2 or (len(args.compare) == 1 and not args.models):
        raise InputError(f'--compare names {len(args.compare)} side(s). Expected two, or one and '
                         'two --models of it')
    sides = [[read(path) for path in side.split(',')] for side in args.compare]
    models = tuple(args.models or (args.model, args.model))
    result = compare(sides[0], sides[-1], models)
    if args.json is not None:
        files.write_json(args.json, result)
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    show(result, console)


def _check(file, name, array, shape, least, most=np.inf):
    """Refuse an array of another shape, of no whole numbers, or of such that no ranking gives."""
    if array is None or array.shape != shape or array.dtype.kind not in 'iub':
        raise InputError(f'{file}: {name} is not one whole number a row; {_AGAIN}')
    if not ((array >= least) & (array <= most)).all():
        raise InputError(f'{file}: {name} holds a number that no ranking gives; {_AGAIN}')


def _ranks(run, model):
    if model not in run.ranks:
        raise InputError(f'{run.path} has no model {model!r}; choose from {", ".join(run.ranks)}')
    return run.ranks[model]


def _same_rows(a, b):
    """Refuse two runs whose rows are not the same."""
    differ = []
    if a.fingerprint != b.fingerprint:
        differ.append(f'the data fingerprint ({a.fingerprint[:12]} and {b.fingerprint[:12]})')
    if a.items != b.items:
        differ.append(f'the number of items ranked ({a.items} and {b.items})')
    if len(a.target) != len(b.target):
        differ.append(f'the number of test rows ({len(a.target)} and {len(b.target)})')
    else:
        for name in ('session', 'target'):
            apart = np.flatnonzero(getattr(a, name) != getattr(b, name))
            if len(apart):
                differ.append(f'the {name} of {len(apart)} rows (the first: {apart[0]})')
    if not len(a.target):
        differ.append('nothing, but they have no test rows')
    if differ:
        raise InputError(f'{a.path} and {b.path} cannot be compared row by row: they differ in '
                         + ', '.join(differ))


def _common(first, second):
    """{feature: [rows of all seeds]} of what all runs know and each pair agrees on; other names."""
    names = dict.fromkeys(name for run in (*first, *second) for name in run.features)
    pairs = list(zip(first, second, strict=True))
    known = {name: np.concatenate([a.features[name] for a, _ in pairs]) for name in names
             if all(name in a.features and name in b.features
                    and np.array_equal(a.features[name], b.features[name]) for a, b in pairs)}
    return known, [name for name in names if name not in known]


def _measured(earned, chosen, session, seed):
    """float [R, 3, M] of A, B and A - B, {slice: bool [R]} -> 'slices' of `compare`."""
    total, weight = statistics.sliced(earned.reshape(len(earned), -1), chosen.values(), session)
    shape = len(chosen), *earned.shape[1:]
    edges = statistics.intervals(total, weight).reshape(*shape, 2)
    apart = total.reshape(len(total), *shape)[:, :, 2]
    p = statistics.sign_flip(apart.reshape(len(total), -1)).reshape(shape[0], shape[2])
    out = {}
    for place, (name, rows) in enumerate(chosen.items()):
        out[name] = {'rows': int(rows.sum())}
        for m, metric in enumerate(METRICS):
            part, number = earned[rows, :, m], seed[rows]
            cell = {}
            for row, key in enumerate(('a', 'b', 'difference')):
                cell[key] = mean(part[:, row])
                cell[f'{key}_interval'] = pair(edges[place, row, m])
            cell['p'] = float(p[place, m]) if len(part) else None
            cell['won'], cell['lost'] = mean(part[:, 2] > 0), mean(part[:, 2] < 0)
            cell['per_seed'] = [mean(part[number == k, 2]) for k in range(seed.max() + 1)]
            out[name][metric] = cell
    return out


def _cells(cell):
    """A table's cells of one metric."""
    out = []
    for key, form in (('a', '.2f'), ('b', '.2f'), ('difference', '+.2f')):
        edges = cell[f'{key}_interval']
        shown = '' if edges is None else f' [{", ".join(f"{100 * x:{form}}" for x in edges)}]'
        out.append(escape(f'{100 * cell[key]:{form}}{shown}'))
    p = '< .001' if cell['p'] < 0.001 else f'{cell["p"]:.3f}'
    return (*out, p, f'{100 * cell["won"]:.1f}', f'{100 * cell["lost"]:.1f}')
