"""Pictures from a server here that behaves as badly as any: had once, counted, bounded."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from benchmarks import download as benchmark
from benchmarks.picture_server import FOR_NOW, KINDS, LIMIT, PictureServer, encoded, raw
from tpad_jax.data.download import fetching, hosts, pictures
from tpad_jax.data.download.__main__ import table
from tpad_jax.data.download.journal import Begun, Journal
from tpad_jax.data.sources import amazon, amazon_fields
from tpad_jax.errors import InputError, Stopped

QUICK = hosts.Limits(per_host=16, pause=0, timeout=0.5, tries=2, backoff=0.02, max_bytes=LIMIT)


def get(folder, limits=QUICK, **changes):
    report = pictures.download(folder, limits, **{'allow_private': True, **changes})
    assert benchmark.adds_up(report)
    assert report == benchmark.last_report(folder / 'images')
    return report


def serving(folder, *paths, **options):
    """A server and a folder whose items' pictures it has at these addresses."""
    server = PictureServer()
    raw(folder, [path if ':' in path else server.url + path for path in paths], **options)
    return server


def reasons(report):
    return {one['asin']: one['reason'] for one in report['failures']}


def test_every_kind_of_answer(tmp_path):
    """Once each, and a second run that asks for nothing but what may be there now."""
    kinds = list(KINDS)
    with serving(tmp_path, *[f'/{kind}/{n}.jpg' for n, kind in enumerate(kinds)]) as server:
        report = get(tmp_path)
        first = benchmark.asked_so_far(server)
        again = get(tmp_path)
        second = benchmark.asked_so_far(server) - first
    for n, kind in enumerate(kinds):
        assert reasons(report).get(f'B{n:04d}', '') == KINDS[kind], kind
        if not KINDS[kind]:
            assert benchmark.is_sent(tmp_path / 'images', f'B{n:04d}', kind), kind
            path = f'/plain/{n}.jpg' if kind.startswith('moved') else f'/{kind}/{n}.jpg'
            size = len(encoded(n, 'PNG' if kind == 'png' else 'JPEG'))
            if kind != 'changes':  # no byte twice
                assert sum(one.sent for one in server.requests[path]
                           if one.status in (200, 206)) == size, kind
    assert report['for_now'] == again['for_now'] == len(FOR_NOW)
    assert {path.split('/')[1] for path in second} == FOR_NOW
    assert again['there'] == report['fetched']
    assert again['bytes'] == {'received': 0, 'dropped': 0}
    kept = sum(path.stat().st_size for path in (tmp_path / 'images').glob('B*'))
    assert report['bytes']['received'] - report['bytes']['dropped'] == kept
    found = amazon.read(tmp_path)
    assert found.catalogue['image'].null_count() == report['failed']


@pytest.mark.parametrize(('kind', 'least', 'most'), [
    ('large', 0, 0), ('endless', LIMIT + 1, LIMIT + 2**16)])
def test_of_what_is_too_large_no_more_is_read(tmp_path, kind, least, most):
    """Nothing, where its head says so."""
    with serving(tmp_path, f'/{kind}/1.jpg'):
        sizes = get(tmp_path)['bytes']
    assert least <= sizes['received'] == sizes['dropped'] <= most
    assert not list((tmp_path / 'images').glob('B*'))


def test_what_is_asked_how_often(tmp_path):
    with serving(tmp_path, '/missing/1.jpg', '/fails/2.jpg', '/html/3.jpg', '/circle/4.jpg',
                 ) as server:
        get(tmp_path, QUICK._replace(tries=3))
        times = {path: len(requests) for path, requests in server.requests.items()}
        assert times == {'/missing/1.jpg': 1, '/fails/2.jpg': 3, '/html/3.jpg': 1,
                         '/circle/4.jpg': 1 + fetching.MAX_REDIRECTS}
        get(tmp_path, again=True)
        assert len(server.requests['/missing/1.jpg']) == 2


def test_the_next_address_where_one_has_nothing(tmp_path):
    with serving(tmp_path, '/missing/0.jpg') as server:
        lines = (tmp_path / 'meta_X.jsonl').read_text()
        (tmp_path / 'meta_X.jsonl').write_text(lines.replace(
            '"hi_res": null', f'"hi_res": "{server.url}/plain/0.jpg"'))
        assert get(tmp_path)['fetched'] == 1
    assert benchmark.is_sent(tmp_path / 'images', 'B0000', 'plain')


def test_a_picture_is_continued_where_it_broke_off_in_another_run(tmp_path):
    with serving(tmp_path, '/breaks/1.jpg', '/changes/2.jpg', '/without_tag/3.jpg') as server:
        get(tmp_path, QUICK._replace(tries=1))
        part, data = tmp_path / 'images' / 'B0000.partial', encoded(1)
        have = part.stat().st_size
        assert part.read_bytes() == data[:have]
        assert have == len(data) // 2
        with part.open('ab') as file:
            file.write(data[have:])  # killed between the last byte and the name
        get(tmp_path)
    assert len(server.requests['/breaks/1.jpg']) == 1
    assert server.requests['/changes/2.jpg'][1].start == len(encoded(2)) // 2
    assert (tmp_path / 'images' / 'B0001.jpg').read_bytes() == encoded(-3)  # and no mixture


@pytest.mark.parametrize('damage', ['longer', 'longer_than_told', 'shorter_journal',
                                    'other_address', 'link', 'pipe', 'folder'])
def test_a_part_that_is_not_what_the_journal_says_is_dropped(tmp_path, damage):
    with serving(tmp_path, '/breaks/1.jpg') as server:
        get(tmp_path, QUICK._replace(tries=1))
        part, journal = (tmp_path / 'images' / name for name in ('B0000.partial', 'download.jsonl'))
        if damage.startswith('longer'):
            part.write_bytes(bytes(LIMIT))
            if damage == 'longer_than_told':
                forget(journal, 'size')
        elif damage == 'shorter_journal':
            journal.write_bytes(journal.read_bytes()[:-9])
        elif damage == 'other_address':
            for file in tmp_path.glob('meta*'):
                file.write_text(file.read_text().replace('/breaks/1.', '/without_tag/3.'))
            forget(journal, 'validator', 'size')
        else:
            part.unlink()
            (tmp_path / 'secret').write_text('secret')
            {'link': lambda: part.symlink_to(tmp_path / 'secret'), 'folder': part.mkdir,
             'pipe': lambda: os.mkfifo(part)}[damage]()
        report = get(tmp_path)
    if damage == 'folder':
        assert reasons(report) == {'B0000': 'part_is_no_file'}
        return
    if damage == 'longer':
        assert server.requests['/breaks/1.jpg'][1].start is None
    assert (tmp_path / 'images' / 'B0000.jpg').read_bytes() == encoded(
        3 if damage == 'other_address' else 1)
    if damage == 'link':
        assert (tmp_path / 'secret').read_text() == 'secret'


def forget(journal, *names):
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    journal.write_text(''.join(json.dumps({key: value for key, value in line.items()
                                           if key not in names}) + '\n' for line in lines))


def test_a_whole_part_of_unknown_size_is_asked_for_no_byte(tmp_path):
    with serving(tmp_path, '/breaks/1.jpg') as server:
        get(tmp_path, QUICK._replace(tries=1))
        (tmp_path / 'images' / 'B0000.partial').write_bytes(encoded(1))
        forget(tmp_path / 'images' / 'download.jsonl', 'size')
        assert get(tmp_path)['fetched'] == 1
    assert [one.status for one in server.requests['/breaks/1.jpg']] == [200, 416]


def test_nothing_of_anothers_is_replaced(tmp_path):
    with serving(tmp_path, *['/plain/1.jpg'] * 5) as server:
        images = tmp_path / 'images'
        images.mkdir()
        (images / 'B0000.png').write_bytes(b'mine')
        (images / 'B0001.jpg').write_bytes(b'')  # what a power cut may leave
        (images / 'B0002.jpg').mkdir()
        (images / 'B0003.jpg').symlink_to('/etc/hostname')
        report = get(tmp_path)
    assert (report['there'], report['fetched']) == (1, 2)
    assert reasons(report) == {'B0002': 'image_not_a_file', 'B0003': 'image_link_outside'}
    assert len(server.requests['/plain/1.jpg']) == 2
    assert (images / 'B0000.png').read_bytes() == b'mine'


@pytest.mark.parametrize('url', [
    'ftp://127.0.0.1/a.jpg', 'file:///etc/passwd', 'javascript:alert(1)', 'http://', 'http://[::1',
    'http://a:b@127.0.0.1/a.jpg', '//127.0.0.1/a.jpg', 'http://127.0.0.1:99999/', ':\x00'])
def test_an_address_that_is_none(tmp_path, url):
    raw(tmp_path, [url])
    report = get(tmp_path)
    assert report['reasons'].keys() <= {'bad_url', 'not_http'}
    assert report['for_good'] == 1
    assert not report['answers']


def test_addresses_of_both_forms(tmp_path):
    long = 'http://a/' + 'x' * amazon_fields.URL_LENGTH
    raw(tmp_path / '18', ['http://a/0'], '2018')
    with (tmp_path / '18' / 'meta_X.json').open('a') as file:
        for asin, fields in {
                'A1': {'imageURL': ['small'], 'imageURLHighRes': ['large', 'large', 'next']},
                'A2': {'imageURL': 'small'}, 'A3': {'imageURL': [{'a': 1}, 7, None, '', ['x']]},
                'A4': {'imageURLHighRes': [long]}, 'A5': {}, '../A6': {'imageURL': ['x']}}.items():
            file.write(json.dumps({'asin': asin, **fields}) + '\n')
    found = amazon.read_urls(tmp_path / '18')
    assert found.urls == {'B0000': ('http://a/0',), 'A1': ('large', 'next', 'small'),
                          'A2': ('small',), 'A3': ('x',), 'A4': (), 'A5': ()}
    assert found.reviewed == {'B0000'}
    assert found.lines['unused'] == {'url_too_long': 1}
    assert found.lines['rejected'] == {'bad_asin': 1}
    assert found.lines['kept'] == 7
    raw(tmp_path / '23', ['http://a/0'])
    with (tmp_path / '23' / 'meta_X.jsonl').open('a') as file:
        for asin, images in {
                'A1': [{'variant': 'PT01', 'large': 'back'},
                       {'variant': 'MAIN', 'thumb': 't', 'large': None, 'hi_res': 'h'}],
                'A2': [7, None, {'large': ['x']}, []], 'A3': 'x', 'A4': {
                    'large': [None, 'x'], 'hi_res': ['y'], 'variant': ['PT01', 'MAIN']},
                'A5': [{'url': 'x'}], 'A6': {'link': ['x']}, 'A7': [{'large': {'src': 'x'}}],
                'A8': {'large': [None], 'thumb': ['None']}, 'A9': []}.items():
            file.write(json.dumps({'parent_asin': asin, 'images': images}) + '\n')
    found = amazon.read_urls(tmp_path / '23')
    assert found.urls == {'B0000': ('http://a/0',), 'A1': ('h', 't', 'back'), 'A2': ('x',),
                          'A4': ('x', 'y'), **{f'A{k}': () for k in (3, 5, 6, 7, 8, 9)}}
    assert found.lines['unused'] == {'images_of_unknown_form': 4}  # A3, A5, A6, A7


def test_pictures_of_an_unknown_form_are_refused(tmp_path):
    raw(tmp_path, ['http://a/0'])
    file = tmp_path / 'meta_X.jsonl'
    file.write_text(json.dumps({'parent_asin': 'B0000', 'images': ['http://a/0']}) + '\n')
    with pytest.raises(InputError, match=r'`images` of 1 items has an unknown form.*large or hi_r'):
        get(tmp_path)


def test_a_stop_while_the_metadata_are_read(tmp_path):
    raw(tmp_path, ['http://a/b'])
    with pytest.raises(Stopped, match=r'line 1 of .*meta_X\.jsonl'):
        get(tmp_path, stopping=lambda: True)


def test_items_that_no_review_names_are_left_out(tmp_path):
    with serving(tmp_path, '/plain/1.jpg', '/plain/2.jpg') as server:
        reviews = (tmp_path / 'X.jsonl').read_text().splitlines()
        (tmp_path / 'X.jsonl').write_text(reviews[0] + '\n')
        report = get(tmp_path)
        assert (report['unreviewed'], report['fetched'], len(server.requests)) == (1, 1, 1)
        report = get(tmp_path, unreviewed=True)
        assert (report['unreviewed'], report['there'], report['fetched']) == (0, 1, 1)


# --- the journal and the disk ---------------------------------------------------------------------


def test_the_journal_survives_what_may_happen_to_it(tmp_path):
    path = tmp_path / 'download.jsonl'
    journal = Journal(path)
    journal.record('A', 'u', validator='"tag"', size=7)
    journal.record('B', 'u', failed='status_404')
    with pytest.raises(InputError, match='another download runs'):
        Journal(path)
    journal.close()
    whole = path.read_bytes()
    for end in range(len(whole)):  # a kill inside any line
        path.write_bytes(whole[:end])
        journal = Journal(path)
        journal.record('C', 'u', file='C.jpg', size=1)
        journal.close()
        again = Journal(path)
        assert set(again.rejected) <= {'bad_json'}
        assert set(again.begun) <= {'A'}
        again.close()
    path.write_bytes(b'[]\n{"asin": 1}\nno\n{"asin": "A", "url": "u", "validator": "\\n", "size": '
                     b'"x"}\n{"asin": "B", "url": "u", "failed": "x"}\n'
                     b'{"asin": "B", "url": "u", "file": "B.jpg"}\n')
    journal = Journal(path)
    assert journal.begun == {'A': Begun('u', None, None)}
    assert not journal.failed
    assert journal.rejected == {'bad_json': 2, 'bad_line': 1}
    journal.close()


@pytest.mark.parametrize('name', ['download.jsonl', 'images', 'X.jsonl'])
def test_a_place_to_write_to_that_leads_out(tmp_path, name):
    folder = raw(tmp_path / 'raw', ['http://a/b'])
    outside, place = tmp_path / 'outside', folder / name
    if name == 'download.jsonl':
        (folder / 'images').mkdir()
        place = folder / 'images' / name
        outside.write_text('mine')
    elif name == 'images':
        outside.mkdir()
    else:
        place.rename(outside)
    place.symlink_to(outside)
    with pytest.raises(InputError, match=r'leads out|plain file'):
        get(folder)
    assert name != 'download.jsonl' or outside.read_text() == 'mine'


def test_a_full_disk_leaves_what_was_saved(tmp_path, monkeypatch):
    class Full:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def write(self, data):
            raise OSError(errno.ENOSPC, 'No space left on device')
    opened = fetching._open
    monkeypatch.setattr(fetching, '_open', lambda part: Full() if '1' in part.name else opened(
        part))
    with serving(tmp_path, '/plain/0.jpg', '/plain/1.jpg', '/plain/2.jpg') as server:
        with pytest.raises(OSError, match='No space'):
            get(tmp_path, QUICK._replace(jobs=1))
        report = benchmark.last_report(tmp_path / 'images')
        assert benchmark.adds_up(report)
        assert (report['fetched'], report['left']) == (1, 2)
        monkeypatch.setattr(fetching, '_open', opened)
        report = get(tmp_path)
    assert (report['there'], report['fetched']) == (1, 2)
    assert len(server.requests['/plain/0.jpg']) == 1


# --- the command ----------------------------------------------------------------------------------


def command(*args, **options):
    return subprocess.Popen([sys.executable, '-m', 'tpad_jax.data.download', *map(str, args)],
                            cwd=benchmark.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, **options)


def test_stopped_by_a_signal_it_goes_on_where_it_was(tmp_path):
    with serving(tmp_path, *[f'/drips/{n}.jpg' for n in range(6)]) as server:
        args = tmp_path, '--allow_private', '--per_host=2', '--pause=0'
        process, images = command(*args), tmp_path / 'images'
        while len(list(images.glob('*.jpg'))) < 1 or not any(
                part.stat().st_size for part in images.glob('*.partial') if part.exists()):
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
        assert process.returncode == 75, err
        report = benchmark.last_report(images)
        assert benchmark.adds_up(report)
        assert report['left'] > 0
        assert err == (f'tpad_jax.data.download: {report["left"]} pictures left; run the same '
                       'command again to resume\n')
        first = benchmark.asked_so_far(server)
        have = {int(part.stem[1:]): part.stat().st_size for part in images.glob('*.partial')}
        report = get(tmp_path)
    assert report['fetched'] + report['there'] == 6
    for number, size in have.items():
        again = server.requests[f'/drips/{number}.jpg'][first[f'/drips/{number}.jpg']:]
        assert [(one.start or 0, one.sent) for one in again] == [
            (size, len(encoded(number)) - size)]


def test_the_command_refuses_in_one_sentence(tmp_path):
    raw(tmp_path / 'a', ['http://127.0.0.1:1/a.jpg'])
    ran = [command(*args) for args in (
        ['--help'], ['--jobs=0', 'a'], [tmp_path / 'a'])]
    told = [(*process.communicate(), process.returncode) for process in ran]
    assert [status for *_, status in told] == [0, 2, 2]
    assert '--per_host' in told[0][0]
    for (_, err, _), words in zip(told[1:], [
            'jobs', 'no picture was fetched'], strict=True):
        err = err[err.index('tpad_jax'):]  # a line of progress may come before
        assert err.startswith('tpad_jax.data.download: ')
        assert err.count('\n') == 1
        assert words in err


def test_the_table_tells_every_reason(tmp_path):
    with serving(tmp_path, '/plain/0.jpg', '/missing/1.jpg', '/fails/2.jpg'):
        reports = get(tmp_path), get(tmp_path)
    for report, told in zip(reports, ('', ' (1 not asked again; --again does)'), strict=True):
        console = Console(width=120, record=True, file=open(os.devnull, 'w'))
        with console.file:
            console.print(table(report))
        lines = [' '.join(line.split()) for line in console.export_text().splitlines()]
        assert [line.split(' B0')[0] for line in lines if 'failed:' in line] == [
            f'1 failed: status_404{told}', '1 failed: status_500 (1 for now)']
        assert '3 items in all' in lines


@pytest.mark.slow
def test_many_pictures_and_a_kill(tmp_path):
    found = benchmark.run(tmp_path, 200)
    assert all(found['held'].values()), found
