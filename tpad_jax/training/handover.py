"""Shared by stages and recommenders: copied and blended adapters, clusters, a partner's config."""

import copy

import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.config import flat
from tpad_jax.errors import InputError, refuse_if, refusing
from tpad_jax.nn.linear import unit
from tpad_jax.training import merge_adapters, optimizer

# options of config.model that config.partner may change
PARTNER_CHANGES = (
    'width', 'use_id', 'use_side', 'id_dropout', 'feature_hidden', 'feature_dropout', 'encoder',
    'gnn_steps', 'positions', 'layers', 'heads', 'near', 'near_window', 'dropout', 'item_dropout',
    'recommend', 'normalise', 'temperature', 'repeats')


def check_stage(config, stage: str, spec, params: dict, items: int) -> None:
    """Refuse settings of a stage that do not fit the parameters or the catalogue.

    Call it for every stage before the first one is trained.

    Args:
      config: the run's.
      stage: of config.STAGES.
      spec: step.StepSpec of the stage, or None where the stage trains nothing.
      params: {path: array or shape}, all parameters of the run.
      items: number of items.

    Raises:
      InputError: `train`, `rates` or `copy` matches no parameter, or there are fewer items than
        clusters.
    """
    c = config.stage[stage]
    copied(params, stage, c.copy)
    if spec is None:
        return
    # Parameters of a loss's module are drawn when its stage starts. Only their prefix is known,
    # so rates of such parameters are checked then.
    modules = tuple(f'loss/{loss.name}/' for loss in spec.losses if loss.module)
    try:
        trained, _ = optimizer.split({**params, **dict.fromkeys(modules)}, c.train, modules)
        rates = [rate for rate in c.rates if not (modules and 'loss' in rate[0])]
        optimizer.check_rates(rates, trained)
        optimizer.check_rates(c.later, trained, 'later')
    except InputError as error:
        raise InputError(f'config.stage.{stage}: {error}') from error
    refuse_if(config.model.codes and config.model.codes[1] > items, 'config.model.codes='
              f'{config.model.codes}: there are {items} items. Fix: choose fewer codes.')
    refuse_if('cluster' in spec.needs and config.model.clusters > items, 'config.model.clusters='
              f'{config.model.clusters}: there are {items} items. Fix: choose at most that many.')


def copied(params: dict, stage: str, copy: str, taken=()) -> dict:
    """Copy the parameters below one path to another.

    Args:
      params: {path: array}.
      stage: of config.STAGES, for the message.
      copy: 'a->b', or '' to copy nothing.
      taken: paths with values of another run (begin_from.py), which stay.

    Returns:
      `params`, where those below b have the values of those below a.

    Raises:
      InputError: there are no parameters below a, or other ones below b.
    """
    if not copy:
        return params
    source, _, target = copy.partition('->')
    copies = {target + path.removeprefix(source): x for path, x in params.items()
              if path.startswith(source + '/')}
    refuse_if(not copies or not copies.keys() <= params.keys(), f'config.stage.{stage}.copy='
              f'{copy!r}: expected two prefixes a->b of parameter paths such as {min(params)!r}')
    return {**params, **{path: x for path, x in copies.items() if path not in taken}}


def clustered(k, count: int, seed: int, z=None, warm=None):
    """Cluster the items by k-means, for the loss `clusters`.

    Each modality's feature is scaled to length one, so that all count equally.

    Args:
      k: float32 [V+1, M, D]. Features; row 0 is padding.
      count: number of clusters.
      seed: of the first centres.
      z: float32 [V+1, E]. Item vectors of a trained recommender. Warm items are clustered by them,
        and a cold one joins the cluster with the nearest mean of k. None: all are clustered by k.
      warm: bool [V+1]. With z: items of training sessions.

    Returns:
      int32 [V+1]. Every item's cluster, and 0 in row 0.

    Raises:
      InputError: there are fewer such items than clusters.
    """
    from sklearn.cluster import KMeans  # slow to import

    content = np.asarray(unit(k)).reshape(len(k), -1)[1:]
    known = np.ones(len(content), bool) if z is None else np.asarray(warm)[1:]
    points = content if z is None else np.asarray(unit(z))[1:][known]
    refuse_if(count > len(points), f'config.model.clusters={count}, but {len(points)} items can be '
              'clustered. Expected at most that many. Fix: lower it.')
    own = KMeans(count, n_init=1, random_state=seed).fit(points).labels_
    means = np.stack([content[known][own == n].mean(axis=0) for n in range(count)])
    labels = ((content[:, None] - means) ** 2).sum(axis=-1).argmin(axis=1) if z is not None else own
    labels[known] = own
    return jnp.asarray(np.pad(labels, (1, 0)), jnp.int32)


def blended(params: dict, config) -> dict:
    """Replace the adapter lora/distil by a blend of others, as config.model.blend describes.

    Args:
      params: {path: array}, all parameters.
      config: the run's.

    Returns:
      All parameters. The rank of the blend may differ from that of the adapter before.
    """
    c = config.model.blend
    adapters, weights = parts(c)
    trees = [{tuple(path.split('/')[2:]): x for path, x in params.items()
              if path.startswith(f'lora/{name}/')} for name in adapters]
    blend = merge_adapters.blend(jax.device_get(trees), kind=c.kind, weights=weights, keep=c.keep,
                                 rank=c.rank)
    rest = {path: x for path, x in params.items() if not path.startswith('lora/distil/')}
    return rest | {'/'.join(('lora', 'distil', *path)): jnp.asarray(x) for path, x in blend.items()}


def parts(c) -> tuple[list[str], tuple[float, ...]]:
    """Read the names and weights of the adapters to blend.

    Args:
      c: config.model.blend.

    Returns:
      Names, and one weight for each.

    Raises:
      InputError: an adapter that no stage trains by itself, or not one weight for each.
    """
    adapters = c.of.split(',')
    refuse_if(not set(adapters) <= {'knowledge', 'transfer'}, f'config.model.blend.of={c.of!r}: '
              'not a list of adapters. Fix: name knowledge or transfer.')
    try:
        weights = tuple(float(x) for x in c.weights.split(','))
    except ValueError:
        weights = ()
    refuse_if(len(weights) != len(adapters) or sum(weights) == 0 or not np.isfinite(weights).all(),
              f'config.model.blend.weights={c.weights!r}: expected one number for each of {c.of}, '
              'with a sum other than 0. Fix: give as many.')
    return adapters, weights


def partnered(config):
    """Return the whole config of the partner: the run's, changed by config.partner.

    Args:
      config: ConfigDict of the run.

    Raises:
      InputError: config.partner names an unknown key, or one that both recommenders share.
    """
    other = copy.deepcopy(config)
    changes = other.partner.to_dict()
    other.partner = {}
    other.lock()
    with refusing((KeyError, TypeError), 'config.partner does not fit the config',
                  'Expected keys of the config'):
        other.update(changes)
    before, free = dict(flat(config)), {f'model.{name}' for name in PARTNER_CHANGES}
    shared = [key for key, value in flat(other) if value != before.get(key) and key not in free
              and not key.startswith(('partner', 'losses.', 'stage.recommend.'))]
    refuse_if(shared, f'config.partner changes {", ".join(shared)}, which both recommenders share. '
              f'Expected losses, stage.recommend, or of model: {", ".join(PARTNER_CHANGES)}')
    return other
