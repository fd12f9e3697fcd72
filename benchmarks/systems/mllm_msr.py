"""MLLM-MSR: long sessions read block by block, and a language model as the last judge.

Long: planted sessions of 8 to 40 items, whose next item depends on the brand of the first. Stage
teach alone, on rows k without reading items; a linear probe reads that brand off the state of the
Transfer-MLLM after the session, which in the longest is 13 blocks later. All arms do as many
operations in training (products of a step times steps, `profiling.operations`). MiB: temporary
memory of a compiled gradient for 32 sessions of 8 and of 80 items.

Rerank: the first 100 items of the rule content_lasso, in its order, in the order of a text decoder
(--data=smollm2=DIR) that is asked for yes or no, and at random. A share is of the best possible.
"""

from dataclasses import replace

from benchmarks.systems import Cell, Test, planted, projected
from tpad_jax.data.synthetic import planted as planted_lib

ARMS, WORLDS, LENGTHS, BLOCK = ('compressed', 'recurrent', 'item'), range(3), (8, 40), 3
DATA, ORDERS, LISTS, RULE = ('smollm2',), ('rule', 'yes_no', 'random'), 4, 500
STEPS, ROWS = 200, 32  # of the arm 'compressed'
MEASURES = {'brand': (100, 1), 'brand, 13 blocks': (100, 1), 'share': (100, 1), 'steps': (1, 0),
            'MiB at 8': (1, 1), 'MiB at 80': (1, 1)}
TESTS = [Test('recurrent', other, measure) for other in ('compressed', 'item')
         for measure in ('brand, 13 blocks', 'share')]
TESTS += [Test('yes_no', other, 'share', 'smollm2') for other in ('rule', 'random')]
_STREAM = 13  # random streams of long sessions; those of other planted sessions are lower


def cells():
    """World after world, then the lists."""
    return [Cell(arm, 'planted', world) for world in WORLDS for arm in ARMS] + [
        Cell(order, 'smollm2', world) for world in WORLDS for order in ORDERS]


def load(config, workdir):
    """Read the planted catalogue and draw long sessions of the same law."""
    import numpy as np

    from tpad_jax.data import sessions

    data, world = planted_lib.SOURCE.load(config, workdir), SOURCE.world(config)
    number = np.argsort(planted_lib.planted_ids(world, data.asins)).astype(np.int32)
    parts = {}
    for place, split in enumerate(('train', 'valid', 'test')):
        rows = planted_lib.sample_sessions(
            world, config.data.planted[split],
            np.random.default_rng([config.data.planted.seed, _STREAM + place]),
            warm_only=split == 'train', lengths=LENGTHS)
        ends = np.append(0, (rows > 0).sum(axis=1).cumsum())
        parts[split] = sessions.Sessions(number[rows[rows > 0]], ends, np.arange(len(rows)))
    return replace(data, **parts, warm=sessions.warm_items(parts['train'], data.num_items),
                   audit={}, fingerprint='')


# one row for each session, as in published protocols, which are for sessions without times
SOURCE = replace(planted_lib.SOURCE, load=load, longest=LENGTHS[1] - 1, timed=False)


def run(cell, place):
    """Train and probe a Transfer-MLLM, or order lists."""
    return (_rerank if cell.on == 'smollm2' else _long)(cell, place)


def _long(cell, place):
    import jax
    import numpy as np
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from benchmarks import ablation
    from configs import systems
    from tpad_jax.data.synthetic import wording
    from tpad_jax.training import profiling
    from tpad_jax.training.stages import ENTRIES

    c = systems.get_config('mllm_msr')
    c.seed = c.data.planted.seed = cell.world
    c.model.form, c.diagnostics = cell.arm, 0
    c.data.source, c.data.max_length = f'{__name__}:SOURCE', SOURCE.longest
    c.data.protocol, c.data.published_last_only = 'published', True
    c.data.planted.valid = 1500  # on which the probe is fitted
    c.stage.teach.update(steps=STEPS, batch_size=ROWS, epochs=0.0, eval_every=0, patience=0)
    job = ablation.opened(c, place.workdir, place.stopping, ('teach',))
    try:
        job.catalogue |= {'k': projected(job, cell.world)}
        same = replace(job.spec, form='compressed',
                       transfer=job.spec.transfer.clone(block=0, whole=False))
        cost, own = (profiling.operations(*_gradient(job, spec, SOURCE.longest))
                     for spec in (same, job.spec))
        job.config.stage.teach.steps = steps = round(STEPS * cost / own)
        job.run_stage('teach')
        score = ENTRIES['teach'].scorer(job.spec, job.devices.own)(job.nested(), job.catalogue)
        brands = job.attributes[:, wording.ATTRIBUTES.index('brand')]
        (x, y), (seen, true) = ((_states(job, rows.items), brands[rows.items[:, 0] - 1])
                                for rows in (job.valid, job.test))
        probe = make_pipeline(StandardScaler(), RidgeClassifierCV(np.logspace(-1, 4, 6)))
        right = (probe.fit(x, y).predict(seen) == true).astype(float)
        long = ((job.test.items > 0).sum(axis=1) > SOURCE.longest - BLOCK).astype(float)
        out = {**planted(job, score), 'steps': steps, 'brand': (right, np.ones(len(right))),
               'brand, 13 blocks': (right * long, long)}
        for length in (8, 80):
            gradient, *inputs = _gradient(job, job.spec, length)
            plan = jax.jit(gradient).lower(*inputs).compile().memory_analysis()
            out[f'MiB at {length}'] = plan.temp_size_in_bytes / 2**20
        return out
    finally:
        job.writer.close()


def _forward(job, spec, params, items, *needs):
    """Outputs of sessions that end before their next item."""
    import jax.numpy as jnp

    from tpad_jax.models import outputs
    from tpad_jax.types import Batch

    batch = Batch(items=items, next=items, target=items[:, 0], valid=items[:, 0] > 0,
                  row=jnp.arange(len(items)))
    out = outputs.forward(spec, params, batch, job.catalogue, frozenset(needs), frozenset({'r'}))
    return batch, *(out[name] for name in needs)


def _gradient(job, spec, length):
    """(gradient of the last position's loss, parameters, items) for sessions of a length."""
    import jax
    import numpy as np

    params = job.nested()
    trained = {name: params[name] for name in ('transfer', 'disentangle', 'adapter', 'critic')}

    def loss(trained, items):
        _, h, z = _forward(job, spec, params | trained, items, 'teach.last', 'teach.z')
        return jax.nn.logsumexp(h @ z.T, axis=1).sum()

    return jax.grad(loss), trained, np.ones((ROWS, length), np.int32)


def _states(job, items):
    """States t [R, D] of the Transfer-MLLM after sessions [R, N]."""
    import jax
    import jax.numpy as jnp

    from tpad_jax.evaluation import memory

    @jax.jit
    def read(params, items):
        batch, t = _forward(job, job.spec, params, items, 't')
        return t[jnp.arange(len(items)), batch.last]

    params = job.nested()
    return memory.by_part(lambda part: read(params, part), items)


def _rerank(cell, place):
    import numpy as np

    from benchmarks.systems import llm_lasso
    from tpad_jax.baselines import content_lasso
    from tpad_jax.features import yes_no
    from tpad_jax.serving import rerank

    job = llm_lasso.job_of(place, cell.world, RULE)
    known, rng = content_lasso.attributes(job.data), np.random.default_rng(cell.world)
    weights = content_lasso.choose(job.data.train, job.valid, job.data.num_items, known)['weights']
    rows = job.test.take(rng.permutation(len(job.test.target))[:LISTS])
    scores = content_lasso.scorer(known, weights, content_lasso.log_popularity(
        job.data.train, job.data.num_items))(rows.items)
    first = 1 + np.argsort(-scores[:, 1:], axis=1, kind='stable')[:, :rerank.FIRST]
    new = np.take_along_axis(scores, first, axis=1)
    if cell.arm == 'yes_no':
        new = yes_no.asking(place.data['smollm2'])(first, new, rerank.Context(
            rows.items, None, job.data.titles))
    elif cell.arm == 'random':
        new = rng.random(new.shape)
    truth = job.probabilities(rows.items)
    shown = np.take_along_axis(first, np.argsort(-new, axis=1, kind='stable')[:, :20], axis=1)
    return {'share': (np.take_along_axis(truth, shown, axis=1).sum(axis=1),
                      np.sort(truth, axis=1)[:, -20:].sum(axis=1))}
