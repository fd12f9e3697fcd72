"""Training sessions as a memory that a recommender looks up, through a gate (RA-BLIP).

The memory holds the vector h_m of every training prefix and the item that came next. A prefix with
the vector h retrieves the nearest entries by cosine, and the score of item i is shifted by

    strength * log(1 + sum over entries m of g_m [next_m = i] / floor),
    g_m = sigmoid(MLP(h * h_m, cosine, age))

g is the probability that an entry's next item is the right one ("adaptive selection"), so entries
that do not fit count little however near they are. Source: RA-BLIP (arXiv 2410.14154), sections 3.3
and 3.4 [paper], where the entries are texts and images and a language model reads them. The shift
is [ours]. A gate that reads h and h_m side by side learns no more than how frequent an item is;
their product tells on which axes they agree [ours].

evaluation/memory.py makes a memory. It is a part of a recommender's parameters, {'h': float32
[n, D] of length one, 'next' and 'session': int32 [n], rising; 'strength', 'floor', 'gate'}.
"""

import jax
import jax.numpy as jnp

from tpad_jax.nn.gather import totals
from tpad_jax.nn.linear import MLP, unit

GATE = MLP(32, 1)


def nearest(memory, h, most: int, session=None):
    """Find the entries nearest to prefixes.

    Args:
      memory: see above.
      h: float32 [B, D]. Vectors of the prefixes.
      most: entries of a prefix.
      session: int32 [B]. The prefixes' own sessions in the memory, which are left out, since they
        hold the target. None: the prefixes are later than the memory.

    Returns:
      Entries int32 [B, m], their cosines and ages [B, m], the latter as a share of the memory. An
      entry that is left out has the cosine -inf.
    """
    cosine, total = unit(h) @ memory['h'].T, memory['session'][-1] + 1
    if session is None:
        session = jnp.full(len(h), total)
    cosine = jnp.where(memory['session'] == session[:, None], -jnp.inf, cosine)
    cosine, entry = jax.lax.top_k(cosine, min(most, cosine.shape[1]))
    return entry, cosine, jnp.abs(session[:, None] - memory['session'][entry]) / total


def logits(memory, h, entry, cosine, age):
    """Compute the logits of the gates of retrieved entries, [B, m]; without a gate it is open."""
    if 'gate' not in memory:
        return jnp.where(jnp.isfinite(cosine), jnp.inf, -jnp.inf)
    there = jnp.isfinite(cosine)
    both = unit(h)[:, None] * memory['h'][entry] * h.shape[1]  # about 1 per axis where they agree
    x = jnp.concatenate([both, jnp.where(there, cosine, 0)[..., None], age[..., None]], axis=-1)
    return jnp.where(there, GATE.apply({'params': memory['gate']}, x)[..., 0], -jnp.inf)


def evidence(memory, h, most: int):
    """Sum the gates of the retrieved entries by their next item.

    Args:
      memory: see above.
      h: float32 [B, D].
      most: entries of a prefix.

    Returns:
      Items int32 [B, m] and the sums float32 [B, m]: 0 on padding and on all but one place of an
      item.
    """
    found = nearest(memory, h, most)
    items, sums, last = totals(memory['next'][found[0]], jax.nn.sigmoid(logits(memory, h, *found)))
    return items, jnp.where(last & (items > 0), sums, 0)


def shifts(memory, h, most: int):
    """Compute the shift of the scores of retrieved items; see `evidence`."""
    items, sums = evidence(memory, h, most)
    return items, memory['strength'] * jnp.log1p(sums / memory['floor'])
