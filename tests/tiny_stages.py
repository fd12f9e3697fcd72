"""Stages in the smallest sizes, and a run of one by the loop as a job runs it."""

from contextlib import nullcontext
from dataclasses import replace
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax import config as base
from tpad_jax.data import batches
from tpad_jax.data.catalogue import Content, Data
from tpad_jax.data.sessions import Sessions
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.features import encoder as encoder_lib
from tpad_jax.models import tpad
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.training import loop as loop_lib, step as step_lib
from tpad_jax.training.checkpoint import Checkpoints

STAGES = ('knowledge', 'transfer', 'recommend', 'joint')
# how, devices, those that share a part of the batch, parts a device reads its rows in
WAYS = {'jit': ('jit', 1, 1, 1), 'pmap': ('pmap', 8, 1, 1), 'shard_map': ('shard_map', 8, 1, 1),
        '4x2': ('shard_map', 8, 2, 1), '2x4': ('shard_map', 8, 4, 1), 'parts': ('jit', 1, 1, 4),
        'processes': ('auto', 0, 1, 1)}
V, N, T, SIDE, STEPS, ROWS = 20, 4, 6, 8, 20, 16
SIZES = dict(vocab=23, width=16, layers=1, heads=2, hidden=24, channels=(8, 8), vision_layers=1)
# Plain SGD, so that a gradient N times too large shows; each moves parameters by 1e-2 and more, and
# blows no rounding up in twenty steps.
RATES = dict(knowledge=0.0015, transfer=0.01, recommend=0.3, joint=0.01)


def make_data(seed=0):
    """Sessions with repeats and of every length up to N + 1, one item in five cold, and content."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(2, N + 2, 41)
    items = rng.integers(1, V * 4 // 5 + 1, lengths.sum()).astype(np.int32)
    sessions = Sessions(items, np.append(0, np.cumsum(lengths)), np.arange(len(lengths)))
    words = rng.integers(1, SIZES['vocab'], (V + 1, T))
    words[np.arange(T) >= rng.integers(2, T + 1, (V + 1, 1))] = -1
    content = Content(image=rng.integers(0, 256, (V + 1, SIDE, SIDE, 3)).astype(np.uint8),
                      has_image=np.arange(V + 1) % 4 > 0, tokens=words.astype(np.int32), broken=0)
    for rows, nothing in (content.image, 0), (content.has_image, 0), (content.tokens, -1):
        rows[0] = nothing
    words = [''] * (V + 1)
    data = Data(asins=words, titles=words, texts=words, image_bytes=[], has_image=content.has_image,
                side=rng.integers(0, 3, (V + 1, 3)).astype(np.int32), side_sizes=(3, 3, 3),
                train=sessions, valid=sessions, test=sessions,
                warm=np.isin(np.arange(V + 1), items), lines={}, audit={}, fingerprint='', form='')
    return data, content


DATA, CONTENT = make_data()


@lru_cache
def make_config():
    config = base.get_config()
    config.model.update(features=8, width=8, lora_rank=2, lora_alpha=4.0, dropout=0.3,
                        id_dropout=0.3, feature_dropout=0.3)
    for name in ('align_mine', 'distil_mine'):  # the losses that keep a state
        config.losses[name].weight = 0.1
    for stage, rate in RATES.items():
        config.stage[stage].update(optimiser='sgd', learning_rate=rate, batch_size=ROWS)
    # A step of fewer losses compiles sooner. The other stages have these, and that each by itself
    # is the same on eight devices is tested with the losses.
    for name in ('gen_knowledge', 'gen_transfer', 'align_mine', 'disentangle', 'discrepancy'):
        config.stage.joint.weights[name] = 0.0
    return config


@lru_cache
def model():
    """The smallest TPAD, all parameters random (adapters too), and a catalogue of random rows."""
    rng = np.random.default_rng(1)
    config, width = make_config().model, make_config().model.features
    spec = tpad.build(MLLM(**SIZES), config, recommend=('r',), items=V, max_length=N,
                      side_sizes=DATA.side_sizes)
    catalogue = jax.tree.map(jnp.asarray, {
        'warm': DATA.warm, 'side': DATA.side,
        'k': rng.normal(size=(V + 1, 2, width)).astype(np.float32),
        'r': rng.normal(size=(V + 1, 2 * width)).astype(np.float32)})
    shapes = jax.eval_shape(
        partial(tpad.init, spec=spec, catalogue=catalogue, rank=2, targets=config.lora_targets,
                image_shape=(SIDE, SIDE, 3), text_length=T), jax.random.key(0))

    def fill(path, x):
        if x.ndim < 2:
            return (1 + 0.1 * rng.normal(size=x.shape)).astype(np.float32)
        # q near the standard normal it starts as: vCLUB by a q that fits nothing is a small
        # difference of large numbers, whoever computes it
        size = 0.1 if path == 'club/moments/out/kernel' else 1.0
        return (size * rng.normal(size=x.shape) * x.shape[-2] ** -0.5).astype(np.float32)

    params = {path: fill(path, x) for path, x in flatten_dict(shapes, sep='/').items()}
    return spec, jax.tree.map(jnp.asarray, params), catalogue


def draw(stage, step=0, shards=1, seed=3, rows=ROWS, **process):
    shared = dict(batch_size=rows, seed=seed, start_step=step, shards=shards, **process)
    if stage == 'knowledge':
        return batches.item_batches(DATA, content=CONTENT, **shared)
    return batches.session_batches(DATA, max_length=N, every_prefix=stage != 'transfer',
                                   content=None if stage == 'recommend' else CONTENT, **shared)


def with_fillers(found, process=0, processes=1):
    """Batches whose last three rows only fill: of eight devices the last has none that counts."""
    try:
        for batch in found:
            yield batch | {'valid': (np.arange(ROWS) < ROWS - 3)[process::processes]}
    finally:
        found.close()


class Run:
    """One stage by `fitting.fit` as a job runs it: metrics, traces, parameters, state of losses.

    stopping: step -> whether to stop behind it.
    """

    def __init__(self, stage, way, directory, stopping=lambda step: False):
        spec, params, catalogue = model()
        config = make_config().copy_and_resolve_references()
        *shape, parts = WAYS[way]
        self.spec = replace(step_lib.make_spec(config, stage, spec, seed=5), parts=parts)
        self.first = step_lib.start(self.spec, params, config.stage[stage].train)
        self.loss_states = [jax.device_get(self.first.loss_state)]  # and of every save
        self.metrics, self.traces, count = {}, [], 0
        devices = devices_lib.choose(*shape)
        step = step_lib.train_step

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            return step(*args, **kwargs)

        def drawn(start):
            here = devices.drawn_here(parts)
            found = draw(stage, start, **here)
            for batch in with_fillers(found, here['process'], here['processes']):
                self.traces.append(count)  # the batch of step t + 1 is drawn when t is dispatched
                yield batch

        encoder = encoder_lib.Encoder(spec, CONTENT, ('k', 'r'))
        writer = SimpleNamespace(rewind=lambda *_: None, scalars=self.log)
        checkpoints = Checkpoints(directory)
        save = checkpoints.save

        def saved(step, tree, *args, **kwargs):
            self.loss_states.append(jax.device_get(tree['state'].loss_state))
            save(step, tree, *args, **kwargs)

        checkpoints.save = saved
        loop = loop_lib.Loop(
            name=stage, total=STEPS, devices=devices, batches=drawn, checkpoints=checkpoints,
            writer=writer, progress=lambda *_: nullcontext(lambda *_: None), log_every=1,
            stopping=lambda: stopping(len(self.traces) - 1),
            save_every=5, eval_every=10, validate=lambda *_: {'nll': 0.5},
            refresh_every=5 if stage == 'joint' else 0, refreshed=('k', 'r'),
            refresh=(lambda state: encoder(unflatten_dict({**params, **state.params}, sep='/')))
            if stage == 'joint' else None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(step_lib, 'train_step', counted)
            self.params, self.rows, _ = loop_lib.fit(loop, self.spec, self.first, catalogue)
        checkpoints.close()

    def log(self, stage, step, values):
        self.metrics.setdefault(step, {}).update(values)


def differences(one, metrics, params, rows, traces):
    """How far another way of computing `one` is from it: Run, and what the other has of the same.

    Returns:
      The largest difference of what any step logged (of 1 and the value), and of any parameter or
      row at the end, each with its name; how far the parameters of `one` went.
    """
    assert metrics.keys() == one.metrics.keys() == set(range(1, STEPS + 1))
    assert params.keys() == one.params.keys() == one.first.params.keys()
    assert rows.keys() == one.rows.keys()
    assert len(traces) == STEPS + 1
    assert traces[0] == 0 < traces[1] == traces[-1]
    logged, left = {}, {}
    for step, values in one.metrics.items():
        assert values.keys() == metrics[step].keys()
        for name, x in values.items():
            logged[f'{name}, step {step}'] = abs(metrics[step][name] - x) / (1 + abs(x))
    for expected, found in (one.params, params), (one.rows, rows):
        for name, x in expected.items():
            left[name] = np.abs(np.asarray(found[name]) - np.asarray(x)).max()
    moved = max(float(np.abs(x - model()[1][path]).max()) for path, x in one.params.items())
    return {'logged': _largest(logged), 'left': _largest(left), 'moved': moved}


def _largest(found):
    """(value, name); of a nan, which is above every bar."""
    name = list(found)[int(np.argmax(list(found.values())))]
    return float(found[name]), name


def agree(found):
    """Whether `differences` are those of rounding, of parameters that went somewhere."""
    return found['logged'][0] <= 1e-5 and found['left'][0] <= 1e-5 and found['moved'] > 1e-2
