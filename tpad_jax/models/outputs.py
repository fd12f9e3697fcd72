"""The table of outputs: one function per output, marked with its name, shape and needs.

Importing this module fills `OUTPUTS`. The order of the functions is the order in which a step
computes them. A feature is *fresh* (computed from content, with gradient) or read from the
catalogue's rows; its name is the same.
"""

from functools import partial

import jax
import jax.numpy as jnp

from tpad_jax.models import output_table, readers, stream as streams
from tpad_jax.models.output_table import OUTPUTS, PURPOSES, SOURCES, Inputs, Plan, output, split
from tpad_jax.models.sessions.repeats import shifts
from tpad_jax.models.tpad import TPAD, ItemVectors, encode_sessions, flat, item_vectors, z_table
from tpad_jax.mutual_information.critics import Score
from tpad_jax.nn.attention import dropout, kept, row_keys
from tpad_jax.nn.gather import take

# --- the batch and the catalogue ------------------------------------------------------------------


output('items', 'B, N', dtype='int32', doc='The prefix; 0 pads at the end.')(
    lambda at: at.batch.items)
output('next', 'B, N', dtype='int32',
       doc='The item that follows each position of the prefix; 0 pads.')(lambda at: at.batch.next)


for _name, _needs, _dtype, _doc in (
        ('warm', (), 'bool', 'Whether a training session holds an item.'),
        ('popularity', (), 'float32', 'How often training sessions hold an item.'),
        ('cluster', ('clusters',), 'int32', 'The cluster of every item.')):
    output(_name, 'V+1', _needs, dtype=_dtype, is_table=True, doc=_doc)(
        partial(Inputs.stored, name=_name))


# --- items ----------------------------------------------------------------------------------------


@output('_seen', needs=('content',))
def _seen(at):
    """The content that a reader in training sees, (image, has_image, tokens), and `keep`.

    `keep` are the words that are not withheld, bool [U, T].
    """
    image, has_image, tokens = at.content
    key, ids = at.keys['withhold'], at.batch.ids
    keep = kept(key, ids, tokens, at.spec.withhold)
    if key is not None and at.spec.modality_dropout:  # of one modality, where the other is there
        keys = row_keys(jax.random.fold_in(key, 1), ids)
        drawn = jax.vmap(lambda k: jax.random.uniform(k))(keys)
        half = at.spec.modality_dropout / 2
        both = has_image & (tokens >= 0).any(axis=1)
        has_image &= ~both | (drawn >= half)
        keep &= (~both | (drawn < 1 - half))[:, None]
    return image, has_image, tokens, keep


@output('_k', needs=lambda plan: ('_seen',) if 'k' in plan.fresh else ())
def _k_by_modality(at, seen=None):
    """Knowledge of the items, [B, N, M, D of a modality]."""
    if seen is None:
        return at.stored('k')[at.batch.items]
    k = readers.read_items(at.spec, at.params, 'knowledge', *seen)
    return k[at.batch.slots]


@output('_r', needs=lambda plan: ('_seen',) if 'r' in plan.fresh and plan.reread else ())
def _r_pair(at, seen=None):
    """Distilled representations of `items` and of `next`."""
    b = at.batch
    if seen is not None:
        rows = readers.distil_items(at.spec, at.params, *seen)
        return flat(rows[b.slots]), flat(rows[b.next_slots])
    if 'r' not in at.fresh:
        return flat(at.stored('r')[b.items]), flat(at.stored('r')[b.next])
    adapt = partial(readers.adapt_items, at.spec, at.params)
    return adapt(at.stored('k')[b.items]), adapt(at.stored('k')[b.next])


output('k', 'B, N, M D', ('_k',), doc='Knowledge of the items, the features of the modalities '
       'side by side.')(lambda at, k: flat(k))
split('_r', 'B, N, D', ('trained r',), r='Distilled representations of `items`.',
      r_next='Distilled representations of `next`.')


@output('describe', 'B, T, width', ('content', '_k', 'describe.tokens'))
def _describe(at, k, tokens):
    """Hidden states that write the text of the prefix's last item."""
    keep = kept(at.keys['describe_words'], at.batch.row, tokens, at.spec.word_dropout)
    variables = readers.variables(at.spec, at.params, 'knowledge')
    return at.spec.knowledge.apply(variables, k[at.rows, at.batch.last], tokens, keep,
                                   method='describe')


@output('describe.tokens', 'B, T', ('content',), dtype='int32')
def _describe_tokens(at):
    """That text; -1 pads."""
    return at.batch.tokens[at.batch.slots[at.rows, at.batch.last]]


@output('mention', 'B, width', ('_k',))
def _mention(at, k):
    """The state that predicts the words of the prefix's last item."""
    variables = readers.variables(at.spec, at.params, 'knowledge')
    return at.spec.knowledge.apply(variables, k[at.rows, at.batch.last], method='mention')


output('vocabulary', 'W, width', is_table=True,
       doc='Rows of the words that hidden states are compared with.')(
           lambda at: readers.vocabulary(at.params))


# --- hidden states of an item's tokens ------------------------------------------------------------


@output('_content', needs=('content',))
def _content(at):
    """Image, has_image and tokens of one item per row, the prefix's last.

    A row has one item's states on any device, and the item is read once per row.
    """
    slots = at.batch.slots[at.rows, at.batch.last]
    return tuple(x[slots] for x in at.content)


def _states(who, at, content):
    states = readers.item_states(at.spec, at.params, who, *content)
    return jax.lax.stop_gradient(states) if who == 'teacher' else states


for _who, _needs, _reader in (('k', (), 'under the knowledge adapter'),
                              ('r', ('trained r',), 'under the distil adapter'),
                              ('teacher', ('teacher',), 'of the teacher')):
    output(f'_{_who}.states', needs=('_content', *_needs))(partial(_states, _who))
    for _i, (_part, _tokens) in enumerate((('image', 'P'), ('text', 'T'))):
        output(f'{_who}.{_part}', f'B, {_tokens}, width', (f'_{_who}.states',),
               doc=f"Hidden states of the last item's {_part}, {_reader}.")(
                   lambda at, states, i=_i: states[i])


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


# --- sessions -------------------------------------------------------------------------------------


@output('_transfer')
def _transfer(at):
    """The Transfer-MLLM with its variables bound."""
    variables = readers.variables(at.spec, at.params, 'transfer', 'transfer')
    return partial(at.spec.transfer.apply, variables)


@output('t', 'B, N, D', lambda plan: ('_transfer', 'content') if plan.form == 'full'
        else ('_transfer', '_k'))
def _t(at, read, k=None):
    """The session up to each position."""
    if k is None:
        items = streams.rows(read(*at.content, method='unfold'), at.batch.slots)
        return read(items, at.batch.mask)
    key = at.keys['pick']  # folded, as another output draws by it
    keys = None if key is None else row_keys(jax.random.fold_in(key, 1), at.batch.row)
    k = dropout(k, at.spec.session_dropout, keys)
    return read(read(k, _codes(at, at.batch.items), method='compress'), at.batch.mask)


def _codes(at, items):
    """Codes and words of items [..., C], or None without them."""
    rows = [at.stored(n)[items] for n in ('codes', 'words') if getattr(at.spec, n)]
    return jnp.concatenate(rows, axis=-1) if rows else None


@output('_parts', needs=('t',))
def _parts(at, t):
    """The parts c and p of t, and with a bottleneck the mean and log variance of p."""
    key = at.keys['pick']  # folded, as other outputs draw by it
    keys = None if key is None else row_keys(jax.random.fold_in(key, 2), at.batch.row)
    return at.spec.disentangle.apply({'params': at.params['disentangle']}, t, keys)


split('_parts', 'B, N, D', c='The part of `t` that agrees with item knowledge.',
      p='The part of `t` about the transition.')
for _i, _name in (2, 'mean'), (3, 'log_variance'):
    output(f'p.{_name}', 'B, N, D', ('_parts', 'bottleneck'), doc=f'The {_name.replace("_", " ")} '
           'of the distribution of `p` (`model.bottleneck`).')(lambda at, parts, i=_i: parts[i])


def _ranked_items(at):
    """The r of all items, stored or as A of the stored k."""
    return (flat(at.stored('r')[None])[0] if 'r' in at.catalogue.keys() - at.fresh
            else readers.adapt_items(at.spec, at.params, at.stored('k')))


def _factors(at, read, r, p):
    """Factors of scores of items by r [V, D] and p [A, D], a place for popularity in the latter."""
    critic = Score(dict(at.spec.critics)['distil'], at.params['critic']['distil'])
    z, h = critic.factors(r, p)
    if (codes := _codes(at, slice(len(z)))) is not None:
        z = jnp.append(z, codes, axis=1)
        h = jnp.append(h, read(p, method='next_codes'), axis=1)
    return z, jnp.pad(h, ((0, 0), (0, 1)), constant_values=1)


@output('_ranked', needs=('_parts', '_transfer'))
def _ranked(at, parts, read):
    """Factors of the Transfer-MLLM's scores of all items after every position.

    A score is critic `distil` of an item's r and p, plus the logits of its codes and words, if any,
    plus its log popularity: the former learn how much likelier an item is after a session than
    elsewhere [ours]. An item that no training session holds counts as popular as the geometric
    mean. Where no r are stored, or r is fresh, r is A of the stored k.
    """
    r = _ranked_items(at)
    warm, p = at.stored('warm'), parts[1]
    seen = jnp.where(warm, jnp.log(jnp.maximum(at.stored('popularity'), 1)), 0)
    seen = jnp.where(warm, seen, seen.sum() / jnp.maximum(warm.sum(), 1))
    z, h = _factors(at, read, r, p.reshape(-1, p.shape[-1]))
    return jnp.append(z, seen[:, None], axis=1), h.reshape(*p.shape[:2], -1)


output('teach.z', 'V+1, D', ('_ranked',), is_table=True,
       doc="The Transfer-MLLM's items; products with `teach.h` are logits.")(
           lambda at, pair: pair[0])
output('teach.h', 'B, N, D', ('_ranked',), doc="The Transfer-MLLM's session at every position.")(
    lambda at, pair: pair[1])
output('teach.last', 'B, D', ('_ranked',), doc='`teach.h` at the last position.')(
    lambda at, pair: pair[1][at.rows, at.batch.last])


@output('teach.short', 'B, D', ('_transfer', '_k'))
def _teach_short(at, read, k):
    """`teach.last` of a session that holds the last item alone."""
    last = at.batch.items[at.rows, at.batch.last][:, None]
    alone = k[at.rows, at.batch.last][:, None]
    t = read(read(alone, _codes(at, last), method='compress'), at.batch.mask[:, :1])
    p = at.spec.disentangle.apply({'params': at.params['disentangle']}, t)[1][:, 0]
    return _factors(at, read, _ranked_items(at)[:1], p)[1]


@output('interest', 'B, C', ('_transfer', 't', 'clusters'))
def _interest(at, read, t):
    """Logits over the clusters of a session's items."""
    return read(t[at.rows, at.batch.last], method='interest')


@output('_pick')
def _pick(at):
    """The position whose next item's text is written, int32 [B]: any of the prefix, or the last."""
    key, last = at.keys['pick'], at.batch.last
    if key is None:
        return last
    draw = jax.vmap(jax.random.uniform)(row_keys(key, at.batch.row))
    return jnp.minimum((draw * (last + 1)).astype(jnp.int32), last)


@output('foretell', 'B, T, width', ('_transfer', 't', '_pick', 'foretell.tokens'))
def _foretell(at, read, t, position, tokens):
    """Hidden states that write the text of an item that follows a position."""
    keep = kept(at.keys['foretell_words'], at.batch.row, tokens, at.spec.word_dropout)
    return read(t[at.rows, position], tokens, keep, method='foretell')


@output('foretell.tokens', 'B, T', ('content', '_pick'), dtype='int32')
def _foretell_tokens(at, position):
    """That text; -1 pads."""
    return at.batch.tokens[at.batch.next_slots[at.rows, position]]


# --- the recommender ------------------------------------------------------------------------------


@output('_z', needs=('features',))
def _z_pair(at):
    """Vectors of the catalogue, and those of the prefix's items in it."""
    if not at.table:
        rows = {name: at.catalogue[name] for name in ('warm', 'side', *at.spec.recommend)}
        fusion = {'recommender': {'fusion': at.params['recommender']['fusion']}}
        some = ItemVectors(at.spec, fusion, rows, at.keys['fusion'])
        return some, some[at.batch.items]
    table = z_table(at.spec, at.params, at.catalogue, at.keys['fusion'])
    return take(table, at.batch.items)


output('z', 'V+1, D', ('_z',), is_table=True, doc="The recommender's items; products with `h` are "
       'logits.')(lambda at, pair: pair[0])
output('z.read', 'V+1, D', ('_z',), is_table=True, doc='As `z`, to be read by item alone, x[ids]: '
       'where no loss reads `z`, only these items are computed.')(lambda at, pair: pair[0])


def _fresh(recommend, fresh):
    """Return the names of what makes the fresh features among those that z reads."""
    return ['_r' if name == 'r' else name for name in recommend if name in fresh]


@output('_prefix', needs=lambda plan: ('_z', *_fresh(plan.recommend, plan.fresh)))
def _prefix(at, pair, *features):
    """Vectors of the prefix's items, from fresh features where there are any."""
    if not features:
        return pair[1]
    values = dict(zip(_fresh(at.spec.recommend, at.fresh), features, strict=True))
    values['r'] = values.get('_r', [None])[0]
    rows = [values[name] if name in at.fresh else flat(at.catalogue[name][at.batch.items])
            for name in at.spec.recommend]
    return item_vectors(at.spec, at.params, at.batch.items, rows, at.catalogue, at.keys['fusion'])


def _encode(each, at, pair, prefix):
    key = at.keys['encoder']
    items, context = at.batch.items, at.batch.context
    items = items if context is None else jnp.concatenate([items, context], axis=1)
    return encode_sessions(at.spec, at.params, items, pair[0], at.catalogue,
                           None if key is None else row_keys(key, at.batch.row), prefix, each=each)


output('h', 'B, D', ('_z', '_prefix'), doc="The recommender's session.")(partial(_encode, False))
output('h_each', 'B, N, D', ('_z', '_prefix', 'prefixes'),
       doc="The recommender's session after every position.")(partial(_encode, True))


@output('repeat', 'B, N, N')
def _repeat(at):
    """The shift of the scores of the prefix's items (`model.repeats`), or None."""
    table = at.params['recommender'].get('repeat')
    return None if table is None else shifts(table, at.batch.items)


@output('club', is_table=True)
def _club(at):
    """The density q of `club_fit`, as a score of pairs, [A, I] and [G, J] -> [A, G]."""
    return Score(at.spec.club, at.params['club'])


def is_known(name) -> bool:
    """Whether this names an output that `forward` may compute: of the table, or a critic."""
    return isinstance(name, str) and (
        name.startswith('critic.') or (name in OUTPUTS and name[0] != '_'))


def names(critics=()) -> list[str]:
    """List the outputs a loss may name, with one per critic."""
    return sorted([*filter(is_known, OUTPUTS), *(f'critic.{name}' for name in critics)])


def forward(spec: TPAD, params: dict, batch, catalogue: dict, needs: frozenset, fresh: frozenset,
            key=None) -> dict:
    """Compute the named outputs of a batch.

    Args:
      spec: the modules, see `tpad.build`.
      params: nested, see `tpad.init`.
      batch: types.Batch.
      catalogue: rows per item, read only.
      needs: names of outputs.
      fresh: features ('k', 'r') computed from content.
      key: the step's key, or None for evaluation: then nothing is dropped or withheld.

    Returns:
      {name: output} of the needed outputs, of the shapes that they declare.
    """
    keys = dict.fromkeys(PURPOSES) if key is None else dict(
        zip(PURPOSES, jax.random.split(key, len(PURPOSES)), strict=True))
    plan = Plan(spec.form, spec.recommend, spec.reread, fresh)
    inputs = Inputs(spec, params, batch, catalogue, fresh, keys,
                    'z' in output_table.required(needs, plan))
    values = {}

    def value(name):
        if name not in values:
            entry = OUTPUTS[name]
            values[name] = output_table.checked(name, entry.make(inputs, *(
                value(n) for n in entry.needs(plan) if n not in SOURCES)), inputs)
        return values[name]

    out = {name: value(name) for name in OUTPUTS if name in needs}
    for name, critic in spec.critics:
        if f'critic.{name}' in needs:
            out[f'critic.{name}'] = Score(critic, params['critic'][name])
    return out
