"""Checkpoints: exact round trips, which are kept, damage, other meshes; whose run a workdir is."""

import contextlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tpad_jax.errors import InputError
from tpad_jax.training import checkpoint
from tpad_jax.training.checkpoint import Checkpoints, abstract


class State(NamedTuple):
    params: dict
    optimiser: tuple
    step: jax.Array
    key: jax.Array
    half: jax.Array
    flags: jax.Array


def make_state(seed, layers=1, width=16):
    rng = np.random.default_rng(seed)
    params = {
        f'layer_{i}': {
            'w': jnp.asarray(rng.normal(size=(width, 2)), jnp.float32),
            'b': jnp.asarray(rng.normal(size=2), jnp.float32),
        }
        for i in range(layers)
    }
    return State(
        params,
        optax.adam(1e-3).init(params),
        jnp.asarray(seed, jnp.int32),
        jax.random.key_data(jax.random.key(seed)),
        jnp.arange(5, dtype=jnp.bfloat16) / 3,
        jnp.asarray([True, False, True]),
    )


def assert_same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


@contextlib.contextmanager
def opened(directory):
    checkpoints = Checkpoints(directory)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def largest_file(directory):
    return max((f for f in directory.rglob('*') if f.is_file()), key=lambda f: f.stat().st_size)


def test_a_save_does_not_ask_the_preemption_service(tmp_path, monkeypatch):
    """The service keeps the last number it was asked; `hosts.together` asks it."""
    asked = []
    monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point',
                        lambda number: asked.append(number))
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {}, wait=True)
    assert not asked


def test_round_trip_is_exact_and_survives_a_restart(tmp_path):
    state, meta = make_state(7), {'step': 3, 'rate': 0.1, 'stage': 'joint', 'order': [1, 2]}
    with opened(tmp_path / 'c') as checkpoints:
        assert checkpoints.latest(abstract(state)) is None
        assert checkpoints.best(abstract(state)) is None
        checkpoints.save(3, state, meta, metric=0.5)
    with opened(tmp_path / 'c') as checkpoints:
        for found in (checkpoints.latest(abstract(state)), checkpoints.best(abstract(state))):
            assert found[0] == 3
            assert found[2] == meta
            assert isinstance(found[2]['step'], int)
            assert_same(found[1], state)


def test_keeps_the_latest_two_and_the_best(tmp_path):
    metrics = {1: 0.1, 2: 0.9, 3: None, 4: 0.2, 5: 0.3, 6: None}
    with opened(tmp_path) as checkpoints:
        for step, metric in metrics.items():
            checkpoints.save(step, make_state(step), {'step': step}, metric)
    assert sorted(int(path.name) for path in tmp_path.iterdir()) == [2, 5, 6]
    like = abstract(make_state(0))
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest(like)[0] == 6
        step, state, meta = checkpoints.best(like)
        assert (step, meta) == (2, {'step': 2})
        assert_same(state, make_state(2))
        checkpoints.save(7, make_state(7), {}, 0.9, wait=True)
        assert checkpoints.best(like)[0] == 7  # the later one of equals


@pytest.mark.parametrize('large', [2**30, 0])
def test_a_donated_state_is_saved_as_it_was(tmp_path, monkeypatch, large):
    """A state of more bytes is not copied, but on the disk before `save` returns."""
    monkeypatch.setattr(checkpoint, 'LARGE', large)
    change = jax.jit(lambda x: jax.tree.map(lambda leaf: leaf + 1, x), donate_argnums=0)
    with opened(tmp_path) as checkpoints:
        for state in ({'w': jnp.arange(4.0)}, {'w': jnp.ones(4), 'v': jnp.zeros((2, 2))}):
            like, wanted = abstract(state), jax.tree.map(np.array, state)
            checkpoints.save(1, state, {})
            change(state)
            found = checkpoints.latest(like)[1]
            assert_same(found, wanted)
            changed = change(found)  # a loaded state may be donated too
            assert_same(changed, jax.tree.map(lambda leaf: leaf + 1, wanted))
            assert_same(checkpoints.latest(like)[1], wanted)


def test_the_same_step_is_replaced(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {'try': 1}, 0.1)
        checkpoints.save(1, make_state(2), {'try': 2}, 0.2)
        _, state, meta = checkpoints.latest(abstract(make_state(0)))
    assert meta == {'try': 2}
    assert_same(state, make_state(2))


def cut(folder):
    path = largest_file(folder / 'state')
    path.write_bytes(path.read_bytes()[:100])


def test_all_damaged_is_an_error_and_nothing_is_moved(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    cut(tmp_path / '1')
    with opened(tmp_path) as checkpoints, pytest.raises(InputError, match='every checkpoint'):
        checkpoints.latest(abstract(make_state(0)))
    assert (tmp_path / '1').is_dir()


def test_the_state_of_another_model_is_named(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {}, wait=True)
        with pytest.raises(InputError, match=r'layer_0\.w is float32 \[16, 2\] there and .*17, 2'):
            checkpoints.latest(abstract(make_state(1, width=17)))
        with pytest.raises(InputError, match='absent there'):
            checkpoints.latest(abstract(make_state(1, layers=2)))
        assert checkpoints.latest(abstract(make_state(1)))[0] == 1


def test_a_half_written_checkpoint_is_not_seen(tmp_path):
    with opened(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
    (tmp_path / '1').rename(tmp_path / '2.partial')
    with opened(tmp_path) as checkpoints:
        assert checkpoints.latest(abstract(make_state(1))) is None
        checkpoints.save(3, make_state(1), {})
    assert [path.name for path in tmp_path.iterdir()] == ['3']


def test_a_failed_save_is_raised_later_and_a_bad_metric_at_once(tmp_path):
    state = make_state(1)
    with opened(tmp_path / 'c') as checkpoints:
        with pytest.raises(ValueError, match='step 1 cannot be ranked'):
            checkpoints.save(1, state, {}, float('nan'))
        with pytest.raises(TypeError, match='JSON'):
            checkpoints.save(1, state, {'set': {1, 2}})
        (tmp_path / 'c').rmdir()
        (tmp_path / 'c').write_text('in the way')
        checkpoints.save(1, state, {})
        # which of the two depends on what the writer meets first
        with pytest.raises(OSError, match=r'Not a directory|No such file'):
            checkpoints.save(2, state, {})


def test_other_meshes_and_sharded_arrays(tmp_path):
    devices = np.array(jax.devices())
    assert devices.size >= 8
    values = {'table': np.arange(48.0, dtype=np.float32).reshape(16, 3), 'w': np.ones((5,), 'f4')}

    def placed(count, spec):
        mesh = Mesh(devices[:count], ('model',))
        return {
            'table': jax.device_put(values['table'], NamedSharding(mesh, spec)),
            'w': jax.device_put(values['w'], NamedSharding(mesh, PartitionSpec())),
        }

    layouts = [placed(8, PartitionSpec('model')), placed(4, PartitionSpec())]
    for number, saved in enumerate(layouts):
        with opened(tmp_path / str(number)) as checkpoints:
            checkpoints.save(1, saved, {})
            for wanted in layouts:
                _, found, _ = checkpoints.latest(abstract(wanted))
                assert_same(found, values | {'w': values['w']})
                for key in values:
                    assert found[key].sharding == wanted[key].sharding
