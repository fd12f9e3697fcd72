"""What a stage will ask of a device's memory, worked out before anything is computed.

Parameters, gradients and moments are counted exactly, from the shapes. Activations and logits are
estimated: what each layer keeps for its backward pass (`layer_bytes`) and the most that any part of
a step needs beside it (`peak`); tests/test_plan.py holds them to a factor of two of the compiler's
own figure. Not counted: the catalogue's rows, the recommender's activations, what a teacher's pass
needs for a moment, and the second copy of parameters that are held in another dtype than the
computation's. Activations are counted as if whole on each device, also where a layer's kernels are
not.
"""

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from tpad_jax import optim, parallel
from tpad_jax.models.hf import spec as specs
from tpad_jax.models.hf.vlm import VLM

MOMENTS = {'adamw': 2, 'adam': 2, 'sgd': 0}


@dataclass(frozen=True)
class Stage:
    """Bytes per device of one stage.

    Attributes:
      frozen, trained: parameters. moments: gradients and the optimiser's state.
      batches: pixels and tokens of this step and the next.
      activations: what the backward pass needs of the MLLM's layers. logits: of generation losses.
    """

    name: str
    frozen: int
    trained: int
    moments: int
    batches: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return (self.frozen + self.trained + self.moments + self.batches + self.activations
                + self.logits)


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


def read_bytes(base: VLM, rows: int, length: int, images: int,
               tower: bool = False) -> tuple[float, float]:
    """What `rows` streams of `length` tokens, and `images` images seen for them, ask for.

    `tower`: the vision tower trains too; one that does not keeps nothing.

    Returns:
      Bytes kept until the backward pass is through, and needed beside these while it runs.
    """
    s, v, size = base.spec.decoder, base.spec.vision, jnp.dtype(base.dtype).itemsize
    fused = base.how == 'cudnn'  # which writes no scores
    layer = dict(width=s.width, inner=2 * s.hidden, queries=s.heads * s.head_dim,
                 keys=s.kv_heads * s.head_dim, heads=0 if fused else s.heads, length=length,
                 size=size)
    kept = rows * length * s.layers * layer_bytes(**layer, remat=base.remat)
    beside = rows * length * passing_bytes(**layer)  # of the gradients
    if base.remat != 'none':  # one layer at a time is computed again, in full
        beside += rows * length * layer_bytes(**layer, remat='none')
    patches = base.spec.image_tokens(base.side)
    if isinstance(v, specs.Grid):
        patches *= v.merge ** 2
    block = dict(width=v.width, inner=v.hidden, queries=v.width, keys=v.width,
                 heads=0 if fused else v.heads, length=patches, size=size)
    seen = images * patches * passing_bytes(**block)
    if tower:
        kept += images * patches * v.layers * layer_bytes(**block, remat=base.remat)
        seen = images * patches * layer_bytes(**block, remat='none')
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


def lengths(base: VLM, text: int, positions: int, form: str, pooling: str) -> tuple[int, int]:
    """Tokens of an item's prompt and of a session's.

    Args:
      base: the MLLM. text: tokens of an item's. positions: N. form, pooling: see config.py.
    """
    s = base.spec
    image = s.image_tokens(base.side) + len(s.start_ids) + len(s.end_ids)
    frame = max(1, len(base.before))
    item = frame + image + text + len(base.end) + 2 * (pooling == 'summary')
    place = 2 if form == 'compressed' else image + text + len(base.between)
    return item, frame + positions * (place + 1)


def stage_plan(config, name: str, base: VLM, shapes: dict, *, shards: int, model: int,
               positions: int) -> Stage:
    """The memory of stage `name`.

    Args:
      config: the run's. base: the MLLM's module. shapes: {path: shape and dtype} of all parameters.
      shards: parts of a batch. model: devices that share a parameter. positions: N.
    """
    c = config.stage[name]
    trained, frozen = optim.split(shapes, c.train)

    def bytes_of(tree):
        return sum(math.prod(x.shape) * x.dtype.itemsize // _parts(path, x.shape, model)
                   for path, x in tree.items())

    every, text = c.batch_size // shards, config.mllm.text_length
    rows = every // c.accumulate  # that are read at a time
    full, fresh = config.model.form == 'full', [n for n in c.fresh.split(',') if n]
    tower = any('/vision/' in path for path in trained)
    item, session = lengths(base, text, positions, config.model.form, config.mllm.pooling)
    # at most, with the padding item: one that occurs twice in a batch is read once
    items = 1 + rows * (1 if name == 'knowledge' else positions + 1)
    pixels = items * (3 * base.side ** 2 + 4 * text)

    def content():
        at_once = min(items, config.mllm.chunk or items)
        kept, beside = read_bytes(base, at_once, item, at_once, tower)
        # chunk by chunk, from a padded copy of the batch
        return (kept, beside) if at_once == items else (0, kept + beside + pixels)

    def generation(loss):  # float32 scores and their gradient
        at_once = 1 if config.losses[loss].by_row else every
        return 2 * 4 * at_once * text * base.spec.decoder.vocab

    writer = read_bytes(base, rows, text + 2, 0)
    if name == 'knowledge':
        reads, logits = [content(), writer], generation('gen_knowledge')
    else:
        reads = [*(content() for _ in fresh),
                 read_bytes(base, rows, session, items if full else 0, tower), writer]
        logits = generation('gen_transfer')
        if 'k' in fresh:
            reads, logits = [*reads, writer], max(logits, generation('gen_knowledge'))
    for key, loss in config.losses.items():
        own = c.weights.get(key)
        weight = loss.weight if own is None else own
        if loss.fn in ('mdist', 'rdist') and weight and name in loss.stages.split(','):
            reads.append(read_bytes(base, rows, item, rows, tower))
            if loss.fn == 'mdist':  # of both models, each with its gradient's like
                length = text if loss.x.endswith('.text') else base.spec.image_tokens(base.side)
                at_once = 1 if loss.by_row else every
                logits = max(logits, 4 * 4 * at_once * length * base.spec.decoder.vocab)
    # read in parts, the states that texts are predicted from are kept, and slopes in them, and a
    # part's own gradient stands beside the sum
    texts = ('k' in fresh) + (name != 'knowledge')
    states = 2 * texts * every * text * base.spec.decoder.width * jnp.dtype(base.dtype).itemsize
    inside = c.accumulate > 1
    return Stage(name, bytes_of(frozen), bytes_of(trained),
                 bytes_of(trained) * (1 + inside + MOMENTS[c.optimiser]), 2 * c.accumulate * pixels,
                 int(peak(reads)) + inside * states, logits)


def _parts(path, shape, model):
    """How many devices of the axis 'model' share an array (see parallel.RULES)."""
    for pattern, spec in parallel.RULES:
        cut = [n for n, axis in zip(shape, spec, strict=False) if axis == parallel.MODEL]
        if re.search(pattern, path) and all(n % model == 0 for n in cut):
            return model if cut else 1
    return 1  # refused where it is placed


def limit() -> int | None:
    """Bytes of this process's first device, None where it does not say (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get('bytes_limit') if stats else None


def lines(stages: list[Stage], available: int | None) -> list[str]:
    """The plan in words, one line per stage and one on what does not fit."""
    def gib(n):
        return f'{n / 2**30:.2f}'

    out = [f'Memory of {s.name}, GiB per device: {gib(s.total)} = frozen {gib(s.frozen)} + trained '
           f'{gib(s.trained)} + gradients and moments {gib(s.moments)} + batches {gib(s.batches)} '
           f'+ activations {gib(s.activations)} + logits {gib(s.logits)}.' for s in stages]
    over = [s.name for s in stages if available and s.total > available]
    if over:
        out.append(f'Warning: {", ".join(over)} may not fit into {gib(available)} GiB: lower '
                   'batch_size, raise accumulate, set config.mllm.remat=full, or raise '
                   'config.model_shards.')
    return out


def of_run(config, base: VLM, shapes: dict, devices, *, stages, positions: int) -> list[str]:
    """`lines` of the stages that read with an MLLM.

    Args:
      shapes: of all parameters, nested; the base's are held in config.mllm.param_dtype.
      devices: parallel.Devices. stages: names. positions: N, items of the longest prefix.
    """
    flat = flatten_dict(shapes, sep='/')
    held = jnp.dtype(config.mllm.param_dtype)
    taught = jnp.dtype(config.mllm.teacher_dtype)
    flat = {path: jax.ShapeDtypeStruct(x.shape, held if path.startswith('base/') else taught
                                       if path.startswith('teacher/') else x.dtype)
            for path, x in flat.items()}
    reads = [name for name in stages if name != 'recommend']
    return lines([stage_plan(config, name, base, flat, shards=devices.shards, model=devices.model,
                             positions=positions) for name in reads], limit())
