"""Hyper-parameter search for a config's model, on validation; test is never scored.

    python -m tpad_jax.search --config=configs/sessions.py:diginetica --trials=12 --workdir=DIR \
        [--config.KEY=VALUE ...]

Searches `config.search.space`: a config that mirrors the keys it searches and holds an axis of
`trials` for each, as in dict(stage=dict(recommend=dict(learning_rate=('log', 1e-4, 1e-2)))). The
first trial is the config as it stands. Trial n is a run of its own in DIR/trial_00n that ends
before test; the same command goes on from where the search was stopped, inside a trial or between
two. A larger --trials adds to a finished search. DIR/best.json holds the overrides found.
"""

import copy
import json
import os
import sys
from pathlib import Path

from absl import app, flags

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # XLA's C++ remarks

from ml_collections import ConfigDict, config_flags
from rich.console import Console
from rich.table import Table

from tpad_jax.core.startup import STOPPED, UNUSABLE, begin
from tpad_jax.errors import InputError, Stopped

METRICS = ('hit@20', 'mrr@20')  # the one that decides, and the one that decides among its equals


def search_config(config, workdir, *, trials: int, stopping=lambda: False) -> dict:
    """Runs or resumes the search and writes best.json.

    Args:
      config: of a job, with `search.space`; its `seed` is the search's too.
      workdir: where the trials live.
      trials: budget, earlier ones of this workdir included.
      stopping: as in `job.run`.

    Returns:
      What best.json holds: 'overrides' {config key: value}, 'valid' {metric: value} of them, and
      the record of `trials.search`.

    Raises:
      InputError: unusable config or space, or the workdir of another search. Stopped: `stopping`
        answered True; the same call goes on. FloatingPointError: every trial diverged.
    """
    workdir = Path(workdir)
    space = _flat(config.search.space)
    if not space:
        raise InputError('config.search.space is empty: give it an axis for every key to be '
                         'searched, see tpad_jax/search.py')
    current = _flat(config)
    for key in space:
        if key not in current:
            raise InputError(f'config.search.space names {key}, which the config has not')
    defaults = {key: current[key] for key in space}
    # here: --help and a wrong space need no jax, and memory is prepared before numpy comes
    from tpad_jax.baselines.tune import search
    from tpad_jax.job import job
    from tpad_jax.training import checkpoint
    checkpoint.claim(workdir, config.to_dict())

    def objective(params, number):
        chosen = override(config, params)
        found = job.run(chosen, workdir / f'trial_{number:03d}', stopping, until='validation')
        return {metric: found['valid'][metric] for metric in METRICS}

    best, record = search(objective, space, defaults, trials=trials, seed=config.seed,
                          storage=workdir / 'search.journal', name=config.name)
    values = next(one['values'] for one in record['tried'] if one['trial'] == record['best'])
    out = {'overrides': best, 'valid': values, 'space': space, **record}
    # not by files.write_json, which rounds: overrides are what was tried, to the last digit
    (workdir / 'best.json').write_text(json.dumps(out, indent=1) + '\n')
    return out


def override(config, params: dict):
    """A copy of the config with {key: value} laid over it.

    Raises:
      InputError: a value is of another type than the config's.
    """
    config = copy.deepcopy(config)
    for key, value in params.items():
        try:
            config.update_from_flattened_dict({key: value})
        except TypeError as error:
            raise InputError(f'config.search.space.{key} proposes {value!r}, but the config holds '
                             f'another type there ({error})') from error
    return config


def _flat(config, lead=''):
    """A nested config as {'a.b.c': value}."""
    out = {}
    for key, value in config.items():
        nested = isinstance(value, ConfigDict)
        out |= _flat(value, f'{lead}{key}.') if nested else {f'{lead}{key}': value}
    return out


def table(found: dict) -> Table:
    """What `search_config` returns, a row per trial, the best one bold; in percent."""
    made = Table(title=f'{found["trials"]} trials on validation, %', title_justify='left', box=None)
    for head in ('trial', *METRICS, *found['overrides']):
        made.add_column(head.split('.')[-1], justify='right', no_wrap=True)
    for one in found['tried']:
        values = [f'{100 * one["values"][metric]:.2f}' for metric in METRICS] if (
            'values' in one) else ['failed'] * len(METRICS)
        shown = [f'{x:.4g}' if isinstance(x, float) else str(x) for x in one['params'].values()]
        made.add_row(str(one['trial']), *values, *shown,
                     style='bold' if one['trial'] == found['best'] else None)
    return made


def main(argv):
    """Search; turn signals and refusals into exit statuses, as launch.py does."""
    del argv
    config = flags.FLAGS.config
    stopping = begin(config.get('xla_flags', ''))
    workdir = flags.FLAGS.workdir or f'runs/{config.name}_search'
    try:
        found = search_config(config, workdir, trials=flags.FLAGS.trials, stopping=stopping)
    except InputError as error:
        print(f'tpad_jax.search: {error}', file=sys.stderr)
        sys.exit(UNUSABLE)
    except Stopped as stopped:
        print(f'tpad_jax.search: {stopped}; the same command goes on from there', file=sys.stderr)
        sys.exit(STOPPED)
    Console().print(table(found))
    print(f'{workdir}/best.json:',
          *(f'--config.{key}={value}' for key, value in found['overrides'].items()))


if __name__ == '__main__':
    config_flags.DEFINE_config_file('config', None, 'File in configs/, ":variant" behind it.')
    flags.DEFINE_string('workdir', None, 'Where the search lives; default runs/<name>_search.')
    flags.DEFINE_integer('trials', 12, 'Budget, the config itself included.')
    flags.mark_flag_as_required('config')
    app.run(main)
