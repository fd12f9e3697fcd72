"""RA-BLIP: a gated memory of training sessions, without a gate, and none.

Finished runs without experts and without a refit, `--data=films=RUN,grocery=RUN`; nothing is
trained but gates. 'loss' is how much the nll grows when half of the sessions in memory are replaced
by as long ones of random events, with gate and strength fitted again. All scores have the
temperature that fits validation best.
"""

import json
from pathlib import Path

from benchmarks.systems import Cell, Test

ARMS, DATA = ('none', 'ungated', 'gated'), ('films', 'films_cold', 'grocery')
MEASURES = {'nll': (1, 4), 'loss': (1, 4), 'strength': (1, 2)}
TESTS = [test for on in DATA for test in (
    Test('ungated', 'gated', 'nll', on), Test('none', 'ungated', 'nll', on),
    Test('ungated', 'gated', 'loss', on))]
ENTRIES = 100


def cells():
    """Data set after data set."""
    return [Cell(arm, on) for on in DATA for arm in ARMS]


def run(cell, place):
    """Make the memory of a finished run, and of the same with half of its sessions random."""
    import jax
    import numpy as np

    from tpad_jax import config as config_lib
    from tpad_jax.evaluation import memory
    from tpad_jax.evaluation.scorers import session_encoder, session_shifts
    from tpad_jax.job.job import Job
    from tpad_jax.nn.linear import unit
    from tpad_jax.serving import artifact

    workdir = Path(place.data[cell.on])
    config = config_lib.get_config()
    config.update(json.loads((workdir / 'config.json').read_text())['config'])
    config.model.memory = ENTRIES
    job, served = Job(config, workdir, place.stopping), artifact.read(workdir)
    specs = tuple(spec.__class__(**{**vars(spec), 'memory': ENTRIES}) for spec in served.specs)
    ((params, near),) = jax.device_put(served.weights)  # of one recommender
    z = jax.device_put(served.z[:, :specs[0].fusion.width])
    encode, shifts = jax.jit(session_encoder(specs)), jax.jit(session_shifts(specs))
    valid, test = (type(rows)(*(x[rows.target > 0] for x in rows))
                   for rows in (job.valid, job.test))

    def vectors(items):
        return memory.by_part(lambda part: encode((((params, near),), None), z, part), items)

    def score(made, items):
        full = {'recommender': params['recommender'] | ({'memory': made} if made else {})}
        weights = ((full, near),), None
        scores = np.array(encode(weights, z, items) @ z.T)
        if (moved := shifts(weights, z, items)) is not None:
            np.add.at(scores, (np.arange(len(items))[:, None], moved[0]), moved[1])
        return scores

    def nll(made):
        """Of the test rows, at the temperature of validation."""
        power = _power(score(made, some.items), some.target)
        parts = np.array_split(np.arange(len(test.target)), len(test.target) // memory.ROWS + 1)
        return np.concatenate([_nll(power * score(made, test.items[part]), test.target[part])
                               for part in parts])

    drawn = np.random.default_rng(0).permutation(len(valid.target))[:1024]
    some = type(valid)(*(x[drawn] for x in valid))
    plain, h = score(None, some.items), vectors(some.items)

    def remembered(train):
        made = memory.entries(lambda items: unit(vectors(items)), train, job.max_length)
        if cell.arm == 'gated':
            made['gate'] = memory.gate(made, ENTRIES)
        return made | memory.strength(made, ENTRIES, plain, h, some.target)

    count = np.bincount(test.session)
    if cell.arm == 'none':
        sums = np.bincount(test.session, nll(None))
        return {'nll': (sums[count > 0], count[count > 0])}
    made = remembered(job.data.train)
    clean, noisy = nll(made), nll(remembered(_half_random(job.data.train)))
    packed = {name: (np.bincount(test.session, x)[count > 0], count[count > 0])
              for name, x in (('nll', clean), ('loss', noisy - clean))}
    return {**packed, 'strength': made['strength']}


def _half_random(train):
    """Half of the sessions get events drawn from all, at their places in time."""
    import numpy as np

    rng, total = np.random.default_rng(0), len(train.lengths)
    random = (rng.permutation(total) < total // 2)[train.owner]
    items = np.where(random, rng.choice(train.items, len(train.items)), train.items)
    return train._replace(items=items)


def _nll(logits, target):
    import numpy as np
    from scipy.special import logsumexp

    return logsumexp(logits[:, 1:], axis=1) - logits[np.arange(len(target)), target]


def _power(scores, target):
    import scipy.optimize

    return scipy.optimize.minimize_scalar(
        lambda power: _nll(power * scores, target).mean(), bounds=(0.2, 3), method='bounded',
        options={'maxiter': 12}).x
