"""Multi-view intents: what the Transfer-MLLM's intents give a recommender with few sessions.

Planted worlds; the rows k are random projections of the true attributes with noise, so that no item
is read. Arms: stage recommend without the loss; with it, an intent being the mean of the nearest
five items of the catalogue ('intents') or of all of them, not localised ('everywhere'). All arms
have the same Transfer-MLLM, whose own lists are the measure 'teacher'.
"""

from benchmarks.systems import Cell, Test, planted, projected

ARMS, SIZES, WORLDS = ('none', 'intents', 'everywhere'), (500, 1500), range(3)
MEASURES = {'share': (100, 1), 'share, cold': (100, 1), 'teacher': (100, 1), 'nll': (1, 3)}
TESTS = [Test('intents', other, 'share', f'{size}') for size in SIZES
         for other in ('none', 'everywhere')]


def cells():
    """World after world."""
    return [Cell(arm, f'{size}', world) for world in WORLDS for size in SIZES for arm in ARMS]


def run(cell, place):
    """Train the Transfer-MLLM and then the recommender."""
    from benchmarks import ablation
    from configs import systems
    from tpad_jax.evaluation.scorers import scorer
    from tpad_jax.training.stages import ENTRIES

    c = systems.get_config('intents')
    c.stages, c.model.recommend = 'teach,recommend', 'k'
    c.seed = c.data.planted.seed = cell.world
    c.data.planted.train, c.diagnostics, c.rivals = int(cell.on), 0, {}
    c.losses.intents.update({'none': {'weight': 0.0}, 'everywhere': {'nearest': 0}}.get(
        cell.arm, {}))
    stages = tuple(c.stages.split(','))
    job = ablation.opened(c, place.workdir, place.stopping, stages)
    job.catalogue |= {'k': projected(job, cell.world)}
    try:
        for stage in stages:
            job.run_stage(stage)
        params = job.nested()
        teacher = ENTRIES['teach'].scorer(job.spec, job.devices.own)(params, job.catalogue)
        return {**planted(job, scorer(job.spec, job.devices)(params, job.catalogue)),
                'teacher': planted(job, teacher)['share'], 'nll': job.record['valid']['nll']}
    finally:
        job.writer.close()
