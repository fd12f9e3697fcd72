"""The artefact that serves a run: written at its end, read by `tpad_jax.load`.

Files in WORKDIR/served:

- served.json: the model, its modules, the digests of the other files
- model.safetensors: item vectors, the recommender's parameters, the experts' tables and weights,
  training events of every item
- items.parquet: item_id, title and, where the data have them, brand, category and price of the
  items 1..V
- reader.safetensors: the adapters and heads that read a new item, without the base
- tokenizer/: the tokenizer that the run trained on its items, if it did

Recommending opens only these files. A new item also needs the base, which a run does not copy.
Each update of the run writes such a folder into WORKDIR/updates/NUMBER. The file WORKDIR/current
names the one that is served; without it, it is the run's own.
"""

import json
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import polars as pl
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tpad_jax import config
from tpad_jax.baselines import content_lasso
from tpad_jax.config import names
from tpad_jax.core import files
from tpad_jax.data import sessions
from tpad_jax.errors import refuse_if, refusing
from tpad_jax.features import encoder
from tpad_jax.models import tpad
from tpad_jax.training import handover

FOLDER, ABOUT, VERSION = 'served', 'served.json', 5
MODEL, READER, ITEMS, TOKENIZER = ('model.safetensors', 'reader.safetensors', 'items.parquet',
                                   'tokenizer')
# fields of an Amazon item's text, in this order
WORDS = 'title', 'brand', 'category', 'description'
ATTRIBUTES = {'brand': pl.String, 'category': pl.String, 'price': pl.Float32}
UNREADABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError,
              pl.exceptions.PolarsError, pl.exceptions.PanicException)
UPDATES, POINTER = 'updates', 'current'
_AGAIN = 'Fix: delete results.json of the run and repeat its command'


@dataclass(frozen=True)
class Served:
    """The artefact of a finished run.

    Attributes:
      directory: WORKDIR/served.
      about: contents of served.json.
      specs: modules of each recommender whose scores are added (usually one), without MLLMs.
      weights: per recommender its parameters {'recommender': ...} and its rows of the item graphs.
      experts: {'weights', 'tables'} of models/experts.py, or None without experts.
      z: float32 [V+1, D]. Item vectors, with the experts' columns.
      events: int64 [V+1]. Events of every item in the training sessions.
      ids: V+1 item ids; [0] is ''.
      titles: V+1 titles; [0] is ''.
      attributes: V rows; brand, category (str) and price (f32), those that the data have. Null or
        '' where an item has none.
    """

    directory: Path
    about: dict
    specs: tuple[tpad.TPAD, ...]
    weights: tuple
    experts: dict | None
    z: np.ndarray
    events: np.ndarray
    ids: list[str]
    titles: list[str]
    attributes: pl.DataFrame

    @property
    def reads(self) -> tuple[tuple[str, ...], list[str]]:
        """The columns of data/events.py that the model reads, and the names of the kinds."""
        events = self.specs[0].events
        return () if events is None else events.reads, self.about.get('kinds', [])


class Table(NamedTuple):
    """The catalogue at one moment.

    Its index is shared with later tables and only grows, so an older table stays valid: rows from
    `count` on are not its own.

    Attributes:
      count: rows in use; row 0 is not an item.
      number: {id: row}.
      attributes: count - 1 rows: brand, category and price of the items, those that are stored.
    """

    count: int
    number: dict[str, int]
    attributes: pl.DataFrame


def write(job, name: str, scores) -> None:
    """Write the artefact into the run's workdir, served.json last.

    Args:
      job: the finished job.Job.
      name: name of the model to serve.
      scores: its scorer, see `scorers.scorer`.
    """
    directory, bound = job.workdir / FOLDER, scores.bound
    c, content = job.config, job.content is not None
    configs = [c, handover.partnered(c)][:len(bound.specs)]
    _write_model(directory, job.data, bound, sessions.counts(job.final.train, job.final.num_items))
    files.write_tensors(directory / READER, _reader(job, bound))
    if c.mllm.tokenizer == 'own' and content:
        shutil.copytree(job.workdir / 'data' / TOKENIZER, directory / TOKENIZER, dirs_exist_ok=True)
    _write_about(directory, {
        'version': VERSION, 'model': name, 'models': [part.model.to_dict() for part in configs],
        'items': job.data.num_items, 'max_length': job.max_length, 'data': job.data.fingerprint,
        'kinds': list(job.data.kinds),
        'side_sizes': list(job.data.side_sizes), 'vocabulary': job.data.vocabulary,
        'words': list(names(c.data.words)) if c.data.ready else list(WORDS),
        'mllm': _located(c.mllm.to_dict()) if content else None,
        'base': job.base.fingerprint if content else None,
        'attributes': (known := content_lasso.wanted(c, job.data)) and known.names,  # of `lasso`
        'pictures': content and job.content.image.shape[1] > 0,
        'raw': content and bound.specs[0].knowledge.raw,
        'features': 'joint' if name.endswith('_joint') else 'transfer'})


def renew(before: Served, directory: Path, data, bound, events: np.ndarray) -> None:
    """Write the artefact of an update, which reads new items as the one before does.

    Args:
      before: the artefact before.
      directory: to write to.
      data: catalogue.Data after the update.
      bound: scorers.Bound of the updated model.
      events: int64 [V+1]. Events of every item, by which they are ordered for an empty session.
    """
    _write_model(directory, data, bound, events)
    shutil.copyfile(before.directory / READER, directory / READER)
    if (before.directory / TOKENIZER).is_dir():
        shutil.copytree(before.directory / TOKENIZER, directory / TOKENIZER)
    _write_about(directory, before.about | {
        'items': data.num_items, 'data': data.fingerprint, 'kinds': list(data.kinds)})


def _write_about(directory, about):
    digests = {name: files.sha256(directory / name) for name in (MODEL, READER, ITEMS)}
    files.write_text(directory / ABOUT, json.dumps(about | {'digests': digests}, indent=1,
                                                   default=str) + '\n')


def _write_model(directory, data, bound, events):
    """Write the tensors of recommending and the table of items."""
    model = {'z': bound.z, 'events': events}
    for i, (spec, params, near) in enumerate(zip(bound.specs, bound.params, bound.near,
                                                 strict=True)):
        tree = {f'{i}': {'recommender': params['recommender'], 'near': near}}
        model |= flatten_dict(tree, sep='/')
        if f'{i}/recommender/fusion/id' in model:  # z holds it; a new item has none
            model[f'{i}/recommender/fusion/id'] = np.zeros((1, spec.fusion.width), np.float32)
    model |= flatten_dict({'experts': bound.experts or {}}, sep='/')
    files.write_tensors(directory / MODEL, model)
    with files.replacing(directory / ITEMS) as partial:
        columns = {name: values[1:] for name, values in data.attributes.items()
                   if any(value not in (None, '') for value in values)}
        pl.DataFrame({'item_id': data.asins[1:], 'title': data.titles[1:], **columns},
                     schema_overrides=ATTRIBUTES).write_parquet(partial)


def place(workdir) -> Path:
    """Find the folder of the artefact that a run serves.

    Args:
      workdir: directory of the run.

    Raises:
      InputError: the file that names it is damaged or cannot be read.
    """
    pointer = Path(workdir) / POINTER
    with refusing(OSError, f'{pointer}: cannot be read', 'Fix: make it a readable file'):
        name = pointer.read_text(errors='replace').strip() if pointer.exists() else ''
    refuse_if(name and not re.fullmatch(rf'{UPDATES}/\d+', name), f'{pointer}: damaged. Expected '
              f'{UPDATES}/NUMBER, or nothing for the run itself. Fix: correct it')
    return Path(workdir, name, FOLDER)


def added_file(served: Served, file: str) -> Path:
    """Name the file of the items that were added to an artefact by the service.

    Each update of a run has its own, because an added item has a vector of one recommender.

    Args:
      served: the artefact.
      file: NAME.safetensors, that of the run itself; of its update 1 it is NAME-0001.safetensors.
    """
    path, folder = Path(file), served.directory.resolve().parent
    return path.with_stem(path.stem + f'-{folder.name}' * (folder.parent.name == UPDATES))


def read(workdir, directory: Path | None = None) -> Served:
    """Read an artefact.

    Args:
      workdir: directory of the run.
      directory: of the artefact; None: the one that the run serves.

    Raises:
      InputError: there is no run, it is unfinished, it has no recommender, or a file is missing or
        damaged.
    """
    workdir = Path(workdir)
    refuse_if(not (workdir / 'config.json').is_file(), f'{workdir} does not hold a run: '
              'config.json is missing. Fix: name the workdir of a finished run')
    refuse_if(not (workdir / 'results.json').is_file(), f'{workdir} is not finished: results.json '
              'is missing. Fix: repeat the command of the run, which resumes')
    directory = directory or place(workdir)
    file = directory / ABOUT
    again = _AGAIN if directory.parent == workdir else (
        f'Fix: python -m tpad_jax.update {workdir} --rollback')
    refuse_if(not file.is_file(), f'{file} does not exist: the run has no stage recommend, or is '
              f'of an earlier version. {again}')
    with refusing(UNREADABLE, f'{file} or a file next to it is missing or damaged', again):
        about = json.loads(file.read_text())
        refuse_if(about['version'] != VERSION,
                  f'{file} has version {about["version"]}. Expected {VERSION}. {again}')
        for name, digest in about['digests'].items():
            refuse_if(files.sha256(directory / name) != digest, f'{directory / name} is damaged: '
                      f'its bytes differ from those the run wrote. {again}')
        return _read(directory, about)


def spec_of(about: dict, i: int, base=None) -> tpad.TPAD:
    """Build the modules of a recommender; its fusion is for new items.

    Args:
      about: contents of served.json.
      i: index of the recommender.
      base: the MLLM, or None.

    Raises:
      InputError: this process does not know the session encoder (see sessions.build).
    """
    # options that are newer than the artefact are off by default
    model = ConfigDict(config.model().to_dict() | about['models'][i])
    mllm = about['mllm'] or {'pooling': 'summary', 'chunk': 0}
    return tpad.build(base, model, recommend=names(model.recommend), items=0,
                      max_length=about['max_length'], side_sizes=tuple(about['side_sizes']),
                      pooling=mllm['pooling'], raw=about.get('raw', False), chunk=mllm['chunk'])


def _read(directory, about):
    arrays = load_file(directory / MODEL)
    z, events = arrays.pop('z'), arrays.pop('events')
    nested = unflatten_dict(arrays, sep='/')
    models = range(len(about['models']))
    weights = tuple(({'recommender': nested[f'{i}']['recommender']}, nested[f'{i}'].get('near', {}))
                    for i in models)
    table = pl.read_parquet(directory / ITEMS)
    specs = tuple(spec_of(about, i) for i in models)
    _check_encoders(directory / ABOUT, about, specs, weights)
    ids = ['', *table['item_id']]
    rules = nested.get('experts')
    wide = 2 + sum(rules['tables'][name].shape[1] for name in ('next', 'basis')
                   if name in rules['tables']) if rules else 0
    width = sum(s.fusion.width for s in specs) + wide
    if z.shape != (about['items'] + 1, width) or len(ids) != len(z):
        raise ValueError(f'there are {list(z.shape)} item vectors and {len(ids) - 1} ids for '
                         f'{about["items"]} items')
    return Served(directory, about, specs, weights, rules, z, events, ids, ['', *table['title']],
                  table.select(name for name in ATTRIBUTES if name in table.columns))


def _check_encoders(file, about, specs, weights):
    """Refuse parameters that the code of an encoder from outside the package does not take."""
    for model, spec, (params, near) in zip(about['models'], specs, weights, strict=True):
        if type(spec.encoder).__module__.startswith('tpad_jax.'):
            continue
        z = np.zeros((2, spec.fusion.width), np.float32)
        items = np.zeros((1, about['max_length']), np.int32)
        with refusing(Exception, f'{file}: config.model.encoder={model["encoder"]!r} does not take '
                      'the parameters of the run', 'Expected the code that was trained. Fix: '
                      'restore it, or train again in another --workdir'):
            jax.eval_shape(partial(tpad.encode_sessions, spec), params, items, z, near)


def _reader(job, bound) -> dict:
    """Return {path: array} of the modules that read an item; without the base if it is frozen."""
    if job.content is None:
        return {}
    roots = set().union(*encoder.reads(bound.specs[0]).values(), ['codes'])
    train = [job.config.stage[stage].train for stage in job.config.stage]
    return {path: x for path, x in flatten_dict(bound.params[0], sep='/').items()
            if any(path.startswith(f'{root}/') for root in roots)
            and (not path.startswith('base/') or 'base' not in job.base.given
                 or job.config.mllm.prune
                 or any(re.search(r, path) for r in train if r))}


def _located(mllm: dict) -> dict:
    """Return config.mllm with absolute directories. A hub id stays."""
    return {key: str(Path(x).resolve()) if x and key in ('base', 'checkpoint') and Path(x).is_dir()
            else x for key, x in mllm.items()}
