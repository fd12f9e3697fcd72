"""Lists under conditions: equal to brute force in numpy, and their throughput.

    python -m benchmarks.conditions --run=runs/amazon
    python -m benchmarks.conditions --run=runs/amazon --requests=10000 --items=100000 --json=FILE

Brands, categories and prices are drawn. Each request has its own random conditions, session and
seen items. Its list is compared with one that numpy sorts and filters from the complete,
unconditioned list of the same session. Then a catalogue of `--items` items answers batches of
sessions in turn with and without conditions, all but "at most n per brand", and a service of it
answers requests with and without any of them. Times are of the process's CPU and of the wall; read
those of a quiet machine.
"""

import argparse
import datetime
import http.client
import itertools
import json
import os
import platform
import signal
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks import service
from benchmarks.checkout import commit
from benchmarks.serving import enlarged

K, CLOSE, CLIENTS = 20, 1e-5, 8
CAPS = {'most_per_brand': 'brand', 'most_per_category': 'category'}


def drawn(rng, ids, table, caps=True):
    """Random conditions of a request; every name and id occurs in the catalogue."""
    some = rng.choice(ids, 20, replace=False).tolist()
    price = table['price'].drop_nulls()
    ends = sorted(price[rng.integers(0, len(price), 2).tolist()].to_list())
    half = rng.choice(ids, len(ids) // 2, replace=False).tolist()[:2000]

    def names(column):
        values = [x for x in table[column].unique(maintain_order=True) if x]
        return rng.choice(values, min(3, len(values)), replace=False).tolist()

    every = {'items': half, 'not_items': some, 'in_stock': half, 'brands': names('brand'),
             'not_brands': names('brand'), 'categories': names('category'),
             'not_categories': names('category'), 'price': ends, 'unseen': True,
             'boost': dict(zip(some, rng.normal(size=20).tolist(), strict=True)),
             'most_per_brand': int(rng.integers(1, 4)),
             'most_per_category': int(rng.integers(1, 4))}
    chosen = rng.choice(list(every), rng.integers(1, 5), replace=False)
    return {name: every[name] for name in chosen if caps or name not in CAPS}


def brute(items, scores, facts, conditions, hidden):
    """The first K of complete lists: sort, then look at one item after the other."""
    total, right = scores.copy(), ~np.isin(items, hidden)
    for name, more in conditions.get('boost', {}).items():
        total[items == facts['number'][name]] += np.float32(more)
    for name in ('items', 'not_items', 'in_stock'):
        if name in conditions:
            known = np.isin(items, [facts['number'][x] for x in conditions[name]])
            right &= known != name.startswith('not')
    for name, column in (('brands', 'brand'), ('not_brands', 'brand'), ('categories', 'category'),
                         ('not_categories', 'category')):
        if name in conditions:
            known = np.array([value is not None and any(
                value == x or value.startswith(x + ' > ') for x in conditions[name])
                for value in facts[column]])[items]
            right &= known != name.startswith('not')
    if 'price' in conditions:
        low, high = np.float32(conditions['price'])
        right &= (facts['price'][items] >= low) & (facts['price'][items] <= high)
    out, counts = [], Counter()
    for place in np.lexsort((items, -total)):
        groups = [(field, facts[column][items[place]]) for field, column in CAPS.items()
                  if field in conditions and facts[column][items[place]]]
        if right[place] and all(counts[group] < conditions[group[0]] for group in groups):
            counts.update(groups)
            out.append(place)
            if len(out) == K:
                break
    return items[out], total[out]


def attributed(directory):
    """Give a copy's items random brands, categories of two levels and prices, a twentieth none."""
    import polars as pl

    from tpad_jax.core import files
    from tpad_jax.serving import artifact

    folder = directory / artifact.FOLDER
    table = pl.read_parquet(folder / artifact.ITEMS).select('item_id', 'title')
    rng, total = np.random.default_rng(2), len(table)
    columns = {'brand': [f'brand {n}' for n in rng.zipf(1.5, total) % 300],
               'category': [f'{n % 5} > {n}' for n in rng.integers(0, 40, total)],
               'price': np.round(rng.lognormal(3, 1, total), 2)}
    drawn_columns = pl.DataFrame(columns).with_columns(pl.col('price').cast(pl.Float32))
    table.with_columns(pl.when(pl.Series(rng.random(total) > 0.05)).then(column).alias(column.name)
                       for column in drawn_columns).write_parquet(folder / artifact.ITEMS)
    about = json.loads((folder / artifact.ABOUT).read_text())
    about['digests'][artifact.ITEMS] = files.sha256(folder / artifact.ITEMS)
    (folder / artifact.ABOUT).write_text(json.dumps(about))


def asked_of(shop, rng, rows, conditions):
    """Resolve conditions and three random seen items for every row, as a service does."""
    from tpad_jax.serving.conditions import wanted

    ids = shop.ids
    return [wanted(shop, row[None], shop.table, x, [[ids[n] for n in rng.integers(1, len(ids), 3)]]
                   )[0] for row, x in zip(rows, conditions, strict=True)]


def prefixes(shop, rng, count):
    """Random prefixes of every length."""
    rows = rng.integers(1, shop.trained + 1, (count, shop.max_length)).astype(np.int32)
    rows[np.arange(shop.max_length) >= rng.integers(1, shop.max_length + 1, (count, 1))] = 0
    return rows


def exact(shop, requests):
    """How many lists differ from brute force; those within CLOSE of its scores apart."""
    rng, table = np.random.default_rng(0), shop.table.attributes
    facts = {'number': shop.table.number, **{name: [None, *table[name]] for name in (
        'brand', 'category')}, 'price': np.append(np.nan, table['price'].cast(float).to_numpy())}
    result = Counter(requests=requests)
    for begin in range(0, requests, 256):
        rows = prefixes(shop, rng, min(256, requests - begin))
        conditions = [drawn(rng, shop.ids[1:], table) for _ in rows]
        asked = asked_of(shop, rng, rows, conditions)
        lists, values = shop.first(rows, K, None, asked)
        for n, (items, scores) in enumerate(zip(*shop.first(rows, shop.trained), strict=True)):
            like, best = brute(items, scores, facts, conditions[n], asked[n].hidden)
            found = lists[n][lists[n] > 0]
            result['complete'] += len(like) == K
            if not np.array_equal(found, like):
                near = len(found) == len(like) and np.allclose(values[n][:len(like)], best,
                                                               rtol=0, atol=CLOSE)
                result['close' if near else 'wrong'] += 1
    return dict(result)


def throughput(shop, calls):
    """Sessions per second with and without conditions, by turns: medians of wall and CPU.

    "resolved" leaves out reading the conditions of every request, lists of 1,000 ids among them.
    """
    rng = np.random.default_rng(1)
    pool = [drawn(rng, shop.ids[1:], shop.table.attributes, caps=False) for _ in range(100)]
    times = {'without': [], 'with': [], 'resolved': []}

    def clock():
        return np.array([time.perf_counter(), time.process_time()])

    for number in range(calls + 1):
        rows = prefixes(shop, rng, 256)
        conditions = [pool[n] for n in rng.integers(0, len(pool), len(rows))]
        marks = [clock()]
        shop.first(rows, K)
        marks.append(clock())
        asked = asked_of(shop, rng, rows, conditions)
        marks.append(clock())
        shop.first(rows, K, None, asked)
        marks.append(clock())
        if number:  # the first calls compile
            parts = {'without': (0, 1), 'with': (1, 3), 'resolved': (2, 3)}
            for name, (begin, end) in parts.items():
                times[name].append(marks[end] - marks[begin])
    wall, cpu = ({name: float(np.median(x, axis=0)[kind]) for name, x in times.items()}
                 for kind in (0, 1))
    return {'sessions per second': {name: round(256 / x, 1) for name, x in wall.items()},
            **{f'{name} / without, {kind}': round(x['without'] / x[name], 3)
               for kind, x in (('wall', wall), ('CPU', cpu)) for name in ('with', 'resolved')}}


def over_http(directory, seconds):
    """Milliseconds of a request of one session, by turns without and with conditions.

    CLIENTS clients of this process ask a service without a pause.
    """
    import tpad_jax

    shop, rng = tpad_jax.load(directory), np.random.default_rng(3)
    sessions = [[shop.ids[n] for n in row if n] for row in prefixes(shop, rng, 100)]
    pool = {'without': [{} for _ in sessions],
            'with': [{'conditions': drawn(rng, shop.ids[1:], shop.table.attributes)}
                     for _ in sessions]}
    bodies = {name: [json.dumps({'sessions': [session], **more}) for session, more in zip(
        sessions, extra, strict=True)] for name, extra in pool.items()}
    process, port = service.started(directory)
    times = {name: [] for name in bodies}

    def ask(name, first, end, counts):
        link = http.client.HTTPConnection('127.0.0.1', port, timeout=30)
        for number in itertools.count(first):
            begun = time.perf_counter()
            if begun > end:
                return link.close()
            link.request('POST', '/recommend', bodies[name][number % len(bodies[name])],
                         {'Content-Type': 'application/json'})
            answer = link.getresponse()
            text = answer.read()
            if answer.status != 200 and counts:
                raise OSError(f'{answer.status}: {text!r:.300}')
            times[name].append(1e3 * (time.perf_counter() - begun))

    try:
        with ThreadPoolExecutor(CLIENTS) as threads:
            for number, name in itertools.product(range(6), bodies):
                end = time.perf_counter() + seconds / 4
                for done in [threads.submit(ask, name, 13 * n, end, number > 1)
                             for n in range(CLIENTS)]:
                    done.result()
                if number < 2:  # the first ones compile, and may be told to come again
                    times[name].clear()
    finally:
        process.send_signal(signal.SIGTERM)
        service.ended(process)
    return {name: {'requests': len(x), **{f'p{p} ms': round(float(np.percentile(x, p)), 2)
                                          for p in (50, 99)}} for name, x in times.items()}


def main():
    """Measure, print a table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--run', type=Path, required=True, help='workdir of a finished run')
    parser.add_argument('--requests', type=int, default=10_000)
    parser.add_argument('--items', type=int, default=100_000)
    parser.add_argument('--calls', type=int, default=20)
    parser.add_argument('--seconds', type=float, default=20, help='of HTTP requests of each kind')
    parser.add_argument('--json', type=Path)
    given = parser.parse_args()
    import tpad_jax

    out = {'commit': commit('tpad_jax'), 'date': datetime.date.today().isoformat(),
           'machine': f'{platform.machine()}, {os.cpu_count()} cores',
           'load average': round(os.getloadavg()[0], 1)}
    own = len(tpad_jax.load(given.run).ids) - 1
    with tempfile.TemporaryDirectory() as scratch:
        small, large = Path(scratch) / 'small', Path(scratch) / 'large'
        for directory, items in ((small, own), (large, given.items)):
            directory.mkdir()
            enlarged(given.run, directory, items)
            attributed(directory)
        out |= {'exact': exact(tpad_jax.load(small), given.requests), 'items': given.items,
                **throughput(tpad_jax.load(large), given.calls),
                f'HTTP, {CLIENTS} clients': over_http(large, given.seconds)}
    for name, value in out.items():
        print(f'{name:<26} {value}')
    if given.json is not None:
        given.json.write_text(json.dumps(out, indent=1) + '\n')


if __name__ == '__main__':
    main()
