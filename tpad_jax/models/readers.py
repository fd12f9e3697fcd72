"""How the MLLMs are applied: which parameters, which adapter, and in chunks for large steps.

`spec` is models.tpad.TPAD, `params` its parameters, nested.
"""

import jax
import jax.numpy as jnp

from tpad_jax.nn import linear

WHAT = 'image', 'text'  # the tokens of an item that have hidden states
# The readers of an item: K under the adapter 'knowledge', K under 'distil', another model.
WHO = {'k': 'knowledge', 'r': 'distil', 'teacher': None}


def knowledge_variables(spec, params, adapter):
    """Return the variables of the Knowledge-MLLM under the LoRA tree named `adapter`."""
    return {'params': {**params['knowledge'], 'base': params['base']},
            'lora': {'base': linear.scaled(params['lora'][adapter], spec.lora_scale)}}


def transfer_variables(spec, params):
    """Return the variables of the Transfer-MLLM."""
    return {'params': {**params['transfer'], 'base': params['base']},
            'lora': {'base': linear.scaled(params['lora']['transfer'], spec.lora_scale)}}


def vocabulary(params):
    """Return the rows of the words that a base's states are compared with, [W, width]."""
    base = params['base']
    return base['head']['kernel'].T if 'head' in base else base['embed']['embedding']


def read_items(spec, params, adapter, image, has_image, tokens, keep=None):
    """Read the content of U items -> k [U, M, D] under a LoRA tree ('knowledge' or 'distil')."""
    variables = knowledge_variables(spec, params, adapter)

    def read(part):
        return spec.knowledge.apply(variables, *part)

    return _by_chunk(read, spec.chunk, (image, has_image, tokens,
                                        tokens >= 0 if keep is None else keep))


def distil_items(spec, params, image, has_image, tokens, keep=None):
    """Read the content of U items -> r.

    Returns:
      The distilled vector, [U, D], or what a blended adapter reads, [U, M, D].
    """
    k = read_items(spec, params, 'distil' if spec.reread else 'knowledge', image, has_image, tokens,
                   keep)
    return k if spec.blended else spec.adapter.apply({'params': params['adapter']}, k)


def item_states(spec, params, who, image, has_image, tokens):
    """Compute hidden states of U items' tokens, with all words visible.

    The teacher's image may have another number of tokens. The tokens of both models are cells of
    one grid over the same picture, so the teacher's states are resampled onto the student's cells,
    linearly, as logits are linear in them [ours].

    Args:
      spec: the modules.
      params: nested.
      who: the reader, one of `WHO`.
      image: uint8 [U, H, W, 3].
      has_image: bool [U].
      tokens: int32 [U, T], -1 pads.

    Returns:
      [U, P, width] at the image's tokens, P as in K, and [U, T, width] that predict the text.
    """
    reader, side = spec.knowledge, image.shape[1]
    variables = (knowledge_variables(spec, params, WHO[who]) if who != 'teacher'
                 else {'params': {**params['teacher'].get('knowledge', {}),
                                  'base': params['teacher']['base']}})
    if who == 'teacher':
        reader = spec.teacher

    def read(part):
        return reader.apply(variables, *part, method='states')

    cells, words = _by_chunk(read, spec.chunk, (image, has_image, tokens))
    own, (rows, columns) = spec.knowledge.base.grid(side)[1:], reader.base.grid(side)[1:]
    if own != (rows, columns):
        cells = cells.reshape(len(cells), rows, columns, -1)
        cells = jax.image.resize(cells, (len(cells), *own, cells.shape[-1]), 'linear')
        cells = cells.reshape(len(cells), own[0] * own[1], -1)
    return cells, words


def _by_chunk(read, chunk, arrays):
    """Return read(arrays), in chunks if there are more items; a backward pass reads them again."""
    total = len(arrays[-1])
    if not chunk or total <= chunk:
        return read(arrays)
    parts = -(-total // chunk)
    arrays = jax.tree.map(lambda x: jnp.pad(
        x, ((0, parts * chunk - total), *((0, 0),) * (x.ndim - 1))
    ).reshape(parts, chunk, *x.shape[1:]), arrays)
    out = jax.lax.map(jax.checkpoint(read), arrays)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], out)
