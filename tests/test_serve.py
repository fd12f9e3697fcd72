"""`python -m tpad_jax.serve` as a process: a stop under load, refusals, its page in a browser."""

import json
import os
import shutil
import socket

import pytest
from playwright.sync_api import sync_playwright

from benchmarks import service as load
from tests import tiny_served
from tpad_jax import serve
from tpad_jax.core import startup

SHOTS = os.environ.get('SCREENSHOTS')  # directory to leave pictures of the page in
CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')


@pytest.fixture(scope='module')
def run(served_run):
    return served_run


@pytest.mark.slow
def test_a_stop_under_load_loses_no_accepted_request(run):
    bodies = [json.dumps({'sessions': [[f'I{n}', f'I{n + 1}']]}) for n in range(1, 20)]
    found = load.stopped(*load.started(run), bodies)
    assert found['exit status'] == found['lost'] == 0
    assert found['accepted'] == found['answered'] == found['received']['200'] > 20
    assert set(found['received']) <= {'200', 'refused'}


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='no chromium')
def test_the_page_in_a_browser(run, tmp_path):
    picture = tmp_path / 'picture.png'
    picture.write_bytes(tiny_served.picture(77))
    process, port = load.started(run)
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
            page, asked, errors = browser.new_page(), [], []
            page.on('request', lambda request: asked.append(request.url))
            page.on('pageerror', lambda error: errors.append(str(error)))
            page.on('console', lambda told: errors.append(told.text) if told.type == 'error' else 0)
            page.goto(f'http://127.0.0.1:{port}/')
            page.wait_for_selector('#next .item')
            popular = page.locator('#next .item').all_inner_texts()
            page.locator('#shelf .item').nth(2).click()
            page.wait_for_function("document.querySelectorAll('#session .item').length === 1")
            page.wait_for_function("/\\d/.test(document.querySelector('#next .score').textContent)")
            assert page.locator('#next .item').all_inner_texts() != popular
            ids = [f'I{n}' for n in range(1, tiny_served.V + 1)]
            price = {name: tiny_served.fields(n)['price'] for n, name in enumerate(ids, 1)}

            def listed(where='#next'):
                return page.locator(f'{where} .item').evaluate_all(
                    'all => all.map(x => x.dataset.id)')

            def changed(change):
                with page.expect_response('**/recommend'):
                    change()
                page.wait_for_timeout(100)

            changed(lambda: page.locator('#next .item').first.click())
            assert len(listed('#session')) == 2
            changed(lambda: page.check('input[name=unseen]'))
            assert not set(listed('#session')) & set(listed())
            changed(lambda: page.locator('input[name=price]').fill('50'))
            assert {price[name] for name in listed()} == {0.0, 1.0, 2.0, 3.0}
            changed(lambda: page.select_option('select[name=category]', 'things'))
            assert listed()
            changed(lambda: page.locator('input[name=price]').fill('100'))
            for width in 1200, 390:
                page.set_viewport_size({'width': width, 'height': 800})
                assert page.evaluate('document.documentElement.scrollWidth') <= width
                assert not page.locator('.item').evaluate_all(
                    'all => all.filter(x => x.scrollHeight > x.clientHeight + 1 ||'
                    ' x.scrollWidth > x.clientWidth + 1).length'), 'a title is clipped'
                if SHOTS:
                    page.screenshot(path=f'{SHOTS}/demo-{width}.png', full_page=True)
            page.fill('input[name=id]', 'brand new')
            page.fill('input[name=title]', 'a thing nobody saw')
            page.set_input_files('input[name=image]', picture)
            page.click('#new button')
            page.wait_for_function("document.querySelectorAll('#session .item').length === 3",
                                   timeout=120_000)
            last = page.locator('#session .item').nth(2)
            assert last.inner_text().strip() == 'a thing nobody saw'
            page.wait_for_function("[...document.querySelectorAll('#session img')].at(-1)"
                                   ".naturalWidth > 0")
            page.goto(f'http://127.0.0.1:{port}/docs')
            page.wait_for_selector('text=/recommend')
            browser.close()
    finally:
        process.terminate()
        status, _ = load.ended(process)
    assert status == 0
    assert not errors
    assert all(url.startswith((f'http://127.0.0.1:{port}/', 'data:')) for url in asked), asked


@pytest.mark.parametrize(('argv', 'said'), [
    (['nowhere'], 'does not hold a run'),
    (['--k', '0'], '--k: 0: out of range. Expected 1 or more'),
    (['--k', '31'], '--k=31: the longest list of this run has 30 items'),
    (['--port', '99999'], '--port: 99999: out of range. Expected from 0 to 65535')])
def test_refusals(run, monkeypatch, capsys, argv, said):
    monkeypatch.setattr(startup, 'begin', lambda: lambda: False)
    assert serve.main([str(run), *argv] if argv[0][0] == '-' else argv) == 2
    told = capsys.readouterr().err
    assert told.count('\n') == 1
    assert said in told


def test_a_port_that_is_taken(run, monkeypatch, capsys):
    monkeypatch.setattr(startup, 'begin', lambda: lambda: False)
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = taken.getsockname()[1]
        assert serve.main([str(run), '--port', str(port)]) == 2
    told = capsys.readouterr().err
    assert f'127.0.0.1:{port} is not available' in told
    assert told.count('\n') == 1
