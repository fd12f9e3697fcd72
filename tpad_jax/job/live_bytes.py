"""An estimate of a function's temporary memory from its operations."""

import math
from collections import defaultdict

from jax.extend.core import Literal

from tpad_jax.training.profiling import inner_jaxprs

# Operations whose result a compiler makes inside the loop that reads it,
FREE = frozenset({'reshape', 'squeeze', 'expand_dims', 'transpose', 'copy', 'rev'})
CHEAP = FREE | frozenset({
    'add', 'sub', 'mul', 'neg', 'max', 'min', 'abs', 'sign', 'select_n', 'convert_element_type',
    'broadcast_in_dim', 'iota', 'eq', 'ne', 'lt', 'le', 'gt', 'ge', 'and', 'or', 'not', 'xor',
    'stop_gradient', 'integer_pow', 'square', 'shift_right_logical', 'shift_left', 'is_finite'})
# ... those where it does so if nothing else reads the result,
ELEMENTWISE = CHEAP | frozenset({
    'div', 'exp', 'exp2', 'log', 'log1p', 'expm1', 'tanh', 'logistic', 'erf', 'erf_inv', 'rsqrt',
    'sqrt', 'pow', 'sin', 'cos', 'rem', 'clamp', 'floor', 'round', 'nextafter', 'random_bits'})
# ... and those that can be such a loop.
READERS = ELEMENTWISE | frozenset({
    'reduce_sum', 'reduce_max', 'reduce_min', 'reduce_and', 'reduce_or', 'argmax', 'argmin'})


def live_bytes(jaxpr) -> int:
    """Estimate the bytes that exist at once while operations run, one after the other.

    Inputs and outputs are not counted: a step's outputs take the place of its inputs. A result that
    a compiler makes inside the loop that reads it takes no memory, but what it is made of exists
    until then.

    Args:
      jaxpr: jax.extend.core.Jaxpr, or any with `eqns` and `outvars`.
    """
    readers = defaultdict(list)
    for equation in jaxpr.eqns:
        for variable in _variables(equation.invars):
            readers[variable].append(equation.primitive.name)
    kept = set(_variables(jaxpr.outvars))

    def fused(equation):
        name, outvars = equation.primitive.name, equation.outvars
        if len(outvars) != 1 or outvars[0] in kept or name not in ELEMENTWISE:
            return False
        read_by = readers[outvars[0]]
        return name in FREE or (set(read_by) <= READERS and (name in CHEAP or len(read_by) == 1))

    last = {}
    for number, equation in reversed(list(enumerate(jaxpr.eqns))):
        end = last.get(equation.outvars[0], number) if fused(equation) else number
        for variable in _variables(equation.invars):
            last[variable] = max(last.get(variable, 0), end)
    live, most, ends = 0, 0, defaultdict(int)
    for number, equation in enumerate(jaxpr.eqns):
        for out in () if fused(equation) else equation.outvars:
            if out not in kept:
                live += bytes_of(out.aval)
                ends[last.get(out, number)] += bytes_of(out.aval)
        inside = max((live_bytes(inner) for inner in inner_jaxprs(equation)), default=0)
        most = max(most, live + inside)
        live -= ends[number]
    return most


def _variables(values):
    return [x for x in values if not isinstance(x, Literal)]


def bytes_of(x) -> int:
    """The bytes of an array, a shape or an abstract value; 0 of what has no size."""
    dtype = getattr(x, 'dtype', None)
    return math.prod(x.shape) * getattr(dtype, 'itemsize', 4) if dtype is not None else 0
