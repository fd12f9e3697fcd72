"""Lists under conditions against brute force in numpy; MMR; reasons; what is refused."""

from collections import Counter

import numpy as np
import polars as pl
import pytest

import tpad_jax
from tests import tiny_served
from tests.tiny_served import V
from tpad_jax.errors import InputError
from tpad_jax.serving import ann, recommender, rerank, topk

CAPS = {'most_per_brand': 'brand', 'most_per_category': 'category'}


@pytest.fixture(scope='module')
def made(base_dir, tmp_path_factory):
    """Recommender and scorer of a run with experts; its prices are 0 to 6 and its brands three."""
    workdir = tmp_path_factory.mktemp('served') / 'run'
    _, scores = tiny_served.write(workdir, base_dir, mixed=True, mllm=False, recommend='')
    shop = tpad_jax.load(workdir)
    # categories of two levels, and items without a brand or price
    names = pl.Series('category', [f'{"xy"[n % 2]} > {n % 5}' for n in range(1, V + 1)])
    table = shop.table.attributes.with_columns(
        names, brand=pl.when(pl.int_range(V) % 7 > 0).then('brand'),
        price=pl.when(pl.int_range(V) % 11 > 0).then('price'))
    shop.table = shop.table._replace(attributes=table)
    return shop, scores, workdir


def drawn(rng, ids):
    """Random conditions, often several."""
    some = [str(x) for x in rng.choice(ids, 12, replace=False)]
    low = int(rng.integers(0, 4))
    every = {
        'items': [*some, *ids[:15]], 'not_items': some, 'in_stock': [*ids[5:], 'no such'],
        'categories': ['x', 'y > 1'], 'not_categories': ['y > 3'], 'brands': ['brand 1', 'brand 2'],
        'not_brands': ['brand 0'], 'price': [low, None if low == 3 else low + 2], 'unseen': True,
        'boost': {name: float(x) for name, x in zip(some, rng.normal(size=12), strict=True)},
        'most_per_brand': int(rng.integers(1, 3)), 'most_per_category': int(rng.integers(1, 3))}
    names = rng.choice(list(every), rng.integers(1, 5), replace=False)
    return {name: every[name] for name in names}


def brute(shop, scores, prefix, conditions, seen, k):
    """The list by sorting all scores and looking at one item after the other."""
    row = shop.table.attributes.rows(named=True)
    row = [{'id': name, **row} for name, row in zip(shop.ids[1:], row, strict=True)]
    total = scores[1:].astype(np.float64)
    for name, more in conditions.get('boost', {}).items():
        total[shop.ids.index(name) - 1] += np.float32(more)

    def fits(item):
        def named(field):
            value = item[{'brands': 'brand', 'categories': 'category'}[field.split('_')[-1]]]
            return value is not None and any(
                value == x or value.startswith(x + ' > ') for x in conditions[field])

        low, high = (0, None) if 'price' not in conditions else conditions['price']
        return all([
            item['id'] in conditions.get('items', shop.ids),
            item['id'] not in conditions.get('not_items', ()),
            item['id'] in conditions.get('in_stock', shop.ids),
            'categories' not in conditions or named('categories'),
            'brands' not in conditions or named('brands'),
            'not_categories' not in conditions or not named('not_categories'),
            'not_brands' not in conditions or not named('not_brands'),
            'price' not in conditions or (item['price'] is not None and low <= item['price'] and (
                high is None or item['price'] <= high)),
            not conditions.get('unseen') or item['id'] not in prefix, item['id'] not in seen])

    out, counts = [], Counter()
    for n in np.argsort(-total, kind='stable'):
        groups = [(field, row[n][column]) for field, column in CAPS.items()
                  if field in conditions and row[n][column] is not None]
        if fits(row[n]) and all(counts[group] < conditions[group[0]] for group in groups):
            counts.update(groups)
            out.append(row[n]['id'])
    return out[:k]


def test_lists_are_those_of_brute_force_and_one_program_makes_them(made, monkeypatch):
    shop, scores, _ = made
    monkeypatch.setattr(recommender.calls, 'LENGTHS', (6, V, 100))  # "at most n" searches again
    rng, lengths, programs = np.random.default_rng(0), Counter(), shop._search._cache_size()
    for number in range(60):
        rows = tiny_served.prefixes(4, seed=number)
        conditions, k = drawn(rng, shop.ids[1:]), 6
        sessions = [[f'I{n}' for n in row if n] for row in rows]
        seen = [[f'I{n}' for n in rng.integers(1, V + 1, 3)] for _ in rows] if number % 3 else None
        answer = shop.recommend(sessions, k, conditions, seen=seen)
        for n, whole in enumerate(scores(rows)):
            like = brute(shop, whole, sessions[n], conditions, seen[n] if seen else (), k)
            assert answer.items[n] == like, conditions
            assert np.isfinite(answer.scores[n]).sum() == len(like)
            lengths[len(like) == k] += 1
    assert min(lengths.values()) > 10, 'too few lists are complete, or too few are not'
    assert shop._search._cache_size() - programs <= 4  # of 16 rows and 1, with boosts and without


def test_an_empty_session_gets_the_allowed_items_with_most_events(made):
    shop = made[0]
    every = shop.recommend([[]], V).items[0]
    conditions = {'not_items': every[:3], 'most_per_brand': 2, 'price': [1, 6]}
    like = brute(shop, -np.array([0, *(every.index(name) for name in shop.ids[1:])]), (),
                 conditions, (), 10)
    answer = shop.recommend([[], ['I1']], 10, conditions)
    assert answer.items[0] == like
    assert np.isnan(answer.scores[0]).all()


def test_masks_over_several_chunks():
    rng, total = np.random.default_rng(0), 5000
    h = rng.integers(-3, 4, (9, 6)).astype(np.float32)
    z = rng.integers(-2, 3, (topk.rounded(total, 2048), 6)).astype(np.float32)
    masks = rng.random((9, len(z))) < [[0.5], [0.01], [0.001]] * 3
    bits = np.stack([topk.packed(mask) for mask in masks])
    hidden = np.flatnonzero(masks[0])[:40]
    topk.clear(bits[0], np.append(hidden, hidden[:3]))
    masks[0, hidden] = False
    np.testing.assert_array_equal([topk.unpacked(x) for x in bits], masks)
    scores, items = map(np.asarray, topk.top_k(h, z, total, 30, chunk=2048, allowed=bits))
    masks[:, 0], masks[:, total:] = False, False
    for n, mask in enumerate(masks):
        own = np.flatnonzero(mask)
        like = own[np.argsort(-(z[own] @ h[n]), kind='stable')[:30]]
        np.testing.assert_array_equal(items[n, :len(like)], like)
        assert (scores[n, len(like):] == -np.inf).all()


def test_an_approximate_index_is_exact_under_conditions():
    rng = np.random.default_rng(0)
    z, h = rng.normal(size=(500, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    allowed = np.append(False, rng.random(500) < 0.1)
    items, shift = rng.integers(1, 501, (5, 4)), rng.normal(size=(5, 4)).astype(np.float32)
    lists, _ = ann.search(ann.build(z, threads=1), h, 10, (items, shift), allowed)
    whole = np.where(allowed, np.pad(h @ z.T, ((0, 0), (1, 0))), -np.inf)
    whole[np.arange(5)[:, None], items] += shift
    np.testing.assert_array_equal(lists, np.argsort(-whole, axis=1)[:, :10])


def test_mmr_is_the_greedy_choice(made):
    shop, scores, _ = made
    rows, diversity = tiny_served.prefixes(5), 0.6
    sessions = [[f'I{n}' for n in row if n] for row in rows]
    answer = shop.recommend(sessions, V, {'diversity': diversity, 'brands': ['brand 1']})
    z = shop.vectors(np.arange(V + 1)).astype(np.float64)
    z /= np.linalg.norm(z, axis=1, keepdims=True) + 1e-30
    for n, whole in enumerate(scores(rows)):
        own = [shop.ids.index(x) for x in shop.recommend([sessions[n]], V,
                                                         {'brands': ['brand 1']}).items[0]]
        share = (whole[own] - whole[own].min()) / np.ptp(whole[own])
        left, order = list(range(len(own))), []
        while left:
            value = [(1 - diversity) * share[i] - diversity * max(
                [0.0, *(z[own[i]] @ z[own[j]] for j in order)]) for i in left]
            order.append(left.pop(int(np.argmax(value))))
        assert answer.items[n] == [shop.ids[own[i]] for i in order]
    assert shop.recommend(sessions, 9, {'diversity': 0}).items == shop.recommend(sessions, 9).items


def test_a_reranker_reads_the_first_items_only(made, monkeypatch):
    shop = made[0]
    monkeypatch.setattr('tpad_jax.serving.conditions.FIRST', 5)

    def backwards(items, scores, context):
        assert items.shape == scores.shape == (1, 5)
        assert context.prefixes[0, 0] == 1
        return -scores

    like = shop.recommend([['I1']], 9).items[0]
    found = shop.recommend([['I1']], 9, rerank=backwards).items[0]
    assert found == like[:5][::-1] + like[5:]
    assert rerank.diverse(0.5) is rerank.diverse(0.5)  # sessions of one number share a call


def test_reasons(made):
    shop = made[0]
    conditions = {'price': [2, 6], 'most_per_brand': 1, 'unseen': True}
    answer = shop.recommend([['I2', 'I9']], 4, conditions, explain=True)
    why, plain = answer.why[0], shop.recommend([['I2', 'I9']], 4).items[0]
    assert [x['item'] for x in why['missing']] == [x for x in plain if x not in answer.items[0]]
    price = shop.table.attributes['price']
    for x in why['missing']:
        row = int(x['item'][1:]) - 1
        cheap = price[row] is None or price[row] < 2
        assert ('price' in x['by']) == cheap
        assert ('seen' in x['by']) == (x['item'] in ('I2', 'I9'))
        assert x['by'] == ['most_per_brand'] or cheap or 'seen' in x['by']
    assert why['removed'] == {'price': int((~(price >= 2).fill_null(False)).sum()), 'seen': 2}
    assert len(why['items']) == len(answer.items[0])
    z = shop.vectors(np.arange(V + 1))
    for name, x in zip(answer.items[0], why['items'], strict=True):
        assert x['expert'] in ('model', 'popularity', 'content', 'held', 'transitions',
                               'followers', 'companions', 'neighbours')
        for other, cosine in x['near']:
            a, b = z[int(name[1:])], z[int(other[1:])]
            assert cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-3)


@pytest.mark.parametrize(('conditions', 'said'), [
    ({'items': ['I1', 'x']}, r"conditions\.items: 1 of 2 ids are not in the catalogue \('x'\)"),
    ({'boost': {'x': 1.0}}, r'conditions\.boost: 1 of 1 ids are not in the catalogue'),
    ({'in_stock': ['x']}, r'conditions\.in_stock: 1 of 1 ids are not in the catalogue'),
    ({'brands': ['brand 1', 'acme']}, r"conditions\.brands: no item has 'acme'"),
    ({'not_categories': ['x > ']}, r"conditions\.not_categories: no item has 'x > '"),
    ({'price': [5, 2]}, r'conditions\.price=\[5, 2\]: it cannot be used.*lowest, highest'),
    ({'price': [float('nan'), 2]}, r'conditions\.price='), ({'price': 3}, r'conditions\.price=3'),
    ({'price': [10**400, None]}, r'conditions\.price='), ({'unseen': 1}, r'conditions\.unseen=1'),
    ({'items': 'I1'}, r"conditions\.items='I1'"), ({'boost': {'I1': 'x'}}, r'conditions\.boost='),
    ({'most_per_brand': 0}, r'conditions\.most_per_brand=0.*whole number from 1'),
    ({'most_per_brand': True}, r'most_per_brand=True'), ({'diversity': 2}, r'diversity=2'),
    ({'colour': 'red'}, r'conditions\.colour: unknown. Expected some of items'),
    ([1], r'conditions=\[1\]: not a dict')])
def test_unusable_conditions(made, conditions, said):
    with pytest.raises(InputError, match=f'(?s){said}.*Fix:'):
        made[0].recommend([['I1']], 3, conditions)


def test_an_artefact_without_attributes_refuses_by_name_and_added_items_have_them(made, tmp_path):
    workdir = made[2]
    old = recommender.load(workdir)
    old.table = old.table._replace(attributes=old.table.attributes.select())
    assert old.recommend([['I1']], 3, {'not_items': ['I2']}).items
    for conditions in ({'price': [1, 2]}, {'most_per_brand': 1}):
        with pytest.raises(InputError, match=r'the served run stores no (price|brand) of'):
            old.recommend([['I1']], 3, conditions)
    more = recommender.load(workdir)
    vector = more.embed_items(['I1'])
    more._append(vector, ['new'], ['new'], pl.DataFrame(
        {'brand': ['acme'], 'category': [None], 'price': [9.0]}, recommender.artifact.ATTRIBUTES))
    assert more.recommend([['I1']], 3, {'price': [8, None]}).items == [['new']]
    more.save_added(tmp_path / 'added')
    other = recommender.load(workdir)
    other.restore_added(tmp_path / 'added')
    assert other.recommend([['new']], 3, {'brands': ['acme']}).items == [['new']]
