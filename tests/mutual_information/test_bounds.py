"""What the bounds are: limits, ground truth, masks, MINE's corrected gradient, vCLUB's clamp."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.tree_util import Partial

from tpad_jax import losses
from tpad_jax.mutual_information import bounds
from tpad_jax.types import Batch

# Programs of this size run in no time: compiling them is what takes it.
jit = partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0})


@partial(jit, static_argnames=('fn', 'x', 'y', 'critic', 'club', 'temperature'))
def call(fn, out, batch, **keywords):
    """A loss by itself, as one program (op by op it takes ten times as long)."""
    return fn(out, batch, **keywords)


def close(got, expected, tolerance=2e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), got, expected)


def largest(tree):
    return max(float(np.abs(x).max()) for x in jax.tree.leaves(jax.device_get(tree)))


def pair_batch(x, y, score, ids=None):
    """Outputs and batch for two clouds of points [A, D], one position per row."""
    ids = np.arange(1, len(x) + 1) if ids is None else np.asarray(ids)
    items = ids[:, None].astype(np.int32)
    batch = Batch(items=items, next=items, target=items[:, 0], valid=np.ones(len(x), bool),
                  row=np.arange(len(x)))
    out = {'x': x[:, None], 'y': y[:, None], 'items': items, 'f': score}
    return jax.tree.map(jnp.asarray, (out, batch))


def gaussians(rng, count, rho, width=2):
    x = rng.normal(size=(count, width)).astype(np.float32)
    noise = rng.normal(size=x.shape).astype(np.float32)
    return x, rho * x + np.sqrt(1 - rho**2) * noise


def by_torch(own, scores, negative):
    """Means of every bound of a score matrix, written out once more."""
    def each(reduce):
        return torch.stack([reduce(row[keep]) for row, keep in zip(scores, negative, strict=True)])

    off = scores[negative]
    softplus = torch.nn.functional.softplus
    log_mean = each(lambda row: torch.log(row.exp().mean()))
    candidates = torch.stack([torch.cat([row[keep], one[None]]).exp().mean().log()
                              for row, keep, one in zip(scores, negative, own, strict=True)])
    return {
        'infonce': (own - candidates).mean(),
        'donsker_varadhan': own.mean() - off.exp().mean().log(),
        'nwj': own.mean() - (off - 1).exp().mean(),
        'jsd': -softplus(-own).mean() - softplus(off).mean(),
        'smile': own.mean() - off.clamp(-1.5, 1.5).exp().mean().log(),
        'vclub': (own - each(torch.mean)).mean(),
        'l1out': (own - log_mean).mean(),
        'uniformity': (4 * (off - 1)).exp().mean().log(),
    }


def test_bounds_and_gradients_against_torch():
    """Of a fixed score matrix, to 1e-5; rows in blocks that do not divide them give the same."""
    rng = np.random.default_rng(7)
    scores = (2 * rng.normal(size=(5, 8))).astype(np.float32)
    own = np.array([2, 3, 4, 5, 6])
    negative = (rng.random((5, 8)) < 0.7) & (own[:, None] != np.arange(8))
    assert (negative.sum(axis=1) > 1).all()
    table = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    expected = {}
    for name, value in by_torch(table[np.arange(5), own], table, torch.tensor(negative)).items():
        grad, = torch.autograd.grad(value, table, retain_graph=True)
        expected[name] = (value.item(), grad.numpy())

    def mean(scores, name, chunk):
        fn = partial(bounds.smile, clip=1.5) if name == 'smile' else getattr(bounds, name)
        if chunk:
            return fn(bounds.Blocks(lambda part: part, (scores, own, negative), chunk)).mean()
        return fn(scores, own, negative).mean()

    for chunk in (0, 2):
        found = jit(lambda s, chunk=chunk: {n: jax.value_and_grad(mean)(s, n, chunk)
                                            for n in expected})(scores)
        close(found, expected, 1e-5)


def test_bounds_of_correlated_gaussians():
    """With the best critic DV reaches I, InfoNCE stays below it, vCLUB has its own closed form."""
    rho, width = 0.7, 2
    x, y = gaussians(np.random.default_rng(0), 1500, rho, width)

    def log_q(x, y):
        return -0.5 * ((rho * x[:, None] - y[None]) ** 2).sum(-1) / (1 - rho**2)

    def log_ratio(x, y):
        return (log_q(x, y) + 0.5 * (y * y).sum(-1) - width / 2 * np.log(1 - rho**2))

    information = -width / 2 * np.log(1 - rho**2)
    out, batch = pair_batch(x, y, Partial(log_ratio))
    names = dict(x='x', y='y', critic='f')
    other = {**out, 'f': Partial(log_q)}
    dv, nce, club = jit(lambda: (
        losses.mine(out, batch, **names).metrics['mi'].mean(),
        losses.infonce(out, batch, **names).metrics['mi'].mean(),
        losses.vclub(other, batch, x='x', y='y', club='f').value.mean()))()
    assert dv == pytest.approx(information, abs=0.06)
    assert information - 0.1 < nce < information + 0.06
    assert club == pytest.approx(width * rho**2 / (1 - rho**2), rel=0.08)


def test_infonce_cannot_exceed_the_log_of_its_candidates():
    x = np.eye(12, dtype=np.float32)
    ids = [1, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8, 0]  # the last position is padding
    out, batch = pair_batch(x, x, Partial(lambda x, y: 50 * x @ y.T), ids)
    result = call(losses.infonce, out, batch, x='x', y='y', critic='f')
    same = np.array([sum(i == j for j in ids) for i in ids[:-1]])
    limit = np.log(11 - same + 1)  # all real positions but equal items, and the row itself
    np.testing.assert_allclose(-result.value[:-1, 0], limit, rtol=1e-5)
    # the estimate keeps equal items: else it would be no bound of the information
    np.testing.assert_allclose(result.metrics['mi'][:-1, 0], np.log(11), rtol=1e-5)
    np.testing.assert_allclose(result.metrics['room'][:-1], 0, atol=1e-5)
    assert result.weight[:, 0].tolist() == [1] * 11 + [0]


def test_infonce_temperature_divides_the_scores():
    rng = np.random.default_rng(0)
    x, y = gaussians(rng, 6, 0.5)
    out, batch = pair_batch(x, y, Partial(lambda x, y: x @ y.T))
    cold = call(losses.infonce, out, batch, x='x', y='y', critic='f', temperature=0.2)
    out['f'] = Partial(lambda x, y: 5 * x @ y.T)
    close(cold.value, call(losses.infonce, out, batch, x='x', y='y', critic='f').value)


def looked_up(table, x, y):
    return table


def test_equal_items_are_never_negatives():
    """However high a duplicate's score, nothing changes; another item's score does count."""
    rng = np.random.default_rng(0)
    x, y = gaussians(rng, 6, 0.5)
    ids = [1, 2, 3, 3, 4, 5]
    scores = rng.normal(size=(6, 6)).astype(np.float32)
    duplicate, distinct = scores.copy(), scores.copy()
    duplicate[2, 3], duplicate[3, 2], distinct[2, 1] = 30, 30, 30

    def value(fn, table, **names):
        out, batch = pair_batch(x, y, Partial(looked_up, table), ids)
        return np.asarray(call(fn, out, batch, x='x', y='y', **names).value)

    for fn, names in ((losses.infonce, {'critic': 'f'}), (losses.mine, {'critic': 'f'}),
                      (losses.vclub, {'club': 'f'})):
        close(value(fn, duplicate, **names), value(fn, scores, **names))
        assert np.abs(value(fn, distinct, **names) - value(fn, scores, **names)).max() > 1


def test_a_position_without_negatives_weighs_nothing():
    """Bounds of a batch of one item say nothing: no value, no gradient, no step of the average."""
    x, y = gaussians(np.random.default_rng(0), 4, 0.5)
    out, batch = pair_batch(x, y, Partial(lambda s, x, y: s * x @ y.T, 1.0), ids=[5, 5, 5, 5])
    for fn, names in ((losses.infonce, {'critic': 'f'}), (losses.mine, {'critic': 'f'}),
                      (losses.vclub, {'club': 'f'})):
        assert not call(fn, out, batch, x='x', y='y', **names).weight.any()
    past = {'log_average': jnp.float32(0.3)}
    assert call(losses.mine, out, batch, x='x', y='y', critic='f', state=past).state == past


def scaled(theta, x, y):
    return theta * x @ y.T


def test_mine_gradient_is_corrected_by_the_moving_average():
    """For T = theta <x, y>: -mean <x_i, y_i> + mean(<x, y> exp T) / average, the average moved."""
    x, y = (a.astype(np.float64) for a in gaussians(np.random.default_rng(1), 7, 0.8))
    theta, decay, past = 0.6, 0.9, 0.25
    out, batch = pair_batch(x.astype(np.float32), y.astype(np.float32), None)

    def objective(theta, log_average):
        out['f'] = Partial(scaled, theta)
        result = losses.mine(out, batch, state={'log_average': log_average}, x='x', y='y',
                             critic='f', decay=decay, limit=np.inf)
        return result.value.mean(), result.state['log_average']

    off = ~np.eye(7, dtype=bool)
    product = x @ y.T
    now = np.exp(theta * product[off]).mean()
    slope = (product[off] * np.exp(theta * product[off])).mean()
    own = np.diag(product).mean()
    grad_of = jit(jax.value_and_grad(objective, has_aux=True))
    for start, before in ((np.log(past), past), (-np.inf, now)):  # the first step has no past
        average = decay * before + (1 - decay) * now
        (value, new), grad = grad_of(theta, jnp.float32(start))
        assert float(value) == pytest.approx(np.log(now) - theta * own, abs=1e-5)
        assert float(new) == pytest.approx(np.log(average), abs=1e-5)
        assert float(grad) == pytest.approx(-own + slope / average, rel=1e-5)


def test_mine_is_finite_at_extreme_scores_and_its_limit_bounds_the_pull():
    """The value is the batch's; in the average it counts for `limit` nats more at most."""
    x, y = (1e4 * a for a in gaussians(np.random.default_rng(1), 7, 0.8))
    out, batch = pair_batch(x, y, None)

    def objective(theta):
        out['f'] = Partial(scaled, theta)
        result = losses.mine(out, batch, state={'log_average': jnp.float32(-3)}, x='x', y='y',
                             critic='f', decay=0.9, limit=2.0)
        return result.value.mean(), result.state['log_average']

    (value, new), grad = jit(jax.value_and_grad(objective, has_aux=True))(jnp.float32(0.6))
    product = x.astype(np.float64) @ y.T
    off, own = product[~np.eye(7, dtype=bool)], np.diag(product).mean()
    largest = off.max()  # outweighs all other pairs at such scores
    counted = 0.9 + 0.1 * np.exp(2)
    assert float(value) == pytest.approx(0.6 * (largest - own) - np.log(42), rel=1e-5)
    assert float(new) == pytest.approx(-3 + np.log(counted), abs=1e-5)
    assert float(grad) == pytest.approx(-own + np.exp(2) / counted * largest, rel=1e-5)


def test_mine_gradient_is_less_biased_than_the_naive_one():
    """Over many small batches its mean is far closer to the gradient of one large batch."""
    theta, size, count = jnp.float32(0.45), 3, 20_000
    x, y = gaussians(np.random.default_rng(2), size * count, 0.8, width=1)
    out, batch = pair_batch(x[:size], y[:size], None)

    def grad(x, y, state, decay):
        def objective(theta):
            own = {**out, 'x': x[:, None], 'y': y[:, None], 'f': Partial(scaled, theta)}
            result = losses.mine(own, batch, state=state, x='x', y='y', critic='f', decay=decay)
            return result.value.mean(), result.state
        return jax.grad(objective, has_aux=True)(theta)

    def step(state, points):
        corrected, state = grad(*points, state, 0.99)
        naive, _ = grad(*points, None, 0.99)  # without a past the correction is none
        return state, (corrected, naive)

    start = {'log_average': jnp.float32(-jnp.inf)}
    points = tuple(a.reshape(count, size, 1) for a in (x, y))
    _, grads = jit(partial(jax.lax.scan, step))(start, points)
    corrected, naive = (float(g[500:].mean()) for g in grads)
    # of infinitely many: E[xy] = rho; E exp(theta x y) = (1 - theta^2)^-1/2 for independent x, y
    large = -0.8 + float(theta / (1 - theta**2))
    assert abs(corrected - large) < 0.3 * abs(naive - large)
    assert abs(naive - large) > 0.05


def test_vclub_stops_pulling_where_its_estimate_is_negative():
    x, y = gaussians(np.random.default_rng(3), 8, 0.9)

    def objective(x, scale):
        out, batch = pair_batch(x, y, Partial(scaled, scale))
        result = losses.vclub(out, batch, x='x', y='y', club='f')
        return result.value.mean(), result.metrics['mi'].mean()

    grad_of = jit(jax.value_and_grad(objective, (0, 1), has_aux=True))
    for scale, sign in ((1.0, 1), (-1.0, -1)):
        (value, mi), (to_x, to_q) = grad_of(x, scale)
        assert np.sign(value) == sign
        assert value == mi  # the number is shown as it is
        assert (largest(to_x) > 0) == (sign > 0)
        assert float(to_q) == 0.0  # q is fitted by its own loss, never by the bound
