"""The encoders: causality, padding, adapters, shapes, and the named outputs of every stage."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax import losses
from tpad_jax.distributed import devices
from tpad_jax.errors import InputError
from tpad_jax.evaluation import scorers
from tpad_jax.models import outputs, readers, stream, tpad
from tpad_jax.models.builtin.mllm import MLLM, VisionTower
from tpad_jax.nn import linear
from tpad_jax.nn.attention import Transformer, rotate
from tpad_jax.types import Batch

B, N, V, D, M, T, SIDE = 6, 3, 7, 8, 2, 4, 8
BASE = dict(vocab=13, width=16, layers=2, heads=2, hidden=24, channels=(8, 8), vision_layers=1)
MODEL = SimpleNamespace(
    features=D, width=D, critics={'align': 'separable', 'distil': 'bilinear'}, use_id=True,
    use_side=True, id_dropout=0.3, feature_dropout=0.2, gnn_steps=1, positions=True, dropout=0.3,
    item_dropout=0.2, encoder='sr_gnn', normalise=True, temperature=0.1,
    repeats=True, together=0, recommend='r', form='compressed', withhold=0.3, word_dropout=0.6,
    session_dropout=0.0, session_layers=0, lora_alpha=4.0, lora_rank=2, clusters=0, reread=True,
    blend=SimpleNamespace(kind=''), feature_hidden=0, block=3, memory=0, lora_by_kind=False,
    modality_dropout=0.0, codes=(), words=False, bottleneck=False,
    event_time=False, event_kind=False, history=False)
TARGETS = r'^decoder/.*(attention/[qkvo]|down)$'
SPEC = tpad.build(MLLM(**BASE), MODEL, recommend=('r',), items=V, max_length=N, side_sizes=(3, 4))


# Programs of this size run in no time: compiling them is what takes it.
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def filled(shapes, seed, scale=1.0):
    """Random parameters for a tree of shapes: matrices by their fan-in, vectors about one."""
    rng = np.random.default_rng(seed)

    def fill(x):
        x_ = rng.normal(size=x.shape) * (scale * x.shape[-2]**-0.5 if x.ndim > 1 else 0.1)
        return (x_ + (x.ndim == 1)).astype(np.float32)

    return jax.tree.map(fill, shapes)


def make_catalogue(seed=0):
    rng = np.random.default_rng(seed)
    k, r = rng.normal(size=(V + 1, M, D)), rng.normal(size=(V + 1, M * D))
    rows = {'k': k.astype(np.float32), 'r': r.astype(np.float32),
            'warm': np.arange(V + 1) % 7 > 0, 'side': rng.integers(0, 3, (V + 1, 2))}
    return jax.tree.map(jnp.asarray, rows)


def make_content(rng, count):
    words = rng.integers(1, BASE['vocab'], (count, T))
    words[np.arange(T) >= rng.integers(2, T + 1, (count, 1))] = -1
    return {'image': rng.integers(0, 256, (count, SIDE, SIDE, 3)).astype(np.uint8),
            'has_image': np.arange(count) % 4 != 3, 'tokens': words.astype(np.int32)}


def make_batch(seed=0):
    """Rows with content; content row i is item i here, row 0 padding; the last row is not valid."""
    rng = np.random.default_rng(seed)
    length = np.array([3, 1, 2, 3, 2, 3])
    real = np.arange(N) < length[:, None]
    items = np.where(real, rng.integers(1, V + 1, (B, N)), 0).astype(np.int32)
    following = np.where(real, rng.integers(1, V + 1, (B, N)), 0).astype(np.int32)
    content = make_content(rng, V + 1)
    content['has_image'][0], content['tokens'][0] = False, -1
    return Batch(items=items, next=following, target=following[np.arange(B), length - 1],
                 valid=np.arange(B) < B - 1, row=np.arange(50, 50 + B, dtype=np.int32), slots=items,
                 next_slots=following, ids=np.arange(V + 1, dtype=np.int32), **content)


@pytest.fixture(scope='module')
def params():
    shapes = jax.eval_shape(partial(tpad.init, spec=SPEC, catalogue=make_catalogue(), rank=2,
                                    targets=TARGETS, image_shape=(SIDE, SIDE, 3),
                                    text_length=T), jax.random.key(0))
    return filled(shapes, 1)


@partial(jit, static_argnames=('spec', 'needs', 'fresh'))
def forward(spec, params, batch, catalogue, needs, fresh, key=None):
    return outputs.forward(spec, params, batch, catalogue, needs, fresh, key)


def same(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def differs(a, b):
    """Largest difference per row, all of them visible."""
    gap = np.abs(np.asarray(a) - np.asarray(b)).reshape(len(a), -1).max(axis=1)
    return bool((gap > 1e-3).all())


# --- T itself as a recommender ------------------------------------------------------------------


def test_t_foretells_by_its_critic_of_p_and_every_item(params):
    """Prefix by prefix, item by item."""
    catalogue, batch = make_catalogue() | {'popularity': jnp.ones(V + 1)}, make_batch()
    one = devices.choose('jit', 1, 1).own
    found = scorers.transfer_scorer(SPEC, one)(params, catalogue)(batch.items)
    assert found.shape == (B, V + 1)
    assert (found[:, 0] == 0).all()
    out = forward(SPEC, params, batch.replace(valid=np.ones(B, bool)), catalogue,
                  frozenset({'p', 'critic.distil'}), frozenset())
    for row, last in enumerate(batch.last):
        for item in range(1, V + 1):
            score = out['critic.distil'](catalogue['r'][item][None], out['p'][row, last][None])
            np.testing.assert_allclose(found[row, item], score[0, 0], rtol=1e-4, atol=1e-4)


# --- the decoder --------------------------------------------------------------------------------


def test_rotary_is_a_rotation_of_complex_pairs():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5, 3, 6)).astype(np.float32)
    positions = rng.integers(0, 50, (2, 5))
    z = x[..., :3] + 1j * x[..., 3:]
    angle = positions[:, :, None, None] * 10_000.0 ** (-np.arange(3) / 3)
    turned = z * np.exp(1j * angle)
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    same(rotate(x, np.cos(angle), np.sin(angle)), expected)


@pytest.fixture(scope='module')
def decoder():
    """A jitted causal transformer (x [B, L, 8], mask) -> [B, L, 8]."""
    module = Transformer(2, 2, 12)
    x, mask = jnp.ones((1, 7, D)), jnp.ones((1, 7), bool)
    weights = filled(jax.eval_shape(module.init, jax.random.key(0), x, mask), 0)
    return jit(partial(module.apply, weights))


def test_a_transformer_sees_what_came_before_only(decoder):
    x = np.random.default_rng(0).normal(size=(4, 7, D)).astype(np.float32)
    later = x.copy()
    later[:, 4:] += 1
    mask = np.ones((4, 7), bool)
    y, z = decoder(x, mask), decoder(later, mask)
    same(z[:, :4], y[:, :4])
    assert differs(z[:, 4], y[:, 4])
    earlier = x.copy()
    earlier[:, 0] += np.linspace(0, 1, D)
    assert differs(decoder(earlier, mask)[:, 6], y[:, 6])


def test_padding_in_a_transformer_has_no_influence(decoder):
    """Wherever it stands, whatever it holds: real tokens come out as without it."""
    x = np.random.default_rng(0).normal(size=(4, 7, D)).astype(np.float32)
    here = np.array([True, True, False, True, False, True, False])
    garbage = np.where(here[:, None], x, 30)
    packed = np.concatenate([x[:, here], x[:, ~here]], axis=1)
    expected = decoder(packed, np.arange(7)[None].repeat(4, 0) < 4)[:, :4]
    mask = here[None].repeat(4, 0)
    same(decoder(x, mask)[:, here], expected)
    same(decoder(garbage, mask)[:, here], expected)


def test_vision_tower_halves_at_every_stage():
    for channels, size, cells in (((8, 16), (8, 12), 6), ((8, 8, 24), (32, 32), 16)):
        tower = VisionTower(channels, 1, 2)
        image = jnp.zeros((3, *size, 3), jnp.uint8)
        y = jax.eval_shape(lambda x, t=tower: t.init_with_output(jax.random.key(0), x)[0], image)
        assert y.shape == (3, cells, channels[-1])


# --- the two encoders ---------------------------------------------------------------------------


def test_knowledge_reads_what_is_given_and_nothing_else(params):
    read = jit(lambda image, has, tokens, keep: readers.read_items(
        SPEC, params, 'knowledge', image, has, tokens, keep))
    c = make_content(np.random.default_rng(0), 8)
    image, has, tokens = c['image'], c['has_image'], c['tokens']
    keep = np.ones((8, T), bool)
    keep[:, 1] = False
    k = read(image, has, tokens, keep)
    assert k.shape == (8, M, D)

    other_image = np.where(has[:, None, None, None], image, 255 - image)
    other_words = np.where(keep, tokens, np.maximum(tokens, 1) % 12 + 1)
    other_words = np.where(tokens >= 0, other_words, -1)
    assert (other_image != image).any()
    assert (other_words != tokens).any()
    same(read(other_image, has, other_words, keep), k)  # absent image, withheld words

    assert differs(read(255 - image, has, tokens, keep)[has], k[has])
    assert differs(read(image, ~has, tokens, keep), k)
    assert differs(read(image, has, np.where(tokens >= 0, tokens % 12 + 1, -1), keep), k)
    everything = read(image, has, tokens, np.ones_like(keep))
    assert differs(everything, k)

    longer = np.pad(tokens, ((0, 0), (0, 2)), constant_values=-1)
    same(read(image, has, longer, np.pad(keep, ((0, 0), (0, 2)), constant_values=True)), k)


def test_transfer_features_do_not_see_later_items(params):
    variables = readers.variables(SPEC, params, 'transfer', 'transfer')
    read = jit(lambda x, there, mask: SPEC.transfer.apply(variables, stream.plain(x, there), mask))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 3, 2, BASE['width'])).astype(np.float32)
    there, mask = np.ones((4, 3, 2), bool), np.ones((4, 3), bool)
    t = read(x, there, mask)
    for j in range(3):
        later = x.copy()
        later[:, j:] += rng.normal(size=later[:, j:].shape)
        changed = read(later, there, mask)
        same(changed[:, :j], t[:, :j])
        for i in range(j, 3):
            assert differs(changed[:, i], t[:, i])
    # a shorter session in a longer row, and tokens that an item has not
    short = mask & (np.arange(3) < 2)
    same(read(np.where(short[:, :, None, None], x, 30), there, short)[:, :2], t[:, :2])
    there[:, 1, 0] = False
    garbage = x.copy()
    garbage[:, 1, 0] = 30
    same(read(garbage, there, mask), read(x, there, mask))


def test_sessions_read_by_blocks():
    """One block is the full reading; later ones know the first item by the memory alone."""
    rng, there = np.random.default_rng(0), np.ones((4, 7, 2), bool)
    x = rng.normal(size=(4, 7, 2, BASE['width'])).astype(np.float32)
    mask = np.arange(7) < np.array([7, 5, 2, 1])[:, None]
    params = SPEC.transfer.clone(block=3).init(
        jax.random.key(0), jnp.ones((1, 7, 2, D)), jnp.ones((1, 7), bool),
        jnp.ones((1, T), jnp.int32), method='everything')['params']

    def read(block, x):
        module = SPEC.transfer.clone(block=block)
        return np.asarray(jit(lambda x: module.apply(
            {'params': params}, stream.plain(x, there), mask))(x))

    full, blocks = read(0, x), read(3, x)
    for block in (7, 9):
        same(read(block, x)[mask], full[mask])
    same(blocks[:, :3][mask[:, :3]], full[:, :3][mask[:, :3]])
    assert differs(blocks[0, 3:], full[0, 3:])
    for place in (0, 6):
        other = x.copy()
        other[:, place] += 1
        moved = np.abs(read(3, other) - blocks)[0].max(axis=-1) > 1e-4
        assert moved[place:].all()
        assert not moved[:place].any()


@pytest.mark.parametrize(('form', 'stage'), [
    pytest.param('compressed', 'joint', marks=pytest.mark.slow), ('full', 'transfer')])
def test_session_features_from_ids_to_t(params, form, stage):
    """Through `forward`: items after position j, padding and rows that only fill change nothing."""
    needs, fresh = (frozenset(x) for x in STAGES[stage])
    read = partial(forward, replace(SPEC, form=form), params, catalogue=make_catalogue(),
                   needs=needs, fresh=fresh)
    batch = make_batch()
    out = read(batch)
    three = batch.mask.sum(axis=1) == 3
    items = batch.items.copy()
    items[three, 2] = items[three, 2] % V + 1
    items[~batch.valid] = 1
    other = read(batch.replace(items=items, slots=items))
    for name in ('t', 'c', 'p'):
        assert out[name].shape == (B, N, M * D)
        same(other[name][batch.valid, :2][batch.mask[batch.valid, :2]],
             out[name][batch.valid, :2][batch.mask[batch.valid, :2]])
        assert differs(other[name][three, 2], out[name][three, 2])
    rows = np.arange(B)
    same(out['foretell.tokens'], batch.tokens[batch.next[rows, batch.last]])


def test_the_writer_sees_the_words_before_only(params):
    """Of a text being written, position t is predicted from words before t, and from those kept."""
    variables = readers.variables(SPEC, params, 'transfer', 'transfer')
    write = jit(partial(SPEC.transfer.apply, variables, method='foretell'))
    rng = np.random.default_rng(0)
    t = rng.normal(size=(3, M * D)).astype(np.float32)
    tokens, keep = rng.integers(1, 13, (3, T)), np.ones((3, T), bool)
    y = write(t, tokens, keep)
    assert y.shape == (3, T, BASE['width'])
    changed = tokens.copy()
    changed[:, 1] = tokens[:, 1] % 12 + 1
    z = write(t, changed, keep)
    same(z[:, :2], y[:, :2])
    assert differs(z[:, 2], y[:, 2])
    keep[:, 1] = False
    same(write(t, changed, keep), write(t, tokens, keep))
    assert differs(write(-t, tokens, keep), write(t, tokens, keep))


# --- adapters -----------------------------------------------------------------------------------


@jit
def reading(params, adapter):
    """k of fixed items, under an adapter (a tree; {} for none)."""
    c = make_content(np.random.default_rng(0), 8)
    params = {**params, 'lora': {'knowledge': adapter}}
    return readers.read_items(SPEC, params, 'knowledge', c['image'], c['has_image'], c['tokens'])


def test_a_fresh_adapter_is_nothing_and_a_trained_one_is_a_change_of_the_kernels(params):
    targets = TARGETS
    fresh = linear.init(jax.random.key(1), {'decoder': params['base']['decoder']}, rank=2,
                      targets=targets)
    trained = params['lora']['knowledge']
    bare, adapted = reading(params, {}), reading(params, trained)
    same(reading(params, fresh), bare)
    assert differs(adapted, bare)
    assert differs(adapted, reading(params, params['lora']['distil']))

    kernels = flatten_dict(params['base'], sep='/')
    pairs = flatten_dict(trained, sep='/')
    named = {path[:-2] for path in pairs}
    assert len(named) == 5  # q, k, v, o and down, stacked over the layers
    for path in named:
        kernels[f'{path}/kernel'] = (kernels[f'{path}/kernel'] + MODEL.lora_alpha / MODEL.lora_rank
                                     * pairs[f'{path}/a'] @ pairs[f'{path}/b'])
    same(reading({**params, 'base': unflatten_dict(kernels, sep='/')}, {}), adapted)


def test_an_adapter_by_kind_changes_tokens_of_its_kind(params):
    """Equal pairs for all kinds are the shared adapter; that of pictures needs a picture."""
    shared, rng = params['lora']['knowledge'], np.random.default_rng(0)
    pairs = flatten_dict(shared)
    kinds = {path: np.stack([x] * len(linear.KINDS), axis=-3) for path, x in pairs.items()}
    same(reading(params, unflatten_dict(kinds)), reading(params, shared))
    seen = {path: x.copy() for path, x in kinds.items()}
    for path, x in seen.items():
        x[..., linear.IMAGE, :, :] = rng.normal(size=pairs[path].shape)
    has_image = make_content(np.random.default_rng(0), 8)['has_image']
    before, after = (reading(params, unflatten_dict(tree)) for tree in (kinds, seen))
    assert 0 < has_image.sum() < 8
    same(after[~has_image], before[~has_image])
    assert differs(after[has_image], before[has_image])


def test_a_layer_by_kind_against_numpy():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 5, 6)), rng.normal(size=(6, 4))
    a, b = rng.normal(size=(3, 6, 2)), rng.normal(size=(3, 2, 4))
    kind = rng.integers(0, 3, (2, 5))
    expected = np.array([[v @ (kernel + a[k] @ b[k]) for v, k in zip(*row, strict=True)]
                         for row in zip(x, kind, strict=True)])
    variables = {'params': {'kernel': kernel}, 'lora': {'a': a, 'b': b}}
    with linear.routed(jnp.zeros((2, 3), int), jnp.asarray(kind)):
        found = linear.Linear(4).apply(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match='lora_by_kind'):
        linear.Linear(4).apply(variables, jnp.asarray(x, jnp.float32))


def test_a_reader_trains_its_own_adapter_only(params):
    c = make_content(np.random.default_rng(0), 8)

    def objective(adapters):
        r = readers.distil_items(SPEC, {**params, 'lora': adapters}, c['image'], c['has_image'],
                              c['tokens'])
        return (r[:, 0] ** 2).sum()

    grads = jit(jax.grad(objective))(params['lora'])
    size = {n: max(float(np.abs(x).max()) for x in jax.tree.leaves(g)) for n, g in grads.items()}
    assert size['distil'] > 1e-3
    assert size['knowledge'] == size['transfer'] == 0


def test_adapter_targets_that_match_nothing_are_refused(params):
    with pytest.raises(ValueError, match='matches no kernel'):
        linear.init(jax.random.key(0), params['base'], rank=2, targets='nothing')


# --- forward ------------------------------------------------------------------------------------

SHAPES = {'items': (B, N), 'next': (B, N), 'warm': (V + 1,), 'h': (B, D),
          **dict.fromkeys(('k', 't', 'c', 'p', 'r', 'r_next'), (B, N, M * D)),
          'describe': (B, T, 16), 'foretell': (B, T, 16), 'describe.tokens': (B, T),
          'foretell.tokens': (B, T), 'vocabulary': (13, 16), 'z': (V + 1, D)}
TRANSFER = {'k', 'c', 'p', 't', 'r', 'r_next', 'foretell', 'foretell.tokens', 'vocabulary', 'items',
            'next', 'critic.align', 'critic.distil', 'club'}
KNOWLEDGE = {'describe', 'describe.tokens', 'vocabulary'}
STAGES = {'knowledge': (KNOWLEDGE, {'k'}), 'transfer': (TRANSFER, {'r'}),
          'recommend': ({'h', 'z', 'warm'}, set()),
          'joint': (KNOWLEDGE | TRANSFER | {'h', 'z', 'warm'}, {'k', 'r'})}


@pytest.mark.parametrize('form', ['compressed', 'full'])
@pytest.mark.parametrize('stage', STAGES)
def test_every_stage_gets_what_it_needs(params, stage, form):
    needs, fresh = (frozenset(x) for x in STAGES[stage])
    batch = make_batch()
    if stage == 'recommend':  # no content travels
        batch = Batch(*(getattr(batch, n) for n in ('items', 'next', 'target', 'valid', 'row')))
    if stage == 'knowledge':  # an item is a session of one
        batch = batch.replace(items=batch.items[:, :1], slots=batch.slots[:, :1])
    out = jax.eval_shape(partial(
        outputs.forward, replace(SPEC, form=form), needs=needs, fresh=fresh,
        key=jax.random.key(0)), params, batch, make_catalogue())
    assert needs <= out.keys()
    for name in needs & SHAPES.keys():
        assert out[name].shape == SHAPES[name], name


@pytest.mark.parametrize('encoder', ['sr_gnn', 'gce_gnn'])
def test_items_that_are_read_alone_are_those_of_the_whole_table(params, encoder):
    """Values and gradients of the sampled softmax, under dropout; the global graph reads more."""
    model = SimpleNamespace(**vars(MODEL) | {'encoder': encoder, 'near': 4, 'near_window': 2})
    spec = tpad.build(MLLM(**BASE), model, recommend=('k', 'r'), items=V, max_length=N,
                      side_sizes=(3, 4))
    batch, catalogue, key = make_batch(), make_catalogue(), jax.random.key(0)
    catalogue['popularity'] = jnp.arange(V + 1.0)
    if encoder == 'gce_gnn':
        near = jnp.asarray(np.random.default_rng(0).integers(0, V + 1, (V + 1, 4)))
        catalogue |= dict(zip(tpad.GRAPH, (near, jnp.ones(near.shape)), strict=True))
    own = filled(jax.eval_shape(lambda: tpad.recommender_init(key, spec, catalogue)), 2)

    def loss(own, z):
        out = outputs.forward(spec, params | {'recommender': own}, batch, catalogue,
                              frozenset({'h', z, 'warm', 'popularity'}), frozenset(), key)
        assert isinstance(out[z], outputs.ItemVectors) == (z == 'z.read')
        return losses.sampled_next_item(out, batch, key=key, z=z, samples=5).sum()

    one, other = (jit(jax.value_and_grad(partial(loss, z=z)))(own) for z in ('z', 'z.read'))
    jax.tree.map(same, one, other)


@pytest.mark.parametrize('recommend', [('k',), ('k', 'r'), ()])
def test_item_vectors_of_any_feature_fresh_or_stored(params, recommend):
    """Whatever enters z, a stage that asks for h alone finds it, fresh or not."""
    spec = tpad.build(MLLM(**BASE), MODEL, recommend=recommend, items=V, max_length=N,
                      side_sizes=())

    def read(params, batch, catalogue, fresh):
        own = {'recommender': tpad.recommender_init(jax.random.key(0), spec, catalogue)}
        return outputs.forward(spec, params | own, batch, catalogue, frozenset({'h'}), fresh)

    for fresh in (frozenset(), frozenset({'k', 'r'})):
        out = jax.eval_shape(partial(read, fresh=fresh), params, make_batch(), make_catalogue())
        assert out['h'].shape == (B, D)


@pytest.mark.slow
def test_evaluation_is_deterministic_and_draws_go_with_the_row(params):
    needs, fresh = (frozenset(x) for x in STAGES['joint'])
    batch, catalogue = make_batch(), make_catalogue()
    names = ('describe', 'foretell', 't', 'h', 'r', 'k')

    def run(batch, key=None):
        out = forward(SPEC, params, batch, catalogue=catalogue, needs=needs, fresh=fresh, key=key)
        return {n: np.asarray(out[n]) for n in names}

    order = np.array([3, 0, 5, 1, 4, 2])
    content = {'ids', 'image', 'has_image', 'tokens', 'places'}
    moved = Batch(**{n: x if n in content or x is None else x[order]
                     for n, x in vars(batch).items()})
    plain, again = run(batch), run(batch)
    for name in names:
        assert np.array_equal(plain[name], again[name])
    key = jax.random.key(4)
    drawn, drawn_moved = run(batch, key), run(moved, key)
    for name in ('describe', 'foretell', 'k', 'h'):
        same(drawn_moved[name], drawn[name][order])
        assert np.abs(drawn[name] - plain[name]).max() > 1e-3
    assert np.abs(run(batch, jax.random.key(5))['h'] - drawn['h']).max() > 1e-3

    # r fresh from content at the prefix: the very h that the same rows give from the store
    stored = {**catalogue, 'r': catalogue['r'].at[batch.items[batch.mask]].set(
        plain['r'][batch.mask])}
    real, recommend, none = batch.valid, frozenset({'h', 'z'}), frozenset()
    from_store = forward(SPEC, params, batch, stored, recommend, none)['h']
    same(plain['h'][real], from_store[real])
    from_others = forward(SPEC, params, batch, catalogue, recommend, none)['h']
    assert differs(plain['h'][real], from_others[real])
