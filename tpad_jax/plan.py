"""What a stage will ask of a device's memory, worked out before anything is computed.

Parameters, gradients and moments are counted exactly, from the shapes; activations are estimated
from what each layer keeps for the backward pass (see `layer_bytes`), to within a factor of two of
what the compiler reports (tests/test_plan.py). All figures are bytes per device.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from tpad_jax import optim
from tpad_jax.models.hf import spec as specs
from tpad_jax.models.hf.vlm import VLM

MOMENTS = {'adamw': 2, 'adam': 2, 'sgd': 0}


@dataclass(frozen=True)
class Stage:
    """Bytes per device of one stage.

    Attributes:
      frozen, trained: parameters. moments: gradients and the optimiser's state.
      activations: what the backward pass needs of the MLLMs' layers. logits: of generation losses.
    """

    name: str
    frozen: int
    trained: int
    moments: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.frozen + self.trained + self.moments + self.activations + self.logits


def layer_bytes(width, inner, queries, keys, length, size, heads, remat) -> float:
    """Bytes per token that one transformer layer keeps for its backward pass.

    Args:
      width: D. inner: of the MLP, gate and up counted apart. queries, keys: widths of q and k.
      length: tokens attended to. size: bytes of a number. heads: H. remat: see layers.REMAT.
    """
    products = size * (queries + 2 * keys + 2 * width + inner)
    if remat == 'full':
        return size * width
    if remat == 'dots':
        return size * width + products
    # norms keep float32 copies, softmax its float32 probabilities
    return products + 4 * 4 * width + size * (2 * inner + 2 * queries) + 4 * 2 * heads * length


def read_bytes(base, rows: int, length: int, images: int) -> float:
    """Activations of `rows` streams of `length` tokens, and of `images` images seen for them.

    A frozen tower without adapters keeps nothing: one layer's worth stands for it.
    """
    if not isinstance(base, VLM):
        size, remat = 4, 'none'
        d = dict(width=base.width, inner=2 * base.hidden, queries=base.width, keys=base.width,
                 heads=base.heads)
        return rows * length * base.layers * layer_bytes(**d, length=length, size=size, remat=remat)
    s, size = base.spec.decoder, jnp.dtype(base.dtype).itemsize
    d = dict(width=s.width, inner=2 * s.hidden, queries=s.heads * s.head_dim,
             keys=s.kv_heads * s.head_dim, heads=s.heads, length=length, size=size)
    kept = s.layers * layer_bytes(**d, remat=base.remat)
    if base.remat != 'none':  # one layer at a time is computed again, in full
        kept += layer_bytes(**d, remat='none')
    v = base.spec.vision
    merge = v.merge ** 2 if isinstance(v, specs.Grid) else 1
    patches = base.spec.image_tokens(base.side) * merge
    seen = layer_bytes(width=v.width, inner=v.hidden, queries=v.width, keys=v.width, heads=v.heads,
                       length=patches, size=size, remat='none')
    return rows * length * kept + images * patches * seen


def lengths(base, text: int, positions: int) -> tuple[int, int]:
    """Tokens of an item's prompt and of a compressed session's."""
    if isinstance(base, VLM):
        s = base.spec
        image = s.image_tokens(base.side) + len(s.start_ids) + len(s.end_ids)
    else:
        image = 16
    frame = max(1, len(base.before))
    return frame + image + text + len(base.end) + 2, frame + 3 * positions


def stage_plan(config, name: str, base, shapes: dict, *, shards: int, model: int,
               positions: int) -> Stage:
    """The memory of stage `name`.

    Args:
      config: the run's. base: the MLLM's module. shapes: {path: shape and dtype} of all parameters.
      shards: parts of a batch. model: devices that share a parameter. positions: N.
    """
    c = config.stage[name]
    trained, frozen = optim.split(shapes, c.train)

    def bytes_of(tree):
        return sum(math.prod(x.shape) * x.dtype.itemsize // (model if _split(p) else 1)
                   for p, x in tree.items())

    rows, text = c.batch_size // shards, config.mllm.text_length
    item, session = lengths(base, text, positions)
    vocab = base.spec.decoder.vocab if isinstance(base, VLM) else base.vocab
    fresh = [n for n in c.fresh.split(',') if n]

    def generation(loss):  # scores, their softmax and its gradient
        return 3 * 4 * (1 if config.losses[loss].by_row else rows) * text * vocab

    def content(items):  # with chunks, one is in memory at a time
        items = min(items, config.mllm.chunk or items)
        return read_bytes(base, items, item, items)

    activations = logits = 0
    if name == 'knowledge':
        activations = content(rows) + read_bytes(base, rows, 2 + text, 0)
        logits = generation('gen_knowledge')
    elif name in ('transfer', 'joint'):
        full = config.model.form == 'full'
        # at most: an item that occurs twice is read once
        activations = len(fresh) * content(rows * (positions + 1) + 1)
        activations += read_bytes(base, rows, positions * item if full else session, 0)
        activations += (1 + ('k' in fresh)) * read_bytes(base, rows, 2 + text, 0)
        logits = generation('gen_transfer') + ('k' in fresh) * generation('gen_knowledge')
    return Stage(name, bytes_of(frozen), bytes_of(trained),
                 bytes_of(trained) * (1 + MOMENTS[c.optimiser]), int(activations), int(logits))


def _split(path):
    """Whether the axis 'model' cuts this parameter (see parallel.RULES)."""
    return path.startswith('base/decoder/layers/') and path.endswith('/kernel')


def limit() -> int | None:
    """Bytes of this process's first device, None where it does not say (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get('bytes_limit') if stats else None


def lines(stages: list[Stage], available: int | None) -> list[str]:
    """The plan in words, one line per stage and one on what does not fit."""
    def gib(n):
        return f'{n / 2**30:.2f}'

    out = [f'Memory of {s.name}, GiB per device: {gib(s.total)} = frozen {gib(s.frozen)} + trained '
           f'{gib(s.trained)} + gradients and moments {gib(s.moments)} + activations '
           f'{gib(s.activations)} + logits {gib(s.logits)}.' for s in stages]
    over = [s.name for s in stages if available and s.total > available]
    if over:
        out.append(f'Warning: {", ".join(over)} may not fit into {gib(available)} GiB: lower '
                   'batch_size, set config.mllm.remat=full, or raise config.model_shards.')
    return out


def of_run(config, base, shapes: dict, devices, *, stages, positions: int) -> list[str]:
    """`lines` of the stages that read with an MLLM.

    Args:
      shapes: of all parameters, nested; the base's are held in config.mllm.param_dtype.
      devices: parallel.Devices. stages: names. positions: N, items of the longest prefix.
    """
    flat = flatten_dict(shapes, sep='/')
    held = jnp.dtype(config.mllm.param_dtype)
    flat = {path: jax.ShapeDtypeStruct(x.shape, held) if path.startswith('base/') else x
            for path, x in flat.items()}
    reads = [name for name in stages if name != 'recommend']
    return lines([stage_plan(config, name, base, flat, shards=devices.shards, model=devices.model,
                             positions=positions) for name in reads], limit())
