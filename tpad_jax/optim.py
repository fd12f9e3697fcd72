"""Which parameters a stage trains, and the optimiser they get."""

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


def optimiser(stage) -> optax.GradientTransformation:
    """The optimiser config.stage.*.optimiser names.

    'adamw': Loshchilov and Hutter 2019, behind a clip of the global norm. 'adam': Kingma and Ba
    2015, weight_decay an L2 penalty in every gradient, no clip; what SR-GNN was published with.
    'sgd': bare, at the peak rate.
    """
    if stage.optimiser == 'sgd':
        return optax.sgd(stage.learning_rate)
    if stage.optimiser == 'adam':
        return optax.chain(optax.add_decayed_weights(stage.weight_decay),
                           optax.adam(schedule(stage)))
    return optax.chain(optax.clip_by_global_norm(stage.clip),
                       optax.adamw(schedule(stage), weight_decay=stage.weight_decay, mask=decays))
