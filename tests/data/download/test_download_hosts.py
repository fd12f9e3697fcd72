"""Which hosts are asked for pictures, at what addresses, how many at once and how often."""

import asyncio
import errno
import shutil
import socket
import ssl
import subprocess
import time
from pathlib import Path

import httpcore2
import pytest

from benchmarks.picture_server import PictureServer, raw
from tests.data.download.test_download import QUICK, get, reasons, serving
from tpad_jax.data.download import fetching, hosts, pictures
from tpad_jax.data.download.journal import Journal

# --- which addresses are asked --------------------------------------------------------------------


@pytest.mark.parametrize('address', [
    '127.0.0.1', '10.1.2.3', '172.16.0.1', '192.168.1.1', '100.64.0.1', '169.254.169.254',
    '0.0.0.0', '224.0.0.1', '240.0.0.1', '255.255.255.255', '192.0.2.1', '198.18.0.1', '::', '::1',
    'fe80::1', 'fe80::1%eth0', 'fc00::1', 'fec0::1', 'ff02::1', '::ffff:10.0.0.1', '::7f00:1',
    '64:ff9b::7f00:1', '2002:7f00:1::', '2001:0:1:2:3:4:80ff:fffe'])
def test_addresses_that_are_not_public(address):
    assert not hosts.is_public(address)


@pytest.mark.parametrize('address', ['93.184.216.34', '2606:2800:220:1::1', '64:ff9b::5db8:d822'])
def test_addresses_that_are_public(address):
    assert hosts.is_public(address)


class Elsewhere(httpcore2.AsyncNetworkBackend):
    """A public address leads to the server here; any other is connected to as it is."""

    def __init__(self, port):
        self.port, self.asked = port, []

    async def connect_tcp(self, host, port, *rest):
        self.asked.append(host)
        if host == '93.184.216.34':
            host, port = '127.0.0.1', self.port
        return await httpcore2.AnyIOBackend().connect_tcp(host, port, *rest)


@pytest.fixture
def names(monkeypatch):
    """{name: one list of addresses per time it is asked for, the last one for good}."""
    table, system = {}, hosts.resolve

    async def resolve(host, port):
        if host not in table:
            return await system(host, port)
        return table[host].pop(0) if len(table[host]) > 1 else table[host][0]
    monkeypatch.setattr(hosts, 'resolve', resolve)
    return table


def fetch(folder, network, url):
    """The path of a picture, or the reason why there is none; limits as in QUICK."""
    async def one():
        fetcher = fetching.Fetcher(folder, journal, QUICK, network)
        try:
            return await fetcher.fetch('B1', (url,))
        except hosts.FetchError as failed:
            return failed.reason
        finally:
            await fetcher.close()
    folder.mkdir(exist_ok=True)
    journal = Journal(folder / 'download.jsonl')
    try:
        return asyncio.run(one())
    finally:
        journal.close()


@pytest.mark.parametrize('target', [
    'http://127.0.0.1:{port}/plain/1.jpg', 'http://localhost:{port}/plain/1.jpg',
    'http://2130706433:{port}/plain/1.jpg', 'http://0x7f.1:{port}/plain/1.jpg',
    'http://[::ffff:127.0.0.1]:{port}/plain/1.jpg', 'http://[::1]:{port}/plain/1.jpg',
    'http://inside.test:{port}/plain/1.jpg', 'http://169.254.169.254/plain/1.jpg'])
def test_a_redirect_to_a_private_address_is_refused(tmp_path, names, monkeypatch, target):
    """Before anything is sent there; the same hop to a public address is followed."""
    names |= {'shop.test': [['93.184.216.34']], 'inside.test': [['10.0.0.7', '127.0.0.1']]}
    with PictureServer() as server:
        network = Elsewhere(server.server_port)
        guarded = hosts.Guarded(inner=network)
        monkeypatch.setattr(server, 'target', target.format(port=server.server_port))
        assert fetch(tmp_path / 'a', guarded, 'http://shop.test/elsewhere/1.jpg') == (
            'address_refused')
        assert set(network.asked) == {'93.184.216.34'}
        assert set(server.requests) == {'/elsewhere/1.jpg'}
        monkeypatch.setattr(server, 'target', 'http://shop.test/plain/1.jpg')
        assert isinstance(fetch(tmp_path / 'b', guarded, 'http://shop.test/elsewhere/1.jpg'), Path)


def test_a_name_is_what_it_was_when_it_was_looked_at(tmp_path, names):
    """It says a public address, and from then on a private one: that is never connected to."""
    names['shop.test'] = [['93.184.216.34'], ['127.0.0.1']]
    with PictureServer() as server:
        network = Elsewhere(server.server_port)
        guarded = hosts.Guarded(inner=network)
        assert isinstance(fetch(tmp_path / 'a', guarded, 'http://shop.test/plain/1.jpg'), Path)
        assert fetch(tmp_path / 'b', guarded, 'http://shop.test/plain/1.jpg') == 'address_refused'
    assert network.asked == ['93.184.216.34']


def test_of_a_names_addresses_the_public_ones_are_tried(tmp_path, names):
    names['shop.test'] = [['127.0.0.1', '93.184.216.35', '93.184.216.34']]
    with PictureServer() as server:
        network = Elsewhere(server.server_port)

        async def connect(host, port, *rest):
            network.asked.append(host)
            if host == '93.184.216.35':
                raise httpcore2.ConnectError('nobody')
            return await httpcore2.AnyIOBackend().connect_tcp('127.0.0.1', network.port, *rest)
        network.connect_tcp = connect
        found = fetch(tmp_path / 'a', hosts.Guarded(inner=network),
                      'http://shop.test/plain/1.jpg')
    assert isinstance(found, Path)
    assert network.asked == ['93.184.216.35', '93.184.216.34']


@pytest.mark.parametrize(('error', 'reason'), [
    (OSError(errno.EMFILE, 'no resolver'), 'no_connection'),
    (UnicodeError('label too long'), 'no_connection'), (TimeoutError(), 'timeout')])
def test_a_name_that_cannot_be_resolved_ends_one_picture(tmp_path, monkeypatch, error, reason):
    """It is neither the end of the download, nor a failure for good."""
    async def resolve(host, port):
        raise error
    monkeypatch.setattr(hosts, 'resolve', resolve)
    assert fetch(tmp_path / 'a', hosts.Guarded(), 'http://shop.test/plain/1.jpg') == reason


def test_this_machine_is_asked_only_if_told_so(tmp_path):
    with serving(tmp_path, '/plain/1.jpg') as server:
        report = get(tmp_path, allow_private=False)
        assert reasons(report) == {'B0000': 'address_refused'}
        assert not server.requests
        assert get(tmp_path, allow_private=False)['failures'][0]['remembered']
        assert get(tmp_path)['fetched'] == 1


# --- how hosts are treated ------------------------------------------------------------------------


def test_requests_at_once_are_bounded(tmp_path):
    paths = [f'/drips/{n}.jpg' for n in range(4)]
    with serving(tmp_path, *paths, form='2018') as server:
        get(tmp_path, QUICK._replace(per_host=2))
    assert server.busiest == 2
    other = [path.replace('127.0.0.1', 'localhost') for path in [server.url + p for p in paths]]
    turns = list(pictures.in_turns({str(n): (url,) for n, url in enumerate(
        [*[server.url + p for p in paths], *other])}))
    assert turns[:4] == ['0', '4', '1', '5']
    assert len(turns) == 8


@pytest.fixture
def clock(monkeypatch):
    """Time that only sleeping spends."""
    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

        async def sleep(self, seconds):
            self.now += seconds
    clock = Clock()
    monkeypatch.setattr(hosts, 'time', clock)
    monkeypatch.setattr(hosts.asyncio, 'sleep', clock.sleep)
    return clock


def test_a_host_has_its_pauses(clock):
    async def turns():
        host, begun = hosts.Host(QUICK._replace(pause=2.0)), []
        for hold in (0, 0, 7.5, 0):
            async with host.turn():
                begun.append(clock.now - 100)
                host.hold(hold)
        host.hold(hosts.LONGEST_HOLD + 1)
        with pytest.raises(hosts.FetchError, match='host_wants_a_pause'):
            async with host.turn():
                pass
        return begun
    assert asyncio.run(turns()) == [0, 2, 4, 11.5]


def test_what_a_host_says_is_heeded(tmp_path, monkeypatch):
    held = []
    monkeypatch.setattr(hosts.Host, 'hold', lambda _, seconds: held.append(seconds))
    with serving(tmp_path, '/busy/0.jpg', '/too_many/1.jpg', '/fails_once/2.jpg'):
        assert get(tmp_path, QUICK._replace(jobs=1))['fetched'] == 3
    assert held[0] == 1
    assert len(held) == 2
    assert 0 < held[1] < 1  # it does not say for how long


def test_retry_after():
    later = time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime(time.time() + 50))
    assert 40 < fetching.seconds(later) <= 50
    assert [fetching.seconds(text) for text in (
        '7', '', '-1', 'soon', '1e9', '9' * 99, 'Wed, 21 Oct 2015 07:28:00 GMT',
        'Wed, 21 Oct 2015 07:28:00', 'Wed, 99 Oct 2015 07:28:00 GMT')] == [7] + [0] * 8


def test_a_host_that_is_gone_is_not_asked_for_all_it_has(tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, 'GIVE_UP', 3)
    with serving(tmp_path, *[f'/fails/{n}.jpg' for n in range(30)]) as server:
        report = get(tmp_path, QUICK._replace(jobs=1))
    assert len(server.requests) == 3
    assert report['for_now'] == 30
    assert report['reasons'] == {'host_given_up': 27, 'status_500': 3}


def test_a_machine_that_nobody_answers_at(tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        raw(tmp_path, [f'http://127.0.0.1:{free.getsockname()[1]}/a.jpg', 'http://no.invalid/a'])
        report = get(tmp_path)
    assert report['reasons'] == {'no_connection': 2}
    assert report['for_now'] == 2


def test_a_certificate_that_nobody_vouches_for_is_told(tmp_path):
    """The server's own; where there is no openssl to make one, there is no such server."""
    if not shutil.which('openssl'):
        pytest.skip('openssl is not there')
    subprocess.run(['openssl', 'req', '-x509', '-newkey', 'rsa:2048', '-nodes', '-keyout', 'key',
                    '-out', 'cert', '-subj', '/CN=localhost', '-addext',
                    'subjectAltName=DNS:localhost'], cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / 'cert', tmp_path / 'key')
    server = PictureServer()
    server.socket = context.wrap_socket(server.socket, server_side=True)
    raw(tmp_path, [f'https://{host}:{server.server_port}/plain/{n}.jpg' for n, host in
                   enumerate(('localhost', '127.0.0.1'))])
    with server:
        assert get(tmp_path)['reasons'] == {'bad_certificate': 2}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv('SSL_CERT_FILE', str(tmp_path / 'cert'))
            assert reasons(get(tmp_path)) == {'B0001': 'bad_certificate'}  # another name
