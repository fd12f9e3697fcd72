"""Checkpoints of a training run, and whose run a workdir is: the one place that imports orbax.

Orbax spends about 1 ms of Python on every array it saves: 450 arrays, 5 MB together, held up the
loop for 100-300 ms. Here the state is joined into a few arrays first (`bundle`), which is a tenth
of the work and the copy that lets the training step donate its state at once, and a thread does the
saving: what is left to wait for is a few milliseconds.
"""

import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from tpad_jax import bundle
from tpad_jax.errors import InputError

# Changing these changes no result: where things lie, how often we look, on how many devices and in
# how many parts.
FREE_KEYS = frozenset({'mesh', 'parallel', 'devices', 'model_shards', 'accumulate', 'stages',
                       'save_every', 'log', 'workdir', 'raw_dir', 'npz', 'data_dir'})
# What orbax and tensorstore raise on a file that is missing, cut short or garbled.
DAMAGE = (OSError, ValueError, KeyError)


class Checkpoints:
    """The checkpoints of one stage: the latest two and the best one are kept.

    Args:
      directory: made if absent; half-written checkpoints of a killed run are removed from it.

    A checkpoint appears under its step only when it is whole (written aside, then renamed). With
    one process a thread writes it; with several every process calls from its main thread, as orbax
    needs for its barriers. Not to be shared between threads; call `close` before leaving.
    """

    def __init__(self, directory):
        policies = ocp.training.preservation_policies
        best = policies.BestN(n=1, get_metric_fn=_metric, keep_checkpoints_without_metrics=False)
        context = ocp.Context()
        # Files that help only many replicas or readers without an abstract tree: 20 % of a save.
        context.array.saving.enable_write_sharding_file = False
        context.array.saving.array_metadata_store = None
        context.array.saving.use_replica_parallel = False
        # Else a folder that cannot be made is waited for, for minutes, before the error shows.
        context.asynchronous.create_directories_asynchronously = False
        self._checkpointer = ocp.training.Checkpointer(
            Path(directory).absolute(),
            context=context,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
            cleanup_tmp_directories=True,
        )
        self._thread = ThreadPoolExecutor(1, 'checkpoint') if jax.process_count() == 1 else None
        self._pending = None

    def save(self, step, state, meta, metric=None, wait=False):
        """Starts saving `state` as `step` and returns once the state may be donated.

        Args:
          step: int; a checkpoint that already has this number is replaced.
          state: pytree of jax.Array (raw, no typed PRNG keys). It is copied on the device, which
            for a moment holds it twice.
          meta: dict that JSON can hold; tuples come back as lists.
          metric: float, higher is better; without one the step is never the best.
          wait: return only when the checkpoint is on disk.

        Raises:
          ValueError: `metric` is not finite. TypeError: JSON cannot hold `meta`. What went wrong in
            an earlier save is raised here too.
        """
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f'step {step} cannot be ranked by the metric {metric}')
        meta = json.loads(json.dumps(meta))
        arrays, index = bundle.join(state)
        self._finish()
        replaced = any(saved.step == step for saved in self._checkpointer.checkpoints)
        self._pending = self._start(
            int(step),
            {'state': arrays},
            force=True,
            overwrite=replaced,
            metrics=None if metric is None else {'metric': float(metric)},
            custom_metadata={'meta': meta, 'index': index},
        )
        if wait:
            self._finish()

    def latest(self, abstract_state):
        """The newest whole checkpoint, `(step, state, meta)`, or None where none was ever saved.

        Args:
          abstract_state: as `abstract` makes it; the mesh may differ from the one that saved.

        A damaged checkpoint is reported on stderr, moved aside as `damaged-<step>`, and the one
        before is taken.

        Raises:
          InputError: the checkpoint is of another model, or all of them are damaged.
        """
        return self._first(abstract_state, lambda saved: saved.step, lambda saved: True)

    def best(self, abstract_state):
        """The checkpoint of the highest metric (the later one of equals); else like `latest`."""
        return self._first(
            abstract_state,
            lambda saved: (_metric(saved.metrics), saved.step),
            lambda saved: saved.metrics is not None,
        )

    def close(self):
        """Waits for the save under way and lets go of threads; raises what went wrong in it."""
        try:
            self._finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            self._checkpointer.close()

    def _start(self, *args, **kwargs):
        if self._thread is None:
            return self._checkpointer.save_checkpointables_async(*args, **kwargs)
        return self._thread.submit(self._checkpointer.save_checkpointables, *args, **kwargs)

    def _finish(self):
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _first(self, abstract_state, order, wanted):
        self._finish()
        found = sorted(filter(wanted, self._checkpointer.checkpoints), key=order, reverse=True)
        damaged = []
        for saved in found:
            try:
                about = self._checkpointer.checkpointables_metadata(saved.step).custom_metadata
                index, meta = about['index'], about['meta']
            except (*DAMAGE, TypeError) as error:  # TypeError: there is no metadata at all
                damaged.append((saved.step, error))
                continue
            bundle.check(index, abstract_state, self._checkpointer.directory / str(saved.step))
            try:
                state = self._load(saved.step, index, abstract_state)
            except DAMAGE as error:
                damaged.append((saved.step, error))
                continue
            self._put_aside(damaged, saved.step)
            return saved.step, state, meta
        if damaged:
            raise InputError(
                f'{self._checkpointer.directory}: every checkpoint is damaged (steps '
                f'{", ".join(str(step) for step, _ in damaged)}: {_brief(damaged[0][1])}); '
                'restore the folder from a copy, or delete it to start this stage again'
            )
        return None

    def _load(self, step, index, abstract_state):
        like = bundle.abstract_joined(index, abstract_state)
        joined = self._checkpointer.load_checkpointables(step, {'state': like})['state']
        return bundle.split(joined, index, abstract_state)

    def _put_aside(self, damaged, used):
        root = self._checkpointer.directory
        for step, error in damaged:
            if jax.process_index() == 0:
                aside = root / f'damaged-{step}'
                if aside.exists():
                    aside.rmtree()
                (root / str(step)).rename(aside)
                print(
                    f'{root}: checkpoint {step} is damaged ({_brief(error)}) and was moved to '
                    f'{aside.name}; step {used} is used instead',
                    file=sys.stderr,
                )
        if damaged:
            multihost_utils.sync_global_devices('damaged checkpoints put aside')
            self._checkpointer.reload()


def abstract(state):
    """Shapes, dtypes and shardings of `state`, a pytree of jax.Array: what a load needs to know."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def claim(workdir, config, fingerprint=None):
    """Makes `workdir` the run of `config`, or checks that it already is.

    The first run writes `config.json`. A later one must have the same config and data; keys that
    change no result (`FREE_KEYS` and what begins with `log_`, at any depth) may differ.

    Args:
      workdir: made if absent.
      config: nested dict; what JSON does not know is written as its str.
      fingerprint: of the data, or None where no data is read yet; the first one given is kept.

    Raises:
      InputError: config or data differ; the sentence names every differing key with both values.
    """
    path = Path(workdir) / 'config.json'
    now = {
        'config': json.loads(json.dumps(config, default=str)),
        'fingerprint': fingerprint,
    }
    if path.exists():
        try:
            before = json.loads(path.read_text())
            flat, kept = _flat(before['config']), before['fingerprint']
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f'{path} is not a config this program wrote ({_brief(error)}); choose another '
                "workdir or remove the file's run"
            ) from error
        current = _flat(now['config'])
        if fingerprint is not None and kept is not None:
            flat['data fingerprint'], current['data fingerprint'] = kept, fingerprint
        changes = [
            f'{key} was {_shown(flat, key)} and is now {_shown(current, key)}'
            for key in sorted(flat.keys() | current.keys())
            if not _free(key) and _shown(flat, key) != _shown(current, key)
        ]
        if changes:
            raise InputError(
                f'{path} belongs to another run: {"; ".join(changes)}; set them back or choose '
                'another workdir'
            )
        now = {**before, 'fingerprint': fingerprint if kept is None else kept}
        if now == before:
            return
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix('.part')
        part.write_text(json.dumps(now, indent=1) + '\n')
        os.replace(part, path)


def enter(workdir: Path, config) -> None:
    """Make the workdir.

    Raises:
      InputError: it cannot be had, or is another config's.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'{workdir} cannot be made ({error.strerror}); choose another --workdir'
                         ) from error
    if not os.access(workdir, os.W_OK):
        raise InputError(f'{workdir} cannot be written to; choose another --workdir')
    if (workdir / 'config.json').is_file():  # written only once the data is known to be usable
        claim(workdir, config.to_dict())


def _metric(metrics):
    return metrics['metric']


def _brief(error):
    lines = str(error).strip().splitlines()
    return f'{type(error).__name__}: {lines[0][:160] if lines else ""}'


def _free(key):
    if key.startswith('losses.'):  # a loss's own `stages` do change results
        return False
    return any(part in FREE_KEYS or part.startswith('log_') for part in key.split('.'))


def _flat(tree, prefix=''):
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f'{prefix}{key}.')
        else:
            flat[prefix + key] = value
    return flat


def _shown(flat, key):
    return json.dumps(flat[key]) if key in flat else 'absent'
