"""What a stage will ask of a device's memory, worked out before anything is computed.

Parameters, gradients, moments and the catalogue's rows are counted exactly, from the shapes.
Activations and logits are estimated, see activations.py. Not counted: what a teacher's pass needs
for a moment, the second copy of parameters that are held in another dtype than the computation's,
parameters that a loss brings along, and what is held between steps (a checkpoint's copy, rows that
are being encoded anew). Activations are counted as if whole on each device, also where a layer's
kernels are not.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from tpad_jax.config import MAKES, STAGES, names
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.job import activations
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.training import optimizer

MOMENTS = {'adamw': 2, 'adam': 2, 'sgd': 0}
SCORED = 'next_item', 'sampled_next_item'  # the losses over the catalogue


@dataclass(frozen=True)
class Stage:
    """Bytes per device of one stage.

    Attributes:
      frozen, trained: parameters. moments: gradients and the optimiser's state.
      batches: pixels and tokens of this step and the next. rows: of the catalogue.
      activations: what the backward pass needs of the MLLM's layers and of the recommender.
      logits: of the loss that has most, over words or items.
    """

    name: str
    frozen: int
    trained: int
    moments: int
    batches: int
    rows: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, f.name) for f in fields(self) if f.name != 'name')


def stage_plan(config, name: str, base: VLM | MLLM | None, shapes: dict, catalogue: dict, *,
               shards: int, model: int, positions: int, side: int = 0) -> Stage:
    """The memory of stage `name`.

    Args:
      config: the run's. base: the MLLM's module, None: there is no content.
      shapes: {path: shape and dtype} of all parameters. catalogue: likewise of the rows per item.
      shards: parts of a batch. model: devices that share a parameter. positions: N.
      side: pixels of an image's.
    """
    c = config.stage[name]
    trained, frozen = optimizer.split(shapes, c.train)

    def bytes_of(tree):
        return sum(math.prod(x.shape) * x.dtype.itemsize // _parts(path, x.shape, model)
                   for path, x in tree.items())

    weighed = {key: loss for key, loss in config.losses.items()
               if name in names(loss.stages) and _weight(c, key, loss)}
    reads, logits, batch = [], 0, 0
    if base is not None and name != 'recommend':
        reads, logits, batch = _content(config, name, base, side, trained, weighed, shards,
                                        positions)
    scored = [loss for loss in weighed.values() if loss.fn in SCORED]
    if scored:
        rows = c.batch_size // shards
        kept, beside, scores = _recommender(config, catalogue, scored, rows, rows // c.accumulate,
                                            positions)
        logits = max(logits, scores)
        reads.append((kept, max(0, beside - logits)))  # which are gone by then
        batch += 4 * c.batch_size // shards * (2 * positions + 3)
    made = [row for stage in STAGES[:STAGES.index(name)] for row in MAKES.get(stage, ())]
    held = {key: x for key, x in catalogue.items() if key in made or key not in ('k', 'r')}
    return Stage(name, bytes_of(frozen), bytes_of(trained),
                 bytes_of(trained) * (1 + (c.accumulate > 1) + MOMENTS[c.optimiser]), 2 * batch,
                 bytes_of(held),
                 int(activations.peak(reads)), int(logits))


def _content(config, name, base, side, trained, weighed, shards, positions):
    """What a stage that reads content with an MLLM asks for: (kept, needed beside) of each of its
    reads, the logits of words, and a batch's content.
    """
    c, of = config.stage[name], activations.sizes(base, side)
    every, text = c.batch_size // shards, config.mllm.text_length
    rows = every // c.accumulate  # that are read at a time
    full, fresh = config.model.form == 'full', names(c.fresh)
    tower = any('/vision/' in path for path in trained)
    item, session = activations.lengths(base, of, text, positions, config.model.form,
                                        config.mllm.pooling)
    # at most, with the padding item: one that occurs twice in a batch is read once
    items = 1 + rows * (1 if name == 'knowledge' else positions + 1)
    pixels = items * (3 * side ** 2 + 4 * text)
    read = partial(activations.read_bytes, of)

    def content():
        at_once = min(items, config.mllm.chunk or items)
        kept, beside = read(at_once, item, at_once, tower)
        # chunk by chunk, from a padded copy of the batch
        return (kept, beside) if at_once == items else (0, kept + beside + pixels)

    def words(loss, length, copies):  # float32 scores and their gradient
        return copies * 4 * (1 if loss.by_row else every) * length * of.vocab

    writer = read(rows, text + 2, 0)
    if name == 'knowledge':
        reads, logits = [content(), writer], words(config.losses.gen_knowledge, text, 2)
    else:
        reads = [*(content() for _ in fresh), read(rows, session, items if full else 0, tower),
                 writer]
        logits = words(config.losses.gen_transfer, text, 2)
        if 'k' in fresh:
            reads.append(writer)
            logits = max(logits, words(config.losses.gen_knowledge, text, 2))
    for loss in weighed.values():
        if loss.fn in ('mdist', 'rdist'):
            reads.append(read(rows, item, rows, tower))
        if loss.fn == 'mdist':  # of both models, each with its gradient's like
            length = text if loss.x.endswith('.text') else of.image
            logits = max(logits, words(loss, length, 4))
    if c.accumulate > 1:  # the states that texts are predicted from are kept, and slopes in them
        texts = ('k' in fresh) + (name != 'knowledge')
        reads.append((2 * texts * every * text * of.layer['width'] * of.layer['size'], 0))
    return reads, logits, c.accumulate * pixels


def _recommender(config, catalogue, scored, rows, read, positions):
    """What the catalogue's vectors and the session encoder keep, and need beside; the scores.

    rows: of which `read` are encoded at a time.
    """
    c, items = config.model, catalogue['warm'].shape[0]
    features = [math.prod(catalogue[row].shape[1:]) for row in names(c.recommend)]
    kept, beside = activations.table_bytes(items, c.width, features, c.feature_hidden)
    kept += activations.session_bytes(read, positions, c)
    scores = max(activations.score_bytes(
        items, c.width, rows * (positions if loss.get('h') == 'h_each' else 1), loss)
        for loss in scored)
    return kept, beside, scores


def _weight(stage, key, loss):
    own = stage.weights.get(key)
    return loss.weight if own is None else own


def _parts(path, shape, model):
    """How many devices of the axis 'model' share an array (see parallel.RULES)."""
    for pattern, spec in devices_lib.RULES:
        cut = [n for n, axis in zip(shape, spec, strict=False) if axis == devices_lib.MODEL]
        if re.search(pattern, path) and all(n % model == 0 for n in cut):
            return model if cut else 1
    return 1  # refused where it is placed


def limit() -> int | None:
    """Bytes of this process's first device, None where it does not say (a CPU)."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get('bytes_limit') if stats else None


def lines(stages: list[Stage], available: int | None,
          remedies: Callable[[Stage], list[str]] = lambda stage: []) -> list[str]:
    """The plan in words, one line per stage and one on each that does not fit.

    Args:
      available: bytes of a device, None: unknown. remedies: what would lower a stage, in words.
    """
    out = [f'Memory of {s.name}, GiB per device: {gib(s.total)} = frozen {gib(s.frozen)} + trained '
           f'{gib(s.trained)} + gradients and moments {gib(s.moments)} + batches {gib(s.batches)} '
           f'+ catalogue {gib(s.rows)} + activations {gib(s.activations)} + logits '
           f'{gib(s.logits)}.' for s in stages]
    for s in stages:
        if available and s.total > available:
            out.append(' '.join([f'Warning: {s.name} may not fit into {gib(available)} GiB.',
                                 *remedies(s), 'More devices with a larger config.model_shards '
                                 'hold less each.']))
    return out


def gib(n: float) -> str:
    """Bytes in GiB, as the plan writes them."""
    return f'{n / 2**30:.2f}'


def of_run(config, base: VLM | MLLM | None, shapes: dict, catalogue: dict, devices, *, stages,
           positions: int, side: int = 0, available: int | None = None) -> list[str]:
    """`lines` of stages.

    Args:
      shapes: of all parameters, nested; the base's are held in config.mllm.param_dtype.
      catalogue, positions, side: see `stage_plan`. devices: parallel.Devices. stages: names.
      available: bytes of a device, None: of this process's.
    """
    flat = flatten_dict(shapes, sep='/')

    def planned(name, model=devices.model, **changes):
        c = config.copy_and_resolve_references()
        c.update_from_flattened_dict(changes)
        own, m = base, c.mllm
        if isinstance(base, VLM):
            own = base.clone(remat=m.remat, dtype=m.dtype)
        dtypes = {'base': m.param_dtype, 'teacher': m.teacher_dtype}
        held = {path: jax.ShapeDtypeStruct(x.shape, jnp.dtype(
            dtypes.get(path.split('/')[0], x.dtype))) for path, x in flat.items()}
        shards = devices.shards * devices.model // model
        return stage_plan(c, name, own, held, catalogue, shards=shards, model=model,
                          positions=positions, side=side)

    available = available or limit()
    return lines([planned(name) for name in stages], available,
                 partial(_remedies, config, isinstance(base, VLM), devices, planned, available))


def _remedies(config, checkpoint, devices, planned, available, stage):
    """What would lower a stage that does not fit, in sentences: each change alone, and all."""
    c, m, tried = config.stage[stage.name], config.mllm, []
    if checkpoint:
        tried += [{f'mllm.{key}': to} for key, to in (
            ('remat', 'full'), ('param_dtype', 'bfloat16'), ('dtype', 'bfloat16'))
            if m[key] != to]
        if m.chunk != 1:
            tried.append({'mllm.chunk': m.chunk // 2 or 8})
    rows = c.batch_size // devices.shards
    if rows > 1:
        tried.append({f'stage.{stage.name}.batch_size': devices.shards * (rows // 2)})
    if rows % (2 * c.accumulate) == 0:
        tried.append({f'stage.{stage.name}.accumulate': 2 * c.accumulate})
    for key, loss in config.losses.items():
        if stage.name in names(loss.stages) and _weight(c, key, loss):
            tried += [{f'losses.{key}.by_row': True}] * (loss.get('by_row') is False)
            tried += [{f'losses.{key}.chunk': 4096}] * (loss.fn == 'next_item' and not loss.chunk)
    every = {key: to for changes in tried for key, to in changes.items()}
    found = {f'config.{key}={to}': planned(stage.name, **{key: to}).total
             for key, to in every.items()}
    count = devices.shards * devices.model
    found |= {f'config.model_shards={n}': planned(stage.name, n).total for n in (2, 4, 8)
              if n > devices.model and count % n == 0 and c.batch_size % (count // n) == 0}
    found = {said: total for said, total in found.items() if total < 0.99 * stage.total}
    if not found:
        return ['No setting of the config lowers it by much.']
    told = [f'{said}: {gib(found[said])}' for said in sorted(found, key=found.get)]
    out = [f'With one change it is {", ".join(told)}.']
    if len(every) > 1 and min(found.values()) > available:
        out.append(f'With all but model_shards it is {gib(planned(stage.name, **every).total)}.')
    return out
