"""Eight fake CPU devices and a quick compiler for every test."""

import gc
import os

import psutil
import pytest

from tests.eight_devices import environment

os.environ.update(environment())
# Tracing makes millions of objects that live; not to look through them time and again.
gc.set_threshold(100_000, 50, 100)
ENOUGH = 5 * 2**30  # bytes of a worker


@pytest.fixture(scope='module', autouse=True)
def _forgotten():
    """What a module leaves to be collected is, before the next one could be blamed for it.

    What was traced and compiled goes only where a worker has come to hold gigabytes by it: modules
    have much in common, and without it take a quarter more time.
    """
    yield
    if psutil.Process().memory_info().rss > ENOUGH:
        import jax

        gc.unfreeze()
        jax.clear_caches()
    gc.collect()
    gc.freeze()  # what is left are caches: not to look through them behind every module
