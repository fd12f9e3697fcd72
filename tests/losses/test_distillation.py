"""Distillation losses and session clusters against plain numpy, and the readings they are of."""

from dataclasses import fields, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from scipy.special import log_softmax

from tests.tiny_stages import CONTENT, DATA, SIDE, SIZES, N, T, V, draw, make_config, model
from tpad_jax import losses
from tpad_jax.data.batches import content_rows
from tpad_jax.distributed import devices as devices_lib
from tpad_jax.errors import InputError
from tpad_jax.losses import tokens as token_losses
from tpad_jax.models import outputs, readers, tpad
from tpad_jax.models.builtin.mllm import MLLM
from tpad_jax.models.mllms import KnowledgeMLLM
from tpad_jax.nn import linear
from tpad_jax.training import handover, step as step_lib
from tpad_jax.types import Batch

B, L, P, W, C = 3, 4, 5, 7, 4
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def numpy_divergence(p, q, kind, skew):
    """Sums over words one by one, on probabilities."""
    def kl(a, b):
        return sum(x * np.log(x / y) for x, y in zip(a, b, strict=True))

    match kind:
        case 'forward':
            return kl(p, q)
        case 'reverse':
            return kl(q, p)
        case 'symmetric':
            return kl(p, q) / 2 + kl(q, p) / 2
        case 'js':
            return kl(p, (p + q) / 2) / 2 + kl(q, (p + q) / 2) / 2
        case 'skewed':
            return kl(p, skew * p + (1 - skew) * q)


@pytest.fixture(scope='module')
def states():
    """Student and teacher of other widths, their words (the teacher's padded), and a batch."""
    rng = np.random.default_rng(0)
    out = {'r.text': rng.normal(size=(B, L, 6)), 'k.text': rng.normal(size=(B, L, 8)),
           'r.image': rng.normal(size=(B, P, 6)), 'k.image': rng.normal(size=(B, P, 8)),
           'vocabulary': rng.normal(size=(W, 6)), 'taught': rng.normal(size=(W + 2, 8))}
    out = {name: jnp.float32(x) for name, x in out.items()}
    out['text.there'] = jnp.arange(L) < jnp.array([[4], [2], [3]])
    out['image.there'] = jnp.array([[True] * P, [False] * P, [True] * P])
    none = np.zeros((B, 1), np.int32)
    return out, Batch(items=none + 1, next=none, target=none[:, 0],
                      valid=np.array([True, True, False]), row=np.arange(B))


@pytest.mark.parametrize('kind', token_losses.KINDS)
def test_divergences_against_numpy(states, kind):
    """Value, weight and gradient; all words the student has, and no other; row by row as well."""
    out, batch = states
    fn = partial(losses.mdist, batch=batch, teacher_table='taught', kind=kind, temperature=2.0,
                 skew=0.3)

    def total(both, by_row):
        got = fn({**out, 'r.text': both[0], 'k.text': both[1]}, by_row=by_row)
        return (got.value * got.weight).sum(), got

    pull = jax.value_and_grad(total, has_aux=True)
    ((_, got), (slope, none)), ((_, again), (same, _)) = jit(
        lambda *both: (pull(both, False), pull(both, True)))(out['r.text'], out['k.text'])
    p, q = (log_softmax(np.float64(out[x]) @ np.float64(out[table])[:W].T / 2, axis=-1)
            for x, table in (('k.text', 'taught'), ('r.text', 'vocabulary')))
    expected = [[4 * numpy_divergence(np.exp(a), np.exp(b), kind, 0.3)
                 for a, b in zip(*rows, strict=True)] for rows in zip(p, q, strict=True)]
    np.testing.assert_allclose(got.value, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got.weight, out['text.there'] & batch.valid[:, None])
    np.testing.assert_allclose(again.value, got.value, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(same, slope, rtol=1e-5, atol=1e-7)
    assert not np.asarray(slope)[2].any()
    assert np.abs(slope[:2]).max() > 1e-3
    assert not np.asarray(none).any()  # a teacher does not learn


def test_a_student_that_agrees_has_nothing_to_learn(states):
    out, batch = states
    out = {**out, 'r.text': out['k.text'][..., :6], 'k.text': out['k.text'][..., :6],
           'r.image': 3 * out['k.image']}  # of one direction is enough for relations
    agreed, relations = jit(lambda out: (
        [losses.mdist(out, batch, kind=kind).value for kind in token_losses.KINDS],
        losses.rdist(out, batch)))(out)
    np.testing.assert_allclose(np.stack(agreed), 0, atol=1e-6)
    np.testing.assert_allclose(relations.value[0], 0, atol=1e-5)
    assert relations.weight.tolist() == [1, 0, 0]  # the second has no image, the third is no row
    with pytest.raises(InputError, match=r"kind='backward': .* Expected one of forward"):
        losses.mdist(out, batch, kind='backward')


def test_relations_against_numpy(states):
    """1 - the cosine of both matrices of cosines."""
    out, batch = states

    def relations(x):
        x = np.float64(x) / np.linalg.norm(x, axis=-1, keepdims=True)
        return (x @ x.T).ravel()

    s, t = relations(out['r.image'][0]), relations(out['k.image'][0])
    expected = 1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t)

    def total(both):
        value = losses.rdist({**out, 'r.image': both[0], 'k.image': both[1]}, batch).value
        return value[0], value

    pull = jit(jax.value_and_grad(total, has_aux=True))
    (_, value), (slope, none) = pull((out['r.image'], out['k.image']))
    np.testing.assert_allclose(value[0], expected, rtol=1e-4)
    assert np.abs(slope).max() > 1e-4
    assert not np.asarray(none).any()


def test_clusters_against_numpy():
    """KL of the prediction from the shares of prefix and target, loop by loop."""
    rng = np.random.default_rng(1)
    items = np.array([[1, 2, 2], [3, 0, 0], [5, 4, 0]], np.int32)
    batch = Batch(items=items, next=items, target=np.array([4, 3, 1], np.int32),
                  valid=np.ones(3, bool), row=np.arange(3))
    cluster, logits = np.array([0, 2, 1, 3, 1, 0]), rng.normal(size=(3, C)).astype(np.float32)
    got = jit(lambda x: losses.clusters({'interest': x, 'cluster': jnp.asarray(cluster)}, batch))(
        logits)
    for row, value in enumerate(got):
        session = [cluster[i] for i in (*items[row], batch.target[row]) if i]
        share = np.bincount(session, minlength=C) / len(session)
        q = np.exp(logits[row]) / np.exp(logits[row]).sum()
        expected = sum(p * np.log(p / q[c]) for c, p in enumerate(share) if p)
        assert value == pytest.approx(expected, rel=1e-5)


def test_items_are_clustered_by_what_is_asked_and_cold_ones_by_content():
    """k and z part the items differently; a cold item joins those whose k is like its own."""
    rng = np.random.default_rng(0)
    kind, other = np.arange(41) % 4, np.arange(41) // 4 % 2
    k = np.eye(4)[kind][:, None] + 0.05 * rng.normal(size=(41, 2, 4))
    z = np.eye(4)[other] + 0.05 * rng.normal(size=(41, 4))
    warm = np.arange(41) % 5 > 0

    def parts(labels, kinds):
        return {tuple(np.unique(labels[1:][kinds[1:] == n])) for n in np.unique(kinds)}

    assert parts(np.asarray(handover.clustered(k, 4, 0)), kind) == {(0,), (1,), (2,), (3,)}
    # k tells nothing of z's two parts, so that cold items are placed by chance
    by_z = np.asarray(handover.clustered(k, 2, 0, z, warm))
    assert parts(by_z[warm], other[warm]) == {(0,), (1,)}
    aligned = np.asarray(handover.clustered(k, 4, 0, np.eye(4)[kind], warm))
    assert parts(aligned, kind) == {(0,), (1,), (2,), (3,)}
    with pytest.raises(InputError, match=r'config\.model\.clusters=33, but 32 items can be'):
        handover.clustered(k, 33, 0, z, warm)


# --- readings -----------------------------------------------------------------------------------

TEACHER = KnowledgeMLLM(MLLM(**{**SIZES, 'width': 24, 'channels': (8,)}), 8)


@pytest.fixture(scope='module')
def taught():
    """The smallest reader with a wider teacher that sees four times as many cells."""
    config = make_config().copy_and_resolve_references()
    config.model.clusters = C
    spec = tpad.build(MLLM(**SIZES), config.model, recommend=('r',), items=V, max_length=N,
                      side_sizes=DATA.side_sizes, teacher=TEACHER)
    content = CONTENT.image[:1], CONTENT.has_image[:1], CONTENT.tokens[:1]

    def shapes(module):
        found = dict(jax.eval_shape(partial(module.init, method='everything'), jax.random.key(0),
                                    *content)['params'])
        return {'base': found.pop('base'), 'knowledge': found}

    own = shapes(spec.knowledge)
    make = partial(linear.init, rank=2, targets=config.model.lora_targets)
    adapter = jax.eval_shape(make, jax.random.key(0), own['base'])
    own |= {'teacher': shapes(TEACHER), 'lora': {'knowledge': adapter, 'distil': adapter}}
    return config, spec, fill(own)


def fill(shapes):
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: np.float32(
        rng.normal(size=x.shape) * (x.shape[-2] ** -0.5 if x.ndim > 1 else 0.5)), shapes)


def one_batch():
    found = next(draw('transfer'))
    known = {f.name for f in fields(Batch)}
    return Batch(**{n: jnp.asarray(x) for n, x in found.items() if n in known})


def test_states_predict_from_what_stands_before(taught):
    """The state at a word knows the words before it and not the word itself; the image knows
    neither, and an item without an image begins its text from the opening.
    """
    _, spec, params = taught
    rows = content_rows(CONTENT, np.array([[1, 2, 3, 4, 5]]))
    given = jnp.asarray(rows['image']), jnp.asarray(rows['has_image'])
    tokens = jnp.asarray(np.where(rows['tokens'] < 0, 1, rows['tokens']))
    read = jit(lambda tokens, image: readers.item_states(
        spec, params, 'k', image, given[1], tokens))
    cells, words = read(tokens, given[0])
    assert cells.shape[1:] == (4, SIZES['width'])  # 8 pixels, halved twice
    assert words.shape[1:] == (T, SIZES['width'])
    other_cells, other = read(tokens.at[:, 2].set(tokens[:, 2] % 20 + 1), given[0])
    np.testing.assert_array_equal(other_cells, cells)
    np.testing.assert_array_equal(other[:, :3], words[:, :3])
    assert (np.abs(other[:, 3:] - words[:, 3:]).max(axis=(1, 2)) > 1e-4).all()
    _, unseen = read(tokens, 255 - given[0])
    differs = np.abs(unseen - words).max(axis=(1, 2)) > 1e-4
    np.testing.assert_array_equal(differs, given[1])  # item 4 has none


@pytest.mark.slow
def test_a_teachers_cells_lie_on_the_students_grid(taught):
    """Sixteen cells become four: a blur of each quarter and what adjoins it; no gradient."""
    _, spec, params = taught
    batch, needs = one_batch(), frozenset({'teacher.image', 'teacher.text', 'k.image',
                                           'image.there', 'text.there', 'teacher.vocabulary'})
    out = jit(lambda p: {n: x for n, x in outputs.forward(
        spec, p, batch, {'warm': DATA.warm}, needs, frozenset()).items() if n in needs})(params)
    assert out['teacher.image'].shape == (16, 4, 24)
    assert out['k.image'].shape == (16, 4, 16)
    assert out['teacher.vocabulary'].shape == (SIZES['vocab'], 24)
    at = np.asarray(batch.slots)[np.arange(16), np.asarray(batch.last)]
    whole, _ = jit(partial(TEACHER.apply, method='states'))(
        {'params': {**params['teacher']['knowledge'], 'base': params['teacher']['base']}},
        batch.image[at], batch.has_image[at], batch.tokens[at])
    assert whole.shape == (16, 16, 24)
    # a triangle of twice the width, cut at the edges: weights 1 3 3 1 over 7 of its cells
    weight = np.array([[3, 3, 1, 0], [0, 1, 3, 3]]) / 7
    expected = np.einsum('ir,jc,brcd->bijd', weight, weight, whole.reshape(16, 4, 4, 24))
    np.testing.assert_allclose(out['teacher.image'], expected.reshape(16, 4, 24), atol=1e-5)
    ids = np.asarray(batch.ids)[at]
    np.testing.assert_array_equal(out['image.there'][:, 0], CONTENT.has_image[ids])
    np.testing.assert_array_equal(out['text.there'], CONTENT.tokens[ids] >= 0)


@pytest.mark.slow
def test_chunks_change_no_reading(taught):
    _, spec, params = taught
    rows = content_rows(CONTENT, np.array([[1, 2, 3, 4, 5]]))
    given = [jnp.asarray(rows[n]) for n in ('image', 'has_image', 'tokens')]
    whole, parts = (jit(partial(readers.item_states, s, params, 'r'))(*given)
                    for s in (spec, replace(spec, chunk=2)))
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.slow
def test_eight_devices_are_one(taught):
    """A step of every kind of loss here: an item on two devices counts no other than on one."""
    stage = 'transfer'
    config, spec, params = taught
    catalogue = model()[2]
    catalogue = {**catalogue, 'cluster': handover.clustered(catalogue['k'], C, 0)}
    shapes = jax.eval_shape(
        partial(tpad.init, spec=spec, catalogue=catalogue, rank=2,
                targets=config.model.lora_targets, image_shape=(SIDE, SIDE, 3), text_length=T),
        jax.random.key(0))
    params = jax.tree.map(jnp.asarray, {**fill(shapes), 'teacher': params['teacher']})
    config = config.copy_and_resolve_references()
    config.mllm.teacher = 'said'
    for loss in config.losses.values():
        if loss.fn in ('mdist', 'rdist', 'clusters'):
            loss.update(weight=1.0, stages='transfer' if loss.fn == 'clusters' else loss.stages)
        else:
            loss.weight = 0.0
    flat = flatten_dict(params, sep='/')
    step_spec = step_lib.make_spec(config, stage, spec, seed=5)
    first = step_lib.start(step_spec, flat, config.stage[stage].train)
    found = []
    for way, count in (('jit', 1), ('pmap', 8)):
        devices = devices_lib.choose(way, count)
        batch = next(draw(stage, 0, devices.shards)) | {'valid': np.arange(16) < 13}
        step = devices.lift(partial(step_lib.train_step, spec=step_spec))
        state, logged = step(devices.share(jax.tree.map(jnp.copy, first)), devices.place(batch),
                             devices.share(catalogue))
        found.append((jax.device_get(state.params), jax.device_get(logged)))
    assert {loss.name for loss in step_spec.losses} < found[0][1].keys()
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), *found)
    moved = {p.rpartition('/')[2] for p, x in found[0][0].items() if (x != flat[p]).any()}
    assert {'a', 'b'} <= moved
    assert not any(path.startswith('teacher') for path in found[0][0])
