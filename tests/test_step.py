"""The step and its loop: jit, pmap and shard_map agree, nothing retraces, nothing waits."""

from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax import config as base
from tpad_jax import encode, fitting, optim, parallel, training
from tpad_jax.checkpoint import Checkpoints
from tpad_jax.data import batches
from tpad_jax.data.pipeline import Content, Data
from tpad_jax.data.sessions import Sessions
from tpad_jax.models import tpad
from tpad_jax.models.mllm import MLLM
from tpad_jax.types import Batch, State

STAGES = ('knowledge', 'transfer', 'recommend', 'joint')
WAYS = {'jit': 1, 'pmap': 8, 'shard_map': 8}
# each compiles for a quarter of a minute or more
SLOW = {(stage, 'pmap') for stage in ('transfer', 'recommend', 'joint')} | {
    ('transfer', 'shard_map'), ('joint', 'shard_map')}
V, N, T, SIDE, STEPS, ROWS = 20, 4, 6, 8, 5, 16
SIZES = dict(vocab=23, width=16, layers=1, heads=2, hidden=24, channels=(8, 8), vision_layers=1)
# Plain SGD, so that a gradient N times too large shows; each moves parameters by 1e-2 and more.
RATES = dict(knowledge=0.02, transfer=0.01, recommend=0.3, joint=0.005)


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


def draw(stage, step=0, shards=1, seed=3, rows=ROWS):
    shared = dict(batch_size=rows, seed=seed, start_step=step, shards=shards)
    if stage == 'knowledge':
        return batches.item_batches(DATA, content=CONTENT, **shared)
    return batches.session_batches(DATA, max_length=N, every_prefix=stage != 'transfer',
                                   content=None if stage == 'recommend' else CONTENT, **shared)


def with_fillers(found):
    """Batches whose last three rows only fill: the eighth device has none that counts."""
    try:
        for batch in found:
            yield batch | {'valid': np.arange(ROWS) < ROWS - 3}
    finally:
        found.close()


class Run:
    """One stage by `fitting.fit` as a job runs it: all metrics, traces of the step, parameters."""

    def __init__(self, stage, way, directory):
        spec, params, catalogue = model()
        config = make_config()
        self.spec = training.make_spec(config, stage, spec, seed=5)
        self.first = training.start(self.spec, params, config.stage[stage].train)
        self.metrics, self.traces, count = {}, [], 0
        devices = parallel.choose(way, WAYS[way])
        step = training.train_step

        def counted(*args, **kwargs):
            nonlocal count
            count += 1
            return step(*args, **kwargs)

        def drawn(start):
            for batch in with_fillers(draw(stage, start, devices.shards)):
                self.traces.append(count)  # the batch of step t + 1 is drawn when t is dispatched
                yield batch

        encoder = encode.encoder(spec, CONTENT, ('k', 'r'))
        writer = SimpleNamespace(rewind=lambda *_: None, scalars=self.log)
        checkpoints = Checkpoints(directory)
        loop = fitting.Loop(
            name=stage, total=STEPS, devices=devices, batches=drawn, checkpoints=checkpoints,
            writer=writer, progress=lambda *_: nullcontext(lambda *_: None), log_every=1,
            save_every=2, eval_every=3, validate=lambda *_: {'hit@20': 0.5},
            refresh_every=2 if stage == 'joint' else 0, refreshed=('k', 'r'),
            refresh=(lambda state: encoder(unflatten_dict({**params, **state.params}, sep='/')))
            if stage == 'joint' else None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, 'train_step', counted)
            self.params, self.rows, _ = fitting.fit(loop, self.spec, self.first, catalogue)
        checkpoints.close()

    def log(self, stage, step, values):
        self.metrics.setdefault(step, {}).update(values)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """(stage, way) -> Run, each made once."""
    return lru_cache(lambda stage, way: Run(stage, way, tmp_path_factory.mktemp(f'{stage}-{way}')))


@pytest.mark.parametrize(('stage', 'way'), [
    pytest.param(stage, way, marks=[pytest.mark.slow] if (stage, way) in SLOW else [])
    for stage in STAGES for way in ('pmap', 'shard_map')])
def test_eight_devices_are_one(runs, stage, way):
    one, many = runs(stage, 'jit'), runs(stage, way)
    assert one.metrics.keys() == many.metrics.keys() == set(range(1, STEPS + 1))
    for step, values in one.metrics.items():
        assert values.keys() == many.metrics[step].keys()
        for name, value in values.items():
            np.testing.assert_allclose(many.metrics[step][name], value, rtol=1e-5, atol=1e-5,
                                       err_msg=f'{name}, step {step}')
    assert one.params.keys() == many.params.keys() == one.first.params.keys()
    moved = 0
    for path, value in one.params.items():
        np.testing.assert_allclose(many.params[path], value, rtol=0, atol=1e-5, err_msg=path)
        moved = max(moved, float(np.abs(value - model()[1][path]).max()))
    assert moved > 1e-2
    assert many.rows.keys() == one.rows.keys() == ({'k', 'r'} if stage == 'joint' else set())
    for name, rows in one.rows.items():
        np.testing.assert_allclose(many.rows[name], rows, rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(('stage', 'way'), [
    pytest.param(stage, way, marks=[pytest.mark.slow] if (stage, way) in SLOW else [])
    for stage in STAGES for way in WAYS])
def test_nothing_retraces_after_the_first_step(runs, stage, way):
    traces = runs(stage, way).traces
    assert len(traces) == STEPS + 1
    assert traces[0] == 0 < traces[1] == traces[-1]


@pytest.mark.parametrize('stage', STAGES)
def test_every_loss_of_the_stage_is_logged_and_every_part_learns(runs, stage):
    run = runs(stage, 'jit')
    asked = {name for name, entry in make_config().losses.items()
             if stage in entry.stages.split(',') and entry.weight}
    assert {name for name, *_ in run.spec.losses} == asked
    assert asked | {'loss', 'optim/grad_norm'} <= run.metrics[1].keys()
    still = {path for path, x in run.params.items() if np.array_equal(x, model()[1][path])}
    assert still == set()


@pytest.mark.parametrize('stage', STAGES)
def test_frozen_parameters_get_neither_gradient_nor_optimiser_state(stage):
    spec, params, catalogue = model()
    config = base.get_config()  # AdamW, whose state holds two arrays per trained one
    full = training.make_spec(config, stage, spec, seed=5)
    state = training.start(full, params, config.stage[stage].train)
    assert state.params.keys() | state.frozen.keys() == params.keys()
    assert not state.params.keys() & state.frozen.keys()
    assert any(path.startswith('base/') for path in state.frozen)
    assert not any(path.startswith('base/') for path in state.params)
    held = [path for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)]
    named = {key.key for path in held for key in path if isinstance(key, jax.tree_util.DictKey)}
    assert named == set(state.params)
    size = sum(x.size for x in jax.tree.leaves(state.opt_state))
    trained = sum(x.size for x in state.params.values())
    assert 2 * trained <= size <= 2 * trained + 8  # and a few counters

    asked = []

    def gradients(grads, opt_state, held):
        asked.append(set(grads))
        return full.tx.update(grads, opt_state, held)

    watched = replace(full, tx=full.tx._replace(update=gradients))
    batch = parallel.choose('jit', 1).place(next(draw(stage)))
    new, _ = jax.eval_shape(partial(training.train_step, spec=watched, axis=None), state, batch,
                            catalogue)
    assert asked == [set(state.params)]
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_frozen_parameters_are_neither_copied_nor_given_away():
    spec, params, catalogue = model()
    full = training.make_spec(make_config(), 'recommend', spec, seed=5)
    params = jax.tree.map(jnp.asarray, params)
    state = training.start(full, params, make_config().stage.recommend.train)
    assert all(x is params[path] for path, x in state.frozen.items())
    devices = parallel.choose('jit', 1)
    batch = devices.place(next(draw('recommend')))
    lean = state.replace(frozen={})
    shared = {'catalogue': catalogue, 'frozen': state.frozen}
    new, _ = devices.lift(partial(fitting._lean_step, spec=full))(lean, batch, shared)
    assert new.frozen == {}
    assert not any(x.is_deleted() for x in params.values())
    assert all(x.is_deleted() for x in lean.params.values())
    with pytest.raises(ValueError, match='matches no parameter'):
        optim.split(params, '^nothing/')


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('shards', [1, 8])
def test_a_batch_is_a_function_of_seed_and_step(stage, shards):
    stream = draw(stage, shards=shards)
    first = [next(stream) for _ in range(4)]
    again = next(draw(stage, step=3, shards=shards))
    other = next(draw(stage, shards=shards, seed=4))
    assert {f.name for f in fields(Batch)} & again.keys() == again.keys()
    for name, value in again.items():
        np.testing.assert_array_equal(value, first[3][name], err_msg=name)
    assert not np.array_equal(other['row'], first[0]['row'])
    assert not np.array_equal(first[0]['row'], first[1]['row'])


# --- the loop -----------------------------------------------------------------------------------


class OnDevice:
    """A number on a device that takes note of who waits for it."""

    def __init__(self, name, events, value=1.0):
        self.name, self.events, self.value = name, events, value

    def fetch(self, *_):
        self.events.append(('fetched', self.name))
        return self.value

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.fetch(), dtype)

    __float__ = __bool__ = __int__ = __index__ = item = tolist = block_until_ready = fetch


class RecordingDevices:
    """Devices that only note what is dispatched; `logged` and the new state are OnDevice."""

    def __init__(self, events):
        self.events, self.number = events, 0

    def lift(self, step):
        def dispatch(state, batch, catalogue):
            self.number += 1
            self.events.append(('dispatched', self.number))
            hidden = {'x': OnDevice('state', self.events)}
            return (State(OnDevice('state', self.events), hidden, {}, {}, {}),
                    {'loss': OnDevice(self.number, self.events)})
        return dispatch

    def share(self, tree):
        return tree

    def place(self, batch):
        self.events.append(('placed', batch))
        return batch


class NoCheckpoints:
    """Saves nothing, but notes when it is asked to."""

    def __init__(self, events):
        self.events, self.held = events, None

    def latest(self, expected):
        return None if self.held is None else (0, self.held, {})

    def save(self, step, state, meta, metric=None, wait=False):
        self.events.append(('saved', step))
        self.held = state


def loop_events(monkeypatch, total, **knobs):
    """What the loop does, in order."""
    monkeypatch.setattr(fitting, 'abstract', lambda tree: tree)
    events = []

    def numbers(start):
        yield from range(start + 1, start + 1000)

    @contextmanager
    def progress(*_):
        yield lambda *_: None

    writer = SimpleNamespace(
        rewind=lambda *_: None,
        scalars=lambda stage, step, values: events.append(('logged', step)))
    loop = fitting.Loop(name='s', total=total, devices=RecordingDevices(events), batches=numbers,
                        checkpoints=NoCheckpoints(events), writer=writer, progress=progress,
                        **knobs)
    spec = SimpleNamespace(fresh=frozenset(), skip=0)
    fitting.fit(loop, spec, State(0, {}, {}, {}, {}), {})
    return events


def test_the_loop_fetches_only_metrics_and_those_a_step_late(monkeypatch):
    events = loop_events(monkeypatch, 6, log_every=1, save_every=100)
    expected = [('placed', 1)]
    for step in range(1, 7):
        expected += [('dispatched', step), ('placed', step + 1)]
        if step > 1:
            expected += [('fetched', step - 1), ('logged', step - 1)]
    assert events == [*expected, ('fetched', 6), ('logged', 6), ('saved', 6)]


def test_a_step_that_is_neither_logged_nor_saved_is_not_fetched(monkeypatch):
    events = loop_events(monkeypatch, 7, log_every=3, save_every=2)
    assert [name for what, name in events if what == 'fetched'] == [2, 3, 4, 6, 7]
    assert [name for what, name in events if what == 'saved'] == [2, 4, 6, 7]
    assert events.index(('dispatched', 4)) < events.index(('fetched', 3))


def test_metrics_that_are_not_finite_end_the_run(monkeypatch):
    monkeypatch.setattr(OnDevice, 'fetch', lambda self, *_: float('nan'))
    with pytest.raises(FloatingPointError, match='stage s, step 1: loss not finite'):
        loop_events(monkeypatch, 3, log_every=1, save_every=100)


@pytest.mark.parametrize('loss', [
    'next_item', pytest.param('sampled_next_item', marks=pytest.mark.slow)])
def test_predictions_after_every_position_are_the_same_on_eight_devices(loss):
    """Attention's h_each, read at the batch's places: what fills up has no part in it."""
    config = make_config()
    config.model.update(encoder='attention', normalise=True, layers=1, heads=2, recommend='',
                        use_side=False, repeats=True)
    config.losses.next_item.update(weight=0.0, h='h_each', chunk=4)
    config.losses.sampled_next_item.update(weight=0.0, h='h_each', samples=64)
    config.losses[loss].weight = 1.0
    spec = tpad.build(None, config.model, recommend=(), items=V, max_length=N, side_sizes=())
    count = np.bincount(DATA.train.items, minlength=V + 1).astype(np.float32)
    catalogue = {'warm': jnp.asarray(DATA.warm), 'side': jnp.zeros((V + 1, 0), jnp.int32),
                 'popularity': jnp.asarray(count)}
    params = tpad.recommender_init(jax.random.key(0), spec, catalogue)
    params = flatten_dict({'recommender': params}, sep='/')
    step = training.make_spec(config, 'recommend', spec, seed=5)
    found = {}
    for way, shards in (('jit', 1), ('pmap', 8), ('shard_map', 8)):
        devices = parallel.choose(way, WAYS[way])
        batch = next(with_fillers(batches.session_batches(
            DATA, max_length=N, every_prefix=False, batch_size=ROWS, seed=3, shards=shards)))
        assert (batch['places'] < 0).any()  # there is something to fill up
        lifted = devices.lift(partial(training.train_step, spec=step))
        state, logged = lifted(devices.share(training.start(step, params, '')),
                               devices.place(batch), devices.share(catalogue))
        found[way] = jax.device_get((state.params, logged))
    for way in ('pmap', 'shard_map'):
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found['jit'],
                     found[way])
    after, _ = found['jit']
    assert max(np.abs(after[path] - params[path]).max() for path in params) > 1e-3
