"""Reads the workdir of a finished run for its page."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from tpad_jax import config
from tpad_jax.core import log as log_lib
from tpad_jax.diagnostics import records
from tpad_jax.errors import refuse_if, refusing
from tpad_jax.evaluation import compare
from tpad_jax.report import gallery


class Run(NamedTuple):
    """One workdir.

    Attributes:
      path: the workdir.
      results: of results.json.
      log: {stage: {name: (steps, values)}}, empty without a log.
      ranks: of ranks.npz, or None.
      gallery: of `gallery.read`, or None.
      clouds: of `records.clouds`.
      absent: sentences on the parts that the page lacks.
    """

    path: Path
    results: dict[str, Any]
    log: dict[str, dict[str, tuple[list[int], list[float]]]]
    ranks: compare.Run | None
    gallery: dict[str, Any] | None
    clouds: dict[str, dict]
    absent: tuple[str, ...]

    @property
    def name(self) -> str:
        """The config's name."""
        return self.results['provenance']['config'].get('name', self.path.name)


def read(path: str | Path) -> Run:
    """Read a workdir.

    Raises:
      InputError: results.json is missing, or a file is damaged.
    """
    path = Path(path)
    file, log, ranks = path / 'results.json', path / 'log.jsonl', path / compare.FILE
    refuse_if(not file.is_file(), f'{file} does not exist. Expected the workdir of a finished run')
    with refusing((*compare.UNREADABLE, AttributeError), f'{file} is damaged',
                  'Fix: delete it and run the command of the run again'):
        results = json.loads(file.read_text())
        for model in results['models'].values():
            model['test']['slices'].items()
        results['data'].items(), results['provenance']['config'].items()
    refuse_if(not results['models'],
              f'{file} holds no models. Fix: run a stage that trains a recommender')
    with refusing(compare.UNREADABLE, f'{path / "diagnostics"} holds a damaged file',
                  'Fix: move the folder away to get the page without features'):
        clouds = records.clouds(path)
    shown = gallery.read(path)
    absent = {
        f'{log} is missing: no learning curves': not log.is_file(),
        f'{ranks} is missing: no curves over K and no differences': not ranks.is_file(),
        f'{path / gallery.FILE} is missing: no gallery. Fix: delete {file} and run the command of '
        'the run again':
            shown is None and 'images' in results['data'] and 'tpad' in results['models']}
    return Run(path, results, log_lib.curves_of(log) if log.is_file() else {},
               compare.read(path) if ranks.is_file() else None, shown, clouds,
               tuple(sentence for sentence, applies in absent.items() if applies))


def flat_config(run: Run) -> dict[str, Any]:
    """Flatten a run's config: {'a.b.c': value}."""
    return dict(config.flat(run.results['provenance']['config']))
