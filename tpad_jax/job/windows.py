"""Evaluation over time: train up to a day, test on the days after it, and move on.

    python -m tpad_jax.train --config=FILE --windows=4 [--config.data.window_days=7] --workdir=DIR

Each window is a run in DIR/window_N whose data `catalogue.windowed` divides again, N counted from
the end of the data. It trains on all sessions before its test days, the last of which are
validation. The summary is DIR/windows.json and a page with one plot, DIR/windows.html.
"""

import copy
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import jax
from rich.console import Console

from tpad_jax.core import console, files
from tpad_jax.data.sessions import DAY
from tpad_jax.job import job
from tpad_jax.report import curves, page

METRICS = 'hit@20', 'mrr@20'


def run(config, workdir: str | Path, count: int, stopping: Callable[[], bool]) -> list[dict]:
    """Run or resume every window, and write and print the summary.

    Args:
      config: of a run.
      workdir: directory of the windows.
      count: number of windows.
      stopping: as in `job.run`.

    Returns:
      A dict per window, the earliest first: 'test' (its first and last day), 'sessions' by split,
      'rows' of the test and 'models' {name: {metric: value, 'interval': ...}}.

    Raises:
      InputError: as `job.run` and `catalogue.windowed`.
      Stopped: `stopping` returned True.
    """
    workdir, out = Path(workdir), []
    for number in range(count, 0, -1):
        part = copy.deepcopy(config)
        part.data.window = number
        results = job.run(part, workdir / f'window_{number}', stopping)
        tests = {name: model['test'] for name, model in results['models'].items()}
        tests.pop(results['models'].get('tpad', {}).get('is'), None)  # its other name
        tests |= {name: results[name] for name in ('oracle',) if name in results}
        out.append({'test': results['data']['test_days'], 'sessions': results['data']['sessions'],
                    'rows': next(iter(tests.values()))['rows'], 'models': {
                        name: {key: test.get(key) for key in (*METRICS, 'interval')}
                        for name, test in tests.items()}})
    if jax.process_index() == 0:
        files.write_json(workdir / 'windows.json', {'windows': out})
        Console(width=112).print(table(out))
        print(page.save(workdir / 'windows.html', 'windows.html', {
            'chart': chart(out), 'sections': [('results', 'Test hit@20')]}))
    return out


def table(windows: list[dict]) -> console.Table:
    """Format hit@20 of every model by window, in percent, and the mean over windows."""
    out = console.table('hit@20 by window, %', (
        'first test day', *(window['test'][0] for window in windows), 'mean'))
    out.add_row('test rows', *(f'{window["rows"]:,}' for window in windows))
    for name in windows[-1]['models']:
        values = [window['models'][name][METRICS[0]] for window in windows]
        out.add_row(name, *(f'{100 * x:.1f}' for x in (*values, sum(values) / len(values))))
    return out


def chart(windows: list[dict]) -> dict:
    """Draw hit@20 of the first models over the days of the tests."""
    starts = [datetime.fromisoformat(window['test'][0]).replace(tzinfo=UTC).timestamp() // DAY
              for window in windows]
    names = list(windows[-1]['models'])[:curves.MOST]
    colours = curves.colours(names)
    return curves.chart('test hit@20 by window', [curves.Curve(
        name, [start - starts[0] for start in starts],
        [window['models'][name][METRICS[0]] for window in windows], colours[name])
        for name in names], x=f'days from {windows[0]["test"][0]}', unit='%', wide=True)
