"""A pytree of many arrays as a few: what makes a checkpoint cheap to write, and damage visible.

Arrays held whole on every device are joined into one vector per dtype; a sharded array stays as it
is. An index names path, shape and dtype of every array in the order of the vectors, so the bundle
can be taken apart on another mesh, or by hand:
`vector[offset:offset + prod(shape)].reshape(shape)`. A digest goes with every joined array, because
a flipped bit in a chunk that does not compress is read back without any error.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from tpad_jax.core.digest import digest
from tpad_jax.errors import InputError


def join(state):
    """Joins `state`, a pytree of jax.Array, on its devices; the result shares no memory with it.

    Returns:
      `{"data": {name: array}, "digest": {name: uint32 scalar}}`, where name is a dtype or, for a
      sharded array, `array_<number>`, and the index: a list, in the order of `jax.tree.leaves`, of
      `{"path": str, "shape": [ints], "dtype": str, "in": name}`.
    """
    groups, index = {}, []
    for number, (path, leaf) in enumerate(_leaves(state)):
        dtype = leaf.dtype.name
        name = dtype if leaf.sharding.is_fully_replicated else f'array_{number}'
        groups.setdefault(name, []).append(leaf)
        index.append({'path': path, 'shape': list(leaf.shape), 'dtype': dtype, 'in': name})
    data = {
        name: _copy(leaves[0]) if _alone(name) else _concatenate(leaves)
        for name, leaves in groups.items()
    }
    return {'data': data, 'digest': {name: digest(array) for name, array in data.items()}}, index


def abstract_joined(index, abstract_state):
    """Shapes, dtypes and shardings of the bundle of `index`, to be split into `abstract_state`."""
    shardings = {path: leaf.sharding for path, leaf in _leaves(abstract_state)}
    data, marks = {}, {}
    for entry in index:
        name, dtype, sharding = entry['in'], jnp.dtype(entry['dtype']), shardings[entry['path']]
        whole = _everywhere(sharding)
        if _alone(name):
            shape = tuple(entry['shape'])
        else:
            before = data[name].shape[0] if name in data else 0
            shape, sharding = (before + math.prod(entry['shape']),), whole
        data[name] = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        marks[name] = jax.ShapeDtypeStruct((), jnp.uint32, sharding=whole)
    return {'data': data, 'digest': marks}


def split(joined, index, abstract_state):
    """The pytree `abstract_state` describes, from what `join` made; shardings may be others.

    Raises:
      ValueError: a digest does not fit: the bytes are not the ones that were joined.
    """
    sharding = {path: leaf.sharding for path, leaf in _leaves(abstract_state)}
    found = {}
    for name, array in joined['data'].items():
        if int(digest(array)) != int(joined['digest'][name]):
            raise ValueError(f'the bytes of {name} do not fit their digest')
        entries = [entry for entry in index if entry['in'] == name]
        paths = [entry['path'] for entry in entries]
        if _alone(name):
            found[paths[0]] = array
            continue
        vector, start = np.asarray(array.addressable_data(0)), 0
        for entry in entries:
            stop = start + math.prod(entry['shape'])
            part = vector[start:stop].reshape(entry['shape'])
            # Not by jit: compiling 450 slices took ten seconds.
            found[entry['path']] = jax.make_array_from_callback(
                part.shape, sharding[entry['path']], part.__getitem__
            )
            start = stop
    leaves = [found[path] for path in sharding]
    return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)


def check(index, abstract_state, path):
    """Raises InputError, naming the first array that differs, unless `index` is of such a state."""
    saved = {entry['path']: (tuple(entry['shape']), entry['dtype']) for entry in index}
    wanted = {key: (tuple(leaf.shape), leaf.dtype.name) for key, leaf in _leaves(abstract_state)}
    differing = [key for key in wanted | saved if saved.get(key) != wanted.get(key)]
    if differing:
        key = differing[0]
        raise InputError(
            f'{path} holds the state of another model: {key} is {_words(saved.get(key))} there and '
            f'{_words(wanted.get(key))} here ({len(differing)} arrays differ); use the config it '
            'was saved with or another workdir'
        )


_copy = jax.jit(jnp.copy)


@jax.jit
def _concatenate(leaves):
    # jit hands an untouched input back as its output: the copy keeps a lone vector apart from it.
    return jnp.copy(jnp.concatenate([leaf.ravel() for leaf in leaves]))


def _leaves(state):
    paths = jax.tree_util.tree_flatten_with_path(state)[0]
    return [(jax.tree_util.keystr(path, simple=True, separator='.'), leaf) for path, leaf in paths]


def _alone(name):
    return name.startswith('array_')


def _everywhere(sharding):
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding


def _words(leaf):
    return 'absent' if leaf is None else f'{leaf[1]} {list(leaf[0])}'
