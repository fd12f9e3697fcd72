"""TPAD composed: its modules, their parameters, item vectors and encoded sessions.

    knowledge-MLLM K    item content          -> k   (`describe`: k -> its description)
    transfer-MLLM  T    k of a session        -> t   (`foretell`: t -> the next item's text)
    disentangle         t                     -> c, p
    distil              item content, LoRA d  -> r
    recommend           id, r (or k), side    -> z;  session GNN over z -> h

`outputs.py` computes these from a batch.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from tpad_jax.data import events
from tpad_jax.models import sessions
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.fusion import Fusion, blank
from tpad_jax.models.heads import Adapter, Disentangle
from tpad_jax.models.hf.bert import Bert
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.models.mllms import KnowledgeMLLM, TextReader, TransferMLLM
from tpad_jax.models.sessions import companions, repeats
from tpad_jax.models.sessions.events import Events, codes
from tpad_jax.mutual_information.critics import Critic, GaussianQ
from tpad_jax.nn import linear
from tpad_jax.nn.gather import at_last
from tpad_jax.nn.linear import unit

# Catalogue rows of the two graphs over items, see data/item_graphs.py
GRAPH, COMPANY = ('near', 'near_weight'), ('together', 'together_lift')
GRAPHS = GRAPH + COMPANY
WORDS = 256  # columns of the rows 'words'
# The base that reads sessions where a text encoder reads items: the small one's, without a tower
SESSIONS = dict(width=128, layers=2, heads=4, hidden=256, channels=(), vision_layers=0)


@dataclass(frozen=True)
class TPAD:
    """The modules and the few numbers that compose them; hashable, static in a step.

    Attributes:
      knowledge: the Knowledge-MLLM, or None for a recommender of ids.
      transfer: the Transfer-MLLM, or None.
      disentangle: the heads of c and p.
      adapter: the head of r.
      club: the density q of p given c.
      critics: (name, critic) of the mutual information losses.
      fusion: of an item's vector z.
      encoder: of sessions.
      recommend: which features enter z next to id and side: names of catalogue rows ('r', 'k',
        'true').
      form: 'item', 'compressed', 'recurrent' or 'full', how the Transfer-MLLM is fed items.
      withhold: share of an item's words withheld from a reader of k or r that is trained [ours].
      word_dropout: share of the words withheld from the writer, which then uses the features.
      modality_dropout: share of the items whose picture or text is hidden from a reader of k or r
        that is trained (FedMLLM, arXiv 2411.14717, trains on items that lack one) [ours].
      session_dropout: on the k that T reads in training [ours].
      lora_scale: alpha / rank.
      normalise: whether z and h have length one, and their products are divided by a learned
        temperature.
      temperature: its first value.
      repeats: whether the items of a prefix get a learned shift of their scores, see repeats.py.
      together: (strength, decay) of the shift that companions of a prefix's items get, see
        companions.py, or () for none.
      memory: entries that a session retrieves from the memory, if the recommender has one (see
        memory.py).
      chunk: items an MLLM reads at a time in a step, 0: all; a backward pass then reads them
        again, chunk by chunk, and stores the activations of one chunk.
      teacher: another MLLM, which reads items for a distillation, or None.
      blended: whether K reads r under a blend of adapters (merge_adapters.py), one feature per
        modality.
      lora_by_kind: whether every kind of token has a separate adapter, see nn/linear.py.
      events: reads times, kinds and earlier sessions next to the encoder, or None.
      reread: whether r = A(K_d(i)), K under a separate adapter; False: r = A(k), an ablation.
      codes: (levels, size) of the items' codes, see features/codes.py, or () for none.
      words: whether the Transfer-MLLM reads and predicts the items' words and side values.
    """

    knowledge: KnowledgeMLLM | TextReader | None
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
    modality_dropout: float = 0.0
    session_dropout: float = 0.0
    lora_scale: float = 1.0
    normalise: bool = False
    temperature: float = 0.07
    repeats: bool = False
    together: tuple[float, ...] = ()
    memory: int = 0
    chunk: int = 0
    teacher: KnowledgeMLLM | None = None
    blended: bool = False
    lora_by_kind: bool = False
    reread: bool = True
    codes: tuple[int, ...] = ()
    words: bool = False
    events: Events | None = None


def build(base: MLLM | VLM | Bert | None, model: Any, *,  # noqa: PLR0913 (of a whole model)
          recommend: tuple, items: int, max_length: int,
          side_sizes: tuple, pooling: str = 'summary', raw: bool = False, chunk: int = 0,
          teacher: KnowledgeMLLM | None = None) -> TPAD:
    """Build the modules from the shared MLLM and plain numbers.

    Args:
      base: the shared MLLM, or the text encoder that reads items; None: there are no MLLMs, and
        only the recommender exists.
      model: config.model.
      recommend: see `TPAD`.
      items: V.
      max_length: longest prefix.
      side_sizes: vocabulary size of each side feature.
      pooling: see `KnowledgeMLLM`.
      raw: see `KnowledgeMLLM`.
      chunk: see `TPAD`.
      teacher: see `TPAD`.
    """
    knowledge = base and KnowledgeMLLM(base, model.features, pooling, raw)
    sessions_base = base
    if isinstance(base, Bert):
        knowledge, sessions_base = TextReader(base), MLLM(base.spec.vocab, **SESSIONS)
    shape = knowledge.shape if knowledge else (1, model.features)
    wide = math.prod(shape)  # of k over its modalities, and so of t, c, p and r
    return TPAD(
        knowledge=knowledge,
        transfer=sessions_base and TransferMLLM(
            sessions_base, wide, model.clusters, shape[0], model.form == 'item',
            model.session_layers, model.block if model.form == 'recurrent' else 0,
            (math.prod(model.codes) if model.codes else 0) + model.words * WORDS),
        disentangle=Disentangle(wide, wide, model.bottleneck), adapter=Adapter(wide),
        club=GaussianQ(wide),
        critics=tuple((name, Critic(kind, model.features))
                      for name, kind in sorted(model.critics.items())),
        fusion=Fusion(items, model.width, model.use_id, side_sizes if model.use_side else (),
                      model.id_dropout, model.feature_dropout, model.feature_hidden),
        encoder=sessions.build(model, max_length),
        recommend=recommend, lora_scale=model.lora_alpha / model.lora_rank,
        together=(model.together_strength, model.together_decay) if model.together else (),
        chunk=chunk, teacher=teacher, blended=bool(model.blend.kind), codes=tuple(model.codes),
        events=Events(reads, model.width) if (reads := events.names(model)) else None,
        **{name: getattr(model, name) for name in (
            'form', 'withhold', 'word_dropout', 'modality_dropout', 'session_dropout', 'normalise',
            'temperature', 'repeats', 'memory', 'lora_by_kind', 'reread', 'words')})


def init(key, spec: TPAD, catalogue: dict, *, rank: int, targets: str, image_shape,
         text_length: int) -> dict:
    """Draw all parameters, nested: base, lora/{knowledge,transfer,distil}, and one entry per head.

    A separate base of the Transfer-MLLM is transfer/base. It trains as a whole, without an adapter.

    Args:
      key: of every draw.
      spec: the modules.
      catalogue: rows per item, for their widths.
      rank: of the adapters.
      targets: of the adapters, a regular expression over parameter paths.
      image_shape: (H, W, 3).
      text_length: T.
    """
    keys = iter(jax.random.split(key, 16))
    content = (jnp.zeros((1, *image_shape), jnp.uint8), jnp.ones((1,), bool),
               jnp.ones((1, text_length), jnp.int32))
    k = jnp.ones((1, 1, *spec.knowledge.shape))
    one = k.reshape(1, -1)

    def heads(module, *args, method=None):
        return module.init(next(keys), *args, method=method)['params']

    knowledge = heads(spec.knowledge, *content, method='everything')
    transfer = heads(spec.transfer, k, jnp.ones((1, 1), bool), content[-1], method='everything')
    base, shared = knowledge.pop('base'), not isinstance(spec.knowledge, TextReader)
    new = partial(linear.init, rank=rank, targets=targets, by_kind=spec.lora_by_kind)
    lora = {n: new(next(keys), base) for n in ('knowledge', 'transfer', 'distil')}
    if shared:
        del transfer['base']
    else:
        del lora['transfer']
    return {
        'base': base, 'knowledge': knowledge, 'transfer': transfer, 'lora': lora,
        'disentangle': heads(spec.disentangle, one), 'adapter': heads(spec.adapter, k[0]),
        'club': heads(spec.club, one, one),
        'critic': {name: heads(critic, one, one) for name, critic in spec.critics},
        'recommender': recommender_init(next(keys), spec, catalogue),
        **({'codes': {'centres': jnp.zeros((*spec.codes, one.shape[-1]))}} if spec.codes else {})}


def recommender_init(key, spec: TPAD, catalogue: dict) -> dict:
    """Draw the parameters of fusion and session encoder alone."""
    a, b = jax.random.split(key)
    ids = jnp.ones((1, 1), jnp.int32)
    features = [flat(catalogue[n][ids]) for n in spec.recommend]
    fusion = spec.fusion.init(a, ids, ids > 0, features, catalogue['side'][ids])['params']
    z = jnp.zeros((1, spec.encoder.max_length, spec.fusion.width))
    items = jnp.ones((1, spec.encoder.max_length), jnp.int32)
    near = _near(spec, catalogue, items, z[0])
    out = {'fusion': blank(fusion, catalogue['warm']),
           'encoder': spec.encoder.init(b, z, items, **near)['params']}
    if spec.normalise:
        out['log_temperature'] = jnp.log(jnp.float32(spec.temperature))
    if spec.events is not None:
        past = z[:, 0] if 'past' in spec.events.reads else None
        known = codes(spec.events.reads, items, items[:, :0])
        out['events'] = spec.events.init(jax.random.fold_in(b, 1), z, known, past)['params']
    if spec.repeats:
        out['repeat'] = jnp.zeros(spec.encoder.max_length)
    return out


def flat(rows):
    """Reshape features [..., M, D] -> [..., M D]; features [..., D] do not change."""
    return rows.reshape(*rows.shape[:2], -1)


def item_vectors(spec, params, ids, rows, catalogue, key=None):
    """Compute z [..., D] of items from their feature rows.

    Args:
      spec: the modules.
      params: nested.
      ids: int32 [...], or None for the whole catalogue, [V+1, D].
      rows: one array per name in spec.recommend.
      catalogue: rows per item.
      key: for dropout, or None.
    """
    warm, side = (catalogue[n] if ids is None else catalogue[n][ids] for n in ('warm', 'side'))
    z = spec.fusion.apply({'params': params['recommender']['fusion']}, ids, warm, rows, side, key)
    return unit(z) if spec.normalise else z


@struct.dataclass
class ItemVectors:
    """The recommender's items, each computed where it is read, x[ids] -> [..., D]."""

    spec: TPAD = struct.field(pytree_node=False)
    params: dict
    catalogue: dict
    key: Any

    def __getitem__(self, ids):
        rows = [self.catalogue[name][ids].reshape(*ids.shape, -1) for name in self.spec.recommend]
        return item_vectors(self.spec, self.params, ids, rows, self.catalogue, self.key)


def z_table(spec, params, catalogue, key=None):
    """Compute the vectors of the whole catalogue, [V+1, D]."""
    rows = [flat(catalogue[n][None])[0] for n in spec.recommend]
    return item_vectors(spec, params, None, rows, catalogue, key)


def encode_sessions(spec, params, items, z_table, catalogue, keys=None, z=None, each=False):
    """Compute h of prefixes, such that <h, z> scores an item.

    Args:
      spec: the modules.
      params: nested.
      items: int32 [B, N], 0 pads at the end. If the events are read, their context (data/events.py)
        may follow as further columns; without it, nothing is known of them.
      z_table: [V+1, D].
      catalogue: rows per item, for the item graph if the encoder reads it.
      keys: a key per row [B] for dropout, or None.
      z: vectors of `items` [B, N, D], if they are already read or differ from z_table's.
      each: whether to return h after every position, [B, N, D], instead of after the last, [B, D].
    """
    if spec.events is not None:
        items, context = jnp.split(items, [spec.encoder.max_length], axis=1)
    z = z_table[items] if z is None else z
    if spec.events is not None:
        read = partial(spec.events.apply, {'params': params['recommender']['events']})
        known = codes(spec.events.reads, items, context, keys)
        z = read(z, known, method='enter')
    h = spec.encoder.apply(
        {'params': params['recommender']['encoder']}, z, items, keys,
        method='positions' if each else None, **_near(spec, catalogue, items, z_table))
    if spec.events is not None:
        past = None
        if 'past' in known:
            there = (known['past'] > 0)[..., None]
            past = (z_table[known['past']] * there).sum(1) / jnp.maximum(there.sum(1), 1)
        if each:
            h = read(h, z, known, past, method='leave')
        else:
            h = read(h[:, None], at_last(z, items)[:, None], known, past, method='leave')[:, 0]
    return unit(h) * jnp.exp(-params['recommender']['log_temperature']) if spec.normalise else h


def repeat_shift(spec, params, items):
    """Compute the shift of the scores of a prefix's items int32 [B, N]: float32 [B, N]."""
    return at_last(repeats.shifts(params['recommender']['repeat'], items), items)


def company_shift(spec, catalogue, items):
    """Return companions [B, N K] and the shift of their scores, see `companions.shifts`."""
    strength, decay = spec.together
    return companions.shifts(*(catalogue[name] for name in COMPANY), items, strength=strength,
                             decay=decay)


def _near(spec, catalogue, items, z_table):
    """Return the global neighbours of every position, if the encoder reads them."""
    if not sessions.reads_graph(spec.encoder):
        return {}
    near, weight = (catalogue[name] for name in GRAPH)
    return {'near': (z_table[near[items]], weight[items])}
