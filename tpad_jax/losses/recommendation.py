"""Losses on sessions: cross entropy of the next item, complete or sampled, and item clusters."""

import math

import jax
import jax.numpy as jnp

from tpad_jax.losses.contract import Out
from tpad_jax.losses.tokens import divergence
from tpad_jax.nn import softmax
from tpad_jax.nn.gather import at_last, take
from tpad_jax.types import Loss


def next_item(out, batch, *, h: Out = Out('h'), z: Out = Out('z'),
              warm: Out = Out('warm'), repeat: Out = Out('repeat'), temperature=1.0, smoothing=0.0,
              chunk=0, dtype='float32'):
    """Return the softmax cross entropy of the target over the warm catalogue, logits <h, z>.

    Items that no training session contains are never negatives; as negatives they would teach
    "never recommend these". [paper] trains its recommender on the next item; [ours] the exclusion
    of cold items.

    Args:
      out: {name: output}.
      batch: types.Batch.
      h: float32 [B, D] or [B, N, D]. Output with the sessions. With [B, N, D] (`h_each`) every
        position predicts the item that follows.
      z: float32 [V+1, D]. Output with the items.
      warm: bool [V+1]. Output with the items that training sessions contain.
      repeat: float32 [B, N, N]. Output added to the logits of the prefix's items. None, or an
        output that is None: nothing is added.
      temperature: divides the logits.
      smoothing: share of the target's mass spread evenly over the warm catalogue (Szegedy et al.
        2016).
      chunk: of `softmax.log_partition`, for a large catalogue.
      dtype: of `softmax.log_partition`.

    Returns:
      [B], or Loss [B, N].
    """
    z, warm, repeat, every = out[z], out[warm], out.get(repeat), out[h] / temperature
    h, target, pick, back = _predictions(every, batch)
    z, theirs = take(z, target)
    h, own = _own(h, theirs, dtype)
    count = jnp.maximum(warm.sum(), 1)
    mean = h @ ((warm.astype(z.dtype) @ z) / count) if smoothing else 0.0
    if repeat is not None:
        z, rows = take(z, batch.items)
        scores = pick(jnp.einsum('b...d,bjd->b...j', _rounded(every, dtype), _rounded(rows, dtype)))
        shift = pick(at_last(repeat, batch.items) if every.ndim == 2 else repeat)
        items = pick(jnp.broadcast_to(
            batch.items if every.ndim == 2 else batch.items[:, None], repeat.shape[:every.ndim]))
        own += jnp.where(items == target[:, None], shift, 0).sum(axis=1)
        shift = jnp.where(warm[items], shift, 0)
        mean += shift.sum(axis=1) / count
    if smoothing:
        own = (1 - smoothing) * own + smoothing * mean
    whole = softmax.log_partition(h, z, warm, chunk=chunk, dtype=dtype)
    if repeat is not None:
        # the shares of the prefix's items in the partition grow by exp(shift)
        more = (jnp.exp(scores - whole[:, None]) * jnp.expm1(shift)).sum(axis=1)
        whole += jnp.log(jnp.maximum(1 + more, 1e-6))
    return back(whole - own)


def sampled_next_item(out, batch, *, key=None, h: Out = Out('h'), z: Out = Out('z.read'),
                      warm: Out = Out('warm'), popularity: Out = Out('popularity'), samples=8192,
                      power=0.75, temperature=1.0):
    """Return `next_item` with its partition estimated from drawn items.

    Bengio and Senecal 2008. The step's key draws items once for all rows and replicas, with
    replacement, in proportion to popularity ** power over the warm items. Each is corrected by the
    log of how often it is expected (Yi et al. 2019). The target has its exact logit, and draws of
    it do not count. So the partition is unbiased; by the variance in the logarithm the loss is too
    low. It does not train `model.repeats`.

    Args:
      out: {name: output}.
      batch: types.Batch.
      key: the step's.
      h: float32 [B, D] or [B, N, D]. Output with the sessions.
      z: float32 [V+1, D], read by item. Output with the items.
      warm: bool [V+1]. Output with the items that training sessions contain.
      popularity: float32 [V+1]. Output with how often they do.
      samples: how many items are drawn.
      power: of the popularity, 0: uniform.
      temperature: divides the logits.

    Returns:
      [B], or Loss [B, N].
    """
    warm = out[warm]
    h, target, _, back = _predictions(out[h], batch)
    weight = softmax.weights(warm, out[popularity], power)
    drawn = softmax.draw(key, weight, samples)
    # in one read, whose gradient is one array of V rows
    own, others = jnp.split(out[z][jnp.concatenate([target, drawn])], [len(target)])
    h, own = _own(h / temperature, own)
    expected = softmax.log_probability(weight, drawn) + math.log(samples)
    logits = h @ others.T - expected
    counts = (drawn[None] != target[:, None]) & (drawn[None] > 0)
    logits = jnp.where(counts, logits, -jnp.inf)
    # a cold target is not in the partition
    exact = jnp.where(warm[target], own, -jnp.inf)[:, None]
    return back(jax.nn.logsumexp(jnp.concatenate([exact, logits], axis=1), axis=1) - own)


def soft_next_item(out, batch, *, h: Out = Out('h'), z: Out = Out('z'),
                   teacher: Out = Out('teach.last'), teacher_items: Out = Out('teach.z'),
                   temperature=1.0):
    """Return KL(teacher || student) of the next item over the whole catalogue.

    Hinton et al. 2015. Cold items are part of both distributions, so that their scores are trained,
    too [ours]. The teacher gets no gradient.

    Args:
      out: {name: output}.
      batch: types.Batch.
      h: float32 [B, D]. Output with the student's sessions.
      z: float32 [V+1, D]. Output with the student's items.
      teacher: float32 [B, E]. Output with the teacher's sessions.
      teacher_items: float32 [V+1, E]. Output with the teacher's items.
      temperature: divides both models' logits; its square multiplies the value, so that the
        gradient keeps its scale.

    Returns:
      [B].
    """
    def log_share(h, z):
        return jax.nn.log_softmax(out[h] @ out[z][1:].T / temperature)

    known = jax.lax.stop_gradient(log_share(teacher, teacher_items))
    return temperature**2 * divergence(known, log_share(h, z), 'forward')


def clusters(out, batch, *, x: Out = Out('interest'), cluster: Out = Out('cluster')):
    """Return the KL divergence of a session's predicted clusters from its true ones.

    P2Rec (arXiv 2406.00333). [paper] a pre-task per user, not per prefix: the model reads the
    complete sequence and predicts how its interactions are distributed over k-means clusters of
    a trained recommender's items (config.model.clusters_of='z'). [ours] clusters of the
    Knowledge-MLLM's features ('k'); the distribution is of the prefix and the item that follows; a
    divergence instead of a regression's square.

    Args:
      out: {name: output}.
      batch: types.Batch.
      x: float32 [B, C]. Output with the logits, one prediction per session.
      cluster: int32 [V+1]. Output with every item's cluster.

    Returns:
      [B].
    """
    items = jnp.concatenate([batch.items, batch.target[:, None]], axis=1)
    held = jax.nn.one_hot(out[cluster][items], out[x].shape[-1]) * (items > 0)[..., None]
    share = held.sum(axis=1) / jnp.maximum((items > 0).sum(axis=1, keepdims=True), 1)
    surprise = jnp.log(jnp.where(share > 0, share, 1)) - jax.nn.log_softmax(out[x])
    return (share * surprise).sum(axis=-1)


def _predictions(h, batch):
    """Select the sessions that predict and their targets, without padding if the batch has places.

    Args:
      h: float32 [B, D], or [B, N, D] for a prediction after every position.
      batch: types.Batch.

    Returns:
      h [A, D]; target int32 [A]; a function that selects [A, ...] of an array with a row or
      position for each h; and one that puts values [A] into the form that the loss returns.
    """
    if h.ndim == 2:
        return h, batch.target, lambda x: x, lambda value: value
    shape = h.shape[:2]
    weight = batch.mask.astype(jnp.float32)
    count = math.prod(shape)
    at = batch.places
    if at is not None:
        at = jnp.where(at < 0, count, at)  # fillers are read and dropped

    def pick(x):
        x = x.reshape(count, *x.shape[2:])
        return x if at is None else x.at[at].get(mode='clip')

    def back(value):
        if at is not None:
            value = jnp.zeros(count).at[at].set(value, mode='drop')
        return Loss(value.reshape(shape), weight)

    return pick(h), pick(batch.next), pick, back


def _rounded(x, dtype):
    return x.astype(dtype).astype(x.dtype)


def _own(h, theirs, dtype='float32'):
    """Return h and the targets' logits [B], both of operands rounded as in the partition.

    Args:
      h: float32 [B, D].
      theirs: float32 [B, D]. The targets' vectors.
      dtype: of the partition's operands.
    """
    h = _rounded(h, dtype)
    return h, (h * _rounded(theirs, dtype)).sum(-1)
