"""The generation task: an MLLM learns to write a text."""

import jax
import jax.numpy as jnp

from tpad_jax.losses.contract import Out
from tpad_jax.types import Loss


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

    value = row_by_row(surprise, hidden, tokens) if by_row else surprise(hidden, tokens)
    weight = ((tokens >= 0) & batch.valid[:, None]).astype(jnp.float32)
    return Loss(value, weight)


def row_by_row(function, *arrays):
    """Apply a function to one row of the arrays [B, ...] at a time, in both passes."""
    again = jax.checkpoint(function)
    return jax.lax.map(lambda row: again(*row), arrays)
