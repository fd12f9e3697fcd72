"""The base of a run: the small default one, or a Hugging Face checkpoint."""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from tpad_jax.core.digest import files_digest
from tpad_jax.data import prompts, text
from tpad_jax.errors import InputError, refuse_if, refusing
from tpad_jax.models.builtin import files
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.hf import export, load, sentence, spec, vlm
from tpad_jax.models.hf.bert import Bert
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.models.mllms import KnowledgeMLLM

SIDE = 256  # default pixels of an image's side for models of any resolution, rounded to fit
SMALL = dict(param_dtype='float32', dtype='float32', attention='xla', remat='none',
             pooling='summary', before='', between='', end='')  # all that the small base supports
HUB_ID = re.compile(r'[\w-][\w.-]*/[\w.-]+')  # organisation/name
FILES = ('.json', '.safetensors', '.txt', '.model')  # of parameters, sizes and tokenizer


class Base(NamedTuple):
    """The properties of a base that the rest of a run uses.

    Attributes:
      module: MLLM, VLM or Bert.
      directory: of the tokenizer.
      image_size: pixels of an image's side. 0: it reads texts alone.
      given: top-level parameters in the directory: 'base', and 'knowledge' with the small base.
      load: (shapes of `given`, shardings or None) -> these parameters, nested.
      fingerprint: of the files that hold the parameters.
    """

    module: MLLM | VLM | Bert
    directory: Path
    image_size: int
    given: tuple[str, ...]
    load: Callable
    fingerprint: str


def read(config, pictures: bool = True) -> Base:
    """Read sizes, tokenizer and headers of the base that config.mllm names, not its parameters.

    Args:
      config: of the run.
      pictures: whether the catalogue has any; else a checkpoint's vision transformer is not loaded.

    Raises:
      InputError: the directory holds no base, the architecture is unknown, or sizes do not fit.
    """
    c = config.mllm
    refuse_if(c.checkpoint and c.base, f'config.mllm.checkpoint={c.checkpoint!r}: config.mllm.base='
              f'{c.base!r} names a base as well. Expected one of them. Fix: give one')
    return _checkpoint(c, config.model, pictures) if c.checkpoint else _default(config)


def local(option: str, name: str) -> Path:
    """Return the directory of a checkpoint; one that is named by a hub id is downloaded once.

    huggingface_hub keeps it in its cache and reads HF_HOME, HF_TOKEN and HF_HUB_OFFLINE.

    Args:
      option: the option that names it.
      name: a directory, or a hub id as in 'organisation/name'.

    Raises:
      InputError: the model is in neither the cache nor reach.
    """
    if Path(name).exists() or not HUB_ID.fullmatch(name):
        return Path(name)
    from huggingface_hub import snapshot_download  # slow to import

    with refusing(Exception, f'{option}={name!r}: neither a directory nor a model that the hub '
                  'gives', f'Expected a directory or a hub id. Fix: correct it, connect to the '
                  f'network, or run `hf download {name}` where there is one and copy the cache'):
        snapshot_download(name, allow_patterns='*_Pooling/config.json')  # of a text encoder
        return Path(snapshot_download(name, ignore_patterns='*/*', allow_patterns=[
            f'*{end}' for end in (*FILES, '.jinja')]))


class Teacher(NamedTuple):
    """Another MLLM that reads the same items as the student.

    Attributes:
      reader: its module.
      shapes: of its parameters, nested: 'base', and 'knowledge' for a small base, whose prompt
        starts with it.
      load: (shardings of `shapes` or None) -> the parameters.
    """

    reader: KnowledgeMLLM
    shapes: dict
    load: Callable


def teacher(config, student: Base) -> Teacher | None:
    """Read the MLLM that config.mllm.teacher names, without its parameters.

    Its tokenizer must be the student's. Both read images of the student's size, which exist once on
    the devices. Its sizes and its number of image tokens may differ.

    Returns:
      The teacher, None without one.

    Raises:
      InputError: the directory holds no model, or tokenizer or image size differ.
    """
    if not config.mllm.teacher:
        return None
    directory = local('config.mllm.teacher', config.mllm.teacher)
    option = f'config.mllm.teacher={config.mllm.teacher!r}'
    sizes = _config_file(directory, option, 'the directory of a base or of a Hugging Face model')
    c, dtype = copy.deepcopy(config.mllm), config.mllm.teacher_dtype
    try:
        if 'model_type' in json.loads(sizes.read_text()):
            # the family's frame; no backward pass needs rematerialisation
            c.update(checkpoint=str(directory), image_size=student.image_size, dtype=dtype,
                     param_dtype=dtype, remat='none', before='', between='', end='')
            base = _checkpoint(c, config.model, bool(student.image_size))
            refuse_if(isinstance(base.module, Bert), 'is a text encoder, which writes no text. '
                      'Expected an MLLM. Fix: choose another')
            reader = KnowledgeMLLM(base.module, config.model.features, 'mean')
            shapes = {'base': vlm.shapes(base.module.spec)}
        else:
            base, features = _small(directory)
            reader = KnowledgeMLLM(base.module, features)
            shapes = shapes_of(reader, base.image_size)
            refuse_if(base.image_size != student.image_size, f'reads images of {base.image_size} '
                      f"pixels. Expected the student's {student.image_size} pixels. Fix: change it")
            refuse_if(dtype != 'float32', f'config.mllm.teacher_dtype={dtype!r}: a small base is '
                      "float32. Expected 'float32'. Fix: set it so")
    except (ValueError, TypeError, InputError) as error:
        raise InputError(f'{option}: {error}') from error
    refuse_if(_words(base.directory) != _words(student.directory), f'{option}: its tokenizer '
              f"differs from {student.directory}. Fix: choose a teacher of the student's family")
    return Teacher(reader, shapes, partial(base.load, shapes))


def shapes_of(reader, side: int) -> dict:
    """Return the shapes of a small reader's parameters, nested: 'base' and 'knowledge'.

    Args:
      reader: with a small base.
      side: pixels of an image's side.
    """
    shapes = dict(jax.eval_shape(
        partial(reader.init, method='everything'), jax.random.key(0),
        jnp.zeros((1, side, side, 3), jnp.uint8), jnp.ones(1, bool),
        jnp.ones((1, 2), jnp.int32))['params'])
    return {'base': shapes.pop('base'), 'knowledge': shapes}


def _words(directory):
    """Return all that maps texts to token numbers, except special tokens and padding."""
    parts = json.loads(text.read_tokenizer(directory).backend_tokenizer.to_str())
    return [parts[name] for name in ('normalizer', 'pre_tokenizer', 'model')]


def save_adapters(directory, config, base: Base, params: dict) -> None:
    """Write a checkpoint's trained adapters as directories that `peft` loads.

    PEFT has no form for adapters by kind of token, which the run's own checkpoints hold alone.

    Args:
      directory: gets one directory per adapter.
      config: of the run.
      base: of the run.
      params: {path: array} that a stage trained.
    """
    if not config.mllm.checkpoint or config.model.lora_by_kind or jax.process_index() != 0:
        return  # other libraries do not load the small base
    trees = unflatten_dict(params, sep='/').get('lora', {})
    for name, tree in trees.items():
        export.save_adapter(Path(directory) / name, tree, base.module.spec, config.model.lora_rank,
                          config.model.lora_alpha, config.mllm.checkpoint)


def _default(config):
    base, features = _small(Path(config.mllm.base or files.DEFAULT))
    side, c = base.image_size, config.mllm
    for key, value, expected in (
            *((f'mllm.{key}', c[key], expected) for key, expected in SMALL.items()),
            ('mllm.image_size', c.image_size or side, side),
            ('model.features', config.model.features, features)):
        refuse_if(value != expected, f'config.{key}={value!r}: the small base does not support '
                  f'this. Expected {expected!r}. Fix: set it or config.mllm.checkpoint=DIR')
    if c.tokenizer == 'own':  # another vocabulary: nothing of the directory is read but sizes
        return base._replace(module=base.module.clone(vocab=c.own.vocab), given=(),
                             load=lambda *_: {})
    return base


def _small(directory):
    """Return a small base and the width of its features."""
    sizes = files.load_sizes(directory)
    side, features = sizes.pop('image_size'), sizes.pop('features')
    sizes['channels'] = tuple(sizes['channels'])

    digest = files_digest({n: directory / n for n in ('config.json', 'params.safetensors')})
    # without shardings: a million parameters fit on every device
    return Base(MLLM(**sizes), directory, side, ('base', 'knowledge'),
                lambda shapes, _=None: files.load_params(directory, shapes), digest), features


def _checkpoint(c, model, pictures):
    directory = local('config.mllm.checkpoint', c.checkpoint)
    _config_file(directory, f'config.mllm.checkpoint={c.checkpoint!r}',
                 'the directory or the hub id of a Hugging Face model')
    sizes = spec.read(directory)
    if isinstance(sizes, sentence.TextEncoder):
        return _text_encoder(c, model, directory, sizes)
    refuse_if(c.pooling == 'cls', "config.mllm.pooling='cls': an MLLM has no class token. Expected "
              "'summary', 'last' or 'mean'. Fix: choose one")
    sizes = (replace(sizes, **prompts.picture(directory, sizes.family)) if pictures
             else sizes.without_vision())
    side = (pictures and c.image_size) or _side(sizes)
    sizes.cells(side)  # refuses a side the tower cannot read
    before, between, end = prompts.frame(directory, sizes.family, sizes.decoder.vocab,
                                         before=c.before, between=c.between, end=c.end)
    module = VLM(sizes, side, c.attention, c.remat, c.dtype, before, between, end)
    return _loadable(c, directory, module, side)


def _text_encoder(c, model, directory, sizes):
    option, read = f'config.mllm.checkpoint={c.checkpoint!r} is a text encoder', sentence.pooling(
        directory)
    kind = read.kind if c.pooling == 'summary' else c.pooling
    expected = ' or '.join(map(repr, sentence.POOLING))
    refuse_if(kind not in sentence.POOLING, f'{option}, and config.mllm.pooling={c.pooling!r}. '
              f"Expected {expected}, or 'summary' and the files of sentence-transformers. Fix: set "
              'it, or copy modules.json and the folders it names')
    for broken, what, fix in (
            (c.image_size, f'config.mllm.image_size={c.image_size}: it reads no images', '0'),
            (model.form == 'full', f'config.model.form={model.form!r}: its items have no '
             'tokens that the Transfer-MLLM could read', "'item' or 'compressed'"),
            (model.blend.kind, f'config.model.blend.kind={model.blend.kind!r}: the Transfer-MLLM '
             'has a separate base, so their adapters cannot be blended', "''")):
        refuse_if(broken, f'{option}, and {what}. Expected {fix}. Fix: set it so')
    before, _, end = prompts.frame(directory, sizes.family, sizes.vocab, before=c.before, end=c.end)
    longest = min(read.longest or sizes.longest, sizes.longest) - len(before) - len(end)
    refuse_if(c.text_length > longest, f'config.mllm.text_length={c.text_length}: {c.checkpoint} '
              f'reads fewer tokens. Expected at most {longest}. Fix: set it so')
    module = Bert(sizes, c.attention, c.remat, c.dtype, before, end, kind, read.normalise)
    return _loadable(c, directory, module, 0)


def _loadable(c, directory, module, side):
    """Return the Base of a checkpoint's module."""
    def parameters(shapes, shardings=None):
        del shapes  # the spec has them
        return {'base': load.load(directory, module.spec, dtype=c.param_dtype,
                                  sharding=shardings and shardings['base'])}

    return Base(module, directory, side, ('base',), parameters, fingerprint(directory))


def fingerprint(path: str | Path) -> str:
    """Digest the content of an input, the same wherever it is stored.

    Args:
      path: a file, or a directory, of which the files of parameters, sizes and tokenizer count.

    Returns:
      16 hexadecimal digits.
    """
    path = Path(path)
    members = sorted(path.iterdir()) if path.is_dir() else []
    return files_digest({p.name: p for p in members if p.suffix in FILES} or {'': path})


def _config_file(directory, option, expected):
    """Return the path of a model's config.json, or refuse a directory without one."""
    file = directory / 'config.json'
    refuse_if(not file.is_file(),
              f'{option}: no config.json. Expected {expected}. Fix: correct the path')
    return file


def _side(sizes):
    """Return a tower's native side, the multiple of a grid's unit nearest to SIDE, or 0."""
    if isinstance(sizes.vision, spec.Grid):
        return max(1, round(SIDE / sizes.unit)) * sizes.unit
    return sizes.unit
