"""The cost of a step: products and live bytes counted, time and memory measured, a trace."""

import math
import resource
import sys
import time
import timeit
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from tpad_jax.core import files

# Dense bfloat16 operations a second of one device, from the vendors' data sheets.
PEAKS = {'NVIDIA H200': 989e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA A100-SXM4-80GB': 312e12,
         'NVIDIA A100-SXM4-40GB': 312e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12,
         'TPU v5': 459e12, 'TPU v6 lite': 918e12}
SIDE = 2048  # of the square product that measures the peak of a device not in PEAKS
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
COMPILING = '/jax/core/compile/backend_compile_duration'
_compiled: dict[int, int] = {}  # number of programs compiled so far, by thread


def operations(fn: Callable, *args) -> float:
    """Count the floating point operations of the matrix products and convolutions of fn(*args).

    They are counted in the jaxpr. A product of [M, K] and [K, N] has 2 M K N, the body of a scan
    counts as often as it runs (XLA's cost analysis counts it once), and of branches the largest
    counts. Recomputation in a backward pass counts too. A custom kernel (attention='cudnn') does
    not count.

    Args:
      fn: a function that JAX can trace.
      *args: arrays, or their shapes.

    Returns:
      Number of operations.
    """
    return _products(jax.make_jaxpr(fn)(*args).jaxpr)


def _products(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ('dot_general', 'conv_general_dilated'):
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * _each(eqn)
            continue
        if inner := [_products(jaxpr) for jaxpr in inner_jaxprs(eqn)]:
            total += (eqn.params['length'] * sum(inner) if name == 'scan'
                      else max(inner) if name == 'cond' else sum(inner))
    return total


def inner_jaxprs(eqn) -> list:
    """List the jaxprs of an operation: a loop's body, the branches of a condition."""
    values = jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns'))
    return [getattr(x, 'jaxpr', x) for x in values if hasattr(x, 'eqns')]


def _each(eqn) -> float:
    """Pairs of a multiplication and an addition for one output of a product or convolution."""
    left, right = (x.aval.shape for x in eqn.invars[:2])
    if eqn.primitive.name == 'dot_general':
        (contracted, _), _ = eqn.params['dimension_numbers']
        return math.prod(left[i] for i in contracted)
    return math.prod(right) / right[eqn.params['dimension_numbers'].rhs_spec[0]]


def peak(device) -> tuple[float, str]:
    """Peak rate of one device, from its data sheet or measured by a large product.

    Args:
      device: of jax.devices().

    Returns:
      Operations a second, and a description of the peak.
    """
    if device.device_kind in PEAKS:
        return PEAKS[device.device_kind], f'bfloat16 peak of one {device.device_kind}'
    with jax.default_device(device):
        x = jnp.ones((SIDE, SIDE))
        product = jax.jit(jnp.matmul)
        times = timeit.repeat(lambda: product(x, x).block_until_ready(), number=1, repeat=6)
    return 2 * SIDE**3 / min(times[1:]), f'float32 product of {SIDE} x {SIDE}'


def memory(devices) -> tuple[int, str]:
    """Peak memory so far, in bytes: of the fullest device, or of this process on a CPU.

    Args:
      devices: of jax.devices().

    Returns:
      Number of bytes, and a description of the owner.
    """
    stats = [usage for device in devices if (usage := device.memory_stats())]
    if stats:
        return max(usage['peak_bytes_in_use'] for usage in stats), 'a device'
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 'this process'


class CompileWatch:
    """Warns on stderr when a stage compiles its step again, and names the field that changed.

    Args:
      stage: name of the stage.
      batch: a host batch of the usual shapes.
    """

    def __init__(self, stage: str, batch: dict):
        self._stage, self._usual, self._thread = stage, _shapes(batch), get_ident()
        if not _compiled:
            jax.monitoring.register_event_duration_secs_listener(_count)
        _compiled.setdefault(self._thread, 0)

    @contextmanager
    def step(self, number: int, batch: dict, new: bool):
        """Watch one step.

        Args:
          number: of the step.
          batch: its host batch.
          new: whether the step has yet to be compiled.
        """
        before = _compiled[self._thread]
        yield
        if new or _compiled[self._thread] == before:
            return
        changes = [f'{name} is {shape}, was {self._usual.get(name)}'
                   for name, shape in _shapes(batch).items() if self._usual.get(name) != shape]
        print(f'Warning: stage {self._stage} compiled its step again at step {number} and waited '
              f'for it: {"; ".join(changes) or "its batch has the usual shapes"}', file=sys.stderr)


def _shapes(batch):
    return {jax.tree_util.keystr(path, simple=True): f'{np.result_type(x)}{list(np.shape(x))}'
            for path, x in jax.tree_util.tree_leaves_with_path(batch)}


def _count(event: str, seconds: float, **about):
    if event == COMPILING:
        _compiled[get_ident()] = _compiled.get(get_ident(), 0) + 1


@dataclass
class Profile:
    """A few steps of a stage, traced and timed. No other step is waited for; without steps, none.

    They follow the second step of a process, when everything is compiled, and are waited for
    together.

    Attributes:
      directory: gets the trace, as `<stage>`, and the numbers, as `<stage>.json`.
      steps: how many.
      stage: its name.
      devices: devices.Devices.
      operations: of one step over all devices.
    """

    directory: Path = Path()
    steps: int = 0
    stage: str = ''
    devices: Any = None
    operations: float = 0.0
    _begun: tuple = ()

    def count(self, step: Callable, *args) -> None:
        """Count the operations of a step.

        Args:
          step: the step function of one process.
          *args: its arguments, arrays or shapes.
        """
        self.operations = self.devices.processes * operations(step, *args)

    def after(self, number: int, second: int, state, last: bool) -> None:
        """Start, continue or end the trace; call it after every step.

        Args:
          number: of the step.
          second: number of this process's second step.
          state: arrays to wait for.
          last: whether no step follows.
        """
        if self.steps and number == second and not last:
            jax.block_until_ready(state)
            self.directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self.directory / self.stage)
            self._begun = number, time.perf_counter()
        elif self._begun and (last or number == self._begun[0] + self.steps):
            jax.block_until_ready(state)
            begun, started = self._begun
            seconds = (time.perf_counter() - started) / (number - begun)
            self.close()
            self._report(begun + 1, number, seconds)

    def close(self) -> None:
        """End a trace in progress."""
        if self._begun:
            self._begun = ()
            jax.profiler.stop_trace()

    def _report(self, first, last, seconds):
        local = self.devices.own.devices
        used, owner = memory(local)
        rate, description = peak(local[0])
        # simulated devices are threads of one processor, which the product in `peak` used alone
        count = 1 if local[0].platform == 'cpu' else len(self.devices.devices)
        share = self.operations / seconds / count / rate
        if jax.process_index() > 0:
            return
        files.write_json(self.directory / f'{self.stage}.json', {
            'stage': self.stage, 'steps': [first, last], 'seconds': seconds,
            'operations': self.operations, 'share': share, 'peak': rate, 'peak of': description,
            'memory': used, 'memory of': owner, 'device': local[0].device_kind,
            'devices': len(self.devices.devices)})
        print(f'{self.stage}, steps {first} to {last}: {1e3 * seconds:.1f} ms each, '
              f'{self.operations / 1e9:.1f} GFLOP in products, {100 * share:.1f} % of the '
              f'{description} ({rate / 1e12:.3g} TFLOP/s); peak memory of {owner}: '
              f'{used / 2**30:.2f} GiB; trace: {self.directory / self.stage}', flush=True)


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
