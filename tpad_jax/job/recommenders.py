"""What a run recommends by: its own recommender, its rivals, and a partner of each [ours].

A rival reads other rows than the run's own recommender (`config.rivals`) and is trained with the
same care. Encoders of different kinds err on different sessions: where `config.partner` says how a
second recommender differs from the first, it is trained beside it, with its own stage and its own
validation, and the list that is served is made of the sum of both scores. Each is a log-linear
model with a temperature of its own, so the sum needs no weight, and none is tuned. Rivals have the
same partner, so that what is compared is what they read.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

from flax.traverse_util import unflatten_dict

from tpad_jax.config import names, partnered
from tpad_jax.evaluation.evaluate import evaluate
from tpad_jax.evaluation.scorers import scorer
from tpad_jax.models import tpad
from tpad_jax.training import step

NAME, OWN = 'mixture', 'tpad_recommend'  # of the scores that are served: of ids alone, with content
KEPT = 'hit@20', 'mrr@20', 'ndcg@20'  # of validation
PARTS = 'fusion', 'encoder', 'recommend', 'normalise', 'temperature', 'repeats'  # a recommender's


@dataclass
class Trained:
    """One recommender at the step that validation chose.

    Attributes:
      job: job.Job with its config and its catalogue's rows. name: of its folder; a refit's is
        <name>_refit.
      model: its modules. params: all parameters {path: array}. blank: as they were before it was
        trained, its own aside. record: of its fit, see fitting.
    """

    job: Any
    name: str
    model: tpad.TPAD
    params: dict
    blank: dict
    record: dict

    def refit(self, writer, progress):
        """Train it anew on training and validation sessions, for as many steps as were chosen.

        The draws are the same, and there are rows for items new to training.
        """
        job = self.job
        job.pause()
        name = 'refit' if self.name == 'recommend' else f'{self.name}_refit'
        spec = step.make_spec(job.config, 'recommend', self.model, job.config.seed)
        trained, _, found = job.fit(name, 'recommend', spec, writer, progress, None,
                                    {**self.blank, **job.fresh(self.model)}, self.record['chosen'])
        job.seconds[name] = found['seconds']
        self.params = {**self.params, **trained}


def beside(job, writer, progress) -> tuple[dict, dict]:
    """Train what stands beside a job whose recommend stage is done, refit, and score.

    Returns:
      {name: scorer} of all that is tested and {name: validation metrics}, each at its chosen step.
    """
    c = job.config
    own = [Trained(job, 'recommend', job.spec, job.params, job.first, job.record)]
    if c.partner:
        own.append(_partner(job, writer, progress))
    if job.content is not None:
        found = {OWN: own}
    else:
        found = {NAME: own} if c.partner else {}
    if c.partner or job.content is None:
        encoders = [one.job.config.model.encoder for one in own]
        if encoders[1:] == encoders[:1]:
            encoders[1] += '_partner'
        found |= {name: [one] for name, one in zip(encoders, own, strict=True)}
    everyone = list(own)
    for name, rival in c.rivals.items():
        if 'true' in names(rival.recommend) and job.planted is None:
            continue  # no such rows: only a planted catalogue knows the truth
        found[name] = [_rival(one.job, name, f'{name}_partner' if i else name, writer, progress)
                       for i, one in enumerate(own)]
        everyone += found[name]
    chosen = {name: _valid(several, name) for name, several in found.items()}
    if c.refit:  # after all of them, for they validate on what it trains on
        for one in own:
            one.job.count_both()
        for one in everyone:
            one.refit(writer, progress)
        job.params = own[0].params
    return {name: _scorer(several) for name, several in found.items()}, chosen


def _partner(job, writer, progress):
    """Train the second recommender of `config.partner` by a job of its own."""
    job.pause()
    other = copy.copy(job)
    other.config = partnered(job.config)
    other.catalogue = dict(job.catalogue)
    c = other.config.model
    made = tpad.build(None, c, recommend=names(c.recommend),
                      items=job.data.num_items, max_length=job.max_length,
                      side_sizes=job.data.side_sizes)
    other.spec = replace(job.spec, **{part: getattr(made, part) for part in PARTS})
    other.count()
    other.params = _others(job.params) | other.fresh(other.spec)
    other.run_stage('recommend', writer, progress, name='partner')
    return Trained(other, 'partner', other.spec, other.params, other.first, other.record)


def _rival(job, name, folder, writer, progress):
    """Train a recommender beside the run's own with the recommend stage's own care."""
    job.pause()
    c, changes = job.config, job.config.rivals[name].to_dict()
    fusion = job.spec.fusion.clone(
        use_id=changes.get('use_id', c.model.use_id),
        side_sizes=job.data.side_sizes if changes.get('use_side', c.model.use_side) else ())
    model = replace(job.spec, fusion=fusion,
                    recommend=names(changes['recommend']))
    spec = step.make_spec(c, 'recommend', model, c.seed)
    blank = _others(job.params, *(f'loss/{loss}/' for loss, _ in spec.modules))
    params = blank | job.fresh(model)
    trained, _, record = job.fit(folder, 'recommend', spec, writer, progress, None, params)
    job.seconds[folder] = record['seconds']
    return Trained(job, folder, model, params | trained, blank, record)


def _others(params, *own):
    """All but a recommender's parameters, and those of its losses where they are drawn anew."""
    return {path: x for path, x in params.items() if not path.startswith(('recommender/', *own))}


def _scorer(several):
    """Of one recommender, or of several whose scores are added."""
    given = [(one.model, unflatten_dict(one.params, sep='/'), one.job.catalogue)
             for one in several]
    devices = several[0].job.devices.own
    if len(given) == 1:
        model, params, catalogue = given[0]
        return scorer(model, devices)(params, catalogue)
    models, params, catalogues = zip(*given, strict=True)
    return scorer(models, devices)(params, catalogues)


def _valid(several, name):
    """Validation metrics, of a sum as of one."""
    if len(several) == 1:
        return several[0].record['valid']
    job = several[0].job
    found, _ = evaluate(_scorer(several), job.valid, job.data.warm, ks=(20,), name=name)
    return {key: found[key] for key in KEPT}
