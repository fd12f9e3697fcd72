"""One run of steps of a job: its batches, its validation, its checkpoints and its loop."""

import time
from collections.abc import Callable, Iterator
from functools import partial

import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from tpad_jax.config import MAKES
from tpad_jax.data import batches as batches_lib
from tpad_jax.diagnostics import snapshots
from tpad_jax.errors import InputError
from tpad_jax.evaluation.evaluate import evaluate
from tpad_jax.training import loop as loop_lib
from tpad_jax.training import profiling
from tpad_jax.training import step as step_lib
from tpad_jax.training.checkpoint import Checkpoints
from tpad_jax.training.stages import ENTRIES, reads_content

DONE = 'finished'  # a file next to a finished stage's checkpoints
VALIDATED = 'hit@20', 'mrr@20', 'ndcg@20'  # metrics of validation


def batches(job, stage: str, spec: step_lib.StepSpec) -> Callable[..., Iterator[dict]]:
    """Return (start_step) -> iterator of a stage's host batches, see data/batches.py."""
    c = job.config.stage[stage]
    shared = dict(batch_size=c.batch_size, seed=job.config.seed,
                  **job.devices.drawn_here(c.accumulate))
    content = job.content if reads_content(stage, spec) else None
    if ENTRIES[stage].batches == 'items':
        return partial(batches_lib.item_batches, job.data, content=content, **shared)
    return partial(batches_lib.session_batches, job.final, content=content,
                   every_prefix=c.every_prefix, max_length=job.max_length, steps=c.steps,
                   **shared)


def fit(job, name, stage, spec, writer, progress, params=None, steps=None):
    """Run a stage's loop.

    Args:
      job: job.Job.
      name: of its folder and in the log.
      stage: whose config and batches it has.
      spec: step.StepSpec.
      writer: log.Writer of the run.
      progress: as console.progress.
      params: {path: array} of all parameters; None: the run's.
      steps: exactly so many, without validation (a refit); None: as in config.stage.

    Returns:
      See `loop.fit`.
    """
    c, params = job.config.stage[stage], job.params if params is None else params
    catalogue, encoder = job.catalogue, job.encoder(stage)
    draw = batches(job, stage, spec)
    params = step_lib.with_own(spec, params, partial(draw, start_step=0), catalogue)
    bind = ENTRIES[stage].scorer(spec.model, job.devices.own)
    validating = c.eval_every and steps is None
    refreshing = c.refresh_every
    if ENTRIES[stage].validates_rows and validating:
        blank = {row: jnp.zeros(job.blank[row].shape) for row in MAKES[stage]}
        refreshing, catalogue = True, {**blank, **catalogue}

    def validate(state, catalogue):
        tree = unflatten_dict({**params, **state.params}, sep='/')
        result, _ = evaluate(bind(tree, catalogue), job.valid, job.data.warm, ks=(20,),
                             name=name)
        return {k: result[k] for k in VALIDATED}

    checkpoints = Checkpoints(job.workdir / 'stages' / name)
    if (checkpoints.directory / DONE).is_file() and not checkpoints.steps():
        raise InputError(f'{checkpoints.directory} is of a finished stage, but no checkpoint '
                         'is left in it; restore them from a copy, or delete the folder to '
                         'train the stage again')
    loop = loop_lib.Loop(
        name=name, total=steps or c.steps, devices=job.devices,
        batches=lambda step: draw(start_step=step), checkpoints=checkpoints, writer=writer,
        progress=progress, log_every=job.config.log_every, save_every=job.config.save_every,
        eval_every=c.eval_every, patience=c.patience, refresh_every=c.refresh_every,
        validate=validate if validating else None,
        refresh=(lambda state: encoder(unflatten_dict({**params, **state.params}, sep='/')))
        if refreshing else None, refreshed=MAKES.get(stage, ()),
        stopping=job.stopping, shown=snapshots.shown(spec.losses),
        broken=job.workdir / 'not_finite', profile=job.profile and profiling.Profile(
            job.workdir / 'profile', job.profile, name, job.devices))
    begun = time.perf_counter()
    try:
        out = loop_lib.fit(loop, spec, step_lib.start(spec, params, c.train), catalogue)
        job.spent[name] = {'all': out[-1]['seconds'], **out[-1]['spent']}
        return out
    finally:
        checkpoints.close()
        job.sitting[name] = time.perf_counter() - begun
