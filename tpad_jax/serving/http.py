"""The HTTP service of a finished run: an ASGI app for `python -m tpad_jax.serve`, or any server.

    POST /recommend      {"sessions": [[item ids], ...], "k": 20} -> a list for each
    POST /items          multipart: a new item, from then on recommended
    GET  /items          what there is; /items/image: a picture
    GET  /health /ready  alive; ready to answer
    GET  /metrics        for Prometheus
    GET  / /docs         the demo page; the OpenAPI page, without anything from elsewhere
"""

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import File, Form, HTTPException, Query, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from tpad_jax.errors import InputError
from tpad_jax.serving.batching import Batcher, Overloaded
from tpad_jax.serving.pictures import Pictures
from tpad_jax.serving.recommender import MAX_K, SIZES, Recommender

PAGE = Path(__file__).with_name('demo.html')
RETRY = {'Retry-After': '1'}  # seconds
IMAGE_BYTES = 2**23  # of a new item's request, picture and words
MOST_NEW = 10_000  # items a service takes
Id = Annotated[str, StringConstraints(min_length=1, max_length=200)]


@dataclass(frozen=True)
class Limits:
    """What a request may ask for; more is refused with 413 or 422, too much at once with 503.

    Attributes:
      k: items of a list. sessions: of a request. length: items of a session.
      body: bytes of a request for lists. seconds: until a request is given up.
      waiting: sessions that wait for the device.
    """

    k: int = 20
    sessions: int = 64
    length: int = 1000
    body: int = 2**20
    seconds: float = 10.0
    waiting: int = 4096


@dataclass
class Count:
    """Requests that were taken and those whose answer was sent to its end; see `Guard`."""

    accepted: int = 0
    answered: int = 0
    stopping: bool = field(default=False)


def app(shop: Recommender, workdir: Path, *, limits: Limits = Limits(), new_items: bool = True,
        added: str = '', count: Count | None = None):
    """The ASGI app.

    Args:
      shop: answers. workdir: of its run, for pictures. limits: see there.
      new_items: whether POST /items is there at all. added: file that keeps them, or ''.
      count: kept up to date; `stopping` makes /ready answer 503.
    """
    count = count or Count()
    most_k = min(limits.k, MAX_K, shop.trained)
    metrics = Metrics()
    pictures = Pictures(workdir)
    adding = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(own):
        own.state.batcher = Batcher(shop, most_k, limits.waiting, metrics.called)
        await own.state.batcher.start()
        yield
        await own.state.batcher.close()

    made = FastAPIOffline(
        title='tpad_jax', version='1', lifespan=lifespan, redoc_url=None,
        description=f'{shop.model} of {workdir.name}: {shop.trained} items.')
    made.state.metrics = metrics

    class Ask(BaseModel):
        """Sessions in the order of time, and how many items each is to get."""

        model_config = ConfigDict(extra='forbid')
        sessions: Annotated[list[Annotated[list[Id], Field(max_length=limits.length)]],
                            Field(min_length=1, max_length=limits.sessions)]
        k: Annotated[int, Field(ge=1, le=most_k)] = min(20, most_k)

    @made.post('/recommend', response_model=Answers, responses=REFUSED)
    async def recommend(ask: Ask):
        """The K items most likely to follow each session.

        Unknown ids are left out and named; a session of which nothing is left (`empty`) gets the
        items with most events and no scores.
        """
        table = shop.table
        rows, unknown = shop.rows(ask.sessions, table)
        metrics.sessions.inc(len(rows))
        items, scores = await made.state.batcher.ask(rows, ask.k)
        ids = shop.ids  # of all that the device may have known
        return JSONResponse({'answers': [
            {'items': [ids[n] for n in own], 'scores': None if not row[0] else found,
             'unknown': names, 'empty': not row[0]}
            for own, found, names, row in zip(items.tolist(), scores.tolist(), unknown,
                                              rows.tolist(), strict=True)]})

    if new_items:
        @made.post('/items', status_code=201, response_model=Item, responses={
            409: {'model': Refusal, 'description': 'There is such an item.'}, **REFUSED})
        async def add(
                id: Annotated[Id, Form()], title: Words = '', brand: Words = '',
                category: Words = '', description: Words = '', text: Words = '',
                price: Annotated[float | None, Form(ge=0, lt=1e12, allow_inf_nan=False)] = None,
                image: Annotated[UploadFile | None, File()] = None):
            """A new item by its picture, its words, or both; the first one loads the MLLM."""
            item = {'id': id, 'title': title, 'brand': brand, 'category': category,
                    'description': description, 'price': price,
                    'image': await image.read() if image else None}
            if text:
                item['text'] = text
            async with adding:
                if id in shop.table.number:
                    raise HTTPException(409, f'there is an item {id!r} already')
                if len(shop.ids) - 1 - shop.trained >= MOST_NEW:
                    raise InputError(f'{MOST_NEW} items were added, and no more are taken; train '
                                     'the run anew')
                await asyncio.to_thread(shop.add_items, [item])
                if added:
                    await asyncio.to_thread(shop.save_added, added)
            if item['image']:
                await asyncio.to_thread(pictures.add, id, item['image'])
            metrics.added.inc()
            number = shop.table.number[id]
            return {'id': id, 'title': shop.titles[number], 'number': number}

    @made.get('/items', response_model=Items, responses=REFUSED)
    async def items(offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
                    limit: Annotated[int, Query(ge=1, le=200)] = 24):
        """Items by their numbers, those that were added last."""
        ids, titles = shop.ids, shop.titles
        numbers = range(1 + offset, min(1 + offset + limit, len(ids)))
        return {'total': len(ids) - 1, 'items': [
            {'id': ids[n], 'title': titles[n], 'number': n} for n in numbers]}

    @made.get('/items/image', responses={200: {'content': {'image/*': {}}},
                                         404: {'model': Refusal}, **REFUSED},
              response_class=Response)
    async def image(id: Annotated[Id, Query()]):
        """An item's picture."""
        number = shop.table.number.get(id)
        found = None if number is None else await asyncio.to_thread(pictures.get, id, number)
        if found is None:
            raise HTTPException(404, 'there is no such picture')
        return Response(found[0], media_type=found[1], headers={'Cache-Control': 'max-age=3600'})

    @made.get('/health')
    async def health() -> dict:
        """Whether the process lives."""
        return {'status': 'alive'}

    @made.get('/ready', responses={503: {'model': Refusal}})
    async def ready() -> dict:
        """Whether requests should be sent here: not yet, or not any more, is 503."""
        if count.stopping:
            raise HTTPException(503, 'stopping', RETRY)
        return {'status': 'ready', 'items': len(shop.ids) - 1}

    @made.get('/metrics', response_class=Response, responses={200: {'content': {'text/plain': {}}}})
    async def prometheus():
        """For Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @made.get('/', include_in_schema=False)
    async def page():
        return HTMLResponse(PAGE.read_text())

    @made.exception_handler(RequestValidationError)
    async def invalid(request, error):
        # what was sent is not sent back: it may be no text that can be
        said = '; '.join(f'{".".join(map(str, one["loc"]))}: {one["msg"]}'
                         for one in error.errors()[:3])
        return _refusal(422, said.encode(errors='replace').decode())

    @made.exception_handler(InputError)
    async def unusable(request, error):
        return _refusal(422, str(error).encode(errors='replace').decode())

    @made.exception_handler(Overloaded)
    async def overloaded(request, error):
        metrics.overloaded.inc()
        return _refusal(503, 'too much waits for the device; ask again', RETRY)

    return Guard(made, limits, metrics, count)


class Refusal(BaseModel):
    """Why a request is not answered."""

    detail: str


class Answer(BaseModel):
    """The list of one session."""

    items: list[str]
    scores: list[float] | None
    unknown: list[str]
    empty: bool


class Answers(BaseModel):
    """A list for each session."""

    answers: list[Answer]


class Item(BaseModel):
    """An item of the catalogue."""

    id: str
    title: str
    number: int


class Items(BaseModel):
    """A part of the catalogue, and how many items it has."""

    total: int
    items: list[Item]


Words = Annotated[str, Form(max_length=2**14)]
REFUSED = {422: {'model': Refusal, 'description': 'Not as described.'},
           400: {'model': Refusal, 'description': 'The body cannot be read.'},
           413: {'model': Refusal, 'description': 'The body is too large.'},
           503: {'model': Refusal, 'description': 'Too much at once; see Retry-After.'}}


class Metrics:
    """What /metrics tells."""

    def __init__(self):
        self.registry = own = CollectorRegistry()
        ProcessCollector(registry=own)
        self.requests = Counter('tpad_requests', 'Requests answered.', ('path', 'status'),
                                registry=own)
        self.seconds = Histogram('tpad_request_seconds', 'From a request to its answer.', ('path',),
                                 registry=own, buckets=(.001, .002, .005, .01, .02, .05, .1, .2,
                                                        .5, 1, 2, 5, 10))
        self.rows = Histogram('tpad_call_sessions', 'Sessions of a device call.', registry=own,
                              buckets=SIZES)
        self.waiting = Gauge('tpad_waiting_sessions', 'Sessions that wait for the device.',
                             registry=own)
        self.sessions = Counter('tpad_sessions', 'Sessions asked for.', registry=own)
        self.added = Counter('tpad_added_items', 'Items added.', registry=own)
        self.overloaded = Counter('tpad_overloaded', 'Requests refused by 503.', registry=own)

    def called(self, rows, waiting):
        """A device call of so many sessions, while so many wait."""
        self.rows.observe(rows)
        self.waiting.set(waiting)


class Guard:
    """Around the app: bodies and times are bounded, requests counted and measured.

    Attributes:
      count: of requests, see `Count`.
    """

    def __init__(self, inner, limits: Limits, metrics: Metrics, count: Count):
        self._inner, self._limits, self._metrics, self.count = inner, limits, metrics, count
        self._paths = {'/recommend', '/items', '/items/image', '/health', '/ready', '/metrics',
                       '/', '/docs', '/openapi.json'}

    async def __call__(self, scope, receive, send):
        """ASGI."""
        if scope['type'] != 'http':
            await self._inner(scope, receive, send)
            return
        begun, status = time.perf_counter(), None
        self.count.accepted += 1
        most = IMAGE_BYTES if scope['path'] == '/items' else self._limits.body
        size = 0

        async def bounded():
            nonlocal size
            message = await receive()
            size += len(message.get('body', b''))
            if size > most:
                raise TooLarge
            return message

        async def sent(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
            await send(message)
            if message['type'] == 'http.response.body' and not message.get('more_body'):
                self.count.answered += 1

        async def refuse(code, said, headers=None):
            if status is None:
                await _refusal(code, said, headers)(scope, receive, sent)

        # a new item's MLLM may have to be loaded first
        seconds = None if scope['path'] == '/items' else self._limits.seconds
        try:
            length = dict(scope['headers']).get(b'content-length', b'0')
            if length.isdigit() and int(length) > most:
                raise TooLarge
            async with asyncio.timeout(seconds):
                await self._inner(scope, bounded, sent)
        except TooLarge:
            await refuse(413, f'a body of at most {most} bytes is read', {'Connection': 'close'})
        except TimeoutError:
            self._metrics.overloaded.inc()
            await refuse(503, f'not answered within {seconds:g} s', RETRY)
        finally:
            path = scope['path'] if scope['path'] in self._paths else 'other'
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - begun)


class TooLarge(Exception):
    """A body has more bytes than are read."""


def _refusal(code, said, headers=None):
    return JSONResponse({'detail': said}, code, headers)
