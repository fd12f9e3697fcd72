"""The table of outputs: one function per output, marked with its name, shape and needs.

Importing this module fills `OUTPUTS`. The order of the functions is the order in which a step
computes them. A feature is *fresh* (computed from content, with gradient) or read from the
catalogue's rows; its name is the same.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tpad_jax.models import readers
from tpad_jax.models import stream as streams
from tpad_jax.models.forward import (
    OUTPUTS,
    Plan,
    forward,
    is_known,
    names,
    output,
    required,
    split_tables,
)
from tpad_jax.models.sessions.repeats import shifts
from tpad_jax.models.tpad import encode_sessions, flat, item_vectors, z_table
from tpad_jax.mutual_information.critics import Score
from tpad_jax.nn.attention import row_keys
from tpad_jax.nn.gather import take

__all__ = ['OUTPUTS', 'Plan', 'forward', 'is_known', 'names', 'output', 'required',
           'split_tables']

# --- the batch and the catalogue ------------------------------------------------------------------


@output('items', 'B, N', dtype='int32')
def _items(at):
    """The prefix; 0 pads at the end."""
    return at.batch.items


@output('next', 'B, N', dtype='int32')
def _next(at):
    """The item that follows each position of the prefix; 0 pads."""
    return at.batch.next


@output('warm', 'V+1', dtype='bool', is_table=True)
def _warm(at):
    """Whether a training session holds an item."""
    return at.stored('warm')


@output('popularity', 'V+1', is_table=True)
def _popularity(at):
    """How often training sessions hold an item."""
    return at.stored('popularity')


# --- items ----------------------------------------------------------------------------------------


@output('_keep', needs=('content',))
def _keep(at):
    """Words of the items that are not withheld from a reader, bool [U, T]."""
    return _kept(at.keys['withhold'], at.batch.ids, at.batch.tokens, at.spec.withhold)


@output('_k', needs=lambda plan: ('content', '_keep') if 'k' in plan.fresh else ())
def _k_by_modality(at, keep=None):
    """Knowledge of the items, [B, N, M, D of a modality]."""
    if keep is None:
        return at.stored('k')[at.batch.items]
    b = at.batch
    return readers.read_items(at.spec, at.params, 'knowledge', b.image, b.has_image, b.tokens,
                              keep)[b.slots]


@output('_r', needs=lambda plan: ('content', '_keep') if 'r' in plan.fresh and plan.reread else ())
def _r_pair(at, keep=None):
    """Distilled representations of `items` and of `next`."""
    b = at.batch
    if keep is not None:
        rows, pointers = readers.distil_items(at.spec, at.params, b.image, b.has_image, b.tokens,
                                              keep), (b.slots, b.next_slots)
    elif 'r' in at.fresh:
        rows, pointers = at.stored('k'), (b.items, b.next)
        adapt = partial(at.spec.adapter.apply, {'params': at.params['adapter']})
        return tuple(adapt(rows[pointer]) for pointer in pointers)
    else:
        rows, pointers = at.stored('r'), (b.items, b.next)
    return tuple(flat(rows[pointer]) for pointer in pointers)


@output('k', 'B, N, M D', ('_k',))
def _k(at, k):
    """Knowledge of the items, the features of the modalities side by side."""
    return flat(k)


@output('r', 'B, N, D', ('_r', 'trained r'))
def _r(at, pair):
    """Distilled representations of `items`."""
    return pair[0]


@output('r_next', 'B, N, D', ('_r', 'trained r'))
def _r_next(at, pair):
    """Distilled representations of `next`."""
    return pair[1]


@output('describe', 'B, T, width', ('content', '_k', 'describe.tokens'))
def _describe(at, k, tokens):
    """Hidden states that write the text of the prefix's last item."""
    keep = _kept(at.keys['describe_words'], at.batch.row, tokens, at.spec.word_dropout)
    variables = readers.knowledge_variables(at.spec, at.params, 'knowledge')
    return at.spec.knowledge.apply(variables, k[at.rows, at.batch.last], tokens, keep,
                                   method='describe')


@output('describe.tokens', 'B, T', ('content',), dtype='int32')
def _describe_tokens(at):
    """That text; -1 pads."""
    return at.batch.tokens[at.batch.slots[at.rows, at.batch.last]]


@output('vocabulary', 'W, width', is_table=True)
def _vocabulary(at):
    """Rows of the words that hidden states are compared with."""
    return readers.vocabulary(at.params)


# --- hidden states of an item's tokens ------------------------------------------------------------


@output('_content', needs=('content',))
def _content(at):
    """Image, has_image and tokens of one item per row, the prefix's last.

    A row has one item's states on any device, and the item is read once per row.
    """
    slots = at.batch.slots[at.rows, at.batch.last]
    return tuple(x[slots] for x in (at.batch.image, at.batch.has_image, at.batch.tokens))


def _states(who, at, content):
    states = readers.item_states(at.spec, at.params, who, *content)
    return jax.lax.stop_gradient(states) if who == 'teacher' else states


for _who, _source in (('k', ()), ('r', ('trained r',)), ('teacher', ('teacher',))):
    output(f'_{_who}.states', needs=('_content', *_source))(partial(_states, _who))
    for _i, _what in enumerate(readers.WHAT):
        output(f'{_who}.{_what}', 'B, P, width' if _what == 'image' else 'B, T, width',
               (f'_{_who}.states',), doc={
                   'k': f"Hidden states of the last item's {_what}, under the knowledge adapter.",
                   'r': f"Hidden states of the last item's {_what}, under the distil adapter.",
                   'teacher': f"Hidden states of the last item's {_what}, of the teacher.",
               }[_who])(lambda at, states, i=_i: states[i])


@output('image.there', 'B, P', ('_content',), dtype='bool')
def _image_there(at, content):
    """Whether the last item has an image."""
    image, has_image, _ = content
    _, rows, columns = at.spec.knowledge.base.grid(image.shape[1])
    return jnp.broadcast_to(has_image[:, None], (len(has_image), rows * columns))


@output('text.there', 'B, T', ('_content',), dtype='bool')
def _text_there(at, content):
    """Which tokens the last item's text has."""
    return content[2] >= 0


@output('teacher.vocabulary', 'W, width', ('teacher',), is_table=True)
def _teacher_vocabulary(at):
    """`vocabulary` of the teacher."""
    return readers.vocabulary(at.params['teacher'])


@output('cluster', 'V+1', ('clusters',), dtype='int32', is_table=True)
def _cluster(at):
    """The cluster of every item."""
    return at.stored('cluster')


# --- sessions -------------------------------------------------------------------------------------


@output('_transfer')
def _transfer(at):
    """The Transfer-MLLM with its variables bound."""
    return partial(at.spec.transfer.apply, readers.transfer_variables(at.spec, at.params))


@output('t', 'B, N, D', lambda plan: ('_transfer', '_k') if plan.form == 'compressed'
        else ('_transfer', 'content'))
def _t(at, read, k=None):
    """The session up to each position."""
    b = at.batch
    if k is not None:
        return read(read(k, method='compress'), b.mask)
    unfolded = read(b.image, b.has_image, b.tokens, method='unfold')
    return read(streams.rows(unfolded, b.slots), b.mask)


@output('_parts', needs=('t',))
def _parts(at, t):
    """The parts c and p of t."""
    return at.spec.disentangle.apply({'params': at.params['disentangle']}, t)


@output('c', 'B, N, D', ('_parts',))
def _c(at, parts):
    """The part of `t` that agrees with item knowledge."""
    return parts[0]


@output('p', 'B, N, D', ('_parts',))
def _p(at, parts):
    """The part of `t` about the transition."""
    return parts[1]


@output('interest', 'B, C', ('_transfer', 't', 'clusters'))
def _interest(at, read, t):
    """Logits over the clusters of a session's items."""
    return read(t[at.rows, at.batch.last], method='interest')


@output('_pick')
def _picked(at):
    """The position whose next item's text is written, int32 [B]."""
    return _pick(at.keys['pick'], at.batch)


@output('foretell', 'B, T, width', ('_transfer', 't', '_pick', 'foretell.tokens'))
def _foretell(at, read, t, position, tokens):
    """Hidden states that write the text of an item that follows a position."""
    keep = _kept(at.keys['foretell_words'], at.batch.row, tokens, at.spec.word_dropout)
    return read(t[at.rows, position], tokens, keep, method='foretell')


@output('foretell.tokens', 'B, T', ('content', '_pick'), dtype='int32')
def _foretell_tokens(at, position):
    """That text; -1 pads."""
    return at.batch.tokens[at.batch.next_slots[at.rows, position]]


# --- the recommender ------------------------------------------------------------------------------


@output('_z', needs=('features',))
def _z_pair(at):
    """Vectors of the catalogue, and those of the prefix's items in it."""
    table = z_table(at.spec, at.params, at.catalogue, at.keys['fusion'])
    return take(table, at.batch.items)


@output('z', 'V+1, D', ('_z',), is_table=True)
def _z(at, pair):
    """The recommender's items; products with `h` are logits."""
    return pair[0]


def _fresh_needs(plan):
    made_by = {'k': 'k', 'r': '_r'}
    return ('_z', *(made_by[n] for n in plan.recommend if n in plan.fresh))


@output('_prefix', needs=_fresh_needs)
def _prefix(at, pair, *fresh):
    """Vectors of the prefix's items, from fresh features where there are any."""
    if not fresh:
        return pair[1]
    fresh = iter(fresh)

    def feature(name):
        if name not in at.fresh:
            return flat(at.catalogue[name][at.batch.items])
        rows = next(fresh)
        return rows[0] if isinstance(rows, tuple) else rows

    return item_vectors(at.spec, at.params, at.batch.items,
                        [feature(name) for name in at.spec.recommend], at.catalogue,
                        at.keys['fusion'])


def _encode(at, z, prefix, each):
    key = at.keys['encoder']
    return encode_sessions(at.spec, at.params, at.batch.items, z, at.catalogue,
                           None if key is None else row_keys(key, at.batch.row), prefix, each=each)


@output('h', 'B, D', ('z', '_prefix'))
def _h(at, z, prefix):
    """The recommender's session."""
    return _encode(at, z, prefix, each=False)


@output('h_each', 'B, N, D', ('z', '_prefix', 'prefixes'))
def _h_each(at, z, prefix):
    """The recommender's session after every position."""
    return _encode(at, z, prefix, each=True)


@output('repeat', 'B, N, N')
def _repeat(at):
    """The shift of the scores of the prefix's items (`model.repeats`), or None."""
    table = at.params['recommender'].get('repeat')
    return None if table is None else shifts(table, at.batch.items)


@output('club', is_table=True)
def _club(at):
    """The density q of `club_fit`, as a score of pairs, [A, I] and [G, J] -> [A, G]."""
    return Score(at.spec.club, at.params['club'])


def _kept(key, rows, tokens, rate):
    """Bool like tokens [B, T]: words that stay visible, drawn per row number; None: all of them."""
    if key is None:
        return tokens >= 0
    keys = row_keys(key, rows)
    return jax.vmap(lambda k: jax.random.bernoulli(k, 1 - rate, tokens.shape[1:]))(keys)


def _pick(key, batch):
    """One position per row, int32 [B]: uniform over the prefix, or its last without a key."""
    if key is None:
        return batch.last
    draw = jax.vmap(jax.random.uniform)(row_keys(key, batch.row))
    return jnp.minimum((draw * (batch.last + 1)).astype(jnp.int32), batch.last)
