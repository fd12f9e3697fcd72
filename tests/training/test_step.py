"""The step and its loop: jit, pmap and shard_map agree, nothing retraces, nothing waits."""

from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from functools import lru_cache, partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from tests.tiny_stages import (
    DATA,
    ROWS,
    STAGES,
    STEPS,
    N,
    Run,
    V,
    agree,
    differences,
    draw,
    make_config,
    model,
    with_fillers,
)
from tpad_jax import config as base
from tpad_jax.data import batches
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.errors import Stopped
from tpad_jax.models import tpad
from tpad_jax.training import loop as loop_lib, optimizer, step as step_lib
from tpad_jax.training.checkpoint import Checkpoints, abstract
from tpad_jax.types import Batch, State

# each compiles for a quarter of a minute or more
QUICK = {('knowledge', 'jit'), ('recommend', 'jit')}
# Every way by the stage that compiles quickest (two processes: test_hosts.py), and a decoder in
# parts, losses of several stages and rows made again on a mesh. `python -m benchmarks.replicas`
# runs every stage every way.
TRIED = {'knowledge': ('jit',), 'transfer': ('jit',),
         'recommend': ('jit', 'pmap', '4x2', 'parts'), 'joint': ('jit', '2x4')}
CASES = [pytest.param(stage, way, marks=() if (stage, way) in QUICK else pytest.mark.slow)
         for stage in STAGES for way in TRIED[stage]]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """(stage, way) -> Run, each made once."""
    return lru_cache(lambda stage, way: Run(stage, way, tmp_path_factory.mktemp(f'{stage}-{way}')))


@pytest.mark.parametrize(('stage', 'way'), [case for case in CASES if case.values[1] != 'jit'])
def test_twenty_steps_are_those_of_one_device(runs, stage, way):
    one, many = runs(stage, 'jit'), runs(stage, way)
    assert one.rows.keys() == ({'k', 'r'} if stage == 'joint' else set())
    found = differences(one, many.metrics, many.params, many.rows, many.traces)
    assert agree(found), found


@pytest.mark.parametrize('model_shards', [2, 4])
def test_what_is_in_parts_takes_a_part_of_the_bytes(model_shards):
    """The item table and the decoder's kernels; the rest is whole on every device."""
    spec, params, _ = model()
    full = step_lib.make_spec(make_config(), 'joint', spec, seed=5)
    state = step_lib.start(full, params, make_config().stage.joint.train)
    devices = devices_lib.choose('shard_map', 8, model_shards)
    cut = set()
    for path, x in {**devices.share(state.params), **devices.share(state.frozen)}.items():
        held = {shard.data.nbytes for shard in x.addressable_shards}
        if held == {x.nbytes // model_shards}:
            cut.add(path)
        else:
            assert held == {x.nbytes}, path
    layers = 'base/decoder/layers/'
    assert cut == {'recommender/fusion/id', *(
        f'{layers}{name}/kernel' for name in ('attention/q', 'attention/k', 'attention/v',
                                              'attention/o', 'gate', 'up', 'down'))}


@pytest.mark.parametrize(('stage', 'way'), CASES)
def test_nothing_retraces_after_the_first_step(runs, stage, way):
    traces = runs(stage, way).traces
    assert len(traces) == STEPS + 1
    assert traces[0] == 0 < traces[1] == traces[-1]


@pytest.mark.parametrize('stage', [
    pytest.param(stage, marks=pytest.mark.slow) if stage in ('transfer', 'joint') else stage
    for stage in STAGES])
def test_every_loss_of_the_stage_is_logged_and_every_part_learns(runs, stage):
    run, weights = runs(stage, 'jit'), make_config().stage[stage].weights
    asked = {name for name, entry in make_config().losses.items()
             if stage in entry.stages.split(',') and entry.weight and weights[name] != 0}
    assert {loss.name for loss in run.spec.losses} == asked
    assert asked | {'loss', 'optim/grad_norm'} <= run.metrics[1].keys()
    still = {path for path, x in run.params.items() if np.array_equal(x, model()[1][path])}
    # the writers learn in the other stages
    assert not {path for path in still if stage != 'joint' or '/writer/' not in path}
    # so do the losses that keep a state
    first, *_, last = run.loss_states
    for name, before in first.items():
        assert any(map(np.not_equal, *map(jax.tree.leaves, (before, last[name])))), name


@pytest.mark.parametrize('stage', [
    pytest.param(stage, marks=pytest.mark.slow) if stage in ('transfer', 'joint') else stage
    for stage in STAGES])
def test_frozen_parameters_get_neither_gradient_nor_optimiser_state(stage):
    spec, params, catalogue = model()
    config = base.get_config()  # AdamW, whose state holds two arrays per trained one
    full = step_lib.make_spec(config, stage, spec, seed=5)
    state = step_lib.start(full, params, config.stage[stage].train)
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
    batch = devices_lib.choose('jit', 1).place(next(draw(stage)))
    new, _ = jax.eval_shape(partial(step_lib.train_step, spec=watched, axis=None), state, batch,
                            catalogue)
    assert asked == [set(state.params)]
    assert jax.tree.structure(new) == jax.tree.structure(state)


def test_what_is_made_of_the_same_is_the_same_step():
    """And is lifted once; what differs in anything, or was changed behind `make_spec`, is not."""
    def spec(seed=3, **changes):
        c = make_config().copy_and_resolve_references()
        c.update_from_flattened_dict({k.replace('__', '.'): x for k, x in changes.items()})
        return step_lib.make_spec(c, 'recommend', model()[0], seed)

    devices = devices_lib.choose('jit', 1)
    one = spec()
    assert loop_lib.lifted(devices, one) is loop_lib.lifted(devices, spec())
    others = [spec(seed=4), spec(losses__next_item__weight=0.5), spec(skip_not_finite=2),
              spec(stage__recommend__learning_rate=0.5), replace(one, losses=())]
    assert one not in others
    assert len({loop_lib.lifted(devices, other) for other in [one, *others]}) == 6


def test_a_first_state_is_followed_for_its_shapes(monkeypatch):
    """As compiling ahead and --plan do, where no XLA flag names a level of optimisation."""
    monkeypatch.delenv('XLA_FLAGS', raising=False)
    spec = step_lib.StepSpec(None, (), frozenset(), optax.adam(1e-3), 0)
    params = {'a': jnp.ones(3), 'b': jnp.ones(2)}
    shapes = jax.eval_shape(partial(step_lib.start, spec, pattern='a', shapes=True), params)
    found = step_lib.start(spec, params, 'a')
    assert jax.tree.map(jnp.shape, found) == jax.tree.map(lambda x: x.shape, shapes)


def test_frozen_parameters_are_neither_copied_nor_given_away():
    spec, params, catalogue = model()
    full = step_lib.make_spec(make_config(), 'recommend', spec, seed=5)
    params = jax.tree.map(jnp.asarray, params)
    state = step_lib.start(full, params, make_config().stage.recommend.train)
    assert all(x is params[path] for path, x in state.frozen.items())
    devices = devices_lib.choose('jit', 1)
    batch = devices.place(next(draw('recommend')))
    lean = state.replace(frozen={})
    shared = {'catalogue': catalogue, 'frozen': state.frozen}
    new, _ = devices.lift(partial(loop_lib.lean_step, spec=full))(lean, batch, shared)
    assert new.frozen == {}
    assert not any(x.is_deleted() for x in params.values())
    assert all(x.is_deleted() for x in lean.params.values())
    with pytest.raises(ValueError, match='matches no parameter'):
        optimizer.split(params, '^nothing/')


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

    def is_ready(self):
        return True

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.fetch(), dtype)

    __float__ = __bool__ = __int__ = __index__ = item = tolist = block_until_ready = fetch


class RecordingDevices:
    """Devices that only note what is dispatched; `logged` and the new state are OnDevice."""

    def __init__(self, events):
        self.events, self.number = events, 0

    def lift(self, step, seldom=False):
        def dispatch(state, batch, catalogue):
            self.number += 1
            self.events.append(('dispatched', self.number))
            hidden = {'x': OnDevice('state', self.events)}
            return (State(OnDevice('state', self.events), hidden, {}, {}, {}),
                    {'loss': OnDevice(self.number, self.events)})
        return dispatch

    def share(self, tree):
        return tree

    local = share

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


def numbers(start):
    """Batches that are numbers."""
    yield from range(start + 1, start + 1000)


def loop_events(monkeypatch, total, **knobs):
    """What the loop does, in order."""
    monkeypatch.setattr(loop_lib, 'abstract', lambda tree: tree)
    events = []

    @contextmanager
    def progress(*_):
        yield lambda *_: None

    writer = SimpleNamespace(
        rewind=lambda *_: None,
        scalars=lambda stage, step, values: events.append(('logged', step)))
    loop = loop_lib.Loop(name='s', total=total, devices=RecordingDevices(events), batches=numbers,
                        checkpoints=NoCheckpoints(events), writer=writer, progress=progress,
                        **knobs)
    spec = step_lib.StepSpec(None, (), frozenset(), None, 0)
    loop_lib.fit(loop, spec, State(0, {}, {}, {}, {}), {})
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


@pytest.mark.parametrize('ready', [True, False])
def test_the_loop_says_what_its_seconds_went_to(monkeypatch, ready):
    """With a simulated clock. A step that still computes has not waited for input."""
    now, events = [0.0], []

    def taking(seconds, fn):
        def timed(*args, **kwargs):
            now[0] += seconds
            return fn(*args, **kwargs)
        return timed

    monkeypatch.setattr(loop_lib, 'time', SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(loop_lib, 'abstract', lambda tree: tree)
    monkeypatch.setattr(OnDevice, 'is_ready', lambda self: ready)
    devices, checkpoints = RecordingDevices(events), NoCheckpoints(events)
    monkeypatch.setattr(devices, 'lift',
                        lambda step, seldom, lift=devices.lift: taking(11, lift(step)))
    monkeypatch.setattr(devices, 'place', taking(7, devices.place))
    monkeypatch.setattr(checkpoints, 'save', taking(500, checkpoints.save))
    writer = SimpleNamespace(rewind=lambda *_: None, scalars=taking(3, lambda *_: None))
    loop = loop_lib.Loop(
        name='s', total=4, devices=devices, batches=numbers, writer=writer,
        checkpoints=checkpoints, progress=lambda *_: nullcontext(lambda *_: None), log_every=2,
        save_every=2, eval_every=4, validate=taking(13, lambda *_: {'nll': 0.5}))
    monkeypatch.setattr(checkpoints, 'best', lambda expected: (4, checkpoints.held, {}),
                        raising=False)
    spec = step_lib.StepSpec(None, (), frozenset(), None, 0)
    found = loop_lib.fit(loop, spec, State(0, {}, {}, {}, {}), {})[-1]
    # lines of steps 2 and 4, and validation's own; saves of the same steps
    assert found['spent'] == {'compile': 11, 'input': 28 * ready, 'save': 1000, 'log': 6,
                              'between': 16}
    assert found['seconds'] == 7 + 4 * (11 + 7) + 2 * 3 + 16 + 2 * 500
    # so that the share of no part exceeds 100 %, the last save included
    assert sum(found['spent'].values()) <= found['seconds']


def test_a_resumed_stage_has_the_loss_state_it_was_stopped_with(monkeypatch, tmp_path):
    """MINE's moving average hangs on every step before, and comes back with the parameters."""
    def step(state, batch, shared):
        average = 0.5 * state.loss_state['mine']['log_average'] + batch
        return (state.replace(step=state.step + 1, loss_state={'mine': {'log_average': average}}),
                {'loss': average})

    def ended(workdir, *stops):
        for asked in stops:
            checkpoints = Checkpoints(workdir)
            devices = RecordingDevices([])
            monkeypatch.setattr(devices, 'lift', lambda *_: step)
            loop = loop_lib.Loop(
                name='s', total=5, devices=devices, batches=numbers, checkpoints=checkpoints,
                writer=SimpleNamespace(rewind=lambda *_: None, scalars=lambda *_: None),
                progress=lambda *_: nullcontext(lambda *_: None), log_every=1, save_every=100,
                stopping=iter(asked).__next__)
            state = State(jnp.int32(0), {}, {}, {}, {'mine': {'log_average': jnp.float32(0)}})
            spec = step_lib.StepSpec(None, (), frozenset(), None, 0)
            with closing(checkpoints), suppress(Stopped):
                loop_lib.fit(loop, spec, state, {})
        with closing(Checkpoints(workdir)) as checkpoints:
            number, saved, _ = checkpoints.latest(abstract({'state': state, 'rows': {}}))
        return number, float(saved['state'].loss_state['mine']['log_average'])

    whole = ended(tmp_path / 'whole', [False] * 5)
    assert whole == (5, 5 + 4 / 2 + 3 / 4 + 2 / 8 + 1 / 16)
    assert ended(tmp_path / 'parts', [False, True], [False] * 3) == whole


def test_metrics_that_are_not_finite_end_the_run(monkeypatch):
    monkeypatch.setattr(OnDevice, 'fetch', lambda self, *_: float('nan'))
    with pytest.raises(FloatingPointError, match='stage s, step 1: loss not finite'):
        loop_events(monkeypatch, 3, log_every=1, save_every=100)


@pytest.mark.slow
def test_predictions_after_every_position_are_the_same_on_eight_devices():
    """Attention's h_each, read at the batch's places: what fills up has no part in it."""
    config = make_config().copy_and_resolve_references()
    config.model.update(encoder='attention', normalise=True, layers=1, heads=2, recommend='',
                        use_side=False, repeats=True)
    config.losses.next_item.update(h='h_each', chunk=4)
    spec = tpad.build(None, config.model, recommend=(), items=V, max_length=N, side_sizes=())
    count = np.bincount(DATA.train.items, minlength=V + 1).astype(np.float32)
    catalogue = {'warm': jnp.asarray(DATA.warm), 'side': jnp.zeros((V + 1, 0), jnp.int32),
                 'popularity': jnp.asarray(count)}
    params = jax.jit(partial(tpad.recommender_init, spec=spec))(jax.random.key(0),
                                                                catalogue=catalogue)
    params = flatten_dict({'recommender': params}, sep='/')
    step = step_lib.make_spec(config, 'recommend', spec, seed=5)
    found = {}
    for how, shards in (('jit', 1), ('pmap', 8)):
        devices = devices_lib.choose(how, shards)
        batch = next(with_fillers(batches.session_batches(
            DATA, max_length=N, every_prefix=False, batch_size=ROWS, seed=3, shards=shards)))
        assert (batch['places'] < 0).any()  # there is something to fill up
        lifted = devices.lift(partial(step_lib.train_step, spec=step))
        state, logged = lifted(devices.share(step_lib.start(step, params, '')),
                               devices.place(batch), devices.share(catalogue))
        found[how] = jax.device_get((state.params, logged))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), found['jit'],
                 found['pmap'])
    after, _ = found['jit']
    assert max(np.abs(after[path] - params[path]).max() for path in params) > 1e-3
