"""Rules as experts next to a recommender: one log-linear score of an item [ours].

    score(i | prefix) = w_model m(i) + bias(i) + <q, scale(i) u(i)> + w_held held(i)
                        + sum over rules of w_rule log(1 + p_rule(i) / floor_rule)

m is the recommender's score, u an item's content, and p_rule the share of a rule's
evidence about the prefix that speaks for item i:

    transitions   items that came right after the prefix's last item in training sessions
    followers     items that came later in training sessions than items of the prefix
    companions    items that shared training sessions with items of the prefix
    neighbours    items of the training sessions most similar to the prefix (as V-SKNN and STAN do)

The exponential of such a score is a product of experts (Hinton 2002): a rule that knows nothing of
a prefix changes nothing, and one that is certain decides. bias has the logarithm of an item's
popularity, and an offset of items without training sessions, which grows with their share of the
prefix: who looks at new items looks at more of them. q looks for the content of the prefix
and for the content that followed its items, which also reaches items that no rule can. The option
'lasso' adds w_lasso times the logit of baselines/content_lasso.py, likewise a product of columns.

evaluation/experts.py fits the few weights. Everything is computed on the device that ranks: bias
and content are further columns of the item vectors, the rules shift single scores.
"""

import jax.numpy as jnp
from jax import lax

from tpad_jax.nn.gather import at_last, totals
from tpad_jax.nn.linear import unit

# tables with a row per item; the last two are of expert 'lasso' alone
BY_ITEM = 'near', 'weight', 'holders', 'next', 'asked_first', 'asked_last'
RULES = 'transitions', 'followers', 'companions', 'neighbours'
PAIRS = 3  # of these rules read the table of item pairs
LATEST = 10  # items of a prefix that the rules read, as the rules among the baselines
DECAYS = 0.6, 0.85  # of an item's weight per step from the prefix's end; validation chooses
NEAREST = 50  # similar sessions that count
REACH = 4.0  # places from the shared item over which an item of a similar session falls to 1/e


def recent(items, decay):
    """Select the latest items of prefixes int32 [B, N], newest first, and their weights [B, n]."""
    n = min(LATEST, items.shape[1])
    at = (items > 0).sum(axis=1, keepdims=True) - 1 - jnp.arange(n)
    item = jnp.where(at >= 0, jnp.take_along_axis(items, jnp.maximum(at, 0), axis=1), 0)
    return item, jnp.where(item > 0, decay ** jnp.arange(n), 0)


def evidence(tables, items, moved=None):
    """Compute the evidence of the rules about prefixes.

    Args:
      tables: of `item_graphs.rules`.
      items: int32 [B, N]. Prefixes, left aligned, 0 pads.
      moved: (items int32 [B, K], float32 [B, K]), further shifts, which are only carried along.

    Returns:
      ids int32 [B, M] and float32 [B, M, 6]: the share of each rule, 1 for an item of the prefix,
      and its further shift. All are 0 on padding and on all but one place of an item.
    """
    rows, (item, share) = len(items), recent(items, tables['decay'])
    last = share * (jnp.arange(item.shape[1]) == 0)  # all that a transition reads
    shares = jnp.stack([last, share, share], axis=-1)
    pairs = shares[:, :, None] * tables['weight'][item]  # [B, n, K, PAIRS]
    similar, weights = neighbours(tables, item, share)
    parts = [(tables['near'][item].reshape(rows, -1), pairs.reshape(rows, -1, PAIRS), (0, 3)),
             (similar, weights[..., None], (3, 2)), (items, jnp.ones((*items.shape, 1)), (4, 1))]
    if moved is not None:
        parts.append((moved[0], moved[1][..., None], (5, 0)))
    ids, sums, last = totals(
        jnp.concatenate([ids for ids, _, _ in parts], axis=1),
        jnp.concatenate([jnp.pad(x, ((0, 0), (0, 0), pad)) for _, x, pad in parts], axis=1))
    sums = jnp.where((last & (ids > 0))[..., None], sums, 0)
    counted, held, more = jnp.split(sums, (4, 5), axis=-1)
    shares = counted / jnp.maximum(counted.sum(axis=1, keepdims=True), 1e-30)
    return ids, jnp.concatenate([shares, jnp.minimum(held, 1), more], axis=-1)


def neighbours(tables, item, share):
    """Find the items of the training sessions that are most similar to prefixes.

    A session's similarity is the sum of the weights of the items that it shares with the prefix,
    divided by the square root of its length; of equals the more recent one counts. Its items weigh
    less with the distance from the newest shared item (STAN, Garg et al. 2019).

    Args:
      tables: of `item_graphs.rules`.
      item: int32 [B, n]. The latest items, newest first.
      share: float32 [B, n]. Their weights.

    Returns:
      ids int32 [B, M] and their weights float32 [B, M].
    """
    held = tables['holders'][item]
    value = jnp.broadcast_to(share[..., None], held.shape)
    session, sums, last = totals(held.reshape(len(item), -1), value.reshape(len(item), -1))
    sums = jnp.where(last & (session > 0), sums, 0) * tables['scale'][session]
    similar, chosen = lax.top_k(sums, min(NEAREST, sums.shape[1]))
    events = tables['sessions'][jnp.take_along_axis(session, chosen, axis=1)]  # [B, k, L]
    shared = (events[..., None] == item[:, None, None]) & (events > 0)[..., None]
    newest = jnp.argmax(shared.any(axis=2), axis=2)[:, :, None, None]
    place = jnp.arange(events.shape[2])
    here = jnp.take_along_axis(shared, newest, axis=3)[..., 0]
    anchor = jnp.where(here, place, -1).max(axis=2, keepdims=True)
    weight = similar[..., None] * jnp.exp(-jnp.abs(place - anchor) / REACH) * (events > 0)
    return events.reshape(len(item), -1), weight.reshape(len(item), -1)


def shift(weights, shares):
    """Compute the shift of scores from what `evidence` returns: [..., 6] -> [...]."""
    rules = weights['rules'] * jnp.log1p(shares[..., :4] * jnp.exp(-weights['floors']))
    return (rules.sum(axis=-1) + weights['held'] * shares[..., 4]
            + weights['model'] * shares[..., 5])


def item_columns(weights, content, events, *attributes):
    """Compute the columns that item vectors get: bias, coldness and scaled content, [n, 2 + C + A].

    Args:
      weights: of the experts.
      content: float32 [n, C]. Vectors of length one, or zeros.
      events: float32 [n]. Training events of the items.
      *attributes: float32 [n, A] of expert 'lasso', if it is used.
    """
    events = events[:, None]
    cold = jnp.where(events > 0, 0.0, 1.0)
    bias = weights['popularity'] * jnp.log1p(events) + weights['cold'] * cold
    return jnp.concatenate([bias, cold, (1 + weights['cold_content'] * cold) * content,
                            *attributes], axis=1)


def projected(flat, tables):
    """Project features [n, D] on the content axes: vectors [n, C] of length one, or zeros."""
    there = (flat != 0).any(axis=1, keepdims=True)
    return jnp.where(there, unit((flat - tables['centre']) @ tables['axes']), 0)


def session_columns(mixture, h, columns, items):
    """Extend session vectors so that their products with item vectors have all dense parts.

    Args:
      mixture: {'weights', 'tables'}, the latter with 'next' [V+1, C], the content that followed,
        and 'decay'; with expert 'lasso' also 'asked_first' and 'asked_last' [V+1, A].
      h: float32 [B, D]. The recommender's.
      columns: float32 [B, N, 1 + C or more]. Coldness and scaled content of the prefix's items.
      items: int32 [B, N]. Prefixes.
    """
    weights, tables = mixture['weights'], mixture['tables']
    length = (items > 0).sum(axis=1, keepdims=True)
    steps = length - 1 - jnp.arange(items.shape[1])
    share = jnp.where(items > 0, tables['decay'] ** jnp.maximum(steps, 0), 0)[..., None]
    own, following = (unit((share * x).sum(axis=1)) for x in (
        unit(columns[..., 1:1 + tables['next'].shape[1]]), tables['next'][items]))
    cold = jnp.where(items > 0, columns[..., 0], 0).sum(axis=1, keepdims=True)
    asked = [weights['lasso'] * (tables['asked_first'][items[:, 0]]
                                 + tables['asked_last'][at_last(items, items)])
             ] if 'asked_last' in tables else []
    return jnp.concatenate([
        weights['model'] * h, jnp.ones((len(h), 1)),
        weights['cold_prefix'] * cold / jnp.maximum(length, 1),
        weights['content'] * own + weights['following'] * following, *asked], axis=1)
