"""Page faults of large blocks that come and go, counted by the system."""

import os
import platform
import subprocess
import sys

import pytest

from tpad_jax.core import startup

PROGRAM = """
import resource, sys, threading
from tpad_jax.core import startup

if sys.argv[1] == 'keep':
    assert startup.keep_memory()

def touch():
    return len(b'x' * (80 << 20))  # above what a thread's own arena holds

touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    touch()
    thread = threading.Thread(target=touch)
    thread.start()
    thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how, **environment):
    done = subprocess.run([sys.executable, '-c', PROGRAM, how], capture_output=True, text=True,
                          check=True, env=os.environ | environment)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='tunes glibc')
def test_blocks_are_not_mapped_anew():
    usual = faults('leave')
    assert usual > 1000
    assert faults('keep') < 0.1 * usual
    assert faults('leave', **startup.ENVIRONMENT) < 0.1 * usual
