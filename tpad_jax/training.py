"""What a stage trains: its losses and modules, the step, and the state the step begins with."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from tpad_jax import collectives, losses, optim
from tpad_jax.errors import InputError
from tpad_jax.models import tpad
from tpad_jax.types import State


@dataclass(frozen=True)
class StepSpec:
    """What is static in a train step.

    Attributes:
      model: the modules. losses: (name, function, weight, keywords) of the stage.
      needs: outputs they read. fresh: features computed from content. seed: of all draws.
    """

    model: tpad.TPAD
    losses: tuple
    needs: frozenset
    fresh: frozenset
    tx: optax.GradientTransformation
    seed: int


def train_step(state: State, batch, catalogue: dict, *, spec: StepSpec, axis: str | None):
    """One update: pure, the same function under jit (axis=None), pmap and shard_map.

    Args:
      state: donated. batch: this replica's rows. catalogue: rows per item, read only.

    Returns:
      The new state and {name: scalar}, equal on all replicas.
    """
    key = jax.random.fold_in(jax.random.key(spec.seed), state.step)

    def objective(params):
        tree = unflatten_dict({**state.frozen, **params}, sep='/')
        out = tpad.forward(spec.model, tree, batch, catalogue, spec.needs, spec.fresh, key)
        loss, loss_state, logged = losses.combine(spec.losses, out, batch, state.loss_state,
                                                  axis=axis, key=key)
        return loss, (loss_state, logged)

    grads, (loss_state, logged) = jax.grad(objective, has_aux=True)(state.params)
    # `combine` sums over replicas, so each replica's gradient is that of the whole, for its rows
    # only, times their number: the mean is the sum over all rows.
    grads = collectives.mean(grads, axis)
    logged['optim/grad_norm'] = optax.tree.norm(grads)
    updates, opt_state = spec.tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, state.frozen, opt_state, loss_state), logged


def stage_losses(config, stage: str) -> tuple:
    """(name, function, weight, keywords) of every loss the stage uses with a weight other than 0.

    Raises:
      InputError: a function that does not exist, a keyword it does not take or an output that no
        stage computes.
    """
    known = tpad.OUTPUTS | {f'critic.{name}' for name in config.model.critics}
    if config.model.encoder != 'attention':
        known -= {'h_each'}  # the others read a session anew for each prefix
    chosen = []
    for name, entry in config.losses.items():
        entry = dict(entry)
        fn, weight, stages = entry.pop('fn'), entry.pop('weight'), entry.pop('stages')
        own = config.stage[stage].weights.get(name)
        weight = weight if own is None else own
        if stage in stages.split(',') and weight:
            function = losses.resolve(name, fn)
            absent = sorted(losses.needs(name, function, entry) - known)
            if absent:
                raise InputError(f'config.losses.{name} reads {", ".join(absent)}, which no stage '
                                 f'computes; there are {", ".join(sorted(known))}')
            chosen.append((name, function, weight, tuple(sorted(entry.items()))))
    if not chosen:
        raise InputError(f'stage {stage} has no loss with a weight: give one of config.losses a '
                         f'weight and {stage!r} among its stages')
    return tuple((name, fn, weight, dict(keywords)) for name, fn, weight, keywords in chosen)


def make_spec(config, stage: str, model: tpad.TPAD, seed: int) -> StepSpec:
    """The static part of a stage's step."""
    chosen = stage_losses(config, stage)
    needs = frozenset().union(*(losses.needs(name, fn, kw) for name, fn, _, kw in chosen))
    fresh = frozenset(n for n in config.stage[stage].fresh.split(',') if n)
    return StepSpec(model, chosen, needs, fresh, optim.optimiser(config.stage[stage]), seed)


def start(spec: StepSpec, params: dict, pattern: str) -> State:
    """A stage's first state from all parameters {path: array}; `pattern`: what trains."""
    trained, frozen = optim.split(params, pattern)
    loss_state = {name: fn.initial_state() for name, fn, _, _ in spec.losses
                  if hasattr(fn, 'initial_state')}
    # a copy: what trains is donated, and the caller keeps its parameters
    return State(jnp.int32(0), jax.tree.map(jnp.copy, trained), frozen, spec.tx.init(trained),
                 loss_state)
