"""Eight fake CPU devices and a quick compiler for every test."""

import os

FLAGS = ('--xla_force_host_platform_device_count=8',
         # a fifth of the compile time, which is most of what these tests would take
         '--xla_backend_optimization_level=0', '--xla_cpu_use_fusion_emitters=false')
os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *FLAGS])
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
