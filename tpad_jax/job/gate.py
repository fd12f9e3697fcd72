"""The gate before distillation: a Transfer-MLLM that predicts less than a rule teaches nothing.

[ours] A teacher is distilled from only where its likelihood on validation is at least that of the
best rule (config.baselines). Both are calibrated there, see evaluation/likelihood.py.
"""

import copy
from collections.abc import Callable
from typing import NamedTuple

from tpad_jax.config import STAGES, names
from tpad_jax.evaluation import likelihood
from tpad_jax.job.fitting import validated
from tpad_jax.training import stages, step

# outputs of T, and of those who learn from it
OF_TEACHER = {'t', 'p', 'teach.h', 'teach.last', 'teach.short'}
OF_PUPIL = {'r', 'r_next', 'h', 'h_each'}


class Taught(NamedTuple):
    """The Transfer-MLLM after stage teach, as one more model.

    Attributes:
      scorer: of its scores.
      valid: {metric: value} on validation.
      facts: what results.json holds of it: 'calibration', and 'gate' with 'open', 'nll', 'rule'
        (None: there is none), 'rule_nll' and the sentence 'text'.
    """

    scorer: Callable
    valid: dict
    facts: dict


def judge(job, tuned: dict) -> Taught:
    """Measure the Transfer-MLLM of a job whose stage teach is done.

    Args:
      job: job.Job.
      tuned: {name: rules.Tuned}.
    """
    items, seed = job.data.num_items, job.config.seed
    scorer = stages.ENTRIES['teach'].scorer(job.spec, job.devices.own)(job.nested(), job.catalogue)
    known = likelihood.calibrate(scorer, job.valid, items, rule=False, seed=seed)
    nll = likelihood.nll(scorer, job.valid, items, known, seed=seed)
    rule = min(tuned, key=lambda name: tuned[name].valid['nll'], default=None)
    best = None if rule is None else tuned[rule].valid['nll']
    is_open = best is None or nll <= best
    rival = f'the best rule ({rule}) {best:.3f}' if tuned else 'config.baselines names no rule'
    text = (f'Teacher: {nll:.3f} nats on validation, {rival}; it is '
            + ('distilled from.' if is_open else 'not distilled from, and r are k.'))
    gate = {'open': is_open, 'nll': nll, 'rule': rule, 'rule_nll': best, 'text': text}
    return Taught(scorer, job.record.get('valid') or validated(scorer, job, 'teacher'),
                  {'calibration': known._asdict(), 'gate': gate})


def without_distillation(config):
    """Return the config with nothing by which items or the recommender learn from T.

    Args:
      config: of the run.
    """
    config = copy.deepcopy(config)
    config.stage.transfer.steps = config.model.lessons = 0
    for stage in STAGES[STAGES.index('teach') + 1:]:
        trains = stage in names(config.stages) and config.stage[stage].steps
        for loss in step.stage_losses(config, stage) if trains else ():
            if loss.needs & OF_TEACHER and loss.needs & OF_PUPIL:
                config.stage[stage].weights[loss.name] = 0.0
    return config
