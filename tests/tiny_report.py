"""A finished workdir in which nothing was trained, and what its page says, read back from it."""

import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
from PIL import Image

from tpad_jax import config
from tpad_jax.core import files
from tpad_jax.data import audit, sessions
from tpad_jax.diagnostics import clouds as clouds_lib
from tpad_jax.evaluation import compare, tables
from tpad_jax.features import store
from tpad_jax.job import results
from tpad_jax.job.background import Background
from tpad_jax.report import curves as curves_lib, gallery, stored
from tpad_jax.report.page import BETWEEN

V, COLD = 24, (23, 24)
EVIL = '</script><script>alert(1)</script><img src="http://127.0.0.1:9/x" onerror="alert(2)">&amp;'
STEPS = range(2, 21, 2)


def made_sessions(seed, count, most=V):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, 7, count)
    return sessions.Sessions(rng.integers(1, most + 1, lengths.sum()).astype(np.int32),
                             np.append(0, np.cumsum(lengths)), 9 * np.arange(count))


def picture(item):
    made = io.BytesIO()
    Image.new('RGB', (20, 20), (10 * item, 255 - 10 * item, 80)).save(made, 'PNG')
    return made.getvalue()


def fake_job(workdir, *, content=True, seed=0, name='tiny'):
    """What `results` and `gallery` read of a job: random sessions, titles that mean harm."""
    c = config.get_config()
    c.name, c.seed = name, seed
    train, valid, test = (made_sessions(n, count, most) for n, count, most in
                          ((1, 120, V - 2), (2, 20, V), (3, 40, V)))
    warm = sessions.warm_items(train, V)
    titles = ['', *(f'{EVIL} {i}' if i % 3 == 0 else f'Thing {i} “é”' for i in range(1, V + 1))]
    data = SimpleNamespace(
        num_items=V, choices={}, train=train, valid=valid, test=test, warm=warm, titles=titles,
        asins=['', *(f'A{i}' for i in range(1, V + 1))], fingerprint='f' * 64, form='2023',
        image_bytes=[b'', *map(picture, range(1, V + 1))], side_sizes=(4,),
        side=np.arange(V + 1)[:, None] % 4, lines={'read': 1300, 'kept': 1200, 'rejected': {}},
        audit=audit.audit(train, valid, test, warm, form='2023', ties=0.0))
    has_image = np.arange(V + 1) % 5 > 0
    rows = {n: sessions.rows(getattr(data, n), 6, every_prefix=True) for n in ('valid', 'test')}

    def truth(items):
        found = np.random.default_rng(5).random((V + 1, V + 1))[items[:, 0]]
        found[:, 0] = 0
        return found / found.sum(1, keepdims=True)

    return SimpleNamespace(
        config=c, data=data, final=data, workdir=workdir, planted=None, **rows,
        content=SimpleNamespace(has_image=has_image, pictures={
            'read': 20, 'kept': 20, 'rejected': {}}) if content else None,
        texts={'tokenizer': 'base', 'tokens_per_word': 1.6, 'share_that_fit': 1.0,
               'text_length': 32, 'different': V}, missing={},
        probabilities=truth if content else None, seconds={'recommend': 3.25, 'total': 7.5},
        spent={}, sitting={}, background=Background(0), pause=lambda: None,
        devices=SimpleNamespace(shards=1), catalogue={})


def scorer_of(salt):
    table = np.random.default_rng(salt).random((V + 1, V + 1)).astype(np.float32)
    return lambda items: table[items[:, 0]]


def write(workdir, *, content=True, seed=0, name='tiny', metrics=None, baselines=('pop', 'sr')):
    """A workdir as a run leaves it, all but the page. -> the fake job."""
    workdir.mkdir(parents=True)
    job = fake_job(workdir, content=content, seed=seed, name=name)
    job.config.metrics.update(metrics or {})
    names = (*(('tpad_joint', 'id_only', 'knowledge_only') if content else ('mixture', 'gnn')),
             *baselines)
    scorers = {n: scorer_of(i + 10 * seed) for i, n in enumerate(names)}
    models, ranks = results.score_models(job, scorers, {}, {})
    for n in baselines:
        models[n]['search'] = {'params': {'decay': 0.25} if n == 'sr' else {}, 'trials': 1}
    found = {'data': results.data_facts(job), 'audit': job.data.audit, 'models': models,
             'provenance': {**results.provenance(job), 'stages': ['recommend']},
             'seconds': job.seconds, 'losses': {}}
    if content:
        found['models'] = {'tpad': {**models['tpad_joint'], 'is': 'tpad_joint'}, **models}
        scorers['tpad'], ranks['tpad'] = scorers['tpad_joint'], ranks['tpad_joint']
        found['oracle'], ranks['oracle'] = results.oracle_scores(job)
        rng = np.random.default_rng(0)
        for n, shape in (('k', (2, 6)), ('r', (12,))):
            store.write(workdir / 'features' / 'joint', n, rng.normal(size=(V + 1, *shape)), {})
        found['diagnostics'] = write_diagnostics(workdir, rng)
    write_log(workdir / 'log.jsonl', content)
    gallery.write(job, scorers, ranks, 'tpad_joint')
    results.write(job, found, ranks)
    return job


def write_diagnostics(workdir, rng):
    clouds = {n: rng.normal(size=(30, 6 if n[0] == 'k' else 12)).astype(np.float32)
              for n in ('k_image', 'k_text', 'r', 't', 'c', 'p')}
    ids = {n: rng.integers(1, V + 1, 30) for n in ('items', 'at', 'next')}
    found = {'sessions': 20, 'pairs': {}, 'held_out': {'mi_align': 1.25}, 'warnings': [],
             'features': {n: clouds_lib.feature(x) for n, x in clouds.items()},
             'probes': {'r': {'brand': {'accuracy': 0.75, 'chance': 0.3}}}}
    (workdir / 'diagnostics').mkdir()
    for moment in ('before', 'after'):
        np.savez(workdir / 'diagnostics' / f'transfer-{moment}.npz', **clouds, **ids)
        files.write_json(workdir / 'diagnostics' / f'transfer-{moment}.json', found)
    del found['warnings']
    probe = {name: {'r2': r2, 'interval': [r2 - 0.05, r2 + 0.0625], 'rows': 90}
             for name, r2 in (('k', 0.375), ('r', 0.8125))}
    return {'transfer': {'before': found, 'after': found}, 'warnings': ['A feature is flat.'],
            'transition_probe': probe, 'cka_k_r': 0.9375}


def write_log(file, content):
    lines = [{'stage': stage, 'step': step, 'loss': 4 / step, 'valid/hit@20': step / 50}
             for stage in (('recommend', 'id_only') if content else ('recommend', 'partner'))
             for step in STEPS]
    if content:
        lines += [{'stage': 'transfer', 'step': step, 'loss': 1 / step, 'align': -2 / step,
                   'distil': None if step == 4 else 0.5, 'mi_align': 2 - 2 / step,
                   'room/align': 2 / step, 'log_q/club_fit': step / 30} for step in STEPS]
    file.write_text(''.join(json.dumps(line) + '\n' for line in lines))


class Element(dict):
    """Attributes, 'tag', own 'text' with that inside it, and 'in', the elements it stands in."""

    __eq__, __hash__ = object.__eq__, object.__hash__  # two alike are two


class Page(HTMLParser):
    """A page read back: its elements, and every text with the elements around it."""

    VOID = frozenset(('meta', 'img', 'br', 'hr', 'input', 'link'))

    def __init__(self, file):
        super().__init__()
        self.elements, self.texts, self._open = [], [], []
        self.feed(file.read_text())
        assert not self._open, f'not closed: {self._open}'

    def handle_starttag(self, tag, attrs):
        element = Element({k: v or '' for k, v in attrs}, tag=tag, text='')
        element['in'] = tuple(self._open)
        self.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open.pop()['tag'] == tag, tag

    def handle_data(self, data):
        for element in self._open:
            element['text'] += data
        if self._open and data.strip():
            self.texts.append((data, tuple(self._open)))

    def all(self, tag=None, kind=None):
        return [e for e in self.elements if tag in (None, e['tag'])
                and (kind is None or kind in e.get('class', '').split())]


def check(workdir, page=None):
    """Hold every number of a run's page to what the workdir holds. -> how many figures there were.

    A number in a text that says of no file where it stands is an error.
    """
    page, run = page or Page(workdir / 'report' / 'index.html'), stored.read(workdir)
    figures = [e for e in page.all('data') if 'data-from' in e]
    for e in figures:
        check_figure(e, run.results, e['data-from'].split(BETWEEN))
    for e in (e for e in page.all('data') if 'data-share' in e):
        model, of = e['data-share'].split(BETWEEN)
        share = 100 if model == 'oracle' else 100 * tables.shares(run.results)[model][of]
        check_rounding(e['text'], share)
    check_charts(page, run)
    check_gallery(page, run)
    warned = [*run.results['audit']['warnings'],
              *run.results.get('diagnostics', {}).get('warnings', ())]
    found = [e['text'] for e in page.all('li') if any(o.get('class') == 'audit' for o in e['in'])]
    assert [*found, *(f'Warning: {line}' for line in run.results['audit']['warnings']),
            *(f'Verdict: {e["text"]}' for e in page.all('p', 'verdict'))] == audit.describe(
                run.results['audit'])
    assert [e['text'].removeprefix('Warning. ') for e in page.all('p', 'warning')
            if not any(o.get('id') == 'gallery' for o in e['in'])] == warned
    loose = [text for text, above in page.texts if not any(
        o['tag'] in ('data', 'svg', 'script', 'style', 'code', 'title', 'h1')
        or o.get('id') == 'gallery' or 'data-derived' in o
        or o.get('class', '').split()[:1] in (['audit'], ['legend'], ['warning'], ['verdict'])
        for o in above)]
    numbers = [m for text in loose for m in re.findall(r'(?<![\w@.:-])\d[\d.,]*(?![\w:-])', text)]
    assert set(numbers) <= {'95'}, numbers  # of '95 %', the level of every interval
    return len(figures)


def check_figure(element, found, path):
    """Shares, and they alone, stand in percent."""
    for key in path:
        found = found[int(key) if isinstance(found, list) else key]
    assert json.loads(element['value']) == found, element
    share = any('@' in key for key in path) or path[-1] in ('accuracy', 'chance')
    check_rounding(element['text'], found * (100 if share else 1))


def check_rounding(text, value):
    digits = len(text.partition('.')[2])
    assert abs(float(text.replace(',', '')) - value) <= 0.5 * 10 ** -digits + 1e-9, (text, value)


def check_charts(page, run):
    for figure in page.all('figure', 'chart'):
        inside = [e for e in page.elements if figure in e['in']]
        curves = json.loads(next(e for e in inside if e.get('class') == 'points')['text'])
        scale = 100 if 'data-digits' in figure else 1
        shown = [e['text'] for e in inside if e['tag'] == 'b'][1:]
        assert len(shown) == len(curves) > 0
        for curve, text in zip(curves, shown, strict=True):
            known = [(x, y) for x, y in zip(curve['x'], curve['y'], strict=True) if y is not None]
            if ' ' in curve['source']:
                stage, name = curve['source'].split(' ')
                steps, values = run.log[stage][name]
                np.testing.assert_allclose(np.array(curve['y'], float) / scale, values,
                                           rtol=1e-12)
                assert [x - curve['x'][-1] for x in curve['x']] == [s - steps[-1] for s in steps]
                read = known[-1][1]
            else:
                test = run.results['models'].get(curve['source'], {}).get('test') or (
                    run.results['oracle'])
                for k in (k for k in (5, 10, 20) if k <= len(known)):
                    assert abs(curve['y'][k - 1] / 100 - test[f'hit@{k}']) < 1e-6
                read = dict(known)[min(compare.AT, len(known))]
            assert text == curves_lib.shown(read, 2 if scale == 100 else None)
            for moment, y in curve['held']:
                assert y == run.results['diagnostics'][stage][moment]['held_out'][name]


def check_gallery(page, run):
    rows, shown = run.ranks, run.gallery
    articles = page.all('article')
    assert len(articles) == (len(shown['sessions']) if shown else 0)
    for article, one in zip(articles, shown['sessions'] if shown else (), strict=True):
        assert article['data-row'] == str(one['row'])
        assert one['target'] == rows.target[one['row']]
        assert one['session'] == rows.session[one['row']]
        badges = [e['text'] for e in page.all('span', 'badge') if article in e['in']]
        for badge, (name, found) in zip(badges, one['models'].items(), strict=True):
            above, equal = (int(x[one['row']]) for x in rows.ranks[name])
            rank = f'{above + 1}' if equal == 1 else f'{above + 1} to {above + equal}'
            kind = 'hit' if above + equal <= compare.AT else 'miss' if above >= compare.AT else (
                'tied')
            assert badge == f'{kind}, rank {rank}'
            if equal == 1:
                assert (one['target'] in found['first']) == (above < len(found['first']))
