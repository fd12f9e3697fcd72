"""The one place that says jit, pmap or shard_map, and puts batches on devices."""

import os
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpad_jax.errors import InputError
from tpad_jax.types import Batch

AXIS = 'data'


def compiled(fn: Callable, **options) -> Callable:
    """jax.jit, which on CPU stops at LLVM's first level: half the compile time, the same speed.

    XLA_FLAGS that name a level go before.
    """
    level = 'xla_backend_optimization_level'
    quick = jax.default_backend() == 'cpu' and level not in os.environ.get('XLA_FLAGS', '')
    return jax.jit(fn, compiler_options={level: 1} if quick else None, **options)


@dataclass(frozen=True)
class Devices:
    """How a step is spread over this process's devices.

    Attributes:
      how: 'jit' (one device), 'pmap' or 'shard_map'.
      devices: the devices used, in batch order.
    """

    how: str
    devices: tuple

    @property
    def shards(self) -> int:
        """Parts a batch is cut in."""
        return len(self.devices)

    @property
    def mesh(self) -> Mesh:
        """The one-axis mesh of the devices."""
        return Mesh(np.array(self.devices), (AXIS,))

    def lift(self, step: Callable) -> Callable:
        """The step (state, batch, catalogue, *, axis) compiled for these devices; state is donated.

        State and catalogue have no device axis whichever way, so a checkpoint fits all three.
        """
        if self.how == 'jit':
            return compiled(partial(step, axis=None), donate_argnums=0)
        step = partial(step, axis=AXIS)
        if self.how == 'pmap':
            return jax.pmap(step, axis_name=AXIS, in_axes=(None, 0, None), out_axes=None,
                            donate_argnums=0, devices=self.devices)
        shared, split = PartitionSpec(), PartitionSpec(AXIS)
        # check_vma=False: the step averages gradients itself (with True they come summed already)
        return compiled(jax.shard_map(step, mesh=self.mesh, in_specs=(shared, split, shared),
                                      out_specs=shared, check_vma=False), donate_argnums=0)

    def share(self, tree):
        """The same arrays on every device."""
        if self.how == 'jit':
            return jax.device_put(tree, self.devices[0])
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec()))

    def place(self, batch: dict) -> Batch:
        """A host batch {field: numpy [shards * b, ...]} on the devices; returns at once."""
        names = {f.name for f in fields(Batch)}
        batch = Batch(**{n: x for n, x in batch.items() if n in names})
        if self.how == 'jit':
            return jax.device_put(batch, self.devices[0])
        if self.how == 'pmap':
            batch = jax.tree.map(lambda x: x.reshape(self.shards, -1, *x.shape[1:]), batch)
        return jax.device_put(batch, NamedSharding(self.mesh, PartitionSpec(AXIS)))


def choose(parallel: str, count: int) -> Devices:
    """Devices for `config.parallel` and `config.devices` (0: all of this process).

    Raises:
      InputError: no such way, or more devices asked for than there are.
    """
    ways = ('auto', 'jit', 'pmap', 'shard_map')
    if parallel not in ways:
        raise InputError(f'config.parallel={parallel!r} is unknown; choose {", ".join(ways)}')
    local = jax.local_devices()
    if not 0 <= count <= len(local):
        raise InputError(f'config.devices={count}, but this process has {len(local)}; '
                         'choose at most that many, or 0 for all')
    how = parallel
    if how == 'auto':
        how = 'jit' if (count or len(local)) == 1 else 'pmap'
    return Devices(how, tuple(local[:1] if how == 'jit' else local[:count or None]))
