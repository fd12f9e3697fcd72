"""Figures of results.json as they stand on a page: an element that says which figure it is.

    <data value="0.655498" data-from="models > tpad > test > hit@20" data-scale="100">65.55</data>

So a page can be held to results.json figure by figure, which tests/report/test_report.py does.
"""

import json
import math
from typing import Any

from markupsafe import Markup

from tpad_jax.evaluation import tables

BETWEEN = ' > '
NONE = Markup('<span class="none" title="nothing to average over">\N{EN DASH}</span>')


class Values:
    """One run's results; `run` is its place on a page of several."""

    def __init__(self, results: dict, run: int | None = None):
        self.results, self._before = results, () if run is None else (f'run {run}',)
        self._shares = tables.shares(results)

    def get(self, *path: Any) -> Any:
        """What stands at a path of keys and places, or None where there is nothing."""
        found = self.results
        for key in path:
            if isinstance(found, list):
                found = found[key] if isinstance(key, int) and key < len(found) else None
            else:
                found = found.get(key) if isinstance(found, dict) else None
        return found

    def test(self, model: str, *path: Any) -> tuple:
        """The path to a model's test metrics, the oracle's among them."""
        return ('oracle', *path) if model == 'oracle' else ('models', model, 'test', *path)

    def pct(self, *path: Any, digits: int = 2) -> Markup:
        """A share in percent, without the sign."""
        return self._data(self.get(*path), path, f'.{digits}f', 100)

    def num(self, *path: Any, form: str = '.2f') -> Markup:
        """A number in a form of Python's."""
        return self._data(self.get(*path), path, form)

    def count(self, *path: Any) -> Markup:
        """A whole number, thousands apart."""
        return self._data(self.get(*path), path, ',')

    def interval(self, *path: Any, digits: int = 1) -> Markup:
        """[low, high] in percent; nothing where there is no interval."""
        if not self.get(*path):
            return Markup('')
        low, high = (self.pct(*path, place, digits=digits) for place in (0, 1))
        return Markup('<span class="interval">{}\N{EN DASH}{}</span>').format(low, high)

    def share(self, model: str, of: str = 'all') -> Markup:
        """A model's share of what the oracle can hit, in percent; of: 'all', 'warm' or 'cold'."""
        found = (100.0 if self.get('oracle') else None) if model == 'oracle' else (
            100 * self._shares[model][of])
        if found is None or math.isnan(found):
            return NONE
        return Markup('<data value="{}" data-share="{}">{}</data>').format(
            found, BETWEEN.join((*self._before, model, of)), f'{found:.2f}')

    def _data(self, value, path, form, scale=1):
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return NONE
        return Markup('<data value="{}" data-from="{}" data-scale="{}">{}</data>').format(
            json.dumps(value), BETWEEN.join(map(str, (*self._before, *path))), scale,
            format(scale * value, form))
