"""The page of a run: every figure that of results.json, titles that do no harm, nothing empty."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from tests import tiny_report
from tests.tiny_report import EVIL, Page, V
from tpad_jax.data import item_graphs
from tpad_jax.data.sessions import Sessions
from tpad_jax.errors import InputError
from tpad_jax.evaluation import compare
from tpad_jax.job import results
from tpad_jax.report import __main__ as command, curves, gallery, page, stored


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Workdirs by kind, each with its page: the planted catalogue, and sessions of ids alone."""
    root = tmp_path_factory.mktemp('runs')
    for kind, given in {'planted': {}, 'ids': {'content': False}, 'seed': {'seed': 1}}.items():
        tiny_report.write(root / kind, **given)
        page.write(root / kind)
    return root


@pytest.mark.parametrize(('kind', 'least'), [('planted', 120), ('ids', 60)])
def test_every_figure_is_that_of_the_run(runs, kind, least):
    assert tiny_report.check(runs / kind) > least


def test_a_wrong_figure_is_found(runs, tmp_path):
    """The check of the other tests can fail."""
    shutil.copytree(runs / 'planted', tmp_path / 'run')
    file = tmp_path / 'run' / 'report' / 'index.html'
    sound = file.read_text()
    for wrong in (re.sub(r'(data-scale="100">\d+\.)', r'\g<1>9', sound, count=1),
                  sound.replace('<p>of the hits', '<p>12.5 of the hits'),
                  sound.replace(', rank ', ', rank 9')):
        assert wrong != sound
        file.write_text(wrong)
        with pytest.raises(AssertionError):
            tiny_report.check(tmp_path / 'run')


def test_sections_are_left_out_not_empty(runs):
    known = {'planted': set(page.SECTIONS), 'ids': {'results', 'audit', 'hits', 'slices',
                                                    'training', 'made'}}
    for kind, sections in known.items():
        made = Page(runs / kind / 'report' / 'index.html')
        links = {e['href'] for e in made.all('a')}
        assert links == {f'#{name}' for name in sections}
        assert {e['id'] for e in made.all('section')} == sections
        for e in made.all('section'):
            inside = [x for x in made.elements if e in x['in']]
            assert any(x['tag'] in ('table', 'svg', 'p', 'dl') for x in inside)
        assert all(e['text'].strip() for e in made.all('h2') + made.all('h3') + made.all('caption'))
    assert 'oracle' not in (runs / 'ids' / 'report' / 'index.html').read_text()


def test_titles_are_text_and_nothing_is_fetched(runs):
    file = runs / 'planted' / 'report' / 'index.html'
    made = Page(file)
    assert EVIL not in file.read_text()
    assert any(EVIL in e['text'] for e in made.all('span', 'name'))
    assert any(EVIL in e['alt'] for e in made.all('img'))
    assert not [name for e in made.elements for name in e if name.startswith('on') or name in
                ('src', 'srcset', 'action', 'style')]
    assert all(e['href'].startswith('#') for e in made.all('a'))
    assert not made.all('link') + made.all('iframe') + made.all('object') + made.all('form')
    run = [e['text'] for e in made.all('script') if e.get('type') != 'application/json']
    styles = [e['text'] for e in made.all('style')]
    assert len(run) == len(styles) == 1
    policy = next(e['content'] for e in made.all('meta') if 'http-equiv' in e)
    for text, what in ((run[0], 'script'), (styles[0], 'style')):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{what}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'; img-src data:;" in policy
    asked = json.loads(next(e['text'] for e in made.all('script') if e.get('id') == 'gallery-data'))
    assert any(EVIL in item['title'] for item in asked['items'].values())


def test_every_picture_has_a_text_and_every_table_heads(runs):
    for kind in ('planted', 'ids'):
        made = Page(runs / kind / 'report' / 'index.html')
        assert all(e['alt'] for e in made.all('img'))
        for svg in made.all('svg'):
            assert svg.get('aria-hidden') or (svg['role'] == 'img' and len(svg['aria-label']) > 9)
        assert all('scope' in e for e in made.all('th'))
        assert all(e.get('aria-label') or e['text'].strip() for e in made.all('button'))
        ids = [e['id'] for e in made.elements if 'id' in e]
        assert len(ids) == len(set(ids))


def test_what_speaks_for_an_item_by_hand():
    train = Sessions(np.array([1, 2, 3, 1, 2, 2, 3]), np.array([0, 3, 5, 7]), np.arange(3))
    pairs = item_graphs.followers(train, 3, 1)
    clouds = {'k': np.array([[1., 0], [0.6, 0.8], [-1, 0]])}
    told = gallery._why(3, np.array([1, 2]), clouds, pairs, np.array([0, .1, .2, .7]))
    assert {**told, 'k': told['k'].tolist()} == {'followed': 2, 'k': [-1, -0.6], 'true': 0.7}
    assert gallery._why(1, np.array([3]), {}, pairs, None) == {'followed': 0}  # 3, 1: two sessions
    assert gallery._nearest(clouds['k'], np.array([1])) == {1: [[2, 0.6], [3, -1.0]]}


def test_the_gallery_holds_what_it_shows(runs):
    found = gallery.read(runs / 'planted')
    assert found['models'] == ['tpad', 'knowledge_only', 'id_only']
    assert len({one['session'] for one in found['sessions']}) == gallery.SESSIONS
    for one in found['sessions']:
        told = {*one['prefix'], one['target']}
        told |= {item for model in one['models'].values() for item in model['first']}
        assert {str(i) for i in told} <= found['items'].keys()
        for why in one['why'].values():
            assert len(why['k']) == len(why['r']) == len(one['prefix'])
    near = [side for item in found['items'].values() for side in item.get('near', {}).values()]
    assert all(str(item) in found['items'] for side in near for item, _ in side)
    assert {i for i, item in found['items'].items() if 'picture' not in item} <= {
        str(i) for i in range(0, V + 1, 5)}  # those without an image


def test_pictures_beyond_the_room_are_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.setattr(gallery, 'ROOM', 2500)
    tiny_report.write(tmp_path / 'run')
    page.write(tmp_path / 'run')
    items = gallery.read(tmp_path / 'run')['items'].values()
    out = sum('picture' in item and item['picture'] is None for item in items)
    assert 0 < out < sum('picture' in item for item in items)
    assert f'{out} pictures were left out' in (tmp_path / 'run/report/index.html').read_text()


def test_a_failed_page_loses_no_results(tmp_path, monkeypatch, capsys):
    job = tiny_report.fake_job(tmp_path)
    tiny_report.write_log(tmp_path / 'log.jsonl', content=True)
    monkeypatch.setattr(results, 'oracle_scores', lambda _: (None, None))
    monkeypatch.setattr(results.artifact, 'write', lambda *_: None)
    scorers = dict.fromkeys(('tpad', 'tpad_recommend'), tiny_report.scorer_of(0))
    job.spent = {'recommend': {n: 0.0 for n in ('all', *results.SPENT)}}
    monkeypatch.setattr(results.page, 'write', lambda workdir: json.loads(
        (workdir / 'results.json').read_text())['no such key'])
    tuning = job.background.submit(dict)
    facts = {'tpad': {'is': 'tpad_recommend'}}
    given = job, ['recommend'], scorers, {}, facts, tuning, 0.0, Console(width=200)
    assert results.report(*given)['models'].keys() == {'tpad', 'tpad_recommend'}
    told = capsys.readouterr().out
    assert "could not be made (KeyError: 'no such key')" in told
    assert 'report:' not in told
    assert json.loads((tmp_path / 'results.json').read_text())['models']


def test_a_run_without_models_has_no_page_and_prints_why(tmp_path, monkeypatch, capsys):
    job = tiny_report.fake_job(tmp_path)
    tiny_report.write_log(tmp_path / 'log.jsonl', content=True)
    monkeypatch.setattr(results, 'oracle_scores', lambda _: (None, None))
    job.spent = {'transfer': {n: 0.0 for n in ('all', *results.SPENT)}}
    tuning = job.background.submit(dict)
    results.report(job, ['transfer'], {}, {}, {}, tuning, 0.0, Console(width=200))
    printed = capsys.readouterr().out
    assert 'report: none, because neither a recommender nor a baseline was trained' in printed
    assert 'could not be made' not in printed
    assert json.loads((tmp_path / 'results.json').read_text())['models'] == {}


# --- the command --------------------------------------------------------------------------------


def test_a_page_is_made_anew_byte_by_byte(runs, tmp_path, capsys):
    shutil.copytree(runs / 'planted', tmp_path / 'run')
    file = tmp_path / 'run' / 'report' / 'index.html'
    before = file.read_bytes()
    file.unlink()
    assert command.main([str(tmp_path / 'run')]) == 0
    assert capsys.readouterr() == (f'{file}\n', '')
    assert file.read_bytes() == before
    assert command.main([str(tmp_path / 'run'), f'--out={tmp_path / "a" / "b.html"}']) == 0
    assert (tmp_path / 'a' / 'b.html').read_bytes() == before


def test_what_is_absent_is_said_and_left_out(runs, tmp_path, capsys):
    shutil.copytree(runs / 'planted', tmp_path / 'run')
    for file in ('report/gallery.json', 'log.jsonl', 'ranks.npz'):
        (tmp_path / 'run' / file).unlink()
    shutil.rmtree(tmp_path / 'run' / 'diagnostics')
    assert command.main([str(tmp_path / 'run')]) == 0
    assert [line.split(' is missing: ')[1].split('. Fix')[0] for line in
            capsys.readouterr().err.splitlines()] == [
        'no learning curves', 'no curves over K and no differences', 'no gallery']
    made = Page(tmp_path / 'run' / 'report' / 'index.html')
    assert {e['id'] for e in made.all('section')} == {'results', 'audit', 'slices', 'features',
                                                      'made'}


@pytest.mark.parametrize(('file', 'content', 'told'), [
    ('results.json', '{"models": {}', 'results.json is damaged'),
    ('results.json', '{"models": {"tpad": {}}}', 'results.json is damaged'),
    ('report/gallery.json', '[1]', 'gallery.json is damaged'),
    ('ranks.npz', 'PK', 'ranks.npz cannot be read'),
    ('diagnostics/transfer-after.npz', 'PK', 'holds a damaged file'),
    ('log.jsonl', '{"stage": "x"}', 'line 1 is not a line of a log')])
def test_a_damaged_file_is_refused_in_one_sentence(runs, tmp_path, capsys, file, content, told):
    shutil.copytree(runs / 'planted', tmp_path / 'run')
    (tmp_path / 'run' / file).write_text(content)
    before = (tmp_path / 'run' / 'report' / 'index.html').read_bytes()
    assert command.main([str(tmp_path / 'run')]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert (tmp_path / 'run' / 'report' / 'index.html').read_bytes() == before


def test_other_refusals_and_help(runs, tmp_path, capsys):
    (tmp_path / 'file').touch()
    for given, told in (([tmp_path], 'results.json does not exist'),
                        ([runs / 'ids', runs / 'ids'], 'named twice'),
                        ([runs / 'ids', f'--out={tmp_path}/file/x.html'], 'choose another')):
        assert command.main(list(map(str, given))) == 2
        assert told in capsys.readouterr().err
    for given, status in (['--help'], 0), ([], 2):
        done = subprocess.run([sys.executable, '-m', 'tpad_jax.report', *given], check=False,
                              capture_output=True, text=True)
        assert done.returncode == status
        assert 'RUN' in done.stdout + done.stderr


def test_a_page_is_made_without_jax():
    """Its import takes longer than the page."""
    code = ('import sys; from tpad_jax.report import page; '
            'assert not {"jax", "flax", "matplotlib"} & sys.modules.keys()')
    subprocess.run([sys.executable, '-c', code], check=True)


# --- several runs -------------------------------------------------------------------------------


def test_runs_beside_each_other(runs, tmp_path):
    both = [stored.read(runs / name) for name in ('planted', 'seed')]
    file = page.save(tmp_path / 'c.html', 'compare.html', page.compared(both))
    made = Page(file)
    figures = [e for e in made.all('data') if 'data-from' in e]
    assert len(figures) > 100
    for e in figures:
        place, *keys = e['data-from'].split(' > ')
        tiny_report.check_figure(e, both[int(place.removeprefix('run '))].results, keys)
    ranks = [run.ranks for run in both]
    expected = compare.compare(ranks[1:], ranks[:1], ('tpad', 'tpad'))['slices']['all']['hit@20']
    shown = f'{100 * expected["difference"]:+.2f}'.replace('-', '\N{MINUS SIGN}')
    table = next(e for e in made.all('div') if 'seed minus planted' in e.get('aria-label', ''))
    row = next(e for e in made.all('tr', 'main') if table in e['in'])
    assert next(e['text'] for e in made.all('td') if row in e['in']) == shown
    assert [key for key, _ in page.configs(both)] == ['seed']
    for figure in made.all('figure', 'chart'):
        script = next(e for e in made.elements if figure in e['in'] and e.get('class') == 'points')
        for curve in json.loads(script['text']):
            _, place, *rest = curve['source'].split(' ')
            if len(rest) == 2:
                steps, values = both[int(place)].log[rest[0]][rest[1]]
                scale = 100 if 'data-digits' in figure else 1
                np.testing.assert_allclose(np.array(curve['y']) / scale, values, atol=1e-12)
                assert curve['x'] == steps


def test_runs_of_other_data_are_not_subtracted(runs, tmp_path):
    both = [stored.read(runs / name) for name in ('planted', 'ids')]
    text = page.save(tmp_path / 'c.html', 'compare.html', page.compared(both)).read_text()
    assert 'no model in common' not in text  # pop and sr are
    assert [model for model, _ in page.differences(both, ['a', 'b'], ['tpad'], ['pop', 'sr'])[
        0]['rows']] == ['pop', 'sr']
    other = both[1]._replace(ranks=both[1].ranks._replace(fingerprint='e' * 64))
    [found] = page.differences([both[0], other], ['a', 'b'], [], ['pop'])
    assert not found['rows']
    assert 'cannot be compared row by row' in found['why']
    with pytest.raises(InputError, match='too many'):
        page.compared(both * 5)


# --- how it looks -------------------------------------------------------------------------------


def test_contrast_by_day_and_by_night():
    style = (command.Path(page.__file__).parent / 'templates' / 'style.css').read_text()
    parts = re.findall(r':root \{(.*?)\}', style, re.S)
    assert len(parts) == 2

    def light(colour):
        rgb = np.array([int(colour[i:i + 2], 16) for i in (1, 3, 5)]) / 255
        rgb = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return rgb @ [0.2126, 0.7152, 0.0722]

    def contrast(a, b):  # WCAG 2.2, section 1.4.3
        low, high = sorted((light(a), light(b)))
        return (high + 0.05) / (low + 0.05)

    for part in parts:
        of = dict(re.findall(r'--([\w-]+): (#\w{6})', part))
        for ink in ('ink', 'soft', 'accent'):
            for ground in ('bg', 'paper', 'faint'):
                assert contrast(of[ink], of[ground]) >= 4.5, (ink, ground)
        assert contrast(of['true'], of['true-bg']) >= 4.5
        assert contrast(of['warn'], of['warn-bg']) >= 4.5
        assert contrast(of['ink'], of['warn-bg']) >= 4.5
        assert min(contrast(of[f's{i}'], of['paper']) for i in range(8)) >= 4.5


def test_a_chart_of_gaps_and_of_one_point():
    made = curves.chart('x', [curves.Curve('a', [1, 2, 3], [1.0, float('nan'), 3.0], 0),
                              curves.Curve('b', [2], [float('inf')], 1)])
    assert made['curves'][0]['path'].count('M') == 2
    assert [curve['read'] for curve in made['curves']] == [(3, 3.0), None]
    alone = curves.chart('x', [curves.Curve('a', [5], [2.0], 0)])
    assert len(alone['curves'][0]['dots']) == 1
