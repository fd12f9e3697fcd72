"""Raw Amazon files to tables, here and at an earlier commit: `python -m benchmarks.prepare`.

Files of the form of 2023 are generated: seeded, of Zipf popularity, with long texts, and one line
in a thousand odd: cut, of another encoding, repeated, or with a value that no reader expects. Each
side prepares them in a separate process, in turn; what they prepared is then compared record by
record. Bytes of the files per second, processor seconds and the peak of memory are printed, of all
processes of a side together.

    --reviews=5000000 --items=500000 --gz   the size that is aimed at, packed
    --against=c18c7c2                       the commit to compare with; empty: none
"""

import contextlib
import gzip
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.checkout import ROOT, commit
from tpad_jax.core import files

FLAGS = flags.FLAGS
OPTIONS = dict(gap_hours=24.0, core=1, min_length=2, valid=0.1, test=0.1, seed=0)
ODD = 1000  # lines to one odd one
SAMPLE = 0.1  # seconds between two looks at memory
WORDS = ('cotton steel wireless compact portable premium black white kids outdoor kitchen set pack '
         'with for case cover stand cable usb holder light adjustable waterproof').split()
TEXT = 'I bought this for my kitchen and it works as described. ' * 4
# Runs on either side: arguments are what to do, the raw folder, the folder of tables and options.
PROGRAM = """
import hashlib, json, resource, sys, time
import numpy as np
try:
    from tpad_jax.data.sources import amazon_tables as tables
except ImportError:
    from tpad_jax.data import builder as tables
work, raw, data, options = sys.argv[1:]
if work == 'prepare':
    begun = time.perf_counter()
    tables.prepare(raw, data, **json.loads(options))
    seconds = time.perf_counter() - begun
    own, ended = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(json.dumps({'seconds': seconds, 'peak': own.ru_maxrss * 1024,
                      'cpu': sum(usage.ru_utime + usage.ru_stime for usage in (own, ended)),
                      'lines': tables.read_finished(data)['lines']}))
else:
    finished = tables.read_finished(data)
    told = {name: finished[name] for name in ('fingerprint', 'lines', 'form')}
    for table, splits in (('items', ['items']), ('sessions', ['train', 'valid', 'test'])):
        for split in splits:
            digest = hashlib.sha256()
            records = tables.read_table(data, table, split)
            for record in records.__getitems__(range(len(records))):
                for name in options.split():
                    if name in record:
                        value = record[name]
                        digest.update(value if isinstance(value, bytes) else
                                      np.asarray(value).tobytes())
            told[split] = digest.hexdigest()
    print(json.dumps(told))
"""
FIELDS = 'asin title text brand category price has_image items lengths start'

flags.DEFINE_integer('reviews', 100_000, 'lines of reviews', lower_bound=1000)
flags.DEFINE_integer('items', 10_000, 'lines of metadata', lower_bound=100)
flags.DEFINE_bool('gz', False, 'pack the files')
flags.DEFINE_string('against', 'c18c7c2', 'commit to compare with; empty: none')
flags.DEFINE_string('out', None, 'JSON file to write')


def odd(line: bytes, rng: np.random.Generator) -> bytes:
    """Damage a line, or write it as no genuine file has it."""
    return (line[:len(line) // 2], b'', line[:-1] + b', "title": "caf\xe9"}',
            line[:-1] + b', "price": NaN}', line[:-1] + b', "x": ' + b'9' * 5000 + b'}',
            line[:-1] + b', "title": "\\ud800 half"}', line[:-1] + b', "parent_asin": null}',
            line[:-1] + b', "timestamp": "yesterday", "user_id": 7}', b'\t' + line + b' \r',
            line[:-1] + b', "categories": {"a": [["b"]]}, "store": ["<b>Acme</b>", "&amp; Co"]}',
            line + b'\n' + line)[rng.integers(11)]


def generate(folder: Path, reviews: int, items: int, packed: bool) -> int:
    """Write the files of a category.

    Args:
      folder: made.
      reviews: lines of reviews.
      items: lines of metadata.
      packed: whether to write .gz files.

    Returns:
      Their bytes, unpacked.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)

    def some(count):
        return ' '.join(WORDS[k] for k in rng.integers(0, len(WORDS), count))

    def write(name, lines):
        size = 0
        with (gzip.open(folder / f'{name}.gz', 'wb', 1) if packed
              else open(folder / name, 'wb')) as file:
            for line in lines:
                data = (odd(line, rng) if rng.integers(ODD) == 0 else line) + b'\n'
                size += file.write(data)
        return size

    def metadata():
        for k in range(items):
            yield json.dumps({
                'main_category': 'Home', 'title': some(12), 'average_rating': 4.2,
                'rating_number': int(rng.integers(1, 999)), 'features': [some(20)] * 3,
                'description': [some(60)], 'price': float(rng.integers(1, 200)), 'images': [
                    {'thumb': 'https://x/t.jpg', 'large': 'https://x/l.jpg', 'variant': 'MAIN',
                     'hi_res': None}], 'videos': [], 'store': f'acme{k % 500}',
                'categories': ['Home', f'A{k % 30}', f'B{k % 300}'], 'details': {'Color': 'Black'},
                'parent_asin': f'B{k:09d}', 'bought_together': None}).encode()

    def reviewed():
        users = max(reviews // 5, 1)
        share = 1 / np.arange(1, items + 1) ** 0.8
        item = rng.choice(items, reviews, p=share / share.sum())
        user = rng.integers(0, users, reviews)
        begin = rng.integers(1_500_000_000, 1_690_000_000, users)[user]
        time = (begin + rng.integers(0, 86_400 * 3, reviews)) * 1000 + np.arange(reviews) % 1000
        for item_number, user_number, moment in zip(item.tolist(), user.tolist(), time.tolist(),
                                                    strict=True):
            yield (b'{"rating": 5.0, "title": "Great", "text": "%s", "images": [], "asin": '
                   b'"B%09d", "parent_asin": "B%09d", "user_id": "AE%026d", "timestamp": %d, '
                   b'"helpful_vote": 0, "verified_purchase": true}' % (
                       TEXT.encode(), item_number, item_number, user_number, moment))

    return write('meta_Big.jsonl', metadata()) + write('Big.jsonl', reviewed())


def run(code: Path, *arguments: str) -> dict:
    """Run PROGRAM with the package in a directory."""
    process = subprocess.Popen([sys.executable, '-c', PROGRAM, *arguments], cwd=code,
                               env={**os.environ, 'PYTHONPATH': str(code)}, stdout=subprocess.PIPE,
                               text=True)
    peak = 0
    while process.poll() is None:  # what it prints fits into the pipe
        peak = max(peak, memory(psutil.Process(process.pid)))
        time.sleep(SAMPLE)
    told, _ = process.communicate()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, arguments)
    result = json.loads(told.splitlines()[-1])
    # a process that is alone has its exact peak from the system
    return result | ({'peak': max(peak, result['peak'])} if 'peak' in result else {})


def memory(process: psutil.Process) -> int:
    """Sum up the resident bytes of a process and of those it started."""
    total = 0
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in (process, *process.children(recursive=True)):
            total += each.memory_info().rss
    return total


def measure(folder: Path, sides: dict[str, Path]) -> dict:
    """Prepare the files of FLAGS by every side and compare.

    Args:
      folder: empty; takes the files.
      sides: {name: directory of the package}.
    """
    size = generate(folder / 'raw', FLAGS.reviews, FLAGS.items, FLAGS.gz)
    record = {'commit': commit(), 'against': FLAGS.against, 'reviews': FLAGS.reviews,
              'items': FLAGS.items, 'packed': FLAGS.gz, 'bytes': size,
              'cores': len(os.sched_getaffinity(0)), 'sides': {}}
    contents = []
    for name, code in sides.items():
        data = str(folder / name)
        measured = run(code, 'prepare', str(folder / 'raw'), data, json.dumps(OPTIONS))
        record['lines'] = measured.pop('lines')
        if len(sides) > 1:
            contents.append(run(code, 'read', str(folder / 'raw'), data, FIELDS))
            measured['content'] = hashlib.sha256(
                json.dumps(contents[-1], sort_keys=True).encode()).hexdigest()
        record['sides'][name] = measured
    record['equal'] = all(content == contents[0] for content in contents) if contents else None
    return record


def main(_) -> None:
    """Measure, print the table and write JSON."""
    sides = {'here': ROOT}
    with tempfile.TemporaryDirectory() as place:
        if FLAGS.against:
            sides = {FLAGS.against: Path(place) / 'code', 'here': ROOT}
            packed = subprocess.run(['git', 'archive', '--prefix=code/', FLAGS.against, 'tpad_jax'],
                                    cwd=ROOT, check=True, capture_output=True).stdout
            subprocess.run(['tar', 'x', '-C', place], input=packed, check=True)
        record = measure(Path(place) / 'files', sides)
    table = Table('', 'seconds', 'CPU seconds', 'MB/s', 'lines/s', 'peak, MB',
                  title=f'{record["reviews"]:,} reviews, {record["items"]:,} items, '
                        f'{record["bytes"] / 1e6:,.0f} MB{" packed" * FLAGS.gz}')
    for name, side in record['sides'].items():
        table.add_row(name, f'{side["seconds"]:.1f}', f'{side["cpu"]:.1f}',
                      f'{record["bytes"] / 1e6 / side["seconds"]:.0f}',
                      f'{(FLAGS.reviews + FLAGS.items) / side["seconds"]:,.0f}',
                      f'{side["peak"] / 1e6:.0f}')
    Console().print(table)
    if FLAGS.against:
        first, last = record['sides'].values()
        print(f'faster: {first["seconds"] / last["seconds"]:.1f} times, in CPU seconds '
              f'{first["cpu"] / last["cpu"]:.1f} times; tables equal: {record["equal"]}')
    if FLAGS.out:
        files.write_json(FLAGS.out, record)


if __name__ == '__main__':
    app.run(main)
