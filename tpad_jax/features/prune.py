"""Prunes the decoder of an MLLM once, before anything is trained (TAMP).

A weight's score is |W_ij| times the norm of its input over calibration items; the lowest of every
output become zero. Source: Wanda (Sun et al., arXiv 2306.11695), equation 1 [paper]. TAMP
(arXiv 2504.09897) adds two parts [paper]: layers whose tokens are diverse keep more weights, and
the norms are over the tokens that represent an item best. Their constants are [ours].
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from flax.traverse_util import flatten_dict, unflatten_dict

from tpad_jax.distributed.devices import compiled
from tpad_jax.models import readers
from tpad_jax.models.hf.vlm import VLM
from tpad_jax.nn.linear import Linear, unit

WAYS = 'tamp', 'wanda', 'magnitude'
ITEMS, ROWS = 64, 8  # calibration items, and those of a call
MOST = 0.8  # of a layer's weights that are pruned
NEAR = 3  # neighbours of a token
LIMIT = 0.05  # MMD^2 of all tokens and the chosen ones at which no more are chosen


def record(call, args, kwargs, context):
    """Sow inputs of the decoder's dense layers and outputs of its blocks (a flax interceptor)."""
    module, out = context.module, call(*args, **kwargs)
    if 'decoder' in module.path and context.method_name == '__call__':
        if isinstance(module, Linear):
            module.sow('intermediates', 'input', args[0])
        elif module.path[-1] == 'layers':
            module.sow('intermediates', 'out', out[0][0])
    return out


def diversity(x, kind):
    """Compute the mean cosine distance of tokens within vision, within text and across.

    Args:
      x: float [L, D]. A layer's output.
      kind: int32 [L]. 1: vision, 2: text, 0: neither.

    Returns:
      float32 [3]; NaN where there are no two tokens to compare.
    """
    x = unit(x.astype(jnp.float32))
    distance, apart = 1 - x @ x.T, ~jnp.eye(len(x), dtype=bool)
    one, other = (kind == n for n in (1, 2))
    return jnp.stack([jnp.where(pairs, distance, 0).sum() / pairs.sum() for pairs in (
        one[:, None] & one & apart, other[:, None] & other & apart, one[:, None] & other)])


def representative(x, attention, there):
    """Choose the tokens that represent an item, by attention.

    Each token passes its attention to its nearest neighbours in proportion to their cosine. The
    highest is chosen, and its neighbours lose what it passed to them, until the chosen tokens are
    distributed as all of them, by MMD^2 with a Gaussian kernel.

    Args:
      x: float [L, D]. A layer's input.
      attention: float [L]. Received by each token.
      there: bool [L]. False is padding.

    Returns:
      bool [L].
    """
    x, place = x.astype(jnp.float32), jnp.arange(len(x))
    cosine = unit(x) @ unit(x).T
    both = there[:, None] & there
    pull, near = jax.lax.top_k(jnp.where(both & (place[:, None] != place), cosine, 0), NEAR)
    pull = jnp.maximum(pull, 0)
    score = attention + (pull * attention[near]).sum(axis=1)

    def choose(carry, _):
        score, free = carry
        best = jnp.where(free, score, -jnp.inf).argmax()
        return (score.at[near[best]].add(-pull[best] * score[best]), free.at[best].set(False)), best

    _, order = jax.lax.scan(choose, (score, there), place)
    square = (x * x).sum(axis=1)
    distance = jnp.maximum(square[:, None] + square - 2 * x @ x.T, 0)
    total = there.sum()
    kernel = jnp.exp(-distance / jnp.maximum(jnp.where(both, distance, 0).sum() / total ** 2, 1e-9))
    kernel, count = jnp.where(both, kernel, 0), place + 1
    within = jnp.diagonal(kernel[order][:, order].cumsum(axis=0).cumsum(axis=1)) / count ** 2
    across = kernel.sum(axis=1)[order].cumsum() / (count * total)
    mmd = within - 2 * across + kernel.sum() / total ** 2
    enough = jnp.where(mmd <= LIMIT, place, total - 1).min()
    rank = jnp.full(len(x), len(x)).at[order].min(place)
    return there & (rank <= enough)


def shares(importance: np.ndarray, share: float) -> np.ndarray:
    """Divide a share among layers of one size: inverse to their importance, none above MOST."""
    return np.minimum(MOST, scipy.optimize.brentq(
        lambda scale: np.minimum(MOST, scale / importance).mean() - share, 0,
        MOST * importance.max()) / importance)


def zeroed(kernel: np.ndarray, norm: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Set the weights of each output with the lowest scores to zero.

    Args:
      kernel: float [layers, I, O].
      norm: float [layers, I]. Of the inputs.
      share: float [layers]. Of the weights that become zero.
    """
    out = np.array(kernel)
    for weights, inputs, part in zip(out, norm, share, strict=True):
        count = round(part * len(weights))
        lowest = np.argpartition(np.abs(weights) * inputs[:, None], count, axis=0)[:count]
        np.put_along_axis(weights, lowest, 0, axis=0)
    return out


def pruned(spec, params: dict, content, *, share: float, by: str, seed: int = 0
           ) -> tuple[dict, dict]:
    """Prune the decoder of the base.

    Args:
      spec: models.tpad.TPAD.
      params: nested.
      content: catalogue.Content, of which a sample is read.
      share: of all weights of the decoder's layers that become zero.
      by: one of WAYS. 'magnitude' is |W| alone.
      seed: of the sample.

    Returns:
      The parameters, and {'zeros': share of zeros in each layer; 'importance': of each layer;
      'tokens': share of the tokens whose inputs count}.
    """
    drawn = sample(content, seed)
    begin = len(spec.knowledge.base.before) if isinstance(spec.knowledge.base, VLM) else 1
    measure = compiled(partial(measured, spec, by, begin), seldom=True)
    parts = jax.device_get([measure(params, *(x[rows] for x in drawn)) for rows in np.split(
        np.arange(len(drawn[0])), range(ROWS, len(drawn[0]), ROWS))])
    norms = {path: np.sqrt(sum(part[0][path] for part in parts)) for path in parts[0][0]}
    diverse = np.concatenate([part[1] for part in parts], axis=1)
    # without pictures there is text alone
    diverse = diverse[:, :, np.isfinite(diverse).any(axis=(0, 1))]
    importance = np.nanmean(diverse, axis=1).mean(axis=1)
    parted = shares(importance, share) if by == 'tamp' else np.full(len(importance), share)
    flat, zeros = flatten_dict(params, sep='/'), []
    for path, norm in norms.items():
        name = f'base/decoder/layers/{path}/kernel'
        kernel = zeroed(np.asarray(flat[name]), norm if by != 'magnitude' else np.ones_like(norm),
                        parted)
        zeros.append((kernel == 0).sum(axis=(1, 2)))
        flat[name] = jax.device_put(kernel, getattr(flat[name], 'sharding', None))
    weights = sum(flat[f'base/decoder/layers/{path}/kernel'][0].size for path in norms)
    return unflatten_dict(flat, sep='/'), {
        'zeros': (sum(zeros) / weights).tolist(), 'importance': importance.tolist(),
        'tokens': float(sum(part[2] for part in parts) / sum(part[3] for part in parts))}


def sample(content, seed: int) -> tuple:
    """Draw calibration items: images, whether they are there, and tokens."""
    total = len(content.tokens) - 1
    ids = 1 + np.random.default_rng(seed).permutation(total)[:ITEMS]
    return content.image[ids], content.has_image[ids], content.tokens[ids]


def measured(spec, by, begin, params, image, has_image, tokens):
    """Read items and sum what the scores need.

    Returns:
      {layer of the decoder: squares of its inputs over the tokens that count, [layers, I]};
      `diversity` [layers, B, 3]; the numbers of tokens that count and of all.
    """
    with nn.intercept_methods(record):
        _, seen = spec.knowledge.apply(
            readers.variables(spec, params, 'knowledge'), image, has_image, tokens,
            method='states', mutable=['intermediates'])
    seen = {path: x for path, (x,) in flatten_dict(
        seen['intermediates']['base']['decoder']['layers'], sep='/').items()}
    out = seen['out']
    pictured = out.shape[2] - begin - tokens.shape[1]
    kind = np.repeat([0, 1, 2], [begin, pictured, tokens.shape[1]])
    there = jnp.concatenate([jnp.ones((len(tokens), begin), bool), jnp.repeat(
        has_image[:, None], pictured, axis=1), tokens >= 0], axis=1)
    counts = jnp.broadcast_to(there, out.shape[:3])
    if by == 'tamp':
        counts = jax.vmap(jax.vmap(representative), (0, 0, None))(
            seen['attention/q/input'], seen['attention/received'], there)
    squares = {path.removesuffix('/input'): jnp.einsum(
        'nbld,nbl->nd', jnp.square(x.astype(jnp.float32)), counts.astype(jnp.float32))
        for path, x in seen.items() if path.endswith('/input')}
    each = jax.vmap(jax.vmap(diversity), (0, None))(out, jnp.where(there, kind, 0))
    return squares, each, counts.sum(), there.sum() * len(out)
