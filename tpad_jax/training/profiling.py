"""What a step costs: its matrix products counted, its time and memory measured, a trace kept."""

import math
import resource
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import get_ident
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr

from tpad_jax.core import files

# Dense bfloat16 products a second of one device, by the vendors' data sheets.
PEAKS = {'NVIDIA H200': 989e12, 'NVIDIA H100 80GB HBM3': 989e12, 'NVIDIA A100-SXM4-80GB': 312e12,
         'NVIDIA A100-SXM4-40GB': 312e12, 'TPU v4': 275e12, 'TPU v5 lite': 197e12,
         'TPU v5': 459e12, 'TPU v6 lite': 918e12}
SIDE = 2048  # of the product that stands for the peak of a device of no known one
COMPILING = '/jax/core/compile/backend_compile_duration'
_compiled: dict[int, int] = {}  # programs that were compiled so far, by thread


def operations(fn: Callable, *args) -> float:
    """Floating point operations of the matrix products and convolutions of fn(*args).

    They are read off its jaxpr: a product of [M, K] and [K, N] is 2 M K N, the body of a scan is
    counted as often as it runs, of branches the largest. What a backward pass computes again is
    counted again; a kernel that is no product of XLA's (attention='cudnn') is not seen.

    Args:
      fn: a function jax can trace. args: arrays, or their shapes.
    """
    return _products(jax.make_jaxpr(fn)(*args).jaxpr)


def _products(jaxpr) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name in ('dot_general', 'conv_general_dilated'):
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * _each(eqn)
            continue
        inner = [_products(x.jaxpr if isinstance(x, ClosedJaxpr) else x)
                 for value in eqn.params.values()
                 for x in (value if isinstance(value, list | tuple) else (value,))
                 if isinstance(x, ClosedJaxpr | Jaxpr)]
        if inner:
            total += (eqn.params['length'] * sum(inner) if name == 'scan'
                      else max(inner) if name == 'cond' else sum(inner))
    return total


def _each(eqn) -> float:
    """Multiplications and additions behind one number of a product or convolution, in pairs."""
    left, right = (x.aval.shape for x in eqn.invars[:2])
    if eqn.primitive.name == 'dot_general':
        (over, _), _ = eqn.params['dimension_numbers']
        return math.prod(left[i] for i in over)
    return math.prod(right) / right[eqn.params['dimension_numbers'].rhs_spec[0]]


def peak(device) -> tuple[float, str]:
    """Operations a second of one device: its data sheet's, or what a large product reaches on it.

    Args:
      device: one of jax's.

    Returns:
      Operations a second, and in words whose.
    """
    if device.device_kind in PEAKS:
        return PEAKS[device.device_kind], f'bfloat16 peak of one {device.device_kind}'
    with jax.default_device(device):
        x = jnp.ones((SIDE, SIDE))
        product = jax.jit(jnp.matmul)
        times = []
        for _ in range(6):
            begun = time.perf_counter()
            product(x, x).block_until_ready()
            times.append(time.perf_counter() - begun)
    return 2 * SIDE**3 / min(times[1:]), f'float32 product of {SIDE} x {SIDE}'


def memory(devices) -> tuple[int, str]:
    """The most bytes in use so far: of the fullest of `devices`, or of this process on a CPU."""
    stats = [found for d in devices if (found := d.memory_stats())]
    if stats:
        return max(found['peak_bytes_in_use'] for found in stats), 'a device'
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, 'this process'


class Watched:
    """Warns, on stderr, of a step that is compiled again, and says which field brought it about."""

    def __init__(self, stage: str, batch: dict):
        self._stage, self._usual, self._own = stage, _shapes(batch), get_ident()
        if not _compiled:
            jax.monitoring.register_event_duration_secs_listener(_count)
        _compiled.setdefault(self._own, 0)

    @contextmanager
    def step(self, number: int, batch: dict, new: bool):
        """Around step `number` on the host's `batch`; `new`: it has to be compiled."""
        before = _compiled[self._own]
        yield
        if new or _compiled[self._own] == before:
            return
        other = [f'{name} is {found}, was {self._usual.get(name)}'
                 for name, found in _shapes(batch).items() if self._usual.get(name) != found]
        print(f'Warning: stage {self._stage} compiled its step again at step {number} and waited '
              f'for it: {"; ".join(other) or "its batch has the shapes it had"}', file=sys.stderr)


def _shapes(batch):
    return {jax.tree_util.keystr(path, simple=True): f'{np.result_type(x)}{list(np.shape(x))}'
            for path, x in jax.tree_util.tree_leaves_with_path(batch)}


def _count(event: str, seconds: float, **about):
    del seconds, about
    if event == COMPILING:
        _compiled[get_ident()] = _compiled.get(get_ident(), 0) + 1


@dataclass
class Profile:
    """A few steps of a stage, traced and timed; nothing else of the run waits for them.

    They follow the second step of a sitting, when all is compiled, and are waited for as a whole.

    Attributes:
      directory: gets the trace, as `<stage>`, and the figures, as `<stage>.json`.
      steps: how many. stage: its name. devices: parallel.Devices.
      operations: of one step over all devices.
    """

    directory: Path
    steps: int
    stage: str
    devices: Any
    operations: float = 0.0
    _begun: tuple = ()

    def count(self, step: Callable, *args) -> None:
        """Count the operations of `step` on what one process gives it."""
        self.operations = self.devices.processes * operations(step, *args)

    def after(self, number: int, second: int, state, last: bool) -> None:
        """Call it behind every step: begins, goes on or ends, and then says what was found.

        Args:
          number: of the step. second: of this sitting's second. state: what to wait for.
          last: whether no step follows.
        """
        if number == second and not last:
            jax.block_until_ready(state)
            self.directory.mkdir(parents=True, exist_ok=True)
            jax.profiler.start_trace(self.directory / self.stage)
            self._begun = number, time.perf_counter()
        elif self._begun and (last or number == self._begun[0] + self.steps):
            jax.block_until_ready(state)
            begun, at = self._begun
            seconds = (time.perf_counter() - at) / (number - begun)
            self.abandon()
            self._say(begun + 1, number, seconds)

    def abandon(self) -> None:
        """End a trace that is going on."""
        if self._begun:
            self._begun = ()
            jax.profiler.stop_trace()

    def _say(self, begun, ended, seconds):
        own = self.devices.own.devices
        used, whose = memory(own)
        most, what = peak(own[0])
        # faked devices are threads of one processor, and the product above had all of it
        count = 1 if own[0].platform == 'cpu' else len(self.devices.devices)
        share = self.operations / seconds / count / most
        if jax.process_index() > 0:
            return
        files.write_json(self.directory / f'{self.stage}.json', {
            'stage': self.stage, 'steps': [begun, ended], 'seconds': seconds,
            'operations': self.operations, 'share': share, 'peak': most, 'peak of': what,
            'memory': used, 'memory of': whose, 'device': own[0].device_kind,
            'devices': len(self.devices.devices)})
        print(f'{self.stage}, steps {begun} to {ended}: {1e3 * seconds:.1f} ms each, '
              f'{self.operations / 1e9:.1f} GFLOP in products, {100 * share:.1f} % of the {what} '
              f'({most / 1e12:.3g} TFLOP/s); at most {used / 2**30:.2f} GiB of {whose}; '
              f'trace: {self.directory / self.stage}', flush=True)
