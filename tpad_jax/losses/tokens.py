"""Losses on an MLLM's tokens: it learns to write a text, or learns as a student from a teacher.

The teacher's losses are MDist and RDist of LLaVA-KD (arXiv 2410.16236). [paper] MDist matches
next-token distributions at the response's tokens and at the image's alike, by the Kullback-Leibler
divergence from the teacher's; RDist matches the relations among an image's tokens, by the cosine
between both models' matrices of them. [ours] the other divergences; relations as cosines of hidden
states, which any two models have; and student and teacher as names of outputs, so a larger MLLM may
teach a smaller one, or the Knowledge-MLLM itself under another adapter.
"""

import math

import jax
import jax.numpy as jnp

from tpad_jax.errors import InputError
from tpad_jax.losses.contract import Out
from tpad_jax.nn.linear import unit
from tpad_jax.types import Loss

KINDS = ('forward', 'reverse', 'symmetric', 'js', 'skewed')


def generation(out, batch, *, x: Out = Out('describe'),
               tokens: Out = Out('describe.tokens'), table: Out = Out('vocabulary'), by_row=False):
    """Return the next-token cross entropy of a text, per token.

    [paper] both MLLMs learn by a generation task; [ours] the features they write from (see
    models/).

    Args:
      out: {name: output}.
      batch: types.Batch.
      x: float32 [B, T, width]. Output with the hidden states.
      tokens: int32 [B, T]. Output with the text, -1 pads.
      table: float32 [W, width]. Output with the rows of the words.
      by_row: whether one row's scores exist at a time, in both passes: B times less memory for a
        large vocabulary.

    Returns:
      Loss [B, T].
    """
    hidden, tokens = out[x], out[tokens]
    words = out[table].astype(hidden.dtype)

    def surprise(hidden, tokens):
        # bfloat16 states stay so in the product, whose results are float32
        logits = jnp.matmul(hidden, words.T, preferred_element_type=jnp.float32)
        own = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - own

    weight = ((tokens >= 0) & batch.valid[:, None]).astype(jnp.float32)
    return Loss(_rows(surprise, by_row, hidden, tokens), weight)


def bag_of_words(out, batch, *, x: Out = Out('mention'), tokens: Out = Out('describe.tokens'),
                 table: Out = Out('vocabulary')):
    """Return the cross entropy of a text's words without their order, per token.

    One softmax an item instead of one a token (Le and Mikolov 2014, arXiv 1405.4053, PV-DBOW).

    Args:
      out: {name: output}.
      batch: types.Batch.
      x: float32 [B, width]. Output with the states.
      tokens: int32 [B, T]. Output with the text, -1 pads.
      table: float32 [W, width]. Output with the rows of the words.

    Returns:
      Loss [B, T].
    """
    hidden, tokens = out[x], out[tokens]
    scores = jax.nn.log_softmax(hidden @ out[table].T, axis=-1)
    value = -jnp.take_along_axis(scores, jnp.maximum(tokens, 0), axis=-1)
    return Loss(value, ((tokens >= 0) & batch.valid[:, None]).astype(jnp.float32))


def mdist(out, batch, *, x: Out = Out('r.text'), teacher: Out = Out('k.text'),
          there: Out = Out('text.there'), table: Out = Out('vocabulary'),
          teacher_table: Out = Out('vocabulary'), kind='forward', temperature=1.0, skew=0.1,
          by_row=False):
    """Return the divergence of the student's next-token distributions from the teacher's.

    The two vocabularies may differ in length (tables of one tokenizer are padded differently): the
    words of both are compared. The teacher gets no gradient.

    Args:
      out: {name: output}.
      batch: types.Batch.
      x: float32 [B, L, width]. Output with the student's hidden states.
      teacher: float32 [B, L, width]. Output with the teacher's, of any width.
      there: bool [B, L]. Output with the tokens that count.
      table: float32 [W, width]. Output with the words of the student.
      teacher_table: float32 [W, width]. Output with the words of the teacher.
      kind: see `divergence`.
      temperature: divides both models' logits; its square multiplies the value, so that the
        gradient keeps its scale (Hinton et al. 2015).
      skew: see `divergence`.
      by_row: whether one row's logits exist at a time, in both passes.

    Returns:
      Loss [B, L].

    Raises:
      InputError: another kind than `KINDS`.
    """
    words = min(len(out[table]), len(out[teacher_table]))

    def log_share(states, table):
        # bfloat16 states stay so in the product, whose results are float32
        logits = jnp.matmul(states, table[:words].astype(states.dtype).T,
                            preferred_element_type=jnp.float32)
        return jax.nn.log_softmax(logits / temperature)

    def value(student, taught):
        known = jax.lax.stop_gradient(log_share(taught, out[teacher_table]))
        return temperature**2 * divergence(known, log_share(student, out[table]), kind, skew)

    return Loss(_rows(value, by_row, out[x], out[teacher]),
                (out[there] & batch.valid[:, None]).astype(jnp.float32))


def divergence(p, q, kind, skew=0.1):
    """Return a divergence of q from p, nats, at least 0.

    Args:
      p: float32 [..., W]. Log-probabilities of the teacher.
      q: float32 [..., W]. Log-probabilities of the student.
      kind: 'forward': KL(p || q), which covers all that the teacher may write. 'reverse':
        KL(q || p), which settles on a part of it. 'symmetric': their mean. 'js': Jensen-Shannon, at
        most log 2 (Lin 1991). 'skewed': KL(p || skew p + (1 - skew) q), whose gradient stays
        bounded where q is almost 0 (Ko et al. 2024).
      skew: of kind 'skewed'; 0 is 'forward'.

    Returns:
      float32 [...].

    Raises:
      InputError: another kind than `KINDS`.
    """
    def kl(a, b):
        return (jnp.exp(a) * (a - b)).sum(-1)

    match kind:
        case 'reverse':
            return kl(q, p)
        case 'symmetric':
            return (kl(p, q) + kl(q, p)) / 2
        case 'js':
            middle = jnp.logaddexp(p, q) - math.log(2)
            return (kl(p, middle) + kl(q, middle)) / 2
        case 'skewed' if skew:
            return kl(p, jnp.logaddexp(p + math.log(skew), q + math.log1p(-skew)))
        case 'forward' | 'skewed':
            return kl(p, q)
    raise InputError(f'kind={kind!r}: no such divergence. Expected one of {", ".join(KINDS)}. Fix: '
                     'choose one.')


def rdist(out, batch, *, x: Out = Out('r.image'), teacher: Out = Out('k.image'),
          there: Out = Out('image.there')):
    """Return 1 - the cosine between the relations among an image's tokens of student and teacher.

    The relations of a model are the cosines of its tokens' hidden states with each other, [L, L].
    One value per item, so it does not depend on how a batch is divided; a row without an image has
    none. The teacher gets no gradient.

    Args:
      out: {name: output}.
      batch: types.Batch.
      x: float32 [B, L, width]. Output with the student's hidden states.
      teacher: float32 [B, L, width]. Output with the teacher's.
      there: bool [B, L]. Output with the tokens that count.

    Returns:
      Loss [B].
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


def _rows(function, by_row, *arrays):
    """Apply a function to arrays [B, ...]; by_row: one row at a time, in both passes."""
    again = jax.checkpoint(function)
    return jax.lax.map(lambda row: again(*row), arrays) if by_row else function(*arrays)
