"""The HTTP service of a finished run: an ASGI app for `python -m tpad_jax.serve` or any server.

- POST /recommend: {"sessions": [[item ids], ...], "k": 20} -> one list per session, optionally
  under conditions
- POST /items: multipart, a new item that is recommended from then on
- GET /items, /items/fields, /items/image: the catalogue; what conditions can name; a picture
- GET /health, /ready: alive; ready to answer
- GET /metrics: for Prometheus
- GET /, /docs: the demo page; the OpenAPI page, without files of other hosts
"""

import asyncio
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import prometheus_client as prometheus
from fastapi import Form, HTTPException, Query, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, ConfigDict, Field, Json, StringConstraints

from tpad_jax.errors import InputError
from tpad_jax.serving import artifact, recommender
from tpad_jax.serving.batching import RETRY, Batcher, Metrics
from tpad_jax.serving.calls import MAX_K, with_events
from tpad_jax.serving.conditions import wanted
from tpad_jax.serving.explain import explain
from tpad_jax.serving.pictures import Pictures
from tpad_jax.serving.recommender import Recommender

PAGE = Path(__file__).with_name('demo.html')
IMAGE_BYTES = 2**23  # of a request that adds an item, picture and words
MOST_NEW = 10_000  # items that a service adds
EMPTY = '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'
MOST_FIELDS = 100  # categories that the demo page offers
Id = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Words = Annotated[str, StringConstraints(max_length=2**14)]


@dataclass(frozen=True)
class Limits:
    """Limits of a request. Larger ones are refused with 413 or 422, overload with 503.

    Attributes:
      k: items of a list.
      sessions: sessions of a request.
      length: items of a session.
      body: bytes of a request for lists.
      seconds: seconds until a request is refused.
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
    """Counts requests accepted and requests answered completely; see `Guard`."""

    accepted: int = 0
    answered: int = 0
    stopping: bool = False


def app(shop: Recommender, workdir: Path, *, limits: Limits = Limits(), new_items: bool = True,
        added: str = '', count: Count | None = None):
    """Build the ASGI app. It can be mounted under a prefix of another app.

    Args:
      shop: the recommender.
      workdir: directory of its run, for pictures.
      limits: limits of a request.
      new_items: whether POST /items exists.
      added: file that stores the added items, or ''; see `artifact.added_file`.
      count: updated with every request; `stopping` makes /ready answer 503.
    """
    count = count or Count()
    most_k = min(limits.k, MAX_K, shop.trained)
    metrics, workdir = Metrics(), workdir.resolve()  # as directories are compared
    pictures = Pictures(workdir)
    adding = asyncio.Lock()
    tried = shop.served.directory.resolve()

    def newer():
        """Load the artefact that the run names now, once, if it is another one."""
        nonlocal tried
        (before, tried), old = (tried, artifact.place(workdir)), batcher.shop
        if tried in (before, old.served.directory.resolve()):
            return None
        new = recommender.load(workdir, base=old.base, added=added)
        lost = set(old.ids[1 + old.trained:]).difference(new.ids)
        if lost:
            print(f'{len(lost)} added items are not part of {tried}. Fix: add them again',
                  file=sys.stderr, flush=True)
        return new

    batcher = Batcher(shop, most_k, limits.waiting, metrics.rows.observe, newer)
    metrics.waiting.set_function(lambda: batcher.waiting)

    @asynccontextmanager
    async def lifespan(_):
        await batcher.start()
        yield
        await batcher.close()

    about = f'{shop.model} of {workdir.name}: {shop.trained} items.'
    made = FastAPIOffline(title='tpad_jax', lifespan=lifespan, redoc_url=None, description=about)
    made.state.batcher = batcher

    class Ask(BaseModel):
        """Sessions in the order of time, and the length of each list."""

        model_config = ConfigDict(extra='forbid')
        sessions: Annotated[list[Annotated[list[Id], Field(max_length=limits.length)]],
                            Field(min_length=1, max_length=limits.sessions)]
        k: Annotated[int, Field(ge=1, le=most_k)] = min(20, most_k)
        conditions: dict[str, Any] | None = None
        seen: list[Annotated[list[Id], Field(max_length=limits.length)]] | None = None
        explain: bool = False
        events: list[dict[str, Any]] | None = None

    @made.post('/recommend', response_model=Answers, responses=REFUSED)
    async def recommend(ask: Ask):
        """Return the K items most likely to follow each session.

        Unknown ids are dropped and listed. A session without a known item (`empty`) gets the items
        with most events and no scores. `conditions` are those of docs/serving.md; a list that they
        leave fewer items is shorter. `seen` has a list of ids for each session.
        """
        shop = batcher.shop  # which answers, even if another one comes meanwhile
        table = shop.table
        rows, unknown = shop.rows(ask.sessions, table)
        try:
            given = with_events(shop, rows, ask.sessions, ask.events)
            asked = await asyncio.to_thread(
                wanted, shop, rows, table, ask.conditions, ask.seen) if (
                    ask.conditions or ask.seen is not None) else None
        except InputError as error:
            raise HTTPException(400, str(error)) from error
        metrics.sessions.inc(len(rows))
        items, scores = await batcher.ask(given, ask.k, asked, shop)
        why = [{}] * len(rows) if not ask.explain else [
            {'why': x} for x in await asyncio.to_thread(explain, shop, given, items, table, asked)]
        # names include items added since
        answers = zip(shop.names(items), scores.tolist(), unknown, (rows[:, 0] == 0).tolist(), why,
                      strict=True)
        return JSONResponse({'answers': [
            {'items': best, 'scores': None if empty else values[:len(best)], 'unknown': names,
             'empty': empty, **more} for best, values, names, empty, more in answers]})

    if new_items:
        @made.post('/items', status_code=201, response_model=Item, responses={
            409: {'model': Refusal, 'description': 'The item exists.'}, **REFUSED})
        async def add(sent: Annotated[NewItem, Form()]):
            """Add an item by its picture, its words, or both; the first one loads the MLLM.

            Where the run recommends from features computed elsewhere, the item brings `features`,
            a JSON list of numbers.
            """
            image, item_id = sent.image, sent.id
            item = sent.model_dump() | {'text': sent.text or None,
                                        'image': await image.read() if image else None}
            async with adding:
                shop = batcher.shop
                if item_id in shop.table.number:
                    raise HTTPException(409, f'item id {item_id!r} exists')
                if len(shop.ids) - 1 - shop.trained >= MOST_NEW:
                    raise InputError(f'{MOST_NEW} items were added, the most. Fix: train again')
                await asyncio.to_thread(shop.add_items, [item])
                if added:
                    await asyncio.to_thread(
                        shop.save_added, artifact.added_file(shop.served, added))
                if shop is not batcher.shop:
                    raise HTTPException(503, 'an update came meanwhile; repeat the request', RETRY)
            if item['image']:
                await asyncio.to_thread(pictures.add, item_id, item['image'])
            metrics.added.inc()
            number = shop.table.number[item_id]
            return {'id': item_id, 'title': shop.titles[number], 'number': number}

    @made.get('/items', response_model=Items, responses=REFUSED)
    async def items(offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
                    limit: Annotated[int, Query(ge=1, le=200)] = 24):
        """List items by row; added items come last."""
        ids, titles = batcher.shop.ids, batcher.shop.titles
        numbers = range(1 + offset, min(1 + offset + limit, len(ids)))
        return {'total': len(ids) - 1, 'items': [
            {'id': ids[n], 'title': titles[n], 'number': n} for n in numbers]}

    @made.get('/items/fields', responses=REFUSED)
    def fields() -> Fields:  # in a thread: it reads all items
        """List what conditions can name: the most frequent categories, and the range of prices."""
        table = batcher.shop.table.attributes
        values = {name: table[name].drop_nulls() for name in table.columns}
        names, prices = (values.get(name, []) for name in ('category', 'price'))
        frequent = [name for name, _ in Counter(names).most_common(MOST_FIELDS + 1) if name]
        return Fields(categories=sorted(frequent[:MOST_FIELDS]),
                      price=[prices.min(), prices.max()] if len(prices) else None)

    @made.get('/items/image', responses={200: {'content': {'image/*': {}}},
                                         404: {'model': Refusal}, **REFUSED},
              response_class=Response)
    async def image(item_id: Annotated[Id, Query(alias='id')], blank: bool = False):
        """Return the picture of an item; with `blank` an empty one where there is none."""
        number = batcher.shop.table.number.get(item_id)
        picture = None if number is None else await asyncio.to_thread(pictures.get, item_id, number)
        if picture is None and blank:
            return Response(EMPTY, media_type='image/svg+xml')
        if picture is None:
            raise HTTPException(404, 'there is no such picture')
        return Response(picture[0], media_type=picture[1],
                        headers={'Cache-Control': 'max-age=3600'})

    @made.get('/health')
    async def health() -> dict:
        """Report that the process is alive."""
        return {'status': 'alive'}

    @made.get('/ready', responses={503: {'model': Refusal}})
    async def ready() -> dict:
        """Report whether to send requests here; 503 before the start and while stopping."""
        if count.stopping:
            raise HTTPException(503, 'stopping', RETRY)
        return {'status': 'ready', 'items': len(batcher.shop.ids) - 1}

    @made.get('/metrics', response_class=Response, responses={200: {'content': {'text/plain': {}}}})
    async def metrics_text():
        """Return the metrics for Prometheus."""
        return Response(prometheus.generate_latest(metrics.registry),
                        media_type=prometheus.CONTENT_TYPE_LATEST)

    @made.get('/', include_in_schema=False)
    async def page():
        return HTMLResponse(PAGE.read_text())

    @made.exception_handler(RequestValidationError)
    @made.exception_handler(InputError)
    async def unusable(request, error):
        # The answer does not repeat the request, whose text may not be encodable.
        detail = str(error) if isinstance(error, InputError) else '; '.join(
            f'{".".join(map(str, x["loc"]))}: {x["msg"]}' for x in error.errors()[:3])
        return JSONResponse({'detail': detail.encode(errors='replace').decode()}, 422)

    return Guard(made, limits, metrics, count)


class Refusal(BaseModel):
    """The reason why a request is refused."""

    detail: str


class NewItem(BaseModel):
    """An item to add."""

    id: Id
    title: Words = ''
    brand: Words = ''
    category: Words = ''
    description: Words = ''
    text: Words = ''
    price: Annotated[float | None, Field(ge=0, lt=1e12, allow_inf_nan=False)] = None
    features: Json | None = None  # a list of numbers
    image: UploadFile | None = None


class Answer(BaseModel):
    """The list of one session."""

    items: list[str]
    scores: list[float] | None
    unknown: list[str]
    empty: bool
    why: dict[str, Any] | None = None


class Answers(BaseModel):
    """One list per session."""

    answers: list[Answer]


class Item(BaseModel):
    """An item of the catalogue."""

    id: str
    title: str
    number: int


class Fields(BaseModel):
    """Values that conditions may name; `price` holds the lowest and the highest."""

    categories: list[str]
    price: list[float] | None


class Items(BaseModel):
    """A part of the catalogue, and its number of items."""

    total: int
    items: list[Item]


REFUSED = {status: {'model': Refusal, 'description': reason} for status, reason in {
    422: 'Invalid request.', 400: 'The body cannot be read, or a condition is unusable.',
    413: 'The body is too large.',
    503: 'Overloaded; see Retry-After.'}.items()}


class Guard:
    """Wraps the app: bounds bodies and times, counts and measures requests.

    Attributes:
      count: of requests, see `Count`.
    """

    def __init__(self, inner, limits: Limits, metrics: Metrics, count: Count):
        self._inner, self._limits, self._metrics, self.count = inner, limits, metrics, count
        self._paths = {route.path for route in inner.routes}

    async def __call__(self, scope, receive, send):
        """Handle one ASGI event."""
        if scope['type'] != 'http':
            await self._inner(scope, receive, send)
            return
        begun, status = time.perf_counter(), None
        self.count.accepted += 1
        # below a prefix of another app or of a proxy, a path begins with that prefix
        route = scope['path'].removeprefix(scope.get('root_path', '')) or '/'
        if route[0] != '/':  # the prefix /item is not one of /items
            route = scope['path']
        most = IMAGE_BYTES if route == '/items' else self._limits.body
        size = 0

        async def bounded():
            nonlocal size
            message = await receive()
            size += len(message.get('body', b''))
            if size > most:
                raise TooLargeError(most)
            return message

        async def sent(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
            await send(message)
            if message['type'] == 'http.response.body' and not message.get('more_body'):
                self.count.answered += 1

        # the first new item loads the MLLM
        seconds = None if route == '/items' else self._limits.seconds
        try:
            length = dict(scope['headers']).get(b'content-length', b'0')
            if length.isdigit() and int(length) > most:
                raise TooLargeError(most)
            async with asyncio.timeout(seconds):
                await self._inner(scope, bounded, sent)
        except (TooLargeError, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                error = HTTPException(503, f'not answered within {seconds:g} s', RETRY)
            if status is None:
                answer = JSONResponse({'detail': error.detail}, error.status_code, error.headers)
                await answer(scope, receive, sent)
        finally:
            path = route if route in self._paths else 'other'
            self._metrics.overloaded.inc(status == 503 and path != '/ready')
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - begun)


class TooLargeError(HTTPException):
    """A body has too many bytes. FastAPI answers an HTTPException that its body parser meets."""

    def __init__(self, most: int):
        """Name the largest number of bytes, `most`."""
        super().__init__(413, f'the body is too large. Expected at most {most} bytes',
                         {'Connection': 'close'})
