"""The content lasso: its solver against scikit-learn, its expert against its scorer, its prior."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.sparse as sp
from sklearn.linear_model import Lasso

from tests.evaluation.test_experts import V, drawn, prefixes
from tpad_jax.baselines import content_lasso
from tpad_jax.errors import InputError
from tpad_jax.evaluation import experts as fitting
from tpad_jax.models import experts

WORDS = ['red', 'blue', 'green', 'mug', 'hat']
DATA = SimpleNamespace(
    texts=['', *(f'{WORDS[n % 3]} {WORDS[3 + n % 2]} only{n}' for n in range(V))], num_items=V,
    side=np.append(0, 1 + np.arange(V) % 2)[:, None], vocabulary={'brand': ['acme', 'ember']})


def test_weighted_lasso_is_a_lasso_on_columns_divided_by_the_weights():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(80, 30)), 0.1 + 3 * rng.random(30)
    y = x[:, :5] @ [3.0, -2, 1, 0.5, 0.1] + rng.normal(size=80)
    theirs = Lasso(alpha=0.1, fit_intercept=False, tol=1e-14, max_iter=10**6).fit(
        x / weights, y).coef_ / weights

    def smooth(b):
        gap = x @ b - y
        return gap @ gap / 160, x.T @ gap / 80

    ours = content_lasso.lasso(smooth, 0.1 * weights, rounds=5000, tolerance=1e-15)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert 5 < (theirs != 0).sum() < 30


def test_the_expert_adds_the_scores_of_the_rule():
    train, known = drawn(0, 200), content_lasso.attributes(DATA)
    assert known.names == sorted([*(f'word={word}' for word in WORDS), 'brand=acme',
                                  'brand=ember'])
    weights = content_lasso.weights_of(train, V, known, 1e-3, 0.0)
    assert 0 < (weights != 0).sum() < weights.size
    bias = content_lasso.log_popularity(train, V)
    items = prefixes(drawn(1, 12)).items
    table = fitting.tables(train, V, None, ordered=True) | content_lasso.factors(known, weights)
    off = {name: 0.0 for name in fitting.WEIGHTS} | {'lasso': 2.0}
    rules, columns = fitting.mixture(fitting.Fit(off, 0.0, 1, 0.6), table)
    h = experts.session_columns(rules, np.zeros((12, 0), np.float32), columns[items, 1:], items)
    ours, scores = np.asarray(h @ columns.T), content_lasso.scorer(known, weights, bias)(items)
    expected = 2 * (np.log(scores) - bias)
    np.testing.assert_allclose(ours - ours.mean(1, keepdims=True),
                               expected - expected.mean(1, keepdims=True), atol=1e-4)
    chosen = content_lasso.choose(train, prefixes(drawn(1, 50)), V, known)
    assert (chosen['gamma'], chosen['nll'] < np.log(V)) == (0, True)
    # the fit gives it weight, where it is the only one that knows an order
    fit = fitting.fit(lambda x: np.zeros((len(x), V + 1), np.float32), table,
                      prefixes(drawn(2, 100)), ['popularity', 'lasso'])
    assert fit.weights['lasso'] > 0.3


def test_a_prior_is_read_back_and_makes_its_pairs_cheap(tmp_path):
    known, file = content_lasso.attributes(DATA), tmp_path / 'prior.csv'
    importance = np.zeros((2, len(known.names), len(known.names)))
    importance[1, 2, 3], importance[0, 4, 4] = 0.4, 0.8
    content_lasso.write_prior(file, known, importance)
    with file.open('a') as out:
        out.write('last,word=red,word=unknown,1\n')
    prior = content_lasso.attributes(DATA, file)
    assert prior.record == {'pairs': 2, 'unknown': 1}
    np.testing.assert_allclose(prior.importance, np.maximum(importance / 0.8,
                                                            content_lasso.LEAST))
    train = drawn(0, 200)
    free, held = (content_lasso.weights_of(train, V, prior, 0.01, gamma) for gamma in (0.0, 2.0))
    rest = importance == 0
    assert (held[rest] != 0).sum() < (free[rest] != 0).sum()


@pytest.mark.parametrize(('text', 'message'), [
    ('place,before,after\nlast,word=red,word=hat\n', "line 2: 'importance'"),
    ('place,before,after,importance\nmiddle,word=red,word=hat,1\n', 'line 2: .*not in tuple'),
    ('place,before,after,importance\nlast,word=red,word=hat,-1\n', 'line 2: .*negative'),
    ('place,before,after,importance\nlast,word=x,word=y,1\n', 'none of its 1 pairs'),
    (None, 'cannot be read')])
def test_a_malformed_prior_is_refused(tmp_path, text, message):
    if text:
        (tmp_path / 'prior.csv').write_text(text)
    with pytest.raises(InputError, match=message):
        content_lasso.attributes(DATA, tmp_path / 'prior.csv')


def test_a_prior_that_nothing_reads_is_refused():
    config = SimpleNamespace(baselines='pop', experts='model', data=SimpleNamespace(prior='x.csv'))
    with pytest.raises(InputError, match=r'config.data.prior=.x.csv.: nothing reads it'):
        content_lasso.wanted(config, DATA)
    config.data.prior = ''
    assert content_lasso.wanted(config, DATA) is None


def test_factors_of_new_items_are_those_of_a_fit_that_knew_them():
    rng = np.random.default_rng(0)
    rows = sp.csr_array((rng.random((41, 12)) < 0.4).astype(np.float32))
    weights = rng.normal(size=(2, 12, 12))
    whole, part = (content_lasso.factors(content_lasso.Attributes(x, list('abcdefghijkl')), weights)
                   for x in (rows, rows[:31]))
    found = content_lasso.extended({n: x for n, x in part.items() if n != 'attributes'}, rows)
    for name, like in whole.items():
        np.testing.assert_allclose(found[name], like, atol=1e-4, err_msg=name)


def test_penalties_that_leave_no_weight_do_not_end_the_search(monkeypatch):
    monkeypatch.setattr(content_lasso, 'STRENGTHS', (9.0, 8.0, 1e-3))
    chosen = content_lasso.choose(drawn(0, 200), prefixes(drawn(1, 50)), V,
                                  content_lasso.attributes(DATA))
    assert (chosen['strength'], chosen['weights'].any()) == (1e-3, True)
