"""Which MLLM a run stands on: the small default, or a Hugging Face checkpoint."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from tpad_jax.data import prompts, text
from tpad_jax.errors import InputError
from tpad_jax.models.builtin import files as files_lib
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.hf import load, peft, spec, vlm
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.models.knowledge import KnowledgeMLLM

SIDE = 256  # pixels, near which a model of any resolution reads an image unless told otherwise
SMALL = dict(param_dtype='float32', dtype='float32', attention='xla', remat='none',
             pooling='summary', before='', between='', end='')  # the small base knows no other
FILES = ('.json', '.safetensors', '.txt', '.model')  # of parameters, sizes and tokenizer
BLOCK, BLOCKS = 1 << 16, 64  # bytes and number of the samples of a large file's fingerprint


@dataclasses.dataclass(frozen=True)
class Base:
    """What the rest of a run has to know of its base.

    Attributes:
      module: MLLM or VLM. directory: of the tokenizer. image_size: pixels of a side.
      given: top-level parameters the directory holds ('base', and 'knowledge' with the default).
      load: (shapes of `given`, shardings or None) -> these parameters, nested.
      fingerprint: of the files the parameters come from.
    """

    module: MLLM | VLM
    directory: Path
    image_size: int
    given: tuple[str, ...]
    load: Callable
    fingerprint: str


def read(config) -> Base:
    """The base that config.mllm names; nothing but sizes, tokenizer and headers is read yet.

    Raises:
      InputError: a directory that holds none, an unknown architecture, or sizes that do not fit.
    """
    c = config.mllm
    if c.checkpoint and c.base:
        raise InputError('config.mllm.checkpoint and config.mllm.base name two bases; give one')
    return _checkpoint(c) if c.checkpoint else _default(config)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Another MLLM that reads the items a student reads.

    Attributes:
      reader: its module. shapes: of its parameters, nested: 'base', and 'knowledge' (whose prompt
        it begins with) where it is a small base.
      load: (shardings of `shapes` or None) -> the parameters.
    """

    reader: KnowledgeMLLM
    shapes: dict
    load: Callable


def teacher(config, student: Base) -> Teacher | None:
    """The MLLM that config.mllm.teacher names, None without one; no parameters are read yet.

    It has to know the student's tokens by the same numbers, and reads images of the student's size:
    they lie on the devices once. Sizes and numbers of image tokens are its own.

    Raises:
      InputError: no base and no checkpoint, another tokenizer, or other images.
    """
    directory = Path(config.mllm.teacher)
    if not config.mllm.teacher:
        return None
    where = f'config.mllm.teacher={config.mllm.teacher}'
    if not (directory / 'config.json').is_file():
        raise InputError(f'{where} holds no config.json; give the directory of a base or of a '
                         'Hugging Face model')
    c, dtype = copy.deepcopy(config.mllm), config.mllm.teacher_dtype
    try:
        if 'model_type' in json.loads((directory / 'config.json').read_text()):
            # its own frame, and nothing kept for a backward pass
            c.update(checkpoint=str(directory), image_size=student.image_size, dtype=dtype,
                     param_dtype=dtype, remat='none', before='', between='', end='')
            found = _checkpoint(c)
            reader = KnowledgeMLLM(found.module, config.model.features, 'mean')
            shapes = {'base': vlm.shapes(found.module.spec, found.image_size)}
        else:
            found, features = _small(directory)
            reader = KnowledgeMLLM(found.module, features)
            shapes = shapes_of(reader, found.image_size)
            if found.image_size != student.image_size:
                raise InputError(f'it was made for images of {found.image_size} pixels, and '
                                 f'config.mllm.image_size is {student.image_size}; choose one made '
                                 'for these')
            if dtype != 'float32':
                raise InputError('a small base is float32; set config.mllm.teacher_dtype so')
    except (ValueError, TypeError, InputError) as error:
        raise InputError(f'{where}: {error}') from error
    if _words(found.directory) != _words(student.directory):
        raise InputError(f'{where} has another tokenizer than {student.directory}: distributions '
                         'over different words cannot be compared; choose a teacher of the '
                         "student's family")
    return Teacher(reader, shapes, partial(found.load, shapes))


def shapes_of(reader: KnowledgeMLLM, side: int) -> dict:
    """Shapes of a small reader's parameters for images of `side` pixels: 'base', 'knowledge'."""
    found = dict(jax.eval_shape(
        partial(reader.init, method='everything'), jax.random.key(0),
        jnp.zeros((1, side, side, 3), jnp.uint8), jnp.ones(1, bool),
        jnp.ones((1, 2), jnp.int32))['params'])
    return {'base': found.pop('base'), 'knowledge': found}


def _words(directory):
    """What decides which numbers a text becomes; special tokens and padding aside."""
    found = json.loads(text.read_tokenizer(directory).backend_tokenizer.to_str())
    return [found[part] for part in ('normalizer', 'pre_tokenizer', 'model')]


def save_adapters(directory, config, base: Base, params: dict) -> None:
    """Leave a checkpoint's trained adapters as directories that `peft` loads.

    Args:
      directory: gets one directory per adapter. params: {path: array} that a stage trained.
    """
    if not config.mllm.checkpoint or jax.process_index() != 0:
        return  # the small base is no model that others load
    trees = unflatten_dict(params, sep='/').get('lora', {})
    for name, tree in trees.items():
        peft.save_adapter(Path(directory) / name, tree, base.module.spec, config.model.lora_rank,
                          config.model.lora_alpha, config.mllm.checkpoint)


def _default(config):
    for key, only in SMALL.items():
        if config.mllm[key] != only:
            raise InputError(f'config.mllm.{key}={config.mllm[key]} is for checkpoints, and the '
                             f'small base knows {only!r} only: set it so, or name a checkpoint '
                             'with config.mllm.checkpoint=DIR')
    found, features = _small(Path(config.mllm.base or files_lib.DEFAULT))
    side = found.image_size
    for key, have, want in (('mllm.image_size', config.mllm.image_size or side, side),
                            ('model.features', config.model.features, features)):
        if have != want:
            raise InputError(f'config.{key}={have}, but the base was made for {want}; set it so')
    return found


def _small(directory):
    """A small base, and the width of the features its heads were made for."""
    sizes = files_lib.load_sizes(directory)
    side, features = sizes.pop('image_size'), sizes.pop('features')
    sizes['channels'] = tuple(sizes['channels'])

    def parameters(shapes, shardings=None):
        del shardings  # a million parameters lie whole on every device
        return files_lib.load_params(directory, shapes)

    return Base(MLLM(**sizes), directory, side, ('base', 'knowledge'), parameters,
                _digest({name: directory / name for name in ('config.json', 'params.safetensors')})
                ), features


def _checkpoint(c):
    directory = Path(c.checkpoint)
    if not (directory / 'config.json').is_file():
        raise InputError(f'config.mllm.checkpoint={c.checkpoint} holds no config.json; give the '
                         'local directory of a Hugging Face model')
    found = spec.read(directory)
    side = c.image_size or _side(found)
    found.cells(side)  # refuses a side the tower cannot read
    before, between, end = prompts.frame(directory, found.family, found.decoder.vocab,
                                         before=c.before, between=c.between, end=c.end)
    module = VLM(found, side, c.attention, c.remat, c.dtype, before, between, end)

    def parameters(shapes, shardings=None):
        del shapes  # the spec says them
        return {'base': load.load(directory, found, dtype=c.param_dtype,
                                  sharding=shardings and shardings['base'])}

    return Base(module, directory, side, ('base',), parameters, fingerprint(directory))


def _side(found):
    """The native side of a tower; of a grid, the multiple of its unit nearest to SIDE."""
    if isinstance(found.vision, spec.Tower):
        return found.vision.image
    unit = found.vision.patch * found.vision.merge
    return max(1, round(SIDE / unit)) * unit


def fingerprint(path: str | Path) -> str:
    """Digest of an input's content, the same wherever it is stored.

    Args:
      path: a file, or a directory, of which the files of parameters, sizes and tokenizer count.

    Returns:
      16 hexadecimal digits, or 'absent'.
    """
    path = Path(path)
    if path.is_file():
        return _digest({'': path})
    if path.is_dir():
        return _digest({p.name: p for p in sorted(path.iterdir()) if p.suffix in FILES})
    return 'absent'


def _digest(paths):
    """Of small files all bytes; of large ones the size and samples from end to end.

    Reading 16 GB takes too long; a changed layer is larger than the gap between samples.
    """
    out = hashlib.sha256()
    for name, file in paths.items():
        if not file.is_file():
            continue  # the one who reads it says so
        size = file.stat().st_size
        out.update(f'{name} {size} '.encode())
        with file.open('rb') as opened:
            if size <= BLOCK * BLOCKS:
                out.update(opened.read())
                continue
            for i in range(BLOCKS):
                opened.seek((size - BLOCK) * i // (BLOCKS - 1))
                out.update(opened.read(BLOCK))
    return out.hexdigest()[:16]
