"""Codes of items: against scikit-learn by hand, what T makes of them, their parameters."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from sklearn.cluster import KMeans

from tests import tiny_stages
from tpad_jax.baselines import content_lasso
from tpad_jax.distributed import devices
from tpad_jax.errors import InputError
from tpad_jax.evaluation import scorers
from tpad_jax.features import codes
from tpad_jax.job import fitting, validate
from tpad_jax.models import outputs, tpad
from tpad_jax.mutual_information.critics import Critic
from tpad_jax.types import Batch


def test_codes_are_kmeans_of_what_the_levels_before_left():
    """Every item has a code of each level, cold ones as well, and a new one like it the same."""
    k = np.random.default_rng(0).normal(size=(41, 2, 8)).astype(np.float32)
    rest = (k / np.linalg.norm(k, axis=-1, keepdims=True)).reshape(41, -1)[1:]
    centres = codes.centres(k, 3, 5, seed=7)
    rows = np.asarray(codes.rows(k[1:], centres)).reshape(40, 3, 5)
    np.testing.assert_array_equal(rows.sum(-1), 1)
    for level in range(3):
        by_hand = KMeans(5, n_init=1, random_state=7 + level).fit(rest)
        np.testing.assert_array_equal(rows[:, level].argmax(-1), by_hand.labels_)
        np.testing.assert_allclose(centres[level], by_hand.cluster_centers_, atol=1e-5)
        rest = rest - by_hand.cluster_centers_[by_hand.labels_]
    np.testing.assert_array_equal(codes.rows(k[9:10], centres).reshape(3, 5), rows[8])
    np.testing.assert_array_equal(centres, codes.centres(k, 3, 5, seed=7))


def test_t_reads_codes_and_predicts_those_that_follow():
    """Scores gain the logits of an item's codes and words; kernels of zeros change nothing."""
    spec, params, catalogue = tiny_stages.model()
    width = spec.transfer.features
    spec = replace(spec, transfer=spec.transfer.clone(whole=True),
                   critics=(('distil', Critic('dot', width)),))
    coded = replace(spec, codes=(2, 3), words=True, transfer=spec.transfer.clone(codes=10))
    catalogue = catalogue | {
        'codes': codes.rows(catalogue['k'], codes.centres(catalogue['k'], 2, 3, seed=0)),
        'words': jnp.float32(np.arange((tiny_stages.V + 1) * 4).reshape(-1, 4) % 3 == 0),
        'popularity': jnp.arange(1.0, tiny_stages.V + 2)}
    batch = jax.tree.map(jnp.asarray, Batch.of(next(tiny_stages.draw('transfer'))))
    rng = np.random.default_rng(1)
    drawn = {'transfer/from_codes/kernel': rng.normal(size=(10, coded.transfer.base.width)),
             'transfer/to_codes/kernel': rng.normal(size=(width, 10))}

    def forward(model, scale):
        own = {path: jnp.float32(scale * x) for path, x in drawn.items()}
        tree = unflatten_dict(params | own, sep='/') | {'critic': {'distil': {}}}
        out = jax.jit(lambda: outputs.forward(model, tree, batch, catalogue, frozenset(
            {'p', 'teach.h', 'teach.z', 'teach.short'}), frozenset()))()
        return tree, out, np.einsum('bnd,vd->bnv', out['teach.h'], out['teach.z'])

    _, plain, expected = forward(spec, 1)
    _, still, scores = forward(coded, 0)
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    np.testing.assert_allclose(still['p'], plain['p'], atol=1e-6)
    tree, out, scores = forward(coded, 1)
    assert (np.abs(out['p'] - plain['p']).max(-1) > 1e-2)[np.asarray(batch.mask)].all()
    z, p, logits = (np.float64(x) for x in (
        out['teach.z'], out['p'], np.asarray(out['p']) @ drawn['transfer/to_codes/kernel']))
    held = np.concatenate([catalogue['codes'], catalogue['words']], axis=1)
    own = p / np.linalg.norm(p, axis=-1, keepdims=True) @ z[:, :width].T
    np.testing.assert_allclose(scores, own + logits @ held.T + z[:, -1], rtol=1e-4, atol=1e-4)
    first = np.asarray(batch.last) == 0
    assert first.any()
    np.testing.assert_allclose(out['teach.short'][first], out['teach.h'][first, 0], atol=1e-5)
    scorer = scorers.transfer_scorer(coded, devices.choose('jit', 1, 1).own)(tree, catalogue)
    np.testing.assert_allclose(
        scorer(np.asarray(batch.items))[:, 1:],
        scores[np.arange(len(scores)), batch.last][:, 1:], rtol=1e-4, atol=1e-4)


def test_words_are_the_most_frequent_ones_and_centres_of_another_run_stay():
    k = jnp.asarray(np.random.default_rng(0).normal(size=(4, 1, 2)), jnp.float32)
    data = SimpleNamespace(texts=['', 'red coat', 'a coat', 'red red shoe'], num_items=3,
                           side=np.array([[0], [1], [1], [2]]), vocabulary={'brand': ['x', 'y']})
    theirs = jnp.float32([[[-1, 0], [1, 0]]])
    job = SimpleNamespace(data=data, catalogue={'k': k}, params={codes.PATH: theirs},
                          taken={codes.PATH: theirs}, config=SimpleNamespace(seed=0),
                          spec=SimpleNamespace(codes=(1, 2)))
    fitting.add_codes(job)
    words, names = fitting.word_rows(data), content_lasso.attributes(data).names
    assert names == ['brand=x', 'word=coat', 'word=red']  # of two items and more
    np.testing.assert_array_equal(words[:, :3],
                                  [[0, 0, 0], [1, 1, 1], [1, 1, 0], [0, 0, 1]])
    assert words.shape == (4, tpad.WORDS) == (4, content_lasso.MOST)
    data.texts, data.side = ['', 'a', 'b', 'c'], data.side[:, :0]
    data.vocabulary = {}
    with pytest.raises(InputError, match='no two items share a word'):
        fitting.word_rows(data)
    assert job.params[codes.PATH] is theirs
    np.testing.assert_array_equal(job.catalogue['codes'][1:, 1], np.asarray(k)[1:, 0, 0] > 0)
    assert not job.catalogue['codes'][0].any()


def test_codes_have_parameters_where_they_are_on_and_need_the_option():
    spec, params, catalogue = tiny_stages.model()
    c = copy.deepcopy(tiny_stages.make_config())
    assert not any('codes' in path for path in params)
    c.model.codes = (2, 3)
    coded = tpad.build(spec.knowledge.base, c.model, recommend=('r',), items=tiny_stages.V,
                       max_length=tiny_stages.N, side_sizes=tiny_stages.DATA.side_sizes)
    shapes = jax.eval_shape(
        partial(tpad.init, spec=coded, catalogue=catalogue, rank=2, targets=c.model.lora_targets,
                image_shape=(tiny_stages.SIDE,) * 2 + (3,), text_length=tiny_stages.T),
        jax.random.key(0))
    assert set(flatten_dict(shapes, sep='/')) - set(params) == {
        codes.PATH, 'transfer/from_codes/kernel', 'transfer/to_codes/kernel'}
    c.model.codes, c.model.recommend = (), 'r,codes'
    with pytest.raises(InputError, match=r"reads the rows 'codes', and config\.model"):
        validate.check(c)
    c.model.codes = (3, 1)
    with pytest.raises(InputError, match=r'config.model.codes=\(3, 1\) is not usable'):
        validate.check(c)
