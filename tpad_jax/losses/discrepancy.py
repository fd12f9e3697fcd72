"""Losses on the distance of clouds and distributions of features, without a critic of pairs."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from tpad_jax.distributed import collectives
from tpad_jax.losses.contract import Out
from tpad_jax.losses.pairs import flat, score_pairs
from tpad_jax.mutual_information import bounds
from tpad_jax.nn.linear import unit
from tpad_jax.types import Loss


def mmd(out, batch, *, axis=None, x: Out = Out('r'), y: Out = Out('t'), widths=4, chunk=0):
    """Return the squared maximum mean discrepancy between two normalised clouds.

    Gretton et al. 2012, see `bounds.mmd`. Each position is one point of each cloud, so the value
    does not depend on how a batch is divided.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: float32 [B, N, D]. Output with one cloud.
      y: float32 [B, N, D]. Output with the other.
      widths: number of kernel widths.
      chunk: rows whose kernels exist at the same time, 0: all.

    Returns:
      Loss [B, N].
    """
    weight = batch.mask.astype(jnp.float32)
    a, b = (unit(flat(out[n])) for n in (x, y))
    everyone = collectives.gather(weight.reshape(-1), axis)
    share = everyone / jnp.maximum(everyone.sum(), 1)
    value = bounds.mmd(a, b, *(collectives.gather(n, axis) for n in (a, b)), share, widths, chunk)
    return Loss(value.reshape(weight.shape), weight)


def alignment_uniformity(out, batch, *, axis=None, x: Out = Out('r_next'), y: Out = Out('p'),
                         ids: Out = Out('next'), power=2.0, sharpness=2.0, uniform=1.0, chunk=0):
    """Return the alignment of pairs plus the weighted mean uniformity of both clouds.

    Wang and Isola 2020, as LLM-ISR trains by it; features of length one. Positions of one item are
    not a pair of a cloud. Metrics: the parts `aligned` and `uniform`.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      x: float32 [B, N, D]. Output with one cloud.
      y: float32 [B, N, D]. Output with the other.
      ids: int32 [B, N]. Output with the items of the positions.
      power: of the distance.
      sharpness: of the uniformity's kernel.
      uniform: weight of the uniformity.
      chunk: rows whose scores exist at the same time, 0: all.

    Returns:
      Loss [B, N].
    """
    unit_out = {**out, **{n: unit(out[n]) for n in (x, y)}}
    aligned = bounds.alignment(*(flat(unit_out[n]) for n in (x, y)), power)
    spread = 0.0
    for name in (x, y):
        pairs = score_pairs(unit_out, batch, axis, name, name, ids, lambda a, b: a @ b.T, chunk)
        spread += bounds.uniformity(*pairs.differ, axis=axis, sharpness=sharpness) / 2
    weight = pairs.at.weight
    parts = {'aligned': aligned, 'uniform': jnp.full_like(aligned, spread)}
    parts = {n: part.reshape(weight.shape) for n, part in parts.items()}
    return Loss(parts['aligned'] + uniform * parts['uniform'], weight, metrics=parts)


def intents(out, batch, *, axis=None, h: Out = Out('h'), z: Out = Out('z'),
            long: Out = Out('teach.last'), short: Out = Out('teach.short'),
            items: Out = Out('teach.z'), nearest=5, uniform=1.0):
    """Return alignment and uniformity of a session's views with what the Transfer-MLLM intends.

    LLM-ISR (arXiv 2402.13840). [paper] two views, of the whole session and of its last item; an
    intent is localised, as the mean of the nearest items of the catalogue, weighted by cosine; each
    is aligned with its view. [ours] intents are the Transfer-MLLM's predictions and not texts, and
    train the recommender alone: serving computes none, so nothing gates the readout.

    Args:
      out: {name: output}.
      batch: types.Batch.
      axis: name of the replicas' axis, or None.
      h: float32 [B, D]. Output with the recommender's sessions, the long view.
      z: float32 [V+1, D]. Output with its items; the last one of a prefix is the short view.
      long: float32 [B, E + 1]. Output with the Transfer-MLLM's sessions, popularity last.
      short: float32 [B, E + 1]. The same of the last item alone.
      items: float32 [V+1, E + 1]. Output with its items.
      nearest: items of an intent; 0: all of them, which are not localised.
      uniform: weight of the uniformity.

    Returns:
      Loss [B, 1].
    """
    known = jax.lax.stop_gradient({n: unit(out[n][:, :-1]) for n in (long, short, items)})
    one = SimpleNamespace(mask=batch.valid[:, None])
    last = jnp.take_along_axis(batch.items, batch.last[:, None], axis=1)[:, 0]
    total = Loss(0.0, 0.0)
    for name, view in ((long, out[h]), (short, out[z][last])):
        cosine = known[name] @ known[items][1:].T
        if nearest:
            cosine, chosen = jax.lax.top_k(cosine, min(nearest, cosine.shape[1]))
            intent = (jnp.maximum(cosine, 0)[..., None] * out[z][1 + chosen]).sum(axis=1)
        else:
            intent = jax.nn.softmax(cosine) @ out[z][1:]
        both = {'view': view[:, None], 'intent': intent[:, None], 'ids': batch.target[:, None]}
        part = alignment_uniformity(both, one, axis=axis, x='view', y='intent', ids='ids',
                                    uniform=uniform)
        total = Loss(total.value + part.value, part.weight)
    return total


def bottleneck(out, batch, *, mean: Out = Out('p.mean'), log_variance: Out = Out('p.log_variance')):
    """Return KL(N(mean, variance) || N(0, 1)), nats, an upper bound of what p knows of its session.

    The rate of the variational information bottleneck (Alemi et al. 2017, arXiv 1612.00410); a loss
    by which p predicts what follows is the other part. [ours] in place of `vclub`: c and p are
    functions of one t, so I(c; p) has no finite value to bound, and this has.

    Args:
      out: {name: output}.
      batch: types.Batch.
      mean: float32 [B, N, D]. Output with the means.
      log_variance: float32 [B, N, D]. Output with the logs of the variances.

    Returns:
      Loss [B, N].
    """
    value = 0.5 * (out[mean]**2 + jnp.exp(out[log_variance]) - 1 - out[log_variance]).sum(-1)
    return Loss(value, batch.mask.astype(jnp.float32))
