"""Read the whole catalogue with an MLLM: content in, one row per item out."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from tpad_jax.models import tpad
from tpad_jax.parallel import compiled

CHUNK = 120  # items per compiled call; the last call is filled up


def encoder(spec: tpad.TPAD, content, names: tuple[str, ...]) -> Callable[[dict], dict]:
    """A function of nested params -> {name: float32 [V+1, ...]} for 'k' and 'r'; row 0 is zero.

    Compiled once however often it is called: the joint stage encodes anew every so many steps.
    """
    total = len(content.tokens)

    @compiled
    def read(params, image, has_image, tokens):
        rows = {}
        if 'k' in names:
            rows['k'] = tpad.read_items(spec, params, 'knowledge', image, has_image, tokens)
        if 'r' in names:
            rows['r'] = tpad.distil_items(spec, params, image, has_image, tokens)
        return rows

    @partial(jax.jit, static_argnums=1)
    def join(parts, keep):
        whole = jax.tree.map(lambda *x: jnp.concatenate(x)[:keep], *parts)
        return jax.tree.map(lambda x: x.at[0].set(0), whole)

    def encode(params):
        parts = []
        for begin in range(0, total, CHUNK):
            rows = [min(i, total - 1) for i in range(begin, begin + CHUNK)]
            parts.append(read(params, content.image[rows], content.has_image[rows],
                              content.tokens[rows]))
        return join(parts, total)

    return encode
