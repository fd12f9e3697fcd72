"""What lies in a finished run's workdir, read for its page."""

import json
import zipfile
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tpad_jax.core import log as log_lib
from tpad_jax.diagnostics import snapshots
from tpad_jax.errors import InputError
from tpad_jax.evaluation import compare, metrics
from tpad_jax.report import gallery

RESULTS = 'results.json'
# what np.load raises of a file that is cut short or damaged
_UNREADABLE = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error)


class Run(NamedTuple):
    """One workdir.

    results: of results.json. log: {stage: {name: (steps, values)}}, empty without a log.
    ranks: compare.Run, gallery: of `gallery.read`, clouds: of `snapshots.clouds`; None each where
    the run has none. absent: sentences on what the page has to do without.
    """

    path: Path
    results: dict[str, Any]
    log: dict[str, dict[str, tuple[list[int], list[float]]]]
    ranks: compare.Run | None
    gallery: dict[str, Any] | None
    clouds: tuple | None
    absent: tuple[str, ...]

    @property
    def name(self) -> str:
        """The config's name."""
        return self.results['provenance']['config'].get('name', self.path.name)


def read(path) -> Run:
    """Reads a workdir.

    Raises:
      InputError: it holds no results.json, or a file of it is damaged.
    """
    path = Path(path)
    results, absent = _results(path / RESULTS), []
    log = path / 'log.jsonl'
    if not log.is_file():
        absent.append(f'{log} is not there: no learning curves')
    ranks = path / compare.FILE
    if not ranks.is_file():
        absent.append(f'{ranks} is not there: no curves over K and no differences')
    shown = gallery.read(path)
    if shown is None and 'images' in results['data'] and 'tpad' in results['models']:
        absent.append(f'{path / gallery.FILE} is not there: no gallery; delete '
                      f'{path / RESULTS}, and the command of the run makes both again')
    return Run(path, results, log_lib.curves_of(log) if log.is_file() else {},
               compare.read(path) if ranks.is_file() else None, shown, _clouds(path),
               tuple(absent))


def _results(file):
    if not file.is_file():
        raise InputError(f'{file} does not exist; give the workdir of a finished run')
    try:
        found = json.loads(file.read_text())
        for model in found['models'].values():
            model['test']['slices'].items()
        found['data'].items(), found['provenance']['config'].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f'{file} is damaged ({type(error).__name__}: {error}); delete it, and the '
                         'command of the run makes it again from the checkpoints') from error
    if not found['models']:
        raise InputError(f'{file} holds no models, so there is nothing to show; run a stage')
    return found


def _clouds(path):
    try:
        return snapshots.clouds(path)
    except _UNREADABLE as error:
        raise InputError(f'{path / "diagnostics"} holds a damaged file ({error}); move the folder '
                         'away, and the page is made without features') from error


def hit_curve(ranks: compare.Run, model: str, ks: np.ndarray) -> np.ndarray:
    """Share of rows whose target is among the first K, float64 [len(ks)], ties as in `metrics`."""
    above, equal = ranks.ranks[model]
    return metrics.hit(above[:, None], equal[:, None], ks).mean(0)
