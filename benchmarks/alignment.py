"""What align, distil and disentangle cost: `python -m benchmarks.alignment`.

The losses as the step calls them (InfoNCE, InfoNCE, vCLUB, with their estimates), forward and
backward, by themselves: 1,024 positions, width 256, separable critics of two layers. Beside them,
in turns in the same run, the matrix products that these losses cannot do without, in both passes,
and nothing else. The median of the turns' ratios counts; bar: at most 3. Then the share of the
joint step in the paper's form (configs/ablations.py:joint): the same losses on features of the
joint stage's shapes against the whole step; bar: at most 10 %.

Peak memory of InfoNCE on 32,768 pairs, forward and backward, is what the compiler plans, whole and
in blocks of rows. All of it goes to `benchmarks/alignment.json`.
"""

import os
import platform
import tempfile
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, logging
from flax.traverse_util import unflatten_dict
from rich.console import Console

from benchmarks.mi import commit
from tpad_jax import config as base, losses
from tpad_jax.core import files
from tpad_jax.data import batches
from tpad_jax.job.job import Job
from tpad_jax.models import outputs
from tpad_jax.mutual_information.critics import Critic, GaussianQ, Score
from tpad_jax.training import step as step_lib
from tpad_jax.types import Batch

LOSSES = ('align', 'distil', 'disentangle')
PRODUCTS = ('align + distil + disentangle, batch {batch:,}, width {width}: {milliseconds:.1f} ms '
            'forward and backward, their products ({gflop:.1f} GFLOP) {products_milliseconds:.1f} '
            'ms: ratio {ratio:.2f} (bar 3); each alone, ms: {each}')
MEMORY = ('InfoNCE on {pairs:,} pairs of width {width}, forward and backward, GiB the compiler '
          'plans: whole {whole:.2f}, in blocks of {chunk} rows {chunked:.3f}')
JOINT = ('joint step of {rows} x {positions} positions: {step_milliseconds:.0f} ms, these losses '
         '{milliseconds:.1f} ms: share {share:.3f} (bar 0.1)')
FEATURES = ('k', 'c', 'p', 'r_next')


def alone(chosen, modules):
    """(features, parameters, batch) -> gradients of a few losses by themselves."""
    def objective(features, params, batch):
        out = {**features, 'items': batch.items, 'next': batch.next}
        out |= {n: Score(modules[n], p) for n, p in params.items()}
        total, _, logged = losses.combine(chosen, out, batch, {})
        return total, logged

    return jax.jit(jax.value_and_grad(objective, (0, 1), has_aux=True))


def case(shape, width, modalities=2, seed=0):
    """Modules, random parameters, features and a batch of [B, N] different items, unpadded."""
    rng = np.random.default_rng(seed)
    rows, length = shape
    widths = dict.fromkeys(FEATURES, width) | {'k': modalities * width}
    features = {n: jnp.asarray(rng.normal(size=(rows, length, w)), jnp.float32)
                for n, w in widths.items()}
    items = (1 + np.arange(rows * length).reshape(shape)).astype(np.int32)
    batch = Batch(items=items, next=items, target=items[:, 0], valid=np.ones(rows, bool),
                  row=np.arange(rows, dtype=np.int32))
    modules = {'critic.align': (Critic('separable', width), 'k', 'c'),
               'critic.distil': (Critic('separable', width), 'r_next', 'p'),
               'club': (GaussianQ(2 * width), 'c', 'p')}
    params = {n: m.init(jax.random.key(seed), *(features[f][:1, 0] for f in names))['params']
              for n, (m, *names) in modules.items()}
    return {n: m for n, (m, *_) in modules.items()}, params, features, batch


def products(count, width, modalities=2):
    """The matrix products of both passes and random operands: {shape: how many of them}.

    Of a product a b there are three where both operands get a gradient, and two where b is fixed
    (q's weights, in disentangle).
    """
    def mlp(i, hidden, o):
        return [(count, i, hidden), (count, hidden, o)]

    both = [*mlp(modalities * width, width, width), *mlp(width, width, width) * 3,
            (count, width, count), (count, width, count)]
    fixed = mlp(width, 2 * width, 2 * width)
    every = []
    for a, b, c in both + fixed:
        every += [(a, b, c), (a, c, b)]
        if (a, b, c) not in fixed:
            every.append((b, a, c))
    rng = np.random.default_rng(0)
    operands = [tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((a, b), (b, c)))
                for a, b, c in every]
    return jax.jit(lambda operands: [x @ y for x, y in operands]), operands, every


def seconds(*calls, turns=15, least=0.2):
    """Seconds of each call, [turns, calls], in turns: each as many times as fill `least` s."""
    repeats = []
    for call in calls:
        jax.block_until_ready(call())
        began = time.perf_counter()
        jax.block_until_ready(call())
        repeats.append(max(1, int(least / (time.perf_counter() - began))))
    out = np.zeros((turns, len(calls)))
    for turn in range(turns):
        for i, (call, many) in enumerate(zip(calls, repeats, strict=True)):
            began = time.perf_counter()
            for _ in range(many):
                found = call()
            jax.block_until_ready(found)
            out[turn, i] = (time.perf_counter() - began) / many
    return out


def against_products(count=1024, width=256):
    """The losses of fixed shapes beside their products."""
    modules, params, features, batch = case((count, 1), width)
    chosen = step_lib.stage_losses(base.get_config(), 'transfer')
    picked = tuple(one for one in chosen if one.name in LOSSES)
    run, operands, shapes = products(count, width)
    singles = [partial(alone((one,), modules), features, params, batch) for one in picked]
    every = partial(alone(picked, modules), features, params, batch)
    times = seconds(every, partial(run, operands), *singles)
    work = 2 * sum(a * b * c for a, b, c in shapes)
    return {'milliseconds': 1e3 * np.median(times[:, 0]), 'batch': count, 'width': width,
            'products_milliseconds': 1e3 * np.median(times[:, 1]), 'gflop': work / 1e9,
            'ratio': np.median(times[:, 0] / times[:, 1]), 'ratios': times[:, 0] / times[:, 1],
            'each': {one.name: round(1e3 * float(t), 1) for one, t in
                     zip(picked, np.median(times[:, 2:], axis=0), strict=True)}}


def of_joint_step():
    """The losses on features of the joint stage's shapes beside its whole step."""
    config = base.get_config()
    with tempfile.TemporaryDirectory() as folder:
        job = Job(config, Path(folder), lambda: False)
        job.build(('joint',), Console(quiet=True))
    stage = config.stage.joint
    spec = step_lib.make_spec(config, 'joint', job.spec, config.seed)
    state = step_lib.start(spec, job.params, stage.train)
    zeros = {'k': (2, config.model.features), 'r': (2 * config.model.features,)}
    catalogue = job.catalogue | {n: jnp.zeros((job.data.num_items + 1, *s))
                                 for n, s in zeros.items()}
    drawn = batches.session_batches(
        job.data, content=job.content, max_length=job.max_length, every_prefix=stage.every_prefix,
        batch_size=stage.batch_size, seed=config.seed, shards=1, start_step=0, steps=stage.steps)
    batch = Batch(**jax.tree.map(jnp.asarray, next(drawn)))
    drawn.close()
    step = jax.jit(partial(step_lib.train_step, spec=spec, axis=None))
    tree = unflatten_dict({**state.frozen, **state.params}, sep='/')
    out = jax.jit(partial(outputs.forward, spec.model, needs=spec.needs, fresh=spec.fresh))(
        tree, batch, catalogue, key=jax.random.key(0))
    modules = dict(job.spec.critics)
    modules = {f'critic.{n}': m for n, m in modules.items()} | {'club': job.spec.club}
    picked = tuple(one for one in spec.losses if one.name in LOSSES)
    features = {n: out[n] for n in FEATURES}
    params = {n: out[n].params for n in modules}
    times = seconds(partial(step, state, batch, catalogue),
                    partial(alone(picked, modules), features, params, batch), turns=9)
    return {'step_milliseconds': 1e3 * np.median(times[:, 0]),
            'milliseconds': 1e3 * np.median(times[:, 1]),
            'rows': len(batch.items), 'positions': batch.items.shape[1],
            'share': np.median(times[:, 1] / times[:, 0])}


def memory(count=32_768, width=64, chunk=512):
    """GiB of temporaries the compiler plans for InfoNCE's value and gradients, whole and not."""
    modules, params, features, batch = case((8, 1), width)
    grown = jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape[1:]), x.dtype),
                         (features, batch))
    out = {'pairs': count, 'width': width, 'chunk': chunk}
    for name, size in (('whole', 0), ('chunked', chunk)):
        picked = (losses.LossSpec('align', losses.infonce, 1.0, {'chunk': size}),)
        planned = alone(picked, modules).lower(grown[0], params, grown[1]).compile()
        out[name] = planned.memory_analysis().temp_size_in_bytes / 2**30
    return out


def main(argv):
    """Measure, print and write, part by part."""
    del argv
    logging.set_verbosity(logging.WARNING)
    found = {'commit': commit(), 'date': datetime.now(UTC).strftime('%Y-%m-%d'),
             'machine': platform.machine(), 'cpus': os.cpu_count(), 'jax': jax.__version__}
    for name, measure, shown in (('products', against_products, PRODUCTS), ('memory_gib', memory,
                                 MEMORY), ('joint', of_joint_step, JOINT)):
        found[name] = measure()
        print(shown.format(**found[name]), flush=True)
        files.write_json(Path(__file__).with_suffix('.json'), found)


if __name__ == '__main__':
    app.run(main)
