"""A copy of a run's workdir in a bucket, kept while it runs: `--mirror=gs://BUCKET/RUN`.

A machine that may be taken away with its disk loses nothing that was copied: the same command on
another, with an empty workdir, begins with what the mirror has and goes on from there.
Paths are etils.epath's: a directory, or a bucket where the library for it is installed
(`pip install "tpad_jax[gcs]"`).

Files keep their names, so a mirror can be looked into. What of them belongs together is said by
`mirror.json`, {path: [bytes, sha256]}, written behind every round of copies and in front of every
round of deletions: a copy that was cut short is in no manifest, or is not what the manifest says.
"""

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from etils import epath

from tpad_jax.distributed import hosts
from tpad_jax.errors import InputError

MANIFEST = 'mirror.json'
EVERY = 30.0  # seconds between two looks at the workdir
MADE_AGAIN = 'raw', 'data', 'profile'  # from the same files, by the same command, or not at all
UNFINISHED = re.compile(r'\.orbax-checkpoint-tmp|\.partial$|\.part$|\.tmp$')
# What grows while it is copied: any version of it will do, a run cuts off what came too late.
GROWING = re.compile(r'^(log\.jsonl|search\.journal|events/.*)$')
CHECKPOINT = re.compile(r'^stages/[^/]+/\d+/')  # of which every file is needed


class Mirror:
    """Copies what has changed in a workdir.

    Args:
      workdir: of the run. where: the mirror, as etils.epath takes it.
    """

    def __init__(self, workdir: Path, where: str):
        self._workdir, self._where = Path(workdir), epath.Path(where)
        self._there: dict[str, list] = {}  # what the mirror has: path -> [bytes, sha256]
        self._seen: dict[str, tuple] = {}  # path -> (bytes, time) of the file that was copied

    def fetch(self) -> int:
        """Fill an empty workdir; how many files came. Where a run is already nothing is fetched.

        Raises:
          InputError: the manifest is damaged, the mirror cannot be read, or it is of another run.
        """
        with _named(self._where):
            manifest = self._where / MANIFEST
            if not manifest.exists():
                return 0
            try:
                self._there = dict(json.loads(manifest.read_text()))
            except ValueError as error:
                raise InputError(f'{manifest} is damaged ({error}); name another mirror, or delete '
                                 'that file to begin a new one there') from error
            own = self._workdir / 'config.json'
            if own.is_file():
                if self._there.get(own.name, told := _digest(own.read_bytes())) != told:
                    raise InputError(f'{self._where} is the mirror of another run than '
                                     f'{self._workdir}; name another for this one')
                return 0
            bad = [path for path in self._there if not self._take(path)]
        spoiled = {found[0] for path in bad if (found := CHECKPOINT.match(path))}
        for path in self._there:
            if any(path.startswith(folder) for folder in spoiled):
                (self._workdir / path).unlink(missing_ok=True)
        if bad:
            print(f'Warning: {self._where}: {len(bad)} files are not what was copied there and are '
                  f'left out, {bad[0]} among them; the run makes them again', file=sys.stderr)
        return len(self._there) - len(bad)

    def _take(self, path: str) -> bool:
        """Bring one file; whether it is the one the manifest means."""
        target = self._workdir / path
        if not target.resolve().is_relative_to(self._workdir.resolve()):
            raise InputError(f'{self._where / MANIFEST} names {path!r}, which lies outside a '
                             'workdir; it is no mirror of a run')
        source = self._where / path
        if not source.exists():
            return False
        data = source.read_bytes()
        if not GROWING.match(path) and _digest(data) != self._there[path]:
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + '.part')
        part.write_bytes(data)
        os.replace(part, target)
        return True

    def push(self) -> None:
        """Copy what has changed, say so in the manifest, then delete what is gone.

        Raises:
          OSError: the mirror cannot be written; what it had is still whole.
        """
        now, before = {}, dict(self._there)
        for path, about in self._files():
            if self._seen.get(path) == about and path in before:
                now[path] = before[path]
                continue
            try:
                data = (self._workdir / path).read_bytes()
            except FileNotFoundError:  # deleted since
                continue
            told = _digest(data)
            if before.get(path) != told:
                self._write(path, data)
            now[path], self._seen[path] = told, about
        halved = {found[0] for path in now if (found := CHECKPOINT.match(path))
                  and not (self._workdir / found[0]).is_dir()}
        now = {path: told for path, told in now.items()
               if not any(path.startswith(folder) for folder in halved)}
        if now == before:
            return
        self._write(MANIFEST, json.dumps(now).encode())
        self._there = now
        for path in before.keys() - now.keys():
            (self._where / path).unlink(missing_ok=True)

    def _write(self, path: str, data: bytes) -> None:
        """Put a file there, at once or not at all."""
        target = self._where / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if '://' in str(self._where):  # an object of a bucket appears when it is whole
            target.write_bytes(data)
            return
        part = target.with_name(target.name + '.part')
        part.write_bytes(data)
        part.replace(target)

    def _files(self) -> Iterator[tuple[str, tuple]]:
        for folder, inner, files in os.walk(self._workdir):
            at = Path(folder).relative_to(self._workdir)
            inner[:] = sorted(name for name in inner if not UNFINISHED.search(name)
                              and not (at == Path() and name in MADE_AGAIN))
            for name in sorted(files):
                if UNFINISHED.search(name):
                    continue
                try:
                    found = os.stat(Path(folder, name))
                except FileNotFoundError:
                    continue
                yield (at / name).as_posix(), (found.st_size, found.st_mtime_ns)


@contextmanager
def kept(workdir, where: str, every: float = EVERY) -> Iterator[None]:
    """Around a run: begins with what the mirror has and keeps it up to date, to the end.

    Process 0 of several does so for all. A mirror that cannot be written meanwhile is told once on
    stderr and tried again; that it could not be at the end is an error, for the copy is not whole.

    Args:
      workdir: of the run. where: the mirror; '': none. every: seconds between two looks.

    Raises:
      InputError: see `Mirror.fetch`, and a mirror that could not be written at the end.
    """
    if not where:
        yield
        return
    with hosts.one_first('mirror'):
        first = jax.process_index() == 0
        mirror = Mirror(workdir, where)
        if first:
            mirror.fetch()
    if not first:
        yield
        return
    ended, told = threading.Event(), []

    def follow():
        while not ended.wait(every):
            try:
                mirror.push()
            except Exception as error:  # a library's own: the run goes on without
                if not told:
                    print(f'Warning: {where} could not be written ({error}); the run goes on, and '
                          f'it is tried again every {every:g} s', file=sys.stderr)
                told.append(error)

    thread = threading.Thread(target=follow, name='mirror', daemon=True)
    thread.start()
    failed = True
    try:
        yield
        failed = False
    finally:
        ended.set()
        thread.join()
        try:
            with _named(where):
                mirror.push()
        except InputError as error:
            if not failed:
                raise
            print(f'Warning: {error}', file=sys.stderr)  # what ended the run is told by itself


@contextmanager
def _named(where):
    """What goes wrong with the mirror, as one sentence that names it."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # each file system has errors of its own
        raise InputError(f'{where}: {type(error).__name__}: {error}; the workdir is whole, and the '
                         'same command copies what is missing') from error


def _digest(data: bytes) -> list:
    return [len(data), hashlib.sha256(data).hexdigest()]
