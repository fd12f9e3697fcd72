"""The session graph against a dictionary, the network against SR-GNN's equations in numpy."""

from collections import Counter
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tpad_jax.models.attention import row_keys
from tpad_jax.models.session_gnn import SessionGNN, session_graph

V, N, D = 6, 7, 5  # few items: sessions return to them


def draw_sessions(count, seed=0):
    """Sessions of 1 to N items with repeats, and as int32 [count, N], 0 pads at the end."""
    rng = np.random.default_rng(seed)
    sessions = [rng.integers(1, V + 1, rng.integers(1, N + 1)).tolist() for _ in range(count - 4)]
    sessions += [[3], [2, 2, 2], [1, 2, 1, 2, 1, 3], [1, 2, 3, 4, 5, 6, 1]]
    return sessions, np.array([s + [0] * (N - len(s)) for s in sessions], np.int32)


def shares(session):
    """Departures of each item, {item: {next item: share}}, and arrivals likewise."""
    steps = Counter(pairwise(session))
    out, into = Counter(), Counter()
    for (a, b), count in steps.items():
        out[a] += count
        into[b] += count
    return ({a: {b: n / out[a] for (c, b), n in steps.items() if c == a} for a in out},
            {b: {a: n / into[b] for (a, c), n in steps.items() if c == b} for b in into})


@pytest.fixture(scope='module')
def network():
    """A network of two steps, its parameters, its jitted function and item vectors [V+1, D]."""
    gnn = SessionGNN(steps=2, max_length=N + 3, positions=True, rate=0.5)
    shapes = jax.eval_shape(gnn.init, jax.random.key(0), jnp.ones((1, N, D)),
                            jnp.ones((1, N), jnp.int32))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.7 * rng.normal(size=x.shape).astype(np.float32), shapes)
    table = rng.normal(size=(V + 1, D)).astype(np.float32)
    return gnn, params, jax.jit(gnn.apply), table


def test_graph_is_that_of_a_dictionary():
    sessions, items = draw_sessions(40)
    alias, outgoing, incoming = map(np.asarray, jax.jit(session_graph)(items))
    for b, session in enumerate(sessions):
        place = {item: session.index(item) for item in session}  # a node stands where first met
        assert alias[b, :len(session)].tolist() == [place[i] for i in session]
        expected_out, expected_in = np.zeros((2, N, N))
        leaving, arriving = shares(session)
        for a, row in leaving.items():
            for i, share in row.items():
                expected_out[place[a], place[i]] = share
        for a, row in arriving.items():
            for i, share in row.items():
                expected_in[place[a], place[i]] = share
        np.testing.assert_allclose(outgoing[b], expected_out, atol=1e-6)
        np.testing.assert_allclose(incoming[b], expected_in, atol=1e-6)


def test_edge_weights_by_hand():
    """1 -> 2 -> 1 -> 2 -> 3: item 2 leaves once to 1 and once to 3; 1 leaves twice to 2."""
    _, outgoing, incoming = session_graph(jnp.array([[1, 2, 1, 2, 3, 0]]))
    assert outgoing[0, 0, 1] == 1
    assert outgoing[0, 1, 0] == outgoing[0, 1, 4] == 0.5
    assert incoming[0, 0, 1] == incoming[0, 1, 0] == incoming[0, 4, 1] == 1
    assert float(outgoing.sum()) == 2
    assert float(incoming.sum()) == 3


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def sr_gnn(params, session, table, steps):
    """One session by the equations of Wu et al. 2019, nodes in a dictionary of vectors [D]."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params['params'])

    def dense(name, x, tree=p):
        return x @ tree[name]['kernel'] + tree[name].get('bias', 0)

    nodes = {item: table[item].astype(np.float64) for item in session}
    leaving, arriving = shares(session)
    for _ in range(steps):
        new = {}
        for item, v in nodes.items():
            # eq 1: what comes along the outgoing and the incoming edges
            a = np.concatenate([
                sum((w * dense(name, nodes[j]) for j, w in near.get(item, {}).items()), np.zeros(D))
                for name, near in (('out', leaving), ('in', arriving))])
            cell = p['cell']
            update = sigmoid(dense('iz', a, cell) + dense('hz', v, cell))  # eq 2
            reset = sigmoid(dense('ir', a, cell) + dense('hr', v, cell))  # eq 3
            candidate = np.tanh(dense('in', a, cell) + reset * dense('hn', v, cell))  # eq 4
            new[item] = (1 - update) * candidate + update * v  # eq 5, as in the authors' code
        nodes = new
    last, length = nodes[session[-1]], len(session)
    whole = np.zeros(D)
    for i, item in enumerate(session):
        mix = dense('w1', last) + dense('w2', nodes[item])  # eq 6
        if 'from_start' in p:
            mix = mix + p['from_start'][i] + p['from_end'][length - 1 - i]
        whole += dense('q', sigmoid(mix)) * nodes[item]
    return dense('w3', np.concatenate([last, whole]))  # eq 7


@pytest.mark.parametrize(('steps', 'positions'), [(1, False), (2, True)])
def test_network_against_the_papers_equations(network, steps, positions):
    _, params, _, table = network
    inner = dict(params['params'])
    if not positions:
        inner = {n: x for n, x in inner.items() if not n.startswith('from_')}
    gnn = SessionGNN(steps=steps, max_length=N + 3, positions=positions)
    sessions, items = draw_sessions(24, seed=steps)
    h = jax.jit(gnn.apply)({'params': inner}, table[items], items)
    expected = [sr_gnn({'params': inner}, s, table, steps) for s in sessions]
    np.testing.assert_allclose(h, expected, rtol=1e-4, atol=1e-4)


def test_padding_has_no_influence(network):
    """Neither its number nor what vectors stand there."""
    _, params, apply, table = network
    _, items = draw_sessions(24)
    h = apply(params, table[items], items)
    longer = np.pad(items, ((0, 0), (0, 3)))
    z = np.where(longer[:, :, None] > 0, table[longer], 50.0).astype(np.float32)
    np.testing.assert_allclose(apply(params, z, longer), h, rtol=1e-5, atol=1e-5)


def test_rows_do_not_see_each_other(network):
    _, params, apply, table = network
    _, items = draw_sessions(24)
    other = items.copy()
    other[1::2] = items[::-1][1::2]
    assert (other[1::2] != items[1::2]).any()
    h, mixed = apply(params, table[items], items), apply(params, table[other], other)
    np.testing.assert_allclose(mixed[::2], h[::2], rtol=1e-5, atol=1e-5)


def test_order_matters_beyond_the_last_item(network):
    """The same items and the same last one, met in another order, give another session vector."""
    _, params, apply, table = network
    items = np.tile([[1, 2, 3, 4, 0, 0, 0], [2, 1, 3, 4, 0, 0, 0]], (12, 1)).astype(np.int32)
    h = apply(params, table[items], items)
    assert np.abs(h[0] - h[1]).max() > 0.01


def test_dropout_goes_with_the_row_not_its_place(network):
    _, params, apply, table = network
    _, items = draw_sessions(24)
    rows = np.arange(100, 124)
    order = np.random.default_rng(0).permutation(24)

    def dropped(items, rows, step=0):
        return np.asarray(apply(params, table[items], items, row_keys(jax.random.key(step), rows)))

    h = dropped(items, rows)
    np.testing.assert_allclose(dropped(items[order], rows[order]), h[order], rtol=1e-5, atol=1e-5)
    assert 0.3 < (h == 0).mean() < 0.7  # inverted dropout of rate 0.5 on the readout
    same = np.tile(items[-1], (24, 1))
    assert len({x.tobytes() for x in dropped(same, rows)}) == 24  # each row draws for itself
    assert np.abs(dropped(items, rows, step=1) - h).max() > 0.01
