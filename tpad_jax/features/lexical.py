"""Rows of the words of item texts: TF-IDF and a truncated SVD, which no language model made [ours].

The control `lexical_only` reads them: a language model that is worth its cost beats them.
"""

from collections.abc import Sequence

import numpy as np

from tpad_jax.config import names

WIDTH = 256  # of a row; longer ones predicted no better on real titles
MAX_WORDS = 50_000  # the most frequent words that count, for a catalogue of millions
SAMPLE = 100_000  # texts that the SVD is computed of; of more it is a sample, drawn by the seed


def wanted(config, planted: bool) -> bool:
    """Whether a trained baseline of the run reads these rows.

    Args:
      config: of the run.
      planted: whether the catalogue is the planted one. Its texts are made from attributes, which
        the trained baseline true_attributes reads directly.
    """
    return not planted and any('lexical' in names(x.recommend) for x in config.rivals.values())


def rows(texts: Sequence[str], seed: int) -> np.ndarray:
    """Compute a row for every item's text.

    Args:
      texts: of the items by id, [0] being ''.
      seed: of the SVD's random projection, and of its sample.

    Returns:
      float32 [V + 1, WIDTH]. A text without words has zeros, and so have columns beyond the rank.
    """
    # imported where it is first needed: it is slow, and only catalogues of real texts need it
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    out = np.zeros((len(texts), WIDTH), np.float32)
    words = TfidfVectorizer(sublinear_tf=True, max_features=MAX_WORDS, dtype=np.float32)
    if any(map(words.build_analyzer(), texts)):
        table = words.fit_transform(texts)
        if table.shape[1] > 1:
            part = table if len(texts) <= SAMPLE else table[np.sort(
                np.random.default_rng(seed).choice(len(texts), SAMPLE, replace=False))]
            svd = TruncatedSVD(min(WIDTH, *part.shape), random_state=seed).fit(part)
            table = table @ svd.components_.T
        else:
            table = table.toarray()
        out[:, :table.shape[1]] = table
    return out
