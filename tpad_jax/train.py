"""The train step, and the loop that runs it with delayed metrics, validation, saves and resume."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import unflatten_dict

from tpad_jax import collectives, losses, optim
from tpad_jax.checkpoint import Checkpoints, abstract
from tpad_jax.errors import InputError, Stopped
from tpad_jax.models import readings, tpad
from tpad_jax.parallel import Devices
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
    missing = _missing(config, stage)
    known = (tpad.OUTPUTS | {f'critic.{name}' for name in config.model.critics}) - missing.keys()
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
                why = sorted({missing[n] for n in absent if n in missing})
                raise InputError(f'config.losses.{name} reads {", ".join(absent)}, which no stage '
                                 f'computes' + f' ({"; ".join(why)})' * bool(why)
                                 + f'; there are {", ".join(sorted(known))}')
            chosen.append((name, function, weight, tuple(sorted(entry.items()))))
    if not chosen:
        raise InputError(f'stage {stage} has no loss with a weight: give one of config.losses a '
                         f'weight and {stage!r} among its stages')
    return tuple((name, fn, weight, dict(keywords)) for name, fn, weight, keywords in chosen)


def _missing(config, stage):
    """{output: why} of those that a stage of this config cannot compute."""
    states, out = readings.STATES | readings.THERE | {'teacher.vocabulary'}, {}
    if config.model.encoder != 'attention':
        out['h_each'] = 'only config.model.encoder=attention reads a session once for all prefixes'
    if not config.mllm.teacher:
        out |= {name: 'config.mllm.teacher names no teacher' for name in states
                if name.startswith('teacher')}
    if not config.model.clusters:
        out |= dict.fromkeys(('interest', 'cluster'), 'config.model.clusters is 0')
    if config.model.blend.kind:
        why = 'config.model.blend makes r, which no loss trains; set its weight to 0'
        out |= dict.fromkeys(('r', 'r_next', 'r.image', 'r.text'), why)
    if stage == 'recommend':
        out |= dict.fromkeys(states, 'stage recommend reads no content')
    return out


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


def _lean_step(state: State, batch, shared: dict, *, spec: StepSpec, axis: str | None):
    """`train_step` with the frozen parameters beside the state, which is donated: the base of a
    large model is never copied, and never goes through a step.
    """
    state, logged = train_step(state.replace(frozen=shared['frozen']), batch, shared['catalogue'],
                               spec=spec, axis=axis)
    return state.replace(frozen={}), logged


@dataclass
class Loop:
    """What a run of steps needs beside the step itself.

    Attributes:
      name: of the run, in logs and progress.
      total: steps at most. log_every, save_every, eval_every, refresh_every, patience: see configs.
      batches: start step -> iterator of host batches.
      validate: (state, catalogue) -> {name: float} with 'hit@20', or None.
      refresh: state -> {name: rows} encoded anew, or None; refreshed: their names. Every
        validation follows one.
      stopping: asked after every step; True saves and raises Stopped.
      shown: losses named beside the progress bar.
    """

    name: str
    total: int
    devices: Devices
    batches: Callable[[int], Iterator[dict]]
    checkpoints: Checkpoints
    writer: Any
    progress: Callable
    log_every: int
    save_every: int
    eval_every: int = 0
    patience: int = 0
    refresh_every: int = 0
    validate: Callable | None = None
    refresh: Callable | None = None
    refreshed: tuple[str, ...] = ()
    stopping: Callable[[], bool] = lambda: False
    shown: tuple[str, ...] = ()


def fit(loop: Loop, spec: StepSpec, state: State, catalogue: dict):
    """Run a stage from its latest checkpoint, or from `state`, to its end.

    Metrics of a step are fetched after the next one is dispatched; nothing else waits for the
    device between validations and saves.

    Returns:
      {path: array} of what was trained, at the best validation (the last step without one), the
      catalogue's rows that were encoded with it ({} where none are), and the run's record:
      'history' [{'step', 'hit@20', ...}], 'chosen' the step they are of, 'valid' what it scored
      (None without validation), and 'seconds' over all sittings.

    Raises:
      Stopped: a signal came; the state is saved.
    """
    refreshed = loop.refreshed if loop.refresh else ()
    state, catalogue = loop.devices.share(state), loop.devices.share(catalogue)
    state, frozen = state.replace(frozen={}), state.frozen
    meta = {'history': [], 'best': None, 'seconds': 0.0, 'done': False}

    def held():
        return {'state': state, 'rows': {n: catalogue[n] for n in refreshed}}

    expected = abstract(held())
    found = loop.checkpoints.latest(expected)
    if found is not None:
        _, saved, meta = found
        state = saved['state']
        catalogue = {**catalogue, **saved['rows']}
    begun, before = time.perf_counter(), meta['seconds']
    number = int(state.step)
    loop.writer.rewind(loop.name, number)
    if not meta['done']:
        step = loop.devices.lift(partial(_lean_step, spec=spec))
        with (closing(loop.batches(number)) as batches,
              loop.progress(loop.name, loop.total, number) as bar):
            batch, pending = loop.devices.place(next(batches)), None
            while not meta['done']:
                shared = {'catalogue': catalogue, 'frozen': frozen}
                state, logged = step(state, batch, shared)
                number += 1
                batch = loop.devices.place(next(batches))  # transfers while the step computes
                if pending is not None:
                    _log(loop, bar, *pending)
                pending = (number, logged)
                meta['done'] = number >= loop.total
                validating = loop.validate and (meta['done'] or number % loop.eval_every == 0)
                if loop.refresh and (validating or number % loop.refresh_every == 0):
                    catalogue = {**catalogue, **loop.devices.share(loop.refresh(state))}
                metric = None
                if validating:
                    metric = _validate(loop, meta, state, catalogue, number)
                    meta['done'] = meta['done'] or _patience_is_out(meta, loop.patience)
                stopping = loop.stopping() and not meta['done']
                due = number % loop.save_every == 0
                if due or stopping or meta['done'] or metric is not None:
                    _log(loop, bar, *pending, whatever=True)  # never save what is not finite
                    pending = None
                    meta['seconds'] = before + time.perf_counter() - begun
                    loop.checkpoints.save(number, held(), meta, metric,
                                          wait=meta['done'] or stopping)
                if stopping:
                    raise Stopped(f'stopped in stage {loop.name} after step {number}')
    chosen = loop.checkpoints.latest if meta['best'] is None else loop.checkpoints.best
    step, saved, _ = chosen(expected)
    valid = next((h for h in meta['history'] if h['step'] == step), None)
    return saved['state'].params, saved['rows'], {**meta, 'chosen': step, 'valid': valid}


def _log(loop, bar, number, logged, whatever=False):
    """Fetch a finished step's metrics and write them, if a line is due or `whatever` the step."""
    if number % loop.log_every and not whatever:
        return
    values = {name: float(x) for name, x in jax.device_get(logged).items()}
    bad = sorted(name for name, x in values.items() if not np.isfinite(x))
    if bad:
        raise FloatingPointError(f'stage {loop.name}, step {number}: {", ".join(bad)} not finite')
    loop.writer.scalars(loop.name, number, values)
    bar(number, '  '.join(f'{name} {values[name]:.3f}' for name in ('loss', *loop.shown)))


def _validate(loop, meta, state, catalogue, number):
    """Score validation, remember it, and return the metric a checkpoint is chosen by."""
    scores = loop.validate(state, catalogue)
    meta['history'] = [*meta['history'], {'step': number, **scores}]
    loop.writer.scalars(loop.name, number, {f'valid/{k}': v for k, v in scores.items()})
    meta['best'] = max(scores['hit@20'], -1.0 if meta['best'] is None else meta['best'])
    return scores['hit@20']


def _patience_is_out(meta, patience):
    """Whether the last `patience` validations all failed to beat the best before them."""
    values = [h['hit@20'] for h in meta['history']]
    return bool(patience) and len(values) - 1 - int(np.argmax(values)) >= patience
