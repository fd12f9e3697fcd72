"""The registry of data sources: one entry for every form that items and sessions come in.

A run reads exactly one source. `config.data.source` names it: a registered name, or 'module:object'
for an entry (or a plain loading function) in a module on the import path. Where that option is
empty, the source is the one whose own option is set (`config.data.npz`, say), and the planted
catalogue where none is set.
"""

import hashlib
import pkgutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tpad_jax.data import sessions as sessions_lib
from tpad_jax.data.catalogue import Data, restrict, windowed
from tpad_jax.data.events import attached
from tpad_jax.errors import refuse_if, refusing

DEFAULT = 'planted'


@dataclass(frozen=True)
class Source:
    """One source.

    Attributes:
      load: reads it: (config, workdir) -> `catalogue.Data`. It may write to `workdir / 'data'`.
        An empty `fingerprint` or `audit` of the result is filled in by `sources.load`.
      check: refuses unusable options and missing files before anything is read or created.
      columns: lines that say which columns or fields are read, for `--dry-run`.
      sizes: what `sources.sizes` returns, without reading what is large; None: it is taken from
        the loaded data.
      content: whether items have texts and pictures. Without, only the recommender can be trained.
      timed: whether the sessions' start times are times; else `config.data.ordered` decides.
      longest: the longest prefix there is; 0: `config.data.max_length` alone limits it.
      world: makes the world that the sessions were drawn from; None: it is not known.
    """

    load: Callable[[Any, Path], Data]
    check: Callable[[Any], None] = lambda config: None
    columns: Callable[[Any], list[str]] = lambda config: []
    sizes: Callable[[Any, Path], tuple[int, tuple[int, ...]]] | None = None
    content: bool = True
    timed: bool = True
    longest: int = 0
    world: Callable[[Any], Any] | None = None


# By name, which is also the option of config.data that selects the source. Where an entry is text,
# only the chosen one is imported: tables take seconds, and sessions of ids need none.
SOURCES: dict[str, Source | str] = {
    'npz': 'tpad_jax.data.sources.ids:SOURCE',
    'ready': 'tpad_jax.data.sources.folder:SOURCE',
    'raw_dir': 'tpad_jax.data.sources.amazon_tables:SOURCE',
    'event_file': 'tpad_jax.data.sources.event_files:SOURCE',
    DEFAULT: 'tpad_jax.data.synthetic.planted:SOURCE',
}


def register(name: str, source: Source | str) -> None:
    """Add a source, which a value of `config.data.<name>` or `config.data.source=<name>` selects.

    Args:
      name: an identifier that no other source has.
      source: the entry, or 'module:object' to import it once it is chosen.

    Raises:
      InputError: the name is taken.
    """
    refuse_if(SOURCES.get(name, source) != source, f'data source {name!r}: the name is taken. '
              f'Expected one other than {", ".join(SOURCES)}. Fix: choose another name.')
    SOURCES[name] = source


def selected(config) -> str:
    """Name the source that a config selects, not yet resolved.

    Args:
      config: the run's.

    Returns:
      A key of SOURCES or 'module:object'.

    Raises:
      InputError: two sources are selected.
    """
    values = {name: config.data[name] for name in ('source', *SOURCES)
              if name != DEFAULT and config.data.get(name)}
    names = {value if option == 'source' else option for option, value in values.items()}
    options = ' and '.join(f'config.data.{option}={value!r}' for option, value in values.items())
    refuse_if(len(names) > 1, f'{options} name two sources of sessions. Expected one. Fix: leave '
              'the others empty.')
    name = next(iter(names), DEFAULT)
    refuse_if(config.data.get('item_file') and name != 'event_file', f'config.data.item_file='
              f'{config.data.get("item_file")!r}: there is no file of events. Expected both. Fix: '
              'set config.data.event_file.')
    return name


def chosen(config) -> Source:
    """Look up the source of a config.

    Args:
      config: the run's.

    Returns:
      The entry; of a plain function, one with content.

    Raises:
      InputError: two sources are selected, or one that cannot be found.
    """
    name = selected(config)
    source = SOURCES.get(name, name)
    if isinstance(source, str):
        # importing somebody's module can raise anything
        with refusing(Exception, f'config.data.source={name!r}: no such source', 'Expected '
                      f'{", ".join(SOURCES)} or module:object. Fix: correct the name, or run in '
                      'the directory of the module.'):
            source = pkgutil.resolve_name(source if ':' in source else '')
    return source if isinstance(source, Source) else Source(source)


def origin(config) -> str:
    """Describe in words where the data come from: a path, a name or the planted catalogue."""
    name = selected(config)
    if name == DEFAULT:
        return f'the planted catalogue, seed {config.data.planted.seed}'
    return str(config.data.get(name) or name)


def sizes(config, workdir: Path) -> tuple[int, tuple[int, ...]]:
    """Find the sizes of a source, at the price of loading it where its entry has no shorter way.

    Args:
      config: the run's.
      workdir: the run's directory.

    Returns:
      V, and the number of ids of every side feature, 0 (unknown) included.

    Raises:
      InputError: as the source's own functions.
    """
    source = chosen(config)
    if source.sizes:
        return source.sizes(config, Path(workdir))
    data = restrict(source.load(config, Path(workdir)), config.data.catalogue)
    return data.num_items, data.side_sizes


def load(config, workdir: Path) -> Data:
    """Load the source of a config and check that a run can use what it returned.

    Args:
      config: the run's.
      workdir: the run's directory.

    Returns:
      The data, with an audit and a fingerprint, and the items that `config.data.catalogue` keeps.
      The audit is of all items.

    Raises:
      InputError: as the source's own functions; tables of unequal length, an item id out of range,
        or a split without two items in any session.
    """
    source = chosen(config)
    data = source.load(config, Path(workdir))
    if config.data.window:
        data = windowed(data, config.data, source.timed)
    _check(data, origin(config))
    if not data.audit:
        # here: processes that read lines import this package, and need no scipy
        from tpad_jax.data.audit import audit
        report = audit(data.train, data.valid, data.test, data.warm, form=data.form,
                       ties=float('nan'), every_prefix=every_prefix(config), timed=source.timed)
        data = replace(data, audit=report)
    data = data if data.fingerprint else replace(data, fingerprint=_fingerprint(data))
    return attached(restrict(data, config.data.catalogue), config)


def every_prefix(config) -> bool:
    """Whether validation and test score every item of a session but the first, or the last only."""
    return config.data.protocol == 'ours' or not config.data.published_last_only


def _check(data: Data, name: str) -> None:
    """Refuse data that would fail later, and less clearly."""
    rows = data.num_items + 1
    for field in ('titles', 'texts', 'has_image', 'side', 'warm'):
        length = len(getattr(data, field))
        refuse_if(length != rows, f'{name}: {field} has {length} rows. Expected {rows}, the '
                  f'padding item and {rows - 1} items. Fix: correct the source.')
    repeated = [asin for asin, count in Counter(data.asins).items() if count > 1]
    refuse_if(repeated, f'{name}: asins names {repeated[:1]} more than once. Expected one id per '
              'item. Fix: correct the source.')
    side = np.asarray(data.side)
    refuse_if(side.ndim != 2 or side.shape[1] != len(data.side_sizes)
              or (side < 0).any() or (side >= np.asarray(data.side_sizes, int)).any(),
              f'{name}: side has shape {side.shape}. Expected a column of values from 0, below its '
              f'size, for each of side_sizes={tuple(data.side_sizes)}. Fix: correct the source.')
    for split in ('train', 'valid', 'test'):
        sessions_lib.check(getattr(data, split), f'{name}: {split}', data.num_items)


def _fingerprint(data: Data) -> str:
    """sha256 (hex) of the items and sessions of a source that computes none itself."""
    digest = hashlib.sha256(repr((data.asins, data.texts)).encode(errors='surrogatepass'))
    for array in (data.side, *data.train, *data.valid, *data.test):
        if array is not None:
            digest.update(np.ascontiguousarray(array).tobytes())
    for item in np.flatnonzero(data.has_image):
        digest.update(hashlib.sha256(data.image_bytes[int(item)]).digest())
    return digest.hexdigest()
