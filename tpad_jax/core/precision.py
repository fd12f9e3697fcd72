"""The precision of float32 matrix products.

Without a setting, XLA rounds their operands: to bfloat16 on TPUs, to TF32 on GPUs, never on CPUs.
The MLLM keeps that default, for speed. Everything else is computed at `config.precision`, because
rounded products move the estimates of mutual information, the discrepancies and the ranks.
"""

import functools
from collections.abc import Callable

import jax

PRECISIONS = ('float32', 'tensorfloat32', 'bfloat16', 'default')  # choices of config.precision


def at_precision(fn: Callable, precision: str) -> Callable:
    """Trace a function with a precision of its matrix products; an inner call has priority.

    Args:
      fn: a function that JAX traces, or a method of a flax module.
      precision: one of PRECISIONS. 'default' is XLA's choice for the device.

    Returns:
      A function with the same signature.
    """
    @functools.wraps(fn)
    def traced(*args, **kwargs):
        with jax.default_matmul_precision(precision):
            return fn(*args, **kwargs)

    return traced


mllm_precision = functools.partial(at_precision, precision='default')
exact_products = functools.partial(at_precision, precision='float32')
