"""What a train step holds beside its parameters, estimated from sizes alone.

What each layer keeps for its backward pass, what runs beside it, and what a recommender makes of
its catalogue. tests/job/test_plan.py and benchmarks/tpu_compile.py check the sums.
"""

from dataclasses import dataclass

import jax.numpy as jnp

from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.hf import spec as specs
from tpad_jax.models.hf.vlm import VLM


@dataclass(frozen=True)
class Sizes:
    """An MLLM's, of either kind.

    Attributes:
      layer, block: of the decoder and of the vision tower, keywords of `layer_bytes`.
      layers, blocks: how many of them. patches: tokens of an image in the tower; image: in the
        decoder, with those before and behind it. stem: numbers per image ahead of the tower.
      vocab: words. remat: see layers.REMAT.
    """

    layer: dict
    block: dict
    layers: int
    blocks: int
    patches: int
    image: int
    stem: int
    vocab: int
    remat: str


def sizes(base: VLM | MLLM, side: int) -> Sizes:
    """The sizes of an MLLM that reads images of `side` pixels."""
    if isinstance(base, MLLM):
        cells, top = base.grid(side)[1] ** 2, base.channels[-1]
        layer = dict(width=base.width, inner=2 * base.hidden, queries=base.width, keys=base.width,
                     heads=base.heads, size=4)
        block = dict(width=top, inner=4 * top, queries=top, keys=top, heads=base.heads, size=4)
        # a stage's convolution, its norm and what follows
        stem = 3 * max((side >> i) ** 2 * n for i, n in enumerate(base.channels, 1))
        return Sizes(layer, block, base.layers, base.vision_layers, cells, cells, stem, base.vocab,
                     'none')
    s, v = base.spec.decoder, base.spec.vision
    shared, fused = dict(size=jnp.dtype(base.dtype).itemsize), base.how == 'cudnn'  # no scores
    layer = dict(width=s.width, inner=2 * s.hidden, queries=s.heads * s.head_dim,
                 keys=s.kv_heads * s.head_dim, heads=0 if fused else s.heads, **shared)
    block = dict(width=v.width, inner=v.hidden, queries=v.width, keys=v.width,
                 heads=0 if fused else v.heads, **shared)
    image = base.spec.image_tokens(side)
    patches = image * v.merge ** 2 if isinstance(v, specs.Grid) else image
    return Sizes(layer, block, s.layers, v.layers, patches,
                 image + len(base.spec.start_ids) + len(base.spec.end_ids), 0, s.vocab, base.remat)


def layer_bytes(width, inner, queries, keys, length, size, heads, remat) -> float:
    """Bytes per token that one transformer layer keeps for its backward pass.

    Args:
      width: D. inner: of the MLP, gate and up counted apart. queries, keys: widths of q and k.
      length: tokens attended to. size: bytes of a number. heads: H. remat: see layers.REMAT.
    """
    if remat == 'full':
        return size * width
    products = queries + 2 * keys + width + inner
    if remat == 'dots':  # an adapter's product is kept beside the one it is added to
        return size * (width + 2 * products)
    # norms keep float32 copies, softmax its float32 exponentials beside the probabilities
    return (size * (products + width + 2 * inner + 2 * queries) + 4 * 4 * width
            + (4 + size) * heads * length)


def passing_bytes(width, inner, queries, keys, length, size, heads) -> float:
    """Bytes per token of a layer that only passes: its state, and the larger of its two halves."""
    attention = 4 * 2 * heads * length + size * (queries + 2 * keys)
    return size * 2 * width + max(attention, size * 2 * inner)


def read_bytes(of: Sizes, rows: int, length: int, images: int,
               tower: bool = False) -> tuple[float, float]:
    """What `rows` streams of `length` tokens, and `images` images seen for them, ask for.

    `tower`: the vision tower trains too; one that does not keeps nothing.

    Returns:
      Bytes kept until the backward pass is through, and needed beside these while it runs.
    """
    layer, tokens = dict(of.layer, length=length), rows * length
    kept = tokens * of.layers * layer_bytes(**layer, remat=of.remat)
    beside = tokens * passing_bytes(**layer)  # of the gradients
    if of.remat != 'none':  # one layer at a time is computed again, in full
        beside += tokens * layer_bytes(**layer, remat='none')
    block = dict(of.block, length=of.patches)
    seen = images * (of.patches * passing_bytes(**block) + 4 * of.stem)
    if tower:
        kept += images * of.patches * of.blocks * layer_bytes(**block, remat=of.remat)
        seen = images * of.patches * layer_bytes(**block, remat='none')
    return kept, max(beside, seen)


def peak(reads: list[tuple[float, float]]) -> float:
    """The most that is held at once, if reads follow each other and their backward passes come in
    reverse order, each freeing what its read kept. `reads`: (kept, needed beside) of each.
    """
    kept = most = 0.0
    for own, beside in reads:
        kept += own
        most = max(most, kept + beside)
    return most


def lengths(base: VLM | MLLM, of: Sizes, text: int, positions: int, form: str,
            pooling: str) -> tuple[int, int]:
    """Tokens of an item's prompt and of a session's.

    Args:
      base, of: the MLLM and its sizes. text: tokens of an item's. positions: N.
      form, pooling: see config.py.
    """
    frame = max(1, len(base.before))
    item = frame + of.image + text + len(base.end) + 2 * (pooling == 'summary')
    place = 2 if form == 'compressed' else of.image + text + len(base.between)
    return item, frame + positions * (place + 1)


def table_bytes(items: int, width: int, features: list[int], hidden: int) -> tuple[float, float]:
    """What the vectors z of the whole catalogue ask for: kept, and beside while it runs back.

    Args:
      items: V+1. width: D of z. features: width of each feature that enters z. hidden: of the MLP
        each of them passes.
    """
    # z before and behind its length; of a feature its norm, the sum with its MLP, and the MLP
    kept = 4 * items * (2 * width + sum(2 * n + 2 * hidden for n in features))
    beside = 4 * items * (2 * width + max((n + hidden for n in features), default=0))
    return kept, beside


def score_bytes(items: int, width: int, rows: int, loss) -> int:
    """What a loss over the catalogue asks for, its scores and what they are made of.

    Args:
      items: V+1. width: D. rows: predictions. loss: its entry in config.losses.
    """
    if loss.fn == 'sampled_next_item':
        return 3 * 4 * loss.samples * (rows + width)
    narrow = jnp.dtype(loss.dtype).itemsize
    if loss.chunk:  # and the slope of z, which grows chunk by chunk
        return min(loss.chunk, items) * rows * (4 + 4 + narrow) + 4 * items * width
    # scores, then shares; in another dtype a copy of both operands
    return items * (rows * (4 + narrow) + width * (4 + narrow))


def session_bytes(rows: int, positions: int, model) -> float:
    """What the session encoder keeps of `rows` prefixes of N = `positions`. `model`: config.model.

    Numbers per position, in multiples of its width: products with states, gates, messages.
    """
    per = {'sr_gnn': 6 + 18 * model.gnn_steps, 'attention': 6 + 20 * model.layers,
           'gce_gnn': 20 + 4 * model.near}[model.encoder]
    return 4.0 * rows * positions * (per * model.width + 4 * model.heads * positions)
