"""The one place that says jit, pmap or shard_map, and puts batches and parameters on devices."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from tpad_jax.errors import InputError
from tpad_jax.types import Batch

AXIS = 'data'
MODEL = 'model'
ITEMS = r'(^|/)recommender/fusion/id$'  # the table that grows with the catalogue

# How an array of a state lies on the axis 'model': the first rule whose pattern is found in its
# path and whose parts are whole decides. An optimiser's moments have the path of their parameter at
# the end of their own. V+1 rows that do not divide leave the table to its columns; one for which
# neither fits has no rule.
# A checkpoint's decoder is cut so that a layer needs one sum over 'model' behind its attention and
# one behind its MLP; kernels are stacked over layers, [layers, in, out].
LAYERS = r'(^|/)base/decoder/layers/'
RULES = (
    (ITEMS, PartitionSpec(MODEL, None)),
    (ITEMS, PartitionSpec(None, MODEL)),
    (LAYERS + r'(attention/[qkv]|gate|up)/kernel$', PartitionSpec(None, None, MODEL)),
    (LAYERS + r'(attention/o|down)/kernel$', PartitionSpec(None, MODEL, None)),
    (rf'^(?!.*{ITEMS})', PartitionSpec()),
)


def compiled(fn: Callable, platform: str | None = None, **options) -> Callable:
    """jax.jit, which on CPU stops at LLVM's first level: half the compile time, the same speed.

    XLA_FLAGS that name a level go before. `platform`: compiled for, None: this process's own.
    """
    level = 'xla_backend_optimization_level'
    quick = ((platform or jax.default_backend()) == 'cpu'
             and level not in os.environ.get('XLA_FLAGS', ''))
    return jax.jit(fn, compiler_options={level: 1} if quick else None, **options)


@dataclass(frozen=True)
class Devices:
    """How a step is spread over devices.

    Attributes:
      how: 'jit' (one device), 'pmap' or 'shard_map'.
      devices: the devices used, in batch order, those of a process beside each other.
      model: neighbours that share one part of the batch and hold a part of each sharded parameter.
      processes: whose devices these are, equally many of each.
    """

    how: str
    devices: tuple
    model: int = 1
    processes: int = 1

    @property
    def shards(self) -> int:
        """Parts a batch is cut in."""
        return len(self.devices) // self.model

    def drawn_here(self, accumulate: int = 1) -> dict:
        """Which rows of a batch this process draws and how they are cut, as data/batches.py takes
        it; each device's share in `accumulate` parts.
        """
        return dict(processes=self.processes, shards=self.shards // self.processes * accumulate,
                    process=jax.process_index() if self.processes > 1 else 0)

    @property
    def own(self) -> 'Devices':
        """Devices of this process alone, for what each process does for itself."""
        if self.processes == 1:
            return self
        mine = tuple(d for d in self.devices if d.process_index == jax.process_index())
        how = 'jit' if len(mine) == 1 else self.how
        return Devices(how, mine, self.model)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the devices: 'data', and 'model' where parameters are sharded."""
        if self.model == 1:
            return Mesh(np.array(self.devices), (AXIS,))
        return Mesh(np.array(self.devices).reshape(-1, self.model), (AXIS, MODEL))

    def lift(self, step: Callable) -> Callable:
        """The step (state, batch, catalogue, *, axis) compiled for these devices; state is donated.

        State and catalogue have no device axis whichever way, so a checkpoint fits all three.
        """
        lifted = partial(compiled, platform=self.devices[0].platform, donate_argnums=0)
        if self.how == 'jit':
            return lifted(partial(step, axis=None))
        if self.how == 'pmap':
            return jax.pmap(partial(step, axis=AXIS), axis_name=AXIS, in_axes=(None, 0, None),
                            out_axes=None, donate_argnums=0, devices=self.devices)
        if self.shards == 1:  # and nothing to map over
            step = partial(step, axis=None)
        else:
            shared, split = PartitionSpec(), PartitionSpec(AXIS)
            # Only 'data' is the step's own affair; what 'model' needs, the compiler adds.
            # check_vma=False: the step averages gradients itself (True would sum them already)
            step = jax.shard_map(partial(step, axis=AXIS), mesh=self.mesh,
                                 in_specs=(shared, split, shared), out_specs=shared,
                                 axis_names={AXIS}, check_vma=False)

        def placed(*args):
            out = step(*args)
            return jax.lax.with_sharding_constraint(out, self.shardings(out))

        return lifted(step if self.model == 1 else placed)

    def split(self):
        """Where a batch lies: its rows in as many parts as there are shards."""
        if self.how == 'jit':
            return SingleDeviceSharding(self.devices[0])
        return NamedSharding(self.mesh, PartitionSpec(AXIS))

    def shardings(self, tree):
        """Where each array of a tree lies when it is shared: whole everywhere, or by `RULES`.

        Raises:
          InputError: no rule fits an array.
        """
        if self.how == 'jit':
            return jax.tree.map(lambda _: SingleDeviceSharding(self.devices[0]), tree)

        def sharding(path, x):
            if self.model == 1:
                return NamedSharding(self.mesh, PartitionSpec())
            path = jax.tree_util.keystr(path, simple=True, separator='/')
            return NamedSharding(self.mesh, _rule(path, np.shape(x), self.model))

        return jax.tree_util.tree_map_with_path(sharding, tree)

    def share(self, tree):
        """The same arrays for every part of the batch, each device with its part of them.

        Every process gives the same.
        """
        if self.processes == 1:
            return jax.device_put(tree, self.shardings(tree))
        return jax.tree.map(_laid, tree, self.shardings(tree))

    def local(self, tree):
        """Shared arrays whole and as this process's own; what they are already with one process."""
        if self.processes == 1:
            return tree
        whole = NamedSharding(self.mesh, PartitionSpec())
        tree = jax.tree.map(lambda x: jax.device_put(x, whole), tree)
        return jax.tree.map(lambda x: jnp.asarray(np.asarray(x.addressable_data(0))), tree)

    def place(self, batch: dict) -> Batch:
        """A host batch {field: numpy [shards * b, ...]} on the devices; returns at once.

        Each of several processes gives the rows of its own devices.
        """
        batch = Batch.of(batch)
        if self.processes > 1:
            lay = partial(jax.make_array_from_process_local_data, self.split())
            return jax.tree.map(lay, batch)
        if self.how == 'pmap':
            batch = jax.tree.map(lambda x: x.reshape(self.shards, -1, *x.shape[1:]), batch)
        return jax.device_put(batch, self.split())


def choose(parallel: str, count: int, model: int = 1, among=None) -> Devices:
    """Devices for `config.parallel`, `config.devices` (0: all) and `config.model_shards`.

    `among`: the devices there are, None: this process's. Those of another machine's topology do to
    compile for it, and for arithmetic anything that can be counted. They are one process's.

    Of several processes each brings as many; devices that share a parameter are of one process.

    Raises:
      InputError: no such way, more devices asked for than there are, or no whole parts of them; or
        several processes that have unequal numbers of devices or are to go another way than
        shard_map.
    """
    ways = ('auto', 'jit', 'pmap', 'shard_map')
    if parallel not in ways:
        raise InputError(f'config.parallel={parallel!r} is unknown; choose {", ".join(ways)}')
    local = list(jax.local_devices() if among is None else among)
    if not 0 <= count <= len(local):
        there = 'this process has' if among is None else 'there are'
        raise InputError(f'config.devices={count}, but {there} {len(local)}; '
                         'choose at most that many, or 0 for all')
    count = count or len(local)
    if model < 1 or (model > 1 and count % model):
        raise InputError(f'config.model_shards={model} does not divide the {count} devices; choose '
                         'a divisor of their number, or 1 to keep parameters whole')
    how, processes = parallel, jax.process_count() if among is None else 1
    if how == 'auto':
        how = 'shard_map' if model > 1 or processes > 1 else 'jit' if count == 1 else 'pmap'
    if model > 1 and how != 'shard_map':
        raise InputError(f'config.model_shards={model} needs shard_map, not {how}; set '
                         'config.parallel=shard_map or auto')
    if processes == 1:
        return Devices(how, tuple(local[:1] if how == 'jit' else local[:count]), model)
    if how != 'shard_map':
        raise InputError(f'config.parallel={how} is for one process, and there are {processes}; '
                         'set it to shard_map or auto')
    each = [[d for d in jax.devices() if d.process_index == p] for p in range(processes)]
    if any(len(found) < count or len(found) != len(each[0]) for found in each):
        raise InputError(f'the processes have {", ".join(str(len(found)) for found in each)} '
                         'devices; give each the same number')
    return Devices(how, tuple(d for found in each for d in found[:count]), model, processes)


def _laid(x, sharding):
    """An array that every process has, where a sharding over all of them wants it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def _rule(path: str, shape: tuple, model: int) -> PartitionSpec:
    found = [spec for pattern, spec in RULES if re.search(pattern, path)]
    for spec in found:
        if all(n % model == 0 for n, axis in zip(shape, spec, strict=False) if axis == MODEL):
            return spec
    raise InputError(f'no rule of parallel.RULES fits {path} {list(shape)} in {model} parts; '
                     'choose config.model_shards to divide its rows or its width')
