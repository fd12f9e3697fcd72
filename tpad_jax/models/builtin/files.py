"""The directory of a small base: sizes, parameters and tokenizer.

`config.json` has the sizes of `MLLM` and the side of the images it was trained with.
`params.safetensors` has the parameters by path: 'base/...' of the MLLM, and 'knowledge/...' of the
heads that the Knowledge-MLLM starts with. `transformers.AutoTokenizer` reads the tokenizer. The
default base is the directory `base/` next to this file; `tpad_jax/pretrain.py` wrote it.
"""

import json
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file

from tpad_jax.core.files import write_json, write_tensors
from tpad_jax.errors import refuse_if, refusing
from tpad_jax.nn import linear

DEFAULT = Path(__file__).parent / 'base'
KEYS = ('vocab', 'width', 'layers', 'heads', 'hidden', 'channels', 'vision_layers', 'image_size',
        'features')  # of config.json
EXPECTED = ('Expected a directory that tpad_jax.pretrain wrote. Fix: correct config.mllm.base, or '
            'leave it empty for the default base')


def save(directory, sizes: dict, params: dict):
    """Write sizes and parameters. Arrays are stored as float16."""
    flat = {path: np.asarray(x, np.float16) for path, x in flatten_dict(params, sep='/').items()}
    write_json(Path(directory) / 'config.json', sizes)
    write_tensors(Path(directory) / 'params.safetensors', flat)


def load_sizes(directory=DEFAULT) -> dict:
    """Read the sizes of a base: the fields of MLLM, image_size and features.

    Raises:
      InputError: the directory does not hold a base.
    """
    file = Path(directory) / 'config.json'
    with refusing((OSError, ValueError, TypeError), f'{file}: not the config of a base', EXPECTED):
        sizes = json.loads(file.read_text())
        missing = [key for key in KEYS if key not in sizes]
        refuse_if(missing, f'{file}: lacks {", ".join(missing)}. {EXPECTED}')
    return sizes


def load_params(directory, expected: dict) -> dict:
    """Read the parameters of a base as float32, nested, and check every shape.

    Args:
      directory: of the base.
      expected: nested {'base': ..., 'knowledge': ...} of anything with a shape.

    Raises:
      InputError: parameters are missing, unexpected or of another shape. The message names all.
    """
    file = Path(directory) / 'params.safetensors'
    with refusing((OSError, SafetensorError), f'{file}: cannot be read', EXPECTED):
        params = load_file(file)
    shapes = {path: x.shape for path, x in flatten_dict(expected, sep='/').items()}
    faults = linear.misfits(params, shapes)
    refuse_if(faults, f'{file}: does not fit its config.json: {faults}. {EXPECTED}')
    return unflatten_dict({p: np.asarray(x, np.float32) for p, x in params.items()}, sep='/')
