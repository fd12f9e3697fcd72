"""An item table in parts: what each device holds, the same steps as on one device, checkpoints."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tpad_jax import losses
from tpad_jax.distributed import collectives, devices as devices_lib
from tpad_jax.errors import InputError
from tpad_jax.training.checkpoint import Checkpoints, abstract
from tpad_jax.types import State

D, B, N = 8, 16, 3
TABLE = 'recommender/fusion/id'
# V + 1 = 24 rows, which 2 and 4 divide, and 23, which leaves the table to its columns
ROWS = {'rows': 24, 'columns': 23}
FORMS = {'whole': partial(losses.next_item, smoothing=0.1),
         'chunked': partial(losses.next_item, chunk=7),
         'sampled': partial(losses.sampled_next_item, samples=50, z='z')}
MESHES = {'4x2': (8, 2), '2x4': (8, 4), '1x8': (8, 8)}


def make_state(rows, tx):
    """A table and a matrix, as the recommender has them."""
    rng = np.random.default_rng(0)
    params = {TABLE: rng.normal(size=(rows, D)), 'recommender/gnn/w': rng.normal(size=(D, D))}
    params = {path: jnp.asarray(x, jnp.float32) for path, x in params.items()}
    return State(jnp.int32(0), params, {'recommender/fusion/shared': jnp.ones(D)}, tx.init(params),
                 {})


def make_batch(rows, seed):
    """Random sessions of a catalogue whose last two items are cold; one row only fills."""
    rng = np.random.default_rng(seed)
    items = rng.integers(1, rows, (B, N)).astype(np.int32)
    return dict(items=items, next=items, target=rng.integers(1, rows - 2, B).astype(np.int32),
                valid=np.arange(B) > 0, row=np.arange(B, dtype=np.int32))


def make_catalogue(rows):
    return {'warm': (jnp.arange(rows) > 0) & (jnp.arange(rows) < rows - 2),
            'popularity': 1.0 + jnp.arange(rows) % 5}


def step(state, batch, catalogue, *, loss, tx, axis):
    """Shaped as training.train_step, on the smallest recommender: a prefix's mean, a matrix."""
    key = jax.random.fold_in(jax.random.key(0), state.step)

    def objective(params):
        z = params[TABLE] + state.frozen['recommender/fusion/shared']
        out = {'z': z, 'h': z[batch.items].mean(axis=1) @ params['recommender/gnn/w'],
               'repeat': None, **catalogue}
        total, _, logged = losses.combine((losses.LossSpec('it', loss),), out, batch, {}, axis=axis,
                                          key=key)
        return total, logged

    grads, logged = jax.grad(objective, has_aux=True)(state.params)
    grads = collectives.mean(grads, axis)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(state.step + 1, params, state.frozen, opt_state, {}), logged


def run(devices, rows, loss, tx, steps=5):
    state, catalogue = devices.share(make_state(rows, tx)), devices.share(make_catalogue(rows))
    lifted = devices.lift(partial(step, loss=loss, tx=tx))
    values = []
    for i in range(steps):
        state, logged = lifted(state, devices.place(make_batch(rows, i)), catalogue)
        values.append(float(logged['loss']))
    return state, values


def part(x):
    """Shape of what one device holds of x."""
    return x.sharding.shard_shape(x.shape)


# SGD, so that a gradient that is counted twice shows.
SGD = optax.sgd(0.5)


@lru_cache
def one_device(form, rows):
    return run(devices_lib.choose('jit', 1), ROWS[rows], FORMS[form], SGD)


@pytest.mark.parametrize(('form', 'mesh', 'rows'), [
    ('whole', '4x2', 'rows'), ('sampled', '2x4', 'rows'), ('chunked', '4x2', 'columns'),
    pytest.param('whole', '1x8', 'rows', marks=pytest.mark.slow),
    pytest.param('sampled', '4x2', 'columns', marks=pytest.mark.slow)])
def test_five_steps_are_those_of_one_device(form, mesh, rows):
    expected, values = one_device(form, rows)
    found, same = run(devices_lib.choose('shard_map', *MESHES[mesh]), ROWS[rows], FORMS[form], SGD)
    np.testing.assert_allclose(same, values, rtol=1e-5)
    moved = np.abs(expected.params[TABLE] - make_state(ROWS[rows], SGD).params[TABLE]).max()
    assert moved > 0.05
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.parametrize('rows', ROWS)
@pytest.mark.parametrize('mesh', MESHES)
def test_each_device_holds_its_part_of_table_and_moments(mesh, rows):
    """Before a step and after it: bytes fall as one by the size of 'model'."""
    count, model = MESHES[mesh]
    devices = devices_lib.choose('auto', count, model)
    assert devices.how == 'shard_map'
    assert devices.shards == count // model
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    after, _ = run(devices, ROWS[rows], FORMS['whole'], tx, steps=2)
    whole = ROWS[rows], D
    wanted = (whole[0] // model, D) if rows == 'rows' else (whole[0], D // model)
    for state in (devices.share(make_state(ROWS[rows], tx)), after):
        moments = state.opt_state[1][0]
        tables = [state.params[TABLE], moments.mu[TABLE], moments.nu[TABLE]]
        for x in tables:
            assert part(x) == wanted
            held = {d: 0 for d in devices.devices}
            for shard in x.addressable_shards:
                held[shard.device] += shard.data.nbytes
            assert set(held.values()) == {x.nbytes // model}
        others = [x for x in jax.tree.leaves(state) if not any(x is y for y in tables)]
        assert len(others) == 6
        assert all(x.sharding.is_fully_replicated for x in others)


def test_a_checkpoint_of_parts_fits_any_mesh(tmp_path):
    """Saved in parts, restored in parts, in other parts and whole; and saved whole too."""
    tx = optax.adamw(0.1)
    ways = {'4x2': devices_lib.choose('shard_map', 8, 2),
            '2x4': devices_lib.choose('shard_map', 8, 4),
            'jit': devices_lib.choose('jit', 1), 'pmap': devices_lib.choose('pmap', 8)}
    first = make_state(24, tx)
    for saver in ('4x2', 'jit'):
        state, _ = run(ways[saver], 24, FORMS['whole'], tx, steps=1)
        wanted = jax.tree.map(np.asarray, state)
        split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
        assert len(split) == 3 * (saver == '4x2')
        checkpoints = Checkpoints(tmp_path / saver)
        try:
            checkpoints.save(1, state, {'step': 1}, wait=True)
            for devices in ways.values():
                like = abstract(devices.share(first))
                _, found, _ = checkpoints.latest(like)
                jax.tree.map(np.testing.assert_array_equal, found, wanted)
                jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim) or
                             pytest.fail(f'{x.sharding} is not {y.sharding}'), found, like)
        finally:
            checkpoints.close()


def test_what_no_rule_covers_is_refused():
    devices = devices_lib.choose('shard_map', 8, 4)
    with pytest.raises(InputError, match=rf'=4: does not divide params/{TABLE} \[23, 6\]'):
        devices.share({'params': {TABLE: jnp.ones((23, 6))}})


def test_only_the_item_table_is_in_parts():
    """Names that merely look like it are whole, and so is everything where 'model' is 1."""
    shapes = {'params/recommender/fusion/id': True, 'frozen/recommender/fusion/id': True,
              'opt_state/0/mu/recommender/fusion/id': True, 'recommender/fusion/id_norm': False,
              'my_recommender/fusion/id': False, 'recommender/fusion/feature_0/kernel': False}
    for model in (1, 2):
        devices = devices_lib.choose('shard_map', 8, model)
        tree = devices.share({n: jnp.ones((4, 4)) for n in shapes})
        for path, x in tree.items():
            assert x.sharding.is_fully_replicated == (model == 1 or not shapes[path]), path


@pytest.mark.parametrize(('way', 'count', 'model', 'says'), [
    ('shard_map', 8, 3, 'does not divide the 8 devices'), ('auto', 6, 4, 'the 6 devices'),
    ('auto', 0, 0, 'model_shards=0'), ('pmap', 8, 2, "parallel='pmap' cannot shard"),
    ('jit', 8, 2, "parallel='jit' cannot shard")])
def test_choose_refuses_what_cannot_be(way, count, model, says):
    with pytest.raises(InputError, match=says):
        devices_lib.choose(way, count, model)
