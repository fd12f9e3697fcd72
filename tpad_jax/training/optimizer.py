"""Which parameters a stage trains, and the optimiser they get."""

import math
import re

import optax

from tpad_jax.errors import InputError


def split(params: dict, pattern: str, own: tuple = ()) -> tuple[dict, dict]:
    """Parameters {path: array} whose path matches the regex, and the rest: (trained, frozen).

    own: beginnings of paths below 'loss/' that train whatever the regex says; the others there
    belong to losses of other stages and do not.

    Raises:
      InputError: nothing matches.
    """
    trained = {path: x for path, x in params.items()
               if (path.startswith(own) if path.startswith('loss/') else re.search(pattern, path))}
    if not trained:
        raise InputError(f'the train pattern {pattern!r} of a stage matches no parameter')
    return trained, {path: x for path, x in params.items() if path not in trained}


def decays(params: dict) -> dict:
    """{path: bool}: matrices and tables decay, biases, norms, scales and single vectors do not."""
    return {path: x.ndim > 1 for path, x in params.items()}


def schedule(stage):
    """Learning rate by step: warmed up linearly, then a cosine to zero, or constant.

    Args:
      stage: config.stage.*.
    """
    warmup = round(stage.warmup * stage.steps)
    if stage.schedule == 'constant':
        return (optax.linear_schedule(0, stage.learning_rate, warmup) if warmup
                else optax.constant_schedule(stage.learning_rate))
    warmup = max(1, warmup)
    return optax.warmup_cosine_decay_schedule(0, stage.learning_rate, warmup,
                                              max(stage.steps, warmup + 1))


def rated(tx: optax.GradientTransformation, rates) -> optax.GradientTransformation:
    """`tx` with some parameters' updates times a factor, as a learning rate of their own would.

    Args:
      rates: ((regex over parameter paths, factor), ...); of several that match, all count.

    Raises:
      InputError: at the first use, a regex that matches nothing that trains.
    """
    def scale(updates, state, params=None):
        del params
        for pattern, _ in rates:
            if not any(re.search(pattern, path) for path in updates):
                raise InputError(f'the pattern {pattern!r} in rates of a stage matches no '
                                 'parameter that it trains')
        factors = {path: math.prod(factor for pattern, factor in rates if re.search(pattern, path))
                   for path in updates}
        return {path: x * factors[path] for path, x in updates.items()}, state

    if not rates:
        return tx
    return optax.chain(tx, optax.GradientTransformation(lambda _: optax.EmptyState(), scale))


def optimiser(stage) -> optax.GradientTransformation:
    """The optimiser config.stage.*.optimiser names.

    'adamw': Loshchilov and Hutter 2019, behind a clip of the global norm. 'adam': Kingma and Ba
    2015, weight_decay an L2 penalty in every gradient, no clip; what SR-GNN was published with.
    'sgd': bare, at the peak rate.
    """
    if stage.optimiser == 'sgd':
        tx = optax.sgd(stage.learning_rate)
    elif stage.optimiser == 'adam':
        tx = optax.chain(optax.add_decayed_weights(stage.weight_decay),
                         optax.adam(schedule(stage)))
    else:
        tx = optax.chain(
            optax.clip_by_global_norm(stage.clip),
            optax.adamw(schedule(stage), weight_decay=stage.weight_decay, mask=decays))
    return rated(tx, stage.rates)
