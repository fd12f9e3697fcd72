"""Blended adapters against their dense deltas, kernel by kernel and entry by entry."""

import numpy as np
import pytest

from tpad_jax import config as base
from tpad_jax.errors import InputError
from tpad_jax.job import validate
from tpad_jax.nn import linear
from tpad_jax.training import handover, merge_adapters

SHAPES = {('layers', 'q'): (3, 6, 4), ('layers', 'down'): (3, 4, 7), ('head',): (5, 5)}
RANK = 2


def adapter(seed):
    rng = np.random.default_rng(seed)
    out = {}
    for path, (*stack, rows, columns) in SHAPES.items():
        out[*path, 'a'] = rng.normal(size=(*stack, rows, RANK)).astype(np.float32)
        out[*path, 'b'] = rng.normal(size=(*stack, RANK, columns)).astype(np.float32)
    return out


ONE, TWO = adapter(0), adapter(1)


def delta(tree, path):
    return np.float64(tree[*path, 'a']) @ np.float64(tree[*path, 'b'])


@pytest.mark.parametrize(('kind', 'first', 'second'), [('sum', 2, -0.5), ('mean', 4 / 3, -1 / 3)])
def test_sums_and_means_are_exact(kind, first, second):
    """As factors side by side, of the ranks together."""
    found = merge_adapters.blend([ONE, TWO], kind=kind, weights=(2.0, -0.5))
    for path in SHAPES:
        assert found[*path, 'a'].shape[-1] == found[*path, 'b'].shape[-2] == 2 * RANK
        np.testing.assert_allclose(delta(found, path),
                                   first * delta(ONE, path) + second * delta(TWO, path), atol=1e-6)


def test_pictures_keep_the_adapter_that_sees_and_words_are_merged():
    trees = [{path: np.stack([adapter(3 * seed + kind)[path] for kind in range(3)], axis=-3)
              for path in ONE} for seed in (0, 1)]
    found = merge_adapters.blend(trees, kind='damc', weights=(1.0, 3.0))
    for path in SHAPES:
        one, two = (delta(tree, path) for tree in trees)
        expected = 0.25 * one + 0.75 * two
        expected[..., linear.IMAGE, :, :] = two[..., linear.IMAGE, :, :]
        np.testing.assert_allclose(delta(found, path), expected, atol=1e-6)
    alone = merge_adapters.blend(trees[:1], kind='damc', weights=(1.0,))
    for path, x in alone.items():
        np.testing.assert_array_equal(x, trees[0][path])


def numpy_ties(trees, weights, keep):
    """TIES as its paper tells it, on one long vector per task, entry by entry."""
    vectors = []
    for tree, weight in zip(trees, weights, strict=True):
        whole = np.concatenate([delta(tree, path).ravel() for path in SHAPES]) * weight
        order = np.argsort(-np.abs(whole))[:round(keep * len(whole))]
        trimmed = np.zeros_like(whole)
        trimmed[order] = whole[order]
        vectors.append(trimmed)
    out = []
    for entries in zip(*vectors, strict=True):
        sign = np.sign(sum(entries))
        same = [x for x in entries if x * sign > 0]
        out.append(sum(same) / len(same) if same else 0.0)
    ends = np.cumsum([np.prod(shape) for shape in SHAPES.values()])
    parts = np.split(np.array(out), ends[:-1])
    return {p: x.reshape(SHAPES[p]) for p, x in zip(SHAPES, parts, strict=True)}


@pytest.mark.parametrize('keep', [0.2, 0.7, 1.0])
def test_ties_against_its_definition(keep):
    found = merge_adapters.blend([ONE, TWO], kind='ties', weights=(1.0, 1.5), keep=keep)
    expected = numpy_ties([ONE, TWO], (1.0, 1.5), keep)
    for path in SHAPES:
        np.testing.assert_allclose(delta(found, path), expected[path], rtol=1e-6, atol=1e-7)
    one, two = ({p: delta(t, p) for p in SHAPES} for t in (ONE, TWO))
    assert any((np.sign(one[p]) != np.sign(two[p])).any() for p in SHAPES)


def test_a_rank_leaves_out_what_it_says():
    """The nearest of a rank: none of rank 3 is nearer than the singular values left out."""
    whole = merge_adapters.blend([ONE, TWO], kind='ties', keep=0.5)
    found = merge_adapters.blend([ONE, TWO], kind='ties', keep=0.5, rank=3)

    def lost(found, whole):
        missed = sum(((delta(whole, p) - delta(found, p)) ** 2).sum() for p in SHAPES)
        return (missed / sum((delta(whole, p) ** 2).sum() for p in SHAPES)) ** 0.5

    left, norm = lost(found, whole), sum((delta(whole, p) ** 2).sum() for p in SHAPES)
    assert 0.05 < left < 0.7
    values = np.concatenate([np.linalg.svd(delta(whole, p), compute_uv=False)[..., 3:].ravel()
                             for p in SHAPES])
    assert left == pytest.approx(((values**2).sum() / norm) ** 0.5, rel=1e-5)
    total = merge_adapters.blend([ONE, TWO], kind='sum')
    assert lost(merge_adapters.blend([ONE, TWO], kind='sum', rank=2 * RANK), total) < 1e-6


def test_adapters_of_a_run_are_blended_under_the_name_distil():
    config = base.get_config()
    config.model.blend.update(kind='sum', weights='1,0.5')
    params = {'lora/distil/q/a': np.zeros(()), 'base/q/kernel': np.ones(2)}
    for name, tree in (('knowledge', ONE), ('transfer', TWO)):
        params |= {'/'.join(('lora', name, *path)): x for path, x in tree.items()}
    found = handover.blended(params, config)
    assert found.keys() - params.keys() == {f'lora/distil/{"/".join(path)}' for path in ONE}
    assert params.keys() - found.keys() == {'lora/distil/q/a'}
    pair = {(n,): np.asarray(found[f'lora/distil/head/{n}']) for n in 'ab'}
    np.testing.assert_allclose(delta(pair, ()), delta(ONE, ('head',)) + delta(TWO, ('head',)) / 2,
                               atol=1e-5)


@pytest.mark.parametrize(('changes', 'told'), [
    ({'model.blend.kind': 'product'}, "config.model.blend.kind='product' is not usable"),
    ({'model.blend.kind': 'sum', 'model.blend.of': 'distil'}, 'config.model.blend.of='),
    ({'model.blend.kind': 'sum', 'model.blend.weights': '1'}, 'expected one number for each of'),
    ({'model.blend.kind': 'sum', 'model.blend.weights': 'nan,1'}, 'expected one number for'),
    ({'model.blend.kind': 'sum', 'model.reread': False}, 'leave one out'),
    ({'model.blend.kind': 'sum'}, 'reads r.*, which stage transfer does not compute '
                                  '.config.model.blend makes r, which no loss trains'),
    ({'losses.clusters.weight': 0.1}, 'it reads cluster, .*config.model.clusters is 0'),
    ({'losses.teach_text.weight': 1.0}, 'reads teacher.text, .*names no teacher'),
    ({'losses.mdist_text.stages': 'recommend', 'losses.mdist_text.weight': 1.0},
     'stage recommend reads no content'),
])
def test_refused(changes, told):
    config = base.get_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(InputError, match=told):
        validate.check(config)
