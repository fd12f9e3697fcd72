"""Which run a workdir belongs to, and that only one process group uses it at a time."""

import contextlib
import datetime
import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from tpad_jax.config import get_config
from tpad_jax.core import files
from tpad_jax.distributed import hosts
from tpad_jax.errors import InputError, refuse_if, refusing
from tpad_jax.features import bases
from tpad_jax.training import begin_from

# Version of a workdir's files. Version 1 had no such key; its checkpoints joined all arrays.
FORMAT = 2
# Keys that change no result: how often the run saves and logs, and on how many devices it runs.
FREE_KEYS = frozenset({'parallel', 'devices', 'model_shards', 'accumulate', 'stages', 'workers',
                       'save_every', 'bad_share', 'encode_lease'})
# Keys of sessions. The fingerprint of the data covers their content, so the paths may change.
SOURCES = ('data.npz', 'data.ready', 'data.raw_dir', 'data.event_file', 'data.item_file')
# Keys of other inputs. Their content is compared instead of the path.
INPUTS = ('data.features', 'mllm.base', 'mllm.checkpoint', 'mllm.teacher')
LOCK = 'run.lock'
_flat = partial(flatten_dict, sep='.')  # {'a': {'b': x}} -> {'a.b': x}; empty dicts are dropped


def claim(workdir, config: dict, fingerprint: str | None = None) -> None:
    """Make `workdir` the run of `config`, or check that it already is.

    The first run writes `config.json`. A later run must have the same config and data. Keys that
    change no result (`FREE_KEYS` and those that begin with `log_`, at any depth) may differ,
    inputs may move, and trained baselines may be added, which are then trained alone.

    Args:
      workdir: str or Path. Created if absent.
      config: nested dict. Values that JSON does not know are written as their str.
      fingerprint: of the data, or None where no data is read yet. The first one given is kept.

    Raises:
      InputError: config or data differ; the message names every differing key with both values.
    """
    config = json.loads(json.dumps(config, default=str))
    inputs = {key: bases.fingerprint(bases.local(f'config.{key}', path))
              for key in INPUTS if (path := _flat(config).get(key))}
    if config.get('begin_from'):
        inputs['begin_from'] = begin_from.fingerprint(config['begin_from'])
    record = {'format': FORMAT, 'config': config, 'fingerprint': fingerprint, 'inputs': inputs}
    path = Path(workdir) / 'config.json'
    if path.exists():
        before = _read(path)
        changes = _changes(before, record)
        refuse_if(changes, f'{path} belongs to another run: {"; ".join(changes)}. Fix: set them '
                  'back, or choose another workdir.')
        known = before['fingerprint'] is not None and not _added(before, record)
        if known or fingerprint is None:
            return
        rivals = before['config'].get('rivals', {}) | config.get('rivals', {})
        record = {**before, 'fingerprint': before['fingerprint'] or fingerprint,
                  'config': before['config'] | ({'rivals': rivals} if rivals else {})}
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        # not by files.write_json, which rounds
        files.write_text(path, json.dumps(record, indent=1) + '\n')


def config_of(workdir: Path) -> ConfigDict:
    """Read the config of a run; options that are newer than it have their defaults.

    Args:
      workdir: of the run.

    Raises:
      InputError: it has no config, or a damaged one.
    """
    file = workdir / 'config.json'
    with refusing((OSError, ValueError, KeyError, TypeError), f'{file}: damaged', 'Fix: restore '
                  'the file'):
        config = get_config()
        config.update(json.loads(file.read_text())['config'])
    return config


def enter(workdir: Path, config) -> None:
    """Create the workdir, or check that the existing one can be used.

    Args:
      workdir: the run's directory.
      config: ConfigDict of the run.

    Raises:
      InputError: it cannot be created or written to, or it belongs to another config.
    """
    bucket = str(workdir).replace(':/', '://', 1)
    # a Path of gs://, which would be created here
    refuse_if(re.match('[a-z0-9]+:/', str(workdir)), f'--workdir={bucket}: not a directory. A '
              'bucket offers neither files in memory nor renaming. Fix: name a local directory, '
              f'and --mirror={bucket} for a copy there.')
    with refusing(OSError, f'--workdir={workdir}: cannot be created', 'Fix: choose another '
                  '--workdir.'):
        workdir.mkdir(parents=True, exist_ok=True)
    # by the ids that will write, where the system can tell
    writable = os.access(workdir, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    refuse_if(not writable, f'--workdir={workdir}: cannot be written to. Fix: choose another '
              '--workdir.')
    if (workdir / 'config.json').is_file():  # written only once the data is known to be usable
        claim(workdir, config.to_dict())


@contextlib.contextmanager
def locked(workdir) -> Iterator[None]:
    """Keep a second run out of a workdir.

    The operating system holds the lock and releases it when the process ends, even by a kill. On a
    file system without locks nothing is kept out. Of several processes, process 0 holds it.

    Args:
      workdir: an existing directory.

    Raises:
      InputError: another run uses the workdir; the message names its host, process and start time.
    """
    with contextlib.ExitStack() as stack:
        with hosts.joined('lock of the workdir'):
            if jax.process_index() == 0:
                # Never removed: a process that has just opened it would lock a file without a name.
                lock = stack.enter_context(open(Path(workdir) / LOCK, 'a+', encoding='utf-8'))
                _lock(lock, workdir)
        yield


def _lock(file, workdir):
    """Lock an open file and write who holds it, or raise InputError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.seek(0)
        raise InputError(f'--workdir={workdir}: another run uses it ({file.read().strip()}). Fix: '
                         'wait for that run, stop it, or choose another --workdir.') from error
    except OSError:  # a network file system without locks
        pass
    file.truncate(0)
    now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
    file.write(f'host {socket.gethostname()}, process {os.getpid()}, since {now}\n')
    file.flush()


def _read(path):
    """The record of config.json."""
    with refusing((ValueError, KeyError, TypeError, AssertionError),
                  f'{path}: not a config written by this program', 'Fix: choose another workdir, '
                  'restore the file, or delete it if this is the config of the run there.'):
        record = json.loads(path.read_text())
        _flat(record['config'])
        record.setdefault('fingerprint')
    version = record.get('format', 1)
    refuse_if(version != FORMAT, f'{path}: has format {version}, and this version reads format '
              f'{FORMAT}. Fix: choose another workdir, or finish with the version that began it.')
    return record


def _changes(before, now):
    """Describe the differences between two records of config.json."""
    old, new = _comparable(before), _comparable(now)
    if before['fingerprint'] is not None and now['fingerprint'] is not None:
        source = next((key for key in SOURCES if _flat(now['config']).get(key)), 'data')
        for values, record in ((old, before), (new, now)):
            values[f'the content of {source}'] = json.dumps(record['fingerprint'])
    added = tuple(f'rivals.{name}.' for name in _added(before, now))
    return [f'{key} was {old.get(key, "absent")} and is now {new.get(key, "absent")}'
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(added)]


def _added(before, now):
    """Names of the trained baselines that a record has and an earlier one has not."""
    return now['config'].get('rivals', {}).keys() - before['config'].get('rivals', {}).keys()


def _comparable(record):
    """{key: value as JSON} of a config, without free keys; of inputs their content."""
    flat = {key: json.dumps(value) for key, value in _flat(record['config']).items()
            if not _free(key)}
    for key, content in record['inputs'].items():
        flat[key] = f'content {content}'
    return flat


def _free(key):
    # a loss's `stages` change results
    return key in SOURCES or (not key.startswith('losses.') and any(
        part in FREE_KEYS or part.startswith('log_') for part in key.split('.')))
