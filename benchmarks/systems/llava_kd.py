"""LLaVA-KD: what a small base that reads badly learns from a larger one that reads well.

Planted worlds, stage knowledge alone. The student (width 64, one layer) was pretrained for few
steps. Its teacher is the default base, or one of width 256 with four layers ('wide'), which takes
an hour to train. Arms: the student as it is; supervised tuning for as many steps as the three
phases have together ('sft'); the phases without the likeness of picture tokens ('mdist'); and with
it ('both'). Rows k are judged by probes of cold items and by a rule that follows k alone.
"""

import itertools

from benchmarks.systems import Cell, Test, base, of_content

ARMS, TEACHERS, WORLDS = ('student', 'sft', 'mdist', 'both'), ('default', 'wide'), range(5)
STUDENT = dict(width=64, layers=1, steps=60)
WIDE = dict(width=256, layers=4, steps=700)
MEASURES = {'probe': (100, 1), 'share, cold': (100, 1), 'share': (100, 1)}
TESTS = [Test(arm, other, measure, on) for on in TEACHERS for measure in ('probe', 'share, cold')
         for other, arm in itertools.pairwise(ARMS)]


def cells():
    """Teacher after teacher, world after world."""
    return [Cell(arm, on, world) for on in TEACHERS for world in WORLDS for arm in ARMS]


def run(cell, place):
    """Tune the student and read the catalogue."""
    from benchmarks import ablation
    from configs import systems
    from tpad_jax.models.builtin import files

    c = systems.get_config('llava_kd')
    c.stages, c.rivals, c.diagnostics = 'knowledge', {}, 0
    c.seed = c.data.planted.seed = cell.world
    c.mllm.base = base(place, **STUDENT)
    if cell.arm in ('student', 'sft'):
        c.losses.gen_knowledge.schedule, c.stage.knowledge.later = (), ()
        for name in ('teach_text', 'teach_image', 'teach_relations'):
            c.losses[name].update(weight=0.0, schedule=())
    else:
        c.mllm.teacher = base(place, **WIDE) if cell.on == 'wide' else str(files.DEFAULT)
        c.losses.teach_relations.weight = float(cell.arm == 'both')
    if cell.arm == 'student':
        job = ablation.opened(c, place.workdir, place.stopping, ('knowledge',))
        job.writer.close()
        return of_content(job, job.encoders['knowledge'](job.nested())['k'])
    job = ablation.train(c, place.workdir, place.stopping, ('knowledge',))
    return of_content(job, job.catalogue['k'])
