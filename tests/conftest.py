"""Eight fake CPU devices and a quick compiler for every test."""

import gc
import os
from collections import Counter

import psutil
import pytest

from tests.eight_devices import environment

os.environ.update(environment())
# Tracing makes millions of objects that live; not to look through them time and again.
gc.set_threshold(100_000, 50, 100)
ENOUGH = 5 * 2**30  # bytes of a worker


@pytest.fixture(scope='session', autouse=True)
def _few_rows_at_a_time():
    """A scorer gets 512 rows and a fit of experts 256, however few there are. Here there are tens,
    and code that is compiled quickly is slow: filled up, they would take half of the time of a job
    that finds its programs.
    """
    from tpad_jax.evaluation import experts, metrics

    metrics.CHUNK = experts.ROWS = 64


@pytest.fixture(scope='session')
def base_dir(tmp_path_factory):
    """Directory of the smallest base. Tests only read it."""
    from tests import tiny_base

    return tiny_base.write(tmp_path_factory.mktemp('base'))


@pytest.fixture(scope='session')
def served_run(base_dir, tmp_path_factory):
    """Workdir of the default run of tiny_served. Tests only read it."""
    from tests import tiny_served

    workdir = tmp_path_factory.mktemp('served') / 'run'
    tiny_served.write(workdir, base_dir)
    return workdir


def pytest_collection_modifyitems(items):
    """Files with most slow tests first, so that no worker is left with one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker('slow'))
    items.sort(key=lambda item: -slow[item.path])


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
