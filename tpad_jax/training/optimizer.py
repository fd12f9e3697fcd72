"""Which parameters a stage trains, and their optimizer."""

import math
import re

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


def check_rates(rates, paths) -> None:
    """Refuse a pattern of `rates` that matches no trained parameter.

    Args:
      rates: ((regex over parameter paths, factor), ...).
      paths: of the trained parameters.

    Raises:
      InputError: a pattern matches none of them.
    """
    for pattern, _ in rates:
        refuse_if(not any(re.search(pattern, path) for path in paths),
                  f'rates: the pattern {pattern!r} matches no trained parameter. Expected a regex '
                  f'over paths such as {min(paths)!r}')


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
    return rated(tx, stage.rates)
