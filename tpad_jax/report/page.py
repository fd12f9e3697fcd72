"""The page of one run: its sections, and the file."""

import base64
import functools
import hashlib
from pathlib import Path

import jinja2
from markupsafe import Markup

from tpad_jax.core import files
from tpad_jax.data import audit
from tpad_jax.report import charts, curves, sections, stored
from tpad_jax.report.stored import Run
from tpad_jax.report.values import Values

FILE = Path('report') / 'index.html'
SECTIONS = {'results': 'Results', 'audit': 'Audit', 'gallery': 'Sessions', 'hits': 'hit@K',
            'slices': 'Slices', 'training': 'Training', 'information': 'Information',
            'features': 'Features', 'made': 'How it was made'}


def write(workdir: str | Path) -> Path:
    """Write a finished run's page to workdir/report/index.html from the files of the workdir.

    Raises:
      InputError: there are no results, or a file of the workdir is damaged.
    """
    run = stored.read(workdir)
    return save(run.path / FILE, 'run.html', **context(run))


def save(file: Path, template: str, **values) -> Path:
    """Fill a template and write the page completely or not at all."""
    jinja = environment()
    style, script = (jinja.loader.get_source(jinja, name)[0] for name in ('style.css', 'page.js'))
    text = jinja.get_template(template).render(
        **values, style=Markup(style), style_hash=_digest(style),
        script=Markup(script), script_hash=_digest(script))
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as partial:
        partial.write_text(text, encoding='utf-8')
    return file


@functools.cache
def environment() -> jinja2.Environment:
    """Prepare the templates. Every text is escaped: titles come from an untrusted catalogue."""
    jinja = jinja2.Environment(loader=jinja2.PackageLoader('tpad_jax.report'), autoescape=True,
                               undefined=jinja2.StrictUndefined, trim_blocks=True,
                               lstrip_blocks=True)
    jinja.filters |= {'shown': charts.shown, 'points': charts.points}
    return jinja


def context(run: Run) -> dict:
    """Collect the values that fill `run.html`."""
    v = Values(run.results)
    models = run.results['models']
    searched = [name for name, model in models.items() if 'search' in model]
    trained = [name for name in models if name not in searched]
    main = sections.first(models, trained)
    oracle = [run.results['oracle']] if run.results.get('oracle') else []
    others = [name for name in ('knowledge_only', 'id_only') if name in models and name != main]
    best = [sections.best(models, searched)] if searched else []
    best = [name for name in best if name != main]
    known = [main, *others, *(n for n in trained if n not in (main, *others)), *best]
    colour = curves.colours(known)
    drawn = {n: colour[n] for n in [main, *others, *best]} | ({'oracle': 0} if oracle else {})
    diagnostics = {stage: moments for stage, moments in
                   run.results.get('diagnostics', {}).items() if stage != 'warnings'}
    probed = [(stage, side, probes) for stage, moments in diagnostics.items()
              for side, probes in moments.get('after', {}).get('probes', {}).items() if probes]
    parts = [models[name]['test'] for name in drawn if name in models] + oracle
    training, clouds = curves.training(run), curves.clouds(run)
    features = [(stage, moments) for stage, moments in diagnostics.items()
                if moments.get('after', {}).get('features')]
    out = {
        'v': v, 'name': run.name, 'main': main, 'best': best, 'colour': colour,
        'most': sections.most([model['test'] for model in models.values()] + oracle),
        'differences': [sections.difference(run.ranks, main, other) for other in [*others, *best]
                        if run.ranks is not None],
        **sections.table(v, trained, searched, colour),
        'audit': _findings(run.results.get('audit')),
        'hits': curves.hits(run, [n for n in known if n not in ('tpad_recommend', 'tpad_joint')]),
        'sliced': drawn, 'slices': sections.slices(models[main]['test']['slices']),
        'slices_most': sections.most([part for of in parts for part in of['slices'].values()]),
        'training': training, 'information': curves.information(run), 'clouds': clouds,
        'features': features, 'probed': [(stage, side) for stage, side, _ in probed],
        'attributes': list(dict.fromkeys(name for *_, probes in probed for name in probes)),
        'searched': searched, 'config': sorted(stored.flat_config(run).items()),
        **sections.gallery(run.gallery)}
    return {**out, 'sections': sections.filled(SECTIONS, {
        **out, 'training': any(training.values()), 'features': features or clouds})}


def _findings(found):
    """The audit's sentences except warnings and verdict, which the page shows first."""
    return [line for line in audit.describe(found)
            if not line.startswith(('Warning: ', 'Verdict: '))] if found else []


def _digest(text):
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
