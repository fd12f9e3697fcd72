"""Which attribute follows which: a log-linear model with a lasso whose prior a text LLM may give.

    P(i | prefix) ~ exp(log popularity_i + sum_ab (F_ab x_a(first) + L_ab x_a(last)) x_b(i))

x_a(j) is 1 where item j has attribute a: a word of its text, or a value of a side feature. Weight j
has the penalty strength * importance_j^-gamma (LLM-Lasso, arXiv 2502.10648)
[paper]; gamma = 0 is the plain lasso, so that validation can drop a bad prior. Applying it to the
transitions of sessions is a choice of this project [ours].
"""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse as sp

from tpad_jax.core import files
from tpad_jax.data.catalogue import Data
from tpad_jax.data.sessions import Sessions, counts
from tpad_jax.errors import InputError, refuse_if, refusing

MOST = 256  # attributes that are read, the most frequent ones
ITEMS = 2**12  # the most frequent items, among which the likelihood is computed
CELLS = 2**22  # scores that a fit reads: of more rows it draws a sample
LEAST = 0.03  # importance of a pair that the prior does not name, relative to the largest one
PLACES = 'first', 'last'  # of the item of the prefix that has the earlier attribute
FIELDS = 'place', 'before', 'after', 'importance'  # columns of a prior's file


class Attributes(NamedTuple):
    """Attributes of the items, and what is known of them beforehand.

    Attributes:
      rows: csr float [V + 1, A].
      names: of the A attributes, such as 'word=red' or 'brand=acme'.
      importance: float64 [2, A, A] in LEAST..1, by PLACES, earlier and later attribute; None: no
        prior.
      record: number of 'pairs' of the prior that were read, and of 'unknown' ones.
    """

    rows: sp.csr_array
    names: list[str]
    importance: np.ndarray | None = None
    record: dict = {}  # noqa: RUF012, it is never changed


def attributes(data: Data, prior: str | Path = '') -> Attributes:
    """Read the attributes of a catalogue, and the prior of a file.

    Args:
      data: the catalogue.
      prior: CSV file with the columns FIELDS: 'last,word=phone,word=case,0.9'; '': none.

    Raises:
      InputError: no two items share a word, or the prior is unusable.
    """
    from sklearn.feature_extraction.text import CountVectorizer  # slow to import

    vectorizer = CountVectorizer(binary=True, min_df=2, max_features=MOST,
                                 token_pattern=r'(?u)\b\w+\b')
    with refusing(ValueError, 'content_lasso: no two texts of items share a word',
                  'Expected item texts. Fix: leave it out of config.baselines'):
        parts = [sp.csr_array(vectorizer.fit_transform(data.texts), dtype=float)]
    names = [f'word={word}' for word in vectorizer.get_feature_names_out()]
    fields = list(data.vocabulary.items()) or [
        (f'side{j + 1}', ()) for j in range(data.side.shape[1])]
    for (field, values), ids, size in zip(fields, data.side.T, data.side_sizes, strict=True):
        hot = sp.csr_array((np.ones(len(ids)), (np.arange(len(ids)), ids)), shape=(len(ids), size))
        parts.append(hot[:, 1:])
        labels = values if values and isinstance(values[0], str) else range(1, size)
        names += [f'{field}={label}' for label in labels]
    rows = sp.csr_array(sp.hstack(parts))
    held = rows.sum(axis=0)
    chosen = np.sort(np.argsort(-held * (held < data.num_items), kind='stable')[:MOST])
    chosen = chosen[(held[chosen] > 1) & (held[chosen] < data.num_items)]
    out = Attributes(rows[:, chosen], [names[j] for j in chosen])
    return out if not prior else read_prior(out, Path(prior))


def read_prior(known: Attributes, file: Path) -> Attributes:
    """Add the importances of a file; pairs of attributes that no item has are counted.

    Args:
      known: attributes of the catalogue.
      file: see `attributes`.

    Raises:
      InputError: the file cannot be read, a line is malformed, or it names no known pair.
    """
    number = {name: j for j, name in enumerate(known.names)}
    importance, record = np.zeros((2, len(number), len(number))), {'pairs': 0, 'unknown': 0}
    with refusing((OSError, UnicodeDecodeError, csv.Error),
                  f'config.data.prior={str(file)!r}: it cannot be read',
                  f'Expected CSV with the columns {", ".join(FIELDS)}. Fix: correct it'):
        lines = list(csv.DictReader(file.read_text(encoding='utf-8').splitlines(), strict=True))
    for line, entry in enumerate(lines, start=2):
        try:
            place, value = PLACES.index(entry['place']), float(entry['importance'])
            pair = number.get(entry['before']), number.get(entry['after'])
            if not 0 <= value < np.inf:
                raise ValueError('the importance is negative or not finite')
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f'{file}, line {line}: {error}. Expected {",".join(FIELDS)}, the '
                             'place first or last, the importance 0 or more. Fix: correct it.'
                             ) from error
        record['unknown' if None in pair else 'pairs'] += 1
        if None not in pair:
            importance[place, *pair] = value
    refuse_if(not importance.any(), f'{file}: none of its {len(lines)} pairs has two attributes of '
              f'this catalogue and an importance above 0. Expected names such as '
              f'{known.names[0]!r}. Fix: use names of the catalogue.')
    return known._replace(importance=np.maximum(importance / importance.max(), LEAST),
                          record=record)


def write_prior(file: str | Path, known: Attributes, weights: np.ndarray) -> None:
    """Write |weights| that are not 0 as a prior for another catalogue.

    Args:
      file: CSV, see `attributes`.
      known: attributes of the weights.
      weights: float [2, A, A], as of `weights_of`, or importances.
    """
    lines = [f'{PLACES[p]},{known.names[a]},{known.names[b]},{abs(weights[p, a, b]):.6g}'
             for p, a, b in np.argwhere(weights)]
    files.write_text(Path(file), '\n'.join([','.join(FIELDS), *lines, '']))


def lasso(smooth: Callable, penalty: np.ndarray, *, rounds: int = 200, tolerance: float = 1e-4
          ) -> np.ndarray:
    """Minimise smooth(x) + sum penalty |x| by L-BFGS-B over the positive and the negative part.

    Args:
      smooth: float64 [n] -> value and gradient [n].
      penalty: float64 [n], above 0.
      rounds: largest number of iterations.
      tolerance: relative decrease of the objective at which it ends.

    Returns:
      float64 [n].
    """
    def objective(parts):
        more, less = np.split(parts, 2)
        value, slope = smooth(more - less)
        return value + penalty @ (more + less), np.concatenate([penalty + slope, penalty - slope])

    found = scipy.optimize.minimize(
        objective, np.zeros(2 * len(penalty)), jac=True, method='L-BFGS-B',
        bounds=scipy.optimize.Bounds(0, np.inf),
        options={'maxiter': rounds, 'maxfun': 2 * rounds, 'ftol': tolerance, 'gtol': 1e-9})
    return np.subtract(*np.split(found.x, 2))


def log_popularity(train: Sessions, num_items: int) -> np.ndarray:
    """Compute log(events + mean events), which gives a cold item half of the mean: [V + 1]."""
    events = counts(train, num_items).astype(float)
    return np.log(events + max(events[1:].mean(), 1e-9))


def weights_of(train: Sessions, num_items: int, known: Attributes, strength: float, gamma: float
               ) -> np.ndarray:
    """Fit the weights of pairs of attributes on training sessions.

    Among the most frequent items alone, the model has the same weights (independence of irrelevant
    alternatives, McFadden 1978), so that the rows of other targets are left out.

    Args:
      train: S sessions.
      num_items: V.
      known: attributes and prior.
      strength: mean penalty of the pairs that the prior names, or of all without a prior.
      gamma: how much the prior counts.

    Returns:
      float64 [2, A, A], by PLACES, earlier and later attribute.
    """
    events, size = counts(train, num_items), len(known.names)
    items = np.argsort(-events, kind='stable')[:min(ITEMS, (events > 0).sum())]
    column = np.full(num_items + 1, -1)
    column[items] = np.arange(len(items))
    begin = train.offsets[train.owner]
    end = np.flatnonzero((np.arange(len(begin)) > begin) & (column[train.items] >= 0))
    if len(end) * len(items) > CELLS:
        end = np.sort(np.random.default_rng(0).choice(end, CELLS // len(items), replace=False))
    penalty = np.ones((2, size, size))
    if known.importance is not None:
        penalty = known.importance ** -gamma
        penalty /= penalty[known.importance > LEAST].mean()
    rows, target = known.rows.astype(np.float32), column[train.items[end]]
    prefix = sp.csr_array(sp.hstack([rows[train.items[begin[end]]], rows[train.items[end - 1]]]))
    later = rows[items].toarray()
    actual = later[target]
    bias = log_popularity(train, num_items)[items].astype(np.float32)

    def smooth(x):
        scores = prefix @ x.reshape(2 * size, size).astype(np.float32) @ later.T + bias
        scores -= scores.max(axis=1, keepdims=True)
        gained = scores[np.arange(len(target)), target].sum(dtype=float)
        share = np.exp(scores, out=scores)
        total = share.sum(axis=1, keepdims=True)
        slope = prefix.T @ (share / total @ later - actual)
        return ((np.log(total).sum(dtype=float) - gained) / len(target),
                slope.ravel().astype(float) / len(target))

    return lasso(smooth, strength * penalty.ravel()).reshape(2, size, size)


def fit_content_lasso(train: Sessions, num_items: int, features: np.ndarray | Attributes,
                      strength: float = 0.005, gamma: float = 1.0) -> Callable:
    """Fit the model above; scores are its probabilities.

    Args:
      train: S sessions.
      num_items: V.
      features: `attributes`, or float [V + 1, A] without a prior.
      strength: of the penalty.
      gamma: power of the prior's importances; 0: the plain lasso.
    """
    if not isinstance(features, Attributes):
        features = Attributes(sp.csr_array(features), [f'{j}' for j in range(features.shape[1])])
    rows, bias = features.rows, log_popularity(train, num_items)
    first, last = weights_of(train, num_items, features, strength, gamma)
    later = rows.toarray().T

    def scorer(items):
        latest = items[np.arange(len(items)), np.maximum((items > 0).sum(axis=1) - 1, 0)]
        query = rows[items[:, 0]] @ first + rows[latest] @ last
        # rounded: a row's scores do not depend on the other rows, although BLAS may add differently
        scores = (query @ later + bias).round(9)
        share = np.exp(scores - scores.max(axis=1, keepdims=True))
        return (share / share.sum(axis=1, keepdims=True)).astype(np.float32)

    return scorer
