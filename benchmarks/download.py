"""A download that is killed loses nothing: `python -m benchmarks.download [--pictures=500]`.

Pictures behind every kind of answer of benchmarks/picture_server.py, on this machine, are asked for
by `python -m tpad_jax.data.download`, which is killed by SIGKILL in the middle of several of them,
started again, and started a third time. What has to hold:

    counts    the second run ends with status 0, the numbers of its report add up, and every item
              has the outcome that its kind of answer has
    files     every picture is, byte by byte, what the server has
    asked     the second run asks for no picture that was there and nothing that failed for good
    continued what lay there of a picture is not sent again: one request gets the rest, and none
              where all of it lay there; of servers that give parts
    third     the third run asks only for what failed for now

What a server sent and the killed process had not taken yet is lost; how much is counted. The run
goes into `benchmarks/download.json`; status 1 where anything failed.
"""

import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

from absl import app, flags
from rich.console import Console
from rich.table import Table

from benchmarks.checkout import ROOT, commit
from benchmarks.picture_server import FOR_NOW, KINDS, LIMIT, PictureServer, encoded, raw
from tpad_jax.core.files import PARTIAL

FLAGS = flags.FLAGS
KEPT = Path(__file__).with_suffix('.json')
# these, with a picture or a part of it, are half of all
OFTEN = ('plain', 'drips', 'plain', 'drips', 'stalls_within', 'breaks', 'moved')
WITHOUT_PARTS = frozenset({'chunked', 'without_parts', 'without_length'})
KILLED_AT = 0.4  # of the pictures
SETTINGS = ('--allow_private', '--jobs=16', '--per_host=16', '--pause=0', '--timeout=1',
            '--tries=2', '--backoff=0.05', f'--max_bytes={LIMIT}')


def start(folder: Path, *more: str) -> subprocess.Popen:
    """The command in a process of its own."""
    out = open(folder / 'out', 'a')
    with out:
        return subprocess.Popen([sys.executable, '-m', 'tpad_jax.data.download', str(folder),
                                 *SETTINGS, *more], cwd=ROOT, stdout=out, stderr=out)


def paths(count: int) -> list[str]:
    """Of `count` pictures, every kind in turn and those of OFTEN between."""
    kinds = list(KINDS)
    return [f'/{OFTEN[n // 2 % len(OFTEN)] if n % 2 else kinds[n // 2 % len(kinds)]}/{n}.jpg'
            for n in range(count)]


def kill(process: subprocess.Popen, images: Path, kinds: list[str]) -> None:
    """Kills it when KILLED_AT of the pictures are there and some that drip have half to come."""
    enough = KILLED_AT * sum(not KINDS[kind] for kind in kinds)
    while process.poll() is None:
        sizes = sizes_of(images)
        parts = [name for name in sizes if name.endswith(PARTIAL)]
        dripping = [name for name in parts if kinds[int(name[1:5])] == 'drips'
                    and 0 < sizes[name] < len(encoded(int(name[1:5]))) / 2]
        if len(sizes) - len(parts) >= enough and len(dripping) >= 3:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(0.005)
    raise RuntimeError(f'it ended by itself, with {process.returncode}')


def sizes_of(images: Path) -> dict[str, int]:
    """{name: bytes} of the files that are there."""
    found = {}
    for name in os.listdir(images) if images.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # it has its name now
            found[name] = (images / name).stat().st_size
    return found


def run(folder: Path, count: int) -> dict:
    """The three runs, what held of them and their figures."""
    with PictureServer() as server:
        asked, images = paths(count), folder / 'images'
        raw(folder, [server.url + path for path in asked])
        kinds = [path.split('/')[1] for path in asked]
        asins = [f'B{n:04d}' for n in range(count)]
        begun = time.perf_counter()
        kill(start(folder), images, kinds)
        there = sizes_of(images)
        refused = {json.loads(line)['asin'] for line in
                   (images / 'download.jsonl').read_text().splitlines() if '"failed"' in line}
        first = asked_so_far(server)
        status = start(folder).wait(), last_report(images)
        both = asked_so_far(server)
        seconds = time.perf_counter() - begun
        third_status = start(folder).wait(), last_report(images)
        third = {path for path, count in asked_so_far(server).items() if count > both[path]}
    report = status[1]
    reasons = {one['asin']: one['reason'] for one in report['failures']}
    again, lost, continued, wrong = 0, 0, 0, []
    for path, kind, asin in zip(asked, kinds, asins, strict=True):
        if kind.startswith('moved') and kind != 'moved_out':
            path = path.replace(kind, 'plain')
        requests, have = server.requests[path][first[path]:], there.get(f'{asin}{PARTIAL}', 0)
        finished = any(f'{asin}{end}' in there for end in ('.jpg', '.png')) or asin in refused
        again += finished and bool(requests)
        if have and not finished and not KINDS[kind] and kind not in WITHOUT_PARTS | {'changes'}:
            lost += sum(one.sent for one in server.requests[path][:first[path]]) - have
            size = len(encoded(int(asin[1:]), 'PNG' if kind == 'png' else 'JPEG'))
            continued += have < size
            if [(one.start, one.sent) for one in requests] != [(have, size - have)] * (have < size):
                wrong.append(f'{path}: {have} bytes of {size} lay there, and it asked {requests}')
    whole = {asin: kind for asin, kind in zip(asins, kinds, strict=True) if not KINDS[kind]}
    held = {
        'counts': status[0] == third_status[0] == 0 and adds_up(report) and adds_up(
            third_status[1]) and reasons == {
                asin: KINDS[kind] for asin, kind in zip(asins, kinds, strict=True) if KINDS[kind]}
        and report['fetched'] + report['there'] == len(whole),
        'files': all(is_sent(images, asin, kind) for asin, kind in whole.items()),
        'asked': again == 0, 'continued': not wrong and continued > 0,
        'third': {path.split('/')[1] for path in third} <= FOR_NOW
        and third_status[1]['bytes']['received'] == 0}
    figures = {
        'pictures': count, 'there_at_the_kill': sum(name.endswith(('.jpg', '.png'))
                                                    for name in there),
        'parts_at_the_kill': sum(name.endswith(PARTIAL) and size > 0
                                 for name, size in there.items()),
        'parts_continued': continued, 'bytes_on_the_way_at_the_kill': lost,
        'fetched_behind_it': report['fetched'], 'failed': report['reasons'],
        'requests_first': first.total(), 'requests_second': (both - first).total(),
        'requests_third': len(third), 'seconds': round(seconds, 1)}
    return {'held': held, 'figures': figures, 'wrong': wrong[:5]}


def asked_so_far(server: PictureServer) -> Counter:
    """{path: requests}."""
    return Counter({path: len(requests) for path, requests in server.requests.items()})


def last_report(images: Path) -> dict:
    """What the last run left."""
    return json.loads((images / 'download.json').read_text())


def adds_up(report: dict) -> bool:
    """Whether the counts of a report are sums of their parts."""
    return (report['items'] == sum(report[key] for key in (
        'there', 'fetched', 'failed', 'without_url', 'unreviewed', 'left'))
        and report['failed'] == sum(report['reasons'].values()) == len(report['failures'])
        == report['for_good'] + report['for_now'])


def is_sent(images: Path, asin: str, kind: str) -> bool:
    """Whether a picture is one that the server has at its address."""
    number = int(asin[1:])
    file = images / f'{asin}{".png" if kind == "png" else ".jpg"}'
    return file.is_file() and file.read_bytes() in (
        encoded(number, 'PNG' if kind == 'png' else 'JPEG'),
        *[encoded(-1 - number)] * (kind == 'changes'))


def main(argv):
    """Run, print and keep."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), FLAGS.pictures)
    found |= {'commit': commit('tpad_jax/data', 'benchmarks/download.py',
                               'benchmarks/picture_server.py'),
              'date': datetime.now(UTC).isoformat(timespec='seconds'),
              'machine': f'{platform.processor() or platform.machine()}, {os.cpu_count()} cores'}
    KEPT.write_text(json.dumps(found, indent=1) + '\n')
    made = Table(box=None, show_header=False)
    for name, held in found['held'].items():
        made.add_row(name, 'held' if held else 'DID NOT HOLD')
    for name, value in found['figures'].items():
        made.add_row(name.replace('_', ' '), str(value))
    Console().print(made)
    sys.exit(0 if all(found['held'].values()) else 1)


if __name__ == '__main__':
    flags.DEFINE_integer('pictures', 500, 'How many.')
    app.run(main)
