"""Fits the weights of the experts by the likelihood of validation [ours].

A fit has the few numbers of WEIGHTS. They maximise the log-likelihood of the validation rows'
targets over the whole catalogue plus a normal prior. Its means are values that suit many catalogues
and trust the rules more than the recommender, so rules decide where validation is small.
"""

from collections.abc import Callable, Collection
from functools import cache
from itertools import chain, islice, product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from tpad_jax.data import item_graphs, sessions
from tpad_jax.distributed.devices import compiled
from tpad_jax.evaluation import metrics, scorers
from tpad_jax.models import experts

CELLS = 2**27  # scores that a fit reads, or those of LEAST rows: of more it draws a sample
LEAST = 256
ROWS = 256  # rows at a time
PART_CELLS = 2**25  # scores at a time, 128 MB of float32: of more than 2**17 items fewer rows
PART = 2**14  # items at a time
WIDTH = 64  # of an item's content; wider content is projected on its first principal components
# Weight: its mean and standard deviation under the prior, its lowest value, and the expert or
# remedy of config.experts that it belongs to, without which it is 0.
WEIGHTS = {
    'model': (0.3, 0.5, 0.0, 'model'),
    'popularity': (0.5, 0.3, 0.0, 'popularity'), 'cold': (-1.0, 2.0, -12.0, 'cold'),
    **{rule: (0.3, 0.3, 0.0, rule) for rule in experts.RULES}, 'held': (-0.3, 2.0, -12.0, 'held'),
    'content': (1.0, 2.0, 0.0, 'content'), 'following': (1.0, 2.0, 0.0, 'content'),
    'cold_prefix': (0.0, 2.0, -12.0, 'cold'), 'cold_content': (0.0, 0.5, -0.95, 'cold'),
    'lasso': (0.3, 0.5, 0.0, 'lasso'),
    **{f'floor_{rule}': (-5.0, 1.0, -12.0, rule) for rule in experts.RULES}}
NAMES = tuple(dict.fromkeys(name for *_, name in WEIGHTS.values()))


class Fit(NamedTuple):
    """Fitted weights.

    Attributes:
      weights: {name of WEIGHTS: value}.
      nll: mean negative log-likelihood of the validation rows that were read, in nats.
      rows: their number.
      decay: of models.experts.DECAYS.
    """

    weights: dict[str, float]
    nll: float
    rows: int
    decay: float


def tables(train: sessions.Sessions, num_items: int, features: np.ndarray | None, *, ordered: bool,
           share: np.ndarray | None = None) -> dict:
    """Count the tables that the experts read.

    Args:
      train: the training sessions.
      num_items: V.
      features: float [V+1, ...]. The items' content; a row of zeros has none. None: no content.
      ordered: whether the sessions are in the order of time.
      share: float [S]. Weights of the sessions; None: all are 1.

    Returns:
      Arrays of `item_graphs.rules`; 'centre' [D] and 'axes' [D, C], the projection of features on
      their first components; 'content' float32 [V+1, C]; 'next' [V+1, C], the content that
      follows; 'decay', the first of models.experts.DECAYS.
    """
    flat = np.zeros((num_items + 1, 1)) if features is None else np.asarray(features, np.float32)
    flat = flat.reshape(num_items + 1, -1)
    there = flat.any(axis=1)
    centre, axes = flat.sum(axis=0) / max(there.sum(), 1), np.eye(flat.shape[1])
    if flat.shape[1] > WIDTH:
        parts = (flat[begin:begin + PART][there[begin:begin + PART]] - centre
                 for begin in range(0, len(flat), PART))
        axes = np.linalg.eigh(sum(part.T @ part for part in parts).astype(float))[1][:, -WIDTH:]
    basis = {'centre': centre.astype(np.float32), 'axes': axes.astype(np.float32)}
    content = np.asarray(experts.projected(flat, basis))
    follow = item_graphs.followers(train, num_items, 1, share=share)
    count, flow = follow.sum(axis=1)[:, None], follow @ content
    # An item with few followers borrows from a linear map of its content, a ridge regression. The
    # map weighs as much as five transitions of the item, its penalty as ten transitions.
    gram = content.T @ (count * content) + 10 * np.eye(content.shape[1])
    guess = content @ np.linalg.solve(gram, content.T @ flow)
    following = (flow + 5 * guess) / (count + 5)
    return jax.device_put(item_graphs.rules(
        train, num_items, ordered=ordered, share=share) | basis | {
        'content': content, 'next': following.astype(np.float32),
        'decay': np.float32(experts.DECAYS[0])})


def packed(values) -> dict:
    """Arrange the values of WEIGHTS as models/experts.py reads them."""
    own = dict(zip(WEIGHTS, values, strict=True))
    return {**own, 'rules': jnp.stack([own[rule] for rule in experts.RULES]),
            'floors': jnp.stack([own[f'floor_{rule}'] for rule in experts.RULES])}


def mixture(fit: Fit, table: dict) -> tuple[dict, jnp.ndarray]:
    """Make what a scorer reads, see `scorers.scorer`.

    Args:
      fit: the weights.
      table: of `tables`.

    Returns:
      {'weights', 'tables'} of a session's score, and the columns of the item vectors.
    """
    weights = packed([jnp.float32(x) for x in fit.weights.values()])
    read = {name: x for name, x in table.items() if name not in ('content', 'events', 'attributes')}
    columns = _columns(weights, table)
    return {'weights': weights, 'tables': read | {'decay': jnp.float32(fit.decay)}}, columns


def fit(model: Callable, table: dict, valid: sessions.Rows, names: Collection[str], *, seed: int = 0
        ) -> Fit:
    """Fit the weights on validation.

    Args:
      model: scorer of a recommender that was not trained on validation.
      table: of `tables`, counted on the training sessions alone; for expert 'lasso' with those of
        `content_lasso.factors`.
      valid: validation rows.
      names: of NAMES, those that count.
      seed: of the sample of rows.
    """
    most = max(LEAST, CELLS // len(table['events']) // ROWS * ROWS)
    rows = min(ROWS, max(1, PART_CELLS // len(table['events'])))
    valid = sessions.sample(sessions.ranked(valid), most, seed)
    total = len(valid.target)
    filled = np.resize(np.arange(total), -(-total // rows) * rows)  # the last part is filled up
    counts = np.arange(len(filled)) < total
    (evidence, loss), found, widest = _programs(), [], 0
    # row by row, of the parts that the scorer is compiled for: those of a million items are large
    scores = chain.from_iterable(scores for _, scores in metrics.scored(
        model, valid.read_by(model)[filled], len(table['events']) - 1))
    each = np.split(np.arange(len(filled)), len(filled) // rows)
    tables = [table | {'decay': jnp.float32(decay)} for decay in experts.DECAYS]
    known = []  # the evidence of every part under every decay
    for place, part in product(range(len(tables)), each):
        ids, shares = map(np.asarray, evidence(tables[place], valid.items[filled[part]]))
        empty = ~shares.any(axis=-1)
        order = np.argsort(empty, axis=-1, kind='stable')
        widest = max(widest, (~empty).sum(axis=-1).max())
        known.append([np.take_along_axis(ids, order, axis=1),
                      np.take_along_axis(shares, order[..., None], axis=1)])
    widest = -(-widest // 128) * 128  # the same shape for several fits
    known = jax.device_put([[x[:, :widest] for x in pair] for pair in known])
    parts = [jax.device_put([valid.items[filled[part]], valid.target[filled[part]], counts[part],
                             _centred(islice(scores, rows))]) for part in each]
    mean, spread, low = (np.array([x[i] for x in WEIGHTS.values()]) for i in range(3))
    off = np.array([x[3] not in names for x in WEIGHTS.values()])

    def objective(values, place):
        """Return the negative log-likelihood plus the prior's, and the gradient."""
        value, slope = 0.0, np.zeros(len(values))
        for part, pair in zip(parts, known[place * len(parts):], strict=False):
            more = loss(jnp.asarray(values, jnp.float32), tables[place], *part, *pair)
            value, slope = value + float(more[0]), slope + np.asarray(more[1], np.float64)
        away = np.where(off, 0, (values - mean) / spread)
        return value + 0.5 * (away ** 2).sum(), slope + away / spread

    for place in range(len(tables)):  # each begins where the one before ended
        found.append(scipy.optimize.minimize(
            objective, found[-1].x if found else np.where(off, 0, mean), (place,), jac=True,
            method='L-BFGS-B', options={'maxiter': 60, 'ftol': 3e-6},
            bounds=[(0, 0) if out else (least, None) for out, least in zip(off, low, strict=True)]))
    best = min(range(len(tables)), key=lambda place: found[place].fun)
    away = np.where(off, 0, (found[best].x - mean) / spread)
    return Fit(dict(zip(WEIGHTS, found[best].x.tolist(), strict=True)),
               float((found[best].fun - 0.5 * (away ** 2).sum()) / total), total,
               experts.DECAYS[best])


def _centred(rows):
    """Stack rows of scores and subtract the mean of each over the items."""
    scores = np.stack(list(rows))
    scores -= scores[:, 1:].mean(axis=1, keepdims=True)
    return scores


def terms(bound, items: np.ndarray, chosen: np.ndarray, h: np.ndarray | None = None
          ) -> dict[str, np.ndarray]:
    """Divide the scores of some items into what each expert adds to them.

    Args:
      bound: scorers.Bound with experts.
      items: int32 [R, N]. Prefixes, at most ROWS.
      chosen: int [R, k]. Items of each row.
      h: float32 [R, D]. Vectors of the sessions; None: they are computed.

    Returns:
      {name of NAMES: float32 [R, k]}, relative to the mean over the catalogue.
    """
    rules = bound.experts
    weights, tables = rules['weights'], rules['tables']
    if h is None:
        models = tuple(({'recommender': params['recommender']}, near)
                       for params, near in zip(bound.params, bound.near, strict=True))
        h = np.asarray(compiled(scorers.session_encoder(bound.specs), seldom=True)(
            (models, rules), bound.z, items))
    z = np.asarray(bound.z)
    parts = h[:, None] * (z[chosen] - z[1:].mean(axis=0))
    wide = tables['basis'].shape[1] if 'basis' in tables else 0
    end = h.shape[1] - wide
    bias = end - 2 - tables['next'].shape[1]
    out = {'model': parts[..., :bias].sum(axis=-1),
           'popularity': parts[..., bias:bias + 2].sum(axis=-1),
           'content': parts[..., bias + 2:end].sum(axis=-1)}
    out |= {'lasso': parts[..., end:].sum(axis=-1)} if wide else {}
    filled = np.resize(items, (ROWS, items.shape[1]))  # as a fit has compiled it
    ids, shares = (np.asarray(x)[:len(items)] for x in _programs()[0](tables, filled))
    mine = (ids[:, None] == chosen[..., None]).astype(np.float32) @ shares
    for place, rule in enumerate(experts.RULES):
        floor = np.exp(-np.asarray(weights['floors'][place]))
        out[rule] = weights[rule] * np.log1p(mine[..., place] * floor)
    return out | {'held': weights['held'] * mine[..., 4]}


def _columns(weights, table):
    attributes = [table['attributes']] if 'attributes' in table else []
    return experts.item_columns(weights, table['content'], table['events'], *attributes)


@cache
def _programs():
    return compiled(experts.evidence), compiled(jax.value_and_grad(_loss))


def _loss(values, table, items, target, counts, scores, ids, shares):
    """Compute the negative log-likelihood of some rows, summed."""
    weights, row = packed(values), jnp.arange(len(items))
    columns = _columns(weights, table)
    sides = experts.session_columns({'weights': weights, 'tables': table},
                                    jnp.zeros((len(items), 0)), columns[items, 1:], items)
    logits = weights['model'] * scores + sides @ columns.T
    logits = logits.at[row[:, None], ids].add(experts.shift(weights, shares))
    logits = logits.at[:, 0].set(-jnp.inf)
    return -jnp.where(counts, logits[row, target] - jax.nn.logsumexp(logits, axis=1), 0).sum()
