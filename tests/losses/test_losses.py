"""Every loss function: what its contract promises, and its value against plain numpy formulas."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tpad_jax import config, losses
from tpad_jax.losses import check, example, pairs
from tpad_jax.losses.example import REPLICAS, B, D, N, V, make, make_params, named
from tpad_jax.models import outputs
from tpad_jax.mutual_information import critics

PUBLIC = [fn for name, fn in inspect.getmembers(losses, inspect.isfunction)
          if list(inspect.signature(fn).parameters)[:2] == ['out', 'batch']]

# Losses that cut or correct their gradient on purpose, which their own tests below are about.
CUT = {losses.mine, losses.vclub, losses.club_fit, losses.smile, losses.l1out, losses.mdist,
       losses.rdist, losses.soft_next_item, losses.intents}

# Programs of this size run in no time: compiling them is what takes it.
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


def mean_loss(fn, out, batch):
    """The loss as `combine` averages it."""
    return losses.combine((losses.LossSpec('it', fn),), out, batch, {})[0]


def close(got, expected, tolerance=2e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, expected)


def largest(tree):
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(jax.device_get(tree)))


# Keywords that change how a loss is computed and so have to keep the contract too.
FORMS = {'next_item_in_chunks': partial(losses.next_item, chunk=4, smoothing=0.1),
         'mine_in_chunks': partial(losses.mine, chunk=4),
         'vclub_scaled': partial(losses.vclub, scale=True),
         'club_fit_scaled': partial(losses.club_fit, scale=True),
         'infonce_by_session': partial(losses.infonce, by_session=True, chunk=4)}
FORMS['mine_in_chunks'].initial_state = losses.mine.initial_state


# What the default run trains by is tested every time, the others with `-m slow`.
DEFAULT = {f'{entry.fn}_scaled' if entry.get('scale') else entry.fn
           for entry in config.losses().values() if entry.weight} | {'mine'}
EVERY = {fn.__name__: fn for fn in PUBLIC} | FORMS


@pytest.mark.parametrize('fn', [
    pytest.param(fn, id=name, marks=() if name in DEFAULT else pytest.mark.slow)
    for name, fn in EVERY.items()])
def test_contract(fn):
    """Shape, finite, padding without influence, nothing but padding, 1 device == 8."""
    fn, keywords = (fn.func, fn.keywords) if isinstance(fn, partial) else (fn, {})
    trial = check.Trial(losses.LossSpec(check.NAME, fn, check.WEIGHT, keywords))
    for look in trial.looks:
        if look != trial.replicas:  # below, by pmap
            assert (look()[0] or (fn in CUT and look == trial.slope)
                    or (look == trial.repeats and 'scale' in keywords)), look.__name__
    assert largest(trial.result[1]) > 1e-4

    many = jax.pmap(partial(trial.step, axis='data'), axis_name='data', in_axes=(None, 0, 0, None),
                    out_axes=None)
    params, *rows, state = trial.inputs.values()
    parts = jax.tree.map(lambda x: np.reshape(x, (REPLICAS, -1, *x.shape[1:])), rows)
    close(many(params, *parts, state), trial.result)


def test_there_is_an_example_of_every_output_of_its_shape_and_dtype():
    batch, raw = make(0)
    out = jax.eval_shape(named, make_params(0), raw, batch)
    assert sorted(out) == outputs.names(config.model().critics)
    for name, entry in outputs.OUTPUTS.items():
        if entry.shape:
            shape = tuple(example.SIZES[size] for size in entry.shape.split(', '))
            assert (out[name].shape, out[name].dtype) == (shape, entry.dtype), name


def test_the_contract_is_tested_for_every_loss():
    assert {fn.__name__ for fn in PUBLIC} >= {'next_item', 'generation', 'infonce', 'mine', 'vclub',
                                              'club_fit', 'mmd', 'sampled_next_item', 'nwj', 'jsd',
                                              'smile', 'l1out', 'alignment_uniformity'}


# --- plain numpy formulas -----------------------------------------------------------------------


def flat_pairs(out, batch, x, y, ids, critic):
    """Scores of the unpadded positions, loop by loop, and which pairs are negatives."""
    at = [(b, n) for b in range(B) for n in range(N) if batch.valid[b] and batch.items[b, n] > 0]
    xs = np.stack([np.asarray(out[x])[p] for p in at])
    ys = np.stack([np.asarray(out[y])[p] for p in at])
    item = [int(np.asarray(out[ids])[p]) for p in at]
    negative = np.array([[i != j for j in item] for i in item])
    score = jit(critics.Score.__call__) if critic.startswith('critic') else lambda q, *xy: q(*xy)
    return np.asarray(score(out[critic], xs, ys), np.float64), negative


def np_infonce(out, batch):
    scores, negative = flat_pairs(out, batch, 'k', 'c', 'items', 'critic.align')
    bound = []
    for i, row in enumerate(scores):
        candidates = [row[i], *row[negative[i]]]
        bound.append(row[i] - np.log(np.mean(np.exp(candidates))))
    return -np.mean(bound)


def np_mine(out, batch):
    scores, negative = flat_pairs(out, batch, 'k', 'c', 'items', 'critic.align')
    return -(np.mean(np.diag(scores)) - np.log(np.mean(np.exp(scores[negative]))))


def np_nwj(out, batch):
    scores, negative = flat_pairs(out, batch, 'k', 'c', 'items', 'critic.align')
    return -(np.mean(np.diag(scores)) - np.mean(np.exp(scores[negative] - 1)))


def np_jsd(out, batch):
    scores, negative = flat_pairs(out, batch, 'k', 'c', 'items', 'critic.align')
    return np.mean(np.log1p(np.exp(-np.diag(scores)))) + np.mean(np.log1p(np.exp(scores[negative])))


def np_smile(out, batch):
    scores, negative = flat_pairs(out, batch, 'k', 'c', 'items', 'critic.align')
    mean = np.mean(np.exp(np.clip(scores[negative], -5, 5)))
    return -(np.mean(np.diag(scores)) - np.log(mean))


def np_l1out(out, batch):
    def q(xs, ys):
        return [[gaussian_log_q(out['club'].params, x, y) for y in ys] for x in xs]

    scores, negative = flat_pairs({**out, 'q': q}, batch, 'c', 'p', 'items', 'q')
    return np.mean([scores[i, i] - np.log(np.mean(np.exp(scores[negative[:, i], i])))
                    for i in range(len(scores))])


def np_alignment_uniformity(out, batch):
    _, negative = flat_pairs({**out, 'f': lambda x, y: x @ y.T}, batch, 'p', 'p', 'next', 'f')
    x, y = (np.asarray(out[n], np.float64)[np.asarray(batch.mask)] for n in ('r_next', 'p'))
    x, y = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (x, y))
    spread = [np.log(np.mean(np.exp(-2 * ((a[:, None] - a[None]) ** 2).sum(-1)[negative])))
              for a in (x, y)]
    return np.mean(((x - y) ** 2).sum(-1)) + np.mean(spread)


def np_intents(out, batch):
    rows = np.flatnonzero(np.asarray(batch.valid))
    z, last = np.asarray(out['z'], np.float64), np.asarray(batch.last)
    known = {n: np.asarray(out[n], np.float64)[:, :-1]
             for n in ('teach.last', 'teach.short', 'teach.z')}
    known = {n: x / np.linalg.norm(x, axis=1, keepdims=True) for n, x in known.items()}
    target = np.asarray(batch.target)[rows]
    negative, total = target[:, None] != target, 0
    for name, view in (('teach.last', np.asarray(out['h'], np.float64)),
                       ('teach.short', z[np.asarray(batch.items)[np.arange(B), last]])):
        cosine = known[name] @ known['teach.z'][1:].T
        intent = np.array([sum(max(row[i], 0) * z[1 + i] for i in np.argsort(-row)[:5])
                           for row in cosine])
        x, y = (a[rows] / np.linalg.norm(a[rows], axis=1, keepdims=True) for a in (view, intent))
        spread = [np.log(np.mean(np.exp(-2 * ((a[:, None] - a[None]) ** 2).sum(-1)[negative])))
                  for a in (x, y)]
        total += np.mean(((x - y) ** 2).sum(-1)) + np.mean(spread)
    return total


def gaussian_log_q(params, x, y):
    """log q(y|x) of a GaussianQ's parameters, up to a constant. x [D], y [D]."""
    p = params['moments']
    hidden = np.asarray(jax.nn.gelu(x @ p['in']['kernel'] + p['in']['bias']), np.float64)
    mean, log_var = np.split(hidden @ p['out']['kernel'] + p['out']['bias'], 2)
    log_var = 4 * np.tanh(log_var / 4)
    return -0.5 * np.sum((y - mean) ** 2 / np.exp(log_var) + log_var)


def np_vclub(out, batch):
    def q(xs, ys):
        return [[gaussian_log_q(out['club'].params, x, y) for y in ys] for x in xs]

    scores, negative = flat_pairs({**out, 'q': q}, batch, 'c', 'p', 'items', 'q')
    return np.mean([row[i] - np.mean(row[negative[i]]) for i, row in enumerate(scores)])


def np_club_fit(out, batch):
    mask = np.asarray(batch.mask)
    return np.mean([-gaussian_log_q(out['club'].params, x, y) / D
                    for x, y in zip(out['c'][mask], out['p'][mask], strict=True)])


def np_bottleneck(out, batch):
    normal, mask = torch.distributions.Normal, np.asarray(batch.mask)
    mean, log_variance = (torch.tensor(out[n][mask]) for n in ('p.mean', 'p.log_variance'))
    rate = torch.distributions.kl_divergence(normal(mean, (log_variance / 2).exp()), normal(0, 1))
    return rate.sum(-1).mean().item()


def np_mmd(out, batch):
    a, b = (np.asarray(out[n])[np.asarray(batch.mask)] for n in ('r', 't'))
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def kernel(u, v):
        square = ((u[:, None] - v[None]) ** 2).sum(-1)
        return np.mean([np.exp(-square / (2 * w * w)) for w in (0.25, 0.5, 1.0, 2.0)])

    return kernel(a, a) - 2 * kernel(a, b) + kernel(b, b)


def np_next_item(out, batch):
    value = []
    for row in np.flatnonzero(batch.valid):
        logits = [out['h'][row] @ out['z'][v] for v in range(1, V - 1)]  # V - 1 and V are cold
        for item, shift in zip(batch.items[row], out['repeat'][row, batch.last[row]], strict=True):
            if 0 < item < V - 1:
                logits[item - 1] += shift
        value.append(np.log(np.sum(np.exp(logits))) - logits[batch.target[row] - 1])
    return np.mean(value)


def np_generation(out, batch):
    value = []
    for b, t in zip(*np.nonzero(np.asarray(out['describe.tokens']) >= 0), strict=True):
        if batch.valid[b]:
            logits = np.asarray(out['vocabulary'] @ out['describe'][b, t], np.float64)
            value.append(np.log(np.exp(logits).sum()) - logits[out['describe.tokens'][b, t]])
    return np.mean(value)


def np_bag_of_words(out, batch):
    value = []
    for b, t in zip(*np.nonzero(np.asarray(out['describe.tokens']) >= 0), strict=True):
        if batch.valid[b]:
            logits = np.asarray(out['vocabulary'] @ out['mention'][b], np.float64)
            value.append(np.log(np.exp(logits).sum()) - logits[out['describe.tokens'][b, t]])
    return np.mean(value)


@pytest.mark.parametrize('reference', [
    np_infonce, np_mine, np_nwj, np_jsd, np_smile, np_vclub, np_l1out, np_club_fit, np_bottleneck,
    np_mmd, np_alignment_uniformity, np_intents, np_next_item, np_generation,
    np_bag_of_words])
def test_value_against_numpy(reference):
    value = jit(partial(mean_loss, getattr(losses, reference.__name__[3:])))
    outputs = jit(named)
    for seed in (0, 1):
        batch, raw = make(seed)
        params = jax.tree.map(lambda x: x * 1.5, make_params(seed + 1))
        out = outputs(params, raw, batch)
        np.testing.assert_allclose(value(out, batch), reference(jax.device_get(out), batch),
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('fn', [losses.infonce, losses.mine])
def test_by_session_positions_of_a_row_are_no_negatives(fn):
    """Value, estimate and room against numpy; rows of one item alone have other rows' positions."""
    batch, raw = make(1)
    batch = batch.replace(items=np.where(np.arange(B)[:, None] == 1, (batch.items > 0) * 2,
                                         batch.items))
    out = jax.device_get(jit(named)(make_params(2), raw, batch))
    scores, differ = flat_pairs(out, batch, 'k', 'c', 'items', 'critic.align')
    row = np.nonzero(np.asarray(batch.mask))[0]
    apart = row[:, None] != row

    def of(negative):
        exp = np.exp(scores)
        if fn is losses.mine:
            return np.mean(np.diag(scores)) - np.log(exp[negative].mean())
        every = np.where(negative | np.eye(len(row), dtype=bool), exp, 0).sum(axis=1)
        return np.mean(np.diag(scores) - np.log(every / (negative.sum(axis=1) + 1)))

    spec = losses.LossSpec('it', fn, 1.0, {'by_session': True})
    value, _, logged = jit(lambda out: losses.combine((spec,), out, batch, {}))(out)
    assert value == pytest.approx(-of(differ & apart), rel=1e-5, abs=1e-5)  # of parts of about 1
    assert logged['mi_it'] == pytest.approx(of(apart), abs=1e-5)
    if fn is losses.infonce:
        assert logged['room/it'] == pytest.approx(
            np.log(apart.sum(axis=1) + 1).mean() - of(apart), rel=1e-4)


def test_scaled_features_lie_about_zero_however_large_their_mean():
    """What their mean is rounded by would move all of them alike."""
    out, (batch, _), rng = {}, make(0), np.random.default_rng(0)
    out['c'] = jnp.asarray(rng.normal(50 * rng.normal(size=D), 1, (B, N, D)), jnp.float32)
    x = np.asarray(pairs.scaled(out, batch, None, 'c')['c'], np.float64)[np.asarray(batch.mask)]
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=2e-7)
    np.testing.assert_allclose(x.var(axis=0), 1, atol=2e-6)


@pytest.mark.parametrize('reference', [np_vclub, np_l1out, np_club_fit])
def test_scaled_is_of_scaled_features(reference):
    """Mean 0 and variance 1 over the positions that hold an item."""
    batch, raw = make(0)
    out = jax.device_get(jit(named)(jax.tree.map(lambda x: x * 1.5, make_params(1)), raw, batch))
    fn = partial(getattr(losses, reference.__name__[3:]), scale=True)
    seen = {n: out[n][np.asarray(batch.mask)].astype(np.float64) for n in 'cp'}
    by_hand = {n: (out[n] - x.mean(0)) / np.sqrt(x.var(0) + 1e-6) for n, x in seen.items()}
    np.testing.assert_allclose(jit(partial(mean_loss, fn))(out, batch),
                               reference({**out, **by_hand}, batch), rtol=1e-4, atol=1e-5)


FEW = [losses.infonce, losses.l1out, losses.mmd]
CHUNKED = [fn for fn in PUBLIC if 'chunk' in inspect.signature(fn).parameters
           and fn is not losses.next_item]


@pytest.mark.parametrize(('kind', 'fns'), [
    ('separable', FEW), pytest.param('separable', CHUNKED, marks=pytest.mark.slow),
    pytest.param('concatenated', CHUNKED, marks=pytest.mark.slow)], ids=['few', 'all', 'on_pairs'])
def test_chunked_is_whole(kind, fns):
    """Value, metrics and gradient of everything, in blocks that do not divide the rows."""
    assert {fn.__name__ for fn in CHUNKED} >= {'infonce', 'mine', 'nwj', 'jsd', 'smile', 'l1out'}
    batch, raw = make(0)
    params = make_params(2)
    raw = example.predicted(params, raw)
    critic = critics.Critic(kind, 6)
    shape = jax.eval_shape(critic.init, jax.random.key(0), raw['k'][0], raw['c'][0])['params']
    params['critic.align'] = {'params': jax.tree.map(
        lambda x: np.random.default_rng(4).normal(size=x.shape).astype(np.float32), shape)}

    def objective(params, fn, chunk):
        out = named(params, raw, batch)
        out['critic.align'] = critics.Score(critic, params['critic.align']['params'])
        return losses.combine((losses.LossSpec('it', fn, 1.0, {'chunk': chunk}),), out, batch,
                              {})[::2]

    def measured(params):
        return [[jax.value_and_grad(objective, has_aux=True)(params, fn, chunk) for fn in fns]
                for chunk in (0, 7)]

    def near(got, expected):
        """Entries of a gradient of 1e5 that cancel are as exact as the largest ones are."""
        size = max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * size)

    whole, chunked = jit(measured)(params)
    jax.tree.map(near, chunked, whole)
    assert min(largest(grads) for _, grads in whole) > 1e-4


def test_club_fit_trains_q_and_no_feature():
    batch, raw = make(0)
    params = make_params(0)

    def objective(params):
        return mean_loss(losses.club_fit, named(params, raw, batch), batch)

    grads = jit(jax.grad(objective))(params)
    assert largest(grads.pop('club')) > 1e-3
    assert largest(grads) == 0.0


def test_cold_items_are_no_negatives_of_the_next_item():
    """Cold rows of z get no gradient; warm ones do."""
    batch, raw = make(0)
    params = make_params(0)

    def objective(z):
        return mean_loss(losses.next_item, {**named(params, raw, batch), 'z': z}, batch)

    grads = np.abs(jit(jax.grad(objective))(params['z'])).max(axis=1)
    assert (grads[[0, V - 1, V]] == 0).all()
    assert (grads[1:V - 1] > 0).all()


def gradients(fn, out, batch):
    """Value [B] of a loss, and what it pulls h and z to, row by row of the batch."""
    def objective(h, z):
        value = fn({**out, 'h': h, 'z': z}, batch)
        return jnp.where(batch.valid, value * (1 + jnp.arange(B)), 0).sum(), value

    (_, value), grads = jit(jax.value_and_grad(objective, (0, 1), has_aux=True))(out['h'], out['z'])
    return value, grads


def test_next_item_is_the_same_in_chunks():
    """A cold target (row 0) has no part in the partition either way."""
    batch, raw = make(1)
    batch = batch.replace(target=np.where(np.arange(B) == 0, V, batch.target))
    out = jit(named)(make_params(1), raw, batch)
    for smoothing in (0.0, 0.2):
        fn = partial(losses.next_item, smoothing=smoothing, temperature=0.5)
        expected = gradients(fn, out, batch)
        for chunk in (3, V, 100):
            close(gradients(partial(fn, chunk=chunk), out, batch), expected, 1e-5)
        # scores of a size that bfloat16 tells apart
        small = {**out, 'h': out['h'] / 4}
        close(gradients(partial(fn, chunk=3, dtype='bfloat16'), small, batch),
              gradients(fn, small, batch), 0.1)


def test_label_smoothing_is_a_soft_target():
    """Cross entropy of (1 - s) one-hot + s / (number of warm items) against the softmax."""
    batch, raw = make(1)
    out = {**jax.device_get(jit(named)(make_params(1), raw, batch)), 'repeat': None}
    logits = np.float64(out['h'] @ out['z'][1:V - 1].T) / 0.7
    log_share = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    wanted = 0.7 * (batch.target[:, None] == np.arange(1, V - 1)) + 0.3 / (V - 2)
    value = jit(partial(losses.next_item, smoothing=0.3, temperature=0.7))(out, batch)
    np.testing.assert_allclose(value, -(wanted * log_share).sum(axis=1), rtol=1e-5)


# A skewed proposal: item 1 is drawn in nine cases of ten.
SKEWED = np.where(np.arange(V + 1) == 1, 9.0 * (V - 3), 1.0).astype(np.float32)


@pytest.mark.parametrize(('power', 'counts'), [(0.0, SKEWED), (1.0, SKEWED), (0.5, SKEWED)])
def test_many_samples_are_the_whole_softmax(power, counts):
    """Value and gradients, cold and warm targets, whatever the proposal."""
    batch, raw = make(1)
    batch = batch.replace(target=np.where(np.arange(B) == 0, V, batch.target))
    out = {**jit(named)(make_params(1), raw, batch), 'popularity': counts, 'repeat': None}
    out['h'] = out['h'] / 4  # or few items have all of the probability
    out['z'] = out['z'].at[V].set(out['h'][0])  # a cold target that scores high
    sampled = partial(losses.sampled_next_item, power=power, samples=300_000, z='z',
                      key=jax.random.key(1), temperature=1.5)
    expected = gradients(partial(losses.next_item, temperature=1.5), out, batch)
    close(gradients(sampled, out, batch), expected, 0.05)


def test_without_its_correction_a_skewed_proposal_is_wrong(monkeypatch):
    batch, raw = make(1)
    out = {**jit(named)(make_params(1), raw, batch), 'popularity': SKEWED, 'repeat': None}
    expected = jit(losses.next_item)(out, batch)

    def sampled():
        return jit(partial(losses.sampled_next_item, key=jax.random.key(1), samples=100_000, z='z',
                           power=1.0))(out, batch)

    assert np.abs(sampled() - expected).max() < 0.05
    monkeypatch.setattr(losses.recommendation.softmax, 'log_probability',
                        lambda weight, ids: jnp.full(len(ids), -np.log(V - 2)))
    assert np.abs(sampled() - expected).max() > 0.5


def test_the_sampled_partition_is_unbiased():
    """Even that of two draws, on average."""
    batch, raw = make(1)
    out = {**jit(named)(make_params(1), raw, batch), 'popularity': 1.0 + jnp.arange(V + 1),
           'repeat': None}
    own = (out['h'] * out['z'][batch.target]).sum(-1)
    exact = np.exp(jit(losses.next_item)(out, batch) + own)

    def partition(key):
        value = losses.sampled_next_item(out, batch, key=key, samples=2, power=1.0, z='z')
        return jnp.exp(value + own)

    found = np.asarray(jit(jax.vmap(partition))(jax.random.split(jax.random.key(0), 20_000)))
    error = found.std(axis=0) / np.sqrt(len(found))
    assert (np.abs(found.mean(axis=0) - exact) < 4 * error + 1e-4 * exact).all()
