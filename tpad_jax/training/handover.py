"""What stages hand to each other beside rows: copied and blended adapters, clusters of items."""

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.core.kmeans import kmeans
from tpad_jax.errors import InputError
from tpad_jax.nn.mlp import unit
from tpad_jax.training import merge_adapters


def copied(params: dict, stage: str, copy: str) -> dict:
    """Parameters {path: array} with those under b as those under a, `copy` being 'a->b' or ''.

    Raises:
      InputError: a or b is no place of parameters.
    """
    if not copy:
        return params
    source, _, target = copy.partition('->')
    found = {target + path.removeprefix(source): x for path, x in params.items()
             if path.startswith(source + '/')}
    if not found or not found.keys() <= params.keys():
        raise InputError(f'config.stage.{stage}.copy={copy!r} does not lead from parameters to '
                         'parameters')
    return {**params, **found}


def clustered(k, count: int, seed: int):
    """Every item's cluster by its features k [V+1, M, D], for the loss `clusters`. -> int32 [V+1]

    Each modality's feature has length one, so that none outweighs the other.
    """
    points = np.asarray(unit(k)).reshape(len(k), -1)
    labels, _ = kmeans(points[1:], count, seed=seed)
    return jnp.asarray(np.pad(labels, (1, 0)))


def blended(params: dict, config) -> dict:
    """Parameters {path: array} with lora/distil as config.model.blend says, of its own rank."""
    c = config.model.blend
    of, weights = parts(c)
    trees = [{tuple(path.split('/')[2:]): x for path, x in params.items()
              if path.startswith(f'lora/{name}/')} for name in of]
    found, _ = merge_adapters.blend(jax.device_get(trees), kind=c.kind, weights=weights,
                                    keep=c.keep, rank=c.rank)
    rest = {path: x for path, x in params.items() if not path.startswith('lora/distil/')}
    return rest | {'/'.join(('lora', 'distil', *path)): jnp.asarray(x)
                   for path, x in found.items()}


def parts(c) -> tuple[list[str], tuple[float, ...]]:
    """Names and weights of config.model.blend.

    Raises:
      InputError: an adapter no stage trains by itself, or not one weight for each.
    """
    of = c.of.split(',')
    if not of or not set(of) <= {'knowledge', 'transfer'}:
        raise InputError(f'config.model.blend.of={c.of!r}: name adapters, knowledge or transfer')
    try:
        weights = tuple(float(x) for x in c.weights.split(','))
    except ValueError:
        weights = ()
    if len(weights) != len(of) or not sum(weights):
        raise InputError(f'config.model.blend.weights={c.weights!r}: give one number for each of '
                         f'{c.of}, not adding up to 0')
    return of, weights
