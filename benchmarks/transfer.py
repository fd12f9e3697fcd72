"""Sessions of another catalogue: `python -m benchmarks.transfer [--worlds=0,1] [--run=0,100]`.

A world is a law of what follows what and two catalogues A and B under it, with other items, texts,
pictures, popularity and sessions (config.data.planted.law_seed). Five arms recommend B's items
after so many sessions of B:

    knowledge     the recommender on k of B, which was read by the adapter of A's items
    alone         T learns on B alone; the recommender on T's items r
    pretrained    the recommender on k, trained on A without ids; B's ids start at zero
    transfer      T of A learns on B; the recommender on its r. TPAD
    items         the recommender on r of A's T, which learns nothing of B
    drawn         T of A learns on B in stage teach; the recommender on r first learns sessions that
                  T draws over B's items, without ids, and then B's. TPAD with lessons

What a training begins with is kept where it predicts validation better than its steps. With no
session of B, `knowledge` and `items` list items like the last one, `alone` knows nothing,
`pretrained` is A's recommender and `transfer` is A's T. All arms have the config of the default
job, without experts and with r = A(k), so that items are read once for all arms. Every arm has the
same validation sessions of B, which choose its step.

A cell is an arm of a world at a size, under several seeds of the recommender; its JSON in --cells
holds every test session's sum of expected hits. Cells that exist are not run again, and trainings
resume. The table has intervals by the hierarchical bootstrap over worlds, seeds and sessions, and
the power of the design, computed from the variance components of these cells.
"""

import copy
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks import ablation
from tpad_jax.core.cli import STOPPED
from tpad_jax.core.startup import begin
from tpad_jax.errors import Stopped

FLAGS = flags.FLAGS
SIZES = 0, 100, 500, 1500, 6000  # sessions of B
ARMS = 'knowledge', 'alone', 'pretrained', 'transfer', 'items', 'drawn'
STAGES = 'knowledge', 'teach', 'transfer'  # that make T and r
LEVEL, EFFECT, DETECTED_AT = 0.05, 0.015, 1500


class Test(NamedTuple):
    """A claim: over these sizes, `arm` exceeds `other` by more than -margin (shares of oracle)."""

    arm: str
    other: str
    sizes: tuple[int, ...]
    margin: float = 0.0


# The primary tests, declared before any cell was run. They are corrected together (Holm).
PRIMARY = (Test('transfer', 'knowledge', (100,)), Test('transfer', 'knowledge', (500,)),
           Test('transfer', 'pretrained', SIZES, 0.01))
# The arm `drawn` was designed on world 0, when `transfer` had been seen to miss the third test in
# worlds 0 to 2. Its tests are declared before any cell of another world was run, and leave it out.
DESIGNED_ON = 0
LESSONS = (Test('drawn', 'knowledge', (100,)), Test('drawn', 'knowledge', (500,)),
           Test('drawn', 'pretrained', SIZES, 0.01))


def make_config(world: int, catalogue: int):
    """The config of catalogue A (0) or B (1) of a world."""
    from configs import amazon
    from tpad_jax import config

    c = amazon.get_config()
    if FLAGS.tiny:
        config.tiny(c)
    c.update_from_flattened_dict({
        'seed': world, 'stages': ','.join(STAGES), 'experts': '', 'baselines': '', 'rivals': {},
        'diagnostics': 0, 'model.reread': False, 'model.recommend': 'k',
        'data.planted.law_seed': world, 'data.planted.seed': 1000 + 2 * world + catalogue,
        'data.planted.train': max(FLAGS.sizes)})
    return c


def first(job, arm: str, size: int):
    """A copy of B's job with so many training sessions, and without parameters that it trained."""
    import numpy as np

    from tpad_jax.data import sessions
    from tpad_jax.training import length

    out, train = copy.copy(job), sessions.take(job.data.train, np.arange(size))
    warm = sessions.warm_items(train, job.data.num_items)
    out.data = out.final = replace(job.data, train=train, warm=warm)
    out.config = length.of_data(make_config(job.config.seed, 1), train)
    out.count()
    out.name = f'{arm}_{size}'
    return out


def taught(job, params: dict, stages) -> None:
    """Train T and r of a job from `params` in separate folders, and add the rows r to the job."""
    from tpad_jax.models import readers
    from tpad_jax.training.stages import ENTRIES

    job.params = params
    for stage in stages:
        bind = ENTRIES[stage].scorer(job.spec, job.devices.own)
        job.run_stage(stage, name=f'{job.name}_{stage}')
        if stage == 'teach' and kept(job, bind, params):
            job.params = params
    r = readers.adapt_items(job.spec, job.nested(), job.catalogue['k'])
    job.catalogue = {**job.catalogue, 'r': r.at[0].set(0)}


def kept(job, bind, params: dict) -> bool:
    """Whether the parameters that a training began with predict validation better than its own."""
    from flax.traverse_util import unflatten_dict

    from tpad_jax.job.fitting import validated

    score = bind(unflatten_dict(params, sep='/'), job.catalogue)
    return validated(score, job, job.name)['nll'] < job.record['valid']['nll']


def recommender(job, reads: str, seed: int, start=None, use_id: bool = True):
    """Train a recommender of a job's sessions: the job with its parameters and record.

    Args:
      job: with its rows and sessions.
      reads: rows of content, 'k' or 'r'.
      seed: of its first parameters and of the order of batches.
      start: a job whose recommender it begins as, with ids that add nothing at first; or None.
      use_id: whether it has a table of ids.
    """
    import jax.numpy as jnp

    from tpad_jax.evaluation.scorers import scorer
    from tpad_jax.job import fitting

    out = copy.copy(job)
    out.config = copy.deepcopy(job.config)
    out.spec = replace(job.spec, recommend=(reads,), fusion=job.spec.fusion.clone(use_id=use_id))
    out.config.seed = 0  # of dropout: one program for all seeds and worlds
    spec = out.stage_spec('recommend')
    out.config.seed = 1000 * job.config.seed + seed
    fresh = out.fresh(out.spec)
    if start is not None:
        fresh = {path: start.params[path] if path in start.params else jnp.zeros_like(x)
                 for path, x in fresh.items()}
    out.params = {path: x for path, x in job.params.items()
                  if not path.startswith('recommender/')} | fresh
    trained, _, out.record = fitting.fit(out, f'{job.name}_seed{seed}', 'recommend', spec)
    if start is None or not kept(out, scorer(out.spec, out.devices.own), out.params):
        out.params = out.params | trained
    else:
        out.record = {'chosen': 0}
    return out


class World:
    """Catalogues A and B of a world, with all that their arms share."""

    def __init__(self, number: int, workdir: Path, stopping):
        """Read both catalogues with the adapter of A, and train T and A's recommenders.

        Args:
          number: of the world, its law and the seed of its T.
          workdir: of all runs.
          stopping: asked between steps.
        """
        folder = workdir / f'world{number}'
        self.a, self.b = (ablation.opened(make_config(number, i), folder / name, stopping, STAGES)
                          for i, name in enumerate('ab'))
        for stage in STAGES:
            self.a.run_stage(stage)
        self.a.name, self.pretrained, self.drawn = 'a', {}, self.b.params
        self.learnt = {path: x for path, x in self.a.params.items()
                       if not path.startswith('recommender/')}
        # B's items are read by K of A, which learnt no transition
        self.b.params = self.drawn | self.learnt
        self.b.catalogue = self.b.catalogue | self.b.encoders['knowledge'].leave(
            self.b.nested(), folder / 'b' / 'features' / 'knowledge', stopping=stopping)

    def without_ids(self, seed: int):
        """A's recommender on k without ids."""
        if seed not in self.pretrained:
            self.pretrained[seed] = recommender(self.a, 'k', seed, use_id=False)
        return self.pretrained[seed]

    def scorers(self, arm: str, size: int):
        """(job, {seed: (scorer, record)}) of an arm; without training there is one seed."""
        import jax.numpy as jnp

        from tpad_jax.evaluation.scorers import scorer, transfer_scorer

        job = first(self.b, arm, size)
        params = self.drawn if arm == 'alone' else self.drawn | self.learnt
        learns = {'alone': STAGES[1:], 'transfer': STAGES[1:], 'drawn': STAGES[1:2]}
        taught(job, params, learns.get(arm, ()) if size else ())
        reads = 'k' if arm in ('knowledge', 'pretrained') else 'r'
        own = transfer_scorer(job.spec, job.devices)(job.nested(), job.catalogue)
        if not size and arm not in ('pretrained', 'drawn'):
            alike = nearest(job.catalogue[reads])
            constant = nearest(jnp.zeros_like(job.catalogue['r']))
            return job, {0: ({'alone': constant, 'transfer': own}.get(arm, alike), {})}, own
        out, lessons = {}, drawn(job, own, FLAGS.lessons) if arm == 'drawn' else None
        for seed in range(FLAGS.seeds):
            start = self.without_ids(seed) if arm == 'pretrained' else None
            if lessons is not None:
                start = recommender(lessons, reads, seed, use_id=False)
            member = recommender(job, reads, seed, start) if size else start
            out[seed] = scorer(member.spec, member.devices)(
                member.nested(), job.catalogue), member.record if size else {}
        return job, out, own


def drawn(job, score, count: int):
    """A copy of a job whose sessions the Transfer-MLLM draws.

    Args:
      job: whose catalogue they are of.
      score: of the Transfer-MLLM, logits.
      count: sessions, of which a tenth validates.
    """
    import numpy as np

    from tpad_jax.data import sessions
    from tpad_jax.training import length

    data, total, seed = job.data, job.data.num_items, job.config.seed
    lengths = np.random.default_rng(seed).choice(data.valid.lengths, count)
    flat = sessions.drawn(score, np.minimum(lengths, job.max_length),
                          sessions.counts(data.train, total), seed)
    train, valid = (sessions.take(flat, part) for part in np.split(np.arange(count),
                                                                  [count * 9 // 10]))
    out = copy.copy(job)
    out.data = out.final = replace(data, train=train, valid=valid,
                                   warm=sessions.warm_items(train, total))
    out.valid = sessions.rows(valid, max_length=job.max_length, every_prefix=True)
    out.config = length.of_data(make_config(job.config.seed, 1), train)
    out.count()
    out.name = f'{job.name}_drawn'
    return out


def nearest(rows):
    """A scorer that lists items by the cosine of their rows [V+1, ...] and the last item's."""
    import numpy as np

    x = np.asarray(rows).reshape(len(rows), -1)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    def scores(items):
        last = items[np.arange(len(items)), np.maximum((items > 0).sum(1) - 1, 0)]
        return (x[last] @ x.T).astype(np.float32)

    return scores


def cell(world: World, number: int, arm: str, size: int) -> dict:
    """Run or resume a cell to its end."""
    from tpad_jax.job import results

    begun = time.perf_counter()
    job, scorers, own = world.scorers(arm, size)
    best = ablation.earnings(job, job.probabilities)[:, 2:]

    def share(earned):
        (hits, cold), (most, most_cold) = earned.sum(axis=0), best.sum(axis=0)
        return {'all': hits / most, 'cold': cold / most_cold if most_cold else None,
                'warm': (hits - cold) / (most - most_cold) if most > most_cold else None}

    seeds = {}
    for seed, (score, record) in scorers.items():
        earned = ablation.earnings(job, score)[:, 2:]
        seeds[str(seed)] = {
            'share': share(earned), 'chosen': record.get('chosen'), 'valid': record.get('valid'),
            'sums': ablation.pack(ablation.by_session(job.test, earned[:, :1]))}
    made = results.provenance(job)
    return {'world': number, 'arm': arm, 'sessions': size, 'seeds': seeds,
            'teacher': share(ablation.earnings(job, own)[:, 2:]),
            'oracle': ablation.pack(ablation.by_session(job.test, best[:, :1])),
            **{key: made[key] for key in ('commit', 'device', 'date')},
            'seconds': time.perf_counter() - begun}


def file_of(arm: str, size: int, number: int) -> Path:
    """Where a cell is kept."""
    return Path(FLAGS.cells) / f'{arm}_{size}_world{number}.json'


def read() -> dict:
    """All finished cells {(arm, size, world): cell}."""
    cells = map(json.loads, (file.read_text() for file in sorted(Path(FLAGS.cells).glob('*.json'))))
    return {(one['arm'], one['sessions'], one['world']): one for one in cells}


def differences(cells: dict, arm: str, other: str, sizes) -> list:
    """hierarchical.World of every world with all these cells, means over the sizes.

    Args:
      cells: of `read`.
      arm: one of ARMS.
      other: the arm to subtract; '': none.
      sizes: sessions of B.
    """
    import numpy as np

    from benchmarks import hierarchical

    def sums(name, size, number):
        seeds = cells[name, size, number]['seeds'].values()
        return np.concatenate([ablation.unpack(one['sums'], 1) for one in seeds])

    out = []
    for number in sorted({world for _, _, world in cells}):
        if any((name, size, number) not in cells for name in (arm, other) if name
               for size in sizes):
            continue
        total = np.mean(np.broadcast_arrays(*(
            sums(arm, size, number) - (sums(other, size, number) if other else 0)
            for size in sizes)), axis=0)
        weight = ablation.unpack(cells[arm, sizes[0], number]['oracle'], 1)[0]
        out.append(hierarchical.World(total, weight))
    return out


def judged(cells: dict, tests) -> list:
    """[(test, worlds, mean, low, high, corrected p)] of the tests that have cells."""
    import numpy as np

    from benchmarks import hierarchical

    out = []
    for test in tests:
        worlds = differences(cells, test.arm, test.other, test.sizes)
        if worlds:
            samples = hierarchical.hierarchical(worlds, draws=4000)
            low, high = np.quantile(samples, [LEVEL / 2, 1 - LEVEL / 2])
            mean = float(np.mean([world.by_seed.mean() for world in worlds]))
            out.append((test, len(worlds), mean, low, high,
                        hierarchical.p_value(samples, -test.margin)))
    corrected = hierarchical.holm([line[-1] for line in out])
    return [(*line[:-1], p) for line, p in zip(out, corrected, strict=True)]


def show(cells: dict, console: Console) -> None:
    """Print the primary tests, the table of arms and sizes, and the power of the design."""
    import numpy as np

    from benchmarks import hierarchical

    other = {key: cell for key, cell in cells.items() if key[2] != DESIGNED_ON}
    rows = judged(cells, PRIMARY) + judged(other, LESSONS)
    table = Table(title='Primary tests, points of the oracle; those of drawn without world '
                        f'{DESIGNED_ON}', title_justify='left', box=None)
    for head in ('arm', 'minus', 'sessions', 'worlds', 'difference', 'p (Holm)', 'holds'):
        table.add_column(head, no_wrap=True)
    for test, worlds, mean, low, high, p in rows:
        table.add_row(test.arm, test.other, ', '.join(map(str, test.sizes)), str(worlds),
                      f'{100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]', f'{p:.3f}',
                      'yes' if p < LEVEL and mean > -test.margin else 'no')
    console.print(table)
    sizes = sorted({size for _, size, _ in cells})
    pairs = [Test(arm, 'knowledge', (size,)) for size in sizes for arm in ARMS[1:]]
    beside = {line[0][::2]: line for line in judged(cells, pairs)}
    table = Table(title='Share of the oracle, %, and difference to knowledge [95 %]; *: p < 0.05, '
                        'Holm over the table', title_justify='left', box=None)
    for head in ('sessions', *ARMS, 'T alone', 'T of A'):
        table.add_column(head, justify='right', no_wrap=True)
    for size in sizes:
        shown = []
        for arm in ARMS:
            own = differences(cells, arm, '', (size,))
            text = f'{100 * np.mean([x.by_seed.mean() for x in own]):.1f}' if own else ''
            if (arm, (size,)) in beside:
                *_, mean, low, high, p = beside[arm, (size,)]
                text += (f' {100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]'
                         + '*' * (p < LEVEL))
            shown.append(text)
        own = [[one['teacher']['all'] for (name, n, _), one in cells.items()
                if (name, n) == (arm, size)] for arm in ('alone', 'transfer')]
        table.add_row(str(size), *shown, *(f'{100 * np.mean(x):.1f}' if x else '' for x in own))
    console.print(table)
    for size in sizes:
        worlds = differences(cells, 'transfer', 'knowledge', (size,))
        if len(worlds) < 2 or min(world.total.shape[0] for world in worlds) < 2:
            continue
        found = hierarchical.components(worlds)
        shape = (len(worlds), *worlds[0].total.shape)
        detected = hierarchical.power(EFFECT, found.of_mean(*shape), len(worlds))
        console.print(
            f'{size} sessions, transfer - knowledge: standard deviation between worlds '
            f'{100 * found.world ** 0.5:.2f}, seeds {100 * found.seed ** 0.5:.2f}, sessions '
            f'{100 * found.session ** 0.5:.1f} points; with {shape[0]} worlds, {shape[1]} seeds '
            f'and {shape[2]} sessions an effect of {100 * EFFECT:.1f} points is detected '
            f'{100 * detected:.0f} % of the time' + ' (bar: 80 %)' * (size == DETECTED_AT),
            highlight=False)


def main(argv):
    """Run the cells that are missing, world by world; print the tables."""
    del argv
    from tpad_jax.core import files

    FLAGS.sizes, FLAGS.worlds = [int(x) for x in FLAGS.sizes], [int(x) for x in FLAGS.worlds]
    os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', str(
        Path(FLAGS.workdir, 'compiled').absolute()))
    stopping = begin('')
    try:
        for number in () if FLAGS.show else FLAGS.worlds:
            missing = [(arm, size) for size in map(int, FLAGS.run or FLAGS.sizes)
                       for arm in FLAGS.arms or ARMS
                       if not file_of(arm, size, number).is_file()]
            world = World(number, Path(FLAGS.workdir), stopping) if missing else None
            for arm, size in missing:
                print(f'world {number}: {arm}, {size} sessions', flush=True)
                Path(FLAGS.cells).mkdir(parents=True, exist_ok=True)
                files.write_json(file_of(arm, size, number), cell(world, number, arm, size))
    except Stopped as stopped:
        print(f'benchmarks.transfer: {stopped}; the same command resumes', file=sys.stderr)
        sys.exit(STOPPED)
    show(read(), Console(width=180))


if __name__ == '__main__':
    flags.DEFINE_list('worlds', [str(i) for i in range(12)], 'numbers of worlds')
    flags.DEFINE_list('sizes', [str(x) for x in SIZES], 'sessions of B; the largest are prepared')
    flags.DEFINE_list('run', [], 'those of the sizes that are run now; []: all')
    flags.DEFINE_list('arms', [], 'those that are run now; []: all')
    flags.DEFINE_integer('lessons', 10000, 'sessions drawn')
    flags.DEFINE_integer('seeds', 4, 'seeds of the recommender in each world')
    flags.DEFINE_string('cells', str(Path(__file__).with_suffix('')), 'directory of the cells')
    flags.DEFINE_string('workdir', 'runs/transfer', 'where the runs live')
    flags.DEFINE_bool('tiny', False, 'the smallest sizes, to try the command')
    flags.DEFINE_bool('show', False, 'print the tables of the finished cells, run nothing')
    app.run(main)
