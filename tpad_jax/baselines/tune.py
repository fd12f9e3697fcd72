"""Hyper-parameter search on validation: the same trials for baselines and for models.

A space is {name: axis} and an axis one of

    ('float', low, high)   uniform         ('int', low, high)   uniform, both ends included
    ('log', low, high)     log-uniform     ('choice', (a, b))   no order among them

Optuna's tree-structured Parzen estimator (Bergstra et al. 2011) proposes, each trial from a seed of
its own: what trial n proposes depends on the seed, n and the trials before it alone, so a search
that was stopped goes on as if it had not been.
"""

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tpad_jax.errors import InputError

Space = dict[str, tuple]
Objective = Callable[[dict, int], dict]
"""(parameters, number of the trial) -> {metric: value}; the first is maximised, the others decide
among its equals, each in its turn."""
RANDOM = 5  # first trials that no estimator has a say in, the defaults being one of them


def search(objective: Objective, space: Space, defaults: dict, *, trials: int, seed: int,
           storage: str | Path | None = None, name: str = 'search') -> tuple[dict, dict]:
    """The parameters with the best validation metric among the defaults and what is proposed.

    A proposal that was tried before costs nothing but counts. So does one whose objective raises
    FloatingPointError (training diverged): it failed, and the search goes on. Every other exception
    ends the search; with `storage`, the same call then takes the same trial up again.

    Args:
      objective: measures parameters on validation.
      space: what is searched; an empty one has one trial.
      defaults: {name: value} for every name of the space, the first trial.
      trials: budget, at least 1, the first and those of an earlier call included.
      seed: of the proposals.
      storage: journal file to keep the trials in, for one process at a time; several searches may
        share it.
      name: of the search in there.

    Returns:
      The best parameters and a record that JSON can hold: {'trials', 'seed', 'sampler', 'best':
      number of a trial, 'tried': [{'trial', 'params', 'values' or 'failed'}]}.

    Raises:
      InputError: an axis that is none, defaults outside of the space, a storage that holds
        another search of this name. FloatingPointError: every trial failed.
    """
    check_space(space, defaults, name)
    if trials < 1:
        raise InputError(f'{name}: trials={trials} must be 1 or more, the first being the defaults')
    study = _study(storage, name, {'space': space, 'defaults': defaults, 'seed': seed})
    tried = _finished(study)
    while len(tried) < (trials if space else 1):
        number, params = _proposed(study, space, defaults, [seed, len(tried)])
        outcome = next((one['outcome'] for one in tried.values() if one['params'] == params), None)
        if outcome is None:
            try:
                values = objective(params, number)
                outcome = {'values': {key: float(value) for key, value in values.items()}}
            except FloatingPointError as error:
                outcome = {'failed': str(error)}
        study.set_user_attr(str(number), {'params': params, 'outcome': outcome})
        _tell(study, number, outcome)
        tried[number] = {'params': params, 'outcome': outcome}
    measured = {n: one['outcome']['values'] for n, one in tried.items()
                if 'values' in one['outcome']}
    if not measured:
        raise FloatingPointError(f'{name}: all {len(tried)} trials failed, the last one with '
                                 f'{tried[max(tried)]["outcome"]["failed"]}')
    best = max(measured, key=lambda n: tuple(measured[n].values()))  # the first of equals
    record = {'trials': len(tried), 'seed': seed, 'best': best,
              'sampler': f'optuna {importlib.metadata.version("optuna")}, TPE',
              'tried': [{'trial': n, 'params': one['params'], **one['outcome']}
                        for n, one in tried.items()]}
    return tried[best]['params'], record


def check_space(space: Space, defaults: dict, name: str = 'search') -> None:
    """Refuses a space that is none, and defaults that do not lie in it.

    Raises:
      InputError: naming the axis.
    """
    for key, axis in space.items():
        kind, *ends = axis
        where = f'{name}: {key} of {tuple(axis)}'
        if kind == 'choice':
            good = len(ends) == 1 and len(ends[0]) > 0
            inside = good and any(defaults[key] == one for one in ends[0])
        elif kind in ('float', 'log', 'int'):
            good = len(ends) == 2 and ends[0] <= ends[1] and not (kind == 'log' and ends[0] <= 0)
            inside = good and ends[0] <= defaults[key] <= ends[1]
        else:
            good = inside = False
        if not good:
            raise InputError(f"{where} is no axis; write ('float' | 'log' | 'int', low, high), a "
                             "log's low being above 0, or ('choice', (a, b, ..))")
        if not inside:
            raise InputError(f'{where} does not hold its default {defaults[key]!r}; widen it')


def _study(storage, name, search):
    """The optuna study of that name, new or as an earlier call left it."""
    optuna = _optuna()
    if storage is not None:
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        _drop_unfinished_line(Path(storage))
        backend = optuna.storages.journal.JournalFileBackend(str(storage))
        storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(storage=storage, study_name=name, direction='maximize',
                                load_if_exists=True)
    search = json.loads(json.dumps(search))  # as the journal gives it back
    found = study.user_attrs.get('search')
    if found is None:
        study.set_user_attr('search', search)
    elif found != search:
        changed = ', '.join(key for key in search if found[key] != search[key])
        raise InputError(f'{name} was searched with another {changed} in the same journal; search '
                         'in another directory')
    return study


def _drop_unfinished_line(journal):
    """A kill or a full disk may leave one; what optuna wrote behind it would be lost with it."""
    if journal.is_file():
        with journal.open('r+b') as file:
            text = file.read()
            if not text.endswith(b'\n'):
                file.truncate(text.rfind(b'\n') + 1)


def _finished(study):
    """{number: {'params', 'outcome'}} of the trials measured before."""
    tried = {}
    for trial in study.get_trials(deepcopy=False):
        found = study.user_attrs.get(str(trial.number))
        if found is not None:
            tried[trial.number] = found
            if not trial.state.is_finished():  # stopped between writing and telling
                _tell(study, trial.number, found['outcome'])
    return tried


def _proposed(study, space, defaults, seed):
    """(number, params) of the trial that was stopped, else of a new one."""
    optuna = _optuna()
    for trial in study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
        if trial.params.keys() == space.keys():
            return trial.number, dict(trial.params)
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)  # stopped while proposing
    if not seed[1]:
        study.enqueue_trial({key: defaults[key] for key in space}, skip_if_exists=True)
    seed = int(np.random.SeedSequence(seed).generate_state(1)[0])
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=RANDOM)
    trial = study.ask({key: _distribution(*axis) for key, axis in space.items()})
    return trial.number, trial.params


def _tell(study, number, outcome):
    """Hand a trial's first metric to the estimator, or that it failed."""
    if 'failed' in outcome:
        study.tell(number, state=_optuna().trial.TrialState.FAIL)
    else:
        study.tell(number, next(iter(outcome['values'].values())))


def _distribution(kind, *ends):
    kinds = _optuna().distributions
    if kind == 'choice':
        return kinds.CategoricalDistribution(ends[0])
    if kind == 'int':
        return kinds.IntDistribution(*ends)
    return kinds.FloatDistribution(*ends, log=kind == 'log')


def _optuna():
    """Imported where it is first needed, for it takes a while; it tells of every trial at INFO."""
    import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
