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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax.config import names, partnered
from tpad_jax.evaluation.scorers import scorer
from tpad_jax.job.background import TRAIN
from tpad_jax.job.fitting import fit, validated
from tpad_jax.models import tpad
from tpad_jax.training import handover, optimizer, step

NAME, OWN = 'mixture', 'tpad_recommend'  # of the scores that are served: of ids alone, with content
PARTS = 'fusion', 'encoder', 'recommend', 'normalise', 'temperature', 'repeats'  # a recommender's
# Outputs of a recommender alone: they are the same before and after the other stages.
ALONE = frozenset({'h', 'h_each', 'z', 'items', 'next', 'warm', 'repeat', 'popularity'})


@dataclass
class Trained:
    """One recommender at the step that validation chose.

    Attributes:
      job: job.Job with its config and its catalogue's rows.
      name: of its folder; a refit's is <name>_refit.
      model: its modules.
      params: all parameters {path: array}.
      blank: as they were before it was trained, its own left out.
      record: of its fit, see `loop.fit`.
    """

    job: Any
    name: str
    model: tpad.TPAD
    params: dict
    blank: dict
    record: dict

    def refit(self):
        """Train it again on training and validation sessions, for as many steps as were chosen.

        The draws are the same, and there are rows for items new to training.
        """
        job = self.job
        job.pause()
        name = 'refit' if self.name == 'recommend' else f'{self.name}_refit'
        spec = step.make_spec(job.config, 'recommend', self.model, job.config.seed)
        params = self.blank | job.fresh(self.model)
        trained, _, record = fit(job, name, 'recommend', spec, params, self.record['chosen'])
        job.seconds[name] = record['seconds']
        self.params = {**self.params, **trained}


def check(job) -> None:
    """Refuse settings of stage recommend that fit no parameter of a recommender.

    Args:
      job: job.Job. Its parameters may be shapes.

    Raises:
      InputError: see `handover.check_stage`.
    """
    for owner in [job, _partner_job(job)] if job.config.partner else [job]:
        for model in (owner.spec, *(_rival_model(owner, name) for name in _rivals(job))):
            init = partial(tpad.recommender_init, spec=model)
            shapes = jax.eval_shape(init, jax.random.key(0),
                                    catalogue={**owner.catalogue, **owner.blank})
            params = _others(job.params) | flatten_dict({'recommender': shapes}, sep='/')
            spec = step.make_spec(owner.config, 'recommend', model, owner.config.seed)
            handover.check_stage(owner.config, 'recommend', spec, params, job.data.num_items)


def _rivals(job):
    """Names of the trained baselines whose rows exist: only a planted catalogue has 'true'."""
    return [name for name, rival in job.config.rivals.items()
            if job.planted is not None or 'true' not in names(rival.recommend)]


class Recommenders:
    """The recommenders of a run that are trained next to its own.

    Args:
      job: job.Job, built.
    """

    def __init__(self, job):
        self._job, self._own, self._partner = job, None, None
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
        if last and job.config.partner:
            other = _partner_job(job)
            self._partner = job.background.submit(partial(_train_partner, other), TRAIN)
            for name in self._rivals:
                self._submit(other, name, f'{name}_partner')

    def _submit(self, job, name, folder):
        # with the rows and parameters of now: what later stages add is not read
        then = copy.copy(job)
        self._tasks[folder] = job.background.submit(
            partial(_train_rival, then, name, folder), TRAIN)

    def _independent(self, name):
        """Whether the rows a trained baseline reads exist, and it reads no other stage's model."""
        job = self._job
        if not set(names(job.config.rivals[name].recommend)) <= job.catalogue.keys():
            return False
        model = _rival_model(job, name)
        spec = step.make_spec(job.config, 'recommend', model, job.config.seed)
        trained, _ = optimizer.split(job.params, job.config.stage.recommend.train)
        return spec.needs <= ALONE and all(path.startswith('recommender/') for path in trained)

    def take_own(self) -> None:
        """Take the run's own recommender and the rows it reads, once stage recommend is done."""
        job = copy.copy(self._job)  # stage joint changes both
        self._own = Trained(job, 'recommend', job.spec, job.params, job.first, job.record)

    def finish(self) -> tuple[dict, dict]:
        """Wait for all of them, refit where the config asks for it, and bind the scorers.

        Returns:
          {name: scorer} of all that is tested and {name: validation metrics}, each at its chosen
          step.
        """
        job, c, background = self._job, self._job.config, self._job.background
        own = [self._own]
        if self._partner is not None:
            own += background.results([self._partner])
        if job.content is not None:
            groups = {OWN: own}
        else:
            groups = {NAME: own} if c.partner else {}
        if c.partner or job.content is None:
            encoders = [member.job.config.model.encoder for member in own]
            if encoders[1:] == encoders[:1]:
                encoders[1] += '_partner'
            groups |= {name: [member] for name, member in zip(encoders, own, strict=True)}
        trained = dict(zip(
            self._tasks, background.results(self._tasks.values(), help_others=True), strict=True))
        for name in self._rivals:
            groups[name] = [trained[f'{name}_partner' if i else name] for i in range(len(own))]
        chosen = {name: _valid(members, name) for name, members in groups.items()}
        if c.refit:  # after all of them: they validate on what it trains on
            everyone = (*own, *trained.values())
            for member in everyone:
                member.job.count_both()
            background.results([background.submit(member.refit, TRAIN) for member in everyone])
            job.params, job.final = self._own.params, self._own.job.final
            job.catalogue = self._own.job.catalogue
        return {name: _scorer(members) for name, members in groups.items()}, chosen


def _partner_job(job):
    """A job of the second recommender of `config.partner`, with its own config and rows."""
    other = copy.copy(job)
    other.config = partnered(job.config)
    made = job.modules(None, other.config)
    other.spec = replace(job.spec, **{part: getattr(made, part) for part in PARTS})
    other.count()
    other.params = _others(job.params)
    return other


def _train_partner(job) -> Trained:
    """Train the second recommender in its own job, see `_partner_job`."""
    job.pause()
    job.params = job.params | job.fresh(job.spec)
    job.run_stage('recommend', name='partner')
    return Trained(job, 'partner', job.spec, job.params, job.first, job.record)


def _rival_model(job, name) -> tpad.TPAD:
    """The modules of a trained baseline: the run's, with what config.rivals changes."""
    c, changes = job.config, job.config.rivals[name].to_dict()
    fusion = job.spec.fusion.clone(
        use_id=changes.get('use_id', c.model.use_id),
        side_sizes=job.data.side_sizes if changes.get('use_side', c.model.use_side) else ())
    return replace(job.spec, fusion=fusion, recommend=names(changes['recommend']))


def _train_rival(job, name, folder) -> Trained:
    """Train a recommender next to the run's own with the recommend stage's own care.

    Args:
      job: a copy of job.Job with the rows that it reads.
      name: of config.rivals.
      folder: of its checkpoints.
    """
    job.pause()
    model = _rival_model(job, name)
    spec = step.make_spec(job.config, 'recommend', model, job.config.seed)
    blank = _others(job.params, *(f'loss/{loss.name}/' for loss in spec.losses))
    params = blank | job.fresh(model)
    trained, _, record = fit(job, folder, 'recommend', spec, params)
    job.seconds[folder] = record['seconds']
    return Trained(job, folder, model, params | trained, blank, record)


def _others(params, *own):
    """Return all parameters but a recommender's and those of its losses, which are drawn again."""
    return {path: x for path, x in params.items() if not path.startswith(('recommender/', *own))}


def _scorer(members):
    """Bind the scorer of one recommender, or of several whose scores are added."""
    models, params, catalogues = zip(*(
        (member.model, unflatten_dict(member.params, sep='/'), member.job.catalogue)
        for member in members), strict=True)
    devices = members[0].job.devices.own
    if len(members) == 1:
        return scorer(models[0], devices)(params[0], catalogues[0])
    return scorer(models, devices)(params, catalogues)


def _valid(members, name):
    """Return the validation metrics of one recommender, or measure those of a sum."""
    if len(members) == 1:
        return members[0].record['valid']
    return validated(_scorer(members), members[0].job, name)
