"""Federated training: clients train copies of the parameters, and a server merges them.

A round is one step of the loop, so that validation, checkpoints and resumption are those of every
stage. The clients of a round are simulated one after the other on one device. FedMLLM (arXiv
2411.14717) compares these rules for the adapters of an MLLM; the rules themselves are of McMahan et
al. 2017 (FedAvg), Li et al. 2020 (FedProx), Hsu et al. 2019 (FedAvgM), Reddi et al. 2021 (FedAdam,
FedYogi) and Karimireddy et al. 2020 (SCAFFOLD).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict, FrozenConfigDict

from tpad_jax.config import names
from tpad_jax.data.catalogue import Data
from tpad_jax.errors import refuse_if
from tpad_jax.training import optimizer
from tpad_jax.training.stages import ENTRIES

# of an adaptive server: decays of its two moments, and what is added to the root of the second,
# whose square the second moment starts from (Reddi et al. 2021, section 5)
BETAS, TAU = (0.9, 0.99), 1e-3
RULES = 'avg', 'avgm', 'adam', 'yogi', 'scaffold'


@dataclass(frozen=True)
class Rounds:
    """The static part of a round.

    Attributes:
      weights: each client's share of the rows.
      local: steps of a client in a round.
      tx: of a client, from `transformations`.
      factor: round -> factor of the clients' learning rate.
      rate: that learning rate, where clients correct their gradients (SCAFFOLD), else 0.
    """

    weights: tuple[float, ...]
    local: int
    tx: optax.GradientTransformation
    factor: Callable
    rate: float


class Server(NamedTuple):
    """The optimiser state of a stage of rounds.

    Attributes:
      inner: of the server's rule.
      all: SCAFFOLD's control, as the parameters; else None.
      own: those of the clients, [C, ...] each; else None.
    """

    inner: Any
    all: Any = None
    own: Any = None


def applies(config, stage: str) -> bool:
    """Whether the stage is trained by rounds."""
    return stage in names(config.federated.stages)


def check(config, devices: int) -> None:
    """Refuse settings that rounds cannot keep.

    Args:
      config: of the run.
      devices: that run a step.

    Raises:
      InputError: naming the option.
    """
    f = config.federated
    absent = [stage for stage in names(f.stages) if stage not in names(config.stages)]
    refuse_if(absent, f'config.federated.stages={f.stages!r}: {", ".join(absent)} is not among '
              f'config.stages={config.stages!r}. Fix: leave it out, or add it there.')
    for stage in names(f.stages):
        c = config.stage[stage]
        for wrong, option, rule in (
                (devices > 1, f'devices: {devices} of them', 'one, as a round is one computation'),
                (config.skip_not_finite, 'skip_not_finite', '0 with federated rounds'),
                (c.accumulate > 1, f'stage.{stage}.accumulate', '1 with federated rounds'),
                (c.epochs, f'stage.{stage}.epochs', '0, as its steps are rounds'),
                (f.rule == 'scaffold' and c.optimiser != 'sgd', f'stage.{stage}.optimiser',
                 "'sgd' with federated.rule='scaffold'")):
            refuse_if(wrong, f'config.{option}: not with config.federated.stages={f.stages!r}. '
                      f'Expected {rule}. Fix: set it, or leave the stage out.')
    refuse_if(any(int(n) >= f.clients for n in names(f.only)), f'config.federated.only={f.only!r}: '
              f'no such client. Expected numbers below clients={f.clients}. Fix: name others.')


def owners(data: Data, config, *, items: bool) -> np.ndarray:
    """Give every training session, or every item, to a client.

    The sessions of each label, the first side feature of their last item, are divided by shares
    from a Dirichlet distribution: the smaller its concentration, the less alike the clients. As
    usual in the field, the shares are drawn per label. Data without side features have one label.

    Args:
      data: its training sessions or items.
      config: of the run.
      items: whether a row is an item.

    Returns:
      int [S], or int [V] of the items 1..V. -1: of none (config.federated.only).

    Raises:
      InputError: a client has no row.
    """
    f, train = config.federated, data.train
    last = np.arange(1, data.num_items + 1) if items else train.items[train.offsets[1:] - 1]
    label = data.side[last, 0] if data.side_sizes else np.zeros(len(last), int)
    draw, out = np.random.default_rng(config.seed), np.empty(len(last), int)
    for one in np.unique(label):
        mine = draw.permutation(np.flatnonzero(label == one))
        shares = draw.dirichlet(np.full(f.clients, f.concentration))
        place = (np.arange(len(mine)) + 0.5) / len(mine)
        out[mine] = np.searchsorted(np.cumsum(shares[:-1]), place)
    if f.only:
        out[~np.isin(out, [int(n) for n in names(f.only)])] = -1
    empty = [n for n in participants(config) if not (out == n).any()]
    refuse_if(empty, f'config.federated.clients={f.clients}: client {empty[:1]} has no row. '
              'Expected rows for every client. Fix: fewer clients, or a larger '
              'config.federated.concentration.')
    return out


def participants(config) -> list[int]:
    """List the clients that take part in every round."""
    f = config.federated
    return sorted({int(n) for n in names(f.only)}) or list(range(f.clients))


def with_rounds(spec, config, stage: str, data: Data):
    """Add rounds to the static part of a stage's step, if the stage is trained by rounds.

    Args:
      spec: step.StepSpec.
      config: of the run.
      stage: of the config.
      data: of the run.
    """
    if not applies(config, stage):
        return spec
    c, f = FrozenConfigDict(config.stage[stage]), config.federated
    owner = owners(data, config, items=ENTRIES[stage].batches == 'items')
    counts = np.array([(owner == n).sum() for n in participants(config)])
    rounds = Rounds(tuple((counts / counts.sum()).tolist()), f.local, _client(c, f.proximal),
                    _factor(c), c.learning_rate if f.rule == 'scaffold' else 0.0)
    return replace(spec, tx=server(f.rule, f.server_rate, f.momentum, len(counts)), rounds=rounds,
                   seldom=False)


@lru_cache  # a spec of the same options has the same objects, so that it is equal
def _client(stage, proximal):
    """A client's optimiser: the stage's, at a rate that is constant within a round.

    Its state begins with the parameters at the start of a round and a constant of the gradients.
    """
    def update(grads, state, params):
        return jax.tree.map(lambda g, x, anchor, shift: g + proximal * (x - anchor) + shift,
                            grads, params, *state), state

    steady = ConfigDict(stage)
    steady.schedule, steady.warmup = 'constant', 0.0
    return optax.chain(
        optax.GradientTransformation(lambda x: (x, optax.tree.zeros_like(x)), update),
        optimizer.optimizer(steady),
        optax.GradientTransformation(lambda params: jnp.float32(1), lambda updates, factor, _: (
            jax.tree.map(lambda x: factor * x, updates), factor)))


@lru_cache
def _factor(stage):
    schedule = optimizer.schedule(stage)  # its steps are rounds; the first is not wasted
    return lambda number: schedule(number + 0.5) / stage.learning_rate


@lru_cache
def server(rule: str, rate: float, momentum: float, clients: int) -> optax.GradientTransformation:
    """Make the server's rule: an optimiser whose gradient is the parameters less the clients' mean.

    Args:
      rule: of RULES. FedProx is 'avg' with a pull at the clients.
      rate: the server's learning rate.
      momentum: of 'avgm'.
      clients: C.

    Returns:
      The optimiser. Its state is a `Server`.
    """
    inner = (_adaptive(rate, rule) if rule in ('adam', 'yogi') else
             optax.sgd(rate, momentum=momentum if rule == 'avgm' else None))

    def init(params):
        if rule != 'scaffold':
            return Server(inner.init(params))
        return Server(inner.init(params), optax.tree.zeros_like(params), jax.tree.map(
            lambda x: jnp.zeros((clients, *x.shape), x.dtype), params))

    def update(grads, state, params=None):
        updates, state_of_rule = inner.update(grads, state.inner, params)
        return updates, state._replace(inner=state_of_rule)

    return optax.GradientTransformation(init, update)


def _adaptive(rate, rule):
    """Reddi et al. 2021, algorithm 2, which corrects no bias."""
    def second(v, square):
        if rule == 'yogi':
            return v - (1 - BETAS[1]) * square * jnp.sign(v - square)
        return BETAS[1] * v + (1 - BETAS[1]) * square

    def init(params):
        return (optax.tree.zeros_like(params),
                jax.tree.map(lambda x: jnp.full_like(x, TAU**2), params))

    def update(grads, state, params=None):
        del params
        first = jax.tree.map(lambda m, g: BETAS[0] * m + (1 - BETAS[0]) * g, state[0], grads)
        square = jax.tree.map(lambda v, g: second(v, g * g), state[1], grads)
        return jax.tree.map(lambda m, v: -rate * m / (jnp.sqrt(v) + TAU), first, square), (
            first, square)

    return optax.GradientTransformation(init, update)


def run(rounds: Rounds, tx: optax.GradientTransformation, one: Callable, state, batch):
    """Make one round: pure.

    Args:
      rounds: static.
      tx: of the server, see `server`.
      one: (State, types.Batch) -> (State, {name: scalar}), a client's step. Its states have no
        frozen parameters.
      state: types.State without frozen parameters, whose opt_state is a `Server`.
      batch: types.Batch of clients * local equal parts, all steps of the first client first.

    Returns:
      The next state, and the means of what was logged.
    """
    clients, local = len(rounds.weights), rounds.local
    cut = jax.tree.map(
        lambda x: x.reshape(clients, local, len(x) // (clients * local), *x.shape[1:]), batch)
    factor, held = rounds.factor(state.step), state.opt_state
    zeros = optax.tree.zeros_like(state.params)
    shifts = None if held.own is None else jax.tree.map(lambda c, own: c - own, held.all, held.own)

    def client(total, inputs):
        weight, batches, shift = inputs
        _, own, _ = rounds.tx.init(state.params)
        opt_state = (state.params, zeros if shift is None else shift), own, factor
        begun = state.replace(step=state.step * local, opt_state=opt_state)
        end, logged = jax.lax.scan(one, begun, batches)
        moved = optax.tree.sub(state.params, end.params)
        total = jax.tree.map(lambda t, x: t + weight * x, total, moved)
        return total, (end.loss_state, logged, None if shift is None else moved)

    weights = jnp.array(rounds.weights, jnp.float32)
    total, (loss_states, logged, moved) = jax.lax.scan(client, zeros, (weights, cut, shifts))
    updates, held = tx.update(total, held, state.params)
    if shifts is not None:  # option II of SCAFFOLD
        own = jax.tree.map(lambda shift, x: x / (local * rounds.rate * factor) - shift, shifts,
                           moved)
        every = jax.tree.map(lambda c, new, old: c + (new - old).mean(axis=0), held.all, own,
                             held.own)
        held = held._replace(all=every, own=own)
    mean = partial(jax.tree.map, lambda x: x.mean(axis=0).astype(x.dtype))
    return state.replace(step=state.step + 1, params=optax.apply_updates(state.params, updates),
                         opt_state=held, loss_state=mean(loss_states)), {
        name: x.mean() for name, x in logged.items() if name != 'not_finite'}
