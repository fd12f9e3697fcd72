"""Where devices may take different branches of one program."""

import jax


def may_differ() -> bool:
    """Return whether each device may choose a branch by its own data at this point of a trace.

    Under shard_map with sharded parameters it may not: the compiler adds communication to the
    branches, and a device waits forever for another that took a different one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return not (mesh.manual_axes and mesh.auto_axes)
