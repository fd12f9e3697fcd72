"""A million items, to the end of a run: `python -m benchmarks.million --json=FILE`.

    python -m benchmarks.million --items=20000 --sessions=6000 --steps=20    to try it out

Sessions of random lengths over items of Zipf popularity, in which an item is often followed by one
of its few successors, and 128 random features per item: seeded. The default config trains its
recommender and the rivals on them by sampled softmax, tunes the baselines, fits the experts and
writes the report; then `python -m tpad_jax.recommend` reads a file of sessions, and a service that
answers requests is sent new items with their features. Every part is a separate process. Seconds
and the peak of memory (of the kernel's account) are printed. Then the search of the served
catalogue takes turns with faiss on the same vectors: exactly, with and without the experts, and by
a graph (`--no-graph` leaves it out: it is built for minutes). A finished part is not repeated.
"""

import argparse
import datetime
import http.client
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks import service
from benchmarks.checkout import ROOT, commit
from tpad_jax.core import files

WIDTH, LENGTH, HELD = 128, 6, 0.01  # of features, of the longest session, share held out
SUCCESSORS, FOLLOWS = 3, 0.6
CLIENTS, NEW, ASKED = 4, 300, 20_000
BATCH, TURNS = 256, 5


def drawn(items: int, sessions: int):
    """Sessions: items int32 [N] one after the other, from 1 on, and offsets int64 [sessions + 1].

    A session begins with an item of Zipf popularity. The next one is a successor of it with
    probability FOLLOWS, and of Zipf popularity otherwise.
    """
    rng = np.random.default_rng(0)
    zipf = np.cumsum(1 / np.arange(1, items + 1))
    name = rng.permutation(items)
    popular = name[np.searchsorted(zipf, zipf[-1] * rng.random((sessions, LENGTH)))]
    after = rng.integers(0, items, (items, SUCCESSORS))
    rows = popular.copy()
    for place in range(1, LENGTH):
        follows = rng.random(sessions) < FOLLOWS
        chosen = after[rows[:, place - 1], rng.integers(0, SUCCESSORS, sessions)]
        rows[:, place] = np.where(follows, chosen, popular[:, place])
    lengths = rng.integers(2, LENGTH + 1, sessions)
    kept = np.arange(LENGTH) < lengths[:, None]
    return (1 + rows[kept]).astype(np.int32), np.append(0, np.cumsum(lengths))


def write(directory: Path, items: int, sessions: int) -> None:
    """Write sessions and items for config.data.ready, and rows for config.data.features."""
    directory.mkdir(parents=True)
    clicks, offsets = drawn(items, sessions)
    train = sessions - max(100, round(HELD * sessions))  # the last ones are the test
    cut = offsets[train]
    np.savez(directory / 'sessions.npz', catalog_item=np.arange(items + 1),
             train_items=clicks[:cut], train_offsets=offsets[:train + 1],
             test_items=clicks[cut:], test_offsets=offsets[train:] - cut)
    rng = np.random.default_rng(1)
    np.save(directory / 'rows.npy', rng.standard_normal((items, WIDTH), np.float32))
    (directory / 'rows.npy.ids').write_text('\n'.join(map(str, range(1, items + 1))) + '\n')
    with open(directory / 'items.jsonl', 'w') as out:
        for item in range(1, items + 1):
            out.write(json.dumps({'item': item, 'title': f'thing {item % 997} number {item}',
                                  'brand': f'maker {item % 5000}', 'price': item % 300}) + '\n')


def spent(command: list, output: Path) -> dict:
    """Run a command in a separate process; its seconds, processor seconds and peak of memory."""
    begun = time.perf_counter()
    with output.open('w') as said:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, stdout=said,
                                   stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f'{" ".join(map(str, command))} failed: see {output}')
    return {'seconds': round(time.perf_counter() - begun, 1),
            'cpu': round(usage.ru_utime + usage.ru_stime, 1),
            'GiB': round(usage.ru_maxrss / 2**20, 2)}


def trained(workdir: Path, given) -> dict:
    """The whole job, and the seconds of its parts."""
    data, run = workdir / 'data', workdir / 'run'
    options = {
        'data.ready': data, 'data.valid': HELD, 'data.words': 'title', 'data.sides': 'brand',
        'data.features': data / 'rows.npy', 'model.recommend': 'given', 'stages': 'recommend',
        'losses.next_item.weight': 0, 'losses.sampled_next_item.weight': 1,
        'stage.recommend.steps': given.steps, 'stage.recommend.epochs': 0,
        'stage.recommend.eval_every': given.steps // 2}
    out = spent(['launch.py', '--config=configs/amazon.py', f'--workdir={run}', *given.more,
                 *(f'--config.{name}={x}' for name, x in options.items())], workdir / 'run.out')
    results = json.loads((run / 'results.json').read_text())
    return {**out, 'parts': results['seconds'], 'models': {
        name: model['test']['hit@20'] for name, model in results['models'].items()}}


def recommended(workdir: Path, given) -> dict:
    """Lists of a file of sessions."""
    clicks, offsets = drawn(given.items, given.sessions)
    file = workdir / 'sessions.jsonl'
    with file.open('w') as out:
        for begin, end in itertools.pairwise(offsets[:ASKED + 1]):
            out.write(json.dumps({'session': list(map(str, clicks[begin:end]))}) + '\n')
    return {'sessions': min(ASKED, given.sessions), **spent(
        ['-m', 'tpad_jax.recommend', workdir / 'run', '--sessions', file, '--out',
         workdir / 'lists.jsonl'], workdir / 'recommend.out')}


def served(workdir: Path, given) -> dict:
    """Milliseconds of requests for lists, and of new items sent among them."""
    begun = time.perf_counter()
    process, port = service.started(workdir / 'run')
    started = time.perf_counter() - begun
    rng, stop, times = np.random.default_rng(2), threading.Event(), {'lists': [], 'new items': []}

    def post(link, path, body, kind):
        begun = time.perf_counter()
        link.request('POST', path, body, {'Content-Type': kind})
        answer = link.getresponse()
        text = answer.read()
        return answer.status, text, 1e3 * (time.perf_counter() - begun)

    def ask(client):
        link = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
        own = np.random.default_rng(10 + client)
        while not stop.is_set():
            session = [str(x) for x in own.integers(1, given.items + 1, 4)]
            status, _, taken = post(link, '/recommend', json.dumps({'sessions': [session]}),
                                    'application/json')
            if status == 200:
                times['lists'].append(taken)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(CLIENTS)]
    for thread in threads:
        thread.start()
    link = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
    statuses = set()
    for number in range(NEW + 20):
        features = json.dumps(rng.standard_normal(WIDTH).round(4).tolist())
        fields = {'id': f'new{number}', 'title': f'new thing {number}', 'features': features}
        body = ''.join(f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'
                       for name, value in fields.items()) + '--x--\r\n'
        status, text, taken = post(link, '/items', body, 'multipart/form-data; boundary=x')
        statuses.add(status)
        if status != 201:
            sys.exit(f'POST /items answered {status}: {text!r:.300}')
        if number == 20:  # the first ones compile
            times['lists'].clear()
        if number >= 20:
            times['new items'].append(taken)
        time.sleep(0.02)
    stop.set()
    for thread in threads:
        thread.join()
    process.send_signal(signal.SIGTERM)
    process.communicate()
    return {'seconds until it is ready': round(started, 1), 'clients': CLIENTS,
            **{name: {'requests': len(x), **{f'p{p} ms': round(float(np.percentile(x, p)), 1)
                                             for p in (50, 99)}} for name, x in times.items()}}


def searched(workdir: Path, given) -> dict:
    """Sessions per second of the search and of faiss, in turns, and the recall of a graph.

    The search alone reads vectors of sessions. With experts, their columns of the item vectors are
    searched too and single scores are moved by the rules, which faiss cannot do: it searches the
    same columns. `whole` also encodes the sessions and computes the rules.
    """
    import faiss
    import jax

    import tpad_jax
    from tpad_jax.evaluation.metrics import TOP
    from tpad_jax.serving import ann, topk

    shop = tpad_jax.load(workdir / 'run')
    clicks, offsets = drawn(given.items, given.sessions)
    rows, _ = shop.rows([list(map(str, clicks[begin:end]))
                         for begin, end in itertools.pairwise(offsets[:1 + BATCH])])
    z, h, moved = shop.embed_items(), shop.encode(rows), shop.shifts(rows)
    own = sum(spec.fusion.width for spec in shop.served.specs)
    top = jax.jit(topk.top_k, static_argnames='k')
    out = {'width': own, 'with experts': z.shape[1], 'batch': len(rows), 'threads': os.cpu_count()}

    def rates(**calls):
        """Run each in turns -> median sessions per second."""
        taken = {name: [] for name in calls}
        for turn in range(1 + TURNS):
            for name, call in calls.items():
                begun = time.perf_counter()
                jax.block_until_ready(call())
                if turn:
                    taken[name].append(time.perf_counter() - begun)
        return {name: round(len(rows) / float(np.median(x)), 1) for name, x in taken.items()}

    for name, width, shifts in (('search alone', own, None), ('with experts', z.shape[1], moved)):
        part, session = np.ascontiguousarray(z[:, :width]), np.ascontiguousarray(h[:, :width])
        padded = np.zeros((topk.rounded(len(z) + 1), width), np.float32)
        padded[1:len(z) + 1] = part
        padded = jax.device_put(padded)
        flat = faiss.IndexFlatIP(width)
        flat.add(part)
        search = partial(top, session, padded, np.int32(1 + len(z)), TOP, moved=shifts)
        out[name] = rates(ours=search, faiss=partial(flat.search, session, TOP))
        out[name]['time, that of faiss being 1'] = round(out[name]['faiss'] / out[name]['ours'], 3)
    out |= rates(whole=lambda: shop.first(rows, TOP)[1])
    if given.graph:
        begun = time.perf_counter()
        index = ann.build(z)
        out['graph'] = {'seconds to build': round(time.perf_counter() - begun, 1), **rates(
            ours=lambda: ann.search(index, h, TOP, moved)[1],
            faiss=lambda: index.search(h, TOP)[0])}
        out['graph']['recall@20'] = ann.recall(ann.search(index, h, TOP, moved)[0],
                                               shop.first(rows, TOP)[0])
    return out


def main():
    """Measure what is missing, print and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument('--items', type=int, default=1_000_000)
    parser.add_argument('--sessions', type=int, default=300_000)
    parser.add_argument('--steps', type=int, default=200, help='of each recommender')
    parser.add_argument('--workdir', type=Path, default=Path('runs/million'))
    parser.add_argument('--graph', action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument('--json', type=Path)
    parser.add_argument('more', nargs='*', help='further options of the training, after --')
    given = parser.parse_args()
    workdir = given.workdir.resolve()
    if not (workdir / 'data' / 'items.jsonl').is_file():
        write(workdir / 'data', given.items, given.sessions)
    done = workdir / 'parts.json'
    parts = json.loads(done.read_text()) if done.is_file() else {}
    for name, make in (('job', trained), ('recommend', recommended), ('serve', served),
                       ('search', searched)):
        if name not in parts:
            parts[name] = make(workdir, given)
            files.write_json(done, parts)
        print(name, json.dumps(parts[name], indent=1), flush=True)
    if given.json is not None:
        files.write_json(given.json, {
            'commit': commit('tpad_jax'), 'date': datetime.date.today().isoformat(),
            'machine': f'{platform.machine()}, {os.cpu_count()} cores', 'items': given.items,
            'sessions': given.sessions, 'steps': given.steps, **parts})


if __name__ == '__main__':
    main()
