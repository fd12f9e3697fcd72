"""Which attribute follows which: a log-linear model with a lasso whose prior a text LLM may give.

    P(i | prefix) ~ exp(log popularity_i + sum_ab (F_ab x_a(first) + L_ab x_a(last)) x_b(i))

x_a(j) is 1 where item j has attribute a: a word of its text, or a value of a side feature. Weight j
has the penalty strength * importance_j^-gamma (LLM-Lasso, arXiv 2502.10648)
[paper]; gamma = 0 is the plain lasso, so that validation can drop a bad prior. Applying it to the
transitions of sessions is a choice of this project [ours].
"""

import csv
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.optimize
import scipy.sparse as sp
import scipy.special

from tpad_jax.core import files
from tpad_jax.data import catalogue, missing
from tpad_jax.data.sessions import Rows, Sessions, counts
from tpad_jax.errors import InputError, refuse_if, refusing

MOST = 256  # attributes that are read, the most frequent ones
ITEMS = 2**12  # the most frequent items, among which the likelihood is computed
CELLS = 2**22  # scores that a fit reads: of more rows it draws a sample
RANK = 32  # of the weights that an expert reads
PART = 2**14  # items at a time
LEAST = 0.03  # importance of a pair that the prior does not name, relative to the largest one
PLACES = 'first', 'last'  # of the item of the prefix that has the earlier attribute
FIELDS = 'place', 'before', 'after', 'importance'  # columns of a prior's file
STRENGTHS = 4e-2, 2e-2, 1e-2, 5e-3, 2.5e-3, 1e-3  # that `choose` tries, while they get better
GAMMAS = 0.0, 1.0, 2.0


class Attributes(NamedTuple):
    """Attributes of the items, and what is known of them beforehand.

    Attributes:
      rows: csr float [V + 1, A].
      names: of the A attributes, such as 'word=red' or 'brand=acme'.
      importance: float64 [2, A, A] in LEAST..1, by PLACES, earlier and later attribute; None: no
        prior.
      record: number of 'pairs' of the prior that were read, and of 'unknown' ones;
        None: no prior.
    """

    rows: sp.csr_array
    names: list[str]
    importance: np.ndarray | None = None
    record: dict | None = None


def named(texts: Iterable[str], side: np.ndarray, vocabulary: dict) -> Iterator[set[str]]:
    """Yield the names of each item's attributes, such as 'word=red' and 'brand=acme'.

    Args:
      texts: of n items.
      side: int [n, S]. Ids of side features, 0 for none.
      vocabulary: of the side features, or {}: their names are 'side1=3' and so on.
    """
    fields = list(vocabulary.items()) or [(f'side{j + 1}', ()) for j in range(side.shape[1])]
    labels = [(field, values if values and isinstance(values[0], str) else None)
              for field, values in fields]
    for text, ids in zip(texts, side.tolist(), strict=True):
        yield {f'word={word}' for word in re.findall(r'\w+', text.lower())} | {
            f'{field}={values[id_ - 1] if values else id_}'
            for (field, values), id_ in zip(labels, ids, strict=True) if id_}


def held(items: Iterable[set[str]], names: list[str]) -> sp.csr_array:
    """Look up which attributes n items have: csr float [n, A] of 0 and 1."""
    number = {name: j for j, name in enumerate(names)}
    cells = [sorted(number[name] for name in item & number.keys()) for item in items]
    ends = np.cumsum([0, *map(len, cells)])
    columns = np.array([j for row in cells for j in row], int)
    return sp.csr_array((np.ones(len(columns), np.float32), columns, ends),
                        shape=(len(cells), len(names)))


def wanted(config, data: catalogue.Data) -> Attributes | None:
    """Read the attributes if a baseline or an expert of the config reads them.

    Returns:
      `attributes`; None: nothing reads them, or only the expert would and there are none.

    Raises:
      InputError: as of `attributes`; or there is a prior that neither reads; or the baseline has no
        attributes.
    """
    baseline, prior = 'content_lasso' in config.baselines.split(','), config.data.prior
    reads = baseline or 'lasso' in config.experts.split(',')
    refuse_if(prior and not reads, f'config.data.prior={prior!r}: nothing '
              'reads it. Expected content_lasso in config.baselines, or lasso in config.experts. '
              'Fix: add one, or leave the prior out.')
    # as of all that reads content, without the texts that an experiment takes away
    known = attributes(missing.hide(data, config.data.missing, config.data.seed)[0], prior
                       ) if reads else None
    refuse_if(known is None and (baseline or prior), 'content_lasso: no two items share a word or '
              'a side feature. Expected item texts. Fix: leave it out of config.baselines, and '
              'config.data.prior empty.')
    return known


def attributes(data: catalogue.Data, prior: str | Path = '') -> Attributes | None:
    """Read the most frequent attributes of a catalogue, and the prior of a file.

    Args:
      data: the catalogue.
      prior: CSV file with the columns FIELDS: 'last,word=phone,word=case,0.9'; '': none.

    Returns:
      Attributes, or None: no two items share one.

    Raises:
      InputError: the prior is unusable.
    """
    held_by = Counter(name for item in named(data.texts, data.side, data.vocabulary)
                      for name in item)
    names = sorted(name for name, n in held_by.items() if 1 < n < data.num_items)
    if not names:
        return None
    names = sorted(sorted(names, key=lambda name: -held_by[name])[:MOST])
    known = Attributes(held(named(data.texts, data.side, data.vocabulary), names), names)
    return read_prior(known, Path(prior)) if prior else known


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


def lasso(smooth: Callable, penalty: np.ndarray, start: np.ndarray | None = None, *,
          rounds: int = 200, tolerance: float = 3e-4) -> np.ndarray:
    """Minimise smooth(x) + sum penalty |x| by L-BFGS-B over the positive and the negative part.

    Coordinates at 0 whose gradient is within the penalty stay out of the search, and are looked at
    again after it (an active set; Tibshirani et al., "Strong rules", 2012).

    Args:
      smooth: float64 [n] -> value and gradient [n].
      penalty: float64 [n], above 0.
      start: float64 [n], where it begins; None: 0.
      rounds: largest number of iterations of a search.
      tolerance: relative decrease of the objective at which a search ends; and a hundredth of the
        share of the active coordinates below which newly found ones start no other search.

    Returns:
      float64 [n].
    """
    x = np.zeros(len(penalty)) if start is None else start
    active = x != 0
    while True:
        found = (np.abs(smooth(x)[1]) > penalty) & ~active
        if found.sum() <= 100 * tolerance * active.sum():
            return x
        active |= found
        where, own = np.flatnonzero(active), penalty[active]

        def objective(parts, where=where, own=own):
            more, less = np.split(parts, 2)
            value, slope = smooth(np.bincount(where, more - less, len(penalty)))
            return (value + own @ (more + less),
                    np.concatenate([own + slope[where], own - slope[where]]))

        ended = scipy.optimize.minimize(
            objective, np.maximum(0, np.concatenate([x[active], -x[active]])), jac=True,
            method='L-BFGS-B', bounds=scipy.optimize.Bounds(0, np.inf),
            options={'maxiter': rounds, 'maxfun': 2 * rounds, 'ftol': tolerance, 'gtol': 1e-9})
        x = np.bincount(where, np.subtract(*np.split(ended.x, 2)), len(penalty))


def log_popularity(train: Sessions, num_items: int) -> np.ndarray:
    """Compute log(events + mean events), which gives a cold item half of the mean: [V + 1]."""
    events = counts(train, num_items).astype(float)
    return np.log(events + max(events[1:].mean(), 1e-9))


def weights_of(train: Sessions, num_items: int, known: Attributes, strength: float, gamma: float,
               start: np.ndarray | None = None) -> np.ndarray:
    """Fit the weights of pairs of attributes on training sessions.

    Among the most frequent items alone, the model has the same weights (independence of irrelevant
    alternatives, McFadden 1978), so that the rows of other targets are left out.

    Args:
      train: S sessions.
      num_items: V.
      known: attributes and prior.
      strength: mean penalty of the pairs that the prior names, or of all without a prior.
      gamma: how much the prior counts.
      start: float64 [2, A, A], weights of another strength where the fit begins; None: 0.

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
    if not len(end):
        return np.zeros(penalty.shape)
    target = column[train.items[end]]
    row, places = np.arange(len(target)), []  # what an item asks for is computed once
    for at in begin[end], end - 1:
        asking, which = np.unique(train.items[at], return_inverse=True)
        places.append((known.rows[asking].astype(np.float32), which,
                       sp.csr_array((np.ones(len(row), np.float32), (which, row)))))
    later = known.rows[items].toarray().astype(np.float32)
    actual, bias = later[target], log_popularity(train, num_items)[items].astype(np.float32)
    scores = np.empty((len(target), len(items)), np.float32)

    def smooth(x):
        asked = sum((attributes @ part)[which] for (attributes, which, _), part in zip(
            places, x.reshape(2, size, size).astype(np.float32), strict=True))
        np.add(np.matmul(asked, later.T, out=scores), bias, out=scores)
        np.subtract(scores, scores.max(axis=1, keepdims=True), out=scores)
        gained = scores[row, target].sum(dtype=float)
        total = np.exp(scores, out=scores).sum(axis=1, keepdims=True)
        excess = scores @ later / total - actual
        slope = np.stack([attributes.T @ (held @ excess) for attributes, _, held in places])
        return ((np.log(total).sum(dtype=float) - gained) / len(row),
                slope.ravel().astype(float) / len(row))

    begin = None if start is None else start.ravel()
    return lasso(smooth, strength * penalty.ravel(), begin).reshape(2, size, size)


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
    weights = weights_of(train, num_items, features, strength, gamma)
    return scorer(features, weights, log_popularity(train, num_items))


def scorer(known: Attributes, weights: np.ndarray, bias: np.ndarray) -> Callable:
    """Make the scorer of weights float [2, A, A] and a bias [V + 1]: probabilities."""
    later = known.rows.toarray().T

    def scores(items):
        # rounded: a row's scores do not depend on the other rows, although BLAS may add differently
        logits = (_asked(known, weights, items) @ later + bias).round(9)
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        return (share / share.sum(axis=1, keepdims=True)).astype(np.float32)

    return scores


def factors(known: Attributes, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Factor the scores for expert 'lasso': (asked_first[first] + asked_last[last]) @ attributes.T.

    Args:
      known: A attributes.
      weights: float [2, A, A]. Of its singular vectors the first RANK are kept.

    Returns:
      'asked_first', 'asked_last' and 'attributes' float32 [V + 1, R], and 'basis' float32 [A, R],
      which gives the attributes of a new item.
    """
    left, size, right = np.linalg.svd(weights.reshape(-1, weights.shape[-1]), full_matrices=False)
    first, last = np.split((left * size)[:, :RANK], 2)
    basis = right[:RANK].T
    out = {'asked_first': known.rows @ first, 'asked_last': known.rows @ last,
           'attributes': known.rows @ basis, 'basis': basis}
    return {name: x.astype(np.float32) for name, x in out.items()}


def extended(tables: dict[str, np.ndarray], rows: sp.csr_array) -> dict[str, np.ndarray]:
    """Extend the factors to new items. The weights stay as they were fitted.

    Those of words are not stored. They follow from those of the items by least squares, exactly
    where no word's items are a combination of other words' items.

    Args:
      tables: of `factors` without 'attributes', for v items.
      rows: csr float [V + 1, A]. Attributes of the same items and, after them, of new ones.

    Returns:
      As of `factors`, for V items.
    """
    old = rows[:len(tables['asked_first'])]
    asked = np.concatenate([tables['asked_first'], tables['asked_last']], axis=1)
    words = np.linalg.lstsq((old.T @ old).toarray(), old.T @ asked)[0]
    asked = np.concatenate([asked, rows[len(asked):] @ words]).astype(np.float32)
    first, last = np.split(asked, 2, axis=1)
    return {'asked_first': first, 'asked_last': last, 'basis': tables['basis'],
            'attributes': rows @ tables['basis']}


def choose(train: Sessions, valid: Rows, num_items: int, known: Attributes) -> dict:
    """Choose strength and gamma by the likelihood of validation.

    Args:
      train: S sessions.
      valid: validation rows; of many, the first ones are read.
      num_items: V.
      known: attributes and prior.

    Returns:
      {'strength', 'gamma', 'nll'}, and 'weights' float64 [2, A, A] of the fit.
    """
    bias, best = log_popularity(train, num_items), {'nll': np.inf}
    valid = valid.take(valid.target > 0).take(slice(max(256, CELLS // num_items)))
    for gamma in GAMMAS if known.importance is not None else GAMMAS[:1]:
        weights, before = None, np.inf
        for strength in STRENGTHS:
            weights = weights_of(train, num_items, known, strength, gamma, weights)
            nll = _nll(known, weights, bias, valid)
            if nll > before:  # equal ones have no weights: the penalty is too strong
                break
            before = nll
            if nll < best['nll']:
                best = {'strength': strength, 'gamma': gamma, 'nll': nll, 'weights': weights}
    return best


def _asked(known, weights, items):
    """Compute how much prefixes [R, N] ask for each attribute: [R, A]."""
    latest = items[np.arange(len(items)), np.maximum((items > 0).sum(axis=1) - 1, 0)]
    return known.rows[items[:, 0]] @ weights[0] + known.rows[latest] @ weights[1]


def _nll(known, weights, bias, valid):
    """Compute the mean negative log-likelihood of rows, over some items at a time."""
    asked, total = _asked(known, weights, valid.items), np.full(len(valid.target), -np.inf)
    for begin in range(1, len(bias), PART):
        part = slice(begin, begin + PART)
        logits = asked @ known.rows[part].toarray().T + bias[part]
        total = np.logaddexp(total, scipy.special.logsumexp(logits, axis=1))
    own = np.einsum('ra,ra->r', asked, known.rows[valid.target].toarray())
    return float((total - own - bias[valid.target]).mean())
