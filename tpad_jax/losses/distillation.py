"""What a student takes over from a teacher: LLaVA-KD's MDist and RDist (arXiv 2410.16236).

[paper] MDist matches next-token distributions at the response's tokens and at the image's alike, by
the Kullback-Leibler divergence from the teacher's; RDist matches the relations among an image's
tokens, by the cosine between both models' matrices of them. [ours] the other divergences; relations
as cosines of hidden states, which both models have whatever their widths; and who teaches whom:
names of outputs, so a larger MLLM may teach a smaller one, and the Knowledge-MLLM itself under
another adapter.
"""

import math

import jax
import jax.numpy as jnp

from tpad_jax.errors import InputError
from tpad_jax.losses.contract import Out
from tpad_jax.nn.mlp import unit
from tpad_jax.types import Loss

KINDS = ('forward', 'reverse', 'symmetric', 'js', 'skewed')


def mdist(out, batch, *, x: Out = Out('r.text'), teacher: Out = Out('k.text'),
          there: Out = Out('text.there'), table: Out = Out('vocabulary'),
          teacher_table: Out = Out('vocabulary'), kind='forward', temperature=1.0, skew=0.1,
          by_row=False):
    """Divergence of the student's next-token distributions from the teacher's. -> Loss [B, L]

    x, teacher: hidden states [B, L, width], of widths of their own; there: bool [B, L], what
    counts. table, teacher_table: rows of the words [W, width]; where the two differ in length, the
    words both have are compared (tables of one tokenizer are padded differently). kind, skew: see
    `divergence`. temperature: divides both models' logits, and its square multiplies the value, so
    that the gradient keeps its scale (Hinton et al. 2015). by_row: one row's logits exist at a
    time, in both passes. The teacher gets no gradient.

    Raises:
      InputError: another kind than `KINDS`.
    """
    if kind not in KINDS:
        raise InputError(f'mdist has no kind {kind!r}; choose from {", ".join(KINDS)}')
    words = min(len(out[table]), len(out[teacher_table]))

    def log_share(states, table):
        # bfloat16 states stay so in the product, whose results are float32
        logits = jnp.matmul(states, table[:words].astype(states.dtype).T,
                            preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits / temperature)

    def value(student, taught):
        known = jax.lax.stop_gradient(log_share(taught, out[teacher_table]))
        return temperature**2 * divergence(known, log_share(student, out[table]), kind, skew)

    if by_row:
        again = jax.checkpoint(value)
        result = jax.lax.map(lambda row: again(*row), (out[x], out[teacher]))
    else:
        result = value(out[x], out[teacher])
    return Loss(result, (out[there] & batch.valid[:, None]).astype(jnp.float32))


def divergence(p, q, kind, skew=0.1):
    """Divergence of q from p, both given as log-probabilities [..., W]. -> [...], nats, at least 0

    'forward': KL(p || q), which covers what the teacher may say. 'reverse': KL(q || p), which
    settles on a part of it. 'symmetric': their mean. 'js': Jensen-Shannon, at most log 2 (Lin
    1991). 'skewed': KL(p || skew p + (1 - skew) q), whose gradient stays bounded where q is all but
    0 (Ko et al. 2024); skew 0 is 'forward'.
    """
    def kl(a, b):
        return (jnp.exp(a) * (a - b)).sum(-1)

    match kind:
        case 'forward':
            return kl(p, q)
        case 'reverse':
            return kl(q, p)
        case 'symmetric':
            return (kl(p, q) + kl(q, p)) / 2
        case 'js':
            middle = jnp.logaddexp(p, q) - math.log(2)
            return (kl(p, middle) + kl(q, middle)) / 2
        case 'skewed':
            if not skew:
                return kl(p, q)
            return kl(p, jnp.logaddexp(p + math.log(skew), q + math.log1p(-skew)))
    raise ValueError(f'no divergence {kind!r}: {", ".join(KINDS)}')


def rdist(out, batch, *, axis=None, x: Out = Out('r.image'), teacher: Out = Out('k.image'),
          there: Out = Out('image.there')):
    """1 - the cosine between student's and teacher's relations among an image's tokens. -> Loss [B]

    A model's relations are the cosines of its tokens' hidden states with each other, [L, L]; x,
    teacher: [B, L, width], there: bool [B, L]. One value per item, so it does not depend on how a
    batch is divided; a row without an image has none. The teacher gets no gradient.
    """
    seen = out[there] & batch.valid[:, None]

    def relations(states):
        states = unit(states.astype(jnp.float32)) * seen[..., None]
        return jnp.einsum('bid,bjd->bij', states, states)

    student, taught = relations(out[x]), jax.lax.stop_gradient(relations(out[teacher]))
    # the sums are at least the number of tokens, but for rows that have none
    scale = jax.lax.rsqrt(jnp.maximum((student**2).sum((1, 2)) * (taught**2).sum((1, 2)), 1e-6))
    value = 1 - (student * taught).sum((1, 2)) * scale
    return Loss(value, seen.any(axis=1).astype(jnp.float32))
