"""What a stage trains: its losses and modules, the step, and the state the step begins with."""

import json
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import unflatten_dict

from tpad_jax import losses
from tpad_jax.config import names
from tpad_jax.distributed import collectives
from tpad_jax.errors import InputError
from tpad_jax.models import readers, tpad
from tpad_jax.training import accumulation, optimizer
from tpad_jax.types import Batch, State

# Features that no stage before this one has left behind.
LATER = {'knowledge': {'k', 'r'}, 'transfer': {'r'}}


@dataclass(frozen=True, eq=False)
class StepSpec:
    """What is static in a train step; equal to another that was made of the same.

    Attributes:
      model: the modules. losses: (name, function, weight, keywords) of the stage.
      needs: outputs they read. fresh: features computed from content. seed: of all draws.
      modules: (name, flax module) of the losses that have parameters of their own.
      skip: how many updates in a row may be left out because a number was not finite.
      parts: of a replica's rows, whose activations exist one after the other.
      made_of: all that it was made of, hashable, or () where nothing else is the same.
    """

    model: tpad.TPAD
    losses: tuple
    needs: frozenset
    fresh: frozenset
    tx: optax.GradientTransformation
    seed: int
    modules: tuple = ()
    skip: int = 0
    parts: int = 1
    made_of: tuple = field(default=(), init=False)  # `replace` leaves it out

    def __eq__(self, other):
        return self is other or (type(self) is type(other) and bool(self.made_of)
                                 and self.made_of == other.made_of)

    def __hash__(self):
        return hash(self.made_of)


def train_step(state: State, batch, catalogue: dict, *, spec: StepSpec, axis: str | None):
    """One update: pure, the same function under jit (axis=None), pmap and shard_map.

    Args:
      state: donated. batch: this replica's rows. catalogue: rows per item, read only.

    Returns:
      The new state and {name: scalar}, equal on all replicas; and 'not_finite', see `combine`.
    """
    key = jax.random.fold_in(jax.random.key(spec.seed), state.step)

    def outputs(params, batch):
        tree = unflatten_dict({**state.frozen, **params}, sep='/')
        out = tpad.forward(spec.model, tree, batch, catalogue, spec.needs, spec.fresh, key)
        rows, tables = tpad.apart(out, len(batch.valid))
        return rows, (tables, losses.bound(spec.modules, tree))

    def objective(rows, rest, batch):
        tables, heads = rest
        loss, loss_state, logged = losses.combine(
            spec.losses, {**rows, **tables}, batch, state.loss_state, axis=axis, key=key,
            step=state.step, heads=heads, rows=True)
        return loss, (loss_state, logged)

    grads, (loss_state, logged) = accumulation.gradient(outputs, objective, state.params, batch,
                                                        spec.parts)
    # `combine` sums over replicas, so each replica's gradient is that of the whole, for its rows
    # only, times their number: the mean is the sum over all rows.
    grads = collectives.mean(grads, axis)
    logged['optim/grad_norm'] = optax.tree.norm(grads)
    if spec.skip:  # a loss that is not finite, or whose gradient is not, changes nothing
        fine = jnp.isfinite(logged['loss'])
        grads = jax.tree.map(lambda x: jnp.where(fine, x, jnp.nan), grads)
        fine &= jnp.isfinite(logged['optim/grad_norm'])
        loss_state = jax.tree.map(partial(jnp.where, fine), loss_state, state.loss_state)
    updates, opt_state = spec.tx.update(grads, state.opt_state, state.params)
    if spec.skip:
        logged['optim/skipped'] = opt_state.total_notfinite
        logged['optim/skipped_in_row'] = opt_state.notfinite_count
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, state.frozen, opt_state, loss_state), logged


def stage_losses(config, stage: str) -> tuple:
    """(name, function, weight, keywords) of every loss the stage uses with a weight other than 0.

    Raises:
      InputError: a function that does not exist or cannot be called as a loss, a keyword it does
        not take, an output that no stage computes, a schedule that is none.
    """
    missing = _missing(config, stage)
    known = (tpad.OUTPUTS | {f'critic.{name}' for name in config.model.critics}) - missing.keys()
    chosen = []
    for name, entry in config.losses.items():
        own = config.stage[stage].weights.get(name)
        weight = entry.weight if own is None else own
        if stage in names(entry.stages) and weight:
            keywords = {k: x for k, x in entry.items() if k not in losses.ENTRY}
            function = losses.resolve(name, entry.fn)
            absent = sorted(losses.needs(name, function, keywords) - known)
            if absent:
                why = sorted({missing[n] for n in absent if n in missing})
                raise InputError(f'config.losses.{name} reads {", ".join(absent)}, which '
                                 + (f'stage {stage} does not compute ({"; ".join(why)})' if why
                                    else 'no stage computes')
                                 + f'; there are {", ".join(sorted(known))}')
            losses.check_call(name, function, keywords, bool(entry.get('module')))
            weight = losses.weigh(name, weight, entry.get('schedule', ()))
            chosen.append((name, function, weight, dict(sorted(keywords.items()))))
    if not chosen:
        raise InputError(f'stage {stage} has no loss with a weight: give one of config.losses a '
                         f'weight and {stage!r} among its stages')
    return tuple(chosen)


def _missing(config, stage):
    """{output: why} of those that a stage of this config cannot compute."""
    states, out = readers.STATES | readers.THERE | {'teacher.vocabulary'}, {}
    if config.model.encoder not in tpad.EACH:
        out['h_each'] = 'only config.model.encoder=attention reads a session once for all prefixes'
    if not config.mllm.teacher:
        out |= {name: 'config.mllm.teacher names no teacher' for name in states
                if name.startswith('teacher')}
    if not config.model.clusters:
        out |= dict.fromkeys(('interest', 'cluster'), 'config.model.clusters is 0')
    if config.model.blend.kind:
        why = 'config.model.blend makes r, which no loss trains; set its weight to 0'
        out |= dict.fromkeys(('r', 'r_next', 'r.image', 'r.text'), why)
    if late := LATER.get(stage, set()) & set(names(config.model.recommend)):
        why = f'the recommender reads {", ".join(sorted(late))}, which is there behind that stage'
        out |= dict.fromkeys(('h', 'h_each', 'z'), why)
    if stage == 'recommend':
        read = {'describe', 'describe.tokens', 'foretell', 'foretell.tokens'}
        read |= {'t', 'c', 'p', 'interest'} if config.model.form == 'full' else set()
        out |= dict.fromkeys(states | read, 'stage recommend reads no content')
    return out


def own_modules(config, chosen: tuple) -> tuple:
    """(name, flax module) of those `stage_losses` whose config names one. Raises InputError."""
    entries = {name: config.losses[name] for name, *_ in chosen}
    return tuple((name, losses.own_module(name, entry.module, dict(entry.get('fields', {}))))
                 for name, entry in entries.items() if entry.get('module'))


def make_spec(config, stage: str, model: tpad.TPAD, seed: int) -> StepSpec:
    """The static part of a stage's step."""
    chosen = stage_losses(config, stage)
    needs = frozenset().union(*(losses.needs(name, fn, kw) for name, fn, _, kw in chosen))
    fresh = frozenset(names(config.stage[stage].fresh))
    tx, skip = optimizer.optimizer(config.stage[stage]), config.skip_not_finite
    if skip:
        tx = optax.apply_if_finite(tx, skip)
    modules = own_modules(config, chosen)
    told = json.dumps([config.stage[stage].to_dict(), skip, {
        name: config.losses[name].to_dict() for name, *_ in chosen}], default=str, sort_keys=True)
    own = tuple((name, type(module), repr(module)) for name, module in modules)
    made_of = told, tuple(fn for _, fn, *_ in chosen), own, stage, model, seed
    spec = StepSpec(model, chosen, needs, fresh, tx, seed, modules, skip,
                    config.stage[stage].accumulate)
    object.__setattr__(spec, 'made_of', made_of)
    return spec


def with_own(spec: StepSpec, params: dict, batches, catalogue: dict) -> dict:
    """All parameters {path: array}, and those of the losses' own modules that have none yet.

    Args:
      batches: () -> iterator of the stage's host batches; only their shapes matter.
      catalogue: rows per item.
    """
    new = tuple((name, module) for name, module in spec.modules
                if not any(path.startswith(f'loss/{name}/') for path in params))
    if not new:
        return params

    def outputs(params, batch, catalogue):
        tree = unflatten_dict(params, sep='/')
        return tpad.forward(spec.model, tree, batch, catalogue, spec.needs, spec.fresh,
                            jax.random.key(spec.seed)), batch

    with closing(batches()) as some:
        given = params, Batch.of(next(some)), catalogue
    return params | losses.first_parameters(new, spec.losses, outputs, given, spec.seed)


def start(spec: StepSpec, params: dict, pattern: str) -> State:
    """A stage's first state from all parameters {path: array}.

    `pattern`: what trains, and with it the own parameters of the stage's losses.
    """
    own = tuple(f'loss/{name}/' for name, _ in spec.modules)
    trained, frozen = optimizer.split(params, pattern, own)
    loss_state = {name: fn.initial_state() for name, fn, _, _ in spec.losses
                  if hasattr(fn, 'initial_state')}
    # a copy: what trains is donated, and the caller keeps its parameters
    return State(jnp.int32(0), jax.tree.map(jnp.copy, trained), frozen, spec.tx.init(trained),
                 loss_state)
