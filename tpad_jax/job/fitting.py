"""One run of steps of a job: its compilation, batches, validation, checkpoints and loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax.baselines import content_lasso
from tpad_jax.config import MAKES
from tpad_jax.core import console as console_lib, files
from tpad_jax.data import batches as batches_lib
from tpad_jax.diagnostics import clouds, snapshots
from tpad_jax.distributed.devices import compiled
from tpad_jax.errors import refuse_if
from tpad_jax.evaluation import likelihood, metrics
from tpad_jax.features import codes
from tpad_jax.job.background import COMPILE
from tpad_jax.models import readers, tpad
from tpad_jax.training import federated, handover, loop as loop_lib, profiling, step as step_lib
from tpad_jax.training.checkpoint import Checkpoints, chosen_parameters
from tpad_jax.training.stages import ENTRIES
from tpad_jax.types import Batch

DONE = 'finished'  # a file next to a finished stage's checkpoints


def is_finished(workdir: Path, name: str) -> bool:
    """Return whether a stage was run to its end; `name`: of its folder."""
    return (workdir / 'stages' / name / DONE).is_file()


def batches(job, stage: str, spec: step_lib.StepSpec) -> Callable[..., Iterator[dict]]:
    """Return (start_step) -> iterator of a stage's host batches, see data/batches.py."""
    c = job.config.stage[stage]
    shared = dict(batch_size=c.batch_size, seed=job.config.seed, content=job.content if
                  spec.reads_content else None, **job.devices.drawn_here(c.accumulate))
    items = ENTRIES[stage].batches == 'items'
    if spec.rounds is not None:  # every client's every step is a part of the batch
        parts = len(spec.rounds.weights) * spec.rounds.local
        shared |= dict(batch_size=c.batch_size * parts, shards=parts,
                       owner=federated.owners(job.final, job.config, items=items))
    if items:
        return partial(batches_lib.item_batches, job.data, **shared)
    return partial(batches_lib.session_batches, job.final, every_prefix=c.every_prefix,
                   max_length=job.max_length, steps=c.steps, **shared)


def validated(scorer, job, name: str) -> dict[str, float]:
    """Measure a scorer on validation: {'hit@20', 'mrr@20', 'ndcg@20', 'nll': value}.

    'nll' is the mean negative log-likelihood of the targets over the whole catalogue, in nats, at
    the temperature that fits them best: a recommender that has grown too sure of itself still ranks
    well, and what is served has a fitted temperature. A target that is not in the catalogue is a
    miss, without a likelihood.
    """
    rows = job.valid
    power = likelihood.calibrate(scorer, rows, job.data.num_items, rule=False,
                                 seed=job.config.seed).power
    if hasattr(scorer, 'ranks') and len(rows.target) * job.data.num_items > metrics.HELD:
        above, equal, nll = scorer.ranks(rows.read_by(scorer), rows.target, name=name, power=power)
    else:
        scored = metrics.scored(scorer, rows.read_by(scorer), job.data.num_items, name=name)
        parts = [(*metrics.counts(scores, target), metrics.nll(power * scores, target))
                 for part, scores in scored for target in [rows.target[part]]]
        above, equal, nll = map(np.concatenate, zip(*parts, strict=True))
    missed = rows.target == 0
    above, equal = np.where(missed, metrics.MISS, above), np.where(missed, 1, equal)
    return {**{f'{metric}@20': float(metrics.mean_gain(gain, above, equal, 20).mean())
               for metric, gain in metrics.GAINS.items()}, 'nll': float(nll[~missed].mean())}


def fit(job, name, stage, spec, params=None, steps=None):
    """Run a stage's loop.

    Args:
      job: job.Job.
      name: of its folder and in the log.
      stage: whose config and batches it has.
      spec: step.StepSpec.
      params: {path: array} of all parameters; None: the run's.
      steps: exactly so many, without validation (a refit); None: as in config.stage.

    Returns:
      See `loop.fit`.
    """
    c, params = job.config.stage[stage], job.params if params is None else params
    catalogue, encoder = job.catalogue, job.encoders.get(stage)
    draw = batches(job, stage, spec)
    params = step_lib.with_own(spec, params, partial(draw, start_step=0), catalogue)
    bind = ENTRIES[stage].scorer(spec.model, job.devices.own)
    validating = c.eval_every and steps is None
    refreshing = c.refresh_every
    if ENTRIES[stage].validates_rows and validating:
        blank = {row: jnp.zeros(job.blank[row].shape) for row in MAKES[stage]}
        refreshing, catalogue = True, {**blank, **catalogue}

    def tree(state):
        return unflatten_dict({**params, **state.params}, sep='/')

    def validate(state, catalogue):
        return validated(bind(tree(state), catalogue), job, name)

    def refresh(state):
        return encoder(tree(state))

    checkpoints = Checkpoints(job.workdir / 'stages' / name)
    refuse_if(is_finished(job.workdir, name) and not checkpoints.steps(),
              f'{checkpoints.directory} is of a finished stage, but holds no checkpoint. Fix: '
              'restore them from a copy, or delete the folder to train the stage again')
    learnt = {'teach': job.taken, 'recommend': name == stage and job.config.model.lessons}
    loop = loop_lib.Loop(
        name=name, total=steps or c.steps, devices=job.devices,
        batches=lambda step: draw(start_step=step), checkpoints=checkpoints, writer=job.writer,
        progress=console_lib.progress, log_every=job.config.log_every,
        save_every=job.config.save_every, eval_every=c.eval_every, patience=c.patience,
        refresh_every=c.refresh_every, validate=validate if validating else None,
        # what it begins with has learnt before, which few sessions may spoil
        validates_first=bool(validating and learnt.get(stage)),
        refresh=refresh if refreshing else None, refreshed=MAKES.get(stage, ()),
        stopping=job.stopping, shown=snapshots.shown(spec.losses),
        broken=job.workdir / 'not_finite', profile=profiling.Profile(
            job.workdir / 'profile', job.profile, name, job.devices))
    begun = time.perf_counter()
    with closing(checkpoints):
        out = loop_lib.fit(loop, spec, step_lib.start(spec, params, c.train), catalogue)
    job.sitting[name] = time.perf_counter() - begun
    job.spent[name] = {'all': out[-1]['seconds'], **out[-1]['spent']}
    if stage == 'recommend' and spec.model.memory:
        from tpad_jax.evaluation import memory  # only where it is on

        # a refit has no validation: strength and floor stay
        before = unflatten_dict(job.params, sep='/').get('recommender', {}) if steps else {}
        tree, (trained, rows, record) = unflatten_dict({**params, **out[0]}, sep='/'), out
        made = memory.remembered(spec.model, tree, catalogue, job.final.train, job.valid,
                                 bind(tree, catalogue), fitted=before.get('memory'),
                                 seed=job.config.seed)
        tree['recommender']['memory'] = made
        trained = trained | flatten_dict({'recommender': {'memory': made}}, sep='/')
        if record['valid'] is not None:
            record = record | {'valid': validated(bind(tree, catalogue), job, name)}
        out = trained, rows, record
    return out


def store_of(job, stage: str) -> dict:
    """Return what `Encoder.fill` needs to write a stage's rows: their place, options and origin."""
    return dict(directory=job.workdir / 'features' / stage, progress=console_lib.progress,
                stopping=job.stopping, lease=job.config.mllm.encode_lease, origin=dict(
                    stage=stage, seed=job.config.seed, data=job.data.fingerprint,
                    checkpoint=job.base.fingerprint))


def restored(job, params: dict, stages: list[str]) -> dict:
    """Read the parameters after some finished stages, in another process than the one they ran in.

    Args:
      job: job.Job.
      params: {path: array} before the first stage.
      stages: in their order.
    """
    for stage in stages:
        folder = job.workdir / 'stages' / stage
        params = handover.copied(params, stage, job.config.stage[stage].copy, job.taken)
        params = params | (chosen_parameters(folder) if folder.is_dir() else {})
        if stage == 'transfer' and job.config.model.blend.kind:
            params = handover.blended(params, job.config)
    return params


def pruned(job, console) -> dict:
    """Prune the base by config.mllm.prune; print and write the changes.

    WORKDIR/prune.json has the record of `prune.pruned`, and how much k of the calibration items
    moved: their linear CKA and mean cosine.

    Returns:
      All parameters {path: array}.

    Raises:
      InputError: the base is not read from files.
    """
    from tpad_jax.features import prune  # only where it is on

    c, before = job.config.mllm, job.nested()
    refuse_if('base' not in job.base.given, f'config.mllm.prune={c.prune}: the base is drawn '
              "at random for a new tokenizer. Fix: set it to 0, or config.mllm.tokenizer=''")
    after, record = prune.pruned(job.spec, before, job.content, share=c.prune, by=c.prune_by,
                                 seed=job.config.seed)
    read = compiled(partial(readers.read_items, job.spec, adapter='knowledge'), seldom=True)
    items = dict(zip(('image', 'has_image', 'tokens'), prune.sample(job.content, job.config.seed),
                     strict=True))
    x, y = (np.asarray(read(params, **items)).reshape(len(items['tokens']), -1)
            for params in (before, after))
    cosine = (x * y).sum(axis=1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    record = {'by': c.prune_by, **record, 'k': {'cka': clouds.linear_cka(x, y),
                                                'cosine': float(cosine.mean())}}
    files.write_json(job.workdir / 'prune.json', record)
    console_lib.say(console, f'pruned by {c.prune_by}: zeros per layer '
                    f'{" ".join(f"{100 * x:.0f}" for x in record["zeros"])} %; k before and after: '
                    f'CKA {record["k"]["cka"]:.3f}, cosine {record["k"]["cosine"]:.3f}')
    return flatten_dict(after, sep='/')


def add_codes(job) -> None:
    """Add the rows 'codes' to a job's catalogue, where its model has them.

    Args:
      job: job.Job with the rows k. Centres of another run, of which it begins, stay.
    """
    if job.spec.codes:
        if codes.PATH not in job.taken:
            made = codes.centres(job.catalogue['k'], *job.spec.codes, job.config.seed)
            job.params = job.params | {codes.PATH: jnp.asarray(made)}
        made = jax.jit(codes.rows)(job.catalogue['k'], job.params[codes.PATH])
        job.catalogue = job.catalogue | {'codes': made.at[0].set(0)}


def word_rows(data) -> jax.Array:
    """Look up which frequent words and side values the items have: float32 [V + 1, WORDS].

    Args:
      data: catalogue.Data.

    Raises:
      InputError: no two items share one.
    """
    known = content_lasso.attributes(data)
    refuse_if(known is None, 'config.model.words=True: no two items share a word or a side value. '
              'Expected item texts. Fix: set it to False')
    held = known.rows.toarray()
    return jnp.asarray(np.pad(held, ((0, 0), (0, tpad.WORDS - held.shape[1]))))


def compile_ahead(job, stages, shapes: dict) -> None:
    """Compile the steps of stages in the background, in the order in which they are needed.

    Args:
      job: job.Job. `compiling` gets the task of every stage.
      stages: those that this run trains or has trained.
      shapes: {path: shape and dtype} of all parameters.
    """
    rows = job.catalogue
    for number, stage in enumerate(stages):
        blended = job.config.model.blend.kind and stage == 'joint'  # the rank is not known yet
        if job.background and not is_finished(job.workdir, stage) and not blended:
            job.compiling[stage] = job.background.submit(
                partial(_compile, job, stage, shapes, rows), COMPILE + number)
        made = {*MAKES.get(stage, ()), *job.blank.keys() & {'codes'}}
        rows = {**rows, **{name: job.blank[name] for name in made}}


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
    state = jax.eval_shape(partial(step_lib.start, spec, pattern=c.train, shapes=True), shapes)
    loop_lib.compile_step(job.devices, spec, state, batch, rows)
    if stage in MAKES and not job.background.closing:
        job.encoders[stage].compile(unflatten_dict(shapes, sep='/'))
