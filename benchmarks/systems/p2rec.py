"""P2Rec: what predicting a session's clusters gives the Transfer-MLLM.

Stage teach alone, on planted worlds with few training sessions. Arms: without the loss, for as many
passes ('none') or for twice as many ('longer'); clusters of a recommender of ids ('z'). The rows k
are random projections of the true attributes with noise, so that no item is read. Validation
chooses the step.
"""

from benchmarks.systems import Cell, Test, planted, projected

ARMS, SIZES, WORLDS = ('none', 'z', 'longer'), (500, 100), range(3)
MEASURES = {'share': (100, 1), 'share, cold': (100, 1), 'nll': (1, 3), 'steps': (1, 0)}
TESTS = [Test('z', other, 'share', f'{size}') for size in SIZES
         for other in ('none', 'longer')]


def cells():
    """Arm by arm, those of the claim first."""
    return [Cell(arm, f'{size}', world) for size in SIZES for arm in ARMS for world in WORLDS]


def run(cell, place):
    """Train the Transfer-MLLM and test its own lists."""
    from benchmarks import ablation
    from configs import systems
    from tpad_jax.training.stages import ENTRIES

    c = systems.get_config('p2rec')
    c.seed = c.data.planted.seed = cell.world
    c.data.planted.train, c.diagnostics = int(cell.on), 0
    c.stage.teach.epochs *= 1 + (cell.arm == 'longer')
    if cell.arm != 'z':
        c.losses.clusters.weight, c.model.clusters = 0.0, 0
    job = ablation.opened(c, place.workdir, place.stopping, ('teach',))
    job.catalogue |= {'k': projected(job, cell.world)}
    try:
        job.run_stage('teach')
        score = ENTRIES['teach'].scorer(job.spec, job.devices.own)(job.nested(), job.catalogue)
        return {**planted(job, score), 'nll': job.record['valid']['nll'],
                'steps': job.record['chosen']}
    finally:
        job.writer.close()
