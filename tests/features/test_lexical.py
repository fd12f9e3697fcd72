"""Rows of words against TF-IDF by its formula."""

import numpy as np

from tpad_jax.features import lexical

TEXTS = ['', 'red red pen', 'blue pen', 'paper', 'red paper tray', '']


def test_products_of_rows_are_those_of_tf_idf():
    words = sorted({word for text in TEXTS for word in text.split()})
    count = np.array([[text.split().count(word) for word in words] for text in TEXTS], float)
    seen = (count > 0).sum(axis=0)
    table = np.log(np.maximum(count, 1)) + (count > 0)
    table *= np.log((1 + len(TEXTS)) / (1 + seen)) + 1
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
    found = lexical.rows(TEXTS, seed=0)
    assert found.shape == (len(TEXTS), lexical.WIDTH)
    np.testing.assert_allclose(found @ found.T, table @ table.T, atol=1e-6)
    assert not found[[0, 5]].any()


def test_a_sample_of_many_texts_gives_the_same_products(monkeypatch):
    """Forty texts of four kinds: a sample of ten has the words of them all."""
    many = ['', *TEXTS[1:5] * 10]
    whole = lexical.rows(many, seed=0)
    monkeypatch.setattr(lexical, 'SAMPLE', 10)
    found = lexical.rows(many, seed=0)
    assert not found[:, 10:].any()
    np.testing.assert_allclose(found @ found.T, whole @ whole.T, atol=1e-6)


def test_texts_without_words_have_rows_of_zeros():
    assert not lexical.rows(['', ' ', '!'], seed=0).any()
