"""How the MLLMs are applied: which parameters and which adapter, in chunks where a step has many.

`spec` is models.tpad.TPAD, `params` its parameters, nested.
"""

import jax
import jax.numpy as jnp

from tpad_jax.nn import linear

WHAT = 'image', 'text'  # the tokens of an item whose hidden states can be asked for
# Who reads an item for that: K under the adapter 'knowledge', K under 'distil', a foreign teacher.
WHO = {'k': 'knowledge', 'r': 'distil', 'teacher': None}
STATES = frozenset(f'{who}.{what}' for who in WHO for what in WHAT)
THERE = frozenset(f'{what}.there' for what in WHAT)


def knowledge_variables(spec, params, adapter):
    """Variables of the Knowledge-MLLM under the LoRA tree named `adapter`."""
    return {'params': {**params['knowledge'], 'base': params['base']},
            'lora': {'base': linear.scaled(params['lora'][adapter], spec.lora_scale)}}


def transfer_variables(spec, params):
    """Variables of the Transfer-MLLM."""
    return {'params': {**params['transfer'], 'base': params['base']},
            'lora': {'base': linear.scaled(params['lora']['transfer'], spec.lora_scale)}}


def vocabulary(params):
    """Rows of the words a base's states are compared with, [W, width]."""
    base = params['base']
    return base['head']['kernel'].T if 'head' in base else base['embed']['embedding']


def read_items(spec, params, adapter, image, has_image, tokens, keep=None):
    """Content of U items -> k [U, M, D] under a LoRA tree ('knowledge' or 'distil')."""
    variables = knowledge_variables(spec, params, adapter)

    def read(part):
        return spec.knowledge.apply(variables, *part)

    return _by_chunk(read, spec.chunk, (image, has_image, tokens,
                                        tokens >= 0 if keep is None else keep))


def distil_items(spec, params, image, has_image, tokens, keep=None):
    """Content of U items -> r: distilled, [U, D], or as a blended adapter reads them, [U, M, D]."""
    k = read_items(spec, params, 'distil' if spec.reread else 'knowledge', image, has_image, tokens,
                   keep)
    return k if spec.blended else spec.adapter.apply({'params': params['adapter']}, k)


def item_states(spec, params, who, image, has_image, tokens):
    """Hidden states of U items' tokens, as one of `WHO` reads them, all words given.

    The teacher's image may have another number of tokens. Both models' tokens are cells of one grid
    over the same picture, so its states are resampled onto the student's cells, linearly, as logits
    are linear in them [ours].

    Returns:
      [U, P, width] at the image's tokens, P as K has them, and [U, T, width] that predict the text.
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


def row_states(spec, params, batch, needs) -> dict:
    """Those of `STATES` and `THERE` that are needed, of one item per row: its prefix's last.

    So a row has one item's states wherever it is computed, and the item is read once per row. The
    teacher gets no gradient.

    Returns:
      who.image [B, P, width], who.text [B, T, width]; image.there bool [B, P], text.there [B, T].
    """
    out, at = {}, batch.slots[jnp.arange(len(batch.items)), batch.last]
    image, has_image, tokens = (x[at] for x in (batch.image, batch.has_image, batch.tokens))
    for who in sorted({name.split('.')[0] for name in needs & STATES}):
        found = item_states(spec, params, who, image, has_image, tokens)
        if who == 'teacher':
            found = jax.lax.stop_gradient(found)
        out |= {f'{who}.{what}': x for what, x in zip(WHAT, found, strict=True)}
    _, rows, columns = spec.knowledge.base.grid(image.shape[1])
    out['image.there'] = jnp.broadcast_to(has_image[:, None], (len(at), rows * columns))
    out['text.there'] = tokens >= 0
    return out


def _by_chunk(read, chunk, given):
    """read(given), `chunk` items at a time, where there are more; a backward pass reads again."""
    total = len(given[-1])
    if not chunk or total <= chunk:
        return read(given)
    parts = -(-total // chunk)
    given = jax.tree.map(lambda x: jnp.pad(
        x, ((0, parts * chunk - total), *((0, 0),) * (x.ndim - 1))
    ).reshape(parts, chunk, *x.shape[1:]), given)
    out = jax.lax.map(jax.checkpoint(read), given)
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:total], out)
