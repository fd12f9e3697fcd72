"""Page faults of large blocks that come and go, counted by the system."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tpad_jax.core import startup

PROGRAM = """
import resource, sys
from tpad_jax.core import startup

if sys.argv[1] == 'keep':
    assert startup.keep_memory()

def touch():
    return len(b'x' * (80 << 20))

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(6):
    touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


HUGE = """
from pathlib import Path
from tpad_jax.core import startup

startup.keep_memory()
block = b'x' * (80 << 20)
heaps = Path('/proc/self/smaps').read_text().split('[heap]')[1:]
print(sum(int(x.split('AnonHugePages:')[1].split()[0]) for x in heaps))
"""
THP = Path('/sys/kernel/mm/transparent_hugepage/enabled')


@pytest.mark.skipif(not THP.is_file() or '[madvise]' not in THP.read_text(),
                    reason='pages are huge everywhere or nowhere')
def test_large_blocks_have_huge_pages():
    done = subprocess.run([sys.executable, '-c', HUGE], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 40 << 10  # kB of 80 MB: the kernel may lack whole ones


def faults(how):
    done = subprocess.run([sys.executable, '-c', PROGRAM, how], capture_output=True, text=True,
                          check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='tunes glibc')
def test_blocks_are_not_mapped_anew():
    usual = faults('leave')
    assert usual > 1000
    assert faults('keep') < 0.1 * usual


RETURNED = """
from tpad_jax.core import startup

def held():
    return int(open('/proc/self/statm').read().split()[1])

startup.keep_memory()
before = held()
block = b'x' * (80 << 20)
del block
kept = held() - before
assert startup.return_memory()
returned = held() - before
block = b'x' * (80 << 20)
del block
print(kept, returned, held() - before)
"""


@pytest.mark.skipif(not Path('/proc/self/statm').is_file() or platform.libc_ver()[0] != 'glibc',
                    reason='tunes glibc')
def test_what_is_freed_is_returned_once_tables_are_large():
    done = subprocess.run([sys.executable, '-c', RETURNED], capture_output=True, text=True,
                          check=True)
    kept, now, later = (int(pages) / (80 << 8) for pages in done.stdout.split())
    assert kept > 0.9
    assert max(now, later) < 0.1


def test_compiled_programs_are_kept_where_the_user_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.delenv(startup.CACHE)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    startup.cache_compilations()
    assert os.environ[startup.CACHE] == str(tmp_path / 'tpad_jax')
    for value in ('', '/elsewhere'):  # off, and another directory
        monkeypatch.setenv(startup.CACHE, value)
        startup.cache_compilations()
        assert os.environ[startup.CACHE] == value


def test_a_cache_directory_that_cannot_be_made_turns_the_cache_off(monkeypatch, tmp_path):
    (tmp_path / 'file').write_text('')
    monkeypatch.delenv(startup.CACHE)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    startup.cache_compilations()
    assert startup.CACHE not in os.environ


@pytest.mark.parametrize(('cores', 'given', 'threads'), [
    (2, None, '1'), (16, None, '3'), (2, '7', '7')])
def test_products_of_numpy_have_a_part_of_the_cores(monkeypatch, cores, given, threads):
    monkeypatch.delenv('OPENBLAS_NUM_THREADS', raising=False)
    if given:
        monkeypatch.setenv('OPENBLAS_NUM_THREADS', given)
    monkeypatch.setattr('os.sched_getaffinity', lambda _: set(range(cores)), raising=False)
    startup.share_cores()
    assert os.environ['OPENBLAS_NUM_THREADS'] == threads
