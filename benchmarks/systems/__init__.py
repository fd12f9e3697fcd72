"""The systems of configs/systems.py put to the test: `python -m benchmarks.systems [NAME ...]`.

Each system has a module of its name in this package:

    MEASURES   {measure: (factor in the tables, digits)}
    TESTS      its claims, declared before a cell was run; corrected together (Holm)
    cells()    the cells in the order in which they run
    run(cell, place)   {measure: a number, or (sums, weights), float [S] each, over the test
                       sessions}; it may resume in place.workdir, which is the cell's own

A cell's JSON in benchmarks/systems/NAME/ has its measures, the commit and the processor's seconds.
Cells that exist are not run again. A measure is the ratio of its sums and weights; intervals draw
worlds, seeds and sessions (hierarchical.hierarchical). Numbers have no interval in the tables.
"""

import base64
import datetime
import importlib
import itertools
import json
import os
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
LEVEL = 0.05


class Cell(NamedTuple):
    """One training: an arm, on a data set or at a size, of a world and a seed of training."""

    arm: str
    on: str = 'planted'
    world: int = 0
    seed: int = 0

    @property
    def file(self) -> str:
        """Name of its JSON."""
        return f'{self.on}_{self.arm}_world{self.world}_seed{self.seed}.json'


class Test(NamedTuple):
    """A claim: on a data set, `arm` exceeds `other` by more than `above` in a measure."""

    arm: str
    other: str
    measure: str
    on: str = 'planted'
    above: float = 0.0


class Place(NamedTuple):
    """What a cell runs with: its own workdir, `stopping`, asked between steps, and directories.

    `data` are the directories {name: path} of --data.
    """

    workdir: Path
    stopping: Callable[[], bool]
    data: Mapping[str, str]


def names() -> list[str]:
    """Systems that have a benchmark."""
    return sorted(file.stem for file in FOLDER.glob('[a-z]*.py'))


def module(name: str):
    """The module of a system."""
    return importlib.import_module(f'{__name__}.{name}')


def run(name: str, workdir: Path, stopping, data: Mapping[str, str]) -> None:
    """Run the cells of a system that do not exist, except those on a data set without directory."""
    from benchmarks.checkout import commit
    from tpad_jax.core import files
    from tpad_jax.errors import Stopped

    system, folder = module(name), FOLDER / name
    for cell in system.cells():
        if (folder / cell.file).is_file():
            continue
        if cell.on in getattr(system, 'DATA', ()) and cell.on not in data:
            print(f'{name}: {cell.on} is left out: --data={cell.on}=DIR names no directory')
            continue
        if stopping():
            raise Stopped('stopped between cells')
        print(f'{name}: {" ".join(map(str, cell))}', flush=True)
        begun, made = time.process_time(), commit()
        place = Place(workdir / name / cell.file.removesuffix('.json'), stopping, data)
        measures = {key: _packed(x) for key, x in system.run(cell, place).items()}
        files.write_json(folder / cell.file, {
            **cell._asdict(), 'measures': measures, 'commit': made,
            'date': f'{datetime.date.today()}', 'cpu_seconds': time.process_time() - begun,
            'cpus': os.cpu_count()})


def planted(job, score) -> dict:
    """The shares of the oracle's expected hit@20 that a scorer earns on a planted job's test."""
    from benchmarks import ablation

    (own, cold), (best, most) = (ablation.by_session(job.test, ablation.earnings(job, x)[:, 2:])
                                 for x in (score, job.probabilities))
    return {'share': (own, best), 'share, cold': (cold, most)}


def projected(job, seed: int):
    """Rows k of a planted job, without reading an item: random projections of true attributes.

    Noise of half of their standard deviation is added. float32 [V + 1, M, D].
    """
    import jax.numpy as jnp
    import numpy as np

    rng, shape = np.random.default_rng(seed), job.blank['k'].shape
    true = np.asarray(job.catalogue['true'])
    rows = true @ rng.normal(size=(true.shape[1], int(np.prod(shape[1:]))))
    rows += 0.5 * rows.std() * rng.normal(size=rows.shape)
    rows[0] = 0
    return jnp.asarray(rows.reshape(shape), jnp.float32)


def content_rule(job, k):
    """A scorer that reads rows k [V + 1, M, D] alone: the experts content, popularity and cold."""
    import jax.numpy as jnp
    import numpy as np

    from tpad_jax.evaluation import experts
    from tpad_jax.models.experts import session_columns

    k = np.asarray(k)
    table = experts.tables(job.data.train, job.data.num_items, k, ordered=True)
    fit = experts.fit(lambda items: np.zeros((len(items), len(k)), np.float32), table, job.valid,
                      ('content', 'popularity', 'cold'))
    rules, columns = experts.mixture(fit, table)

    def score(items):
        return np.asarray(session_columns(rules, jnp.zeros((len(items), 0)), columns[items, 1:],
                                          items) @ columns.T)

    return score


def of_content(job, k) -> dict:
    """Measures of rows k [V + 1, M, D] alone: shares of their rule, and probes of cold items."""
    import numpy as np

    from tpad_jax.diagnostics import probes

    found = probes.attributes(np.asarray(k)[1:], probes.known_attributes(job), job.data.warm[1:])
    return {**planted(job, content_rule(job, k)),
            'probe': float(np.mean([line['accuracy'] for line in found.values()]))}


def base(place: Place, *, width: int, layers: int, steps: int) -> str:
    """Directory of a small base of these sizes, which is trained where there is none."""
    from tpad_jax import pretrain
    from tpad_jax.errors import Stopped

    out = place.workdir.parents[1] / 'bases' / f'{width}_{layers}_{steps}'
    if not out.is_dir():
        part = out.with_suffix('.part')
        options = {'out': part, 'width': width, 'layers': layers, 'steps': steps}
        if status := pretrain.main([f'--{name}={value}' for name, value in options.items()]):
            raise Stopped(f'tpad_jax.pretrain exited with {status}')
        part.rename(out)
    return str(out)


def read(name: str) -> dict[Cell, dict]:
    """The finished cells of a system, {Cell: {measure: (float [S], float [S])}}."""
    out = {}
    for file in sorted((FOLDER / name).glob('*.json')):
        content = json.loads(file.read_text())
        cell = Cell(*(content[key] for key in Cell._fields))
        out[cell] = {key: _unpacked(x) for key, x in content['measures'].items()}
        out[cell]['CPU s'] = _unpacked(content['cpu_seconds'])
    return out


def worlds(cells: Mapping[Cell, dict], test: Test) -> list:
    """hierarchical.World of each world with cells of both arms, of their difference.

    Args:
      cells: of `read`.
      test: its arms and measure; other='' subtracts nothing.
    """
    import numpy as np

    from benchmarks import hierarchical

    found = {cell: x[test.measure] for cell, x in cells.items()
             if cell.on == test.on and test.measure in x}
    out = []
    for world, group in itertools.groupby(sorted(c[2:] for c in found if c.arm == test.arm),
                                          lambda pair: pair[0]):
        totals = []
        for _, seed in group:
            own = found[Cell(test.arm, test.on, world, seed)]
            other = found.get(Cell(test.other, test.on, world, seed)) if test.other else (0, 1)
            if other is not None:
                totals.append(own[0] - other[0])
                weight = own[1]
        if totals:
            out.append(hierarchical.World(np.stack(totals), weight))
    return out


def judged(cells: Mapping[Cell, dict], tests) -> list:
    """[(test, worlds, mean, low, high, corrected p)] of the tests that have cells."""
    import numpy as np

    from benchmarks import hierarchical

    out = []
    for test in tests:
        if parts := worlds(cells, test):
            samples = hierarchical.hierarchical(parts, draws=4000)
            low, high = np.quantile(samples, [LEVEL / 2, 1 - LEVEL / 2])
            mean = float(np.mean([part.by_seed.mean() for part in parts]))
            out.append((test, len(parts), mean, low, high,
                        hierarchical.p_value(samples, test.above)))
    corrected = hierarchical.holm([line[-1] for line in out])
    return [(*line[:-1], p) for line, p in zip(out, corrected, strict=True)]


def show(name: str, console) -> None:
    """Print the tables of a system: its tests, and every arm's measures beside the first arm's."""
    import numpy as np
    from rich.table import Table

    system, cells = module(name), read(name)
    scales = {**system.MEASURES, 'CPU s': (1, 1)}

    def interval(measure, *values):
        factor, digits = scales[measure]
        mean, low, high = (f'{factor * x:+.{digits}f}' for x in values)
        return f'{mean} [{low}, {high}]'

    table = Table(title=f'{name}: tests', title_justify='left', box=None)
    for head in ('on', 'measure', 'arm', 'minus', 'worlds', 'difference', 'above', 'p (Holm)'):
        table.add_column(head, no_wrap=True)
    for test, count, mean, low, high, p in judged(cells, system.TESTS):
        table.add_row(test.on, test.measure, test.arm, test.other, str(count),
                      interval(test.measure, mean, low, high),
                      f'{scales[test.measure][0] * test.above:g}', f'{p:.3f}')
    if table.rows:
        console.print(table)
    order = list(dict.fromkeys((cell.on, cell.arm) for cell in system.cells()))
    for on in dict.fromkeys(on for on, _ in order):
        arms = [arm for place, arm in order if place == on]
        table = Table(title=f'{name}, {on}: mean, and difference to {arms[0]} [95 %]',
                      title_justify='left', box=None)
        for head in ('arm', 'worlds', *scales):
            table.add_column(head, justify='left' if head == 'arm' else 'right', no_wrap=True)
        for arm in arms:
            row, count = [], 0
            for measure, (factor, digits) in scales.items():
                own = worlds(cells, Test(arm, '', measure, on))
                text = ''
                if own:
                    text = f'{factor * np.mean([x.by_seed.mean() for x in own]):.{digits}f}'
                if arm != arms[0] and own and own[0].weight.size > 1:
                    for line in judged(cells, [Test(arm, arms[0], measure, on)]):
                        text += '  ' + interval(measure, *line[2:5])
                row.append(text)
                count = max(count, len(own))
            if count:
                table.add_row(arm, str(count), *row)
        if table.rows:
            console.print(table)


def _packed(measure):
    """(sums, weights) as text, float32 and compressed; a number as it is."""
    import numpy as np

    if not isinstance(measure, tuple):
        return float(measure)
    return base64.b64encode(zlib.compress(np.asarray(measure, '<f4').tobytes(), 9)).decode()


def _unpacked(measure):
    """What `_packed` was given; a number is the sum of one session."""
    import numpy as np

    if not isinstance(measure, str):
        return np.array([measure]), np.ones(1)
    return np.frombuffer(zlib.decompress(base64.b64decode(measure)), '<f4').astype(
        float).reshape(2, -1)
