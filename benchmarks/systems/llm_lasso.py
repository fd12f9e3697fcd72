"""LLM-Lasso: what a prior over pairs of attributes is worth to the rule `content_lasso`.

Planted worlds with few training sessions. Arms: no prior; the pairs of the planted law, whose
weights a text LLM could guess ('right'); the same importances at random pairs ('permuted').
Strength and gamma are chosen on validation sessions in every arm.
"""

from benchmarks.systems import Cell, Test, planted

ARMS, SIZES, WORLDS = ('none', 'right', 'permuted'), (100, 250, 500, 1500), range(5)
STRENGTHS, GAMMAS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2), (0.0, 0.5, 1.0, 2.0)
MEASURES = {'share': (100, 1), 'share, cold': (100, 1), 'nll': (1, 3), 'gamma': (1, 2),
            'strength': (1, 4)}
TESTS = [test for size in SIZES for test in (
    Test('right', 'none', 'share', f'{size}', 0.10), Test('permuted', 'none', 'share', f'{size}'))]


def cells():
    """The smallest trainings first."""
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


def run(cell, place):
    """Fit every strength and gamma, and test the one with the best likelihood on validation."""
    import numpy as np

    from configs import amazon
    from tpad_jax.baselines import content_lasso
    from tpad_jax.data.synthetic import planted as planted_lib
    from tpad_jax.job.job import Job

    c = amazon.get_config()
    c.data.planted.update(seed=cell.world, train=int(cell.on))
    place.workdir.mkdir(parents=True, exist_ok=True)
    job = Job(c, place.workdir, place.stopping)
    job.probabilities = planted_lib.catalogue_probabilities(job.planted, job.data.asins)
    known, gammas = content_lasso.attributes(job.data), (0.0,)
    if cell.arm != 'none':
        importance = law(job.planted, known.names)
        if cell.arm == 'permuted':
            importance = np.random.default_rng(cell.world).permutation(
                importance.ravel()).reshape(importance.shape)
        content_lasso.write_prior(place.workdir / 'prior.csv', known, importance)
        known, gammas = content_lasso.attributes(job.data, place.workdir / 'prior.csv'), GAMMAS
    rows, best = job.valid, (np.inf,)
    for strength in STRENGTHS:
        for gamma in gammas:
            score = content_lasso.fit_content_lasso(job.data.train, job.data.num_items, known,
                                                    strength, gamma)
            own = score(rows.items)[np.arange(len(rows.target)), rows.target]
            best = min(best, (-np.log(own).mean(), gamma, strength, score), key=lambda x: x[0])
    nll, gamma, strength, score = best
    return {**planted(job, score), 'nll': nll, 'gamma': gamma, 'strength': strength}
