"""The page in a real browser: whole, quiet, alone, readable on a phone, paged by keyboard."""

import shutil

import pytest

from tests import tiny_report
from tests.tiny_report import EVIL
from tpad_jax.report import gallery, page, stored

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))),
                None)
playwright = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
pytestmark = [pytest.mark.slow, pytest.mark.skipif(
    CHROMIUM is None, reason='no Chromium is on the path (Debian: apt install chromium)')]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp('runs')
    for kind, given in {'planted': {}, 'ids': {'content': False}}.items():
        tiny_report.write(root / kind, **given)
        page.write(root / kind)
    both = [stored.read(root / kind) for kind in ('planted', 'ids')]
    page.save(root / 'both' / page.FILE, 'compare.html', page.compared(both))
    return root


@pytest.fixture(scope='module')
def browser():
    with playwright.sync_playwright() as run:
        opened = run.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
        yield opened
        opened.close()


@pytest.fixture
def opened(browser, runs):
    """(kind, width, scheme) -> the page, and a list of all that it should not have said or done."""
    contexts = []

    def look(kind, width=1280, scheme='light'):
        context = browser.new_context(viewport={'width': width, 'height': 844},
                                      color_scheme=scheme)
        contexts.append(context)
        shown, told = context.new_page(), []
        shown.on('console', lambda message: told.append(message.text))
        shown.on('pageerror', lambda error: told.append(str(error)))
        shown.on('dialog', lambda dialog: (told.append(dialog.message), dialog.dismiss()))
        file = (runs / kind / page.FILE).as_uri()
        shown.on('request', lambda request: None if request.url == file
                 or request.url.startswith('data:') else told.append(request.url))
        shown.goto(file)
        return shown, told

    yield look
    for context in contexts:
        context.close()


@pytest.mark.parametrize(('kind', 'width', 'scheme'),
                         [(kind, *how) for kind in ('planted', 'ids', 'both')
                          for how in ((1280, 'light'), (390, 'dark'))])
def test_whole_quiet_and_as_wide_as_the_window(opened, kind, width, scheme):
    shown, told = opened(kind, width, scheme)
    for summary in shown.locator('summary').all():
        summary.click()
    assert shown.evaluate('document.documentElement.scrollWidth') == width
    clipped = shown.evaluate('''() => [...document.querySelectorAll('main *')].filter(e =>
        !e.closest('.scroll, svg, .name, .like, nav') && e.offsetParent &&
        e.getBoundingClientRect().right > innerWidth + 1).map(e => e.outerHTML.slice(0, 99))''')
    assert clipped == []
    ground = shown.evaluate('getComputedStyle(document.body).backgroundColor')
    assert (sum(map(int, ground[4:-1].split(','))) < 128) == (scheme == 'dark')
    assert told == []


def test_the_gallery_is_paged_by_keys_and_says_why(opened, runs):
    shown, told = opened('planted', 390)
    found = gallery.read(runs / 'planted')
    shown.locator('#gallery').scroll_into_view_if_needed()
    for step, place in (('ArrowRight', 1), ('ArrowRight', 2), ('ArrowLeft', 1)):
        shown.keyboard.press(step)
        assert shown.locator('#place').text_content() == f'{place + 1} / {gallery.SESSIONS}'
    shown.locator('#on').focus()
    shown.keyboard.press('Enter')
    one = found['sessions'][2]
    session = shown.locator('.session:visible')
    assert session.count() == 1
    assert session.get_attribute('data-row') == str(one['row'])
    assert shown.evaluate('''() => [...document.querySelectorAll('.session:not([hidden]) img')]
        .every(e => e.complete && e.naturalWidth > 0 && e.alt)''')
    item = one['models']['id_only']['first'][1]
    tile = session.locator('.five').nth(2).locator('[data-ask]').nth(1)
    tile.focus()
    shown.keyboard.press('Enter')
    assert tile.get_attribute('aria-pressed') == 'true'
    assert session.locator('[aria-pressed=true]').count() == 1
    why, own = session.locator('.why'), one['why'][str(item)]
    assert found['items'][str(item)]['title'] in why.locator('h4').text_content()
    likes = why.locator('.like').nth(1).locator('b').all_text_contents()
    assert likes == [f'{x:.2f}' for x in own['r']]
    assert f'{100 * own["true"]:.1f} %' in why.locator('p').first.text_content()
    near = why.locator('.near').nth(0).locator('.name').all_text_contents()
    assert near == [found['items'][str(i)]['title'] for i, _ in
                    found['items'][str(item)]['near']['k']]
    assert any(EVIL in text for text in shown.locator('.name').all_text_contents())
    assert told == []


def test_a_pointer_reads_a_chart_off(opened, runs):
    shown, told = opened('planted')
    figure = shown.locator('#hits figure')
    figure.scroll_into_view_if_needed()
    box = figure.locator('svg').bounding_box()
    before = figure.locator('.legend b').all_text_contents()
    shown.mouse.move(box['x'] + box['width'] * (40 / 640), box['y'] + 50)
    assert figure.locator('.legend b').first.text_content() == '1'
    ranks = stored.read(runs / 'planted').ranks
    first = 100 * page.curves.hit_curve(ranks, 'tpad', name='', colour=0).y[0]
    assert figure.locator('.legend b').nth(1).text_content() == f'{first:.2f}'
    shown.mouse.move(0, 0)
    assert figure.locator('.legend b').all_text_contents() == before
    assert told == []
