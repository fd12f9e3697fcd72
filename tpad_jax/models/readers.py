"""How the MLLMs are applied: which parameters, which adapter, and in chunks for large steps.

`spec` is models.tpad.TPAD, `params` its parameters, nested.
"""

import jax

from tpad_jax.nn import linear
from tpad_jax.nn.gather import by_chunk

ADAPTERS = {'k': 'knowledge', 'r': 'distil'}  # under which K reads an item for a feature


def variables(spec, params, adapter, reader='knowledge'):
    """Return the variables of a reader ('knowledge', 'transfer') under the LoRA tree `adapter`."""
    lora = params['lora'].get(adapter, {})  # a separate base has none
    return {'params': {'base': params['base'], **params.get(reader, {})},
            'lora': {'base': linear.scaled(lora, spec.lora_scale)}}


def vocabulary(params):
    """Return the rows of the words that a base's states are compared with, [W, width]."""
    base = params.get('transfer', {}).get('base', params['base'])
    return base['head']['kernel'].T if 'head' in base else base['embed']['embedding']


def read_items(spec, params, adapter, image, has_image, tokens, keep=None):
    """Read the content of U items -> k [U, M, D] under a LoRA tree ('knowledge' or 'distil')."""
    own = variables(spec, params, adapter)
    return _in_chunks(lambda part: spec.knowledge.apply(own, *part), spec.chunk,
                      (image, has_image, tokens, keep))


def distil_items(spec, params, image, has_image, tokens, keep=None):
    """Read the content of U items -> r.

    Returns:
      The distilled vector, [U, D], or what a blended adapter reads, [U, M, D].
    """
    k = read_items(spec, params, 'distil' if spec.reread else 'knowledge', image, has_image, tokens,
                   keep)
    return k if spec.blended else adapt_items(spec, params, k)


def adapt_items(spec, params, k):
    """Compute r = A(k) [..., M D] of k [..., M, D]."""
    return spec.adapter.apply({'params': params['adapter']}, k)


def item_states(spec, params, who, image, has_image, tokens):
    """Compute hidden states of U items' tokens, with all words visible.

    The teacher's image may have another number of tokens. The tokens of both models are cells of
    one grid over the same picture, so the teacher's states are resampled onto the student's cells,
    linearly, as logits are linear in them [ours].

    Args:
      spec: the modules.
      params: nested.
      who: 'k' or 'r', for K under the feature's adapter, or 'teacher'.
      image: uint8 [U, H, W, 3].
      has_image: bool [U].
      tokens: int32 [U, T], -1 pads.

    Returns:
      [U, P, width] at the image's tokens, P as in K, and [U, T, width] that predict the text.
    """
    if who == 'teacher':
        reader, teacher = spec.teacher, params['teacher']
        weights = {'params': {**teacher.get('knowledge', {}), 'base': teacher['base']}}
    else:
        reader, weights = spec.knowledge, variables(spec, params, ADAPTERS[who])
    cells, words = _in_chunks(lambda part: reader.apply(weights, *part, method='states'),
                              spec.chunk, (image, has_image, tokens))
    grid, native = (r.base.grid(image.shape[1])[1:] for r in (spec.knowledge, reader))
    if grid != native:
        cells = cells.reshape(len(cells), *native, -1)
        cells = jax.image.resize(cells, (len(cells), *grid, cells.shape[-1]), 'linear')
        cells = cells.reshape(len(cells), grid[0] * grid[1], -1)
    return cells, words


def _in_chunks(read, chunk, arrays):
    """Return read(arrays), in chunks if there are more items."""
    return by_chunk(read, arrays, chunk) if 0 < chunk < len(arrays[0]) else read(arrays)
