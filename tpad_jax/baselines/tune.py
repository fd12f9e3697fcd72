"""Hyper-parameter search on validation: the same trials for baselines and for models.

A space is {name: axis}. An axis is one of

    ('float', low, high)   uniform         ('int', low, high)   uniform, both ends included
    ('log', low, high)     log-uniform     ('choice', (a, b))   without an order

Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) proposes the trials. It gets a
new seed for every trial, so the proposal of trial n depends only on the seed, n and the earlier
trials. A search that was stopped therefore resumes as if it had run through.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from tpad_jax.core import files
from tpad_jax.errors import refuse_if

Space = dict[str, tuple]
Objective = Callable[[dict, int], dict]
"""(parameters, number of the trial) -> {metric: value}. The first metric is maximised; the others
decide, in turn, among trials with equal values."""
RANDOM = 5  # first trials that are drawn at random, the defaults included
VERSION = 2  # of a journal's contents


def search(objective: Objective, space: Space, defaults: dict, *, trials: int, seed: int,
           storage: str | Path | None = None, name: str = 'search') -> tuple[dict, dict]:
    """Find the parameters with the best validation metric among the defaults and the proposals.

    A proposal that was tried before counts as a trial but is not measured again. A trial whose
    objective raises FloatingPointError (training diverged), or returns a number that is not finite,
    counts as failed, and the search continues. Every other exception ends the search; with
    `storage`, the next call repeats the interrupted trial.

    Args:
      objective: measures parameters on validation.
      space: the axes that are searched. An empty space has one trial.
      defaults: {name: value} for every name of the space, the first trial.
      trials: budget, at least 1. It includes the first trial and those of an earlier call.
      seed: of the proposals.
      storage: journal file that keeps the trials, for one process at a time. Several searches may
        share it.
      name: of the search in the journal.

    Returns:
      The best parameters, and a record for JSON: {'trials', 'seed', 'sampler', 'best': number of a
      trial, 'tried': [{'trial', 'params', 'values' or 'failed'}]}.

    Raises:
      InputError: an axis is malformed, a default is outside of its axis, or the storage holds
        another search of this name.
      FloatingPointError: every trial failed.
    """
    check_space(space, defaults, name)
    refuse_if(trials < 1, f'{name}: trials={trials}: too few. Expected 1 or more. Fix: raise it.')
    import optuna  # imported where it is first needed: it is slow, and logs every trial by default
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = _study(storage, name, {'space': space, 'defaults': defaults, 'seed': seed,
                                   'version': VERSION})
    _queue_first(study, defaults)
    kinds = {'choice': optuna.distributions.CategoricalDistribution,
             'int': optuna.distributions.IntDistribution,
             'float': optuna.distributions.FloatDistribution,
             'log': partial(optuna.distributions.FloatDistribution, log=True)}
    axes = {key: kinds[kind](*ends) for key, (kind, *ends) in space.items()}
    while len(counted := _counted(study)) < (trials if space else 1):
        entropy = np.random.SeedSequence([seed, len(counted)])
        study.sampler = optuna.samplers.TPESampler(
            seed=int(entropy.generate_state(1)[0]), n_startup_trials=RANDOM)
        trial = study.ask(axes)
        same = [earlier for earlier in counted if earlier.params == trial.params]
        try:
            if same and 'failed' in same[0].user_attrs:
                raise FloatingPointError(same[0].user_attrs['failed'])
            values = (same[0].user_attrs['values'] if same
                      else objective(trial.params, len(counted)))
            if not np.isfinite(list(values.values())).all():  # JSON has no nan, and nan no order
                raise FloatingPointError(f'the metrics are not finite: {values}')
        except FloatingPointError as error:
            trial.set_user_attr('failed', str(error))
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            trial.set_user_attr('values', {key: float(value) for key, value in values.items()})
            study.tell(trial, next(iter(values.values())))
    tried = [{'trial': number, 'params': dict(trial.params), **trial.user_attrs}
             for number, trial in enumerate(_counted(study))]
    measured = [trial for trial in tried if 'values' in trial]
    if not measured:
        raise FloatingPointError(f'{name}: all {len(tried)} trials failed, the last one with '
                                 f'{tried[-1]["failed"]}')
    # max returns the first of equal trials
    best = max(measured, key=lambda trial: tuple(trial['values'].values()))
    return best['params'], {
        'trials': len(tried), 'seed': seed, 'best': best['trial'],
        'sampler': f'optuna {optuna.__version__}, TPE', 'tried': tried}


def check_space(space: Space, defaults: dict, name: str = 'search') -> None:
    """Refuse a malformed space and defaults outside of it.

    Raises:
      InputError: naming the axis.
    """
    for key, (kind, *ends) in space.items():
        where, default = f'{name}: {key} of {(kind, *ends)}', defaults[key]
        if kind == 'choice':
            good = len(ends) == 1 and len(ends[0]) > 0
        else:
            good = (kind in ('float', 'log', 'int') and len(ends) == 2
                    and (0 if kind == 'log' else -np.inf) < ends[0] <= ends[1] < np.inf)
        refuse_if(not good, f"{where}: not an axis. Expected ('float' | 'log' | 'int', low, high) "
                  "with low <= high, and low > 0 for 'log', or ('choice', (a, b, ..)).")
        includes = default in ends[0] if kind == 'choice' else ends[0] <= default <= ends[1]
        refuse_if(not includes, f'{where}: excludes its default {default!r}. Expected an axis that '
                  'includes it. Fix: widen the axis.')


def _study(storage, name, settings):
    """The optuna study of that name, new or from an earlier call."""
    import optuna
    if storage is not None:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        files.drop_partial_line(storage)  # optuna would append to it and lose both lines
        backend = optuna.storages.journal.JournalFileBackend(str(storage))
        storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(storage=storage, study_name=name, direction='maximize',
                                load_if_exists=True)
    settings = json.loads(json.dumps(settings))  # as the journal returns them
    stored = study.user_attrs.get('search', settings)
    changed = ', '.join(key for key in settings if stored.get(key) != settings[key])
    refuse_if(changed, f'{name} was searched with another {changed} in the same journal. Fix: '
              'search in another directory.')
    study.set_user_attr('search', settings)
    return study


def _counted(study):
    """Trials that were measured or that diverged, in order; an interrupted one is not counted."""
    return [trial for trial in study.get_trials(deepcopy=False)
            if trial.state.is_finished() and trial.user_attrs]


def _queue_first(study, defaults):
    """End a trial that a stop or a kill interrupted, and queue the first trial of a search."""
    import optuna
    states = optuna.trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        value = next(iter(trial.user_attrs.get('values', {}).values()), None)
        study.tell(trial.number, value, state=states.FAIL if value is None else None)
    # the sampler proposes the trial again, except for the defaults
    if not _counted(study) and not study.get_trials(deepcopy=False, states=(states.WAITING,)):
        study.enqueue_trial(defaults)
