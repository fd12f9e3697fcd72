"""The only module that chooses between jit, pmap and shard_map and places arrays on devices."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tpad_jax.core.precision import at_precision
from tpad_jax.errors import refuse_if
from tpad_jax.types import Batch

AXIS = 'data'
MODEL = 'model'
ITEMS = r'(^|/)recommender/fusion/id$'  # the table that grows with the catalogue

# How an array of a state is partitioned along the axis 'model'. The first rule applies that matches
# the array's path and cuts it into equal parts. The path of an optimiser's moments ends with the
# path of their parameter. The item table is cut by columns where its V+1 rows do not divide. An
# array that fits no rule is an error.
# The decoder of a checkpoint is cut so that a layer needs one sum over 'model' after its attention
# and one after its MLP. Kernels are stacked over layers, [layers, in, out].
LAYERS = r'(^|/)base/decoder/layers/'
RULES = (
    (ITEMS, PartitionSpec(MODEL, None)),
    (ITEMS, PartitionSpec(None, MODEL)),
    (LAYERS + r'(attention/[qkv]|gate|up)/kernel$', PartitionSpec(None, None, MODEL)),
    (LAYERS + r'(attention/o|down)/kernel$', PartitionSpec(None, MODEL, None)),
    (rf'^(?!.*{ITEMS})', PartitionSpec()))


# of the compiler on CPU, for a program that runs a few times; configs set the same by `xla_flags`
QUICK = {'xla_backend_optimization_level': 0, 'xla_cpu_use_fusion_emitters': False,
         'xla_llvm_disable_expensive_passes': True, 'xla_cpu_parallel_codegen_split_count': 1}


def compiled(fn: Callable, platform: str | None = None, precision: str = 'float32',
             seldom: bool = False, **options) -> Callable:
    """Compile a function with jax.jit at a precision of float32 products.

    On CPU, LLVM stops at its first optimisation level: half the compile time, the same speed. A
    level that XLA_FLAGS names has priority.

    Args:
      fn: the function.
      platform: the platform to compile for. None: the default backend.
      precision: of products outside the MLLM, one of PRECISIONS.
      seldom: whether it is called a few times only. On CPU it is then compiled in a quarter of the
        time and takes about twice as long.
      **options: more arguments of jax.jit.

    Returns:
      The jitted function.
    """
    level, flags = next(iter(QUICK)), os.environ.get('XLA_FLAGS', '')
    if (platform or jax.default_backend()) == 'cpu' and level not in flags:
        options['compiler_options'] = QUICK if seldom else {level: 1}
    return jax.jit(at_precision(fn, precision), **options)


@dataclass(frozen=True)
class Devices:
    """How a step is distributed over devices.

    Attributes:
      how: 'jit' (one device), 'pmap' or 'shard_map'.
      devices: the devices used, in batch order. The devices of a process are adjacent.
      model: adjacent devices that share one part of the batch. Each holds a part of every sharded
        parameter.
      processes: number of processes. Each has the same number of devices.
      precision: of float32 products outside the MLLM, one of PRECISIONS.
    """

    how: str
    devices: tuple
    model: int = 1
    processes: int = 1
    precision: str = 'float32'

    @property
    def shards(self) -> int:
        """Number of parts that a batch is cut into."""
        return len(self.devices) // self.model

    def drawn_here(self, accumulate: int = 1) -> dict:
        """Return the rows of a batch that this process draws, as arguments of data/batches.py.

        Args:
          accumulate: parts into which each device cuts its rows.
        """
        return dict(processes=self.processes, shards=self.shards // self.processes * accumulate,
                    process=jax.process_index() if self.processes > 1 else 0)

    @property
    def own(self) -> 'Devices':
        """The devices of this process, for work that processes do not share."""
        if self.processes == 1:
            return self
        mine = tuple(d for d in self.devices if d.process_index == jax.process_index())
        how = 'jit' if len(mine) == 1 else self.how
        return Devices(how, mine, self.model, precision=self.precision)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the devices: axis 'data', and axis 'model' where parameters are sharded."""
        if self.model == 1:
            return Mesh(np.array(self.devices), (AXIS,))
        return Mesh(np.array(self.devices).reshape(-1, self.model), (AXIS, MODEL))

    def lift(self, step: Callable, seldom: bool = False) -> Callable:
        """Compile a step for these devices. The state is donated.

        State and catalogue never have a device axis, so a checkpoint fits jit, pmap and shard_map.

        Args:
          step: (state, batch, catalogue, *, axis) -> new state.
          seldom: see `compiled`.

        Returns:
          (state, batch, catalogue) -> new state.
        """
        lifted = partial(compiled, platform=self.devices[0].platform, donate_argnums=0,
                         precision=self.precision, seldom=seldom)
        if self.how == 'jit':
            return lifted(partial(step, axis=None))
        if self.how == 'pmap':
            step = at_precision(partial(step, axis=AXIS), self.precision)
            return jax.pmap(step, AXIS, in_axes=(None, 0, None), out_axes=None, donate_argnums=0,
                            devices=self.devices)
        if self.shards == 1:  # the batch stays in one part
            step = partial(step, axis=None)
        else:
            shared, split = PartitionSpec(), PartitionSpec(AXIS)
            # The step handles 'data' itself; the compiler adds communication along 'model'.
            # check_vma=False: the step averages gradients itself (True would already sum them)
            step = jax.shard_map(
                partial(step, axis=AXIS), mesh=self.mesh, in_specs=(shared, split, shared),
                out_specs=shared, axis_names={AXIS}, check_vma=False)

        def placed(*args):
            out = step(*args)
            return jax.lax.with_sharding_constraint(out, self.shardings(out))

        return lifted(step if self.model == 1 else placed)

    def split(self):
        """Return the sharding of a batch: its rows in as many parts as there are shards."""
        if self.how == 'jit':
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    def shardings(self, tree):
        """Return the sharding of each shared array: a copy on every device, or parts by `RULES`.

        Args:
          tree: arrays, or shapes.

        Raises:
          InputError: an array fits no rule.
        """
        if self.how == 'jit':
            return jax.tree.map(lambda _: SingleDeviceSharding(self.devices[0]), tree)

        def sharding(path, x):
            if self.model == 1:
                return NamedSharding(self.mesh, PartitionSpec())
            path = jax.tree_util.keystr(path, simple=True, separator='/')
            spec, shape = rule(path, np.shape(x), self.model), list(np.shape(x))
            refuse_if(spec is None, f'config.model_shards={self.model}: does not divide {path} '
                      f'{shape}. Expected a divisor of its rows or width. Fix: choose one')
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def share(self, tree):
        """Place arrays that every part of the batch reads, each by its sharding.

        Args:
          tree: arrays, the same in every process.
        """
        if self.processes == 1:
            return jax.device_put(tree, self.shardings(tree))
        return jax.tree.map(_place_shared, tree, self.shardings(tree))

    def local(self, tree):
        """Copy shared arrays completely into this process. With one process, return them as is."""
        if self.processes == 1:
            return tree
        everywhere = NamedSharding(self.mesh, PartitionSpec())
        tree = jax.tree.map(lambda x: jax.device_put(x, everywhere), tree)
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x.addressable_data(0))), tree)

    def place(self, batch: dict) -> Batch:
        """Send a host batch to the devices, without waiting for the transfer.

        Args:
          batch: {field: numpy [shards * b, ...]}. With several processes, the rows of this
            process's devices.
        """
        batch = Batch.of(batch)
        if self.processes > 1:
            place = partial(jax.make_array_from_process_local_data, self.split())
            return jax.tree.map(place, batch)
        if self.how == 'pmap':
            batch = jax.tree.map(lambda x: x.reshape(
                self.shards, len(x) // self.shards, *x.shape[1:]), batch)
        return jax.device_put(batch, self.split())


def choose(parallel: str, count: int, model: int = 1, among=None,
           precision: str = 'float32') -> Devices:
    """Choose the devices of a run.

    Every process brings the same number of devices. Devices that share a parameter belong to one
    process.

    Args:
      parallel: config.parallel.
      count: config.devices, devices per process. 0: all.
      model: config.model_shards.
      among: devices to choose from, treated as those of one process. Devices of another machine's
        topology serve to compile for it, and any countable objects serve for arithmetic. None: the
        devices of this process.
      precision: config.precision.

    Raises:
      InputError: more devices than there are, a number that `model` does not
        divide, processes with different numbers of devices, or several processes without shard_map.
    """
    local = list(jax.local_devices() if among is None else among)
    refuse_if(not 0 <= count <= len(local), f'config.devices={count}: {len(local)} devices are '
              f'available. Expected 0 to {len(local)}. Fix: choose a number in this range; 0: all')
    count = count or len(local)
    refuse_if(model < 1 or count % model, f'config.model_shards={model}: does not divide the '
              f'{count} devices. Fix: choose a divisor, or 1 to copy parameters to every device')
    how, processes = parallel, jax.process_count() if among is None else 1
    if how == 'auto':
        how = 'shard_map' if model > 1 or processes > 1 else 'jit' if count == 1 else 'pmap'
    refuse_if(model > 1 and how != 'shard_map', f'config.model_shards={model}: config.parallel='
              f'{how!r} cannot shard parameters. Fix: set config.parallel=shard_map or auto')
    if processes == 1:
        return Devices(how, tuple(local[:1] if how == 'jit' else local[:count]), model,
                       precision=precision)
    refuse_if(how != 'shard_map', f'config.parallel={how!r}: works in one process, but there are '
              f'{processes}. Fix: set config.parallel=shard_map or auto')
    each = [[d for d in jax.devices() if d.process_index == p] for p in range(processes)]
    counts = [len(devices) for devices in each]
    refuse_if(min(counts) < count or len(set(counts)) > 1, f'config.devices={count}: the processes '
              f'have {", ".join(map(str, counts))} devices. Fix: start each with the same number')
    return Devices(how, tuple(d for devices in each for d in devices[:count]), model, processes,
                   precision)


def _place_shared(x, sharding):
    """Place an array that every process has by a sharding over all processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def rule(path: str, shape: tuple, model: int) -> PartitionSpec | None:
    """Return how a shared array is cut into `model` parts by `RULES`, or None if no rule fits.

    Args:
      path: of the array.
      shape: of the array.
      model: number of parts.
    """
    for pattern, spec in RULES:
        if re.search(pattern, path) and all(
                n % model == 0 for n, axis in zip(shape, spec, strict=False) if axis == MODEL):
            return spec
    return None
