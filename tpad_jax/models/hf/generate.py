"""Generate text after a prompt with images: one pass over the prompt, then a token at a time.

One compiled function does all of it, so the KV cache is never copied in or out. The text of a row
depends only on that row. It depends neither on padding nor, when drawn, on other rows.
"""

import dataclasses
from functools import partial

import flax
import jax
import jax.numpy as jnp
import numpy as np

from tpad_jax.errors import InputError, refuse_if

LOW = -1e30  # least logit of an allowed token; that of others is -inf


@flax.struct.dataclass
class Sampling:
    """The distribution that tokens are drawn from.

    Attributes:
      temperature: divides the logits.
      top_k: only the k most likely tokens are drawn. 0: all.
      top_p: of these, only the most likely that together reach probability p are drawn. Equally
        likely tokens are kept together.
    """

    temperature: float = 1.0
    top_k: int = flax.struct.field(pytree_node=False, default=0)
    top_p: float = flax.struct.field(pytree_node=False, default=1.0)


def generate(model, params, prompt, *, steps, stop, key=None, sampling=None, allowed=None):
    """Continue prompts.

    Args:
      model: a VLM.
      params: its parameters, or variables {'params': ..., 'lora': ...}.
      prompt: (tokens, mask, image). tokens: int32 [B, S] with placeholders for images. mask: bool
        [B, S], where False is padding, which may be anywhere; a row of padding gets no text. image:
        uint8 [B, n, side, side, 3] in the order of the placeholders; n may be 0.
      steps: largest number of tokens of a text.
      stop: tokens that end a text. (): none.
      key: a typed key, from which every row derives its own, or one key per row [B]. None: the most
        likely token.
      sampling: a Sampling, which needs a key. None: the model's distribution.
      allowed: a trie.Trie. Texts are then complete titles of its catalogue.

    Returns:
      Tokens int32 [B, steps], each row ended by its stop token and -1 after it; and float32 [B],
      the sum of its tokens' log probabilities with the stop token. These are the probabilities of
      the model, without temperature and cuts. With a trie they are those among the allowed tokens,
      so the probabilities of all titles sum to 1.

    Raises:
      InputError: placeholders do not fit complete images, the parameters have no output embedding,
        a number is out of range, or the trie has another vocabulary, other stop tokens or titles
        longer than `steps`.
    """
    tokens, mask, image = prompt
    stop, sampling = tuple(int(t) for t in stop), sampling or Sampling()
    variables = params if 'params' in params else {'params': params}
    _check(model, variables, prompt, steps, stop, sampling, allowed)
    prompt = jnp.asarray(tokens, jnp.int32), jnp.asarray(mask, bool), image
    # without a key the sampling is unused, so it must not cause a compilation
    return _run(model, variables, prompt, key, Sampling() if key is None else sampling, allowed,
                steps=steps, stop=stop)


def _check(model, variables, prompt, steps, stop, sampling, allowed):
    tokens, mask, image = prompt
    decoder, most = model.spec.decoder, image.shape[1]
    each = model.spec.image_tokens(model.side) or 1
    # too many placeholders would repeat an image's last token
    counts = ((np.asarray(tokens) == model.spec.image_id) & np.asarray(mask, bool)).sum(axis=1)
    for row in np.flatnonzero((counts % each > 0) | (counts > each * most))[:1]:
        raise InputError(f'tokens: prompt {row} has {counts[row]} image placeholders. Expected '
                         f'{each} per image, at most {most} images. Fix: call data.prompts.expand')
    refuse_if(not decoder.tied and 'head' not in variables['params'],
              'params: no output embedding (lm_head). Expected one. Fix: choose another checkpoint')
    temperature, top_k, top_p = dataclasses.astuple(sampling)
    least = allowed.depth if allowed else 1
    for name, value, usable, rule in (
            # a title of the trie must fit, with its stop token
            ('steps', steps, steps >= least, f'at least {least} tokens'),
            ('temperature', temperature, temperature > 0, 'a number above 0; key=None is greedy'),
            ('top_k', top_k, top_k >= 0, 'at least 0; 0 keeps all tokens'),
            ('top_p', top_p, 0 < top_p <= 1, 'a number above 0, at most 1')):
        refuse_if(not usable, f'{name}={value}: out of range. Expected {rule}. Fix: change it')
    if allowed and (allowed.vocab != decoder.vocab or set(allowed.stop) != set(stop)):
        raise InputError(f'allowed: a trie with a vocabulary of {allowed.vocab} and stop tokens '
                         f'{allowed.stop}. Expected {decoder.vocab} and {stop}. Fix: build it so')


@partial(jax.jit, static_argnames=('model', 'steps', 'stop'))
def _run(model, variables, prompt, key, sampling, allowed, *, steps, stop):
    tokens, mask, image = prompt
    batch, length = tokens.shape
    if key is not None and key.ndim == 0:
        key = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(batch))

    def write(count, logits, live, node, out, score):
        """Add token number `count` [B] and its log probability to the state."""
        may = None if allowed is None else allowed.allowed(node) | ~live[:, None]
        log_p = jax.nn.log_softmax(_only(logits, may))
        if key is None:
            token = log_p.argmax(-1)
        else:
            drawn = cut(_only(logits / sampling.temperature, may), sampling.top_k, sampling.top_p)
            token = jax.vmap(lambda k, x: jax.random.categorical(jax.random.fold_in(k, count), x))(
                key, drawn)
        token = token.astype(jnp.int32)
        gain = jnp.take_along_axis(log_p, token[:, None], -1)[:, 0]
        out = out.at[:, count].set(jnp.where(live, token, -1))
        score = score + jnp.where(live, gain, 0)
        if allowed is not None:
            node = jnp.where(live, allowed.advance(node, token), node)
        live &= ~jnp.isin(token, jnp.array(stop, jnp.int32))
        return count + 1, live, node, out, score

    def more(state):
        (count, live, *_), _ = state
        return (count < steps) & live.any()

    def step(state):
        (count, live, node, out, score), cache = state
        logits, cache = model.apply(variables, jnp.maximum(out[:, count - 1], 0), live, cache,
                                    length + count - 1, method=_read_token)
        return write(count, logits, live, node, out, score), cache

    logits, cache = model.apply(variables, tokens, mask, image, steps, method=_read)
    state = write(jnp.int32(0), logits, mask.any(1), jnp.zeros(batch, jnp.int32),
                  jnp.full((batch, steps), -1, jnp.int32), jnp.zeros(batch))
    (_, _, _, out, score), _ = jax.lax.while_loop(more, step, (state, cache))
    return out, score


def _read(model, tokens, mask, image, steps):
    """Read prompts. Return logits [B, V] after the last tokens and a cache for `steps` more."""
    batch, length = tokens.shape
    h, cache = model.decode(model.prompt(tokens, mask, image),
                            model.empty_cache(batch, length + steps), 0)
    last = length - 1 - mask[:, ::-1].argmax(1)
    return model.logits(jnp.take_along_axis(h, last[:, None, None], 1)[:, 0]), cache


def _read_token(model, token, live, cache, index):
    """Read one more token [B]. Return logits [B, V] after it and the cache."""
    h, cache = model.decode(model.say(token[:, None], live[:, None]), cache, index)
    return model.logits(h[:, 0]), cache


def _only(x, may):
    # an allowed token has priority even if its logit is -inf or NaN
    return x if may is None else jnp.where(may, jnp.maximum(x, LOW), -jnp.inf)


def cut(x, top_k, top_p):
    """Set logits [B, V] to -inf outside of the k most likely, then of the most likely p."""
    # NaN compares as false and stays NaN
    if 0 < top_k < x.shape[-1]:
        x = jnp.where(x < jax.lax.top_k(x, top_k)[0][:, -1:], -jnp.inf, x)
    if top_p < 1:
        ordered = jnp.sort(x, descending=True)
        p = jax.nn.softmax(ordered)
        least = jnp.where(jnp.cumsum(p, -1) - p < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        x = jnp.where(x < least, -jnp.inf, x)
    return x
