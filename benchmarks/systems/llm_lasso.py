"""LLM-Lasso: what a prior over pairs of attributes is worth to the rule `content_lasso`.

Planted worlds with few training sessions. Arms: no prior; the pairs of the planted law, whose
weights a text LLM could guess ('right'); the same importances at random pairs ('permuted'); and
the sizes of the weights that 1,500 sessions of another catalogue of the same law gave ('learnt').
Strength and gamma are chosen on validation sessions in every arm.
"""

from benchmarks.systems import Cell, Test, planted

ARMS, SIZES, WORLDS = ('none', 'right', 'permuted', 'learnt'), (500, 100, 50, 250), range(5)
MEASURES = {'share': (100, 1), 'share, cold': (100, 1), 'nll': (1, 3), 'gamma': (1, 2),
            'strength': (1, 4)}
TESTS = [test for size in SIZES for test in (
    Test('right', 'none', 'share', f'{size}', 0.10), Test('permuted', 'none', 'share', f'{size}'))]


def cells():
    """Size by size, that of the claim first."""
    return [Cell(arm, f'{size}', world) for size in SIZES for world in WORLDS for arm in ARMS]


def law(world, names):
    """Importances of the pairs in a planted world's law, 1 each: an LLM knows no weights.

    Args:
      world: planted.Planted.
      names: of A attributes.

    Returns:
      float64 [2, A, A], see `content_lasso.Attributes`.
    """
    import numpy as np

    from tpad_jax.data.synthetic import wording

    out, values = np.zeros((2, len(names), len(names))), [name.split('=')[1] for name in names]
    follow = [(1, wording.CATEGORIES[a], wording.CATEGORIES[b])
              for a, b in np.argwhere(world.category_weights > 0.05)]
    follow += [(0, brand, brand) for brand in wording.BRANDS]
    for words, after in ((wording.STYLES, world.next_style), (wording.COLOURS, world.next_colour)):
        follow += [(1, words[a], words[b]) for a, b in enumerate(after)]
    for place, before, after in follow:
        for a, b in ((a, b) for a, x in enumerate(values) if x == before
                     for b, y in enumerate(values) if y == after):
            out[place, a, b] = 1
    return out


def job_of(place, seed, size, law_seed=None):
    """The data of a planted catalogue, without a model."""
    from configs import amazon
    from tpad_jax.data.synthetic import planted as planted_lib
    from tpad_jax.job.job import Job

    c, workdir = amazon.get_config(), place.workdir.parent / f'data{seed}_{size}'
    c.data.planted.update(seed=seed, train=size, law_seed=law_seed)
    workdir.mkdir(parents=True, exist_ok=True)
    job = Job(c, workdir, place.stopping)
    job.probabilities = planted_lib.catalogue_probabilities(job.planted, job.data.asins)
    return job


def run(cell, place):
    """Fit with the strength and gamma that validation chooses, and test."""
    import numpy as np

    from tpad_jax.baselines import content_lasso

    job = job_of(place, cell.world, int(cell.on))
    known = content_lasso.attributes(job.data)
    prior = place.workdir.parent / f'{cell.arm}{cell.world}.csv'
    if cell.arm == 'learnt' and not prior.is_file():
        other = job_of(place, 1000 + cell.world, 1500, law_seed=cell.world)
        theirs = content_lasso.attributes(other.data)
        content_lasso.write_prior(prior, theirs, content_lasso.choose(
            other.data.train, other.valid, other.data.num_items, theirs)['weights'])
    elif cell.arm in ('right', 'permuted'):
        importance = law(job.planted, known.names)
        if cell.arm == 'permuted':
            importance = np.random.default_rng(cell.world).permutation(
                importance.ravel()).reshape(importance.shape)
        content_lasso.write_prior(prior, known, importance)
    if cell.arm != 'none':
        known = content_lasso.attributes(job.data, prior)
    chosen = content_lasso.choose(job.data.train, job.valid, job.data.num_items, known)
    score = content_lasso.scorer(known, chosen.pop('weights'), content_lasso.log_popularity(
        job.data.train, job.data.num_items))
    return {**planted(job, score), **chosen}
