"""Leases: which process makes which part of a store, by files alone: no lost host stops others.

A lease is a file that exists once and names its holder. The holder renews its time while it works.
A lease that was not renewed for some seconds may be taken over. Two processes may then believe for
a while that they hold it, so a lease saves work and protects nothing: what is made under a lease
must be the same from every process, and each of its files must appear at once.
"""

import contextlib
import os
import secrets
import socket
import sys
import time
from pathlib import Path

from tpad_jax.core.files import PARTIAL


class Leases:
    """The leases of one process in a directory.

    Times are compared by the file system's clock: the times of two files, of which one was just
    written. The clocks of the hosts may differ.

    Args:
      directory: exists; the processes share it.
      seconds: since the last renewal, after which another process may take a lease over.
    """

    def __init__(self, directory, seconds: float):
        self._directory, self._seconds = Path(directory), seconds
        self.token = secrets.token_hex(4)  # process numbers repeat, for example in containers
        self._owner = f'{socket.gethostname()} {os.getpid()} {self.token}'
        self._held: set[str] = set()
        self._renewed = time.monotonic()

    def take(self, name: str) -> bool:
        """Take a lease that is free, was not renewed, or whose holder on this host has ended.

        Args:
          name: of the lease.

        Returns:
          Whether this process holds it now.
        """
        lease = self._file(name)
        with contextlib.suppress(FileExistsError), lease.open('x') as file:
            file.write(self._owner)
            self._held.add(name)
            return True
        mine = lease.with_name(f'{lease.name}.{self.token}{PARTIAL}')
        mine.write_text(self._owner)
        try:
            with lease.open() as file:  # opening it asks a network file system for the latest time
                holder, renewed = file.read(), os.fstat(file.fileno()).st_mtime
            idle = mine.stat().st_mtime - renewed
            if idle <= self._seconds and not self._has_ended(holder):
                return False
            os.replace(mine, lease)
            if self._holder(name) != self._owner:  # another process replaced it, too
                return False
        except FileNotFoundError:  # its holder is done
            return False
        finally:
            mine.unlink(missing_ok=True)
        self._held.add(name)
        print(f'{self._directory}: lease {name} is taken over, {idle:.0f} s after the last sign of '
              f'life of its holder ({holder})', file=sys.stderr)
        return True

    def renew(self) -> None:
        """Renew all leases that this process holds. Cheap enough for every call of a model."""
        if time.monotonic() - self._renewed < self._seconds / 8:
            return
        self._renewed = time.monotonic()
        for name in tuple(self._held):
            holder = self._holder(name)
            if holder == self._owner:
                with contextlib.suppress(FileNotFoundError):
                    os.utime(self._file(name))
                continue
            self._held.remove(name)
            print(f'{self._directory}: lease {name} was taken over by {holder or "another process"}'
                  f', and both do the same work. Fix: raise config.mllm.encode_lease='
                  f'{self._seconds:g} s', file=sys.stderr)

    def free(self, *names: str) -> None:
        """Give leases back: those named, or all."""
        for name in names or tuple(self._held):
            self._held.discard(name)
            if self._holder(name) == self._owner:
                self._file(name).unlink(missing_ok=True)

    def _file(self, name):
        return self._directory / f'{name}.lease{PARTIAL}'  # a mirror copies no such file

    def _holder(self, name):
        try:
            return self._file(name).read_text()
        except FileNotFoundError:
            return ''

    def _has_ended(self, holder):
        """Whether a holder was a process of this host that is gone: a run need not wait for it."""
        host, process, *rest = holder.split() or ('', '')
        if host != socket.gethostname() or len(rest) != 1 or not process.isdigit():
            return False
        if int(process) == os.getpid():  # an earlier process with the number of this one
            return holder != self._owner
        try:
            os.kill(int(process), 0)
        except OSError as error:
            return isinstance(error, ProcessLookupError)
        return False
