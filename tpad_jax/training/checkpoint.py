"""Checkpoints of a training stage; the only module that imports Orbax.

A checkpoint is a directory whose name is its step:

    state/            the arrays, in Orbax's OCDBT format, which keeps many arrays in few files
    meta.json         the validation metric and the loop's own record
    checksums.json    {file: SHA-256} of all files above

Orbax reads a flipped byte in an array back without an error. The checksums detect every change of
every file, before Orbax reads one.
"""

import json
import math
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from orbax.checkpoint import v1 as ocp

from tpad_jax.core.files import PARTIAL, sha256
from tpad_jax.distributed import hosts
from tpad_jax.errors import UNWRITABLE, InputError, refuse_if

META, CHECKSUMS, STATE = 'meta.json', 'checksums.json', 'state'
PARAMS = 'state.params.'  # of the paths in a state, that of the trained parameters
DAMAGED = 'damaged-'  # and the step: a damaged checkpoint, kept for inspection and never read again
LARGE = 2**30  # bytes
LATEST = 2  # how many of the newest checkpoints are kept, next to the best one


class Checkpoints:
    """The checkpoints of one stage: the latest two and the best one are kept.

    A checkpoint is written to `<step>.partial` and renamed when it is complete, so that a kill
    cannot make an incomplete one visible. A thread writes it while training continues. With several
    processes, each calls Orbax from its main thread, because Orbax synchronises the devices, and
    process 0 renames. Not to be shared between threads; call `close` at the end.

    Args:
      directory: str or Path. Created if absent. Incomplete checkpoints in it are removed.

    Raises:
      InputError: the directory cannot be written to.
    """

    def __init__(self, directory):
        self.directory = Path(directory).absolute()
        self._pending, self._saving = None, None
        # not named after the path, which may differ from host to host
        with _refusing(f'{self.directory} cannot be written to'), hosts.one_first('checkpoints'):
            self.directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                for folder in self.directory.glob(f'*{PARTIAL}*'):  # Orbax may append to it
                    shutil.rmtree(folder)
        self._thread = ThreadPoolExecutor(1, 'checkpoint')

    def save(self, step, state, meta, metric=None, wait=False):
        """Start to save `state` as checkpoint `step`; return once the state may be donated.

        Args:
          step: int. A checkpoint with this number is replaced.
          state: pytree of jax.Array (raw, no typed PRNG keys). It is copied on the device, which
            holds it twice until the copy is written; in one process a state of more than LARGE
            bytes is not, and written before `save` returns.
          meta: dict that JSON can hold. Tuples come back as lists.
          metric: float, higher is better. A checkpoint without one is never the best.
          wait: whether to return only when the checkpoint is on disk.

        Raises:
          ValueError: `metric` is not finite.
          TypeError: JSON cannot hold `meta`.
          InputError: the disk is full or read-only. An error of the save before is raised here too.
        """
        if metric is not None and not math.isfinite(metric):
            raise ValueError(f'step {step} cannot be ranked by the metric {metric}')
        record = json.dumps({'metric': None if metric is None else float(metric), 'meta': meta})
        arrays = _by_path(state)
        large = sum(x.nbytes for x in arrays.values()) > LARGE and jax.process_count() == 1
        arrays = arrays if large else _copy(arrays)
        self._finish()
        partial_folder = self.directory / f'{step}{PARTIAL}'
        save = {'checkpointables': {STATE: arrays}, 'overwrite': True}
        if jax.process_count() == 1:
            write = partial(_with_options, ocp.save_checkpointables, partial_folder, **save)
        else:
            write = _with_options(ocp.save_checkpointables_async, partial_folder, **save).result
        self._saving = int(step)
        self._pending = self._thread.submit(self._write, write, partial_folder, record)
        if wait or large:
            self._finish()

    def latest(self, abstract_state):
        """Load the newest undamaged checkpoint.

        Damaged checkpoints are reported on stderr and moved to `damaged-<step>`.

        Args:
          abstract_state: pytree of jax.ShapeDtypeStruct, see `abstract`. The mesh may differ from
            the one that saved.

        Returns:
          `(step, state, meta)`, or None where no checkpoint was ever saved.

        Raises:
          InputError: the checkpoint is of another model, or all checkpoints are damaged.
        """
        return self._load(lambda records: max(records, default=None), abstract_state)

    def best(self, abstract_state):
        """Load the checkpoint with the highest metric, the later one of equals.

        Args:
          abstract_state: as in `latest`.

        Returns:
          `(step, state, meta)`, or None where no checkpoint has a metric.

        Raises:
          InputError: as in `latest`.
        """
        return self._load(_best, abstract_state)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        self._finish()
        return sorted(_folders(self.directory))

    def close(self):
        """Wait for the save in progress and end the thread; raise the error of that save."""
        try:
            self._finish()
        finally:
            self._thread.shutdown()

    def _write(self, write, folder, record):
        """Complete a checkpoint: write the arrays and the other files, rename, remove old ones."""
        write()
        if jax.process_index() > 0:
            return
        (folder / META).write_text(record)
        (folder / CHECKSUMS).write_text(json.dumps(_checksums(folder), indent=1) + '\n')
        complete = folder.with_suffix('')
        retired = [_retire(complete)] if complete.exists() else []
        folder.rename(complete)
        folders = _folders(self.directory)
        kept = {*sorted(folders)[-LATEST:], _best(_records(folders))}
        for old in (*retired, *(_retire(folders[step]) for step in folders.keys() - kept)):
            shutil.rmtree(old)

    def _finish(self):
        """Wait for the save in progress, on all processes."""
        pending, self._pending = self._pending, None
        if pending is not None:
            with (_refusing(f'{self.directory}: checkpoint {self._saving} could not be written'),
                  hosts.one_first(f'checkpoint {self._saving}')):
                pending.result()

    def _undamaged(self):
        """The folders {step: path} of all checkpoints, once the damaged are moved."""
        self._finish()
        folders = _folders(self.directory)
        damaged = {step: reason for step, folder in folders.items() if (reason := _damage(folder))}
        used = max(folders.keys() - damaged.keys(), default=None)
        bad = [folders[step] for step in damaged] or sorted(self.directory.glob(f'{DAMAGED}*'))
        if used is None and bad:
            reason = damaged[max(damaged)] if damaged else 'moved there by an earlier start'
            raise InputError(f'{self.directory}: every checkpoint is damaged '
                             f'({", ".join(map(str, bad))}: {reason}). Fix: restore the folder '
                             'from a copy, or delete it to start this stage again.')
        if damaged:  # no process may still read a checkpoint that process 0 moves
            hosts.wait('damaged checkpoints found')
            for step, reason in damaged.items() if jax.process_index() == 0 else ():
                target = self.directory / f'{DAMAGED}{step}'
                shutil.rmtree(target, ignore_errors=True)
                folders[step].rename(target)
                print(f'{self.directory}: checkpoint {step} is damaged ({reason}) and was moved to '
                      f'{target.name}; step {used} is used instead', file=sys.stderr)
            hosts.wait('damaged checkpoints moved')
        return {step: folder for step, folder in folders.items() if step not in damaged}

    def _load(self, choose, abstract_state):
        folders = self._undamaged()
        records = _records(folders)
        step = choose(records)
        if step is None:
            return None
        folder, like = folders[step], _by_path(abstract_state)
        saved, wanted = ({path: f'{jnp.dtype(leaf.dtype).name} {list(leaf.shape)}'
                          for path, leaf in leaves.items()} for leaves in (_saved(folder), like))
        differing = [path for path in wanted | saved if saved.get(path) != wanted.get(path)]
        for path in differing[:1]:
            raise InputError(f'{folder} holds the state of another model ({len(differing)} arrays '
                             f'differ): {path} is {saved.get(path, "absent")} there and '
                             f'{wanted.get(path, "absent")} here. Fix: use its config or workdir')
        arrays = _arrays(folder, like)
        state = jax.tree.unflatten(jax.tree.structure(abstract_state),
                                   [arrays[path] for path in like])
        return step, state, records[step]['meta']


def chosen_parameters(directory) -> dict:
    """Read what a finished stage of another run trained, at the step that validation chose.

    Args:
      directory: of the stage's checkpoints, which is not changed.

    Returns:
      {path: array}; empty where the stage trained nothing.

    Raises:
      InputError: the checkpoint is damaged.
    """
    folders = _folders(Path(directory).absolute())
    if not folders:
        return {}
    damage = '; '.join(filter(None, map(_damage, folders.values())))
    refuse_if(damage, f'{directory}: damaged ({damage}). Fix: restore the checkpoint from a copy')
    step = _best(_records(folders))
    folder = folders[max(folders) if step is None else step]
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
            for path, leaf in _saved(folder).items()}
    return {path.removeprefix(PARAMS): x for path, x in _arrays(folder, like).items()
            if path.startswith(PARAMS)}


def abstract(state):
    """Describe the state that a load returns.

    Args:
      state: pytree of jax.Array.

    Returns:
      The same pytree of jax.ShapeDtypeStruct, with shardings.
    """
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
                        state)


def _copy(arrays):
    # The training step donates its state, so the thread needs a copy. The runtime makes it: a
    # compiled copy of some hundred arrays would be compiled for a second or two in every stage.
    if jax.process_count() == 1:
        return jax.device_put(arrays, may_alias=False)
    return jax.jit(partial(jax.tree.map, jnp.copy))(arrays)


def _with_options(function, *args, **kwargs):
    """Call a function of Orbax with this project's options."""
    context = ocp.Context()
    # Files that help only many replicas or readers without an abstract tree: 20 % of a save.
    context.array.saving.enable_write_sharding_file = False
    context.array.saving.array_metadata_store = None
    context.array.saving.use_replica_parallel = False
    # Otherwise Orbax waits minutes for a folder that cannot be created before it reports the error.
    context.asynchronous.create_directories_asynchronously = False
    with context:
        return function(*args, **kwargs)


def _saved(folder):
    """{path: leaf with shape and dtype} of a checkpoint's state."""
    return _with_options(ocp.checkpointables_metadata, folder).metadata[STATE]


def _arrays(folder, like):
    """{path: array} of a checkpoint's state, placed as `like`."""
    return _with_options(ocp.load_checkpointables, folder, {STATE: like})[STATE]


def _by_path(tree):
    """{path: leaf}, in the order of jax.tree.leaves."""
    return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf
            for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _folders(directory):
    """{step: folder} of all complete checkpoints."""
    return {int(path.name): path for path in directory.iterdir() if path.name.isdigit()}


def _records(folders):
    """{step: {'metric', 'meta'}} of checkpoints {step: folder}."""
    return {step: json.loads((folder / META).read_text()) for step, folder in folders.items()}


def _best(records):
    return max(((record['metric'], step) for step, record in records.items()
                if record['metric'] is not None), default=(None, None))[1]


def _retire(folder):
    # Renamed before it is removed: a kill must not leave part of a checkpoint under its name.
    return folder.rename(folder.with_name(f'{folder.name}-old{PARTIAL}'))


def _checksums(folder):
    """{path below `folder`: SHA-256} of every file."""
    return {file.relative_to(folder).as_posix(): sha256(file)
            for file in sorted(folder.rglob('*')) if file.is_file()}


def _damage(folder):
    """The first file of a checkpoint that is not as it was written, in words; '' if none."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
    except (OSError, ValueError) as error:
        return f'{CHECKSUMS}: {type(error).__name__}'
    found = _checksums(folder)
    for name, checksum in expected.items():
        if name not in found:
            return f'{name} is missing'
        if found[name] != checksum:
            return f'{name} differs from its checksum'
    return ''


@contextmanager
def _refusing(what):
    """Raise InputError for an error of a disk that is full or cannot be written to."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: what tensorstore raises
        code = re.search(r"os_error_code='(\d+)'", str(error))
        number = int(code[1]) if code else getattr(error, 'errno', None)
        if number in UNWRITABLE:
            raise InputError(f'{what} ({os.strerror(number)}). Earlier checkpoints are complete. '
                             'Fix: make room or give write access, and start the same command '
                             'again, which resumes.') from error
        raise
