"""The precision of float32 matrix products.

Without a setting, XLA rounds their operands: to bfloat16 on TPUs, to TF32 on GPUs, never on CPUs.
The MLLM keeps that default, for speed. Everything else is computed at `config.precision`, because
rounded products move the estimates of mutual information, the discrepancies and the ranks.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable

import jax

PRECISIONS = ('float32', 'tensorfloat32', 'bfloat16', 'default')  # choices of config.precision
# JAX's setting where the outermost function of `at_precision` was called; () outside of all
_OUTSIDE: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar('outside', default=())


def at_precision(fn: Callable, precision: str) -> Callable:
    """Trace a function with a precision of its matrix products.

    Args:
      fn: a function that JAX traces.
      precision: one of PRECISIONS. 'default' is XLA's choice for the device.

    Returns:
      A function with the same signature.
    """
    @functools.wraps(fn)
    def traced(*args, **kwargs):
        # explicit: a gradient of a product without precision has that of the code around it
        outside = _OUTSIDE.get() or (jax.default_matmul_precision.value or 'default',)
        token = _OUTSIDE.set(outside)
        try:
            with jax.default_matmul_precision(precision):
                return fn(*args, **kwargs)
        finally:
            _OUTSIDE.reset(token)

    return traced


exact_products = functools.partial(at_precision, precision='float32')


def mllm_precision(method: Callable) -> Callable:
    """Trace a method of the MLLM with the setting of JAX that `at_precision` replaced.

    Unless the process chose another (JAX_DEFAULT_MATMUL_PRECISION), that is XLA's default.
    """
    @functools.wraps(method)
    def traced(*args, **kwargs):
        outside = _OUTSIDE.get()
        with jax.default_matmul_precision(*outside) if outside else contextlib.nullcontext():
            return method(*args, **kwargs)

    return traced
