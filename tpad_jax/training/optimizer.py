"""Which parameters a stage trains, and their optimizer."""

import math
import re

import jax.numpy as jnp
import optax

from tpad_jax.errors import refuse_if


def split(params: dict, pattern: str, modules: tuple = ()) -> tuple[dict, dict]:
    """Split parameters into those that a stage trains and the rest.

    Args:
      params: {path: array}.
      pattern: regex over paths. It does not decide for paths below 'loss/'.
      modules: prefixes below 'loss/' of the parameters that the stage's losses train. The other
        parameters there belong to losses of other stages.

    Returns:
      (trained, frozen).

    Raises:
      InputError: no parameter is trained.
    """
    trained = {path: x for path, x in params.items() if (
        path.startswith(modules) if path.startswith('loss/') else re.search(pattern, path))}
    refuse_if(not trained, f'train={pattern!r}: matches no parameter. Expected a regex over paths '
              f'such as {min(params)!r}')
    return trained, {path: x for path, x in params.items() if path not in trained}


def decays(params: dict) -> dict:
    """{path: bool}: matrices and tables decay, biases, norms, scales and single vectors do not."""
    return {path: x.ndim > 1 for path, x in params.items()}


def schedule(stage):
    """Learning rate by step: warmed up linearly, then a cosine to zero, or constant.

    Args:
      stage: config.stage.*.

    Returns:
      A schedule of optax.
    """
    warmup = round(stage.warmup * stage.steps)
    if stage.schedule == 'constant':
        return (optax.linear_schedule(0, stage.learning_rate, warmup) if warmup
                else optax.constant_schedule(stage.learning_rate))
    warmup = max(1, warmup)
    return optax.warmup_cosine_decay_schedule(0, stage.learning_rate, warmup,
                                              max(stage.steps, warmup + 1))


def check_rates(rates, paths, option: str = 'rates') -> None:
    """Refuse a pattern of `rates` that matches no trained parameter.

    Args:
      rates: ((regex over parameter paths, factor), ...).
      paths: of the trained parameters.
      option: of the stage, whose patterns these are.

    Raises:
      InputError: a pattern matches none of them.
    """
    for pattern, _ in rates:
        refuse_if(not any(re.search(pattern, path) for path in paths),
                  f'{option}: the pattern {pattern!r} matches no trained parameter. Expected a '
                  f'regex over paths such as {min(paths)!r}')


def rated(tx: optax.GradientTransformation, rates) -> optax.GradientTransformation:
    """Multiply the updates of some parameters by a factor, as a separate learning rate would.

    Args:
      tx: the optimizer.
      rates: ((regex over parameter paths, factor), ...). The factors of all matches are multiplied.

    Returns:
      `tx` followed by the factors.

    Raises:
      InputError: at the first use, a regex matches no trained parameter.
    """
    def scale(updates, params):
        check_rates(rates, updates)
        return {path: x * math.prod(factor for pattern, factor in rates if re.search(pattern, path))
                for path, x in updates.items()}

    return optax.chain(tx, optax.stateless(scale)) if rates else tx


def postponed(tx: optax.GradientTransformation, later, steps: int) -> optax.GradientTransformation:
    """Keep some parameters as they are until later in a stage.

    Args:
      tx: the optimizer.
      later: ((regex over parameter paths, share of the steps), ...). The last match counts.
      steps: of the stage.

    Returns:
      `tx` followed by zeros for these parameters until then.

    Raises:
      InputError: at the first use, a regex matches no trained parameter.
    """
    def update(updates, count, params=None):
        del params
        check_rates(later, updates, 'later')
        begin = {path: share * steps for pattern, share in later for path in updates
                 if re.search(pattern, path)}
        return {path: jnp.where(count < begin.get(path, 0), 0, x) for path, x in updates.items()
                }, count + 1

    return optax.chain(tx, optax.GradientTransformation(
        lambda params: jnp.int32(0), update)) if later else tx


def optimizer(stage) -> optax.GradientTransformation:
    """Make the optimizer that config.stage.*.optimiser names.

    'adamw': Loshchilov and Hutter 2019, after a clip of the global norm. 'adam': Kingma and Ba
    2015, weight_decay an L2 penalty in every gradient, no clip; SR-GNN was published with it.
    'sgd': plain, at the peak rate.

    Args:
      stage: config.stage.*.

    Returns:
      The optimizer with the stage's schedule and rates.
    """
    decay = stage.weight_decay
    if stage.optimiser == 'sgd':
        tx = optax.sgd(stage.learning_rate)
    elif stage.optimiser == 'adam':
        tx = optax.chain(optax.add_decayed_weights(decay), optax.adam(schedule(stage)))
    else:
        tx = optax.chain(optax.clip_by_global_norm(stage.clip),
                         optax.adamw(schedule(stage), weight_decay=decay, mask=decays))
    return postponed(rated(tx, stage.rates), stage.later, stage.steps)
