"""The loop that runs a stage's step: delayed metrics, validation, saves and resumption."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpad_jax.core import files
from tpad_jax.distributed import hosts
from tpad_jax.distributed.devices import Devices
from tpad_jax.errors import InputError, Stopped
from tpad_jax.training import profiling, step as step_lib
from tpad_jax.training.checkpoint import Checkpoints, abstract
from tpad_jax.types import Batch, State

# The validation metric that chooses a step; the lowest is the best. Ranks of the first twenty are a
# coarser measure: on a few hundred rows they choose by chance.
SELECT = 'nll'
# Seconds of a stage that are not training steps: compilation, waiting for input (an upper bound),
# delays by saves and by log lines, and encoding and validation between steps.
SPENT = 'compile', 'input', 'save', 'log', 'between'


def lean_step(state: State, batch, shared: dict, *, spec: step_lib.StepSpec, axis: str | None):
    """`step.train_step` with the frozen parameters outside the state.

    The state is donated. The base of a large model stays where it is and is never copied.

    Args:
      state: types.State without frozen parameters.
      batch: types.Batch of this replica's rows.
      shared: 'catalogue' and 'frozen', both read only.
      spec: of the stage.
      axis: name of the replicas' axis, or None.

    Returns:
      See `step.train_step`.
    """
    state, logged = step_lib.train_step(state.replace(frozen=shared['frozen']), batch,
                                        shared['catalogue'], spec=spec, axis=axis)
    return state.replace(frozen={}), logged


@lru_cache(maxsize=16)  # every recommender of a run and every stage
def lifted(devices: Devices, spec: step_lib.StepSpec) -> Callable:
    """The step on the devices: a stage that is resumed, or a refit, finds it compiled."""
    return devices.lift(partial(lean_step, spec=spec), spec.seldom)


def compile_step(devices: Devices, spec: step_lib.StepSpec, state: State, batch: Batch,
                 catalogue: dict) -> jax.stages.Compiled:
    """Compile a stage's step from shapes; the first step of the stage then finds it compiled.

    Args:
      devices: those that run the step, also of another machine.
      spec: of the stage.
      state: arrays or shapes, the frozen parameters among them.
      batch: arrays or shapes, a host's.
      catalogue: arrays or shapes, {name: [V+1, ...]}.
    """
    def placed(tree, shardings):
        return jax.tree.map(lambda x, sharding: jax.ShapeDtypeStruct(
            x.shape, jax.dtypes.canonicalize_dtype(x.dtype), sharding=sharding,
            weak_type=getattr(x, 'weak_type', False)), tree, shardings)

    shared = {'catalogue': catalogue, 'frozen': state.frozen}
    state = state.replace(frozen={})
    batch = placed(batch, jax.tree.map(lambda _: devices.split(), batch))
    traced = lifted(devices, spec).trace(placed(state, devices.shardings(state)), batch,
                                         placed(shared, devices.shardings(shared)))
    return traced.lower(lowering_platforms=(devices.devices[0].platform,)).compile()


@dataclass
class Loop:
    """Settings and services of a run of steps.

    Attributes:
      name: of the run, in logs and progress.
      total: maximum number of steps.
      devices: that run the steps.
      batches: first step -> iterator of host batches with this process's rows.
      checkpoints: of the run.
      writer: log.Writer.
      progress: as console.progress.
      log_every: steps between log lines.
      save_every: steps between checkpoints.
      eval_every: steps between validations.
      patience: validations without a new best before the run ends; 0: no limit.
      refresh_every: steps between refreshes; 0: only before a validation.
      validate: (state, catalogue) -> {name: float} with SELECT, or None. Like `refresh` it gets
        arrays of this process alone.
      validates_first: whether the state before the first step is validated, and may be chosen.
      refresh: state -> {name: rows} encoded again, or None. It precedes every validation.
      refreshed: names of the rows that `refresh` returns.
      stopping: called after every step, with the same answer on all processes. After True, the
        state is saved and Stopped is raised.
      shown: names of the losses next to the progress bar.
      broken: directory for the batch of a step whose numbers are not finite, or None.
      profile: traces and times some steps.
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
    validates_first: bool = False
    refresh: Callable | None = None
    refreshed: tuple[str, ...] = ()
    stopping: Callable[[], bool] = lambda: False
    shown: tuple[str, ...] = ()
    broken: Path | None = None
    profile: profiling.Profile = field(default_factory=profiling.Profile)


def fit(loop: Loop, spec: step_lib.StepSpec, state: State, catalogue: dict):
    """Run a stage from its latest checkpoint, or from `state`, to its end.

    Several processes run it together, with the same state and catalogue. The metrics of a step are
    fetched after the next step is dispatched. Between validations and saves nothing else waits for
    the device.

    Args:
      loop: settings and services.
      spec: of the stage.
      state: types.State before the first step.
      catalogue: {name: [V+1, ...]}.

    Returns:
      {path: array} of the trained parameters at the best validation (without validation, at the
      last step), the rows of the catalogue that were encoded with them, and the record of the run:
      'history' [{'step', 'nll', ...}], the 'chosen' step, its scores 'valid' (None without
      validation), 'seconds' over all processes that resumed it, and the part of them in 'spent',
      by SPENT.

    Raises:
      Stopped: a signal came; the state is saved.
      InputError: the checkpoint of the chosen step is damaged or missing.
    """
    refreshed, local = loop.refreshed if loop.refresh else (), loop.devices.local
    state, catalogue = loop.devices.share(state), loop.devices.share(catalogue)
    state, frozen = state.replace(frozen={}), state.frozen
    record = {'history': [], 'best': None, 'seconds': 0.0, 'done': False}

    def to_save():
        return {'state': state, 'rows': {name: catalogue[name] for name in refreshed}}

    like = abstract(to_save())
    checkpoint = loop.checkpoints.latest(like)
    if checkpoint is not None:
        _, saved, record = checkpoint
        state, catalogue = saved['state'], {**catalogue, **saved['rows']}
    begun = time.perf_counter() - record['seconds']
    spent = record['spent'] = dict.fromkeys(SPENT, 0.0) | record.get('spent', {})
    number = first = int(state.step)
    loop.writer.rewind(loop.name, number)
    # Processes meet here, so that none waits for another's start within its first step.
    hosts.wait(f'{loop.name} begins')
    if checkpoint is None and loop.validates_first:
        metric = _validate(loop, record, local(state), local(catalogue), 0)
        loop.checkpoints.save(0, to_save(), record, metric)
    if not record['done']:
        step = lifted(loop.devices, spec)
        with (closing(loop.batches(number)) as batches, closing(loop.profile),
              loop.progress(loop.name, loop.total, number) as bar):
            host = next(batches)
            watch, recent = profiling.CompileWatch(loop.name, host), []
            batch = loop.devices.place(host)
            if loop.profile.steps:
                loop.profile.count(partial(lean_step, spec=spec, axis=None), state, Batch.of(host),
                                   {'catalogue': catalogue, 'frozen': frozen})
            while not record['done']:
                new, shared = number == first, {'catalogue': catalogue, 'frozen': frozen}
                with (_timed(spent, 'compile') if new else nullcontext(),
                      watch.step(number + 1, host, new)):
                    state, logged = step(state, batch, shared)
                number += 1
                requested = time.perf_counter()
                host = next(batches)
                batch = loop.devices.place(host)  # is transferred while the step computes
                if logged['loss'].is_ready():  # the devices were idle for at most this long
                    spent['input'] += time.perf_counter() - requested
                if recent:
                    _log(loop, spec, bar, recent, spent)
                recent.append((number, logged))
                record['done'] = number >= loop.total
                loop.profile.after(number, first + 2, state, record['done'])
                validating = loop.validate and (record['done'] or number % loop.eval_every == 0)
                metric = None
                with _timed(spent, 'between'):
                    if loop.refresh and (validating or (
                            loop.refresh_every and number % loop.refresh_every == 0)):
                        catalogue = {**catalogue, **loop.devices.share(loop.refresh(local(state)))}
                    if validating:
                        metric = _validate(loop, record, local(state), local(catalogue), number)
                stopping = loop.stopping() and not record['done']
                due = number % loop.save_every == 0
                if due or stopping or record['done'] or metric is not None:
                    # a state that is not finite is never saved
                    _log(loop, spec, bar, recent, spent, due=True)
                    record['seconds'] = time.perf_counter() - begun
                    with _timed(spent, 'save'):  # the whole save, or the copy alone
                        loop.checkpoints.save(number, to_save(), record, metric,
                                              wait=record['done'] or stopping)
                if stopping:
                    raise Stopped(f'stopped in stage {loop.name} after step {number}')
        record['seconds'] = time.perf_counter() - begun  # with the last save, as in `spent`
    return _chosen(loop, like, record)


def _chosen(loop, like, record):
    """What `fit` returns, from the checkpoint of the chosen step."""
    best = record['best']
    checkpoint = (loop.checkpoints.latest if best is None else loop.checkpoints.best)(like)
    step, saved, _ = checkpoint or (None, None, None)
    valid = next((entry for entry in record['history'] if entry['step'] == step), None)
    if best is not None and (valid is None or valid[SELECT] > best):
        raise InputError(f'stage {loop.name} chose a step of {SELECT} {best:.6g}, whose checkpoint '
                         f'is damaged or missing (the best remaining is of step {step}). Fix: put '
                         f'it into {loop.checkpoints.directory}, or delete that to train again')
    trained, rows = loop.devices.local((saved['state'].params, saved['rows']))
    return trained, rows, {**record, 'chosen': step, 'valid': valid}


@contextmanager
def _timed(spent, name):
    begun = time.perf_counter()
    yield
    spent[name] += time.perf_counter() - begun


def _log(loop, spec, bar, recent, spent, due=False):
    """Fetch the metrics of the last finished step and write them, if a line is due.

    Args:
      loop: settings and services.
      spec: of the stage.
      bar: the progress bar.
      recent: [(number, metrics on the device)] since the last line, which this line empties. Those
        before the last are fetched only where the last is not finite, to find the first such step.
      spent: seconds by SPENT.
      due: whether to write a line at any step.
    """
    number, logged = recent[-1]
    if number % loop.log_every and not due:
        return
    values = _scalars(logged)
    finite = bool(np.isfinite(list(values.values())).all())
    if not finite and values.get('optim/skipped_in_row', np.inf) > spec.skip:
        raise FloatingPointError(_not_finite(loop, spec, recent))
    if spec.skip and any(int(metrics['optim/skipped_in_row']) for _, metrics in recent):
        print(f'{_not_finite(loop, spec, recent)}; its update was left out (updates left out in '
              f'this stage: {values["optim/skipped"]:.0f})', file=sys.stderr)
        values = {name: x for name, x in values.items() if np.isfinite(x)}
    recent.clear()
    with _timed(spent, 'log'):
        loop.writer.scalars(loop.name, number, values)
        bar(number, '  '.join(f'{name} {values[name]:.3f}' for name in ('loss', *loop.shown)
                              if name in values))


def _scalars(logged):
    """A step's metrics as floats, without the rows that are not finite."""
    scalars = jax.device_get({name: x for name, x in logged.items() if name != 'not_finite'})
    return {name: float(x) for name, x in scalars.items()}


def _not_finite(loop, spec, recent):
    """Describe the losses and rows that were not finite, in the first step that had any."""
    steps = ((*step, sorted(name for name, x in _scalars(step[1]).items() if not np.isfinite(x)))
             for step in recent)
    number, logged, bad = next(step for step in steps if step[2])
    text = f'stage {loop.name}, step {number}: {", ".join(bad)} not finite'
    text += _save_batch(loop, number)
    if 'not_finite' not in logged:
        return text
    rows = np.asarray(jax.device_get(logged['not_finite']))
    where = []
    for loss, column in zip(spec.losses, rows.T, strict=True):
        bad_rows = np.sort(column[column >= 0])
        if len(bad_rows):
            more = f' and {len(bad_rows) - 5} more' if len(bad_rows) > 5 else ''
            where.append(f'{loss.name} in rows {", ".join(map(str, bad_rows[:5]))}{more}')
    if where:
        return f'{text}; of the training rows: {", ".join(where)} (weights below 0 count as such)'
    if not {loss.name for loss in spec.losses} & set(bad):
        text += (', while every loss is: a gradient is not; `python -m tpad_jax.losses check` '
                 'checks one loss alone')
    return text


def _save_batch(loop, number):
    """Save the batch of step `number`, which the data's order gives again, and say where."""
    if loop.broken is None:
        return ''
    # each process saves its rows
    suffix = f'-of-process-{jax.process_index()}' if jax.process_count() > 1 else ''
    file = loop.broken / f'{loop.name}-{number}{suffix}.npz'
    with closing(loop.batches(number - 1)) as batches:
        batch = next(batches)
    loop.broken.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as partial_file, partial_file.open('wb') as opened:
        np.savez(opened, **{name: x for name, x in batch.items() if x is not None})
    return f' (its batch: {file})'


def _validate(loop, record, state, catalogue, number):
    """Score validation, record it, and return the metric that ranks the checkpoint.

    The run ends if none of the last `patience` validations beat the best one before them.
    """
    scores = hosts.agreed(loop.validate(state, catalogue))
    record['history'] = [*record['history'], {'step': number, **scores}]
    loop.writer.scalars(loop.name, number, {f'valid/{k}': v for k, v in scores.items()})
    record['best'] = min(entry[SELECT] for entry in record['history'])
    # steps have their patience even where the state before them was better
    steps = [entry[SELECT] for entry in record['history'] if entry['step']]
    since = len(steps) - 1 - int(np.argmin(steps)) if steps else 0
    record['done'] |= bool(loop.patience) and since >= loop.patience
    return -scores[SELECT]  # of checkpoints the one with the highest metric is the best
