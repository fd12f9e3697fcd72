"""The session graph against a dictionary, the network against SR-GNN's equations in torch."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tpad_jax.models.sessions import sr_gnn as module
from tpad_jax.models.sessions.sr_gnn import SessionGNN, rooms, session_graph
from tpad_jax.nn.attention import row_keys

V, N, D = 6, 7, 5  # few items: sessions return to them
WIDE = 20  # so much padding that rows are computed without it


def draw_sessions(count, seed=0, width=N, least=1):
    """Sessions of `least` to N items, with repeats; and as int32 [count, width], 0 padding."""
    rng = np.random.default_rng(seed)
    sessions = [rng.integers(1, V + 1, rng.integers(least, N + 1)).tolist()
                for _ in range(count - 4)]
    sessions += [[3], [2, 2, 2], [1, 2, 1, 2, 1, 3], [1, 2, 3, 4, 5, 6, 1]]
    return sessions, np.array([s + [0] * (width - len(s)) for s in sessions], np.int32)


def shares(session):
    """{(i, j): 1 / nodes that i goes to}, and {(i, j): 1 / nodes that lead to j}, of all edges."""
    edges = set(pairwise(session))
    return ({(i, j): 1 / sum(a == i for a, _ in edges) for i, j in edges},
            {(i, j): 1 / sum(b == j for _, b in edges) for i, j in edges})


@pytest.fixture(scope='module', autouse=True)
def few():
    """Batches as small as these have all the sizes of a large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, 'FEW', 0)
        yield


@pytest.fixture(scope='module')
def network():
    """A network of two steps, its parameters, its jitted function and item vectors [V+1, D]."""
    gnn = SessionGNN(steps=2, max_length=WIDE, positions=True, rate=0.5, item_rate=0.2)
    shapes = jax.eval_shape(gnn.init, jax.random.key(0), jnp.ones((1, N, D)),
                            jnp.ones((1, N), jnp.int32))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: 0.7 * rng.normal(size=x.shape).astype(np.float32), shapes)
    table = rng.normal(size=(V + 1, D)).astype(np.float32)
    return gnn, params, jax.jit(gnn.apply), table


def test_graph_is_that_of_a_dictionary():
    sessions, items = draw_sessions(40)
    alias, leaving, arriving = map(np.asarray, jax.jit(session_graph)(items))
    for b, session in enumerate(sessions):
        # a node stands where first met
        assert alias[b, :len(session)].tolist() == [session.index(item) for item in session]
        for weight, expected in zip((leaving[b], arriving[b]), shares(session), strict=True):
            steps = {}
            for edge, w in zip(pairwise(session), weight, strict=False):
                steps.setdefault(edge, []).append(w)
            assert {edge: sorted(w)[:-1] for edge, w in steps.items()} == {
                edge: [0] * (len(w) - 1) for edge, w in steps.items()}  # once, however often taken
            assert {edge: max(w) for edge, w in steps.items()} == pytest.approx(expected)
            assert not weight[len(session) - 1:].any()


def test_edge_weights_by_hand():
    """1 -> 2 -> 1 -> 2 -> 3: item 2 leaves to 1 and to 3; 1 -> 2 is one edge, taken twice."""
    _, leaving, arriving = session_graph(jnp.array([[1, 2, 1, 2, 3, 0]]))
    assert leaving[0].tolist() == [1, 0.5, 0, 0.5, 0, 0]
    assert arriving[0].tolist() == [1, 1, 0, 1, 0, 0]


def sr_gnn(p, session, table, steps):
    """One session by the equations of Wu et al. 2019 in torch, nodes a dictionary of vectors [D].

    Where the paper and its published code differ, as the code has it.
    """
    def dense(name, x):
        return x @ p[f'{name}_kernel'] + p[f'{name}_bias']

    def parts(x):
        return x[:D], x[D:2 * D], x[2 * D:]

    nodes = {item: table[item] for item in session}
    leaving, arriving = shares(session)
    for _ in range(steps):
        product = {item: dense('node', v) for item, v in nodes.items()}
        new = {}
        for item, v in nodes.items():
            forth = sum((w * product[j][:D] for (i, j), w in leaving.items() if i == item),
                        torch.zeros(D, dtype=torch.float64))
            back = sum((w * product[i][D:2 * D] for (i, j), w in arriving.items() if j == item),
                       torch.zeros(D, dtype=torch.float64))
            a = torch.cat([back, forth]) + p['edge_bias']  # eq 1
            reset_a, update_a, new_a = parts(dense('message', a))
            reset_v, update_v, new_v = parts(product[item][2 * D:])
            update = torch.sigmoid(update_a + update_v)  # eq 2
            reset = torch.sigmoid(reset_a + reset_v)  # eq 3
            candidate = torch.tanh(new_a + reset * new_v)  # eq 4, the gate behind the product
            new[item] = (1 - update) * candidate + update * v  # eq 5, the gate keeps the old
        nodes = new
    last, length = nodes[session[-1]], len(session)
    whole = torch.zeros(D, dtype=torch.float64)
    for i, item in enumerate(session):
        mix = dense('w1', last) + dense('w2', nodes[item])  # eq 6
        if 'from_start' in p:
            mix = mix + p['from_start'][i] + p['from_end'][length - 1 - i]
        whole = whole + (torch.sigmoid(mix) @ p['q_kernel']) * nodes[item]
    return dense('w3', torch.cat([whole, last]))  # eq 7


@pytest.mark.parametrize(('steps', 'positions', 'width', 'least', 'room'),
                         [(1, False, N, 4, 2), (1, False, WIDE, 1, 0), (2, True, WIDE, 2, 1)])
def test_network_against_the_equations(network, steps, positions, width, least, room):
    """h, and the gradients of a function of h by every parameter and item vector, at each size."""
    _, params, _, table = network
    inner = {n: x for n, x in params['params'].items() if positions or not n.startswith('from_')}
    gnn = SessionGNN(steps=steps, max_length=WIDE, positions=positions)
    sessions, items = draw_sessions(24, steps, width, least)
    assert np.searchsorted(rooms(*items.shape), (items > 0).sum()) == room
    turn = np.random.default_rng(2).normal(size=(24, D)).astype(np.float32)

    def ours(p, table):
        h = gnn.apply({'params': p}, table[items], items)
        return (h * turn).sum(), h

    (_, h), grads = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(inner, table)
    wide = {n: torch.tensor(np.array(x), dtype=torch.float64, requires_grad=True)
            for n, x in {**inner, 'table': table}.items()}
    expected = torch.stack([sr_gnn(wide, s, wide['table'], steps) for s in sessions])
    (expected * torch.tensor(turn)).sum().backward()
    np.testing.assert_allclose(h, expected.detach().numpy(), rtol=1e-5, atol=1e-5)
    for name, grad in {**grads[0], 'table': grads[1]}.items():
        theirs = wide[name].grad.numpy()
        assert np.abs(theirs).max() > 1e-3, name
        np.testing.assert_allclose(grad, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max(),
                                   err_msg=name)


def test_starts_uniform():
    """Every parameter in +-1 / sqrt(D), biases too, as published."""
    params = SessionGNN().init(jax.random.key(0), jnp.ones((1, N, 64)), jnp.ones((1, N), jnp.int32))
    for x in jax.tree.leaves(params):
        assert 0.85 / 8 < np.abs(x).max() <= 1 / 8
        assert np.std(x) == pytest.approx(1 / 8 / 3 ** 0.5, rel=0.2)


def test_padding_has_no_influence(network):
    """Neither its number nor what vectors stand there, nor whether rows are packed."""
    _, params, apply, table = network
    _, items = draw_sessions(24, least=4)
    h = apply(params, table[items], items)
    for width in (N + 1, WIDE):
        longer = np.pad(items, ((0, 0), (0, width - N)))
        z = np.where(longer[:, :, None] > 0, table[longer], 50.0).astype(np.float32)
        np.testing.assert_allclose(apply(params, z, longer), h, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('width', [N, WIDE])
def test_rows_do_not_see_each_other(network, width):
    _, params, apply, table = network
    _, items = draw_sessions(24, width=width, least=4)
    other = items.copy()
    other[1::2] = items[::-1][1::2]
    other[-1] = 0  # a row without items is nobody's affair either
    assert (other[1::2] != items[1::2]).any()
    h, mixed = apply(params, table[items], items), apply(params, table[other], other)
    np.testing.assert_allclose(mixed[::2], h[::2], rtol=1e-5, atol=1e-5)
    assert np.isfinite(mixed).all()


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
    assert 0.3 < (h == 0).mean() < 0.7  # inverted dropout of rate 0.5 on the result
    same = np.tile(items[-1], (24, 1))
    assert len({x.tobytes() for x in dropped(same, rows)}) == 24  # each row draws for itself
    assert np.abs(dropped(items, rows, step=1) - h).max() > 0.01
