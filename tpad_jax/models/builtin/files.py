"""The base both MLLMs share, on disk: sizes, parameters and tokenizer in one directory.

`config.json` holds the sizes of `MLLM` and the image side it was trained at, `params.safetensors`
the parameters by path, 'base/...' the MLLM and 'knowledge/...' heads for the Knowledge-MLLM to
start from, and the tokenizer is what `transformers.AutoTokenizer` reads. The committed default
stands in `base/` beside this file; `tpad_jax/pretrain.py` made it.
"""

import json
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

from tpad_jax.errors import InputError

DEFAULT = Path(__file__).parent / 'base'
KEYS = ('vocab', 'width', 'layers', 'heads', 'hidden', 'channels', 'vision_layers', 'image_size',
        'features')  # of config.json


def save(directory, sizes: dict, params: dict):
    """Write sizes and parameters; arrays are stored as float16, half of what trained them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    flat = {path: np.asarray(x, np.float16) for path, x in flatten_dict(params, sep='/').items()}
    save_file(flat, directory / 'params.safetensors')
    (directory / 'config.json').write_text(json.dumps(sizes, indent=2) + '\n')


def load_sizes(directory=DEFAULT) -> dict:
    """Sizes of a base: MLLM's fields, plus image_size and features.

    Raises:
      InputError: the directory holds no base.
    """
    file = Path(directory) / 'config.json'
    if not file.is_file():
        raise InputError(f'{directory} holds no base: there is no config.json; leave config.mllm.'
                         'base empty for the default or name one that tpad_jax.pretrain wrote')
    try:
        sizes = json.loads(file.read_text())
        missing = [key for key in KEYS if key not in sizes]
    except (ValueError, TypeError) as error:
        raise InputError(f'{file} is no base\'s config: {error}') from error
    if missing:
        raise InputError(f'{file} is no base\'s config: it lacks {", ".join(missing)}')
    return sizes


def load_params(directory, expected: dict) -> dict:
    """Parameters of a base as float32, nested, after checking every one against `expected`.

    Args:
      expected: nested {'base': ..., 'knowledge': ...} of anything with a shape.

    Raises:
      InputError: parameters missing, unexpected or of another shape, all of them in one sentence.
    """
    file = Path(directory) / 'params.safetensors'
    if not file.is_file():
        raise InputError(f'{directory} holds no params.safetensors; it is not a base directory')
    found = load_file(file)
    wanted = {path: x.shape for path, x in flatten_dict(expected, sep='/').items()}
    wrong = [f'{p} missing' for p in sorted(wanted.keys() - found.keys())]
    wrong += [f'{p} unexpected' for p in sorted(found.keys() - wanted.keys())]
    wrong += [f'{p} is {found[p].shape}, not {wanted[p]}'
              for p in sorted(wanted.keys() & found.keys()) if found[p].shape != wanted[p]]
    if wrong:
        raise InputError(f'{file} does not fit its config.json: ' + '; '.join(wrong))
    return unflatten_dict({p: np.asarray(x, np.float32) for p, x in found.items()}, sep='/')
