"""Eight fake CPU devices and a quick compiler for every test."""

import gc
import os
from pathlib import Path

import pytest

FLAGS = ('--xla_force_host_platform_device_count=8',
         # a fifth of the compile time, which is most of what these tests would take
         '--xla_backend_optimization_level=0', '--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS])
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
# What is compiled is kept, here and for what tests start: runs are many and alike.
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR',
                      str(Path(__file__).parent.parent / '.pytest_cache' / 'compiled'))
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0')
# Tracing makes millions of objects that live; not to look through them time and again.
gc.set_threshold(100_000, 50, 100)


@pytest.fixture(scope='module', autouse=True)
def _forgotten():
    """What a module traced and compiled goes with it, or workers come to hold gigabytes."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope='module')
def undrawn():
    """For runs whose figures nobody looks at: none is drawn, which takes seconds each."""
    from tpad_jax import results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(results, 'draw_figures', lambda *_: [])
        yield
