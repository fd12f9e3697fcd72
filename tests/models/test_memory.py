"""The memory: retrieval, gate and shift by plain loops; what the gate may not learn from."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import expit

from tests.job.test_mixture import N, V, part
from tpad_jax.data.sessions import Sessions, rows
from tpad_jax.distributed import devices
from tpad_jax.evaluation import memory as making, metrics
from tpad_jax.evaluation.scorers import scorer, session_encoder, session_shifts
from tpad_jax.models import memory as lookup
from tpad_jax.serving import topk

MOST, D = 7, 6


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def drawn(count=40, seed=0):
    """A memory of two entries a session, and prefixes that come later."""
    rng = np.random.default_rng(seed)
    gate = lookup.GATE.init(jax.random.key(seed), jnp.zeros((1, D + 2)))['params']
    memory = {'h': unit(rng.normal(size=(count, D))).astype(np.float32), 'gate': gate,
              'next': rng.integers(1, V + 1, count).astype(np.int32),
              'session': np.repeat(np.arange(count // 2), 2).astype(np.int32),
              'strength': np.float32(0.7), 'floor': np.float32(0.3)}
    return jax.tree.map(jnp.asarray, memory), rng.normal(size=(9, D)).astype(np.float32)


def expected(memory, h):
    """The shifts [B, V + 1] by loops, in float64."""
    m = jax.tree.map(np.asarray, memory)
    out, count = np.zeros((len(h), V + 1)), m['session'].max() + 1
    for row, x in zip(out, unit(h.astype(float)), strict=True):
        cosine = m['h'] @ x
        for entry in np.argsort(-cosine)[:MOST]:
            age = (count - m['session'][entry]) / count
            read = np.concatenate([D * x * m['h'][entry], [cosine[entry], age]])
            inner = read @ m['gate']['in']['kernel'] + m['gate']['in']['bias']
            inner = np.asarray(jax.nn.gelu(inner))
            logit = inner @ m['gate']['out']['kernel'] + m['gate']['out']['bias']
            row[m['next'][entry]] += expit(logit[0])
    return m['strength'] * np.log1p(out / m['floor'])


def test_shifts_by_plain_loops():
    memory, h = drawn()
    items, shift = map(np.asarray, lookup.shifts(memory, h, MOST))
    found = np.zeros((len(h), V + 1))
    np.add.at(found, (np.arange(len(h))[:, None], items), shift)
    np.testing.assert_allclose(found, expected(memory, h), atol=1e-5)
    assert ((shift > 0).sum(axis=1) < MOST).any()  # an item that came twice has one place
    _, opened = lookup.evidence({n: x for n, x in memory.items() if n != 'gate'}, h, MOST)
    np.testing.assert_allclose(np.asarray(opened).sum(axis=1), MOST)  # without a gate all count


def test_a_gate_never_sees_its_own_session():
    """No entry of another session is right. With its own one a prefix would find its target."""
    memory, _ = drawn(1000)
    memory |= {'next': jnp.arange(1000) // 2}
    entry, _, _ = lookup.nearest(memory, memory['h'], MOST, memory['session'])
    assert (memory['session'][entry] != memory['session'][:, None]).all()
    gate = making.gate(memory, MOST)
    same = jnp.ones((1000, 1)), jnp.zeros((1000, 1))
    own = lookup.logits(memory | {'gate': gate}, memory['h'], jnp.arange(1000)[:, None], *same)
    assert float(jax.nn.sigmoid(own).mean()) < 0.1


def recommender(**memory):
    """A recommender with repeats, its scorer, and the memory of sessions on a ring."""
    spec, params, catalogue = part('sr_gnn', 8, 0, True)
    spec = replace(spec, memory=MOST)
    start = np.random.default_rng(0).integers(V, size=60)
    items = 1 + (start[:, None] + np.arange(4)) % V
    train = Sessions(items.reshape(-1).astype(np.int32), np.arange(0, 241, 4), np.arange(60))
    bind = scorer(spec, devices.choose('jit', 1))
    valid = rows(train, N)
    made = making.remembered(spec, params, catalogue, train, valid, bind(params, catalogue))
    full = {'recommender': params['recommender'] | {'memory': made | memory}}
    return spec, bind(params, catalogue), bind(full, catalogue), valid


def test_strength_zero_is_no_memory_to_the_bit():
    _, plain, zero, valid = recommender(strength=jnp.float32(0))
    np.testing.assert_array_equal(plain(valid.items), zero(valid.items))
    for without, found in zip(plain.ranks(valid.items, valid.target, power=1.0),
                              zero.ranks(valid.items, valid.target, power=1.0), strict=True):
        np.testing.assert_array_equal(without, found)


def test_a_memory_helps_and_its_scores_ranks_and_lists_agree():
    spec, plain, full, valid = recommender()
    before, after = plain(valid.items), full(valid.items)
    assert metrics.nll(after, valid.target).mean() < metrics.nll(before, valid.target).mean() - 1
    for found, counted in zip(full.ranks(valid.items, valid.target),
                              metrics.counts(after, valid.target), strict=True):
        np.testing.assert_array_equal(found, counted)
    bound, room = full.bound, topk.rounded(V + 1) - V - 1
    weights = tuple(zip(bound.params, bound.near, strict=True)), None
    _, best = topk.searcher(session_encoder((spec,)), session_shifts((spec,)))(
        weights, jnp.pad(bound.z, ((0, room), (0, 0))), V + 1, valid.items, k=6)
    order = np.argsort(-after[:, 1:], kind='stable')[:, :6] + 1
    np.testing.assert_allclose(np.take_along_axis(after, np.asarray(best), 1),
                               np.take_along_axis(after, order, 1), rtol=1e-5)
