"""TPAD composed: a batch and the catalogue's rows in, named outputs out.

    knowledge-MLLM K    item content          -> k   (describe: k -> its description)
    transfer-MLLM  T    k of a session        -> t   (foretell: t -> the next item's text)
    disentangle         t                     -> c, p
    distil              item content, LoRA d  -> r
    recommend           id, r (or k), side    -> z;  session GNN over z -> h

Only what a stage's losses name is computed. A feature is *fresh* (computed from content, with
gradient) or read from the catalogue's rows; its name is the same.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from tpad_jax.errors import InputError
from tpad_jax.models import readers
from tpad_jax.models import stream as streams
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.fusion import Fusion, blank
from tpad_jax.models.heads import Adapter, Disentangle
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.models.knowledge import MODALITIES, KnowledgeMLLM
from tpad_jax.models.readers import (
    distil_items,
    knowledge_variables,
    read_items,
    transfer_variables,
)
from tpad_jax.models.sessions import companions
from tpad_jax.models.sessions.attention import SessionAttention
from tpad_jax.models.sessions.gce_gnn import GlobalGraphGNN
from tpad_jax.models.sessions.repeats import last, shifts
from tpad_jax.models.sessions.sr_gnn import SessionGNN
from tpad_jax.models.transfer import TransferMLLM
from tpad_jax.mutual_information.critics import Critic, GaussianQ, Score
from tpad_jax.nn import linear
from tpad_jax.nn.attention import row_keys
from tpad_jax.nn.gather import take
from tpad_jax.nn.mlp import unit

# Every draw of a step is keyed by (step key, purpose, row or item): the order below is part of a
# run.
PURPOSES = ('withhold', 'describe_words', 'foretell_words', 'pick', 'fusion', 'encoder')

ENCODERS = {  # what config.model.encoder may name: (config.model, what all of them take) -> module
    'attention': lambda model, **shared: SessionAttention(model.layers, model.heads, **shared),
    'sr_gnn': lambda model, **shared: SessionGNN(model.gnn_steps, positions=model.positions,
                                                 **shared),
    'gce_gnn': lambda model, **shared: GlobalGraphGNN(**shared),
}
EACH = 'attention',  # those that read every prefix at once, by their method `positions`
# Catalogue rows of the two graphs over items, see data/graph.py
GRAPH, COMPANY = ('near', 'near_weight'), ('together', 'together_lift')
GRAPHS = GRAPH + COMPANY
OUTPUTS = frozenset({  # every name `forward` can provide, but critic.<name>, one per critic
    'items', 'next', 'warm', 'k', 't', 'c', 'p', 'r', 'r_next', 'describe', 'describe.tokens',
    'foretell', 'foretell.tokens', 'vocabulary', 'h', 'h_each', 'z', 'repeat', 'popularity',
    'club', 'teacher.vocabulary', 'interest', 'cluster'}) | readers.STATES | readers.THERE
# Of these, what is not of a batch's rows but of the parameters and the catalogue alone.
TABLES = frozenset({'warm', 'z', 'vocabulary', 'teacher.vocabulary', 'popularity', 'club',
                    'cluster'})


@dataclass(frozen=True)
class TPAD:
    """The modules and the few numbers that say how they are composed; hashable, static in a step.

    Attributes:
      recommend: which features enter z besides id and side: names of catalogue rows ('r', 'k',
        'true').
      form: 'compressed' or 'full', how the Transfer-MLLM is fed an item.
      withhold: share of an item's words kept from a reader that is trained, of k or of r [ours].
      word_dropout: share of the words kept from the writer, which has to use the features instead.
      lora_scale: alpha / rank.
      normalise: z and h have length one, and their products are divided by a learned temperature.
      temperature: where that starts.
      repeats: the items of a prefix get a learned shift of their scores, see repeats.py.
      together: (strength, decay) of what the companions of a prefix's items get, see together.py,
        or () for nothing.
      chunk: items an MLLM reads at a time in a step, 0: all; a backward pass then reads them again,
        chunk by chunk, and keeps the activations of one.
      teacher: another MLLM, which reads items for a distillation, or None.
      blended: r is what K reads under a blend of adapters (blend.py), one feature per modality.
      reread: r = A(K_d(i)), K under an adapter of its own; False: r = A(k), the cheap ablation.
    """

    knowledge: KnowledgeMLLM | None
    transfer: TransferMLLM | None
    disentangle: Disentangle
    adapter: Adapter
    club: GaussianQ
    critics: tuple[tuple[str, Critic], ...]
    fusion: Fusion
    encoder: nn.Module
    recommend: tuple[str, ...] = ('r',)
    form: str = 'compressed'
    withhold: float = 0.3
    word_dropout: float = 0.6
    lora_scale: float = 1.0
    normalise: bool = False
    temperature: float = 0.07
    repeats: bool = False
    together: tuple[float, ...] = ()
    chunk: int = 0
    teacher: KnowledgeMLLM | None = None
    blended: bool = False
    reread: bool = True


def build(base: MLLM | VLM | None, model: Any, *, recommend: tuple, items: int, max_length: int,
          side_sizes: tuple, pooling: str = 'summary', chunk: int = 0,
          teacher: KnowledgeMLLM | None = None) -> TPAD:
    """Modules from the shared MLLM `base` and plain numbers, `model` (config.model).

    Without a base (None) there are no MLLMs, and only the recommender can be asked for anything.
    """
    width = model.features
    wide = len(MODALITIES) * width  # of k over its modalities, and so of t, c, p and r
    return TPAD(
        knowledge=base and KnowledgeMLLM(base, width, pooling),
        transfer=base and TransferMLLM(base, wide, model.clusters),
        disentangle=Disentangle(wide, wide), adapter=Adapter(wide), club=GaussianQ(wide),
        critics=tuple((name, Critic(kind, width)) for name, kind in sorted(model.critics.items())),
        fusion=Fusion(items, model.width, model.use_id, side_sizes if model.use_side else (),
                      model.id_dropout, model.feature_dropout, model.feature_hidden),
        encoder=build_encoder(model, max_length),
        recommend=recommend, form=model.form, withhold=model.withhold,
        word_dropout=model.word_dropout, lora_scale=model.lora_alpha / model.lora_rank,
        normalise=model.normalise, temperature=model.temperature, repeats=model.repeats,
        together=(model.together_strength, model.together_decay) if model.together else (),
        chunk=chunk, teacher=teacher, blended=bool(model.blend.kind), reread=model.reread)


def build_encoder(model: Any, max_length: int):
    """The session encoder config.model.encoder names: prefix in, h [B, D] out."""
    return ENCODERS[model.encoder](model, max_length=max_length, rate=model.dropout,
                                   item_rate=model.item_dropout)


def init(key, spec: TPAD, catalogue: dict, *, rank: int, targets: str, image_shape,
         text_length: int) -> dict:
    """All parameters, nested: base, lora/{knowledge,transfer,distil}, and one entry per head.

    Args:
      key: of every draw. catalogue: rows per item (see features.py), for their widths.
      rank, targets: of the adapters. image_shape: (H, W, 3); text_length: T.
    """
    keys = iter(jax.random.split(key, 16))
    image = jnp.zeros((1, *image_shape), jnp.uint8)
    tokens = jnp.ones((1, text_length), jnp.int32)
    seen = jnp.ones((1,), bool)
    k = jnp.ones((1, 1, len(MODALITIES), spec.knowledge.features))
    one = k.reshape(1, -1)

    def heads(module, *args, method=None):
        return module.init(next(keys), *args, method=method)['params']

    knowledge = heads(spec.knowledge, image, seen, tokens, method='everything')
    transfer = heads(spec.transfer, k, jnp.ones((1, 1), bool), image, seen, tokens,
                     method='everything')
    base = knowledge.pop('base')
    del transfer['base']  # the two share one
    return {
        'base': base,
        'lora': {n: linear.init(next(keys), base, rank=rank, targets=targets)
                 for n in ('knowledge', 'transfer', 'distil')},
        'knowledge': knowledge,
        'transfer': transfer,
        'disentangle': heads(spec.disentangle, one),
        'adapter': heads(spec.adapter, k[0]),
        'club': heads(spec.club, one, one),
        'critic': {name: heads(critic, one, one) for name, critic in spec.critics},
        'recommender': recommender_init(next(keys), spec, catalogue),
    }


def recommender_init(key, spec: TPAD, catalogue: dict) -> dict:
    """Parameters of fusion and session encoder alone."""
    a, b = jax.random.split(key)
    ids = jnp.ones((1, 1), jnp.int32)
    features = [flat(catalogue[n][ids]) for n in spec.recommend]
    fusion = spec.fusion.init(a, ids, ids > 0, features, catalogue['side'][ids])['params']
    fusion = blank(fusion, catalogue['warm'])
    z = jnp.zeros((1, spec.encoder.max_length, spec.fusion.width))
    items = jnp.ones((1, spec.encoder.max_length), jnp.int32)
    out = {'fusion': fusion, 'encoder': spec.encoder.init(
        b, z, items, **_near(spec, catalogue, items, z[0]))['params']}
    if spec.normalise:
        out['log_temperature'] = jnp.log(jnp.float32(spec.temperature))
    if spec.repeats:
        out['repeat'] = jnp.zeros(spec.encoder.max_length)
    return out


def flat(rows):
    """Features [..., M, D] -> [..., M D]; features [..., D] stay as they are."""
    return rows.reshape(*rows.shape[:2], -1)


def item_vectors(spec, params, ids, rows, catalogue, key=None):
    """z [..., D] of items `ids` from their feature rows (one array per name in spec.recommend).

    ids None: of the whole catalogue, [V+1, D].
    """
    warm, side = (catalogue[n] if ids is None else catalogue[n][ids] for n in ('warm', 'side'))
    z = spec.fusion.apply({'params': params['recommender']['fusion']}, ids, warm, rows, side, key)
    return unit(z) if spec.normalise else z


def z_table(spec, params, catalogue, key=None):
    """Vectors of the whole catalogue, [V+1, D]."""
    rows = [flat(catalogue[n][None])[0] for n in spec.recommend]
    return item_vectors(spec, params, None, rows, catalogue, key)


def encode_sessions(spec, params, items, z_table, catalogue, keys=None, z=None, each=False):
    """h of prefixes, such that <h, z> scores an item.

    Args:
      items: int32 [B, N], 0 pads at the end.
      z_table: [V+1, D]. catalogue: rows per item, for the global graph where the encoder reads one.
      keys: a key per row [B] for dropout, or None.
      z: vectors of `items` [B, N, D] where they were read before, or are not z_table's.
      each: h after every position, [B, N, D], instead of after the last, [B, D].
    """
    z = z_table[items] if z is None else z
    h = spec.encoder.apply({'params': params['recommender']['encoder']}, z, items, keys,
                           **_near(spec, catalogue, items, z_table),
                           method='positions' if each else None)
    if not spec.normalise:
        return h
    return unit(h) * jnp.exp(-params['recommender']['log_temperature'])


def repeat_shift(spec, params, items):
    """Added to the scores of a prefix's items int32 [B, N], where they stand: float32 [B, N]."""
    return last(shifts(params['recommender']['repeat'], items), items)


def company_shift(spec, catalogue, items):
    """Items [B, N K] and what is added to their scores, see `together.shifts`."""
    strength, decay = spec.together
    ids, lift = (catalogue[name] for name in COMPANY)
    return companions.shifts(ids, lift, items, strength=strength, decay=decay)


def _near(spec, catalogue, items, z_table):
    """The global neighbours of every position, where the encoder reads them."""
    if not isinstance(spec.encoder, GlobalGraphGNN):
        return {}
    near, weight = (catalogue[name] for name in GRAPH)
    return {'near': (z_table[near[items]], weight[items])}


def forward(spec: TPAD, params: dict, batch, catalogue: dict, needs: frozenset, fresh: frozenset,
            key=None) -> dict:
    """Named outputs of a batch.

    Args:
      spec, params: from `build` and `init`.
      batch: types.Batch. catalogue: rows per item, read only.
      needs: names the losses ask for. fresh: features ('k', 'r') computed from content.
      key: the step's key, or None for evaluation: then nothing is dropped or withheld.

    Returns:
      Of these, the ones needed: items, next [B, N]; k, t, c, p, r, r_next [B, N, M D];
      describe, foretell [B, T, width] and describe.tokens, foretell.tokens [B, T]; vocabulary,
      teacher.vocabulary [W, width]; readings.STATES and THERE, see there; interest [B, C], logits
      over the clusters of a session's items, and cluster int32 [V+1]; h [B, D], h_each [B, N, D] (h
      after every position), z [V+1, D], repeat [B, N, N] or None (see repeats.py), warm and
      popularity [V+1]; critic.*, club: score functions with their parameters bound.
    """
    keys = dict(zip(PURPOSES, (None,) * len(PURPOSES) if key is None
                    else jax.random.split(key, len(PURPOSES)), strict=True))
    out = {'items': batch.items, 'next': batch.next, 'warm': catalogue['warm']}
    if 'popularity' in catalogue:
        out['popularity'] = catalogue['popularity']
    rows = jnp.arange(batch.items.shape[0])
    reads_sessions = needs & {'t', 'c', 'p', 'foretell', 'interest'}
    reads_k = needs & {'k', 'describe'} or (needs & {'h', 'h_each', 'z'} and 'k' in spec.recommend)

    if fresh:
        keep = _keep(keys['withhold'], batch.ids, batch.tokens, spec.withhold)
    if 'k' in fresh and (reads_k or reads_sessions):
        k_content = read_items(spec, params, 'knowledge', batch.image, batch.has_image,
                               batch.tokens, keep)
        k = k_content[batch.slots]
    elif 'k' in catalogue:
        k = catalogue['k'][batch.items]
    elif reads_k or reads_sessions:
        raise InputError('a loss reads the features k, which are neither fresh '
                         '(config.stage.*.fresh) nor left behind by stage knowledge')
    if 'r' in fresh and not spec.reread:
        adapt = partial(spec.adapter.apply, {'params': params['adapter']})
        out['r'], out['r_next'] = (adapt(catalogue['k'][at]) for at in (batch.items, batch.next))
    elif 'r' in fresh:
        r_content = distil_items(spec, params, batch.image, batch.has_image, batch.tokens, keep)
        out['r'], out['r_next'] = (flat(r_content[at]) for at in (batch.slots, batch.next_slots))
    elif 'r' in catalogue:
        out['r'], out['r_next'] = (flat(catalogue['r'][at]) for at in (batch.items, batch.next))

    if reads_k:
        out['k'] = flat(k)
    if 'describe' in needs:
        tokens = batch.tokens[batch.slots[rows, batch.last]]
        keep = _keep(keys['describe_words'], batch.row, tokens, spec.word_dropout)
        variables = knowledge_variables(spec, params, 'knowledge')
        out['describe'] = spec.knowledge.apply(variables, k[rows, batch.last], tokens, keep,
                                               method='describe')
        out['describe.tokens'] = tokens
    if needs & {'describe', 'foretell', 'vocabulary'}:
        out['vocabulary'] = readers.vocabulary(params)
    if needs & (readers.STATES | readers.THERE):
        out |= readers.row_states(spec, params, batch, needs)
    if 'teacher.vocabulary' in needs:
        out['teacher.vocabulary'] = readers.vocabulary(params['teacher'])
    if 'cluster' in needs:
        out['cluster'] = catalogue['cluster']

    if reads_sessions:
        variables = transfer_variables(spec, params)
        read = partial(spec.transfer.apply, variables)
        if spec.form == 'compressed':
            x = read(k, method='compress')
        else:
            x = streams.rows(read(batch.image, batch.has_image, batch.tokens, method='unfold'),
                             batch.slots)
        t = out['t'] = read(x, batch.mask)
        out['c'], out['p'] = spec.disentangle.apply({'params': params['disentangle']}, t)
        if 'interest' in needs:
            out['interest'] = read(t[rows, batch.last], method='interest')
        if 'foretell' in needs:
            at = _pick(keys['pick'], batch)
            tokens = batch.tokens[batch.next_slots[rows, at]]
            keep = _keep(keys['foretell_words'], batch.row, tokens, spec.word_dropout)
            out['foretell'] = read(t[rows, at], tokens, keep, method='foretell')
            out['foretell.tokens'] = tokens

    if needs & {'h', 'h_each', 'z'}:
        table = z_table(spec, params, catalogue, keys['fusion'])
        out['z'], z = take(table, batch.items)
        if any(n in fresh for n in spec.recommend):
            features = [out[n] if n in fresh else flat(catalogue[n][batch.items])
                        for n in spec.recommend]
            z = item_vectors(spec, params, batch.items, features, catalogue, keys['fusion'])
        row = None if key is None else row_keys(keys['encoder'], batch.row)
        for name in sorted(needs & {'h', 'h_each'}):
            out[name] = encode_sessions(spec, params, batch.items, out['z'], catalogue, row, z,
                                        each=name == 'h_each')
    if 'repeat' in needs:
        table = params['recommender'].get('repeat')
        out['repeat'] = None if table is None else shifts(table, batch.items)

    for name, critic in spec.critics:
        if f'critic.{name}' in needs:
            out[f'critic.{name}'] = Score(critic, params['critic'][name])
    if 'club' in needs:
        out['club'] = Score(spec.club, params['club'])
    return out


def apart(out, rows):
    """What `forward` returns, as two dicts: what is of the batch's `rows` rows, and `TABLES`.

    Raises:
      ValueError: an output is neither.
    """
    tables = {n: x for n, x in out.items() if n in TABLES or n.startswith('critic.')}
    own = {n: x for n, x in out.items() if n not in tables}
    for name, x in own.items():
        if x is not None and x.shape[:1] != (rows,):
            raise ValueError(f'output {name} {list(x.shape)} has no row for each of the batch\'s '
                             f'{rows}; one that is the same for every batch stands in tpad.TABLES')
    return own, tables


def _keep(key, rows, tokens, rate):
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
