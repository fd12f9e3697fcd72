"""The documentation: no link leads nowhere, one version everywhere, the site builds strictly."""

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from benchmarks import ledger

ROOT = Path(__file__).parents[1]
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (
    *ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md'), ROOT / 'benchmarks' / 'RESULTS.md'))
FENCE = re.compile(r'^( *)```.*?^\1```', re.DOTALL | re.MULTILINE)


def links(text):
    """(path, anchor) of the links of a page that lead to no other host; code holds none."""
    text = re.sub(r'`[^`\n]*`', '', FENCE.sub('', text))
    for target in re.findall(r'\]\(([^)\s]+)\)', text):
        if '://' not in target:
            path, _, anchor = target.partition('#')
            yield path, anchor


def anchors(text):
    """What the headings of a page are called in addresses, on a code host and in the site."""
    heads = re.findall(r'^#+ (.*)$', FENCE.sub('', text), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', head.lower()).replace(' ', '-') for head in heads}


@pytest.mark.parametrize('page', PAGES)
def test_links_of_a_checkout(page):
    here = ROOT / page
    for path, anchor in links(here.read_text()):
        target = (here.parent / path).resolve() if path else here
        assert target.exists(), f'{page}: {path}'
        assert target.is_relative_to(ROOT), f'{page}: {path}'
        if anchor:
            assert anchor in anchors(target.read_text()), f'{page}: {path}#{anchor}'


def test_one_version_everywhere():
    setup = ConfigParser(interpolation=None)
    setup.read(ROOT / 'setup.cfg')
    version = setup['metadata']['version']
    assert f'\nversion: {version}\n' in (ROOT / 'CITATION.cff').read_text()
    assert re.search(r'^## (\S+)', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)[1] == version
    from tpad_jax.data.download.hosts import Limits
    assert Limits().user_agent == f'tpad_jax/{version}'


def test_the_speed_page_has_the_numbers_of_the_benchmarks():
    assert (ROOT / 'docs' / 'speed.md').read_text() == ledger.page(ROOT / 'benchmarks'), (
        'run `python -m benchmarks.ledger`')


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path):
    """Strict: a link or an anchor of the site that leads nowhere is an error."""
    ran = subprocess.run([sys.executable, '-m', 'mkdocs', 'build', '--strict', '--site-dir',
                          tmp_path / 'site'], cwd=ROOT, capture_output=True, text=True,
                         env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'})
    assert ran.returncode == 0, ran.stderr
    made = {path.relative_to(tmp_path / 'site').as_posix() for path in tmp_path.rglob('*.html')}
    assert {Path(page).relative_to('docs').with_suffix('.html').as_posix() for page in PAGES
            if page.startswith('docs')} <= made
    modules = {'.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')
               for path in ROOT.glob('tpad_jax/**/*.py') if path.name != '__main__.py'}
    assert {f'api/{module}.html' for module in modules} <= made
    config = (tmp_path / 'site' / 'api' / 'tpad_jax.config.html').read_text()
    assert 'id="tpad_jax.config.get_config"' in config
    page = (tmp_path / 'site' / 'large_catalogues.html').read_text()
    assert '../tpad_jax' not in page
