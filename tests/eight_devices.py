"""Eight fake CPU devices and a quick compiler, for the jax that is imported behind it."""

import os
from pathlib import Path

# a fifth of the compile time, which is most of what the tests would take
QUICK = ('--xla_backend_optimization_level=0', '--xla_cpu_use_fusion_emitters=false',
         '--xla_llvm_disable_expensive_passes=true', '--xla_cpu_parallel_codegen_split_count=1')
# a collective that waits for 40 seconds for its eight threads would end the process, and they wait
# for a core of a busy machine
PATIENT = ('--xla_cpu_collective_call_warn_stuck_timeout_seconds=300',
           '--xla_cpu_collective_call_terminate_timeout_seconds=800')
FLAGS = ('--xla_force_host_platform_device_count=8', *QUICK, *PATIENT)
DEFAULTS = {
    'JAX_PLATFORMS': 'cpu', 'TF_CPP_MIN_LOG_LEVEL': '2',
    # a worker is on each core, and threads that wait for work do so in a loop
    'OPENBLAS_NUM_THREADS': '1', 'OMP_NUM_THREADS': '1',
    # what is compiled is kept, here and for what is started from here: runs are many and alike
    'JAX_COMPILATION_CACHE_DIR': str(Path(__file__).parent.parent / '.pytest_cache' / 'compiled'),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}


def environment() -> dict[str, str]:
    """Variables to lay over os.environ; what is set there already stays."""
    flags = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS])
    return {name: os.environ.get(name, x) for name, x in DEFAULTS.items()} | {'XLA_FLAGS': flags}
