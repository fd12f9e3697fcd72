"""The compilation of later stages' steps while earlier ones train."""

from contextlib import closing
from functools import partial

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from tpad_jax.config import MAKES
from tpad_jax.job.background import COMPILE
from tpad_jax.job.fitting import batches
from tpad_jax.training import loop
from tpad_jax.training import step as step_lib
from tpad_jax.training.stages import ENTRIES
from tpad_jax.types import Batch


def submit(job, stages, shapes: dict) -> None:
    """Compile the steps of stages in the background, in the order in which they are needed.

    Args:
      job: job.Job. `compiling` gets the task of every stage.
      stages: those that this run trains or has trained.
      shapes: {path: shape and dtype} of all parameters.
    """
    rows = job.catalogue
    for number, stage in enumerate(stages):
        blended = job.config.model.blend.kind and stage == 'joint'  # the rank is not known yet
        if job.background and not job.finished(stage) and not blended:
            job.compiling[stage] = job.background.submit(
                partial(_compile, job, stage, shapes, rows), COMPILE + number)
        rows = {**rows, **{name: job.blank[name] for name in MAKES.get(stage, ())}}


def _compile(job, stage, shapes, rows):
    spec, c = job.stage_spec(stage), job.config.stage[stage]
    # the parameters of a loss's module are drawn when its stage starts
    if spec is None or any(loss.module for loss in spec.losses):
        return
    if 'cluster' in spec.needs:
        rows = {**rows, 'cluster': np.zeros(job.data.num_items + 1, np.int32)}
    if c.eval_every and ENTRIES[stage].validates_rows:
        rows = {**rows, **{name: job.blank[name] for name in MAKES[stage]}}
    with closing(batches(job, stage, spec)(start_step=0)) as drawn:
        batch = Batch.of(next(drawn))
    state = jax.eval_shape(partial(step_lib.start, spec, pattern=c.train), shapes)
    loop.compile_step(job.devices, spec, state, batch, rows)
    if stage in MAKES and not job.background.closing:
        job.encoder(stage).compile(unflatten_dict(shapes, sep='/'))
