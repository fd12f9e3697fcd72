"""A base in the smallest size, with random parameters and the default's tokenizer."""

import shutil
from functools import partial

import jax
import numpy as np

from tpad_jax.models.builtin import files
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.mllms import KnowledgeMLLM

SIDE, WIDTH = 16, 16


def write(directory):
    """Write a base of random parameters, a sixth of the default width, and return `directory`."""
    for file in files.DEFAULT.glob('tokenizer*.json'):
        shutil.copy(file, directory)
    sizes = dict(vocab=files.load_sizes(files.DEFAULT)['vocab'], width=WIDTH, layers=1,
                 heads=2, hidden=24, channels=(8, 8), vision_layers=1)
    model = KnowledgeMLLM(MLLM(**sizes), WIDTH)
    shapes = jax.eval_shape(partial(model.init, method='everything'), jax.random.key(0),
                            np.zeros((1, SIDE, SIDE, 3), np.uint8), np.ones(1, bool),
                            np.ones((1, 8), np.int32))['params']
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.asarray(
        rng.normal(size=x.shape) * x.shape[-2] ** -0.5 if x.ndim > 1 else np.ones(x.shape),
        np.float32), shapes)
    heads = {name: tree for name, tree in params.items() if name != 'base'}
    files.save(directory, {**sizes, 'channels': list(sizes['channels']), 'image_size': SIDE,
                                'features': WIDTH}, {'base': params['base'], 'knowledge': heads})
    return directory
