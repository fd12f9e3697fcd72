"""Pruning against torch and numpy: scores by rows, diversity, the tokens chosen, sums of inputs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tpad_jax import config as config_lib
from tpad_jax.features import bases, prune
from tpad_jax.models.mllms import KnowledgeMLLM
from tpad_jax.nn.attention import received


def test_weights_are_those_that_torch_prunes_by_rows():
    """The loop of Wanda's published code; its weights are [O, I]."""
    rng = np.random.default_rng(0)
    kernel, norm = rng.normal(size=(2, 12, 5)).astype('f'), rng.random((2, 12)).astype('f')
    found = prune.zeroed(kernel, norm, np.array([0.25, 0.5]))
    for layer, share in enumerate((0.25, 0.5)):
        weights = torch.tensor(kernel[layer].T.copy())
        metric = weights.abs() * torch.tensor(norm[layer])[None]
        order = torch.sort(metric, dim=-1, stable=True)[1]
        weights.scatter_(1, order[:, :int(share * 12)], 0)
        np.testing.assert_array_equal(found[layer], weights.numpy().T)


def test_diverse_layers_keep_more_up_to_a_limit():
    found = prune.shares(np.array([1.0, 2.0, 4.0, 0.1]), 0.5)
    np.testing.assert_allclose(found, [0.8 if x > 0.8 else x for x in found])
    assert found.mean() == pytest.approx(0.5)
    assert found[3] == pytest.approx(prune.MOST)
    np.testing.assert_allclose(found[:3] * [1, 2, 4], found[0], rtol=1e-6)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def test_diversity_by_loops():
    x, kind = np.random.default_rng(0).normal(size=(7, 4)), np.array([0, 1, 1, 2, 2, 2, 0])
    apart, sums = 1 - unit(x) @ unit(x).T, [[], [], []]
    for i in range(7):
        for j in range(7):
            if i != j and kind[i] == kind[j] and kind[i]:
                sums[kind[i] - 1].append(apart[i, j])
            if kind[i] == 1 and kind[j] == 2:
                sums[2].append(apart[i, j])
    np.testing.assert_allclose(prune.diversity(x, kind), list(map(np.mean, sums)), rtol=1e-4)
    assert np.isnan(prune.diversity(x, np.zeros(7, int))).all()


def chosen(x, attention, there):
    """The tokens chosen, by loops in float64; MMD^2 by its definition."""
    tokens = np.flatnonzero(there)
    cosine = unit(x) @ unit(x).T
    near = {i: sorted((j for j in tokens if j != i), key=lambda j: -cosine[i, j])[:prune.NEAR]
            for i in tokens}
    score = {i: attention[i] + sum(max(cosine[i, j], 0) * attention[j] for j in near[i])
             for i in tokens}
    square = ((x[:, None] - x) ** 2).sum(-1)
    kernel = np.exp(-square / square[np.ix_(tokens, tokens)].mean())
    out = []
    while len(out) < len(tokens):
        best = max((i for i in tokens if i not in out), key=score.get)
        own = score[best]
        for j in near[best]:
            score[j] -= max(cosine[best, j], 0) * own
        out.append(best)
        mmd = (kernel[np.ix_(out, out)].mean() - 2 * kernel[np.ix_(out, tokens)].mean()
               + kernel[np.ix_(tokens, tokens)].mean())
        if mmd <= prune.LIMIT:
            break
    return set(out)


@pytest.mark.parametrize('seed', range(3))
def test_tokens_by_loops(seed):
    rng = np.random.default_rng(seed)
    x, attention = rng.normal(size=(14, 5)), rng.random(14)
    x[:4] = x[0] + 0.01 * x[:4]  # alike: few of them are needed
    there = np.arange(14) != 9
    found = prune.representative(jnp.asarray(x), jnp.asarray(attention), jnp.asarray(there))
    found = set(np.flatnonzero(found))
    assert found == chosen(x, attention, there)
    assert 1 < len(found) < 13


def test_attention_is_that_of_torch():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 5, 4, 3)).astype('f'), rng.normal(size=(2, 5, 2, 3)).astype('f')
    allowed = np.tril(np.ones((5, 5), bool))
    keys = torch.tensor(k).repeat_interleave(2, dim=2)
    scores = torch.einsum('blhd,bshd->bhls', torch.tensor(q), keys) / 3 ** 0.5
    scores = scores.masked_fill(~torch.tensor(allowed), -torch.inf)
    np.testing.assert_allclose(received(q, k, jnp.asarray(allowed)[None, None]),
                               scores.softmax(-1).mean((1, 2)), rtol=1e-5)


def test_the_default_base_is_pruned_by_what_its_items_give_it():
    """Each way leaves its own share; padding and pictures that are not there do not count."""
    base = bases.read(config_lib.get_config())
    reader = KnowledgeMLLM(base.module, 64)
    params = base.load(bases.shapes_of(reader, base.image_size)) | {'lora': {}}
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 1000, (9, 12)).astype(np.int32)
    content = SimpleNamespace(
        tokens=np.where(np.arange(12) < 7, tokens, -1), has_image=np.arange(9) % 2 > 0,
        image=rng.integers(0, 256, (9, 32, 32, 3)).astype(np.uint8))
    spec = SimpleNamespace(knowledge=reader, lora_scale=1.0, chunk=0)
    kernels = {}
    for by in prune.WAYS:
        out, record = prune.pruned(spec, params, content, share=0.5, by=by)
        kernels[by] = np.asarray(out['base']['decoder']['layers']['down']['kernel'])
        assert np.mean(record['zeros']) == pytest.approx(0.5, abs=0.01)
        assert (record['zeros'][0] == record['zeros'][1]) == (by != 'tamp')
        assert (record['tokens'] < 1) == (by == 'tamp')
    assert (kernels['wanda'] != kernels['magnitude']).any()
    content.tokens = content.tokens[:, :8]
    content.image = np.where(content.has_image[:, None, None, None], content.image, 0)
    again, _ = prune.pruned(spec, params, content, share=0.5, by='wanda')
    same = np.asarray(again['base']['decoder']['layers']['down']['kernel']) == kernels['wanda']
    assert same.mean() > 0.999
    assert jax.tree.all(jax.tree.map(np.array_equal, again['base']['vision'],
                                     params['base']['vision']))
