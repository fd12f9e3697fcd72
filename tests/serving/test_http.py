"""The HTTP service, in this process: answers, limits, overload, stopping; and by schemathesis."""

import asyncio
import gc
import json
import shutil
import threading
import weakref
from types import SimpleNamespace

import httpx
import numpy as np
import pytest

from tests import tiny_served
from tests.tiny_served import V
from tpad_jax.errors import InputError
from tpad_jax.serving import batching, calls, http, recommender
from tpad_jax.serving.pictures import Pictures

pytestmark = pytest.mark.slow  # what it answers with is in test_serving.py, in every run


@pytest.fixture(scope='module')
def run(served_run):
    return served_run


def driven(app, work):
    """What the coroutine function `work` of a client returns, the app being started and stopped."""
    async def go():
        inner = app._inner
        async with inner.router.lifespan_context(inner):
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url='http://shop') as client:
                return await work(client)

    return asyncio.run(go())


def test_it_answers_as_the_object(run):
    shop = recommender.load(run)
    app = http.app(shop, run)
    sessions = [['I3', 'no such', 'I4'], [], *([f'I{n}' for n in row if n]
                                               for row in tiny_served.prefixes(20))]
    like = shop.recommend(sessions, k=7)

    async def work(client):
        answers = await asyncio.gather(*(client.post('/recommend', json={'sessions': [s], 'k': 7})
                                         for s in sessions))
        whole = await client.post('/recommend', json={'sessions': sessions, 'k': 7})
        ready, metrics = await client.get('/ready'), await client.get('/metrics')
        page, docs = await client.get('/'), await client.get('/docs')
        return answers, whole, ready, metrics, page, docs

    answers, whole, ready, metrics, page, docs = driven(app, work)
    assert [one.json()['answers'][0] for one in answers] == whole.json()['answers']
    assert [one['items'] for one in whole.json()['answers']] == like.items
    assert [one['unknown'] for one in whole.json()['answers']] == like.unknown
    assert [one['empty'] for one in whole.json()['answers']] == like.empty.tolist()
    assert whole.json()['answers'][1]['scores'] is None
    assert ready.json() == {'status': 'ready', 'items': V}
    assert f'tpad_sessions_total {2 * len(sessions)}.0' in metrics.text
    assert 'tpad_requests_total{path="/recommend",status="200"} 23.0' in metrics.text
    for html in page.text, docs.text:
        assert '//' not in html.replace('// ', ''), 'something is fetched from elsewhere'
    assert app.count.accepted == app.count.answered == len(sessions) + 5


def test_conditions_are_those_of_the_object(run):
    shop = recommender.load(run)
    app = http.app(shop, run)
    sessions, seen = [['I3', 'I4'], []], [['I9'], ['I8']]
    conditions = [None, {'price': [1, 4]}, {'most_per_brand': 2, 'unseen': True},
                  {'boost': {'I5': 9.0}, 'diversity': 0.5}]
    bodies = [{'sessions': sessions, 'k': 7, 'conditions': x, 'seen': seen, 'explain': n == 2}
              for n, x in enumerate(conditions)]

    async def work(client):
        asked = [client.post('/recommend', json=body) for body in bodies]
        plain = client.post('/recommend', json={'sessions': sessions, 'k': 7})
        wrong = client.post('/recommend', json={'sessions': sessions, 'conditions': {'items': [
            '\u0142']}})
        return await asyncio.gather(*asked, plain, wrong)

    *answers, plain, wrong = driven(app, work)
    for x, body, answer in zip(conditions, bodies, answers, strict=True):
        like = shop.recommend(sessions, 7, x, seen=seen, explain=body['explain'])
        found = answer.json()['answers']
        assert [one['items'] for one in found] == like.items
        assert [one.get('why') for one in found] == (like.why or [None, None])
    assert [x['items'] for x in plain.json()['answers']] == shop.recommend(sessions, 7).items
    assert wrong.status_code == 400
    assert 'conditions.items: 1 of 1 ids are not in the catalogue' in wrong.json()['detail']


def test_a_new_item(run, tmp_path):
    shop = recommender.load(run)
    kept = tmp_path / 'added.safetensors'
    app = http.app(shop, run, added=str(kept))
    picture = {'image': ('x.png', tiny_served.picture(3), 'image/png')}

    async def work(client):
        added = await client.post('/items', data={'id': 'new', 'title': 'a thing'}, files=picture)
        again = await client.post('/items', data={'id': 'new', 'title': 'a thing'})
        broken = await client.post('/items', data={'id': 'other'}, files={
            'image': ('x.png', b'no picture', 'image/png')})
        image = await client.get('/items/image', params={'id': 'new'})
        none = await client.get('/items/image', params={'id': 'I3'})
        # this run computes the features of an item; and a list is JSON
        for features, said in ('[1.0]', 'brings features'), ('[1.0', 'features: Invalid JSON'):
            refused = await client.post('/items', data={
                'id': 'z', 'title': 'z', 'features': features})
            assert (refused.status_code, said in refused.json()['detail']) == (422, True)
        items = await client.get('/items', params={'offset': V - 1})
        found = await client.post('/recommend', json={'sessions': [['new']]})
        return added, again, broken, image, none, items, found

    added, again, broken, image, none, items, found = driven(app, work)
    assert (added.status_code, added.json()['number']) == (201, V + 1)
    assert (again.status_code, broken.status_code, none.status_code) == (409, 422, 404)
    assert 'its picture cannot be used' in broken.json()['detail']
    assert (image.status_code, image.headers['content-type']) == (200, 'image/png')
    assert [one['id'] for one in items.json()['items']] == [f'I{V}', 'new']
    assert not found.json()['answers'][0]['empty']
    other = recommender.load(run)
    other.restore_added(kept)
    np.testing.assert_array_equal(other.embed_items(['new']), shop.embed_items(['new']))
    with pytest.raises(ValueError, match='names items that exist'):
        other.restore_added(kept)
    kept.write_bytes(kept.read_bytes()[:50])
    with pytest.raises(ValueError, match='does not hold added items'):
        other.restore_added(kept)
    alone = http.app(other, run, new_items=False)
    assert driven(alone, lambda client: client.post('/items', data={'id': 'x'})).status_code == 405


@pytest.mark.parametrize(('body', 'status', 'said'), [
    ('{"sessions": [["I1"]], "k": 21}', 422, 'less than or equal to 20'),
    ('{"sessions": [["I1"]], "k": 0}', 422, 'greater than or equal to 1'),
    ('{"sessions": []}', 422, 'at least 1 item'),
    (json.dumps({'sessions': [['I1']] * 65}), 422, 'at most 64 items'),
    (json.dumps({'sessions': [['I1'] * 1001]}), 422, 'at most 1000 items'),
    (json.dumps({'sessions': [['I' * 201]]}), 422, 'at most 200 characters'),
    ('{"sessions": [["\\ud800"]]}', 422, 'valid'), ('{"sessions": [["I1"]], "x": 1}', 422, 'Extra'),
    ('{"sessions": [[1]]}', 422, 'valid string'), ('{', 422, 'JSON'),
    (json.dumps({'sessions': [['I' * 2**20]]}), 413, 'at most 1048576 bytes')])
def test_limits(run, body, status, said):
    app = http.app(recommender.load(run), run)
    app._inner.router.lifespan_context = lambda app: _Nothing()  # no device is asked
    answer = driven(app, lambda client: client.post(
        '/recommend', content=body, headers={'content-type': 'application/json'}))
    assert (answer.status_code, said in answer.json()['detail']) == (status, True), answer.text


def test_a_body_that_does_not_say_its_length_is_counted_as_it_comes(run):
    """Each of its parts is short enough; it is read no further than the limit."""
    app = http.app(recommender.load(run), run, limits=http.Limits(body=100))
    app._inner.router.lifespan_context = lambda app: _Nothing()
    read = []

    async def parts():
        for number in range(5):
            read.append(number)
            yield b' ' * 40

    answer = driven(app, lambda client: client.post('/recommend', content=parts()))
    assert 'content-length' not in answer.request.headers
    assert answer.status_code == 413
    assert 'Expected at most 100 bytes' in answer.json()['detail']
    assert read == [0, 1, 2]


class _Nothing:
    async def __aenter__(self):
        return None

    async def __aexit__(self, *_):
        return None


class Slow:
    """Stands for a recommender whose device is held by a lock; rows are answered by themselves."""

    max_length, reads = 2, ((), [])

    def __init__(self):
        self.calls, self.held, self.broken = [], threading.Event(), False
        self.held.set()

    def first(self, rows, k, table=None, asked=None):
        self.held.wait()
        self.calls.append(len(rows))
        if self.broken:
            raise FloatingPointError('not finite')
        return np.repeat(rows[:, :1], k, axis=1), np.zeros((len(rows), k), np.float32)


def test_requests_share_calls_and_the_queue_is_bounded():
    async def go():
        shop = Slow()
        batcher = batching.Batcher(shop, most_k=5, waiting=300)
        await batcher.start()
        shop.calls.clear()
        shop.held.clear()
        rows = [np.full((n % 3 + 1, 2), n, np.int32) for n in range(150)]
        first = asyncio.ensure_future(batcher.ask(rows[0], 2))
        await asyncio.sleep(0.05)  # it is with the device, and the others come meanwhile
        others = [asyncio.ensure_future(batcher.ask(x, 1 + len(x))) for x in rows[1:]]
        await asyncio.sleep(0)
        assert batcher.waiting == sum(map(len, rows[1:]))
        with pytest.raises(batching.OverloadedError):
            await batcher.ask(np.zeros((10, 2), np.int32), 2)
        others[5].cancel()
        closing = asyncio.ensure_future(batcher.close())
        await asyncio.sleep(0)
        with pytest.raises(batching.OverloadedError):  # closed
            await batcher.ask(rows[0], 2)
        shop.held.set()
        items, _ = await first
        assert items.tolist() == [[0, 0]]
        for n, answer in enumerate(others, 1):
            if n != 6:
                assert (await answer)[0].tolist() == [[n] * (1 + len(rows[n]))] * len(rows[n])
        await closing
        assert len(shop.calls) == 3
        assert max(shop.calls) <= calls.SIZES[-1]

    asyncio.run(go())


def test_a_failed_call_is_reported_to_those_it_was_for():
    async def go():
        shop = Slow()
        batcher = batching.Batcher(shop, most_k=5, waiting=300)
        await batcher.start()
        shop.broken = True
        with pytest.raises(FloatingPointError):
            await batcher.ask(np.ones((1, 2), np.int32), 2)
        shop.broken = False
        assert (await batcher.ask(np.ones((1, 2), np.int32), 2))[0].tolist() == [[1, 1]]
        await batcher.close()

    asyncio.run(go())


def test_overload_and_a_request_that_takes_too_long(run):
    shop = recommender.load(run)
    app = http.app(shop, run, limits=http.Limits(waiting=1, seconds=0.3))
    held, first = threading.Event(), shop.first

    def slow(rows, k, *_):
        held.wait()
        return first(rows, k)

    async def work(client):
        shop.first = slow
        body = {'sessions': [['I1']]}
        answers = [asyncio.ensure_future(client.post('/recommend', json=body)) for _ in range(3)]
        found = [await one for one in answers]
        held.set()
        return found

    held.set()
    found = driven(app, lambda client: (held.clear(), work(client))[1])
    assert [one.status_code for one in found] == [503] * 3
    assert all(one.headers['retry-after'] == '1' for one in found)
    full = 'too many sessions wait for the device; repeat the request'
    assert sorted(x.json()['detail'] for x in found) == ['not answered within 0.3 s', full, full]


def test_a_switch_under_load_loses_no_request_and_a_damaged_artefact_is_not_served(
        run, base_dir, tmp_path, monkeypatch, capsys):
    """Requests are answered by the old or the new artefact, each as a whole."""
    monkeypatch.setattr(batching, 'POLL', 0.05)
    workdir, other = tmp_path / 'run', tmp_path / 'other'
    shutil.copytree(run, workdir)
    tiny_served.write(other, base_dir, mllm=False, encoder='attention')
    for number in '0001', '0002':
        shutil.copytree(other / 'served', workdir / 'updates' / number / 'served')
    damaged = workdir / 'updates' / '0001' / 'served' / 'items.parquet'
    damaged.write_bytes(damaged.read_bytes()[:-1] + b'x')
    shop, kept = recommender.load(workdir), str(tmp_path / 'added.safetensors')
    shop.add_items([{'id': 'new', 'title': 'a thing'}])
    shop.save_added(kept)
    sessions = [['I3', 'I4'], ['I5']]
    old, new = (x.recommend(sessions, 7).items for x in (shop, recommender.load(other)))
    assert old != new
    app, before = http.app(shop, workdir, added=kept), weakref.ref(shop)
    del shop

    async def work(client):
        found, tasks = [], []

        async def ask():
            while len(found) < 4000 and not (found and found[-1] == new):
                answer = await client.post('/recommend', json={'sessions': sessions, 'k': 7})
                assert answer.status_code == 200
                found.append([one['items'] for one in answer.json()['answers']])

        (workdir / 'current').write_text('updates/0001')
        tasks = [asyncio.ensure_future(ask()) for _ in range(8)]
        while 'is damaged' not in capsys.readouterr().err:
            await asyncio.sleep(0.05)
        assert all(one == old for one in found)
        (workdir / 'current').write_text('updates/0002')
        await asyncio.gather(*tasks)
        return found, await client.get('/ready')

    found, ready = driven(app, work)
    assert all(one in (old, new) for one in found)
    assert found[-1] == new
    assert ready.status_code == 200
    gc.collect()
    assert before() is None  # its memory is free
    # items that were added to the one before wait for a rollback
    assert '1 added items are not part of' in capsys.readouterr().err
    assert len(recommender.load(workdir, added=kept).ids) == 1 + V
    (workdir / 'current').unlink()
    assert recommender.load(workdir, added=kept).ids[-1] == 'new'
    (workdir / 'current').mkdir()
    with pytest.raises(InputError, match='current: cannot be read'):
        recommender.load(workdir)


def test_pictures_stay_in_their_folder(tmp_path):
    run = tmp_path
    folder = run / 'raw' / 'images'
    folder.mkdir(parents=True)
    (folder / 'I1.png').write_bytes(tiny_served.picture(1))
    (run / 'raw' / 'secret.png').write_bytes(tiny_served.picture(2))
    pictures = Pictures(run)
    assert pictures.get('I1', 1) == (tiny_served.picture(1), 'image/png')
    assert pictures.get('../secret', 2) is None
    assert pictures.get(str(run / 'raw' / 'secret'), 2) is None


def test_nothing_that_its_description_allows_or_forbids_ends_in_a_defect(run):
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings, strategies as st
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    shop = recommender.load(run)
    app = http.app(shop, run)._inner
    schema = schemathesis.openapi.from_asgi('/openapi.json', app)
    seen = set()
    for operation in schema.get_all_operations():
        @given(case=st.one_of(*(operation.ok().as_strategy(generation_mode=mode)
                                for mode in schemathesis.GenerationMode)))
        @settings(max_examples=25, deadline=None, database=None, derandomize=True,
                  suppress_health_check=list(HealthCheck), phases=[Phase.generate])
        def check(case):
            answer = case.call()
            seen.add(answer.status_code)
            assert answer.status_code < 500, answer.text
            # an item of neither words nor a picture has its description, and is refused
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

        check()
    assert {200, 422} <= seen


@pytest.mark.parametrize('mounted', [False, True], ids=['root_path', 'mounted'])
def test_below_a_prefix_everything_is_the_same(run, mounted):
    """A mounted app gets no lifespan; with a prefix, limits and labels are those without."""
    from starlette.applications import Starlette
    from starlette.routing import Mount

    inner = http.app(recommender.load(run), run)
    outer = Starlette(routes=[Mount('/shop', app=inner)]) if mounted else inner
    transport = httpx.ASGITransport(outer, root_path='' if mounted else '/shop')

    async def work():
        async with httpx.AsyncClient(transport=transport, base_url='http://host') as client:
            ready = await client.get('/shop/ready')
            lists = await client.post('/shop/recommend', json={'sessions': [['I1']], 'k': 3})
            large = await client.post('/shop/items', files={'image': b'x' * 2**21},
                                      data={'id': 'new'})
            metrics = await client.get('/shop/metrics')
        await inner._inner.state.batcher.close()
        return ready, lists, large, metrics

    ready, lists, large, metrics = asyncio.run(work())
    assert (ready.status_code, lists.status_code, large.status_code) == (200, 200, 422), lists.text
    assert 'its picture cannot be used' in large.json()['detail']
    assert 'path="/recommend"' in metrics.text
    assert 'path="other"' not in metrics.text


def test_a_prefix_is_a_whole_part_of_a_path():
    class Inner:
        routes = (SimpleNamespace(path='/items'),)

        async def __call__(self, scope, receive, send):
            await send({'type': 'http.response.start', 'status': 204, 'headers': []})
            await send({'type': 'http.response.body'})

    metrics = batching.Metrics()
    guard = http.Guard(Inner(), http.Limits(), metrics, http.Count())
    asyncio.run(httpx.AsyncClient(transport=httpx.ASGITransport(guard, root_path='/item'),
                                  base_url='http://host').get('/items'))
    assert metrics.requests.labels('/items', 204)._value.get() == 1
