"""The loop that runs a stage's step: delayed metrics, validation, saves and resume."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from tpad_jax.distributed import hosts
from tpad_jax.distributed.devices import Devices
from tpad_jax.errors import InputError, Stopped
from tpad_jax.training import profiling
from tpad_jax.training import step as step_lib
from tpad_jax.training.checkpoint import Checkpoints, abstract
from tpad_jax.training.step import StepSpec
from tpad_jax.types import Batch, State

# What a stage's seconds go to beside its steps: compiling, waiting for input (at most), what saves
# and log lines hold up, and encoding and validating between steps.
SPENT = 'compile', 'input', 'save', 'log', 'between'


def lean_step(state: State, batch, shared: dict, *, spec: StepSpec, axis: str | None):
    """`training.train_step` with the frozen parameters beside the state, which is donated: the base
    of a large model is never copied, and never goes through a step.
    """
    state, logged = step_lib.train_step(state.replace(frozen=shared['frozen']), batch,
                                        shared['catalogue'], spec=spec, axis=axis)
    return state.replace(frozen={}), logged


@lru_cache(maxsize=8)
def lifted(devices: Devices, spec: StepSpec) -> Callable:
    """The step on the devices: a stage that is resumed, or a refit, finds it compiled."""
    return devices.lift(partial(lean_step, spec=spec))


@dataclass
class Loop:
    """What a run of steps needs beside the step itself.

    Attributes:
      name: of the run, in logs and progress.
      total: steps at most. log_every, save_every, eval_every, refresh_every, patience: see configs.
      batches: start step -> iterator of host batches, of this process's rows.
      validate: (state, catalogue) -> {name: float} with 'hit@20', or None. Like `refresh` it is
        given arrays of this process's own.
      refresh: state -> {name: rows} encoded anew, or None; refreshed: their names. Every
        validation follows one.
      stopping: asked after every step, and answered alike on all processes; True saves and raises
        Stopped.
      shown: losses named beside the progress bar.
      broken: directory that gets the batch of a step whose numbers are not finite; None: none.
      profile: traces and times some steps, or None.
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
    broken: Path | None = None
    profile: profiling.Profile | None = None


def fit(loop: Loop, spec: StepSpec, state: State, catalogue: dict):
    """Run a stage from its latest checkpoint, or from `state`, to its end.

    Several processes run it at once, with the same state and catalogue.

    Metrics of a step are fetched after the next one is dispatched; nothing else waits for the
    device between validations and saves.

    Returns:
      {path: array} of what was trained, at the best validation (the last step without one), the
      catalogue's rows that were encoded with it ({} where none are), and the run's record:
      'history' [{'step', 'hit@20', ...}], 'chosen' the step they are of, 'valid' what it scored
      (None without validation), 'seconds' over all sittings, and 'spent', of these the seconds by
      SPENT.

    Raises:
      Stopped: a signal came; the state is saved.
      InputError: checkpoints are damaged or gone, and what the stage chose cannot be had from those
        that are left.
    """
    refreshed, local = loop.refreshed if loop.refresh else (), loop.devices.local
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
    spent = meta['spent'] = dict.fromkeys(SPENT, 0.0) | meta.get('spent', {})
    number = first = int(state.step)
    loop.writer.rewind(loop.name, number)
    hosts.wait(f'{loop.name} begins')  # devices that meet for the first time are not waited for
    if not meta['done']:
        step = lifted(loop.devices, spec)
        with (closing(loop.batches(number)) as batches,
              _profiled(loop) as profile, loop.progress(loop.name, loop.total, number) as bar):
            host = next(batches)
            watched, recent = profiling.CompileWatch(loop.name, host), []
            batch = loop.devices.place(host)
            if profile:
                profile.count(partial(lean_step, spec=spec, axis=None), state, Batch.of(host),
                              {'catalogue': catalogue, 'frozen': frozen})
            while not meta['done']:
                shared = {'catalogue': catalogue, 'frozen': frozen}
                with (_timed(spent, 'compile' if number == first else None),
                      watched.step(number + 1, host, new=number == first)):
                    state, logged = step(state, batch, shared)
                number += 1
                asked = time.perf_counter()
                host = next(batches)
                batch = loop.devices.place(host)  # transfers while the step computes
                if logged['loss'].is_ready():  # and has ended: at most this long nothing computed
                    spent['input'] += time.perf_counter() - asked
                if recent:
                    _log(loop, spec, bar, recent, spent)
                recent.append((number, logged))
                meta['done'] = number >= loop.total
                if profile:
                    profile.after(number, first + 2, state, meta['done'])
                validating = loop.validate and (meta['done'] or number % loop.eval_every == 0)
                metric = None
                with _timed(spent, 'between'):
                    if loop.refresh and (validating or (
                            loop.refresh_every and number % loop.refresh_every == 0)):
                        catalogue = {**catalogue, **loop.devices.share(loop.refresh(local(state)))}
                    if validating:
                        metric = _validate(loop, meta, local(state), local(catalogue), number)
                        meta['done'] = meta['done'] or _patience_is_out(meta, loop.patience)
                stopping = loop.stopping() and not meta['done']
                due = number % loop.save_every == 0
                if due or stopping or meta['done'] or metric is not None:
                    # never save what is not finite
                    _log(loop, spec, bar, recent, spent, whatever=True)
                    meta['seconds'] = before + time.perf_counter() - begun
                    with _timed(spent, 'save'):  # all of it, or what copying takes
                        loop.checkpoints.save(number, held(), meta, metric,
                                              wait=meta['done'] or stopping)
                if stopping:
                    raise Stopped(f'stopped in stage {loop.name} after step {number}')
    chosen = loop.checkpoints.latest if meta['best'] is None else loop.checkpoints.best
    step, saved, _ = chosen(expected)
    valid = next((h for h in meta['history'] if h['step'] == step), None)
    if meta['best'] is not None and (valid is None or valid['hit@20'] < meta['best']):
        raise InputError(
            f"stage {loop.name} chose a step of hit@20 {meta['best']:.6g}, whose checkpoint is "
            f'damaged or gone (the best that is left is step {step}); restore it in '
            f'{loop.checkpoints.directory}, or delete that folder to train the stage again')
    trained, rows = local((saved['state'].params, saved['rows']))
    return trained, rows, {**meta, 'chosen': step, 'valid': valid}


@contextmanager
def _profiled(loop):
    try:
        yield loop.profile
    finally:
        if loop.profile:
            loop.profile.abandon()


@contextmanager
def _timed(spent, name):
    begun = time.perf_counter()
    yield
    if name is not None:
        spent[name] += time.perf_counter() - begun


def _log(loop, spec, bar, recent, spent, whatever=False):
    """Fetch the last finished step's metrics and write them, if a line is due or `whatever` it is.

    recent: [(number, metrics on the device)] since the last line, emptied by the next; the steps
    between are fetched only where the last is not finite, to find the first that was not.
    """
    number, logged = recent[-1]
    if number % loop.log_every and not whatever:
        return
    values = _scalars(logged)
    finite = bool(np.isfinite(list(values.values())).all())
    if not finite and values.get('optim/skipped_in_row', np.inf) > spec.skip:
        raise FloatingPointError(_not_finite(loop, spec, recent))
    if spec.skip and any(int(found['optim/skipped_in_row']) for _, found in recent):
        print(f'{_not_finite(loop, spec, recent)}; its update was left out, the '
              f'{values["optim/skipped"]:.0f}. of this stage', file=sys.stderr)
        values = {name: x for name, x in values.items() if np.isfinite(x)}
    recent.clear()
    with _timed(spent, 'log'):
        loop.writer.scalars(loop.name, number, values)
        bar(number, '  '.join(f'{name} {values[name]:.3f}' for name in ('loss', *loop.shown)
                              if name in values))


def _scalars(logged):
    """A step's metrics as floats; where its losses are not finite is left on the device."""
    found = jax.device_get({name: x for name, x in logged.items() if name != 'not_finite'})
    return {name: float(x) for name, x in found.items()}


def _not_finite(loop, spec, recent):
    """Which losses and which rows were not finite in the first step that had any, in words."""
    found = ((*step, sorted(name for name, x in _scalars(step[1]).items() if not np.isfinite(x)))
             for step in recent)
    number, logged, bad = next(step for step in found if step[2])
    told = f'stage {loop.name}, step {number}: {", ".join(bad)} not finite{_kept(loop, number)}'
    if 'not_finite' not in logged:
        return told
    rows = np.asarray(jax.device_get(logged['not_finite']))
    where = [f'{name} in {_listed(column[column >= 0])}'
             for (name, *_), column in zip(spec.losses, rows.T, strict=True) if (column >= 0).any()]
    if where:
        return f'{told}; of the training rows: {", ".join(where)}'
    if not {name for name, *_ in spec.losses} & set(bad):
        told += (', while every loss is: a gradient is not; `python -m tpad_jax.losses check` '
                 'looks at one loss alone')
    return told


def _kept(loop, number):
    """Keep the batch of step `number`, which the data's order gives again, and say where."""
    if loop.broken is None:
        return ''
    # each process keeps its own rows
    whose = f'-of-process-{jax.process_index()}' if jax.process_count() > 1 else ''
    file = loop.broken / f'{loop.name}-{number}{whose}.npz'
    with closing(loop.batches(number - 1)) as batches:
        batch = next(batches)
    loop.broken.mkdir(parents=True, exist_ok=True)
    np.savez(file, **{name: x for name, x in batch.items() if x is not None})
    return f' (its batch: {file})'


def _listed(rows, most=5):
    """[4, 1] -> 'rows 1, 4'; of many, the first."""
    more = f' and {len(rows) - most} more' if len(rows) > most else ''
    return f'row{"s" * (len(rows) > 1)} {", ".join(map(str, np.sort(rows)[:most]))}{more}'


def _validate(loop, meta, state, catalogue, number):
    """Score validation, remember it, and return the metric a checkpoint is chosen by."""
    scores = hosts.agreed(loop.validate(state, catalogue))
    meta['history'] = [*meta['history'], {'step': number, **scores}]
    loop.writer.scalars(loop.name, number, {f'valid/{k}': v for k, v in scores.items()})
    meta['best'] = max(scores['hit@20'], -1.0 if meta['best'] is None else meta['best'])
    return scores['hit@20']


def _patience_is_out(meta, patience):
    """Whether the last `patience` validations all failed to beat the best before them."""
    values = [h['hit@20'] for h in meta['history']]
    return bool(patience) and len(values) - 1 - int(np.argmax(values)) >= patience
