"""`--plan`: what a run will ask of a device, said before anything is read that is large.

Of the data it needs the number of items and of their side features, and how long a prefix can be.
These come from the prepared tables of the workdir, from ready-made sessions, or from what the
planted catalogue is said to hold; `--plan_items` says a number where no data is at hand. Nothing is
written and nothing is computed on a device.
"""

import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from tpad_jax.config import names
from tpad_jax.data import sources, text
from tpad_jax.data.synthetic import wording
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.errors import InputError
from tpad_jax.features import bases
from tpad_jax.job import plan
from tpad_jax.job.validate import check
from tpad_jax.models import tpad

KINDS = {'v5e': 15.75, 'v6e': 31.25}  # GiB a program may use of a chip's 16 and 32
GIB = 2**30


def target(said: str) -> tuple[int | None, int | None]:
    """What `--plan` names -> bytes per device and number of devices; None, None: this machine's.

    Args:
      said: '' or 'true' (no value), KIND-COUNT with a kind of KINDS, or NUMBERgib-COUNT.

    Raises:
      InputError: none of these.
    """
    if said in ('', 'true'):
        return None, None
    found = re.fullmatch(rf'({"|".join(KINDS)}|[0-9.]+gib)-([1-9][0-9]*)', said.lower())
    try:
        kind, count = found.groups()
        room = KINDS.get(kind) or float(kind.removesuffix('gib'))
    except (AttributeError, ValueError):
        raise InputError(f'--plan={said} names no devices: leave the value out for those of this '
                         f'machine, or say {", ".join(f"{kind}-8" for kind in KINDS)} or '
                         '24gib-8, GiB of each and their number') from None
    return round(room * GIB), int(count)


def facts(config, workdir: Path, items: int | None) -> tuple[int, tuple[int, ...], int, str]:
    """V, how many values each side feature has, N, and in words where that comes from.

    Args:
      config, workdir: of the run. items: V where the command says it, or None.

    Raises:
      InputError: raw files that are not prepared yet and no `items`.
    """
    longest = config.data.max_length
    source = sources.chosen(config)
    if items is not None:
        if items < 1:
            raise InputError(f'--plan_items={items} must be 1 or more')
        side = (1, 1, text.PRICE_LEVELS + 1) if source.content else ()  # of brands nobody knows
        return items, side, longest, '--plan_items'
    total, side = sources.sizes(config, workdir)
    return total, side, min(longest, source.longest or longest), sources.origin(config)


def rows(config, items: int, sides: int) -> dict:
    """The catalogue's rows that stages read, {name: shape and dtype} of [V+1, ...].

    Args:
      config: the run's. items: V. sides: how many side features.
    """
    c, out = config.model, {}

    def add(name, *shape, dtype=jnp.float32):
        out[name] = jax.ShapeDtypeStruct((items + 1, *shape), dtype)

    add('side', sides, dtype=jnp.int32)
    add('warm', dtype=bool)
    add('popularity')
    if c.encoder == 'gce_gnn':
        add('near', c.near, dtype=jnp.int32)
        add('near_weight', c.near)
    source = sources.chosen(config)
    if not source.content:
        return out
    add('k', 2, c.features)
    add('r', *((2, c.features) if c.blend.kind else (2 * c.features,)))
    if config.data.features:
        raise InputError('--plan does not know how wide the rows of config.data.features are; '
                         'leave it and the row given out to plan the rest')
    if source.world:
        add('true', sum(wording.SIZES))
    return out


def lines(config, workdir, said: str, items: int | None = None) -> list[str]:
    """The plan of a run in words.

    Args:
      config, workdir: of the run. said: see `target`. items: see `facts`.

    Raises:
      InputError: an unusable config or flag, or data that says nothing yet.
    """
    room, count = target(said)
    among = None if count is None else range(count)
    stages = check(config, among)
    c, workdir = config, Path(workdir)
    total, sizes, positions, source = facts(c, workdir, items)
    devices = devices_lib.choose(c.parallel, c.devices, c.model_shards, among, c.precision)
    catalogue, shared = rows(c, total, len(sizes)), dict(
        recommend=names(c.model.recommend), items=total, max_length=positions, side_sizes=sizes)
    key = jax.random.key(0)
    if not sources.chosen(c).content:
        base, side, spec = None, 0, tpad.build(None, c.model, **shared)
        shapes = {'recommender': jax.eval_shape(partial(tpad.recommender_init, spec=spec), key,
                                                catalogue=catalogue)}
    else:
        found = bases.read(c)
        base, side, taught = found.module, found.image_size, bases.teacher(c, found)
        spec = tpad.build(base, c.model, pooling=c.mllm.pooling, chunk=c.mllm.chunk,
                          teacher=taught and taught.reader, **shared)
        shapes = jax.eval_shape(
            partial(tpad.init, spec=spec, rank=c.model.lora_rank, targets=c.model.lora_targets,
                    image_shape=(side, side, 3), text_length=c.mllm.text_length),
            key, catalogue=catalogue)
        shapes |= {'teacher': taught.shapes} if taught else {}
    available = room or plan.limit()
    of = 'a size this machine does not say' if available is None else f'{plan.gib(available)} GiB'
    return [f'Planned for {total} items ({source}), prefixes of {positions} and '
            f'{len(devices.devices)} device(s) of {of}; nothing was computed.',
            *plan.of_run(c, base, shapes, catalogue, devices, stages=stages, positions=positions,
                         side=side, available=available)]
