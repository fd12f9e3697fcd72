"""Numbers of results.json on a page, as elements that name their place in the file.

    <data value="0.655498" data-from="models > tpad > test > hit@20" data-scale="100">65.55</data>

tests/report/test_report.py compares every number of a page with results.json by these names.
"""

import json
import math
from typing import Any

from markupsafe import Markup

from tpad_jax.evaluation import tables

BETWEEN = ' > '
NONE = Markup('<span class="none" title="nothing to average over">\N{EN DASH}</span>')


class Values:
    """One run's results as elements of a page."""

    def __init__(self, results: dict, run: int | None = None):
        """Wrap a run's results; `run` is its number on a page of several."""
        self.results, self._before = results, () if run is None else (f'run {run}',)
        self._shares = tables.shares(results)

    def get(self, *path: Any) -> Any:
        """Look up a path of keys and places in the results; None where it is missing."""
        value = self.results
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value

    def test(self, model: str, *path: Any) -> tuple:
        """Return the path to a model's test metrics; 'oracle' is a model, too."""
        return ('oracle', *path) if model == 'oracle' else ('models', model, 'test', *path)

    def pct(self, *path: Any, digits: int = 2) -> Markup:
        """Show a share in percent, without the sign."""
        return self._data(self.get(*path), path, f'.{digits}f', 100)

    def num(self, *path: Any, form: str = '.2f') -> Markup:
        """Show a number in a format of Python's."""
        return self._data(self.get(*path), path, form)

    def count(self, *path: Any) -> Markup:
        """Show a whole number with a comma between thousands."""
        return self._data(self.get(*path), path, ',')

    def interval(self, *path: Any, digits: int = 1) -> Markup:
        """Show [low, high] in percent, or an empty text without an interval."""
        if not self.get(*path):
            return Markup('')
        low, high = (self.pct(*path, place, digits=digits) for place in (0, 1))
        return Markup('<span class="interval">{}\N{EN DASH}{}</span>').format(low, high)

    def share(self, model: str, of: str = 'all') -> Markup:
        """Show a model's share of the oracle's hits in percent; of: 'all', 'warm' or 'cold'."""
        share = 100.0 if model == 'oracle' else 100 * self._shares[model][of]
        if math.isnan(share):
            return NONE
        return Markup('<data value="{}" data-share="{}">{}</data>').format(
            share, BETWEEN.join((*self._before, model, of)), f'{share:.2f}')

    def _data(self, value, path, form, scale=1):
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return NONE
        return Markup('<data value="{}" data-from="{}" data-scale="{}">{}</data>').format(
            json.dumps(value), BETWEEN.join(map(str, (*self._before, *path))), scale,
            format(scale * value, form))
