"""Checkpoints of a training run, and whose run a workdir is: the one place that imports orbax.

Orbax spends about 1 ms of Python on every array it saves: 450 arrays, 5 MB together, held up the
loop for 100-300 ms. Here the state is joined into a few arrays first (`bundle`), which is a tenth
of the work and the copy that lets the training step donate its state at once, and a thread does the
saving: what is left to wait for is a few milliseconds.
"""

import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from tpad_jax.errors import UNWRITABLE, InputError
from tpad_jax.training import bundle

# Changing these changes no result: where things lie, how often we look, on how many devices and in
# how many parts.
FREE_KEYS = frozenset({'mesh', 'parallel', 'devices', 'model_shards', 'accumulate', 'stages',
                       'save_every', 'log', 'workdir', 'raw_dir', 'npz', 'data_dir',
                       'bad_share'})
# What orbax and tensorstore raise on a file that is missing, cut short or garbled.
DAMAGE = (OSError, ValueError, KeyError)
ASIDE = 'damaged-'  # and the step: a checkpoint that cannot be read, kept but never looked at again
METRICS = 'metrics/metrics'  # of a checkpoint's folder: JSON, like the next two
DESCRIBED = ('_CHECKPOINT_METADATA', 'state/_METADATA')


class Checkpoints:
    """The checkpoints of one stage: the latest two and the best one are kept.

    Args:
      directory: made if absent; half-written checkpoints of a killed run are removed from it, and
        one whose metric cannot be read is moved aside as `damaged-<step>` and reported.

    A checkpoint appears under its step only when it is whole (written aside, then renamed). With
    one process a thread writes it; with several every process calls from its main thread, as orbax
    needs for its barriers. Not to be shared between threads; call `close` before leaving.

    Raises:
      InputError: nothing can be written there, or the only checkpoint is damaged.
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
        self._root, self._failed = Path(directory).absolute(), False
        self._ask_metrics()
        try:
            self._checkpointer = ocp.training.Checkpointer(
                self._root,
                context=context,
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(2), best]),
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            _refuse(error, f'{self._root} cannot be written to')
            raise
        # It would ask jax's preemption service by numbers of its own, from threads of its own, and
        # a stop that all agree on (processes.together) would be for a question nobody asks.
        self._checkpointer._manager.reached_preemption = lambda step: False
        self._thread = ThreadPoolExecutor(1, 'checkpoint') if jax.process_count() == 1 else None
        self._pending, self._saving = None, None

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
            an earlier save is raised here too: InputError where the disk is full or read-only.
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
            custom_metadata={'meta': meta, 'index': index,
                             'metric': None if metric is None else float(metric)},
        )
        self._saving = int(step)
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

    @property
    def directory(self):
        """Where they lie."""
        return self._root

    def steps(self):
        """The steps that are there whole, ascending."""
        self._finish()
        return [saved.step for saved in self._checkpointer.checkpoints]

    def arrays(self, step):
        """What a checkpoint holds, without knowing the model: ({path: jax.Array}, meta)."""
        index, meta = self._about(step)
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        like = {entry['path']: jax.ShapeDtypeStruct(tuple(entry['shape']), entry['dtype'],
                                                    sharding=here) for entry in index}
        return self._load(step, index, like), meta

    def close(self):
        """Waits for the save under way and lets go of threads; raises what went wrong in it."""
        try:
            self._finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            try:
                self._checkpointer.close()
            except DAMAGE:
                if not self._failed:  # else it is what `_finish` raised, once more
                    raise

    def _start(self, *args, **kwargs):
        if self._thread is None:
            return self._checkpointer.save_checkpointables_async(*args, **kwargs)
        return self._thread.submit(self._checkpointer.save_checkpointables, *args, **kwargs)

    def _finish(self):
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except DAMAGE as error:
            self._failed = True
            _refuse(error, f'{self._root}: checkpoint {self._saving} could not be written')
            raise

    def _first(self, abstract_state, order, wanted):
        self._finish()
        found = sorted(filter(wanted, self._checkpointer.checkpoints), key=order, reverse=True)
        damaged = []
        for saved in found:
            try:
                index, meta = self._about(saved.step)
            except (*DAMAGE, TypeError) as error:  # TypeError: there is no metadata at all
                damaged.append((saved.step, error))
                continue
            bundle.check(index, abstract_state, self._root / str(saved.step))
            try:
                state = self._load(saved.step, index, abstract_state)
            except DAMAGE as error:
                damaged.append((saved.step, error))
                continue
            self._put_aside(damaged, saved.step)
            return saved.step, state, meta
        if damaged:
            raise self._lost([str(self._root / str(step)) for step, _ in damaged],
                             self._told(*damaged[0]))
        aside = sorted(map(str, self._root.glob(f'{ASIDE}*')))
        if aside and not self._checkpointer.checkpoints:
            raise self._lost(aside, 'moved aside by an earlier start')
        return None

    def _lost(self, folders, why):
        return InputError(
            f'{self._root}: every checkpoint is damaged ({", ".join(folders)}: {why}); restore the '
            'folder from a copy, or delete it to start this stage again'
        )

    def _about(self, step):
        """The index of a checkpoint's arrays, and its meta; what is wrong names the file."""
        folder = self._root / str(step)
        for name in DESCRIBED:
            _json(folder / name)
        about = self._checkpointer.checkpointables_metadata(step).custom_metadata
        found = about['index'], about['meta']
        if about.get('metric') is not None:  # orbax takes one without the file for unranked
            _json(folder / METRICS)
        return found

    def _load(self, step, index, abstract_state):
        like = bundle.abstract_joined(index, abstract_state)
        joined = self._checkpointer.load_checkpointables(step, {'state': like})['state']
        return bundle.split(joined, index, abstract_state)

    def _ask_metrics(self):
        """Puts aside what orbax would stumble over: it reads every metric when it begins."""
        steps = [int(file.parts[-3]) for file in self._root.glob(f'[0-9]*/{METRICS}')
                 if file.parts[-3].isdigit()]
        damaged = []
        for step in sorted(steps):
            try:
                _metric(_json(self._root / str(step) / METRICS))
            except (*DAMAGE, TypeError) as error:
                damaged.append((step, error))
        left = {int(f.name) for f in self._root.glob('[0-9]*') if f.name.isdigit()} - {
            step for step, _ in damaged}
        if damaged and not left:
            raise self._lost([str(self._root / str(step)) for step, _ in damaged],
                             self._told(*damaged[-1]))
        self._move(damaged, max(left, default=None))

    def _put_aside(self, damaged, used):
        self._move(damaged, used)
        if damaged:
            self._checkpointer.reload()

    def _move(self, damaged, used):
        if damaged:  # no process may look once another has begun to move
            multihost_utils.sync_global_devices('damaged checkpoints found')
        for step, error in damaged if jax.process_index() == 0 else ():
            folder, aside = self._root / str(step), self._root / f'{ASIDE}{step}'
            if aside.exists():
                shutil.rmtree(aside)
            print(f'{self._root}: checkpoint {step} is damaged ({self._told(step, error)}) and was '
                  f'moved to {aside.name}; step {used} is used instead', file=sys.stderr)
            folder.rename(aside)
        if damaged:
            multihost_utils.sync_global_devices('damaged checkpoints put aside')

    def _told(self, step, error):
        """What is wrong with a checkpoint, the file first where the error knows one."""
        while error.__cause__ is not None:  # the last one was there
            error = error.__cause__
        named = re.findall(re.escape(f'{self._root / str(step)}/') + r'([\w./-]*\w)', str(error))
        return f'{max(named, key=len)}: {_brief(error)}' if named else _brief(error)


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
                'workdir, restore the file, or delete it if this is the config of the run there'
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
      InputError: it cannot be had, is in a bucket, or is another config's.
    """
    if re.match('[a-z0-9]+:/', str(workdir)):  # what a Path leaves of gs://; it would be made here
        said = str(workdir).replace(':/', '://', 1)
        raise InputError(f'--workdir={said} is no directory: data is mapped into memory and '
                         'files are renamed, which a bucket does not offer; name a local one, and '
                         f'--mirror={said} for a copy there')
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f'{workdir} cannot be made ({error.strerror}); choose another --workdir'
                         ) from error
    # by the ids that will write, where the system can tell
    if not os.access(workdir, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
        raise InputError(f'{workdir} cannot be written to; choose another --workdir')
    if (workdir / 'config.json').is_file():  # written only once the data is known to be usable
        claim(workdir, config.to_dict())


def _metric(metrics):
    return metrics['metric']


def _json(file):
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f'{file} is no JSON any more ({error})') from None


def _refuse(error, what):
    """Raises InputError where the error is of a place that takes nothing more."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, 'errno', None)
    if number in UNWRITABLE:
        raise InputError(f'{what} ({os.strerror(number)}); what was saved before is whole: make '
                         'room or give write access, and the same command goes on from there'
                         ) from error


def _brief(error):
    told = str(error).strip().partition('\n')[0].partition(' [tensorstore_spec')[0]
    return f'{type(error).__name__}: {told if len(told) <= 160 else "..." + told[-160:]}'


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
