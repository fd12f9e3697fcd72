"""The recommenders of a run: its own, trained baselines, and a partner of each [ours].

A trained baseline (`config.rivals`) reads other rows than the run's own recommender and is trained
with the same care. Encoders of different kinds err on different sessions: where `config.partner`
describes how a second recommender differs from the first, both are trained, each with its own
validation, and the list that is served comes from the sum of their scores. Each is a log-linear
model with its own temperature, so the sum needs no weight, and none is tuned. Trained
baselines have the same partner, so that a comparison is about what they read.

They do not read each other, so they train in the background (see background.py), a trained baseline
as soon as the rows it reads exist.
"""

import copy
import math
import time
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from tpad_jax.baselines import content_lasso
from tpad_jax.config import MAKES, STAGES, names
from tpad_jax.data import sessions
from tpad_jax.evaluation import experts, likelihood
from tpad_jax.evaluation.scorers import scorer
from tpad_jax.job import gate
from tpad_jax.job.background import TRAIN, TUNE
from tpad_jax.job.fitting import fit, validated
from tpad_jax.models import tpad
from tpad_jax.training import handover, length, optimizer, stages

NAME, OWN = 'mixture', 'tpad_recommend'  # of the scores that are served: of ids alone, with content
PARTS = 'fusion', 'encoder', 'recommend', 'normalise', 'temperature', 'repeats', 'events'
# Outputs of a recommender alone: they are the same before and after the other stages.
ALONE = frozenset({'h', 'h_each', 'z', 'items', 'next', 'warm', 'repeat', 'popularity'})


def check(job) -> None:
    """Refuse settings of stage recommend that fit no parameter of a recommender.

    Args:
      job: job.Job. Its parameters may be shapes.

    Raises:
      InputError: see `handover.check_stage`.
    """
    for owner in [job, partner_job(job)] if job.config.partner else [job]:
        for member in (owner, *(_rival_job(owner, name) for name in _rivals(job))):
            make, rows = partial(tpad.recommender_init, spec=member.spec), owner.catalogue
            shapes = jax.eval_shape(make, jax.random.key(0), catalogue=rows | owner.blank)
            params = others(job.params) | flatten_dict({'recommender': shapes}, sep='/')
            handover.check_stage(member.config, 'recommend', member.stage_spec('recommend'), params,
                                 job.data.num_items)


def _rivals(job):
    """Names of the trained baselines whose rows exist, or are made before stage recommend."""
    made = {row for stage in STAGES[:STAGES.index('recommend')] if stage in job.encoders
            for row in MAKES[stage]}
    made |= {'codes'} if 'k' in made and job.config.model.codes else set()
    return [name for name, rival in job.config.rivals.items()
            if made.union(job.catalogue).issuperset(names(rival.recommend))]


def left_out(job) -> list[str]:
    """Name the trained baselines that the run cannot train, because nothing makes their rows."""
    return [f'{name} (reads {rival.recommend})' for name, rival in job.config.rivals.items()
            if name not in _rivals(job)]


class Recommenders:
    """The recommenders of a run that are trained next to its own.

    Each is a copy of the job with its own config, modules (`spec`), rows and parameters, as they
    were when its training began (`first`) and as they are at the step that validation chose.

    Args:
      job: job.Job, built.
    """

    def __init__(self, job):
        self._job, self._own, self._partner, self._lasso = job, None, None, None
        self._rivals = _rivals(job)
        self._tasks = {}  # folder -> task of a trained baseline

    def begin(self, stage: str = '') -> None:
        """Submit what can be trained before `stage` runs; every stage before it is done.

        A partner and its trained baselines wait for stage recommend, and so does a trained baseline
        with a loss or parameters beyond the recommender's own.
        """
        job, last = self._job, stage == 'recommend'
        for name in self._rivals:
            if name not in self._tasks and (last or self._independent(name)):
                self._submit(job, name, name)
        if last and 'lasso' in names(job.config.experts):
            self._lasso = job.background.submit(partial(_lasso, job), TUNE)
        if last and job.config.partner:
            other = partner_job(job)
            self._partner = job.background.submit(partial(_train_partner, other), TRAIN)
            for name in self._rivals:
                self._submit(other, name, f'{name}_partner')

    def _submit(self, job, name, folder):
        # with the rows and parameters of now: what later stages add is not read
        self._tasks[folder] = job.background.submit(
            partial(_train_rival, _rival_job(job, name), folder), TRAIN)

    def _independent(self, name):
        """Whether the rows a trained baseline reads exist, and it reads no other stage's model."""
        job = self._job
        if not set(names(job.config.rivals[name].recommend)) <= job.catalogue.keys():
            return False
        needs = _rival_job(job, name).stage_spec('recommend').needs
        trained, _ = optimizer.split(job.params, job.config.stage.recommend.train)
        return needs <= ALONE and all(path.startswith('recommender/') for path in trained)

    def take_own(self) -> None:
        """Take the run's own recommender and the rows it reads, once stage recommend is done."""
        self._own = copy.copy(self._job)  # stage joint changes both

    def finish(self, joint=None) -> tuple[dict, dict, dict]:
        """Wait for all of them, refit where the config asks for it, and bind the scorers.

        Args:
          joint: job.Job after stage joint, or None.

        Returns:
          {name: scorer} of all that is tested, {name: validation metrics}, each at its chosen
          step, and {name: more that results.json holds of it}: the served model, weights of experts
          and calibrations.
        """
        job, c, background = self._job, self._job.config, self._job.background
        own = [] if self._own is None else [self._own]  # none without stage recommend
        if self._partner is not None:
            own += background.results([self._partner])
        groups = {}
        if own and (job.content is not None or c.partner):
            groups = {NAME if job.content is None else OWN: own}
        if own and (c.partner or job.content is None):
            encoders = [member.config.model.encoder for member in own]
            if encoders[1:] == encoders[:1]:
                encoders[1] += '_partner'
            groups |= {name: [member] for name, member in zip(encoders, own, strict=True)}
        trained = dict(zip(
            self._tasks, background.results(self._tasks.values(), help_others=True), strict=True))
        for name in self._rivals if own else ():
            groups[name] = [trained[f'{name}_partner' if i else name] for i in range(len(own))]
        if joint is not None:
            groups['tpad_joint'] = [joint]
        served = next(iter(groups))
        chosen = {name: _valid(members, name) for name, members in groups.items()}
        if joint is not None:
            served = max((served, 'tpad_joint'), key=lambda name: chosen[name]['hit@20'])
        # name of a mixture: its recommender, and the experts that it does without
        lasso = background.results([self._lasso])[0] if self._lasso else None
        known = [name for name in names(c.experts) if lasso or name != 'lasso']
        mixtures = {name: (groups[model], [n for n in known if n not in without])
                    for name, model, without in (
                        ('tpad', served, ()), ('experts_only', served, ('model',)),
                        ('id_only_experts', 'id_only', ('content', 'lasso')))
                    if c.experts and model in groups}
        begun = time.perf_counter()
        table = tables(groups[served][0], lasso) if mixtures else None
        fits = {name: experts.fit(scorer_of(members), table, job.valid, used, seed=c.seed)
                for name, (members, used) in mixtures.items()}
        job.seconds['experts'] = time.perf_counter() - begun
        facts = {name: {'calibration': likelihood.calibrate(
            scorer_of(members), job.valid, job.data.num_items, rule=False, seed=c.seed)._asdict()}
            for name, members in groups.items()}
        facts |= {name: {'experts': fit._asdict(),
                         'calibration': likelihood.Calibration()._asdict()}
                  for name, fit in fits.items()}
        if lasso:
            facts['tpad']['lasso'] = {'prior': lasso['known'].record} | {
                name: lasso[name] for name in ('strength', 'gamma', 'nll')}
        if c.refit:
            chosen |= {name: validated(scorer_of(mixtures[name][0], experts.mixture(fit, table)),
                                       job, name) for name, fit in fits.items()}
            # after all of them: they validate on what it trains on
            everyone = dict(zip(('recommend', 'partner'), own, strict=False)) | trained
            for member in everyone.values():
                member.count_both()
            background.results([background.submit(partial(_refit, member, name), TRAIN)
                                for name, member in everyone.items()])
            job.params, job.final = self._own.params, self._own.final
            job.catalogue = self._own.catalogue
            table = tables(groups[served][0], lasso) if mixtures else None
        scorers = {name: scorer_of(members) for name, members in groups.items()}
        mixed = {name: scorer_of(mixtures[name][0], experts.mixture(fit, table))
                 for name, fit in fits.items()}
        alias = 'tpad_model' if mixed else 'tpad'
        mixed[alias], chosen[alias], facts[alias] = scorers[served], chosen[served], facts[served]
        facts['tpad'] = {'is': served, **facts['tpad']}
        return {'tpad': mixed['tpad'], **mixed, **scorers}, chosen, facts


def _lasso(job):
    """Choose the content lasso of expert 'lasso'; None: the items share no attribute."""
    known = content_lasso.wanted(job.config, job.data)
    return known and {'known': known} | content_lasso.choose(
        job.data.train, job.valid, job.data.num_items, known)


def tables(job, lasso, share=None):
    """Count the tables of the experts on the sessions that a job's model was trained on.

    Args:
      job: job.Job of the model.
      lasso: of `_lasso`, or None.
      share: float [S]. Weights of the sessions; None: all are 1.
    """
    rows = job.catalogue.get('given' if 'given' in job.spec.recommend else 'k')
    train = job.final.train
    ordered = len(np.unique(train.start)) > 1 if job.source.timed else job.config.data.ordered
    table = experts.tables(train, job.data.num_items, rows, ordered=ordered, share=share)
    if lasso is None:
        return table
    weights = lasso['weights'] if job.final is job.data else content_lasso.weights_of(
        train, job.data.num_items, lasso['known'], lasso['strength'], lasso['gamma'])
    return table | jax.device_put(content_lasso.factors(lasso['known'], weights))


def partner_job(job):
    """A job of the second recommender of `config.partner`, with its own config and rows."""
    other = copy.copy(job)
    other.config = length.of_data(handover.partnered(job.config), job.data.train)
    made = job.modules(None, other.config)
    other.spec = replace(job.spec, **{part: getattr(made, part) for part in PARTS})
    other.count()
    other.params = others(job.params)
    return other


def _train_partner(job):
    """Train the second recommender in its own job, see `partner_job`, and return the job."""
    job.pause()
    job.params = job.params | job.fresh(job.spec)
    job.run_stage('recommend', name='partner')
    return job


def _rival_job(job, name):
    """A job of a trained baseline: its modules are the run's, with what config.rivals changes."""
    other, c, changes = copy.copy(job), job.config.model, job.config.rivals[name].to_dict()
    needs, reads, own = (job.stage_spec('recommend').needs, names(changes['recommend']),
                         job.spec.recommend)
    if 'teach.z' in needs:  # trained baselines have no teacher
        other.config = gate.without_distillation(job.config)
    fusion = job.spec.fusion.clone(
        use_id=changes.get('use_id', c.use_id),
        side_sizes=job.data.side_sizes if changes.get('use_side', c.use_side) else ())
    rows = job.blank | job.catalogue
    widths = [[math.prod(rows[n].shape[1:]) if n in rows else 0 for n in x] for x in (reads, own)]
    if needs <= ALONE and set(reads) <= job.catalogue.keys() and widths[0] == widths[1]:
        # in the place of the run's own rows, which are as wide: one compilation serves both
        other.catalogue = job.catalogue | {
            place: job.catalogue[name].reshape(len(job.catalogue[name]), -1)
            for place, name in zip(own, reads, strict=True) if place != name}
        reads = own
    other.spec = replace(job.spec, fusion=fusion, recommend=reads)
    return other


def clusters(job):
    """Cluster the items for the loss `clusters`, int32 [V+1], see `handover.clustered`.

    Args:
      job: job.Job. With config.model.clusters_of='z', a recommender of ids is trained first.
    """
    c, z = job.config.model, None
    if c.clusters_of == 'z':
        other = copy.copy(job)
        other.config = copy.deepcopy(job.config)
        other.config.rivals = {'clusters': dict(recommend='', use_side=False, use_id=True)}
        other = _train_rival(_rival_job(other, 'clusters'), 'clusters')
        z = tpad.z_table(other.spec, other.nested(), other.catalogue)
    return handover.clustered(job.catalogue['k'], c.clusters, job.config.seed, z, job.final.warm)


def begun(job, name: str) -> dict:
    """Return the parameters a stage begins with; of stage recommend, after the teacher's lessons.

    With config.model.lessons, a recommender without ids first learns sessions that the
    Transfer-MLLM draws [ours]: all that T has learnt, here or elsewhere, then reaches a recommender
    with few sessions. A tenth of the drawn ones validates it. Its ids add nothing at first.

    Args:
      job: job.Job.
      name: of the stage's folder.

    Returns:
      {path: array} of all parameters.
    """
    count, data, other = job.config.model.lessons, job.data, copy.copy(job)
    if name != 'recommend' or not count:
        return job.params
    lengths = np.random.default_rng(job.config.seed).choice(data.train.lengths, count)
    teacher = stages.ENTRIES['teach'].scorer(job.spec, job.devices.own)(job.nested(), job.catalogue)
    drawn = sessions.drawn(teacher, np.minimum(lengths, job.max_length),
                           sessions.counts(data.train, data.num_items), job.config.seed)
    train, valid = (sessions.take(drawn, part) for part in
                    np.split(np.arange(count), [count - count // 10]))
    other.data = other.final = replace(
        data, train=train, valid=valid, warm=sessions.warm_items(train, data.num_items),
        events=None)  # drawn items have no times, kinds and visitors
    other.valid = sessions.rows(valid, max_length=job.max_length)
    other.config = length.of_data(job.asked, train)
    other.config.rivals = {'lessons': dict(recommend=job.config.model.recommend, use_id=False)}
    other.count()
    other = _train_rival(_rival_job(other, 'lessons'), 'lessons')
    return job.params | {path: other.params.get(path, jnp.zeros_like(x))
                         for path, x in job.fresh(job.spec).items()}


def _train_rival(job, folder):
    """Train a recommender next to the run's own with the recommend stage's own care.

    Args:
      job: see `_rival_job`.
      folder: of its checkpoints.

    Returns:
      The job, with its parameters and record.
    """
    job.pause()
    spec = job.stage_spec('recommend')
    job.first = others(job.params, *(f'loss/{loss.name}/' for loss in spec.losses))
    job.params = job.first | job.fresh(job.spec)
    trained, _, job.record = fit(job, folder, 'recommend', spec)
    job.seconds[folder] = job.record['seconds']
    job.params = job.params | trained
    return job


def _refit(job, folder):
    """Train again on training and validation sessions, for as many steps as were chosen.

    The draws are the same, the schedule ends with these steps, and there are rows for items new to
    training.
    """
    job.pause()
    job.config = copy.deepcopy(job.config)
    job.config.stage.recommend.steps = job.record['chosen']
    name = 'refit' if folder == 'recommend' else f'{folder}_refit'
    params = job.first | job.fresh(job.spec)
    trained, _, record = fit(job, name, 'recommend', job.stage_spec('recommend'), params,
                             job.record['chosen'])
    job.seconds[name] = record['seconds']
    job.params = {**job.params, **trained}


def others(params: dict, *own: str) -> dict:
    """Return all parameters but a recommender's and those of its losses, which are drawn again.

    Args:
      params: {path: array}.
      *own: prefixes of paths that are left out, too.
    """
    return {path: x for path, x in params.items() if not path.startswith(('recommender/', *own))}


def scorer_of(members, mixture=None):
    """Bind the scorer of one recommender, or of several whose scores are added; with experts."""
    models, params, catalogues = zip(*(
        (job.spec, job.nested(), job.catalogue) for job in members), strict=True)
    return scorer(models, members[0].devices.own)(params, catalogues, mixture)


def _valid(members, name):
    """Return the validation metrics of one recommender, or measure those of a sum."""
    if len(members) == 1 and members[0].record['valid'] is not None:
        return members[0].record['valid']
    return validated(scorer_of(members), members[0], name)
