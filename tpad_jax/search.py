"""Search the hyper-parameters of a config's model on validation; test rows are never scored.

    python -m tpad_jax.search --config=configs/sessions.py:diginetica --trials=12 --workdir=DIR \
        [--config.KEY=VALUE ...]

`config.search.space` mirrors the keys to search and holds an axis for each, as in
dict(stage=dict(recommend=dict(learning_rate=('log', 1e-4, 1e-2)))); tpad_jax/baselines/tune.py
lists the axes. The first trial is the config itself. Trial n is a run in DIR/trial_00n that ends
before the test. The same command resumes a search that was stopped within or between trials. A
larger --trials extends a finished search. DIR/best.json holds the best overrides.

Exit status: as `python -m tpad_jax.train`.
"""

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path

from absl import flags
from rich.console import Console

from tpad_jax import train
from tpad_jax.config import flat
from tpad_jax.core import cli, console, files, startup
from tpad_jax.errors import refuse_if, refusing

METRICS = ('hit@20', 'mrr@20')  # the first decides; the second decides between equals


def search_config(config, workdir: str | Path, *, trials: int,
                  stopping: Callable[[], bool] = lambda: False) -> dict:
    """Run or resume the search and write best.json.

    Args:
      config: ConfigDict of a job, with `search.space`. Its `seed` is also the seed of the search.
      workdir: directory of the trials.
      trials: budget, with the trials that the workdir already has.
      stopping: as in `job.run`.

    Returns:
      The content of best.json: 'overrides' {config key: value}, their 'valid' {metric: value},
      'space', and the record of `tune.search`.

    Raises:
      InputError: the config or space is unusable, or the workdir holds another search.
      Stopped: `stopping` returned True. The same call resumes the search.
      FloatingPointError: every trial diverged.
    """
    workdir = Path(workdir)
    space, current = dict(flat(config.search.space)), dict(flat(config))
    refuse_if(not space, 'config.search.space is empty. Expected an axis for every key to search')
    unknown = ', '.join(space.keys() - current.keys())
    refuse_if(unknown, f'config.search.space names {unknown}, which is not a key of the config')
    defaults = {key: current[key] for key in space}
    # imported here: --help and a wrong space do not wait for jax
    from tpad_jax.baselines.tune import search
    from tpad_jax.job import job, validate
    from tpad_jax.training import workdir as workdir_lib
    validate.check_workdir(workdir)
    workdir_lib.claim(workdir, config.to_dict())

    def objective(params, trial):
        results = job.run(override(config, params), workdir / f'trial_{trial:03d}', stopping,
                          until='validation')
        return {metric: results['valid'][metric] for metric in METRICS}

    with workdir_lib.locked(workdir):
        best, record = search(objective, space, defaults, trials=trials, seed=config.seed,
                              storage=workdir / 'search.journal', name=config.name)
    values = next(trial['values'] for trial in record['tried'] if trial['trial'] == record['best'])
    result = {'overrides': best, 'valid': values, 'space': space, **record}
    # write_json would round the overrides
    files.write_text(workdir / 'best.json', json.dumps(result, indent=1) + '\n')
    return result


def override(config, params: dict):
    """Copy a config and set keys of the copy.

    Args:
      config: ConfigDict of a job.
      params: {key: value}, such as {'model.dropout': 0.1}.

    Returns:
      The copy.

    Raises:
      InputError: a value is of another type than the config's.
    """
    config = copy.deepcopy(config)
    for key, value in params.items():
        with refusing(TypeError, f'config.search.space.{key} proposes {value!r}, but the config '
                      'holds another type', 'Fix: change the axis'):
            config.update_from_flattened_dict({key: value})
    return config


def table(result: dict) -> console.Table:
    """Format the result of `search_config`: a row per trial in percent, the best one bold."""
    out = console.table(f'{result["trials"]} trials on validation, %', (
        'trial', *METRICS, *(name.split('.')[-1] for name in result['overrides'])))
    for trial in result['tried']:
        values = [f'{100 * trial["values"][metric]:.2f}' if 'values' in trial else 'failed'
                  for metric in METRICS]
        params = [f'{x:.4g}' if isinstance(x, float) else str(x) for x in trial['params'].values()]
        out.add_row(str(trial['trial']), *values, *params,
                    style='bold' if trial['trial'] == result['best'] else None)
    return out


@cli.command('tpad_jax.search')
def main(argv: list[str]) -> None:
    """Search, print the table of trials and the flags of the best one."""
    values = train.parse(argv, str(__doc__), _flags)
    config, workdir = values.config, values.workdir or f'runs/{values.config.name}_search'
    stopping = startup.begin(config.get('xla_flags', ''))
    result = search_config(config, workdir, trials=values.trials, stopping=stopping)
    Console().print(table(result))
    print(f'{workdir}/best.json:',
          *(f'--config.{key}={value}' for key, value in result['overrides'].items()))


def _flags(values):
    flags.DEFINE_integer('trials', 12, 'Number of trials, the config itself included.',
                         lower_bound=1, flag_values=values)


if __name__ == '__main__':
    sys.exit(main())
