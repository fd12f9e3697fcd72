"""A copy of a run's workdir in a bucket, kept while it runs: `--mirror=gs://BUCKET/RUN`.

A machine may be taken away together with its disk. The same command on another machine, with an
empty workdir, starts from the files of the mirror and resumes the run. Paths are those of
etils.epath: a directory, or a bucket where its library is installed
(`pip install "tpad_jax[gcs]"`).

Files keep their names, so a mirror can be read directly. The manifest `mirror.json`, {path: [bytes,
sha256]}, lists the files that belong together. It is written after every round of copies and before
every round of deletions: a file that was copied in part is absent from it or differs from it.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import jax
from etils import epath

from tpad_jax.core.files import PARTIAL, replacing
from tpad_jax.distributed import hosts
from tpad_jax.errors import InputError, refuse_if, refusing

MANIFEST = 'mirror.json'
EVERY = 30.0  # seconds between two rounds of copies
# Folders that the same command makes again from the same files, or that nothing reads.
REPRODUCIBLE = 'raw', 'data', 'profile'
# Also inside a name: Orbax appends to the name of a checkpoint that it writes.
UNFINISHED = re.compile(rf'{re.escape(PARTIAL)}|\.orbax-checkpoint-tmp|\.part$|\.tmp$')
# Files that grow while they are copied. Any version will do: a resumed run removes later lines.
GROWING = re.compile(r'^(log\.jsonl|search\.journal|events/.*)$')
CHECKPOINT = re.compile(r'^stages/[^/]+/\d+/')  # a folder of which every file is needed


class Mirror:
    """Copies the files of a workdir that have changed.

    Args:
      workdir: of the run.
      where: the mirror, as etils.epath takes it.
    """

    def __init__(self, workdir: Path, where: str):
        self._workdir, self._where = Path(workdir), epath.Path(where)
        self._manifest: dict[str, list] = {}  # of the mirror's files: path -> [bytes, sha256]
        self._copied: dict[str, tuple] = {}  # path -> (bytes, time) of the file when it was copied

    def fetch(self) -> None:
        """Fill an empty workdir; a workdir that holds a run already is left as it is.

        Raises:
          InputError: the manifest is damaged, the mirror cannot be read, or it is of another run.
        """
        with _named(self._where):
            if not (self._where / MANIFEST).exists():
                return
            with refusing(ValueError, f'--mirror={self._where}: {MANIFEST} is damaged',
                          'Fix: name another mirror, or delete this file to start a new one'):
                self._manifest = dict(json.loads((self._where / MANIFEST).read_text()))
            config = self._workdir / 'config.json'
            if config.is_file():
                digest = _digest(config.read_bytes())
                refuse_if(self._manifest.get(config.name, digest) != digest,
                          f'--mirror={self._where}: it is the mirror of another run than '
                          f'{self._workdir}. Fix: name another mirror for this run')
                return
            bad = [path for path in self._manifest if not self._fetch_file(path)]
        for path in bad:
            if checkpoint := CHECKPOINT.match(path):
                shutil.rmtree(self._workdir / checkpoint[0], ignore_errors=True)
        if bad:
            print(f'Warning: {self._where}: {len(bad)} files differ from the manifest and were not '
                  f'fetched, {bad[0]} among them; the run makes them again', file=sys.stderr)

    def _fetch_file(self, path: str) -> bool:
        """Fetch one file; whether it is the one of the manifest."""
        source, target = self._where / path, self._workdir / path
        refuse_if(not target.resolve().is_relative_to(self._workdir.resolve()),
                  f'--mirror={self._where}: {MANIFEST} names {path!r}, which is outside a workdir. '
                  'Expected the mirror of a run. Fix: name another mirror')
        data = source.read_bytes() if source.exists() else None
        if data is None or (not GROWING.match(path) and _digest(data) != self._manifest[path]):
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as partial:
            partial.write_bytes(data)
        return True

    def push(self) -> None:
        """Copy what has changed, write the manifest, then delete what is gone.

        Raises:
          OSError: the mirror cannot be written; its manifest and files are still complete.
        """
        now, before = {}, dict(self._manifest)
        for path, stat in self._files():
            if self._copied.get(path) == stat and path in before:
                now[path] = before[path]
                continue
            try:
                data = (self._workdir / path).read_bytes()
            except FileNotFoundError:  # deleted since it was listed
                continue
            digest = _digest(data)
            if before.get(path) != digest:
                self._write(path, data)
            now[path], self._copied[path] = digest, stat
        # a checkpoint that was removed while its files were copied is incomplete
        now = {path: digest for path, digest in now.items()
               if not (match := CHECKPOINT.match(path)) or (self._workdir / match[0]).is_dir()}
        if now == before:
            return
        self._write(MANIFEST, json.dumps(now).encode())
        self._manifest = now
        for path in before.keys() - now.keys():
            (self._where / path).unlink(missing_ok=True)

    def _write(self, path: str, data: bytes) -> None:
        """Write a file of the mirror completely or not at all."""
        target = self._where / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if '://' in str(self._where):  # an object of a bucket appears when it is complete
            target.write_bytes(data)
            return
        with replacing(target) as partial:
            epath.Path(partial).write_bytes(data)

    def _files(self) -> Iterator[tuple[str, tuple]]:
        for folder, inner, files in os.walk(self._workdir):
            skipped = REPRODUCIBLE if Path(folder) == self._workdir else ()
            inner[:] = [name for name in inner
                        if name not in skipped and not UNFINISHED.search(name)]
            for file in (Path(folder, name) for name in files if not UNFINISHED.search(name)):
                with suppress(FileNotFoundError):  # deleted since it was listed
                    stat = file.stat()
                    yield (file.relative_to(self._workdir).as_posix(),
                           (stat.st_size, stat.st_mtime_ns))


@contextmanager
def kept(workdir, where: str, every: float = EVERY) -> Iterator[None]:
    """Keep a mirror of a run: fetch its files first, then copy what changes until the run ends.

    Process 0 of several does so for all. If the mirror cannot be written during the run, a warning
    is printed once and the copy is tried again. At the end it is an error: the copy is incomplete.

    Args:
      workdir: of the run.
      where: the mirror; '': none.
      every: seconds between two rounds of copies.

    Raises:
      InputError: see `Mirror.fetch`, and a mirror that could not be written at the end.
    """
    if where:
        with hosts.one_first('mirror'):  # the other processes learn of any error
            mirror = Mirror(workdir, where)
            if jax.process_index() == 0:
                mirror.fetch()
    if not where or jax.process_index() > 0:
        yield
        return
    ended = threading.Event()

    def follow():
        warned = False
        while not ended.wait(every):
            try:
                mirror.push()
            except Exception as error:  # of any file system's library: the run continues
                if not warned:
                    print(f'Warning: {where} could not be written ({error}); the run continues, '
                          f'and the copy is tried again every {every:g} s', file=sys.stderr)
                warned = True

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
            print(f'Warning: {error}', file=sys.stderr)  # the error that ended the run is raised


def _named(where):
    """Word every error of the mirror as one sentence; each file system has other errors."""
    return refusing(Exception, f'--mirror={where} cannot be used', 'The workdir is complete. Fix: '
                    'make the mirror writable; the same command copies what is missing')


def _digest(data: bytes) -> list:
    return [len(data), hashlib.sha256(data).hexdigest()]
