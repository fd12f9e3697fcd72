"""What a run leaves to be served from, written at its end and read by `tpad_jax.load`.

    served/served.json         which model, its modules, the digests of the other files
    served/model.safetensors   item vectors, the recommender's parameters, events of every item
    served/items.parquet       item_id and title of the items 1..V
    served/reader.safetensors  what reads a new item, laid over the base: adapters and heads
    served/tokenizer/          the items' own tokenizer, where the run trained one

Nothing else of a run is opened to recommend; the base, which no run copies, only for a new item.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import polars as pl
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tpad_jax.config import names, partnered
from tpad_jax.data import sessions
from tpad_jax.errors import InputError
from tpad_jax.features import encoder
from tpad_jax.models import tpad

FOLDER, ABOUT, VERSION = 'served', 'served.json', 2
MODEL, READER, ITEMS, TOKENIZER = ('model.safetensors', 'reader.safetensors', 'items.parquet',
                                   'tokenizer')
WORDS = 'title', 'brand', 'category', 'description'  # of an Amazon item, in its text's order
UNREADABLE = (OSError, ValueError, KeyError, TypeError, SafetensorError,
              pl.exceptions.PolarsError, pl.exceptions.PanicException)
_AGAIN = 'delete results.json beside it and give the command of the run once more'


@dataclass(frozen=True)
class Served:
    """A finished run, as it is served.

    Attributes:
      directory: WORKDIR/served. about: what served.json holds.
      specs: the modules of each recommender whose scores are added (one, most often), without their
        MLLMs. weights: of each its parameters {'recommender': ...} and its rows of the
        graphs over items, nested.
      z: float32 [V+1, D], the item vectors. events: int64 [V+1], in the sessions trained on.
      ids, titles: lists of str, [0] being ''.
    """

    directory: Path
    about: dict
    specs: tuple[tpad.TPAD, ...]
    weights: tuple
    z: np.ndarray
    events: np.ndarray
    ids: list[str]
    titles: list[str]


def write(job, name: str, scores) -> None:
    """Leave what serving needs in the run's workdir; served.json comes last.

    Args:
      job: job.Job. name: of the model. scores: its scorer, see `scoring.scorer`.
    """
    directory, bound = job.workdir / FOLDER, scores.bound
    directory.mkdir(parents=True, exist_ok=True)
    configs = [job.config, partnered(job.config)][:len(bound.specs)]
    model = {'z': bound.z, 'events': sessions.counts(job.final.train, job.final.num_items)}
    for i, (spec, params, near) in enumerate(zip(bound.specs, bound.params, bound.near,
                                                 strict=True)):
        own = {'recommender': params['recommender'], 'near': near}
        flat = {f'{i}/{path}': x for path, x in flatten_dict(own, sep='/').items()}
        if f'{i}/recommender/fusion/id' in flat:  # is in z; an item to come has none of its own
            flat[f'{i}/recommender/fusion/id'] = np.zeros((1, spec.fusion.width), np.float32)
        model |= flat
    mode = job.workdir / 'config.json'  # safetensors would write for the owner alone
    _save(directory / MODEL, model, mode)
    _save(directory / READER, _reader(job, bound), mode)
    _items(directory / ITEMS, job.data.asins, job.data.titles)
    if job.config.mllm.tokenizer == 'own' and job.content is not None:
        shutil.copytree(job.workdir / 'data' / TOKENIZER, directory / TOKENIZER, dirs_exist_ok=True)
    c = job.config
    about = {
        'version': VERSION, 'model': name, 'models': [one.model.to_dict() for one in configs],
        'items': job.data.num_items, 'max_length': job.max_length,
        'side_sizes': list(job.data.side_sizes), 'vocabulary': job.data.vocabulary,
        'words': list(names(c.data.words)) if c.data.ready else list(WORDS),
        'mllm': _located(c.mllm.to_dict()) if job.content is not None else None,
        'base': job.base.fingerprint if job.content is not None else None,
        'features': 'joint' if name.endswith('_joint') else 'transfer',
        'data': job.data.fingerprint,
        'digests': {file: _digest(directory / file) for file in (MODEL, READER, ITEMS)},
    }
    partial = directory / f'{ABOUT}.partial'
    partial.write_text(json.dumps(about, indent=1, default=str) + '\n')
    os.replace(partial, directory / ABOUT)


def read(workdir) -> Served:
    """What `write` left.

    Raises:
      InputError: there is no run, it is not finished, it has no recommender, or a file of it is
        missing or damaged.
    """
    workdir = Path(workdir)
    if not (workdir / 'config.json').is_file():
        raise InputError(f'{workdir} holds no run: there is no config.json; name the workdir of a '
                         'finished one')
    if not (workdir / 'results.json').is_file():
        raise InputError(f'{workdir} is not finished: there is no results.json; the command of the '
                         'run goes on from there')
    directory = workdir / FOLDER
    file = directory / ABOUT
    try:
        about = json.loads(file.read_text())
        if about['version'] != VERSION:
            raise InputError(f'{file} has version {about["version"]}, and this program reads '
                             f'{VERSION}; {_AGAIN}')
        for name, digest in about['digests'].items():
            if _digest(directory / name) != digest:
                raise InputError(f'{directory / name} is damaged: its bytes are not those the run '
                                 f'wrote; {_AGAIN}')
        return _read(directory, about)
    except InputError:
        raise
    except FileNotFoundError as error:
        if Path(error.filename or '') == file:
            raise InputError(f'{file} does not exist: the run ended without a recommender of its '
                             f'own, or was made before they were kept; if it has stage recommend, '
                             f'{_AGAIN}') from error
        raise InputError(f'{error.filename} is missing; {_AGAIN}') from error
    except UNREADABLE as error:
        raise InputError(f'{file} or a file beside it is damaged ({type(error).__name__}: '
                         f'{str(error).splitlines()[0] if str(error) else ""}); {_AGAIN}'
                         ) from error


def spec_of(about: dict, i: int, base=None) -> tpad.TPAD:
    """The modules of recommender i, over an MLLM or none; its fusion is for items to come."""
    model = ConfigDict(about['models'][i])
    mllm = about['mllm'] or {'pooling': 'summary', 'chunk': 0}
    return tpad.build(base, model, recommend=names(model.recommend), items=0,
                      max_length=about['max_length'], side_sizes=tuple(about['side_sizes']),
                      pooling=mllm['pooling'], chunk=mllm['chunk'])


def reader_params(served: Served) -> dict:
    """{path: array} that `write` laid aside for reading new items."""
    return load_file(served.directory / READER)


def _read(directory, about):
    found = load_file(directory / MODEL)
    z, events = found.pop('z'), found.pop('events')
    nested = unflatten_dict(found, sep='/')
    weights = tuple(({'recommender': nested[i]['recommender']}, nested[i].get('near', {}))
                    for i in map(str, range(len(about['models']))))
    table = pl.read_parquet(directory / ITEMS)
    specs = tuple(spec_of(about, i) for i in range(len(about['models'])))
    ids = ['', *table['item_id']]
    if z.shape != (about['items'] + 1, sum(s.fusion.width for s in specs)) or len(ids) != len(z):
        raise ValueError(f'there are {list(z.shape)} item vectors and {len(ids) - 1} ids for '
                         f'{about["items"]} items')
    return Served(directory, about, specs, weights, z, events, ids, ['', *table['title']])


def _reader(job, bound) -> dict:
    """What reads an item but for a base that stayed as it was given."""
    if job.content is None:
        return {}
    roots = set().union(*encoder.reads(bound.specs[0]).values())
    train = [job.config.stage[stage].train for stage in job.config.stage]
    flat = flatten_dict(bound.params[0], sep='/')
    return {path: x for path, x in flat.items()
            if any(path.startswith(f'{root}/') for root in roots)
            and (not path.startswith('base/') or any(re.search(r, path) for r in train if r))}


def _located(mllm: dict) -> dict:
    """config.mllm with its directories as they are found from anywhere."""
    return {key: str(Path(x).resolve()) if key in ('base', 'checkpoint') and x else x
            for key, x in mllm.items()}


def _save(file, arrays, mode):
    partial = file.with_name(file.name + '.partial')
    save_file({path: np.ascontiguousarray(jax.device_get(x)) for path, x in arrays.items()},
              partial)
    shutil.copymode(mode, partial)
    os.replace(partial, file)


def _items(file, ids, titles):
    partial = file.with_name(file.name + '.partial')
    pl.DataFrame({'item_id': ids[1:], 'title': titles[1:]},
                 schema={'item_id': pl.String, 'title': pl.String}).write_parquet(partial)
    os.replace(partial, file)


def _digest(file) -> str:
    with open(file, 'rb') as opened:
        return hashlib.file_digest(opened, 'sha256').hexdigest()
